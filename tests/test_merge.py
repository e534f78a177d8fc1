"""The anchor and sinks merged into a kernel's softmax against textbook attention: forward, and every gradient."""

import contextlib

import pytest
import torch
from budget import assert_within_budget, plain_attention
from hypothesis import given
from hypothesis import strategies as st
from standins import HALF, on_a_gpu, standin
from strategies import anchored_layouts, layouts, quick, requests

from anchor_attn import PackedLayout
from anchor_attn.engines.kernels import KERNELS, Kernel, Scoring, create_kernel_plan
from anchor_attn.engines.merge import anchor_visibility, attend_merged
from anchor_attn.engines.varlen import attend_gathered
from anchor_attn.masks import PATTERNS, dense_mask
from anchor_attn.request import Request

EXACT = (torch.float64,)
NAMES = ("out", "query", "key", "value", "sinks")
LAYOUT = PackedLayout.from_document_ids(torch.tensor([[0, 0, 1, 1, 1, 2, 2, 1, 3, -1], [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]))

LONG = PackedLayout.from_lengths([[300, 129, 127, 1], [557]], anchor_tokens=2, seq_len=600)

every_kernel = pytest.mark.parametrize("name", list(KERNELS))
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def present(name, dtypes=EXACT):
    """The kernel callable here: a stand-in, or torch's CPU flash op as it is."""
    return contextlib.nullcontext() if name == "sdpa" else standin(name, dtypes)


def random_states(layout, heads=(4, 2), sizes=(8, 8), dtype=torch.float64):
    """query, key, value and a sink a head, all of which ask for gradients."""
    torch.manual_seed(0)
    shape = layout.batch_size, layout.seq_len
    query = torch.randn(shape[0], heads[0], shape[1], sizes[0])
    key = torch.randn(shape[0], heads[1], shape[1], sizes[0])
    value = torch.randn(shape[0], heads[1], shape[1], sizes[1])
    return [states.to(dtype).requires_grad_() for states in (query, key, value, torch.randn(heads[0]))]


def merged(name, layout, pattern, with_sinks=True, **settings):
    """`attend_merged` as a function of query, key, value and sinks."""

    def attend(query, key, value, sinks):
        request = Request(pattern=pattern, scale=0.4, sinks=sinks if with_sinks else None, **settings)
        return attend_merged(query, key, value, layout, request, KERNELS[name])

    return attend


def textbook(layout, pattern, with_sinks=True, sliding_window=None, keep_anchor=True, softcap=None):
    mask = dense_mask(layout, pattern, sliding_window, keep_anchor)

    def attend(query, key, value, sinks):
        out = plain_attention(query, key, value, mask, 0.4, softcap, sinks if with_sinks else None)
        return out.masked_fill((layout.document_ids == -1)[:, None, :, None], 0)

    return attend


def with_gradients(attend, states):
    """The output and the gradients; zeros for what it does not depend on."""
    out = attend(*states)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    total = (out * weights.to(out.dtype)).sum()
    gradients = torch.autograd.grad(total, states, allow_unused=True, materialize_grads=True)
    return [out.detach(), *gradients]


# --- against the oracle ----------------------------------------------------------------------------------------------


@every_kernel
@quick
@given(
    request=requests(layouts(max_rows=2)),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    sizes=st.sampled_from([(8, 8), (5, 5), (8, 3), (4, 16)]),
    softcap=st.sampled_from([None, 0.6]),
    with_sinks=st.booleans(),
)
def test_any_small_batch_equals_textbook_attention(name, request, heads, sizes, softcap, with_sinks):
    """To 1e-12 in float64, the gradients of queries, keys, values and sinks too."""
    layout, pattern, window, keep_anchor = request
    if not sum(layout.row_tokens):
        return  # nothing but padding: no output depends on anything
    can_cap = KERNELS[name].has_softcap and name != "sdpa"
    settings = {
        "sliding_window": window,
        "keep_anchor": keep_anchor,
        "softcap": softcap if can_cap else None,
    }
    states = random_states(layout, heads, sizes)
    oracle = with_gradients(textbook(layout, pattern, with_sinks, **settings), states)
    with present(name):
        ours = with_gradients(merged(name, layout, pattern, with_sinks, **settings), states)

    for what, one, two in zip(NAMES, ours, oracle, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12, msg=lambda m, what=what: f"{what}: {m}")


@every_pattern
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("flash_attn_2", torch.bfloat16),
     ("flash_attn_3", torch.float16), ("flash_attn_4", torch.bfloat16), ("varlen_attn", torch.float16)],
    ids=str,
)  # fmt: skip
def test_low_precision_is_within_the_budget(name, dtype, pattern, window):
    layout = PackedLayout.from_lengths([[61, 1, 67], [2, 3, 5, 7, 11], [97]], anchor_tokens=2, seq_len=133)
    states = random_states(layout, dtype=dtype)
    attend = textbook(layout, pattern, sliding_window=window)
    eager = with_gradients(attend, states)
    oracle = with_gradients(attend, [part.detach().double().requires_grad_() for part in states])
    with present(name, HALF):
        ours = with_gradients(merged(name, layout, pattern, sliding_window=window), states)

    for what, *results in zip(NAMES, ours, eager, oracle, strict=True):
        assert_within_budget(*results, factor=2 if what == "out" else 3, what=what)


@pytest.mark.parametrize("keep_anchor", [True, False])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_narrower_than_the_anchor_equals_textbook_attention(window, keep_anchor):
    """Then the anchor's own queries see further anchors by the merge, or not at all."""
    layout = PackedLayout.from_lengths([[5, 2], [3]], anchor_tokens=4)
    settings = {"sliding_window": window, "keep_anchor": keep_anchor}
    states = random_states(layout)
    oracle = with_gradients(textbook(layout, "anchor", **settings), states)

    for one, two in zip(with_gradients(merged("sdpa", layout, "anchor", **settings), states), oracle, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "sdpa"])
@pytest.mark.parametrize("window", [None, 64])
def test_on_a_gpu_the_real_kernels_are_within_the_budget(name, window):
    layout = on_a_gpu(name, LONG)
    states = [part.detach().cuda().requires_grad_() for part in random_states(LONG, sizes=(64, 64), dtype=HALF[0])]
    attend = textbook(layout, "anchor", sliding_window=window)
    eager = with_gradients(attend, states)
    oracle = with_gradients(attend, [part.detach().double().requires_grad_() for part in states])
    ours = with_gradients(merged(name, layout, "anchor", sliding_window=window), states)

    for what, *results in zip(NAMES, ours, eager, oracle, strict=True):
        assert_within_budget(*results, factor=2 if what == "out" else 3, what=what)


# --- relations -------------------------------------------------------------------------------------------------------


@quick
@given(requests(anchored_layouts()))
def test_the_anchor_is_what_the_documents_own_mask_lacks(drawn):
    """dense(anchor) = dense(intra_doc) ∪ visibility, and the two share no pair."""
    layout, _, window, keep_anchor = drawn
    own = dense_mask(layout, "intra_doc", window)
    joined = anchor_visibility(layout, Request("anchor", 1.0, None, window, keep_anchor))
    whole = own.clone()
    whole[:, :, : layout.anchor_tokens] |= joined

    assert torch.equal(whole, dense_mask(layout, "anchor", window, keep_anchor))
    assert not (own[:, :, : layout.anchor_tokens] & joined).any()


@every_kernel
@every_pattern
@pytest.mark.parametrize("window", [None, 2])
def test_merged_equals_gathered_where_a_kernel_can_do_both(name, pattern, window):
    states = random_states(LAYOUT)
    plan = create_kernel_plan(LAYOUT, pattern)
    with present(name):
        by_merge, by_gather = (
            with_gradients(attend, states)
            for attend in (
                merged(name, LAYOUT, pattern, with_sinks=False, sliding_window=window, keep_anchor=False),
                lambda q, k, v, _: attend_gathered(q, k, v, plan, KERNELS[name], Scoring(0.4, window=window)),
            )
        )

    for one, two in zip(by_merge, by_gather, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", ["intra_doc", "anchor"])
def test_touching_one_document_moves_no_other_bit_for_bit(pattern):
    touched = (LAYOUT.document_ids == 2)[:, None, :, None]
    states = random_states(LAYOUT)
    others = [torch.where(touched, part + 1.5, part) for part in states[:3]]
    attend = merged("sdpa", LAYOUT, pattern, sliding_window=3)
    before, after = attend(*states), attend(*others, states[3])

    assert torch.equal(before.masked_fill(touched, 0), after.masked_fill(touched, 0))
    assert not torch.equal(before, after)


def test_a_sink_of_minus_infinity_is_no_sink():
    query, key, value, _ = random_states(LAYOUT)
    attend = merged("sdpa", LAYOUT, "anchor")

    torch.testing.assert_close(
        attend(query, key, value, torch.full((4,), -torch.inf, dtype=torch.float64)),
        merged("sdpa", LAYOUT, "anchor", with_sinks=False)(query, key, value, None),
    )


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_an_anchor_that_takes_all_or_nothing_stays_finite_and_right(size):
    states = random_states(LAYOUT)
    with torch.no_grad():
        states[0].abs_()
        states[1][:, :, :2] = size
    oracle = with_gradients(textbook(LAYOUT, "anchor"), states)

    for one, two in zip(with_gradients(merged("sdpa", LAYOUT, "anchor"), states), oracle, strict=True):
        # e^(S - L') rounds by eps · |S|, in every flash backward, and the key it is multiplied with is as large again.
        torch.testing.assert_close(one, two, rtol=0, atol=1e-15 * size**2)


@every_kernel
@every_pattern
def test_padding_gets_exact_zeros_and_no_gradient(name, pattern):
    padding = LAYOUT.document_ids == -1
    states = random_states(LAYOUT)
    with present(name):
        results = with_gradients(merged(name, LAYOUT, pattern, sliding_window=3), states)[:4]

    assert all(not part.transpose(1, 2)[padding].any() for part in results)


def test_a_batch_of_padding_alone_is_zeros():
    layout = PackedLayout.from_lengths([[]], anchor_tokens=0, seq_len=3)

    assert not merged("sdpa", layout, "full")(*random_states(layout)).any()


# --- the step --------------------------------------------------------------------------------------------------------


class Shapes(Kernel):
    """A kernel of the right shapes and no numbers."""

    name = "shapes"

    def absence(self, device, merged=False):
        return None

    def forward(self, q, k, v, plan, scoring):
        raise AssertionError("the merge asks for the log-sum-exp")

    def forward_with_lse(self, q, k, v, plan, scoring):
        return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[1], len(q), dtype=torch.float32)

    def backward(self, dout, q, k, v, out, lse, plan, scoring):
        assert lse.shape == (q.shape[1], len(q))
        return tuple(torch.empty_like(part) for part in (q, k, v))


@every_pattern
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 2])
def test_a_step_reads_nothing_from_the_device(pattern, softcap, window):
    """Meta tensors have nothing to read: a sync would raise."""
    layout = LAYOUT.to("meta")
    states = [part.detach().to("meta", torch.bfloat16).requires_grad_() for part in random_states(LAYOUT)]

    def attend(query, key, value, sinks):
        request = Request(pattern, 0.4, softcap, window, True, sinks)
        return attend_merged(query, key, value, layout, request, Shapes())

    results = with_gradients(attend, states)

    assert [(part.shape, part.dtype) for part in results[1:]] == [(part.shape, part.dtype) for part in states]


@every_kernel
@every_pattern
def test_no_kernel_reads_anything_from_the_device_either(name, pattern):
    layout = LAYOUT.to("meta")
    states = [part.detach().to("meta", torch.bfloat16).requires_grad_() for part in random_states(LAYOUT)]
    with present(name, HALF):
        results = with_gradients(merged(name, layout, pattern, sliding_window=2), states)

    assert [(part.shape, part.dtype) for part in results[1:]] == [(part.shape, part.dtype) for part in states]


def test_no_query_and_no_key_is_copied_where_tokens_lie_in_place(monkeypatch):
    layout = PackedLayout.from_lengths([[3, 2], [4, 1]])
    states = [torch.randn(2, 6, 2, 8).transpose(1, 2) for _ in range(3)]
    seen = []

    class Watching(Shapes):
        def forward_with_lse(self, q, k, v, plan, scoring):
            seen.extend(part.data_ptr() for part in (q, k, v))
            return super().forward_with_lse(q, k, v, plan, scoring)

    attend_merged(*states, layout, Request("anchor", 0.4), Watching())

    assert seen == [part.data_ptr() for part in states]


def test_the_output_has_the_values_dtype_under_autocast():
    states = [part.detach() for part in random_states(LAYOUT, dtype=torch.float32)]
    attend = merged("sdpa", LAYOUT, "anchor")
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = attend(*states)

    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, attend(*states), rtol=0, atol=0)


def test_a_second_derivative_is_refused_and_not_silently_wrong():
    states = random_states(LAYOUT)
    out = merged("sdpa", LAYOUT, "anchor")(*states)
    gradient = torch.autograd.grad(out.square().sum(), states[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        gradient.sum().backward()
