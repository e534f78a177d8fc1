"""The gather that joins the anchor's keys to each later document's, and its backward.

tokens   a 1 1 2 2 3          keys   a 1 1 a 2 2 a 3          own    0 1 2 4 5 7
                                                              copies       3     6
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Copies:
    """Which of the packed keys are an anchor's copy, in front of a later document.

    Attributes:
        own: int64, the places of all other keys among the packed ones; each token stands there once.
        places: int64, the places of the copies, row by row and document by document.
        per_row: how many stand in each row of the batch.
        anchor_tokens: in front of each document.
        seq_len: tokens a row of the batch.
    """

    own: Tensor
    places: Tensor
    per_row: tuple[int, ...]
    anchor_tokens: int
    seq_len: int


def gather_tokens(tokens: Tensor, indices: Tensor, copies: Copies | None = None) -> Tensor:
    """Rows of [T, H, D] by index, each once or a copy of an anchor.

    On CUDA index_select itself would add the gradients of an anchor's copies in no fixed order, each sum rounded to
    their dtype. Here they are summed in float32 at least, in one order, and rounded once.
    """
    return _Gather.apply(tokens, indices, copies)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, indices: Tensor, copies: Copies | None) -> Tensor:
        ctx.num_tokens, ctx.copies = tokens.shape[0], copies
        ctx.save_for_backward(indices)
        return tokens.index_select(0, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        copies: Copies | None = ctx.copies
        total = gradient.new_zeros(ctx.num_tokens, *gradient.shape[1:])
        if copies is None:
            return total.index_copy_(0, indices, gradient), None, None
        total.index_copy_(0, indices.index_select(0, copies.own), gradient.index_select(0, copies.own))
        compute = torch.promote_types(gradient.dtype, torch.float32)
        parts = gradient.index_select(0, copies.places).to(compute).split(copies.per_row)
        for row, part in enumerate(parts):
            front = total[row * copies.seq_len :][: copies.anchor_tokens]
            front.copy_(part.unflatten(0, (-1, copies.anchor_tokens)).sum(0) + front)
        return total, None, None
