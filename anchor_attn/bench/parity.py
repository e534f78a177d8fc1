"""Rivals against the float64 reference, before they are timed, by the budget of the tests.

error ≤ 2 · error(eager PyTorch in the same dtype) + 4 · eps · max|reference|        (3 · for gradients)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anchor_attn.attention import anchor_attention
from anchor_attn.masks import PackedLayout, dense_mask
from anchor_attn.masks.patterns import Pattern
from anchor_attn.results import CheckError

Attend = Callable[..., Tensor]

# One document that a window of 256 cuts, one shorter than any block, and two between: 1,200 tokens with the anchor.
PARITY_LENGTHS = (600, 50, 249, 300)
FACTORS = {"out": 2, "gradients": 3}
NAMES = ("query", "key", "value", "sinks")


@dataclass(frozen=True)
class Inputs:
    """Tensors to attend with; `sinks` only where they are asked for.

    Attributes:
        states: query [B, H, S, D], key and value [B, K, S, D], and sinks [H] where asked for.
        cotangent: [B, H, S, D], the gradient of the output.
    """

    states: tuple[Tensor, ...]
    cotangent: Tensor

    @property
    def detached(self) -> tuple[Tensor, ...]:
        """The states as a forward without gradients takes them: flex on a CPU refuses leaves that ask for some."""
        return tuple(part.detach() for part in self.states)

    @classmethod
    def draw(
        cls,
        layout: PackedLayout,
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        seed: int,
        with_sinks: bool = False,
    ) -> "Inputs":
        """Random normal ones on the layout's device, the states asking for gradients."""
        generator = torch.Generator().manual_seed(seed)
        num_heads, num_kv_heads = heads
        shapes = [(layout.batch_size, count, layout.seq_len, head_dim) for count in (num_heads, *[num_kv_heads] * 2)]
        states = [torch.randn(shape, generator=generator) for shape in shapes]
        cotangent = torch.randn(shapes[0], generator=generator).to(layout.device, dtype)
        if with_sinks:
            states.append(torch.randn(num_heads, generator=generator))
        return cls(tuple(part.to(layout.device, dtype).requires_grad_() for part in states), cotangent)


class Reference:
    """What one kind of attention gives on a small row, in float64 and in eager PyTorch, outputs and gradients."""

    def __init__(self, inputs: Inputs, layout: PackedLayout, pattern: Pattern, features: Mapping[str, Any]) -> None:
        self.inputs, self.pattern = inputs, pattern
        dtype = inputs.cotangent.dtype
        window = {name: features[name] for name in ("sliding_window", "keep_anchor") if name in features}
        mask = dense_mask(layout, pattern, **window)[:, None]

        def exactly(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
            return anchor_attention(query, key, value, layout, pattern, "reference", sinks=sinks, **features)

        def eagerly(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
            return _eager_attention(query, key, value, mask, features.get("softcap"), sinks)

        self.exact = _results(exactly, inputs, torch.float64)
        self.eager = _results(eagerly, inputs, dtype)

    def check(self, name: str, attend: Attend, has_backward: bool = True) -> float:
        """Compare a rival; its largest error, as a share of what it may err.

        Raises:
            CheckError: it errs by more.
        """
        worst = 0.0
        found = _results(attend, self.inputs, self.inputs.cotangent.dtype, has_backward)
        for what, ours, eager, exact in zip(("out", *NAMES), found, self.eager, self.exact, strict=False):
            factor = FACTORS["out" if what == "out" else "gradients"]
            error, eager_error = (float((part.double() - exact).abs().max()) for part in (ours, eager))
            allowed = factor * eager_error + 4 * torch.finfo(ours.dtype).eps * float(exact.abs().max())
            worst = max(worst, error / allowed)
            if not error <= allowed:  # nan is no less
                raise CheckError(
                    f"{name} must agree with the reference before it is timed, got an error of {error:.1e} in {what} "
                    f"where {allowed:.1e} is allowed; report this with the version of torch."
                )
        return worst


def parity_layout(device: str) -> PackedLayout:
    """The small row on which parity is checked."""
    return PackedLayout.from_lengths([PARITY_LENGTHS]).to(device)


def _results(attend: Attend, inputs: Inputs, dtype: torch.dtype, has_backward: bool = True) -> list[Tensor]:
    states = [part.detach().to(dtype).requires_grad_(has_backward) for part in inputs.states]
    out = attend(*states)
    if not has_backward:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, states, inputs.cotangent.to(dtype))]


def _eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention as a textbook has it, all in the dtype of its inputs: what an error is measured by."""
    group = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    return scores.softmax(dim=-1)[..., : key.shape[2]] @ value
