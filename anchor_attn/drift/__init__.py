"""How far RoPE in low precision drifts from relative, measured stage by stage.

measure     `measure_drift`: scores and attention before and after a shift
states      query and key before rotation, and all that turns them into scores
policies    what each stage is rounded to, and RoPE and attention in it
view        which pairs are looked at; parts, tally and pipelines go through them, and memory says what fits
report      records, which records makes; result pools them over layers and lengths
predict     what rounding is expected to cause, by the model in rounding
spectrum    the drift of each frequency pair
sweep       the same under every base and extension method
models      a model's own query and key, and all of it at two shifts
patterns    whether an anchor reduces it
paper       the protocol of the paper
pages       tables, sentences, pictures and drift.html
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anchor_attn.drift.measure import measure_drift as measure_drift
from anchor_attn.drift.models.sinks import SinkRecord as SinkRecord
from anchor_attn.drift.models.sinks import measure_sinks as measure_sinks
from anchor_attn.drift.paper.claims import judge_paper as judge_paper
from anchor_attn.drift.paper.measure import measure_paper as measure_paper
from anchor_attn.drift.paper.measure import random_sequences as random_sequences
from anchor_attn.drift.paper.report import PaperReport as PaperReport
from anchor_attn.drift.patterns.measure import measure_patterns as measure_patterns
from anchor_attn.drift.patterns.report import PatternReport as PatternReport
from anchor_attn.drift.policies import POLICIES as POLICIES
from anchor_attn.drift.policies import Policy as Policy
from anchor_attn.drift.predict import Prediction as Prediction
from anchor_attn.drift.predict import predict_drift as predict_drift
from anchor_attn.drift.report import DriftRecord as DriftRecord
from anchor_attn.drift.report import DriftReport as DriftReport
from anchor_attn.drift.states import States as States
from anchor_attn.drift.states import random_states as random_states

if TYPE_CHECKING:
    from anchor_attn.drift.models.capture import capture_states as capture_states
    from anchor_attn.drift.models.shifted import ShiftedRecord as ShiftedRecord
    from anchor_attn.drift.models.shifted import ShiftedReport as ShiftedReport
    from anchor_attn.drift.models.shifted import measure_shifted as measure_shifted

# What needs transformers is imported when it is asked for.
LAZY = {
    "ShiftedRecord": "anchor_attn.drift.models.shifted",
    "ShiftedReport": "anchor_attn.drift.models.shifted",
    "capture_states": "anchor_attn.drift.models.capture",
    "measure_shifted": "anchor_attn.drift.models.shifted",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'anchor_attn.drift' has no attribute {name!r}")
