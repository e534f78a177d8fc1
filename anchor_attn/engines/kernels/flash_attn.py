"""flash_attn 2, 3 and 4.

Their own backward is private: `_flash_attn_varlen_backward` (2), `_flash_attn_backward` (3), `_flash_attn_bwd` (4).
All take the log-sum-exp as float32 [H, Tq].

Source: flash_attn/flash_attn_interface.py (tag v2.8.3), hopper/flash_attn_interface.py (3) and
flash_attn/cute/interface.py (4, both at 0251105a) of https://github.com/Dao-AILab/flash-attention
"""

from typing import Any

import torch
from torch import Tensor

from anchor_attn.engines.kernels.base import Scoring
from anchor_attn.engines.kernels.flash import FlashKernel, Packed, boundaries, window_size
from anchor_attn.engines.kernels.plan import KernelPlan


class FlashAttention2(FlashKernel):
    """flash_attn 2.8."""

    name = "flash_attn_2"
    module = "flash_attn.flash_attn_interface"
    majors = (8, 9, 10, 11, 12)
    install = "pip install 'flash-attn>=2.8'"
    has_dropout = True

    def _attend(self, qkv: Packed, plan: KernelPlan, scoring: Scoring) -> Tensor:
        settings = {**public_settings(plan, scoring), "dropout_p": scoring.dropout}
        return self._functions().flash_attn_varlen_func(*qkv, **settings)

    def _attend_with_lse(self, qkv: Packed, plan: KernelPlan, scoring: Scoring) -> tuple[Tensor, Tensor]:
        attend = self._functions().flash_attn_varlen_func
        out, lse, _ = attend(*qkv, **public_settings(plan, scoring), return_attn_probs=True)
        return out, lse

    def _differentiate(
        self, dout: Tensor, qkv: Packed, out: Tensor, lse: Tensor, plan: KernelPlan, scoring: Scoring
    ) -> Packed:
        dq, dk, dv = (torch.empty_like(states) for states in qkv)
        self._functions()._flash_attn_varlen_backward(
            dout, *qkv, out, lse, dq, dk, dv, **private_settings(plan, scoring), causal=True, dropout_p=0.0,
            alibi_slopes=None,
        )  # fmt: skip
        return dq, dk, dv


class FlashAttention3(FlashKernel):
    """flash_attn 3, the one for Hopper."""

    name = "flash_attn_3"
    module = "flash_attn_interface"
    majors = (8, 9)
    install = "build hopper/ of github.com/Dao-AILab/flash-attention"

    def _attend(self, qkv: Packed, plan: KernelPlan, scoring: Scoring) -> Tensor:
        return self._functions().flash_attn_varlen_func(*qkv, **public_settings(plan, scoring))

    def _attend_with_lse(self, qkv: Packed, plan: KernelPlan, scoring: Scoring) -> tuple[Tensor, Tensor]:
        attend = self._functions().flash_attn_varlen_func
        out, lse = attend(*qkv, **public_settings(plan, scoring), return_attn_probs=True)
        return out, lse

    def _differentiate(
        self, dout: Tensor, qkv: Packed, out: Tensor, lse: Tensor, plan: KernelPlan, scoring: Scoring
    ) -> Packed:
        dq, dk, dv = (torch.empty_like(states) for states in qkv)
        self._functions()._flash_attn_backward(
            dout, *qkv, out, lse, dq=dq, dk=dk, dv=dv, **private_settings(plan, scoring), is_causal=True
        )
        return dq, dk, dv


class FlashAttention4(FlashKernel):
    """flash_attn 4, the one for Blackwell, written in CuTe's Python; it says None where the others say -1."""

    name = "flash_attn_4"
    module = "flash_attn.cute.interface"
    majors = (9, 10, 11, 12)
    install = "pip install flash-attn-4"
    # On SM100 heads end at 128, but for (192, 128) and (256, 256): less than what the others take.
    max_head_dim = 128
    unequal_value = True

    def _attend(self, qkv: Packed, plan: KernelPlan, scoring: Scoring) -> Tensor:
        out, _ = self._functions().flash_attn_varlen_func(*qkv, **self._settings(plan, scoring))
        return out

    def _attend_with_lse(self, qkv: Packed, plan: KernelPlan, scoring: Scoring) -> tuple[Tensor, Tensor]:
        out, lse = self._functions().flash_attn_varlen_func(*qkv, **self._settings(plan, scoring), return_lse=True)
        return out, lse

    def _settings(self, plan: KernelPlan, scoring: Scoring) -> dict[str, Any]:
        left, right = window_size(plan, scoring)
        return {**public_settings(plan, scoring), "window_size": (None if left < 0 else left, right)}

    def _differentiate(
        self, dout: Tensor, qkv: Packed, out: Tensor, lse: Tensor, plan: KernelPlan, scoring: Scoring
    ) -> Packed:
        settings = private_settings(plan, scoring)
        if settings["window_size_left"] < 0:
            settings["window_size_left"] = None
        dq, dk, dv, *_ = self._functions()._flash_attn_bwd(*qkv, out, dout, lse, causal=True, **settings)
        return dq, dk, dv


def public_settings(plan: KernelPlan, scoring: Scoring) -> dict[str, Any]:
    """By the names of `flash_attn_varlen_func`, in all three."""
    return {**_shared_settings(plan, scoring), "causal": True, "window_size": window_size(plan, scoring)}


def private_settings(plan: KernelPlan, scoring: Scoring) -> dict[str, Any]:
    """By the names of the backward, in all three; "causal" has a name of its own in 3."""
    left, right = window_size(plan, scoring)
    return {**_shared_settings(plan, scoring), "window_size_left": left, "window_size_right": right}


def _shared_settings(plan: KernelPlan, scoring: Scoring) -> dict[str, Any]:
    return {
        **boundaries(plan),
        "softmax_scale": scoring.scale,
        "softcap": scoring.softcap or 0.0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
