"""Which pairs of a query and a key are measured, where both stand, and samples of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anchor_attn.drift.states import States
from anchor_attn.drift.tally import Bins
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import PositionPolicy, checked_int
from anchor_attn.masks.patterns import Pattern, packed_mask_mod

# Of queries that a sample is drawn from, so that no mask of a whole long row is made for it.
SAMPLED_MASK = 2**21
# Queries of a row: so many, None for all, or as many as its length leaves time and memory for.
Queries = int | Literal["by length"] | None
BY_LENGTH: Literal["by length"] = "by length"
FEWEST_QUERIES, MOST_QUERIES = 64, 512
# Of queries and keys together: 64 queries of 131,072 tokens, and 512 up to 16,384.
QUERIED_PAIRS = 2**23


@dataclass(frozen=True)
class TokenPairs:
    """Some pairs of a query and a key that it sees, of one row.

    Attributes:
        queries: places, int64 [N].
        keys: places, int64 [N].
        bins: of the key, int64 [N].
        weights: how many visible pairs each stands for, float64 [N].
    """

    queries: Tensor
    keys: Tensor
    bins: Tensor
    weights: Tensor


@dataclass(frozen=True)
class View:
    """Which queries are measured, which keys each of them sees, and where both stand.

    Attributes:
        rows: places of the queries, int64 [Q].
        position_ids: before a shift, int64 [B, S].
        sees: visible keys, bool [Q, S], of a row of the batch and some of the queries.
    """

    rows: Tensor
    position_ids: Tensor
    sees: Callable[[int, Tensor], Tensor]

    @classmethod
    def of(
        cls,
        states: States,
        layout: PackedLayout | None = None,
        pattern: Pattern = "full",
        position_policy: PositionPolicy = "continuous",
        queries: Queries = None,
    ) -> "View":
        """The pairs of a pattern, `queries` of them evenly over the row.

        Raises:
            ValueError: a layout of other shape, an unknown pattern or policy, or no queries.
        """
        batch, seq_len = states.query.shape[0], states.seq_len
        if layout is None:
            layout = PackedLayout.from_lengths([[seq_len]] * batch, anchor_tokens=0)
        if (layout.batch_size, layout.seq_len) != (batch, seq_len):
            raise ValueError(
                f"layout must describe {batch} rows of {seq_len} tokens, got {layout.batch_size} of {layout.seq_len}; "
                "pass the layout of these states."
            )
        mask_mod = packed_mask_mod(layout, pattern, states.sliding_window, keep_anchor=False)
        keys = torch.arange(seq_len)

        def sees(row: int, rows: Tensor) -> Tensor:
            return mask_mod(torch.tensor(row), torch.tensor(0), rows[:, None], keys[None])

        return cls(_evenly(seq_len, queries), layout.position_ids(position_policy).long(), sees)

    def sample(self, row: int, bins: Bins, per_bin: int) -> TokenPairs:
        """So many visible pairs of each bin of keys, the same at every call.

        Args:
            row: of the batch.
            bins: of keys.
            per_bin: at most; fewer where fewer are seen.
        """
        seq_len = self.position_ids.shape[1]
        queries = self.rows[_evenly(len(self.rows), min(256, max(16, SAMPLED_MASK // seq_len)))]
        visible = self.sees(row, queries)
        draw = torch.Generator().manual_seed(0)
        parts = []
        for place, (low, high) in enumerate(bins.bounds()):
            query, key = visible[:, low : high + 1].nonzero(as_tuple=True)
            count = len(query)
            if count > per_bin:
                drawn = torch.randint(count, (per_bin,), generator=draw)
                query, key = query[drawn], key[drawn]
            weights = torch.full((len(query),), count / max(1, len(query)), dtype=torch.float64)
            parts.append((queries[query], key + low, torch.full((len(query),), place), weights))
        return TokenPairs(*(torch.cat(column) for column in zip(*parts, strict=True)))


def count_queries(seq_len: int, queries: Queries) -> int:
    """How many of a row are measured.

        count_queries(131_072, "by length")      64

    Args:
        seq_len: tokens of the row.
        queries: as asked for; "by length" is 512 up to 16,384 tokens, then fewer, 64 from 131,072 on.

    Raises:
        TypeError: neither a number nor "by length".
        ValueError: none.
    """
    if queries == BY_LENGTH:
        queries = min(MOST_QUERIES, max(FEWEST_QUERIES, QUERIED_PAIRS // seq_len))
    if queries is not None and checked_int(queries, "queries") < 1:
        raise ValueError(f"queries must be at least 1, got {queries}; pass 512, say, or leave it out.")
    return seq_len if queries is None else min(queries, seq_len)


def _evenly(size: int, queries: Queries) -> Tensor:
    """Places of so many queries below a size, evenly, the last among them."""
    count = count_queries(size, queries)
    return (torch.arange(1, count + 1) * size) // count - 1
