"""The gather that joins the anchor's keys to each later document's, and its backward.

tokens   a 1 1 2 2 3          keys   a 1 1 a 2 2 a 3          own    0 1 2 4 5 7
                                                              copies       3     6
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anchor_attn.masks.varlen import flat_indices


@dataclass(frozen=True)
class Places:
    """Tokens to take, as ranges for a host, which copies them one after the other, and as indices for a device.

    Attributes:
        ranges: of the tokens, in order.
        indices: int64, the same.
    """

    ranges: tuple[range, ...]
    indices: Tensor

    @classmethod
    def of(cls, ranges: Sequence[range], device: torch.device) -> "Places":
        """Both from the ranges, without a sync."""
        return cls(tuple(ranges), flat_indices([ranges]).to(device, non_blocking=True))

    def take(self, tokens: Tensor) -> Tensor:
        """The tokens [T, …] at these places."""
        if tokens.device.type == "cpu":  # a third of index_select's time
            return torch.cat([tokens[part.start : part.stop] for part in self.ranges])
        return tokens.index_select(0, self.indices)


@dataclass(frozen=True)
class AnchoredKeys:
    """How the packed keys come from the tokens of a batch, anchors once for every document.

    Attributes:
        keys: where each packed key stands among the tokens.
        own: the packed keys that are no copy, one a query and in the queries' order.
        copies: the packed keys that are an anchor's copy, row by row and document by document.
        copies_per_row: how many stand in each row of the batch.
        anchor_tokens: in front of each document.
        seq_len: tokens a row of the batch.
        q_indices: int64, where each query stands among the tokens; None where it is its own number.
    """

    keys: Places
    own: Places
    copies: Places
    copies_per_row: tuple[int, ...]
    anchor_tokens: int
    seq_len: int
    q_indices: Tensor | None


class GatherQueries(torch.autograd.Function):
    """Tokens [T, H, D] by index, each at most once."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, indices: Tensor) -> Tensor:  # noqa: D102
        ctx.num_tokens = tokens.shape[0]
        ctx.save_for_backward(indices)
        return tokens.index_select(0, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (indices,) = ctx.saved_tensors
        return spread(gradient, indices, ctx.num_tokens), None


class GatherKeys(torch.autograd.Function):
    """Keys [Tk, K, D] from tokens [T, K, D].

    On CUDA index_select itself would add the gradients of an anchor's copies in no fixed order, each sum rounded to
    their dtype. Here they are summed in float32 at least, in one order, and rounded once.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, anchored: AnchoredKeys) -> Tensor:  # noqa: D102
        ctx.num_tokens, ctx.anchored = tokens.shape[0], anchored
        return anchored.keys.take(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        anchored: AnchoredKeys = ctx.anchored
        total = anchored.own.take(gradient)
        if anchored.q_indices is not None:
            total = spread(total, anchored.q_indices, ctx.num_tokens)
        compute = torch.promote_types(gradient.dtype, torch.float32)
        copies = anchored.copies.take(gradient).to(compute).split(anchored.copies_per_row)
        for row, part in enumerate(copies):
            front = total[row * anchored.seq_len :][: anchored.anchor_tokens]
            front.copy_(part.unflatten(0, (-1, anchored.anchor_tokens)).sum(0) + front)
        return total, None


def spread(packed: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    """Packed rows at their places among `num_tokens`, zeros at the others."""
    return packed.new_zeros(num_tokens, *packed.shape[1:]).index_copy(0, indices, packed)
