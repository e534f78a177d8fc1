"""What attention kernels compute for the pairs that are attended: tiles of queries × keys.

    3 documents of 100 tokens, tiles of 128 × 128      pairs 15_150      cells 49_152

A short document fills a part of its tile, and a tile on the diagonal is half empty; a kernel's time follows the cells.
"""

from typing import NamedTuple

import numpy as np


class Tile(NamedTuple):
    """Tokens of queries and of keys in a tile.

    Attributes:
        queries: of a tile.
        keys: of a tile.
        is_whole: whether a tile at the end of a document is computed whole, as on a GPU, or cut to what is there.
    """

    queries: int
    keys: int
    is_whole: bool = True

    def cells(self, length: int, window: int | None = None) -> int:
        """Cells that are computed for one causal stretch of tokens.

        Tile(128, 128).cells(100)    16_384

        Args:
            length: tokens of the stretch.
            window: of the layer, in tokens; None for none.
        """
        first = np.arange(0, length, self.queries, dtype=np.int64)
        last = np.minimum(first + self.queries, length)
        end = -(-last // self.keys) * self.keys
        begin = np.zeros_like(first) if window is None else np.maximum(first - window + 1, 0) // self.keys * self.keys
        if self.is_whole:
            return int((self.queries * (end - begin)).sum())
        return int(((last - first) * (np.minimum(end, length) - begin)).sum())


class CpuTile(Tile):
    """torch's flash kernel on a CPU: 512 keys, and as many queries as the length calls for.

    Source: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp
    """

    def cells(self, length: int, window: int | None = None) -> int:
        """As `Tile.cells`."""
        queries = 256 if length >= 768 else 64 if length >= 192 else 32
        return Tile(queries, 512, is_whole=False).cells(length, window)
