"""One attention call for every engine: check, choose, call."""

import logging
import math
from functools import cache
from typing import overload

from torch import Tensor

from anchor_attn.engines import reference, varlen
from anchor_attn.engines.choice import check_engine, choose_route
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.patterns import Pattern, check_pattern
from anchor_attn.parallel.layout import ShardedLayout
from anchor_attn.request import Request, create_call

logger = logging.getLogger("anchor_attn")


def anchor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout | ShardedLayout,
    pattern: Pattern = "anchor",
    engine: str = "auto",
    scale: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    keep_anchor: bool = True,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention over packed documents that see themselves and one shared anchor.

        layout = PackedLayout.from_lengths([[300, 50, 161]])          # 512 tokens with the anchor
        out = anchor_attention(query, key, value, layout)             # [1, H, 512, V]

    Args:
        query: [B, H, S, D].
        key: [B, K, S, D]; H must be a multiple of K (grouped heads).
        value: [B, K, S, V].
        layout: the packed batch, or a rank's part of it, on the tensors' device.
        pattern: "full" (causal over the row), "intra_doc" (own document) or "anchor" (own document and the anchor).
        engine: "reference" (dense, the oracle), "flex" (FlexAttention; on a CPU without gradients), "varlen" (a
            document at a time), one of them with its kernel or form ("varlen/flash_attn_2", "flex/merge"), or "auto",
            the fastest measured that can. What is named never falls back to another.
        scale: of the scores; 1/√D when None.
        softcap: c · tanh(score / c), as Gemma 2 has it.
        sliding_window: the current token and this many less one before it, of the same document ("full": of the row).
        keep_anchor: the anchor stays visible outside the window; otherwise it is an ordinary token directly before
            each document.
        sinks: a learned logit a query head [H] that joins every softmax without a value, as gpt-oss has it.
        dropout: the share of weights that is dropped, in [0, 1); pass 0 in an evaluation.

    Returns:
        [B, H, S, V] in the value's dtype, computed in autocast's where that is on; zeros at padding, which also gets no
        gradient.

    Raises:
        TypeError: no layout where one is asked for.
        ValueError: shapes or devices that do not fit, a softcap, scale or dropout without meaning, an unknown pattern
            or engine, or one that has not what is asked for.
        ImportError: a named kernel that cannot be called here.
    """
    if isinstance(layout, ShardedLayout):
        from anchor_attn.parallel.ulysses import attend_sharded  # calls this function for each part

        return attend_sharded(
            query,
            key,
            value,
            layout,
            pattern=pattern,
            engine=engine,
            scale=scale,
            softcap=softcap,
            sliding_window=sliding_window,
            keep_anchor=keep_anchor,
            sinks=sinks,
            dropout=dropout,
        )
    check_pattern(layout, pattern, sliding_window)
    check_engine(engine)
    check_tensors(query, key, value, layout, sinks)
    check_scoring(scale, softcap, dropout)
    request = Request(
        pattern=pattern,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        softcap=softcap,
        sliding_window=sliding_window,
        keep_anchor=keep_anchor,
        sinks=sinks,
        dropout=dropout,
    )
    call = create_call(query, key, value, layout, request)
    route = layout.plan(("route", engine, call), lambda: choose_route(engine, call))
    if route.engine == "reference":
        return reference.attend(query, key, value, layout, request)
    if route.engine == "flex":
        from anchor_attn.engines import flex  # brings half of torch's compiler with it

        return flex.attend(query, key, value, layout, request, route)
    return varlen.attend(query, key, value, layout, request, route)


@overload
def as_layout(document_ids: PackedLayout | Tensor) -> PackedLayout: ...
@overload
def as_layout(document_ids: PackedLayout | ShardedLayout | Tensor) -> PackedLayout | ShardedLayout: ...
def as_layout(document_ids: PackedLayout | ShardedLayout | Tensor) -> PackedLayout | ShardedLayout:
    """The layout itself, or the checked layout of a tensor of ids.

    Ids that count documents from 0 are legal, and something else: their first document is then every other's anchor.
    """
    if isinstance(document_ids, PackedLayout | ShardedLayout):
        return document_ids
    layout = PackedLayout.from_document_ids(document_ids)
    if layout.anchor_tokens > 1:
        _warn_once(
            f"document_ids begin with {layout.anchor_tokens} anchor tokens, which every document sees; "
            "if 0 is meant for a document, count them from 1, or make the layout with PackedLayout.from_any_ids"
        )
    return layout


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def check_scoring(scale: float | None, softcap: float | None, dropout: float) -> None:
    """Raise a ValueError unless scale, softcap and dropout have a meaning."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, got {scale}; pass None for 1/√D.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be above 0 and finite, got {softcap}; pass None for no softcap.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}; pass 0.0 for no dropout.")


def check_tensors(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout | ShardedLayout, sinks: Tensor | None
) -> None:
    """Raise a ValueError unless the tensors fit each other and the layout."""
    for name, states in (("query", query), ("key", key), ("value", value)):
        if states.ndim != 4:
            raise ValueError(
                f"{name} must have shape [B, heads, S, head size], got {list(states.shape)}; split and transpose heads."
            )
        if (states.shape[0], states.shape[2]) != (layout.batch_size, layout.seq_len):
            raise ValueError(
                f"{name} must have the layout's batch and length [{layout.batch_size}, heads, {layout.seq_len}, …], "
                f"got {list(states.shape)}; pass the layout of this batch."
            )
        if states.device != layout.device:
            raise ValueError(
                f"{name} must be on the layout's device {layout.device}, got {states.device}; "
                "move the layout with layout.to(device)."
            )
    if query.shape[-1] != key.shape[-1] or key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query, key and value must be [B, H, S, D], [B, K, S, D] and [B, K, S, V] with H a multiple of K, "
            f"got {list(query.shape)}, {list(key.shape)} and {list(value.shape)}; check the head counts and sizes."
        )
    if len({query.dtype, key.dtype, value.dtype}) != 1 or not query.is_floating_point():
        raise ValueError(
            f"query, key and value must share one floating dtype, got {query.dtype}, {key.dtype} and {value.dtype}; "
            "cast query and key to the value's dtype."
        )
    if sinks is not None and sinks.shape != (query.shape[1],):
        raise ValueError(
            f"sinks must have one logit a query head [{query.shape[1]}], got {list(sinks.shape)}; pass shape [H]."
        )
