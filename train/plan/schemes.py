"""How a row is shared over ranks, what it makes each of them do, and what they then send each other.

    data         a row a rank: nothing is sent in attention
    document     whole documents to ranks; those that fit none are shared as in ulysses, where the heads allow it
    ulysses      every rank holds a part of the tokens, and a part of the heads during attention
    all_gather   every rank holds two parts of the tokens, one from each end, and receives all keys and values

Under every scheme weights, gradients and moments are sharded over all ranks (FSDP2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from anchor_attn.masks import PackedLayout
from anchor_attn.masks.patterns import Pattern
from anchor_attn.parallel import balance_documents, communication_bytes
from anchor_attn.train.plan.models import ModelShape
from anchor_attn.train.plan.work import ANCHOR_TOKENS

Scheme = Literal["data", "document", "ulysses", "all_gather"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
BALANCED = 0.1  # a rank's tokens and pairs above the mean, as in balance_documents and communication_bytes


@dataclass(frozen=True)
class Sharing:
    """How one row lies on the ranks that share it.

    Attributes:
        tokens: per rank.
        pair_shares: per rank, its share of the row's attended pairs; together 1.
        received_bytes: by a rank, for the attention of one layer, forward and backward.
        kept_whole: whether documents that fit no rank stay whole, for the ranks do not divide the heads.
    """

    tokens: NDArray[np.float64]
    pair_shares: NDArray[np.float64]
    received_bytes: tuple[int, int] = (0, 0)
    kept_whole: bool = False


def share_row(
    shape: ModelShape, lengths: Sequence[int], pattern: Pattern, scheme: Scheme, ranks: int, bytes_per_value: int
) -> Sharing:
    """Lay a row on ranks.

    Args:
        shape: of the model.
        lengths: tokens of each document, the anchor not counted.
        pattern: "full", "intra_doc" or "anchor".
        scheme: one of `SCHEMES`.
        ranks: that share the row; 1 for "data".
        bytes_per_value: of keys and values on their way.

    Raises:
        ValueError: the scheme cannot: it says why.
    """
    row_tokens = ANCHOR_TOKENS + sum(lengths)
    if ranks == 1:
        return Sharing(np.array([float(row_tokens)]), np.ones(1))
    if row_tokens < 2 * ranks:
        raise ValueError(f"ranks_a_row must leave each rank two tokens, got {ranks} for {row_tokens} tokens; lower it.")
    if scheme == "document":
        return _share_documents(shape, lengths, pattern, ranks, bytes_per_value)
    if scheme == "ulysses":
        if shape.num_heads % ranks:
            raise ValueError(
                f"ranks_a_row must divide the {shape.num_heads} heads under ulysses, got {ranks}; take "
                f"{math.gcd(ranks, shape.num_heads)}, or leave it out."
            )
        shares = np.full(ranks, 1 / ranks)
    else:
        shares = two_ended_shares(lengths, pattern, ranks)
    even = np.full(ranks, row_tokens / ranks)
    return Sharing(even, shares, _received(shape, lengths, pattern, scheme, ranks, bytes_per_value))


def _share_documents(
    shape: ModelShape, lengths: Sequence[int], pattern: Pattern, ranks: int, bytes_per_value: int
) -> Sharing:
    if pattern == "full":
        raise ValueError(
            "pattern must keep documents to themselves to give them to ranks, got 'full', in which every token sees "
            "the whole row; ulysses is what it is compared with."
        )
    tolerance = None if shape.num_heads % ranks else BALANCED
    assignment = balance_documents(lengths, ranks, pattern=pattern, anchor_tokens=ANCHOR_TOKENS, tolerance=tolerance)
    kept_whole = tolerance is None and max(assignment.token_imbalance, assignment.pair_imbalance) > BALANCED
    tokens, pairs = np.array(assignment.tokens), np.array(assignment.pairs)
    received = (0, 0)
    if assignment.shared_tokens:
        received = _received(shape, lengths, pattern, "document", ranks, bytes_per_value)
    return Sharing(tokens + ANCHOR_TOKENS, pairs / pairs.sum(), received, kept_whole)


def two_ended_shares(lengths: Sequence[int], pattern: Pattern, ranks: int) -> NDArray[np.float64]:
    """Each rank's share of the pairs when rank r holds slices r and 2·ranks - 1 - r of 2·ranks.

    Even for the full pattern, which it is made for. Documents lie as they come: their pairs are spread by chance.

        two_ended_shares([7], "full", 2)          0.5 0.5
        two_ended_shares([4, 3], "anchor", 2)     0.42 0.58
    """
    own = np.concatenate([np.arange(1, length + 1) for length in lengths])
    if pattern == "full":
        per_query = np.arange(1, ANCHOR_TOKENS + len(own) + 1)
    else:
        seen = own + (ANCHOR_TOKENS if pattern == "anchor" else 0)
        per_query = np.concatenate([np.arange(1, ANCHOR_TOKENS + 1), seen])
    total = np.concatenate([[0], per_query.cumsum()])
    bounds = np.linspace(0, len(per_query), 2 * ranks + 1).round().astype(np.int64)
    slices = np.diff(total[bounds])
    return (slices[:ranks] + slices[: ranks - 1 : -1]) / total[-1]


def _received(
    shape: ModelShape, lengths: Sequence[int], pattern: Pattern, scheme: Scheme, ranks: int, bytes_per_value: int
) -> tuple[int, int]:
    if scheme == "data":
        return 0, 0
    layout = PackedLayout.from_lengths([list(lengths)], ANCHOR_TOKENS)
    found = communication_bytes(
        layout,
        scheme,
        ranks,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_kv_heads,
        value_dim=shape.value_dim,
        bytes_per_value=bytes_per_value,
        pattern=pattern,
    )
    return found.forward, found.backward
