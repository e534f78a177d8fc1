"""Which rank computes which document: whole documents, balanced in tokens and in attended pairs at once.

A decoder's work is linear in the tokens, and attention's in the pairs. Where the ranks are level in both, they are so
in any sum of the two, whatever the model's width, and in memory as well.

    lengths [6, 2, 2, 1, 1], 2 ranks      rank 0   6             rank 1   2 2 1 1        tokens 6 6   pairs 27 14
                                          shared   6             rank 0   2 1            rank 1   2 1

The second line is what is done when the pairs of the first are too far apart: all ranks share the longest document,
each a part of its tokens, and exchange tokens for heads in every layer (`anchor_attn.parallel.ulysses`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from anchor_attn.masks.layout import checked_anchor_tokens, checked_int
from anchor_attn.masks.patterns import Pattern, check_pattern_name

SHARED = -1
ONE_BY_ONE = 32  # after so many tries the shared documents grow by an eighth at a time


@dataclass(frozen=True)
class Assignment:
    """What each rank computes of one row.

    Attributes:
        rank_of: each document's rank; `SHARED` (-1) where all ranks share it.
        tokens: per rank, its documents' tokens and its part of the shared ones; anchors are not counted.
        pairs: per rank, the attended pairs of the same, one head, one layer; the anchors' own are not counted.
        shared_tokens: tokens of the shared documents, all ranks together.
    """

    rank_of: tuple[int, ...]
    tokens: tuple[float, ...]
    pairs: tuple[float, ...]
    shared_tokens: int

    @property
    def token_imbalance(self) -> float:
        """The most tokens of a rank over the mean, minus 1."""
        return _imbalance(np.array(self.tokens))

    @property
    def pair_imbalance(self) -> float:
        """The most pairs of a rank over the mean, minus 1."""
        return _imbalance(np.array(self.pairs))

    def costs(self, token_cost: float) -> tuple[float, ...]:
        """Work per rank in units of one attended pair, when a token costs as much as `token_cost` pairs besides."""
        return tuple(pairs + token_cost * tokens for pairs, tokens in zip(self.pairs, self.tokens, strict=True))


def balance_documents(
    lengths: Sequence[int],
    ranks: int,
    *,
    pattern: Pattern = "anchor",
    anchor_tokens: int = 1,
    tolerance: float | None = 0.1,
) -> Assignment:
    """Give the documents of a row to ranks, and share as few as possible.

        balance_documents([6, 2, 2, 1, 1], 2)                    rank_of (-1, 0, 1, 0, 1)
        balance_documents([6, 2, 2, 1, 1], 2, tolerance=None)    rank_of (0, 1, 1, 1, 1)

    The longest documents go first, each to the rank that is then least loaded, by tokens or by pairs, whichever is
    more. When a rank ends more than `tolerance` above the mean, the longest document becomes shared, then the two
    longest, and so on. Every process that asks gets the same answer.

    Args:
        lengths: tokens of each document, the anchor not counted; all pieces of an interleaved one together.
        ranks: how many there are.
        pattern: "intra_doc" or "anchor".
        anchor_tokens: anchor tokens of the row, of which every rank has its own.
        tolerance: how far above the mean a rank's tokens and pairs may be; None keeps every document whole.

    Raises:
        ValueError: the full pattern, in which documents attend to each other, an unknown one, no rank, a length
            below 1, or a negative tolerance.
    """
    check_whole_documents(pattern)
    if checked_int(ranks, "ranks") < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}; pass the number of processes.")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}; pass 0.1, or None to share nothing.")
    tokens = np.array([checked_int(length, "lengths") for length in lengths], dtype=np.int64)
    if len(tokens) and tokens.min() < 1:
        raise ValueError(f"lengths must hold counts of at least 1, got {tokens.min()}; leave empty documents out.")
    seen = checked_anchor_tokens(anchor_tokens) if pattern == "anchor" else 0
    loads = np.stack([tokens, tokens * (tokens + 1) // 2 + seen * tokens]).astype(np.float64)
    order = np.argsort(-tokens, kind="stable")
    shared, rank_of = _fewest_shared(loads[:, order], ranks, tolerance)
    in_order = np.full(len(tokens), SHARED)
    in_order[order[shared:]] = rank_of
    totals = _totals(loads[:, order], shared, rank_of, ranks)
    return Assignment(
        rank_of=tuple(in_order.tolist()),
        tokens=tuple(totals[0].tolist()),
        pairs=tuple(totals[1].tolist()),
        shared_tokens=int(tokens[order[:shared]].sum()),
    )


def check_whole_documents(pattern: str) -> None:
    """Raise a ValueError where documents cannot be given to ranks as they are."""
    check_pattern_name(pattern)
    if pattern == "full":
        raise ValueError(
            "pattern must keep documents to themselves to give them to ranks, got 'full', in which every token sees "
            "the whole row; pass scheme='ulysses', or another pattern."
        )


def _fewest_shared(loads: NDArray[np.float64], ranks: int, tolerance: float | None) -> tuple[int, NDArray[np.int64]]:
    """How many of the longest documents are shared, and the ranks of the others; `loads` [2, N], longest first."""
    if tolerance is None or ranks == 1:
        return 0, _spread(loads, 0, ranks)
    limit = (1 + tolerance) * loads.sum(axis=1, keepdims=True) / ranks
    shared = int((loads > limit).any(axis=0).sum())  # each would unbalance any rank by itself
    documents = loads.shape[1]
    for tries in count(1):
        rank_of = _spread(loads, shared, ranks)
        if shared == documents or max(map(_imbalance, _totals(loads, shared, rank_of, ranks))) <= tolerance:
            break
        # More are not always more level: five equal documents are with one shared on four ranks, and not with two.
        step = 1 if tries < ONE_BY_ONE else -(-shared // 8)
        shared = min(shared + step, documents)
    return shared, rank_of


def _spread(loads: NDArray[np.float64], shared: int, ranks: int) -> NDArray[np.int64]:
    """The ranks of the documents behind the first `shared`: each goes to whom it leaves least loaded."""
    means = np.maximum(loads.sum(axis=1, keepdims=True) / ranks, 1.0)
    shares = loads / means
    totals = np.repeat(shares[:, :shared].sum(axis=1, keepdims=True) / ranks, ranks, axis=1)
    rank_of = np.empty(loads.shape[1] - shared, dtype=np.int64)
    for place, document in enumerate(shares[:, shared:].T):
        tokens, pairs = totals[0] + document[0], totals[1] + document[1]
        # By the sum as well: a rank that is full of pairs may still be the one with the fewest tokens.
        rank_of[place] = rank = np.lexsort((tokens + pairs, np.maximum(tokens, pairs)))[0]
        totals[:, rank] += document
    return rank_of


def _totals(loads: NDArray[np.float64], shared: int, rank_of: NDArray[np.int64], ranks: int) -> NDArray[np.float64]:
    """Tokens and pairs per rank [2, ranks]."""
    own = np.stack([np.bincount(rank_of, weights=load, minlength=ranks) for load in loads[:, shared:]])
    return own + loads[:, :shared].sum(axis=1, keepdims=True) / ranks


def _imbalance(totals: NDArray[np.float64]) -> float:
    return float(totals.max() / totals.mean() - 1) if totals.any() else 0.0
