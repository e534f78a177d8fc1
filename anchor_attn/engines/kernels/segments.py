"""scaled_dot_product_attention a segment at a time: the kernel that is there on every device and in every dtype.

On the CPU its flash op also gives the log-sum-exp, and takes it back in its backward. Windows, softcaps and sinks,
which it has not, are computed in chunks of queries, each with the keys that its window can reach.

Source: `_scaled_dot_product_flash_attention_for_cpu` and its backward, aten/src/ATen/native/native_functions.yaml.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from anchor_attn.engines.kernels.base import Kernel, Scoring
from anchor_attn.engines.kernels.plan import KernelPlan
from anchor_attn.engines.reference import masked_attention
from anchor_attn.request import Call

CHUNK_TOKENS = 512


class SegmentSDPA(Kernel):
    """torch's own attention, a segment at a time; unmerged it has all, merged neither softcap nor dropout."""

    name = "sdpa"
    device_types = ()  # any
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    max_head_dim = None
    has_dropout = True

    def absence(self, device: torch.device) -> str | None:  # noqa: D102
        return None

    def refusal(self, call: Call, merged: bool = False) -> str | None:  # noqa: D102
        if merged and call.softcap is not None:
            return f"softcap={call.softcap} with an anchor or a sink that is merged"
        if merged and call.device.type != "cpu":
            return f"a merge on {call.device.type}, where SDPA gives no log-sum-exp"
        return super().refusal(call, merged)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: KernelPlan, scoring: Scoring) -> Tensor:  # noqa: D102
        parts = zip(_split(q, plan.q_lens), _split(k, plan.k_lens), _split(v, plan.k_lens), strict=True)
        return _joined(_attend_segment(*part, scoring) for part in parts)

    def forward_with_lse(  # noqa: D102
        self, q: Tensor, k: Tensor, v: Tensor, plan: KernelPlan, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        outs, sums = [], []
        for part in zip(*(_split(states, plan.q_lens) for states in _alike(q, k, v)), strict=True):
            bias = _window_bias(part[0], scoring)
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *part, 0.0, bias is None, attn_mask=bias, scale=scoring.scale
            )
            outs.append(out)
            sums.append(lse[0])
        return _joined(outs)[..., : v.shape[-1]], torch.cat(sums, dim=1)

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
        wide = _alike(q, k, v)
        padding = wide[0].shape[-1] - v.shape[-1]
        states = (F.pad(dout, (0, padding)), *wide, F.pad(out, (0, padding)))
        parts = zip(*(_split(part, plan.q_lens) for part in states), lse[None].split(plan.q_lens, dim=2), strict=True)
        gradients = []
        for *part, sums in parts:
            bias = _window_bias(part[0], scoring)
            gradients.append(
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *part, sums, 0.0, bias is None, attn_mask=bias, scale=scoring.scale
                )
            )
        dq, dk, dv = (_joined(part) for part in zip(*gradients, strict=True))
        dk, dv = (part.unflatten(1, (k.shape[1], -1)).sum(2) for part in (dk, dv))
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _split(states: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """[T, H, D] as [1, H, n, D] a segment; split, because the backward of a slice fills a tensor of all tokens."""
    return tuple(part.transpose(0, 1)[None] for part in states.split(lengths))


def _joined(outs: Iterable[Tensor]) -> Tensor:
    return torch.cat([out[0].transpose(0, 1) for out in outs])


def _alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the CPU's flash op wants them: a key head for every query head, and values as wide as queries."""
    width = max(q.shape[-1], v.shape[-1])
    group = q.shape[1] // k.shape[1]
    q, k, v = (F.pad(states, (0, width - states.shape[-1])) for states in (q, k, v))
    return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def _attend_segment(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """[1, H, n, V] of one segment; k may be longer than q."""
    if scoring.softcap is not None or scoring.sinks is not None or scoring.window is not None:
        chunks = [_attend_chunk(*chunk, scoring) for chunk in _chunks(q, k, v, scoring)]
        return torch.cat(chunks, dim=2)
    behind = k.shape[2] - q.shape[2]
    if not behind:
        return _sdpa(q, k, v, scoring)
    # is_causal is aligned top-left: square it with queries of zeros and drop their output, by a split again.
    square = torch.cat((q.new_zeros(*q.shape[:2], behind, q.shape[3]), q), dim=2)
    return _sdpa(square, k, v, scoring).split((behind, q.shape[2]), dim=2)[1]


def _chunks(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Queries of a segment chunk by chunk, with the keys and values they may see, and which bool [n, N] they do.

    The distance of a query from a key is the difference of their places among the keys, those in front included: that
    is how a window counts, and what the kept keys are excepted from.
    """
    kv_len = k.shape[2]
    window = kv_len if scoring.window is None else min(scoring.window, kv_len)
    k_parts, v_parts = k.split(CHUNK_TOKENS, dim=2), v.split(CHUNK_TOKENS, dim=2)
    start = kv_len - q.shape[2]
    for chunk in q.split(CHUNK_TOKENS, dim=2):
        end = start + chunk.shape[2]
        reached = range(max(0, start - window + 1) // CHUNK_TOKENS, -(-end // CHUNK_TOKENS))
        seen = [*range(min(-(-scoring.kept // CHUNK_TOKENS), reached.start)), *reached]
        places = torch.cat([torch.arange(i * CHUNK_TOKENS, min((i + 1) * CHUNK_TOKENS, kv_len)) for i in seen])
        places = places.to(q.device, non_blocking=True)
        distance = torch.arange(start, end, device=q.device)[:, None] - places
        visible = (distance >= 0) & ((distance < window) | (places < scoring.kept))
        yield chunk, torch.cat([k_parts[i] for i in seen], 2), torch.cat([v_parts[i] for i in seen], 2), visible
        start = end


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scoring: Scoring) -> Tensor:
    if scoring.softcap is None and scoring.sinks is None:
        return _sdpa(q, k, v, scoring, visible)
    return masked_attention(q, k, v, visible, scoring.scale, scoring.softcap, scoring.sinks, scoring.dropout)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, visible: Tensor | None = None) -> Tensor:
    """Causal where no mask is given."""
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible,
        dropout_p=scoring.dropout,
        is_causal=visible is None,
        scale=scoring.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _window_bias(q: Tensor, scoring: Scoring) -> Tensor | None:
    """The window as what is added to the scores: the flash op takes no booleans."""
    if scoring.window is None or scoring.window >= q.shape[2]:
        return None
    places = torch.arange(q.shape[2], device=q.device)
    distance = places[:, None] - places
    hidden = (distance < 0) | (distance >= scoring.window)
    return torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -torch.inf)
