"""The FlashAttention 2 that torch carries: `varlen_attn`, and the two aten ops below it.

The public function has had three signatures: with `is_causal` and no scale (torch 2.10), with `scale` and
`window_size`, and with `enable_gqa` besides (2.13). The ops' schema is one for all.

Source: torch/nn/attention/varlen.py; `_flash_attention_forward` and `_flash_attention_backward` in
aten/src/ATen/native/native_functions.yaml.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anchor_attn.engines.kernels.base import Scoring
from anchor_attn.engines.kernels.flash import FlashKernel, Packed, window_size
from anchor_attn.engines.kernels.plan import KernelPlan
from anchor_attn.request import Call


class VarlenAttn(FlashKernel):
    """torch.nn.attention.varlen.varlen_attn: FlashAttention 2 as torch ships it."""

    name = "varlen_attn"
    module = "torch.nn.attention.varlen"
    majors = (8, 9, 10, 11, 12)
    install = "upgrade torch to 2.11 or later"
    has_softcap = False

    def refusal(self, call: Call, merged: bool = False) -> str | None:  # noqa: D102
        if call.window is not None and not merged and "window_size" not in self._parameters():
            return f"sliding_window={call.window} in form gather, for which this torch is too old"
        return super().refusal(call, merged)

    def _attend(self, qkv: Packed, plan: KernelPlan, scoring: Scoring) -> Tensor:
        q, k, v = qkv
        known = self._parameters()
        window = window_size(plan, scoring)
        settings: dict[str, Any] = {}
        if "enable_gqa" in known:  # before it came, grouped heads needed no word
            settings["enable_gqa"] = q.shape[1] != k.shape[1]
        if "scale" in known:
            settings["scale"] = scoring.scale
        else:  # 1/√D of the padded heads is built in
            q = q * (scoring.scale * q.shape[-1] ** 0.5)
        if "window_size" in known:
            settings["window_size"] = window  # a tuple: torch compares it with (-1, 0) to find causal
        else:
            settings["is_causal"] = True
        parts = plan.segments
        return self._functions().varlen_attn(
            q, k, v, parts.cu_seqlens_q, parts.cu_seqlens_k, parts.max_seqlen_q, parts.max_seqlen_k, **settings
        )

    def _attend_with_lse(self, qkv: Packed, plan: KernelPlan, scoring: Scoring) -> tuple[Tensor, Tensor]:
        # The op below varlen_attn, whose schema is one for all its signatures.
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *qkv, *self._positions(plan, scoring), False, **self._settings(plan, scoring)
        )
        return out, lse

    def _differentiate(
        self, dout: Tensor, qkv: Packed, out: Tensor, lse: Tensor, plan: KernelPlan, scoring: Scoring
    ) -> Packed:
        rng_state = torch.zeros(2, dtype=torch.uint64, device=out.device)  # of a dropout that there is not
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, *qkv, out, lse, *self._positions(plan, scoring), rng_state, out.new_empty(0),
            **self._settings(plan, scoring),
        )  # fmt: skip
        return dq, dk, dv

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self._functions().varlen_attn).parameters

    def _positions(self, plan: KernelPlan, scoring: Scoring) -> tuple[Any, ...]:
        """Boundaries, longest segments, dropout and is_causal."""
        parts = plan.segments
        is_causal = window_size(plan, scoring) == (-1, 0)
        return (*parts[:4], 0.0, is_causal)

    def _settings(self, plan: KernelPlan, scoring: Scoring) -> dict[str, Any]:
        left, right = window_size(plan, scoring)
        return {"scale": scoring.scale, "window_size_left": left, "window_size_right": right}
