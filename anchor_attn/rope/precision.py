"""RoPE at a stated precision: frequencies from theta, a table of cos and sin a batch, and the rotation.

    B batch · H heads · S tokens · D head size · R of it rotated, in R/2 pairs

    precision    angles     cos and sin         query and key are rotated in
    "model"      float32    the given dtype     that dtype, as Hugging Face's Llama does
    "bfloat16"   float32    bfloat16            bfloat16, in a float32 model too
    "float32"    float32    float32             float32
    "exact"      float64    float32             float32

States come back in the dtype that they came in. Only "bfloat16" takes them below it, on purpose: float64 states are
rotated in float64, and their "exact" table is float64 too. All policies use the same float32 frequencies, computed
from theta and never read from a buffer, which `.to(torch.bfloat16)` would have rounded.

Under torch.compile Inductor fuses casts away, so that an intermediate bfloat16 never is one (torchtitan#2575). The
policies that promise a precision are opaque operators there; "model" promises none, and fuses.

RoPE: https://arxiv.org/abs/2104.09864
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import PositionPolicy, check_position_policy, checked_int
from anchor_attn.rope.checks import checked_number

RopePrecision = Literal["model", "bfloat16", "float32", "exact"]
ROPE_PRECISIONS: tuple[RopePrecision, ...] = ("model", "bfloat16", "float32", "exact")

WITHOUT_FLOAT64 = ("mps",)
WIDE = (torch.float32, torch.float64)


class RotaryTable(NamedTuple):
    """cos and sin of every position and pair, both [B, S, R/2]; B is 1 where rows have the same positions."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(rotary_dim: int, theta: float) -> Tensor:
    """θ^(-2i/R) of each pair i, float32 [R/2] on the host, to the bit as transformers computes them.

        inverse_frequencies(4, 10_000.0)   1.00 0.01

    Args:
        rotary_dim: how many numbers of a head are rotated [R], even; the head size, or less for a partial rotary.
        theta: the base.

    Raises:
        TypeError: no numbers.
        ValueError: an odd or empty rotary_dim, or a theta that is no base.
    """
    rotary_dim = checked_int(rotary_dim, "rotary_dim")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2, got {rotary_dim}; pass an even size.")
    checked_number("theta", theta)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    return 1.0 / theta**exponents


def rotary_table(
    position_ids: Tensor, inv_freq: Tensor, precision: RopePrecision, dtype: torch.dtype, attention_factor: float = 1.0
) -> RotaryTable:
    """cos and sin of position × frequency.

    One table serves all layers of a batch. It has no gradient.

    Args:
        position_ids: any integer dtype [B, S], or [1, S] for all rows.
        inv_freq: float32 [R/2], of `inverse_frequencies` or an extension method; on any device.
        precision: a policy of the module's table.
        dtype: of the hidden states; "model" rounds cos and sin to it.
        attention_factor: on cos and sin; YaRN and LongRoPE have one.

    Returns:
        cos and sin [B, S, R/2] on the device of `position_ids`.

    Raises:
        TypeError: positions that are no integers, frequencies that are not float32, or a dtype that is not floating.
        ValueError: an unknown precision, or frequencies that are not [R/2].
    """
    check_rope_precision(precision)
    if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
        raise TypeError(f"position_ids must hold integers, got {position_ids.dtype}; cast with position_ids.long().")
    if inv_freq.ndim != 1 or not len(inv_freq):
        raise ValueError(f"inv_freq must have shape [R/2], got {list(inv_freq.shape)}; pass one frequency a pair.")
    if inv_freq.dtype != torch.float32:
        raise TypeError(
            f"inv_freq must be float32, got {inv_freq.dtype}; compute it anew, with inverse_frequencies, where a cast "
            "may have rounded it."
        )
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating, got {dtype}; pass the dtype of the hidden states.")
    if precision != "model" and torch.compiler.is_compiling():
        return RotaryTable(*_compiled_table(position_ids, inv_freq, precision, dtype, attention_factor))
    return RotaryTable(*_table(position_ids, inv_freq, precision, dtype, attention_factor))


def packed_rotary_table(
    layout: PackedLayout,
    inv_freq: Tensor,
    precision: RopePrecision,
    dtype: torch.dtype,
    attention_factor: float = 1.0,
    position_policy: PositionPolicy = "continuous",
) -> RotaryTable:
    """The table of a packed batch, made once and kept with the layout for all layers.

    Not for compiled code: the layout would be compiled in.

    Args:
        layout: the batch, on the device of the states.
        inv_freq: as `rotary_table`, on the host.
        precision: as `rotary_table`.
        dtype: as `rotary_table`.
        attention_factor: as `rotary_table`.
        position_policy: "continuous" or "reset", as `PackedLayout.position_ids`.

    Returns:
        cos and sin [B, S, R/2]; [1, S, R/2] for continuous positions, which all rows share but for their padding.

    Raises:
        TypeError, ValueError: as `rotary_table`, or an unknown position policy.
    """
    check_position_policy(position_policy)

    def build() -> RotaryTable:
        if position_policy == "reset":
            position_ids = layout.position_ids("reset")
        else:
            position_ids = torch.arange(layout.seq_len, device=layout.device)[None]
        return rotary_table(position_ids, inv_freq, precision, dtype, attention_factor)

    frequencies = tuple(inv_freq.tolist()), inv_freq.dtype
    key = ("rotary_table", *frequencies, precision, dtype, attention_factor, position_policy)
    return layout.plan(key, build)


def apply_rotary(
    states: Tensor, cos: Tensor, sin: Tensor, precision: RopePrecision, interleaved: bool = False
) -> Tensor:
    """Rotate query or key.

    Args:
        states: floating [B, H, S, D].
        cos: of a `rotary_table` of the same precision [B, S, R/2] or [1, S, R/2]; R may be below D, and the numbers
            behind the first R stay as they are.
        sin: as `cos`.
        precision: a policy of the module's table.
        interleaved: pairs are neighbours, 2i and 2i + 1 (GPT-J, Llama as released); else halves, i and i + R/2
            (GPT-NeoX, Llama in transformers).

    Returns:
        [B, H, S, D] in the dtype of `states`, and in their order of strides where R is D.

    Raises:
        ValueError: an unknown precision, a table of another one, or shapes that do not fit.
    """
    check_rope_precision(precision)
    _check_rotation(states, cos, sin, precision)
    if precision != "model" and torch.compiler.is_compiling():
        return _compiled_rotation(states, cos, sin, precision, interleaved)
    return _rotation(states, cos, sin, precision, interleaved)


def check_rope_precision(precision: str) -> None:
    """Raise a ValueError unless the policy is known."""
    if precision not in ROPE_PRECISIONS:
        raise ValueError(f"rope_precision must be one of {ROPE_PRECISIONS}, got {precision!r}; pass one of them.")


def _check_rotation(states: Tensor, cos: Tensor, sin: Tensor, precision: str) -> None:
    if states.ndim != 4 or not states.is_floating_point():
        raise ValueError(
            f"states must be floating [B, H, S, D], got {states.dtype} {list(states.shape)}; split and transpose heads."
        )
    batch, _, seq_len, head_dim = states.shape
    fits = cos.ndim == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == seq_len
    if not fits or not 0 < 2 * cos.shape[2] <= head_dim or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin must be [B, S, R/2] with R at most D for states {list(states.shape)}, got {list(cos.shape)} "
            f"and {list(sin.shape)}; make them with rotary_table from this batch's position_ids."
        )
    fitting = {"bfloat16": (torch.bfloat16,), "float32": WIDE, "exact": WIDE}
    right = cos.dtype in fitting[precision] if precision in fitting else cos.is_floating_point()
    if not right or sin.dtype != cos.dtype:
        raise ValueError(
            f"cos and sin must be of precision={precision!r}, got {cos.dtype} and {sin.dtype}; "
            "make them with rotary_table of the same precision."
        )


# --- the arithmetic --------------------------------------------------------------------------------------------------


def _table(
    position_ids: Tensor, inv_freq: Tensor, precision: str, dtype: torch.dtype, attention_factor: float
) -> tuple[Tensor, Tensor]:
    table_dtype = {"model": dtype, "bfloat16": torch.bfloat16, "float32": torch.float32}.get(
        precision, torch.promote_types(dtype, torch.float32)
    )
    angle_dtype, device = torch.float32, position_ids.device
    if precision == "exact":
        angle_dtype, device = torch.float64, float64_device(device)
    with torch.no_grad():
        # A float32 frequency times a position below 2^29 is exact in float64. Multiplied, not matmul'ed: autocast
        # would take a matmul to bfloat16.
        angles = position_ids.to(device)[..., None].to(angle_dtype) * inv_freq.to(device, angle_dtype)
        cos, sin = (angles.cos() * attention_factor).to(table_dtype), (angles.sin() * attention_factor).to(table_dtype)
    return cos.to(position_ids.device), sin.to(position_ids.device)


def float64_device(device: torch.device) -> torch.device:
    """Where float64 is computed for a device: on it, or on the host where it has none."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def _rotation(states: Tensor, cos: Tensor, sin: Tensor, precision: str, interleaved: bool) -> Tensor:
    given = states.dtype
    states = states.to(torch.bfloat16 if precision == "bfloat16" else torch.promote_types(given, cos.dtype))
    rotary_dim = 2 * cos.shape[-1]
    # Slices, not split: of the whole head they are the states themselves, and the sum keeps their strides.
    rotated, passed = states[..., :rotary_dim], states[..., rotary_dim:]
    if interleaved:
        turned = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), dim=-1).flatten(-2)
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    else:
        x, y = rotated.chunk(2, dim=-1)
        turned = torch.cat((-y, x), dim=-1)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    out = rotated * cos[:, None].to(states.dtype) + turned * sin[:, None].to(states.dtype)
    out = torch.cat((out, passed), dim=-1) if passed.shape[-1] else out
    return out.to(given)


# --- the same, opaque to a compiler ----------------------------------------------------------------------------------

# Inductor's cache on disk knows an operator by its name and outlives this code: other strides or dtypes of the results
# need another name.


@torch.library.custom_op("anchor_attn::rotary_table", mutates_args=())
def _compiled_table(
    position_ids: Tensor, inv_freq: Tensor, precision: str, dtype: torch.dtype, attention_factor: float
) -> tuple[Tensor, Tensor]:
    return _table(position_ids, inv_freq, precision, dtype, attention_factor)


@_compiled_table.register_fake
def _(
    position_ids: Tensor, inv_freq: Tensor, precision: str, dtype: torch.dtype, attention_factor: float
) -> tuple[Tensor, Tensor]:
    return _table(position_ids, inv_freq, precision, dtype, attention_factor)


@torch.library.custom_op("anchor_attn::apply_rotary", mutates_args=())
def _compiled_rotation(states: Tensor, cos: Tensor, sin: Tensor, precision: str, interleaved: bool) -> Tensor:
    out, promised = _rotation(states, cos, sin, precision, interleaved), _as_projected(states)
    return out if out.stride() == promised.stride() else promised.copy_(out)


@_compiled_rotation.register_fake
def _(states: Tensor, cos: Tensor, sin: Tensor, precision: str, interleaved: bool) -> Tensor:
    return _as_projected(states)


def _as_projected(states: Tensor) -> Tensor:
    """An empty [B, H, S, D] with the strides of a projection, whatever strides the compiler gives its own inputs."""
    batch, heads, seq_len, head_dim = states.shape
    return states.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)


def _keep_table(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.precision, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return _compiled_rotation(gradient, cos, -sin, ctx.precision, ctx.interleaved), None, None, None, None


_compiled_rotation.register_autograd(_rotate_back, setup_context=_keep_table)
