"""Which `rope_precision` of `wrap` takes the drift away: the same states, or the same model, under each.

    rope_precision    angles     cos and sin    rotation       query and key, as attention reads them
    "model"           float32    the model's    the model's    the model's
    "bfloat16"        float32    bfloat16       bfloat16       the model's
    "float32"         float32    float32        float32        the model's
    "exact"           float64    float32        float32        the model's

The last column no setting changes: what it rounds, stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anchor_attn.drift.measure import measure_drift
from anchor_attn.drift.policies import DTYPES, Policy, Rounding
from anchor_attn.drift.report import DriftReport
from anchor_attn.drift.result import DriftResult
from anchor_attn.drift.states import States
from anchor_attn.drift.view import BY_LENGTH, Queries
from anchor_attn.masks import PackedLayout
from anchor_attn.rope.precision import ROPE_PRECISIONS, RopePrecision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BEFORE: RopePrecision = "model"
FIXED_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class FixRecord:
    """What a shift changes under one setting.

    Attributes:
        rope_precision: of `wrap`.
        shift: of all positions.
        mean_abs: mean |drift| of scores.
        ratio: of it to that of "model".
        logits_mean_abs: of the wrapped model itself, mean |difference| of the logits; None of no model.
        kl_nats: mean over tokens of KL(unshifted ‖ shifted); None of no model.
    """

    rope_precision: str
    shift: int
    mean_abs: float
    ratio: float | None
    logits_mean_abs: float | None = None
    kl_nats: float | None = None

    def record(self) -> dict[str, Any]:
        """As a result file has it."""
        return asdict(self)


def policy_of(rope_precision: RopePrecision, dtype: torch.dtype) -> Policy:
    """What a setting of `wrap` comes to in a model of a dtype.

        policy_of("exact", torch.bfloat16)      angles float64, table and rotation float32, storage bfloat16

    Raises:
        ValueError: a dtype that RoPE has no such settings for.
    """
    own = str(dtype).removeprefix("torch.")
    if own not in FIXED_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(FIXED_DTYPES)}, got {own}; pass a model of one of them.")
    stored: Rounding = next(rounding for rounding in DTYPES if rounding == own)
    rotated: dict[RopePrecision, Rounding] = {"model": stored, "bfloat16": "bfloat16"}
    turned = rotated.get(rope_precision, "float32")
    return Policy(
        rope_precision,
        angles="float64" if rope_precision == "exact" else "float32",
        table=turned,
        rotation=turned,
        storage=stored,
        accumulation="float32",
        softmax="float32",
    )


def measure_fix(
    states: Sequence[States],
    shifts: Sequence[int],
    *,
    queries: Queries = BY_LENGTH,
    model: "PreTrainedModel | None" = None,
    input_ids: Tensor | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[FixRecord], DriftResult]:
    """The drift of scores under every setting of `wrap`, and with a model the model's own change of logits.

    Args:
        states: a layer each, of one dtype.
        shifts: Δ, each at least 1.
        queries: as `measure_drift`.
        model: that the states are of; it comes back unwrapped.
        input_ids: that it reads, int64 [B, S].
        say: told what is being done.

    Returns:
        A record a setting and shift, and the measurement of the scores with the stages of each.
    """
    policies = [policy_of(precision, states[0].query.dtype) for precision in ROPE_PRECISIONS]
    report: DriftReport = measure_drift(states=list(states), policies=policies, shifts=shifts, queries=queries)
    result = DriftResult.of({states[0].seq_len: report})
    logits: dict[tuple[str, int], dict[str, float]] = {}
    if model is not None and input_ids is not None:
        logits = _measure_wrapped(model, input_ids, result.shifts, say)
    records = []
    for precision in ROPE_PRECISIONS:
        for shift in result.shifts:
            before, after = (result.at(name, shift).mean_abs for name in (BEFORE, precision))
            ratio = after / before if before else None
            of_model = logits.get((precision, shift), {})
            records.append(
                FixRecord(precision, shift, after, ratio, of_model.get("logits_mean_abs"), of_model.get("kl_nats"))
            )
    return records, result


def _measure_wrapped(
    model: "PreTrainedModel", input_ids: Tensor, shifts: Sequence[int], say: Callable[[str], None]
) -> dict[tuple[str, int], dict[str, float]]:
    """The wrapped model on one document behind the anchor, which is plain causal attention, at moved positions."""
    from anchor_attn.drift.models.kept import kept_rotaries
    from anchor_attn.drift.models.shifted import compare_logits
    from anchor_attn.hf.wrapping import unwrap, wrap

    ids = input_ids.to(model.device)
    batch, seq_len = ids.shape
    layout = PackedLayout.from_lengths([[seq_len - 1]] * batch).to(ids.device)
    still_ids = torch.arange(seq_len, device=ids.device)[None].expand(batch, -1)
    found: dict[tuple[str, int], dict[str, float]] = {}
    model.eval()
    for precision in ROPE_PRECISIONS:
        say(f"wrapped, rope_precision {precision!r}")
        with kept_rotaries(model), torch.no_grad():  # wrap runs it too
            wrap(model, rope_precision=precision)
            try:
                still, *moved = (
                    model(input_ids=ids, position_ids=still_ids + shift, document_ids=layout, use_cache=False).logits
                    for shift in (0, *shifts)
                )
            finally:
                unwrap(model)
        for shift, logits in zip(shifts, moved, strict=True):
            found[precision, shift] = compare_logits(still, logits)
    return found
