"""A whole model at two shifts: the same tokens at positions 0 … S − 1 and Δ … S − 1 + Δ, in several dtypes.

    dtype       rope      what moves its hidden states
    bfloat16    model     rounding, and what the model makes of absolute positions
    float32     model     the same with less rounding
    float64     model     angles that are float32 all the same, as transformers computes them
    float64     exact     nothing, where positions come in by rotation alone: the floor

What stays in the last line is no rounding of RoPE: a learned position, a length that chooses frequencies.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor_attn.drift.measure import checked_shifts
from anchor_attn.drift.models.capture import checked_ids
from anchor_attn.drift.models.kept import kept_rotaries
from anchor_attn.drift.policies import FP64
from anchor_attn.hf.refusals import refuse_unsupported
from anchor_attn.hf.wrapping import decoder_of
from anchor_attn.rope.precision import RopePrecision
from anchor_attn.rope.rotary import override_tables, rotaries_of

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
DTYPES: tuple[Dtype, ...] = ("float16", "bfloat16", "float32", "float64")
# Of tokens whose logits are compared at once, in float64.
BLOCK_TOKENS = 256


@dataclass(frozen=True)
class ShiftedRecord:
    """What a shift of all positions changes in one dtype.

    Attributes:
        dtype: of weights and states.
        rope_precision: "model", angles in float32; or "exact", angles in float64.
        shift: of all positions.
        layer: behind which the hidden states stand, 0 for the embeddings; None for the logits.
        hidden_rms: root of the mean square of their difference.
        hidden_rel_rms: the same, as a share of the hidden states' own.
        hidden_max_abs: their largest difference.
        logits_mean_abs: mean |difference| of the logits.
        logits_max_abs: largest.
        kl_nats: mean over tokens of KL(unshifted ‖ shifted), computed in float64.
        top1_changed: share of tokens whose likeliest successor is another.
    """

    dtype: str
    rope_precision: str
    shift: int
    layer: int | None
    hidden_rms: float | None = None
    hidden_rel_rms: float | None = None
    hidden_max_abs: float | None = None
    logits_mean_abs: float | None = None
    logits_max_abs: float | None = None
    kl_nats: float | None = None
    top1_changed: float | None = None

    def record(self) -> dict[str, Any]:
        """As a result file has it."""
        return asdict(self)


@dataclass(frozen=True)
class ShiftedReport:
    """All records of a model, and what it was asked for."""

    records: tuple[ShiftedRecord, ...] = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)

    def at(
        self, dtype: str, shift: int, layer: int | None = None, rope_precision: RopePrecision = "model"
    ) -> ShiftedRecord:
        """The one record of a dtype, a shift and a layer; of the logits when `layer` is None.

        Raises:
            KeyError: none.
        """
        asked = (dtype, rope_precision, shift, layer)
        for each in self.records:
            if (each.dtype, each.rope_precision, each.shift, each.layer) == asked:
                return each
        raise KeyError(f"no record of {dtype}, rope {rope_precision!r}, at shift {shift}, layer {layer}")

    def exact_precision(self) -> RopePrecision:
        """Of the float64 run in which nothing is rounded: "exact", or "model" where nothing rotates."""
        exact = [each.rope_precision for each in self.records if each.dtype == "float64"]
        return "exact" if "exact" in exact else "model"

    def architectural_share(self, shift: int, dtype: str = "bfloat16") -> float | None:
        """What is left of the logits' movement once nothing is rounded, as a share of it; None where nothing moves.

        Raises:
            KeyError: a dtype or shift that was not measured, or a report without floor.
        """
        floor = self.at("float64", shift, rope_precision=self.exact_precision()).logits_mean_abs
        moved = self.at(dtype, shift).logits_mean_abs
        return floor / moved if floor is not None and moved else None


def measure_shifted(
    model: nn.Module,
    input_ids: Tensor,
    shifts: Sequence[int] = (16, 1_000, 30_000),
    dtypes: Sequence[Dtype] = ("bfloat16", "float32"),
    floor: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> ShiftedReport:
    """Run a model at its positions and at shifted ones, and compare hidden states and logits.

        measure_shifted(model, input_ids, [1_000]).at("bfloat16", 1_000).kl_nats

    Every dtype is a copy of the model, one at a time: of 7 billion parameters 14 GB in bfloat16, 28 in float32 and 56
    in float64; hidden states of all layers are held twice. cos and sin come from the config's
    frequencies, as in a model loaded in that dtype, and not from buffers that a cast has rounded. transformers computes
    some norms in float32 even in a float64 model, so that the floor is not that of float64 alone.

    Args:
        model: a transformers decoder, or a PEFT model of one; left as it was.
        input_ids: integers [B, S].
        shifts: Δ, each at least 1.
        dtypes: "float16", "bfloat16", "float32" or "float64".
        floor: measure in float64 too, with angles in float32 and, of a rotary model, in float64.
        say: told what is being done.

    Returns:
        Records by dtype, shift and layer, and of the logits.

    Raises:
        TypeError: not a transformers model, or ids that are no integers.
        ValueError: ids of another shape, a shift below 1 or beyond exact positions, an unknown dtype, or a model that
            does not run so.
    """
    decoder = decoder_of(model)
    refuse_unsupported(decoder)
    ids = checked_ids("input_ids", input_ids).to(decoder.device)
    shifts = checked_shifts(shifts, ids.shape[1], [FP64])
    if not dtypes or set(dtypes) - set(DTYPES):
        raise ValueError(f"dtypes must be among {', '.join(DTYPES)}, got {list(dtypes)}; pass some of them.")
    has_rotary = next(rotaries_of(decoder), None) is not None
    runs: dict[Dtype, tuple[RopePrecision, ...]] = dict.fromkeys(dtypes, ("model",))
    if floor:
        runs["float64"] = ("model", "exact") if has_rotary else ("model",)
    records: list[ShiftedRecord] = []
    for dtype, precisions in runs.items():
        say(f"{type(decoder).__name__} in {dtype}")
        copied = _copied(decoder, getattr(torch, dtype))
        for precision in precisions:
            with _tables(copied, precision if has_rotary else None), torch.no_grad():
                records += _measure(copied, ids, shifts, dtype, precision)
        del copied  # before the next one is made
    return ShiftedReport(
        records=tuple(records),
        settings={"batch": ids.shape[0], "seq_len": ids.shape[1], "shifts": list(shifts), "dtypes": list(runs)},
    )


def compare_logits(still: Tensor, moved: Tensor) -> dict[str, float]:
    """What moved logits differ by, as the attributes of a `ShiftedRecord`.

    Args:
        still: floating [B, S, V].
        moved: of the same tokens, elsewhere.
    """
    total, kl, changed, largest = 0.0, 0.0, 0, 0.0
    tokens = still.flatten(0, 1).split(BLOCK_TOKENS), moved.flatten(0, 1).split(BLOCK_TOKENS)
    for before, after in zip(*tokens, strict=True):
        before, after = before.double(), after.double()
        apart = (after - before).abs()
        total, largest = total + float(apart.sum()), max(largest, float(apart.max()))
        likely, likely_after = before.log_softmax(dim=-1), after.log_softmax(dim=-1)
        kl += float((likely.exp() * (likely - likely_after)).sum())
        changed += int((before.argmax(dim=-1) != after.argmax(dim=-1)).sum())
    count = still.shape[0] * still.shape[1]
    return {
        "logits_mean_abs": total / still.numel(),
        "logits_max_abs": largest,
        "kl_nats": kl / count,
        "top1_changed": changed / count,
    }


def _copied(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in a dtype, its own too: transformers leaves hooks behind in what it took hidden states from."""
    copied: Any = copy.deepcopy(model)
    copied.to(dtype).eval()
    if dtype == torch.float64 and hasattr(copied, "set_experts_implementation"):
        copied.set_experts_implementation("eager")  # the default multiplies no float64
    return copied


@contextmanager
def _tables(model: PreTrainedModel, precision: RopePrecision | None) -> Iterator[None]:
    handles = [] if precision is None else list(override_tables(model, precision).values())
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _measure(
    model: PreTrainedModel, ids: Tensor, shifts: Sequence[int], dtype: str, precision: str
) -> Iterator[ShiftedRecord]:
    still_states, still_logits = _forward(model, ids, 0, dtype)
    for shift in shifts:
        moved_states, moved_logits = _forward(model, ids, shift, dtype)
        for layer, (still, moved) in enumerate(zip(still_states, moved_states, strict=True)):
            yield ShiftedRecord(dtype, precision, shift, layer, **_hidden(still, moved))
        yield ShiftedRecord(dtype, precision, shift, None, **compare_logits(still_logits, moved_logits))


def _forward(model: PreTrainedModel, ids: Tensor, shift: int, dtype: str) -> tuple[Sequence[Tensor], Tensor]:
    """Hidden states, the embeddings first, and logits [B, S, V]."""
    position_ids = (torch.arange(ids.shape[1], device=ids.device) + shift)[None].expand(ids.shape)
    try:
        with kept_rotaries(model):
            output = model(input_ids=ids, position_ids=position_ids, use_cache=False, output_hidden_states=True)
    except (IndexError, RuntimeError, ValueError) as error:  # learned positions end; an operator lacks a dtype
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"model must run in {dtype} at positions up to {shift + ids.shape[1] - 1:,}, got {type(model).__name__}, "
            f"which failed with {type(error).__name__}: {reason}; pass other shifts or dtypes, or floor=False."
        ) from error
    if getattr(output, "logits", None) is None:
        raise ValueError(
            f"model must have a language model's head, got {type(model).__name__}; load it with AutoModelForCausalLM."
        )
    return output.hidden_states, output.logits


def _hidden(still: Tensor, moved: Tensor) -> dict[str, float]:
    apart = moved.double() - still.double()
    rms, own = (float(x.double().square().mean().sqrt()) for x in (apart, still))
    return {
        "hidden_rms": rms,
        "hidden_rel_rms": rms / own if own else 0.0,
        "hidden_max_abs": float(apart.abs().max()),
    }
