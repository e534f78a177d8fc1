"""What the flash kernels share: heads of a multiple of 8, boundaries and windows as they are said to all of them.

Forward passes go through the packages' public functions. The backward that takes a merged output and log-sum-exp is
theirs too, but private.
"""

import importlib
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anchor_attn.engines.kernels.base import Kernel, Scoring
from anchor_attn.engines.kernels.plan import KernelPlan
from anchor_attn.request import Call

Packed = tuple[Tensor, Tensor, Tensor]  # q, k and v, or their gradients


class FlashKernel(Kernel):
    """A kernel that wants heads of a multiple of 8, padded here with zeros, which change no score.

    Attributes:
        module: where its functions live.
        majors: the CUDA compute capabilities (major) that it is built for.
        install: what brings it.
        unequal_value: whether values may have another size than queries; where not, both are padded to the wider.
    """

    module: str
    majors: tuple[int, ...]
    install: str
    unequal_value: bool = False

    def absence(self, device: torch.device) -> str | None:  # noqa: D102
        if device.type == "cuda":
            if torch.version.hip is not None:
                return "is not proven on ROCm; pass engine='varlen/sdpa'"
            if (major := torch.cuda.get_device_capability(device)[0]) not in self.majors:
                return f"is built for compute capability {self.majors}, not {major}; pass engine='varlen/sdpa'"
        try:
            importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # OSError: a wheel built against another torch
            return f"cannot be imported ({error}); {self.install}"
        return None

    def refusal(self, call: Call, merged: bool = False) -> str | None:  # noqa: D102
        if call.keeps_anchor_outside and not merged:
            return f"sliding_window={call.window} with the anchor kept outside it, in form gather"
        if call.has_sinks and not merged:
            return "sinks in form gather"
        if call.dropout and call.softcap is not None:
            return f"dropout={call.dropout} with a softcap"
        return super().refusal(call, merged)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: KernelPlan, scoring: Scoring) -> Tensor:  # noqa: D102
        out = self._attend(self._padded(q, k, v), plan, scoring)
        return out[..., : v.shape[-1]]

    def forward_with_lse(  # noqa: D102
        self, q: Tensor, k: Tensor, v: Tensor, plan: KernelPlan, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        out, lse = self._attend_with_lse(self._padded(q, k, v), plan, scoring)
        return out[..., : v.shape[-1]], lse

    def backward(  # noqa: D102
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
        padded = self._padded(q, k, v)
        dout, out = (_widened(states, padded[2].shape[-1]) for states in (dout, out))
        dq, dk, dv = self._differentiate(dout, padded, out, lse.contiguous(), plan, scoring)
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]

    def _padded(self, q: Tensor, k: Tensor, v: Tensor) -> Packed:
        head_dim, value_dim = (-(-states.shape[-1] // 8) * 8 for states in (q, v))
        if not self.unequal_value:
            head_dim = value_dim = max(head_dim, value_dim)
        return _widened(q, head_dim), _widened(k, head_dim), _widened(v, value_dim)

    def _functions(self) -> Any:
        return importlib.import_module(self.module)

    @abstractmethod
    def _attend(self, qkv: Packed, plan: KernelPlan, scoring: Scoring) -> Tensor: ...

    @abstractmethod
    def _attend_with_lse(self, qkv: Packed, plan: KernelPlan, scoring: Scoring) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _differentiate(
        self, dout: Tensor, qkv: Packed, out: Tensor, lse: Tensor, plan: KernelPlan, scoring: Scoring
    ) -> Packed: ...


def boundaries(plan: KernelPlan) -> dict[str, Any]:
    """By the names that flash_attn has for them."""
    parts = plan.segments
    return {
        "cu_seqlens_q": parts.cu_seqlens_q,
        "cu_seqlens_k": parts.cu_seqlens_k,
        "max_seqlen_q": parts.max_seqlen_q,
        "max_seqlen_k": parts.max_seqlen_k,
    }


def window_size(plan: KernelPlan, scoring: Scoring) -> tuple[int, int]:
    """(keys before the query, keys after it); -1 for all, also where the window is wider than any segment."""
    if scoring.window is None or scoring.window >= plan.segments.max_seqlen_k:
        return -1, 0
    return scoring.window - 1, 0


def _widened(states: Tensor, width: int) -> Tensor:
    """Zeros behind every head up to `width`, the last axis contiguous."""
    if states.shape[-1] != width:
        return F.pad(states, (0, width - states.shape[-1]))
    return states if states.stride(-1) == 1 else states.contiguous()
