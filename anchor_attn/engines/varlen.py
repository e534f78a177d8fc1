"""The varlen engine: one causal attention a document, the anchor's keys and values in front of each.

    B batch · H query heads · K key heads · S tokens · A anchor tokens · D head size · V value size

    row        a 1 1 1 2 2 3 3 3          segments under "anchor":   [a 1 1 1]   [a] 2 2   [a] 3 3 3
                                                                     queries     keys only

The anchor and the first document stand side by side, so they are one ordinary causal segment; giving that segment an
extra anchor key would count the anchor twice. Every later document gets the anchor's keys in front, and only keys
and values get extra rows. Interleaved documents are sorted by document first and put back afterwards; causal order
survives a stable sort.

A kernel computes all segments (`engines.kernels`); in the form "merge" it computes each document to itself, and the
anchor and learned sinks join after it (`engines.merge`).
"""

from torch import Tensor

from anchor_attn.engines.choice import Route
from anchor_attn.engines.kernels import KERNELS, Kernel, KernelPlan, Scoring, create_kernel_plan, padding_alone
from anchor_attn.engines.merge import attend_merged
from anchor_attn.masks import PackedLayout
from anchor_attn.request import Request, autocast_dtype


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, request: Request, route: Route) -> Tensor:
    """Attention by the kernel and the form of a route; else as `anchor_attention`."""
    given, dtype = value.dtype, autocast_dtype(value)
    query, key, value = (states.to(dtype) for states in (query, key, value))
    kernel = KERNELS[route.kernel]
    if route.form == "merge":
        return attend_merged(query, key, value, layout, request, kernel).to(given)
    scoring = Scoring(
        scale=request.scale,
        softcap=request.softcap,
        window=request.window(layout),
        kept=layout.anchor_tokens if request.keeps_anchor_outside else 0,
        sinks=request.sinks,
        dropout=request.dropout,
    )
    plan = create_kernel_plan(layout, request.pattern)
    return attend_gathered(query, key, value, plan, kernel, scoring).to(given)


def attend_gathered(
    query: Tensor, key: Tensor, value: Tensor, plan: KernelPlan, kernel: Kernel, scoring: Scoring
) -> Tensor:
    """Attention with the anchor joined to each later document's keys; no query is copied.

    A window counts the anchor as tokens directly before the document; the first `scoring.kept` keys of a segment are
    seen outside it too.

    Args:
        query: [B, H, S, D].
        key: [B, K, S, D].
        value: [B, K, S, V].
        plan: of the pattern that is asked for.
        kernel: what computes it.
        scoring: what is made of the scores.

    Returns:
        [B, H, S, V], zeros at padding; the gather sums the anchor's gradients.
    """
    if not plan.q_lens:
        return padding_alone(query, key, value)
    q, k, v = plan.pack_queries(query), plan.pack_keys(key), plan.pack_keys(value)
    return plan.unpack_queries(kernel.forward(q, k, v, plan, scoring))
