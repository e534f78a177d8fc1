"""What a varlen kernel is: packed tokens in, packed tokens out, and the log-sum-exp with its backward.

    Tq queries · Tk keys · H query heads · K key heads (H = K · G) · D head size · V value size

    q [Tq, H, D]   k [Tk, K, D]   v [Tk, K, V]   out [Tq, H, V]   lse [H, Tq]

Every kernel is causal, aligned bottom-right: query i of n sees the first `k_len - n + i + 1` keys of its segment.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from anchor_attn.engines.kernels.plan import KernelPlan
from anchor_attn.request import Call


@dataclass(frozen=True, eq=False)
class Scoring:
    """What a kernel makes of the scores.

    Attributes:
        scale: of the products.
        softcap: c · tanh(score / c), or None.
        window: the current token and this many less one before it, by places among the segment's keys; or None.
        kept: the keys in front of a segment that stay visible outside the window.
        sinks: [H], a logit a query head that joins every softmax without a value; or None.
        dropout: the share of weights that is dropped; 0 in an evaluation.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    kept: int = 0
    sinks: Tensor | None = None
    dropout: float = 0.0


class Kernel(ABC):
    """One varlen kernel, and what it can.

    Attributes:
        name: as it is asked for.
        device_types: where it runs; () for anywhere.
        dtypes: of query, key and value.
        max_head_dim: the widest head, query's or value's; None for any.
        has_softcap: whether it can cap scores.
        has_dropout: whether it can drop weights.
    """

    name: str
    device_types: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    max_head_dim: int | None = 256
    has_softcap: bool = True
    has_dropout: bool = False

    @abstractmethod
    def absence(self, device: torch.device) -> str | None:
        """Why this machine cannot call the kernel on `device`, with what to do about it; None where it can."""

    def refusal(self, call: Call, merged: bool = False) -> str | None:
        """What is asked for and the kernel has not, in words that follow "got"; None where it has everything.

        Args:
            call: what is to be computed.
            merged: whether the anchor and sinks are joined after it, which takes the log-sum-exp and its backward.
        """
        if call.dtype not in self.dtypes:
            return f"{call.dtype}"
        if self.max_head_dim is not None and call.head_dim > self.max_head_dim:
            return f"a head size of {call.head_dim}"
        if call.softcap is not None and not self.has_softcap:
            return f"softcap={call.softcap}"
        if call.dropout and not self.has_dropout:
            return f"dropout={call.dropout}"
        if call.dropout and merged:
            return f"dropout={call.dropout} with an anchor or a sink that is merged"
        if self.device_types and call.device.type not in self.device_types:
            return f"tensors on {call.device.type}"
        return None

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: KernelPlan, scoring: Scoring) -> Tensor:
        """The output [Tq, H, V]; differentiable."""

    @abstractmethod
    def forward_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: KernelPlan, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        """The output [Tq, H, V] and the log-sum-exp [H, Tq] in float32 or wider; not differentiable."""

    @abstractmethod
    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        plan: KernelPlan,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v, with P = exp(S - lse) and dS = P ∘ (dP - Σ dout · out).

        `out` and `lse` are taken as given: those of a softmax over more keys than the kernel sees make its share of
        that softmax's gradients.
        """
