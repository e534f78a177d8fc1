"""The flex engine: torch's FlexAttention over the block tables of the layout, compiled once.

    B batch · H query heads · K key heads (H = K · G) · S tokens · A anchor tokens · D head size · V value size

Any pattern, window, softcap and sink, forward on the CPU, forward and backward on CUDA. Three forms of the same sum:

    table     the anchor stands in the block table; sinks join afterwards, through the log-sum-exp
    merge     the table shows each document to itself only; the anchor and the sinks join through the log-sum-exp
    column    the anchor stands in the table, and the sinks in one padding slot: for kernels without a log-sum-exp

Rows are padded to whole blocks before the kernel sees them (flex's backward has given NaN at other lengths), head
sizes to what its matrix products take.

FlexAttention: https://arxiv.org/abs/2412.05496
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.fx.experimental import _config as _symbolic_config
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from anchor_attn.engines.choice import Route
from anchor_attn.engines.flex_plan import Form, create_flex_plan, table_tokens, tables_of
from anchor_attn.engines.kernels import Scoring
from anchor_attn.engines.merge import join, score_anchors
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import PADDING_ID
from anchor_attn.masks.patterns import MaskMod, Pattern
from anchor_attn.request import Request, autocast_dtype, needs_grad

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Attend = Callable[..., Tensor]

# Triton's matrix products take no fewer columns.
LEAST_HEAD_DIM = 16
# Rows are whole blocks, which no compiler knows of a symbolic length: without this, kernels guard the ends of rows.
# Not ROWS_GUARANTEED_SAFE: each row sees a key, but not in each block that is visited for it.
KERNEL_OPTIONS: Any = {"IS_DIVISIBLE": True}


class KernelKey(NamedTuple):
    """All that a compiled function is made for; what else changes from call to call does not recompile it."""

    device_type: str
    dtype: torch.dtype
    heads: tuple[int, int]
    head_dims: tuple[int, int]
    scale: float
    softcap: float | None
    has_sinks: bool
    mask: tuple[Pattern, int | None, bool]
    form: Form
    is_interleaved: bool
    anchor_tokens: int
    is_batch_of_one: bool
    table_tokens: int
    needs_grad: bool
    in_inference_mode: bool


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, request: Request, route: Route) -> Tensor:
    """FlexAttention in the form of a route; else as `anchor_attention`.

    Raises:
        RuntimeError: torch's limit of recompilations is hit.
    """
    return attend_in_form(query, key, value, layout, request, cast(Form, route.form))


def attend_in_form(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, request: Request, form: Form
) -> Tensor:
    """`attend` by the form's name; the kernel says itself what it cannot do."""
    has_column = form == "column" and request.sinks is not None
    plan = layout.plan(
        ("flex", *request.mask_key, form == "merge", has_column),
        lambda: create_flex_plan(layout, request, form),
    )
    device_type = query.device.type
    padded_len = plan.block_mask.shape[-1]
    dtype = autocast_dtype(query)
    with_grad = needs_grad(query, key, value, request.sinks)
    # torch asks whether leaves require gradients, also where it is told that none are wanted.
    given = (query, key, value) if with_grad else (query.detach(), key.detach(), value.detach())
    states = tuple(_padded(states.to(dtype), padded_len) for states in given)
    sinks = None
    if request.sinks is not None:
        learned = request.sinks if with_grad else request.sinks.detach()
        sinks = learned.to(torch.promote_types(dtype, torch.float32)).view(-1)
        torch._dynamo.mark_static(sinks)  # of the view, which is ours
    kernel_key = KernelKey(
        device_type=device_type,
        dtype=dtype,
        heads=(query.shape[1], key.shape[1]),
        head_dims=(query.shape[3], value.shape[3]),
        scale=request.scale,
        softcap=request.softcap,
        has_sinks=sinks is not None,
        mask=request.mask_key,
        form=form,
        is_interleaved=layout.is_interleaved,
        anchor_tokens=layout.anchor_tokens,
        is_batch_of_one=layout.batch_size == 1,
        table_tokens=table_tokens(layout.batch_size * padded_len),
        needs_grad=with_grad,
        in_inference_mode=torch.is_inference_mode_enabled(),
    )
    # Grad mode is a guard of its own: without gradients, one function serves with it and without it.
    with torch.set_grad_enabled(kernel_key.needs_grad), torch.autocast(device_type, enabled=False), _dynamic_shapes():
        try:
            out = compiled(kernel_key)(
                *states, sinks, tables_of(plan.block_mask), plan.block_mask.mask_mod, plan.visible, plan.sink_slot
            )
        except FailOnRecompileLimitHit as error:
            raise RuntimeError(
                "engine='flex' must be compiled once for inputs of a kind, got more variants than torch keeps; see "
                "what changes from call to call with TORCH_LOGS=recompiles, or pass engine='varlen'."
            ) from error
    out = out[:, :, : layout.seq_len, : value.shape[3]].to(value.dtype)
    if min(layout.row_tokens) < layout.seq_len:
        out = out.masked_fill((layout.document_ids == PADDING_ID)[:, None, :, None], 0.0)
    return out


@cache
def compiled(kernel_key: KernelKey) -> Attend:
    """The function of a kind of inputs, compiled when it is first called."""

    scale, softcap, in_column = kernel_key.scale, kernel_key.softcap, kernel_key.form == "column"
    scoring = Scoring(scale, softcap)

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        tables: dict[str, Any],
        mask_mod: MaskMod,
        visible: Tensor | None,
        sink_slot: Tensor | None,
    ) -> Tensor:
        seq_len = query.shape[2]
        block_mask = BlockMask((seq_len, seq_len), **tables, mask_mod=mask_mod)
        score_mod = create_score_mod(softcap, sinks, sink_slot)
        settings: dict[str, Any] = {
            "scale": scale,
            "enable_gqa": query.shape[1] != key.shape[1],
            "kernel_options": KERNEL_OPTIONS,
        }
        if in_column or (sinks is None and visible is None):
            return flex_attention(query, key, value, score_mod, block_mask, **settings)
        aux_request = AuxRequest(lse=True)
        out, aux = flex_attention(query, key, value, score_mod, block_mask, **settings, return_aux=aux_request)
        scores = None if visible is None else score_anchors(query, key, visible, scoring)[0]
        return join(out, aux.lse, scores, value, sinks)[0]

    # torch counts recompilations by code object, and closures share theirs.
    code = kernel.__code__.replace(co_name=f"flex_{kernel_key.form}_{compiled.cache_info().misses}")
    return compile_kernel(FunctionType(code, kernel.__globals__, code.co_name, None, kernel.__closure__))


def compile_kernel(kernel: Attend) -> Attend:
    """`kernel` by torch's compiler, for all lengths; tests put others in its place."""
    return torch.compile(kernel, fullgraph=True, dynamic=True)


def create_score_mod(softcap: float | None, sinks: Tensor | None, sink_slot: Tensor | None) -> ScoreMod | None:
    """The score_mod of softcap, and of sinks where they have a slot; None where scores stay as they are."""

    def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    if sinks is None or sink_slot is None:
        return None if softcap is None else capped

    def with_column(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where(kv_idx == sink_slot, sinks[h], capped(score, b, h, q_idx, kv_idx))

    return with_column


def _padded(states: Tensor, seq_len: int) -> Tensor:
    """Zeros behind the last token up to `seq_len`, and behind the last column up to what kernels take."""
    tokens, columns = seq_len - states.shape[2], max(0, LEAST_HEAD_DIM - states.shape[3])
    return F.pad(states, (0, columns, 0, tokens)) if tokens or columns else states


@contextmanager
def _dynamic_shapes() -> Iterator[None]:
    """Every size is a symbol of its own, every float a constant, while something is compiled.

    Sizes that agree by chance (2 rows, 2 heads) would count as one and be compiled in; a mask_mod or score_mod may not
    hold a float that is a symbol.
    """
    shapes: Any = _symbolic_config
    with torch._dynamo.config.patch(specialize_float=True), shapes.patch(use_duck_shape=False):
        yield
