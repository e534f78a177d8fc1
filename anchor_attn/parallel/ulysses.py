"""Attention over several ranks: tokens are exchanged for heads, any engine attends, and heads for tokens again.

    B batch · H query heads · K key heads · S tokens · W ranks · D head size · V value size

    query [B, H, S/W, D]  ─ all-to-all ─  [B, H/W, S, D]  ─ attention ─  [B, H/W, S, V]  ─ back ─  [B, H, S/W, V]

Each exchange is a DTensor redistribution between Shard(tokens) and Shard(heads), which is its own gradient. Key heads
that the ranks do not divide are repeated until they do, within their groups of query heads.

Ulysses: https://arxiv.org/abs/2309.14509
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from anchor_attn.attention import anchor_attention, check_tensors
from anchor_attn.masks.layout import PackedLayout
from anchor_attn.parallel.balance import check_whole_documents
from anchor_attn.parallel.layout import ShardedLayout, check_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

HEADS, TOKENS = 1, 2  # dimensions of [B, heads, tokens, size]


class States(NamedTuple):
    """Query, key and value of the same tokens."""

    query: Tensor
    key: Tensor
    value: Tensor


def ulysses_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, mesh: "DeviceMesh", **settings: Any
) -> Tensor:
    """`anchor_attention` over rows of which every rank holds S/W neighbouring tokens.

        mesh = init_device_mesh("cuda", (4,))
        out = ulysses_attention(query, key, value, layout, mesh, pattern="anchor")     # rank 1: tokens S/4 … S/2

    Args:
        query: [B, H, S/W, D], this rank's tokens; H must be a multiple of the ranks.
        key: [B, K, S/W, D].
        value: [B, K, S/W, V].
        layout: of the whole rows, the same on every rank; S must be a multiple of the ranks.
        mesh: the ranks, one-dimensional.
        settings: of `anchor_attention`: pattern, engine, scale, softcap, sliding_window, keep_anchor and sinks (of all
            heads).

    Returns:
        [B, H, S/W, V], the tokens of `query`.

    Raises:
        ValueError: tokens or heads that do not divide, dropout, or as `anchor_attention`.
    """
    check_mesh(mesh)
    if layout.seq_len != mesh.size() * query.shape[TOKENS]:
        raise ValueError(
            f"query must hold 1/{mesh.size()} of the layout's {layout.seq_len} tokens, got {query.shape[TOKENS]}; "
            "pad the rows to a multiple of the ranks and give each its part."
        )
    _refuse_dropout(settings)
    q, k, v = _exchanged(States(query, key, value), mesh)
    out = anchor_attention(q, k, v, layout, **_of_my_heads(settings, mesh))
    return heads_to_tokens(out, mesh)


def attend_sharded(query: Tensor, key: Tensor, value: Tensor, layout: ShardedLayout, **settings: Any) -> Tensor:
    """`anchor_attention` over a rank's part of a batch: its own documents alone, and the shared ones with all ranks.

    The keys and values of the anchor are a copy of this rank's own: shared documents need no exchange for them.

    Raises:
        ValueError: the full pattern where documents are on different ranks, shared documents without a mesh, heads
            that do not divide, dropout, or as `anchor_attention`.
    """
    check_tensors(query, key, value, layout, settings.get("sinks"))
    _refuse_dropout(settings)
    if layout.scheme == "document":
        check_whole_documents(settings.get("pattern", "anchor"))
    sizes = [layout.own_tokens, layout.seq_len - layout.own_tokens]
    (own_q, slice_q), (own_k, slice_k), (own_v, slice_v) = (
        states.split(sizes, TOKENS) for states in (query, key, value)
    )
    outs = []
    if layout.own is not None:
        outs.append(anchor_attention(own_q, own_k, own_v, layout.own, **settings))
    if layout.shared is not None:
        if layout.mesh is None:
            raise ValueError(
                f"layout must know the ranks that share documents, got {layout} without a mesh; "
                "pass layout.bind(mesh), or parallelize(model, mesh)."
            )
        q, k, v = (states[:, :, : layout.anchor_tokens] for states in (query, key, value))
        anchors, slices = States(q, k, v), States(slice_q, slice_k, slice_v)
        outs.append(_attend_shared(anchors, slices, layout.shared, layout.mesh, settings))
    return torch.cat(outs, TOKENS)


def _attend_shared(
    anchors: States, slices: States, layout: PackedLayout, mesh: "DeviceMesh", settings: dict[str, Any]
) -> Tensor:
    exchanged = _exchanged(slices, mesh)
    in_front = [states.chunk(mesh.size(), HEADS)[mesh.get_local_rank()] for states in _repeated(anchors, mesh)]
    q, k, v = (torch.cat(pair, TOKENS) for pair in zip(in_front, exchanged, strict=True))
    out = anchor_attention(q, k, v, layout, **_of_my_heads(settings, mesh))
    return heads_to_tokens(out[:, :, layout.anchor_tokens :], mesh)


def tokens_to_heads(states: Tensor, mesh: "DeviceMesh") -> Tensor:
    """[B, heads, S/W, size] of every rank's tokens -> [B, heads/W, S, size]."""
    return _redistributed(states, mesh, TOKENS, HEADS)


def heads_to_tokens(states: Tensor, mesh: "DeviceMesh") -> Tensor:
    """[B, heads/W, S, size] of every rank's heads -> [B, heads, S/W, size]."""
    return _redistributed(states, mesh, HEADS, TOKENS)


def repeats_of(num_kv_heads: int, ranks: int) -> int:
    """How often each key head is repeated so that every rank gets as many: 1 where the ranks divide them.

    repeats_of(8, 4)   1        repeats_of(2, 4)   2        repeats_of(6, 4)   2
    """
    return math.lcm(num_kv_heads, ranks) // num_kv_heads


def check_heads(num_heads: int, ranks: int) -> None:
    """Raise a ValueError unless every rank gets as many query heads."""
    if num_heads % ranks:
        raise ValueError(
            f"num_heads must be a multiple of the {ranks} ranks that share documents, got {num_heads}; take ranks that "
            "divide it, or scheme='document' with tolerance=None, which shares none."
        )


def _redistributed(states: Tensor, mesh: "DeviceMesh", given: int, asked: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard  # brings half a second of imports with it

    return DTensor.from_local(states, mesh, [Shard(given)]).redistribute(placements=[Shard(asked)]).to_local()


def _exchanged(states: States, mesh: "DeviceMesh") -> States:
    check_heads(states.query.shape[HEADS], mesh.size())
    return States(*(tokens_to_heads(part, mesh) for part in _repeated(states, mesh)))


def _repeated(states: States, mesh: "DeviceMesh") -> States:
    """The states with key heads that the ranks divide."""
    repeats = repeats_of(states.key.shape[HEADS], mesh.size())
    if repeats == 1:
        return states
    query, *key_and_value = states
    return States(query, *(part.repeat_interleave(repeats, HEADS) for part in key_and_value))


def _of_my_heads(settings: dict[str, Any], mesh: "DeviceMesh") -> dict[str, Any]:
    """The settings with the sinks of this rank's heads."""
    sinks = settings.get("sinks")
    return settings if sinks is None else {**settings, "sinks": sinks.chunk(mesh.size())[mesh.get_local_rank()]}


def _refuse_dropout(settings: dict[str, Any]) -> None:
    if settings.get("dropout"):
        raise ValueError(
            f"dropout must be 0 over several ranks, got {settings['dropout']}; "
            "each rank would draw by itself, and a run would depend on their number."
        )
