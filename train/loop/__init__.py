"""`anchor-attn train`: from a config to a run that a kill does not end, and that goes on to the same losses."""

from anchor_attn.train.loop.losses import read_losses as read_losses
from anchor_attn.train.loop.run import Outcome as Outcome
from anchor_attn.train.loop.run import train as train
from anchor_attn.train.loop.settings import Settings as Settings
from anchor_attn.train.loop.settings import settings_from as settings_from
