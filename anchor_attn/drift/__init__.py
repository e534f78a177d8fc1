"""How far RoPE in low precision drifts from relative, measured stage by stage."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anchor_attn.drift.measure import measure_drift as measure_drift
from anchor_attn.drift.paper import PaperReport as PaperReport
from anchor_attn.drift.paper import judge_paper as judge_paper
from anchor_attn.drift.paper import measure_paper as measure_paper
from anchor_attn.drift.paper import random_sequences as random_sequences
from anchor_attn.drift.patterns import PatternReport as PatternReport
from anchor_attn.drift.patterns import measure_patterns as measure_patterns
from anchor_attn.drift.policies import POLICIES as POLICIES
from anchor_attn.drift.policies import Policy as Policy
from anchor_attn.drift.predict import Prediction as Prediction
from anchor_attn.drift.predict import predict_drift as predict_drift
from anchor_attn.drift.report import DriftRecord as DriftRecord
from anchor_attn.drift.report import DriftReport as DriftReport
from anchor_attn.drift.sinks import SinkRecord as SinkRecord
from anchor_attn.drift.sinks import measure_sinks as measure_sinks
from anchor_attn.drift.states import States as States
from anchor_attn.drift.states import random_states as random_states

if TYPE_CHECKING:
    from anchor_attn.drift.capture import capture_states as capture_states
    from anchor_attn.drift.shifted import ShiftedRecord as ShiftedRecord
    from anchor_attn.drift.shifted import ShiftedReport as ShiftedReport
    from anchor_attn.drift.shifted import measure_shifted as measure_shifted

# What needs transformers is imported when it is asked for.
LAZY = {
    "ShiftedRecord": "anchor_attn.drift.shifted",
    "ShiftedReport": "anchor_attn.drift.shifted",
    "capture_states": "anchor_attn.drift.capture",
    "measure_shifted": "anchor_attn.drift.shifted",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'anchor_attn.drift' has no attribute {name!r}")
