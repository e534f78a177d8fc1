"""What a row costs in pairs, in cells of tiles, and in floating-point operations.

    P weights that a token is multiplied with · T tokens · H heads · D, Dv sizes of a query and a value · N pairs

    forward      dense 2·P·T        attention 2·H·(D + Dv)·N                  scores, and their sum over values
    backward     dense 4·P·T        attention 4·H·(D + Dv)·N                  twice the forward, as MFU counts it
    executed     dense 6·P·T        attention 2·H·((D + Dv) + (3·D + 2·Dv))·N flash kernels compute scores again

Checkpointing runs the layers' forward once more, which counts as executed and not for MFU.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from anchor_attn.masks import PackedLayout, attended_pairs
from anchor_attn.masks.patterns import Pattern
from anchor_attn.train.plan.models import ModelShape
from anchor_attn.train.plan.tiles import Tile

ANCHOR_TOKENS = 1


@dataclass(frozen=True)
class RowWork:
    """What one row holds, for one head.

    Attributes:
        tokens: the anchor included.
        pairs: attended, all layers together.
        cells: of the tiles that a kernel computes for them, all layers together.
    """

    tokens: int
    pairs: int
    cells: int


def count_row(shape: ModelShape, lengths: Sequence[int], pattern: Pattern, tile: Tile) -> RowWork:
    """Count a row's pairs exactly, and the cells by tile.

    Args:
        shape: of the model, for its layers and their windows.
        lengths: tokens of each document, the anchor not counted.
        pattern: "full", "intra_doc" or "anchor".
        tile: of the kernel; the anchor's column costs its pairs and no tile, as a merged sum does.
    """
    layout, documents = PackedLayout.from_lengths([list(lengths)], ANCHOR_TOKENS), Counter(lengths)
    pairs = cells = 0
    for window, layers in Counter(shape.windows).items():
        # Layers with a window take the anchor for an ordinary token before the document, as wrapped models do.
        pairs += layers * attended_pairs(layout, pattern, window, keep_anchor=window is None)[0]
        if pattern == "full":
            cells += layers * _cells(tile, layout.seq_len, window)
        else:
            own = sum(count * _cells(tile, length, window) for length, count in documents.items())
            cells += layers * (own + (ANCHOR_TOKENS * sum(lengths) if pattern == "anchor" else 0))
    return RowWork(layout.seq_len, pairs, cells)


@lru_cache(maxsize=4096)
def _cells(tile: Tile, length: int, window: int | None) -> int:
    return tile.cells(length, window)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, of a row or of any other number of tokens and pairs.

    Attributes:
        dense: of the matrix products with weights.
        attention: of scores, and of sums over values.
    """

    dense: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.dense + self.attention

    @property
    def attention_share(self) -> float:
        """Attention's share of both."""
        return self.attention / self.total


def forward_flops(shape: ModelShape, tokens: float, pairs: float) -> Flops:
    """Of a forward.

    Args:
        shape: of the model.
        tokens: that go through it.
        pairs: one head, all layers together.
    """
    weights = shape.layer_weights + shape.head_weights
    return Flops(2.0 * weights * tokens, 2.0 * shape.num_heads * (shape.head_dim + shape.value_dim) * pairs)


def backward_flops(shape: ModelShape, tokens: float, pairs: float) -> Flops:
    """Of a backward, twice the forward's: scores that a kernel computes again do not count."""
    forward = forward_flops(shape, tokens, pairs)
    return Flops(2 * forward.dense, 2 * forward.attention)


def executed_flops(shape: ModelShape, tokens: float, cells: float, checkpointing: bool) -> Flops:
    """Of a forward and a backward as kernels run them, over cells of tiles instead of pairs."""
    forward = forward_flops(shape, tokens, cells)
    again = 2.0 * shape.layer_weights * tokens if checkpointing else 0.0
    flash_backward = 2.0 * shape.num_heads * (3 * shape.head_dim + 2 * shape.value_dim) * cells
    forwards = 2 if checkpointing else 1
    return Flops(3 * forward.dense + again, forwards * forward.attention + flash_backward)
