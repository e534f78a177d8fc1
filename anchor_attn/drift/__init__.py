"""How far RoPE in low precision drifts from relative, measured stage by stage."""

from anchor_attn.drift.measure import measure_drift as measure_drift
from anchor_attn.drift.policies import POLICIES as POLICIES
from anchor_attn.drift.policies import Policy as Policy
from anchor_attn.drift.report import DriftRecord as DriftRecord
from anchor_attn.drift.report import DriftReport as DriftReport
from anchor_attn.drift.states import States as States
from anchor_attn.drift.states import random_states as random_states
