"""Both engines against textbook attention in float64, forward and every gradient, and the relations they must keep."""

import itertools
import math
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget, eager_dtype, plain_attention
from hypothesis import given
from hypothesis import strategies as st
from strategies import anchored_layouts, attended_by_definition, interleaved_layouts, layouts, quick, requests

from anchor_attn import PackedLayout, anchor_attention
from anchor_attn.engines import reference, varlen
from anchor_attn.engines.kernels import plan, segments
from anchor_attn.masks import PATTERNS, dense_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
NAMES = ("query", "key", "value", "sinks")

# The merge has tests of its own.
every_engine = pytest.mark.parametrize("engine", ["reference", "varlen/gather"])
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)

ROWS = {
    "one-token": PackedLayout.from_lengths([[1]]),
    "anchor-only": PackedLayout.from_lengths([[]], anchor_tokens=1),
    "rows-of-127-128-129": PackedLayout.from_lengths([[127], [128], [129]]),
    "rows-that-differ": PackedLayout.from_lengths([[61, 1, 67], [2, 3, 5, 7, 11], [97]], seq_len=131),
    "rows-alike": PackedLayout.from_lengths([[31, 17, 1], [31, 17, 1]], anchor_tokens=2),
    "three-anchors": PackedLayout.from_lengths([[29, 31], [5, 1]], anchor_tokens=3, seq_len=71),
    "no-document-in-one-row": PackedLayout.from_lengths([[23, 19], []], seq_len=43),
    "interleaved": PackedLayout.from_document_ids(
        torch.tensor([[0, *[1] * 7, *[2] * 5, *[1] * 3, 2, 3, 3, 1, -1], [0, *[1] * 13, 2, 1, *[2] * 3, *[-1] * 2]])
    ),
}
NO_ANCHOR = {
    "no-anchor": PackedLayout.from_lengths([[13, 17], [5]], anchor_tokens=0, seq_len=32),
    "no-anchor-all-padding-row": PackedLayout.from_lengths([[13, 17], []], anchor_tokens=0),
}
every_row = pytest.mark.parametrize("layout", [pytest.param(rows, id=name) for name, rows in ROWS.items()])


def random_states(layout, num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8, dtype=torch.float32, sinks=False):
    """query, key, value and sinks (or None), the same for the same arguments."""
    torch.manual_seed(0)
    shape = layout.batch_size, layout.seq_len
    query = torch.randn(shape[0], num_heads, shape[1], head_dim)
    key = torch.randn(shape[0], num_kv_heads, shape[1], head_dim)
    value = torch.randn(shape[0], num_kv_heads, shape[1], value_dim)
    learned = torch.randn(num_heads).to(dtype) if sinks else None
    return query.to(dtype), key.to(dtype), value.to(dtype), learned


def out_and_gradients(attend, states, weights):
    """The output, and the gradients of its sum by fixed weights: query, key, value and sinks where there are any."""
    leaves = [part.detach().clone().requires_grad_() for part in states if part is not None]
    out = attend(*leaves, *[None] * (len(states) - len(leaves)))
    return out.detach(), *torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)


def plain(layout, mask, scale=None, softcap=None):
    """`plain_attention` over a mask as a function of the states, padding zeroed."""

    def attend(query, key, value, sinks):
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        out = plain_attention(query, key, value, mask, factor, softcap, sinks)
        return out.masked_fill((layout.document_ids == -1)[:, None, :, None], 0)

    return attend


def assert_equals_plain_attention(
    engine, layout, states, mask, pattern, *, window=None, keep_anchor=True, atol=None, **scores
):
    """Output and every gradient within the budget, or within `atol` of the oracle; exact zeros at padding."""

    def attend(query, key, value, sinks):
        return anchor_attention(
            query, key, value, layout, pattern, engine, sliding_window=window, keep_anchor=keep_anchor, sinks=sinks,
            **scores,
        )  # fmt: skip

    torch.manual_seed(1)
    weights = torch.randn(*states[0].shape[:3], states[2].shape[-1]).to(states[0].dtype)
    in_float64, in_eager = (
        [None if part is None else part.to(dtype) for part in states]
        for dtype in (torch.float64, eager_dtype(states[0].dtype))
    )
    ours = out_and_gradients(attend, states, weights)
    eager = out_and_gradients(plain(layout, mask, **scores), in_eager, weights)
    oracle = out_and_gradients(plain(layout, mask, **scores), in_float64, weights)
    for name, *results in zip(("out", *NAMES), ours, eager, oracle, strict=False):
        if atol is not None:
            torch.testing.assert_close(results[0], results[2], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        elif results[2].any():
            assert_within_budget(*results, factor=2 if name == "out" else 3, what=name)
        else:  # one key a query, say: the gradient of its score is nothing but a difference of equal numbers
            rounding = torch.finfo(results[0].dtype).eps * max(part.abs().max() for part in oracle)
            assert results[0].abs().max() <= 4 * rounding, name
    padding = layout.document_ids == -1
    for name, tensor in zip(("out", *NAMES[:3]), ours, strict=False):
        assert not tensor.transpose(1, 2)[padding].any(), f"{name} is not exactly zero at padding"


# --- against the oracle ----------------------------------------------------------------------------------------------


@every_engine
@every_pattern
@every_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_equal_textbook_attention(engine, pattern, layout, dtype):
    states = random_states(layout, dtype=dtype)

    assert_equals_plain_attention(engine, layout, states, dense_mask(layout, pattern), pattern)


@every_engine
@pytest.mark.parametrize("pattern", ["full", "intra_doc"])
@pytest.mark.parametrize("layout", [pytest.param(rows, id=name) for name, rows in NO_ANCHOR.items()])
def test_rows_without_an_anchor_equal_textbook_attention(engine, pattern, layout):
    assert_equals_plain_attention(engine, layout, random_states(layout), dense_mask(layout, pattern), pattern)


@every_engine
@every_pattern
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 6])
def test_windows_softcap_and_sinks_together_equal_textbook_attention(engine, pattern, dtype, sinks, softcap, window):
    for name, keep_anchor in itertools.product(("rows-that-differ", "three-anchors", "interleaved"), (True, False)):
        layout = ROWS[name]
        mask = dense_mask(layout, pattern, window, keep_anchor)
        assert_equals_plain_attention(
            engine, layout, random_states(layout, dtype=dtype, sinks=sinks), mask, pattern,
            window=window, keep_anchor=keep_anchor, softcap=softcap,
        )  # fmt: skip


@every_engine
@quick
@given(
    request=requests(layouts(max_rows=2)),
    kv_heads_and_group=st.sampled_from([(1, 1), (1, 3), (2, 2)]),
    value_dim=st.sampled_from([3, 4]),
    softcap=st.sampled_from([None, 0.3]),
    sinks=st.booleans(),
    scale=st.sampled_from([None, 0.7]),
    chunk_tokens=st.sampled_from([1, 2, 3, 5, 512]),
)
def test_any_small_batch_equals_attention_over_the_definition(
    engine, request, kv_heads_and_group, value_dim, softcap, sinks, scale, chunk_tokens
):
    """In float64 and not by the budget: of a handful of numbers, eager PyTorch may by luck round none."""
    layout, pattern, window, keep_anchor = request
    if not sum(layout.row_tokens):
        return  # nothing but padding: no output depends on anything
    kv_heads, group = kv_heads_and_group
    states = random_states(layout, kv_heads * group, kv_heads, 4, value_dim, torch.float64, sinks)
    mask = torch.tensor(attended_by_definition(layout.document_ids.tolist(), pattern, window, keep_anchor))
    with mock.patch.object(segments, "CHUNK_TOKENS", chunk_tokens):
        assert_equals_plain_attention(
            engine, layout, states, mask, pattern, atol=1e-12, window=window, keep_anchor=keep_anchor,
            softcap=softcap, scale=scale,
        )  # fmt: skip


@pytest.mark.parametrize("window", [1, 511, 512, 513, 600])
@pytest.mark.parametrize("keep_anchor", [True, False])
@every_pattern
def test_windows_across_chunks_of_queries_equal_textbook_attention(pattern, window, keep_anchor):
    layout = PackedLayout.from_lengths([[521, 700], [1213]], anchor_tokens=2, seq_len=1225)
    assert layout.seq_len > 2 * segments.CHUNK_TOKENS
    mask = dense_mask(layout, pattern, window, keep_anchor)
    assert_equals_plain_attention(
        "varlen/gather", layout, random_states(layout, 2, 1, 4, 4, torch.float64), mask, pattern,
        window=window, keep_anchor=keep_anchor,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [511, 512, 513, 1024, 1025])
def test_documents_that_end_at_a_chunk_equal_textbook_attention(tokens):
    layout = PackedLayout.from_lengths([[3, tokens]])
    states = random_states(layout, 1, 1, 4, 4, torch.float64, sinks=True)

    assert_equals_plain_attention("varlen", layout, states, dense_mask(layout), "anchor", softcap=1.0)


@pytest.mark.parametrize("keep_anchor", [True, False])
def test_an_anchor_longer_than_a_chunk_is_kept_whole(keep_anchor):
    layout = PackedLayout.from_lengths([[540, 530]], anchor_tokens=515)
    mask = dense_mask(layout, "anchor", 4, keep_anchor)
    states = random_states(layout, 1, 1, 4, 4, torch.float64)

    assert_equals_plain_attention("varlen", layout, states, mask, "anchor", window=4, keep_anchor=keep_anchor)


@every_engine
def test_a_window_too_wide_for_an_int64_is_no_window(engine):
    layout = ROWS["interleaved"]
    query, key, value, _ = random_states(layout)
    wide = anchor_attention(query, key, value, layout, engine=engine, sliding_window=2**70)

    torch.testing.assert_close(wide, anchor_attention(query, key, value, layout, engine=engine))


@every_engine
def test_float32_scores_survive_autocast(engine):
    layout = ROWS["rows-that-differ"]
    query, key, value, sinks = random_states(layout, dtype=torch.bfloat16, sinks=True)
    plainly = anchor_attention(query, key, value, layout, engine=engine, softcap=2.0, sinks=sinks)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = anchor_attention(query, key, value, layout, engine=engine, softcap=2.0, sinks=sinks)

    assert torch.equal(plainly, under_autocast)


# --- padding ---------------------------------------------------------------------------------------------------------


@every_engine
@every_pattern
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", ["rows-that-differ", "interleaved", "three-anchors"])
def test_padding_gets_zeros_and_moves_nothing(engine, pattern, window, name):
    layout = ROWS[name]
    padding = (layout.document_ids == -1)[:, None, :, None]
    states = random_states(layout)[:3]
    other = [part.masked_fill(padding, 7.0) for part in states]
    weights = torch.randn_like(states[0])
    results = [
        out_and_gradients(
            lambda *qkv: anchor_attention(*qkv, layout, pattern, engine, sliding_window=window),
            given_states,
            given_weights,
        )
        for given_states, given_weights in ((states, weights), (other, weights.masked_fill(padding, 100.0)))
    ]

    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert not one.masked_select(padding).any()


# --- relations -------------------------------------------------------------------------------------------------------


@every_engine
@quick
@given(data=st.data(), features=st.sampled_from([{}, {"sliding_window": 2}, {"softcap": 0.3}]))
def test_touching_one_document_moves_no_other_bit_for_bit(engine, data, features):
    layout = data.draw(anchored_layouts(max_tokens=5))
    if not layout.num_documents:
        return
    pattern = data.draw(st.sampled_from(["intra_doc", "anchor"]))
    ids = layout.document_ids
    row = data.draw(st.sampled_from([b for b, lengths in enumerate(layout.document_lengths) if lengths]))
    touched = data.draw(st.integers(1, len(layout.document_lengths[row])))
    moved = torch.zeros_like(ids, dtype=torch.bool)
    moved[row] = ids[row] == touched
    states = random_states(layout)[:3]
    others = [torch.where(moved[:, None, :, None], part + 1.5, part) for part in states]
    before, after = (anchor_attention(*qkv, layout, pattern, engine, **features) for qkv in (states, others))

    assert torch.equal(before.transpose(1, 2)[~moved], after.transpose(1, 2)[~moved])
    assert not torch.equal(before.transpose(1, 2)[moved], after.transpose(1, 2)[moved])


@every_engine
def test_touching_one_document_moves_no_gradient_of_another_but_the_anchors(engine):
    layout = PackedLayout.from_lengths([[9, 12, 10]])
    touched, anchor = layout.document_ids[0] == 2, layout.document_ids[0] == 0
    states = random_states(layout)[:3]
    others = [torch.where(touched[:, None], part + 1.5, part) for part in states]
    weights = torch.randn_like(states[0])
    (_, *before), (_, *after) = (
        out_and_gradients(lambda *qkv: anchor_attention(*qkv, layout, "anchor", engine), qkv, weights)
        for qkv in (states, others)
    )

    for name, one, two in zip(NAMES, before, after, strict=False):
        rest = ~touched & ~anchor
        torch.testing.assert_close(one[:, :, rest], two[:, :, rest], rtol=0, atol=1e-6, msg=name)
    assert not torch.allclose(before[1][:, :, anchor], after[1][:, :, anchor], atol=1e-3)


@every_engine
@pytest.mark.parametrize("pattern", ["full", "anchor"])
@pytest.mark.parametrize("anchor_tokens", [1, 3])
def test_one_document_behind_the_anchor_is_plain_causal_attention(engine, pattern, anchor_tokens):
    layout = PackedLayout.from_lengths([[127], [127]], anchor_tokens)
    states = [part.double() for part in random_states(layout)[:3]]
    weights = torch.randn_like(states[0])
    ours, causal = (
        out_and_gradients(attend, states, weights)
        for attend in (
            lambda *qkv: anchor_attention(*qkv, layout, pattern, engine),
            lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True),
        )
    )

    for one, two in zip(ours, causal, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-14)


@every_engine
@pytest.mark.parametrize("anchor_tokens", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_packed_equals_one_document_at_a_time_with_its_own_anchor(engine, anchor_tokens, window):
    """Windows with `keep_anchor=False`: the anchor is then an ordinary token, and alone means plain sliding causal."""
    lengths = [11, 1, 23, 7]
    layout = PackedLayout.from_lengths([lengths], anchor_tokens)
    query, key, value, sinks = random_states(layout, sinks=True, dtype=torch.float64)
    packed = anchor_attention(
        query, key, value, layout, "anchor", engine, sliding_window=window, keep_anchor=False, sinks=sinks, softcap=1.0
    )
    for document_id, length in enumerate(lengths, start=1):
        ids = layout.document_ids[0]
        own = (ids == 0) | (ids == document_id)
        alone_layout = PackedLayout.from_lengths([[length]], anchor_tokens)
        alone = plain(alone_layout, dense_mask(alone_layout, "full", window), softcap=1.0)(
            *(states[:, :, own] for states in (query, key, value)), sinks
        )
        torch.testing.assert_close(packed[:, :, own], alone, rtol=1e-13, atol=1e-14)


@every_engine
@every_pattern
@pytest.mark.parametrize("features", [{}, {"sliding_window": 3}, {"softcap": 0.5, "sliding_window": 2}], ids=str)
def test_the_anchors_outputs_are_equal_in_every_row(engine, pattern, features):
    layout = PackedLayout.from_lengths([[61, 1, 67], [2, 3, 5, 7, 11], [97]], anchor_tokens=3)
    states = random_states(layout)[:3]
    for part in states:
        part[:, :, :3] = part[:1, :, :3].clone()
    anchors = anchor_attention(*states, layout, pattern, engine, **features)[:, :, :3]

    # Bit for bit where every row is computed alike; varlen's kernel cuts a longer segment into other blocks.
    torch.testing.assert_close(anchors[:1].expand_as(anchors), anchors, rtol=0, atol=5e-7 * (engine == "varlen/gather"))


@every_engine
@pytest.mark.parametrize("features", [{}, {"sliding_window": 3, "softcap": 0.5}], ids=str)
@pytest.mark.parametrize("name", ["rows-that-differ", "interleaved"])
def test_transposed_views_are_read_like_contiguous_tensors(engine, features, name):
    layout = ROWS[name]
    states = random_states(layout)[:3]
    views = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in states]
    assert not any(view.is_contiguous() for view in views)
    weights = torch.randn_like(states[0])
    results = [
        out_and_gradients(lambda *qkv: anchor_attention(*qkv, layout, engine=engine, **features), qkv, weights)
        for qkv in (states, views)
    ]

    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@every_engine
@quick
@given(interleaved_layouts(anchor_tokens=st.integers(1, 2)))
def test_an_interleaved_row_equals_the_same_row_sorted_by_document(engine, layout):
    ids = layout.document_ids.masked_fill(layout.document_ids == -1, 1000)
    order = ids.argsort(dim=1, stable=True)
    sorted_layout = PackedLayout.from_document_ids(layout.document_ids.gather(1, order))
    assert not sorted_layout.is_interleaved
    states = random_states(layout)[:3]
    rows = order[:, None, :, None]
    together = anchor_attention(
        *(part.gather(2, rows.expand_as(part)) for part in states), sorted_layout, engine=engine
    )
    out = anchor_attention(*states, layout, engine=engine)

    torch.testing.assert_close(out.gather(2, rows.expand_as(out)), together)


# --- padding ---------------------------------------------------------------------------------------------------------

every_route = pytest.mark.parametrize("engine", ["reference", "varlen/gather", "varlen/merge"])


@every_route
def test_nan_at_padding_reaches_no_output_and_no_gradient(engine):
    layout = ROWS["rows-that-differ"]
    padding = (layout.document_ids == -1)[:, None, :, None]
    clean = random_states(layout, dtype=torch.float64)[:3]
    dirty = [states.masked_fill(padding, torch.nan) for states in clean]
    results = [
        out_and_gradients(lambda *qkv: anchor_attention(*qkv, layout, engine=engine), states, torch.ones(3, 4, 131, 8))
        for states in (clean, dirty)
    ]

    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@every_route
def test_a_backward_passes_a_batch_of_padding_alone(engine):
    layout = PackedLayout.from_lengths([[]], anchor_tokens=0, seq_len=3)
    states = [states.requires_grad_() for states in random_states(layout)[:3]]
    sinks = torch.zeros(4)  # without them nothing is to be merged
    anchor_attention(*states, layout, "intra_doc", engine, sinks=sinks).sum().backward()

    assert all(not part.grad.any() for part in states)


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "module", "builder"),
    [("reference", reference, "dense_mask"), ("varlen", plan, "to_varlen")],
)
def test_a_plan_is_built_once_a_layout_and_setting(monkeypatch, engine, module, builder):
    counted = mock.Mock(wraps=getattr(module, builder))
    monkeypatch.setattr(module, builder, counted)
    layout = PackedLayout.from_lengths([[5, 4]])
    states = random_states(layout)[:3]
    for _ in range(3):
        anchor_attention(*states, layout, "anchor", engine)
    assert counted.call_count == 1

    anchor_attention(*states, layout, "intra_doc", engine)
    assert counted.call_count == 2


@every_pattern
@pytest.mark.parametrize("features", [{}, {"sliding_window": 3}, {"softcap": 0.5}], ids=str)
def test_varlen_makes_no_tensor_of_a_row_by_a_row(monkeypatch, pattern, features):
    """No dense mask is asked for, and no score matrix spans two documents."""
    monkeypatch.setattr(reference, "dense_mask", mock.Mock(side_effect=AssertionError("a dense mask was built")))
    widest = 0

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal widest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim >= 2 and out.shape[-2] == out.shape[-1]:
                widest = max(widest, out.shape[-1])
            return out

    layout = PackedLayout.from_lengths([[20] * 30])
    with Sizes():
        anchor_attention(*random_states(layout)[:3], layout, pattern, "varlen", **features)

    assert widest < layout.seq_len or pattern == "full"


def test_a_plan_made_in_inference_mode_serves_training():
    layout = PackedLayout.from_document_ids(torch.tensor([[0, 1, 2, 1, 2]]))
    states = random_states(layout)[:3]
    for engine in ("reference", "varlen"):
        with torch.inference_mode():
            anchor_attention(*states, layout, engine=engine)
        _, *gradients = out_and_gradients(
            lambda *qkv, engine=engine: anchor_attention(*qkv, layout, engine=engine), states, torch.ones(1, 4, 5, 8)
        )
        assert all(gradient.any() for gradient in gradients)


# --- engines by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("named", "module"), [("reference", reference), ("varlen", varlen)])
def test_a_named_engine_never_falls_back(monkeypatch, named, module):
    other = reference if module is varlen else varlen
    monkeypatch.setattr(module, "attend", mock.Mock(side_effect=RuntimeError("this engine broke")))
    monkeypatch.setattr(other, "attend", mock.Mock(side_effect=AssertionError("fell back")))
    layout = ROWS["one-token"]

    with pytest.raises(RuntimeError, match=r"^this engine broke$"):
        anchor_attention(*random_states(layout)[:3], layout, engine=named)


# --- bad input -------------------------------------------------------------------------------------------------------

LAYOUT = PackedLayout.from_lengths([[3], [2]])  # 2 rows of 4 tokens


def states_of(query=(2, 4, 4, 8), key=(2, 2, 4, 8), value=(2, 2, 4, 8)):
    return [torch.zeros(shape) for shape in (query, key, value)]


BAD_CALLS = [
    (
        "query without heads", states_of(query=(2, 4, 8)), {},
        "query must have shape [B, heads, S, head size], got [2, 4, 8]; split and transpose heads.",
    ),
    (
        "value with an axis too many", states_of(value=(2, 2, 4, 8, 1)), {},
        "value must have shape [B, heads, S, head size], got [2, 2, 4, 8, 1]; split and transpose heads.",
    ),
    (
        "query of another batch", states_of(query=(3, 4, 4, 8)), {},
        "query must have the layout's batch and length [2, heads, 4, …], got [3, 4, 4, 8]; "
        "pass the layout of this batch.",
    ),
    (
        "keys of another length", states_of(key=(2, 2, 5, 8)), {},
        "key must have the layout's batch and length [2, heads, 4, …], got [2, 2, 5, 8]; "
        "pass the layout of this batch.",
    ),
    (
        "query on another device", [torch.zeros(2, 4, 4, 8, device="meta"), *states_of()[1:]], {},
        "query must be on the layout's device cpu, got meta; move the layout with layout.to(device).",
    ),
    (
        "head sizes that differ", states_of(key=(2, 2, 4, 6)), {},
        "query, key and value must be [B, H, S, D], [B, K, S, D] and [B, K, S, V] with H a multiple of K, "
        "got [2, 4, 4, 8], [2, 2, 4, 6] and [2, 2, 4, 8]; check the head counts and sizes.",
    ),
    (
        "keys and values of other heads", states_of(value=(2, 4, 4, 8)), {},
        "query, key and value must be [B, H, S, D], [B, K, S, D] and [B, K, S, V] with H a multiple of K, "
        "got [2, 4, 4, 8], [2, 2, 4, 8] and [2, 4, 4, 8]; check the head counts and sizes.",
    ),
    (
        "heads that do not group", states_of(query=(2, 3, 4, 8)), {},
        "query, key and value must be [B, H, S, D], [B, K, S, D] and [B, K, S, V] with H a multiple of K, "
        "got [2, 3, 4, 8], [2, 2, 4, 8] and [2, 2, 4, 8]; check the head counts and sizes.",
    ),
    (
        "dtypes that differ", [states_of()[0].double(), *states_of()[1:]], {},
        "query, key and value must share one floating dtype, got torch.float64, torch.float32 and torch.float32; "
        "cast query and key to the value's dtype.",
    ),
    (
        "a sink a key head", states_of(), {"sinks": torch.zeros(2)},
        "sinks must have one logit a query head [4], got [2]; pass shape [H].",
    ),
    (
        "softcap of zero", states_of(), {"softcap": 0.0},
        "softcap must be above 0 and finite, got 0.0; pass None for no softcap.",
    ),
    (
        "an engine that is not there", states_of(), {"engine": "dense"},
        "engine must be one of ('auto', 'reference', 'flex', 'varlen'), or a route such as 'varlen/sdpa/gather', "
        "got 'dense'; pass one of them.",
    ),
    (
        "an unknown pattern", states_of(), {"pattern": "document"},
        "pattern must be one of ('full', 'intra_doc', 'anchor'), got 'document'; pass one of them.",
    ),
    (
        "a window of nothing", states_of(), {"sliding_window": 0},
        "sliding_window must be at least 1, got 0; pass None for no window.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("states", "arguments", "message"), [pytest.param(*call, id=name) for name, *call in BAD_CALLS]
)
def test_bad_input_raises_one_clear_line(states, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        anchor_attention(*states, LAYOUT, **arguments)


@every_engine
def test_the_anchor_pattern_without_an_anchor_raises(engine):
    layout = PackedLayout.from_lengths([[4], [4]], anchor_tokens=0)
    with pytest.raises(ValueError, match=r"^pattern='anchor' must have an anchor to show, got a layout with anchor_t"):
        anchor_attention(*states_of(), layout, engine=engine)


def test_ids_in_place_of_a_layout_raise():
    with pytest.raises(TypeError, match=r"^layout must be a PackedLayout, got Tensor; make one with"):
        anchor_attention(*states_of(), LAYOUT.document_ids)


@pytest.mark.parametrize("engine", ["reference", "varlen"])
@pytest.mark.parametrize("seq_len", [12, 15], ids=["no padding", "padding"])
def test_under_autocast_the_output_has_the_values_dtype_with_padding_and_without(engine, seq_len):
    layout = PackedLayout.from_lengths([[6, 5]], seq_len=seq_len)
    query, key, value = (torch.randn(1, 2, seq_len, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert anchor_attention(query, key, value, layout, engine=engine).dtype == torch.float32
