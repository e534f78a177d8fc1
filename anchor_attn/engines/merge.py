"""The anchor by merge: a kernel attends within documents, and the anchor and learned sinks join its softmax after.

    B batch · H query heads · K key heads (H = K · G) · S tokens · A anchor tokens · D head size · V value size

With the kernel's output o and log-sum-exp L over a query's own document, s = cap(scale · q · kₐ) the anchor's scores
and z the sink,

    L' = logsumexp(L, s, z)        o' = o · e^(L − L') + Σₐ vₐ · e^(sₐ − L')

is the softmax over all of them. Its gradients in the document's keys are the kernel's own backward, given o' and L'
in place of o and L: a flash backward takes P = e^(S − L') and dS = P ∘ (dP − δ), δ = Σ dout · o', as they come. What
is left is dense and small: A columns, and a sink a head. No query and no key is copied, and windows and
several anchors go with any kernel, softcaps with those that have them.

Source of the backward: FlashAttention-2, section 3.1.2, https://arxiv.org/abs/2307.08691
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anchor_attn.engines.kernels import Kernel, KernelPlan, Scoring, create_kernel_plan, padding_alone
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import ANCHOR_ID, PADDING_ID
from anchor_attn.masks.patterns import reach
from anchor_attn.request import Request


def attend_merged(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, request: Request, kernel: Kernel
) -> Tensor:
    """Attention by a kernel within documents, the anchor and the sinks merged.

    Args:
        query: [B, H, S, D].
        key: [B, K, S, D].
        value: [B, K, S, V].
        layout: the packed batch, on the tensors' device.
        request: every pattern, window, softcap and sink.
        kernel: what gives the log-sum-exp and takes it back.

    Returns:
        [B, H, S, V]; zeros at padding, which also gets no gradient.
    """
    plan = create_kernel_plan(layout, "full" if request.pattern == "full" else "intra_doc")
    if not plan.q_lens:
        return padding_alone(query, key, value)
    if min(layout.row_tokens) < layout.seq_len:  # 0 · nan is nan in a sum over all queries
        padding = (layout.document_ids == PADDING_ID)[:, None, :, None]
        query, key, value = (states.masked_fill(padding, 0.0) for states in (query, key, value))
    visible = anchor_visibility(layout, request) if request.pattern == "anchor" else None
    call = _Saved(plan, kernel, Scoring(request.scale, request.softcap, request.window(layout)))
    return _Merge.apply(query, key, value, request.sinks, visible, call)


def anchor_visibility(layout: PackedLayout, request: Request) -> Tensor:
    """Which anchor tokens each query sees besides what its own segment shows it, bool [B, S, A].

        ids 0 1 1 2 -1, no window      ids 0 1 1 1, a window of 2, keep_anchor=False
            . x x x  .                     . x . .

    Distances are differences of document ranks, in which the anchor stands directly before every document. An anchor
    query's own segment shows it the anchors within the window; where the anchor is kept, those outside it are here.
    """
    return layout.plan(("anchor_visibility", *request.mask_key), lambda: _anchor_visibility(layout, request))


def _anchor_visibility(layout: PackedLayout, request: Request) -> Tensor:
    ids, ranks = layout.document_ids[:, :, None], layout.document_ranks()
    near = ranks[:, :, None] - ranks[:, None, : layout.anchor_tokens] < reach(layout, request.sliding_window)
    in_document = ids > ANCHOR_ID
    return (in_document & (near | request.keep_anchor)) | ((ids == ANCHOR_ID) & ~near & request.keep_anchor)


def score_anchors(query: Tensor, key: Tensor, visible: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """The anchor's scores [B, H, S, A], -inf where `visible` [B, S, A] is not; and the same before that mask.

    In float32 at least.
    """
    compute = torch.promote_types(query.dtype, torch.float32)
    # A product and a sum, which a compiler fuses: a matrix product would want the whole query in float32.
    grouped = _grouped(query.to(compute), key)[:, :, :, :, None]
    scores = (grouped * _anchor_rows(key, visible.shape[-1], compute)[:, :, :, None]).sum(-1)
    scores = scores.flatten(1, 2) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    return scores.masked_fill(~visible[:, None], -torch.inf), scores


def join(out: Tensor, lse: Tensor, scores: Tensor | None, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add anchors and sinks to a softmax that is already computed, exactly.

    Args:
        out: [B, H, S, V].
        lse: [B, H, S], the natural log-sum-exp of its scores, finite.
        scores: [B, H, S, A] of the anchors, the first A tokens of `value`; or None.
        value: [B, K, S, V].
        sinks: [H], a logit without a value; or None.

    Returns:
        out [B, H, S, V] and the log-sum-exp [B, H, S] of all, in float32 at least.
    """
    compute = torch.promote_types(out.dtype, torch.float32)
    lse = lse.to(compute)[..., None]
    terms = [lse]
    if scores is not None:
        terms.append(scores)
    if sinks is not None:
        terms.append(sinks.to(compute).view(1, -1, 1, 1).expand_as(lse))
    merged = torch.cat(terms, dim=-1).logsumexp(dim=-1, keepdim=True)
    joined = out.to(compute) * (lse - merged).exp()
    if scores is not None:
        weights = _grouped((scores - merged).exp(), value)[..., None]
        anchors = _anchor_rows(value, scores.shape[-1], compute)[:, :, :, None]
        joined = joined + (weights * anchors).sum(-2).flatten(1, 2)
    return joined, merged[..., 0]


def _grouped(states: Tensor, key: Tensor) -> Tensor:
    """[B, H, …] as [B, K, G, …]."""
    return states.unflatten(1, (key.shape[1], -1))


def _anchor_rows(states: Tensor, anchor_tokens: int, compute: torch.dtype) -> Tensor:
    """The anchor's keys or values, [B, K, 1, A, D]."""
    return states[:, :, None, :anchor_tokens].to(compute)


class _Saved(NamedTuple):
    """What the backward needs of its forward besides tensors."""

    plan: KernelPlan
    kernel: Kernel
    scoring: Scoring


class _Merge(torch.autograd.Function):
    """Shapes as `attend_merged`; `visible` [B, S, A] or None, `sinks` [H] or None."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, visible: Tensor | None, call: _Saved
    ) -> Tensor:
        plan = call.plan
        q, k, v = (plan.pack_queries(states) for states in (query, key, value))
        own, sums = call.kernel.forward_with_lse(q, k, v, plan, call.scoring)
        with _as_written(query.device):
            scores = None if visible is None else score_anchors(query, key, visible, call.scoring)[0]
            out, merged = join(plan.unpack_queries(own), _spread_lse(sums, plan), scores, value, sinks)
        out = out.to(value.dtype)
        ctx.call = call
        ctx.save_for_backward(query, key, value, sinks, visible, out, merged)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, visible, out, merged = ctx.saved_tensors
        call: _Saved = ctx.call
        plan = call.plan
        do, q, k, v, o = (plan.pack_queries(states) for states in (dout, query, key, value, out))
        sums = plan.pack_queries(merged[..., None])[..., 0].T
        gradients = call.kernel.backward(do, q, k, v, o, sums, plan, call.scoring)
        dquery, dkey, dvalue = (plan.unpack_queries(part) for part in gradients)
        with _as_written(query.device):
            delta = (dout.to(merged.dtype) * out.to(merged.dtype)).sum(dim=-1)
            if visible is not None:
                terms = _anchor_gradients(dout, query, key, value, visible, merged, delta, call.scoring)
                dquery = (dquery.to(merged.dtype) + terms[0]).to(query.dtype)
                dkey, dvalue = (
                    _added_in_front(part, term) for part, term in zip((dkey, dvalue), terms[1:], strict=True)
                )
            dsinks = None
            if sinks is not None:
                shares = (sinks.to(merged.dtype)[:, None] - merged).exp()
                dsinks = -(shares * delta).sum(dim=(0, 2)).to(sinks.dtype)
        return dquery, dkey, dvalue, dsinks, None, None


def _as_written(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: it would take float32 products back to low precision. Some devices have none to switch off."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _spread_lse(sums: Tensor, plan: KernelPlan) -> Tensor:
    """[H, T] as [B, H, S]; zeros at padding, where a log-sum-exp of nothing would make nan."""
    return plan.unpack_queries(sums.T[..., None])[..., 0]


def _anchor_gradients(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    merged: Tensor,
    delta: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """The anchor's part of the gradients: of the queries [B, H, S, D], its keys [B, K, A, D] and values."""
    compute = merged.dtype
    anchor_tokens = visible.shape[-1]
    scores, unmasked = score_anchors(query, key, visible, scoring)
    weights = (scores - merged[..., None]).exp()
    grouped_dout = _grouped(dout.to(compute), key)
    dweights = (grouped_dout @ _anchor_rows(value, anchor_tokens, compute).mT).flatten(1, 2)
    dscores = weights * (dweights - delta[..., None]) * scoring.scale
    if scoring.softcap is not None:
        dscores = dscores * (1 - (unmasked / scoring.softcap).square())
    grouped = _grouped(dscores, key)
    dquery = (grouped @ _anchor_rows(key, anchor_tokens, compute)).flatten(1, 2)
    dkey = (grouped.mT @ _grouped(query.to(compute), key)).sum(dim=2)
    dvalue = (_grouped(weights, key).mT @ grouped_dout).sum(dim=2)
    return dquery, dkey, dvalue


def _added_in_front(gradient: Tensor, term: Tensor) -> Tensor:
    """A term [B, K, A, D] added to the first A tokens, rounded once."""
    anchor_tokens = term.shape[2]
    front = (gradient[:, :, :anchor_tokens].to(term.dtype) + term).to(gradient.dtype)
    return torch.cat((front, gradient[:, :, anchor_tokens:]), dim=2)
