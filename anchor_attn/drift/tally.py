"""Sums over many pairs of a query and a key, by distance, by key and by head.

    bins    0    1    2–3    4–7    8–15    …

Of distances and of keys alike, so that the first token stands alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Bins:
    """Powers of two below a size; the attribute holds where each begins, and the size behind."""

    edges: tuple[int, ...]

    @classmethod
    def below(cls, size: int) -> "Bins":
        """The bins of 0 … size − 1."""
        powers = [2**power for power in range(size.bit_length()) if 2**power < size]
        return cls((0, *powers, size))

    def __len__(self) -> int:
        return len(self.edges) - 1

    def bounds(self) -> Iterator[tuple[int, int]]:
        """First and last of every bin."""
        return ((low, high - 1) for low, high in zip(self.edges, self.edges[1:], strict=False))

    def place(self, values: Tensor) -> Tensor:
        """The bin of every value, int64 of the same shape."""
        return torch.bucketize(values, torch.tensor(self.edges[1:-1], device=values.device), right=True)


class Sums:
    """Count, sum, sum of squares and largest of magnitudes, in bins; float64 [N] each."""

    def __init__(self, bins: int) -> None:
        self.count, self.total, self.squares, self.largest = torch.zeros(4, bins, dtype=torch.float64)

    def add(self, bins: slice, count: Tensor | float, total: Tensor, squares: Tensor, largest: Tensor) -> None:
        """Add what was summed elsewhere to some of the bins."""
        self.count[bins] += count
        self.total[bins] += total
        self.squares[bins] += squares
        self.largest[bins] = torch.maximum(self.largest[bins], largest)


class Pairs:
    """The pairs of a block of queries with all keys that can see each other, and where each belongs.

    Of one query the keys of a bin of distances stand side by side, so that their sum is that of a stretch.

    Args:
        visible: bool [Q, K].
        rows: the queries' places, int64 [Q].
        distances: bins of a query's place less a key's.
        keys: bins of a key's place.
    """

    def __init__(self, visible: Tensor, rows: Tensor, distances: Bins, keys: Bins) -> None:
        self.visible, self.hidden = visible, ~visible
        self.keys = keys
        self._per_key = visible.sum(dim=0).double()
        self._starts, self._places = _stretches(rows, visible.shape[1], distances)
        self._distances = len(distances)
        per_stretch = np.add.reduceat(visible.flatten().to(torch.int64).numpy(), self._starts)
        self._per_distance = np.bincount(self._places, per_stretch, minlength=self._distances)

    @property
    def count(self) -> int:
        """How many."""
        return int(self._per_key.sum())

    def tally(self, magnitudes: Tensor, heads: slice, tallies: "Tallies") -> None:
        """Add the magnitudes of one block.

        Args:
            magnitudes: float64 [h, Q, K], zero where nothing is visible.
            heads: which of the heads they are.
            tallies: to add to.
        """
        squares = magnitudes.square()
        by_head = tallies.by["head"]
        by_head.add(heads, self.count, magnitudes.sum((1, 2)), squares.sum((1, 2)), magnitudes.amax((1, 2)))
        if not tallies.is_detailed:
            return
        h = magnitudes.shape[0]
        columns = magnitudes.sum((0, 1)), squares.sum((0, 1)), magnitudes.amax((0, 1))
        for place, (low, high) in enumerate(self.keys.bounds()):
            part = slice(low, high + 1)
            total, square, largest = (column[part] for column in columns)
            tallies.by["key"].add(
                slice(place, place + 1), h * self._per_key[part].sum(), total.sum(), square.sum(), largest.max()
            )
        for one, its_squares in zip(magnitudes, squares, strict=True):
            found = (self._per_distance, self._summed(one), self._summed(its_squares), self._largest(one))
            tallies.by["distance"].add(slice(None), *(torch.from_numpy(x) for x in found))

    def _summed(self, values: Tensor) -> NDArray[np.float64]:
        """By distance, float64 [N]."""
        summed = np.zeros(self._distances)
        np.add.at(summed, self._places, np.add.reduceat(values.flatten().numpy(), self._starts))
        return summed

    def _largest(self, values: Tensor) -> NDArray[np.float64]:
        """By distance, float64 [N]."""
        largest = np.zeros(self._distances)
        with np.errstate(invalid="ignore"):  # nan is told of later, with the policy's name
            np.maximum.at(largest, self._places, np.maximum.reduceat(values.flatten().numpy(), self._starts))
        return largest


def _stretches(rows: Tensor, keys: int, distances: Bins) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each stretch of one query and one bin begins in a flat [Q, K], and its bin.

    row 5 of 7 keys      0 1 | 2 3 | 4 | 5 6       distances 5–4, 3–2, 1, and 0 with the future, which nobody sees
    """
    low, high = (torch.tensor(bounds) for bounds in zip(*distances.bounds(), strict=True))
    starts = (rows[:, None] - high.flip(0)).clamp_min(0)  # far bins stand first
    exists = rows[:, None] >= low.flip(0)
    places = torch.arange(len(distances)).flip(0).expand_as(starts)
    flat = starts + torch.arange(len(rows))[:, None] * keys
    return flat[exists].numpy(), places[exists].numpy()


class Tallies:
    """Sums by head, and where they are detailed by distance and by key."""

    def __init__(self, heads: int, distances: Bins, keys: Bins, is_detailed: bool) -> None:
        self.is_detailed = is_detailed
        self.by = {"head": Sums(heads)}
        if is_detailed:
            self.by |= {"distance": Sums(len(distances)), "key": Sums(len(keys))}

    def overall(self) -> Sums:
        """All of it in one bin."""
        heads, gathered = self.by["head"], Sums(1)
        gathered.add(slice(None), heads.count.sum(), heads.total.sum(), heads.squares.sum(), heads.largest.max())
        return gathered
