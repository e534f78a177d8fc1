"""The reference engine: attention as its definition reads, one dense S × S matrix a head.

    B batch · H query heads · K key heads (H = K · G) · S tokens · D head size · V value size

Runs on every device and in float64, differentiates itself, and is what the other engines are compared with. Its
products sum over all keys, hidden ones by weights of 0: an inf or nan in one document makes nan in all, as in any dense
attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from anchor_attn.masks import PackedLayout, dense_mask
from anchor_attn.masks.layout import PADDING_ID
from anchor_attn.request import Request


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, request: Request) -> Tensor:
    """Attention over the dense mask; arguments and result as `anchor_attention`."""
    mask = layout.plan(("dense", *request.mask_key), lambda: dense_mask(layout, *request.mask_key))
    padding = (layout.document_ids == PADDING_ID)[:, None, :, None]
    query, key, value = (states.masked_fill(padding, 0.0) for states in (query, key, value))  # 0 · nan is nan
    out = masked_attention(
        query, key, value, mask[:, None], request.scale, request.softcap, request.sinks, request.dropout
    )
    return out.masked_fill(padding, 0.0)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(cap(scale · Q Kᵀ)) V over the allowed pairs, with an optional learned sink a head and dropout of weights.

    Low-precision inputs are computed in float32 and cast back at the end.

    Args:
        query: [B, H, Q, D].
        key: [B, K, N, D].
        value: [B, K, N, V].
        mask: bool, broadcast to [B, H, Q, N], True where a query may attend; no query may be left without a key.
        scale: of the scores.
        softcap: c · tanh(score / c), or None.
        sinks: [H], a logit without a value in every softmax; or None.
        dropout: the share of weights that is dropped.

    Returns:
        [B, H, Q, V] in the dtype of `value`.
    """
    batch, num_heads, q_len, _ = query.shape
    num_kv_heads, kv_len = key.shape[1:3]
    compute = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # it would take the products back to low precision
        grouped = query.to(compute).reshape(batch, num_kv_heads, -1, q_len, query.shape[-1])
        scores = grouped @ key.to(compute)[:, :, None].mT
        scores = scores.reshape(batch, num_heads, q_len, kv_len) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            # The sink is a logit without a value: it takes its share of the softmax and gives nothing.
            learned = sinks.to(compute).view(1, -1, 1, 1).expand(batch, num_heads, q_len, 1)
            scores = torch.cat((scores, learned), dim=-1)
        weights = F.dropout(scores.softmax(dim=-1)[..., :kv_len], dropout)
        out = weights.reshape(batch, num_kv_heads, -1, q_len, kv_len) @ value.to(compute)[:, :, None]
        return out.reshape(batch, num_heads, q_len, -1).to(value.dtype)
