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
from anchor_attn.engines.kernels import KERNELS, Scoring, attend_gathered, create_kernel_plan
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
