"""Drift by base and by extension method: what a choice of RoPE does to its own rounding.

mean |Δ score| of fp32 angles, at 1,000,000      base 10,000 5.7e-3      the same, positions interpolated by 16 3.6e-4
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anchor_attn.drift.measure import SHIFTS, measure_drift
from anchor_attn.drift.policies import Policy
from anchor_attn.drift.report import DriftRecord
from anchor_attn.drift.states import random_states
from anchor_attn.drift.view import Queries
from anchor_attn.rope.checks import checked_number
from anchor_attn.rope.methods import METHODS, method_frequencies

BASES = (1e4, 5e5, 5e6, 1e7, 5e7)
ORIGINAL_LEN, FACTOR = 8192, 16.0  # to 128K
SEQ_LEN = 2048
QUERIES = 128
DRIFT_FIELDS = ("policy", "shift", "mean_abs", "max_abs", "rms", "relative", "predicted", "floor")
# All but "longrope", whose factors are a model's own, and "dynamic", which at one length is another base.
SWEPT_METHODS = tuple(method for method in METHODS if method not in ("longrope", "dynamic"))


@dataclass(frozen=True)
class SweptRecord:
    """The drift of all pairs of one policy and shift, under one RoPE.

    Attributes:
        base: theta, before the extension.
        method: as `extend`; "default" is plain RoPE.
        attention_factor: on cos and sin; its square is on every score.
        drift: the record.
    """

    base: float
    method: str
    attention_factor: float
    drift: DriftRecord

    def record(self) -> dict[str, Any]:
        """As a result file has it: only what differs in a sweep."""
        drift = {name: getattr(self.drift, name) for name in DRIFT_FIELDS}
        return {"base": self.base, "method": self.method, "attention_factor": self.attention_factor, **drift}


def sweep_drift(
    bases: Sequence[float] = BASES,
    methods: Sequence[str] = SWEPT_METHODS,
    *,
    original_len: int = ORIGINAL_LEN,
    factor: float = FACTOR,
    policies: Sequence[str | Policy] | None = None,
    shifts: Sequence[int] = SHIFTS,
    seq_len: int = SEQ_LEN,
    head_dim: int = 128,
    queries: Queries = QUERIES,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[SweptRecord]:
    """Measure drift under every base and every method, with the same random query and key.

    Args:
        bases: theta.
        methods: of `extend`, each at `factor`.
        original_len: tokens that methods start from.
        factor: above 1.
        policies: as `measure_drift`.
        shifts: as `measure_drift`.
        seq_len: tokens.
        head_dim: all of it rotated.
        queries: as `measure_drift`.
        seed: of query and key.
        say: told what is being done.

    Raises:
        ValueError: as `measure_drift` and `method_frequencies`; no base or no method.
    """
    if not bases or not methods:
        raise ValueError(f"bases and methods must name one at least, got {list(bases)} and {list(methods)}; pass both.")
    drawn = random_states(seq_len, head_dim, seed=seed)
    swept: list[SweptRecord] = []
    for base in bases:
        for method in methods:
            inv_freq, attention_factor = method_frequencies(
                method, checked_number("bases", base), head_dim, original_len, factor
            )
            say(f"base {base:,.0f}, {method}")
            states = replace(drawn, inv_freq=inv_freq, attention_factor=attention_factor)
            report = measure_drift(states=states, policies=policies, shifts=shifts, queries=queries, stages=False)
            swept += [SweptRecord(base, method, attention_factor, record) for record in report.select()]
    return swept
