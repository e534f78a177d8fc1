"""The flex engine against textbook attention: every form in float64 with gradients, compiled, and from call to call.

Torch's own mathematics of flex (`eager_flex`) forgets the block tables, so those are walked as the kernels walk them.
"""

import contextlib
import math
import random
from types import FunctionType
from unittest import mock

import pytest
import torch
from budget import assert_within_budget, eager_dtype
from flex_walk import walk_backward, walk_forward, walked_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import attended_by_definition, layouts, quick, requests
from test_attention import NAMES, NO_ANCHOR, ROWS, out_and_gradients, plain, random_states
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import AuxOutput

from anchor_attn import PackedLayout
from anchor_attn.engines import flex
from anchor_attn.masks import PATTERNS, dense_mask
from anchor_attn.request import Request

FORMS = ("table", "merge", "column")
LENGTHS = (1, 127, 128, 129, 251, 255, 256, 257)

every_form = pytest.mark.parametrize("form", FORMS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_row = pytest.mark.parametrize("name", [*ROWS, *NO_ANCHOR])
# torch 2.13's compiler trips over torch's own deprecations when it is imported.
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextlib.contextmanager
def kernels(compile_kernel):
    """flex with another compiler, and no function left from before or after."""
    flex.compiled.cache_clear()
    with mock.patch.object(flex, "compile_kernel", compile_kernel):
        yield
    flex.compiled.cache_clear()


@contextlib.contextmanager
def eager_flex():
    """Nothing compiled: torch's own dense mathematics of flex, float64 too, and its gradients on the CPU."""
    with (
        kernels(lambda kernel: kernel),
        mock.patch.object(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
        mock.patch.object(torch_flex, "_validate_device"),
    ):
        yield


@contextlib.contextmanager
def traced_flex(**config):
    """The compiler's front, with all its guards, and no code made behind it."""
    torch._dynamo.reset()
    with (
        kernels(lambda kernel: torch.compile(kernel, backend="eager", fullgraph=True, dynamic=True)),
        torch._dynamo.config.patch(**config),
    ):
        yield
    torch._dynamo.reset()


@contextlib.contextmanager
def walked_flex():
    """Kernels that follow the block tables, forward and backward, and differentiate through the log-sum-exp."""

    class Walk(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, block_mask, scale):
            out, lse = walk_forward(query, key, value, block_mask, scale)
            ctx.save_for_backward(query, key, value, out, lse)
            ctx.block_mask, ctx.scale = block_mask, scale
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            return *walk_backward(*ctx.saved_tensors, dout, ctx.block_mask, ctx.scale, dlse), None, None

    def attention(query, key, value, score_mod, block_mask, scale, enable_gqa, kernel_options, return_aux=None):
        assert score_mod is None
        out, lse = Walk.apply(query, key, value, block_mask, scale)
        return out if return_aux is None else (out, AuxOutput(lse=lse))

    with kernels(lambda kernel: kernel), mock.patch.object(flex, "flex_attention", attention):
        yield


def request_for(states, pattern, window=None, keep_anchor=True, softcap=None, scale=None):
    """The request of `anchor_attention` for states, sinks and all."""
    scale = 1 / math.sqrt(states[0].shape[-1]) if scale is None else scale
    return Request(pattern, scale, softcap, window, keep_anchor, states[3])


def assert_equals_plain_attention(attend, layout, states, mask, request, *, atol=None, gradients=True):
    """Output and every gradient within the budget, or `atol` of the oracle; exact zeros at padding.

    `attend` takes query, key, value and a request.
    """

    def ours(query, key, value, sinks):
        fields = {**vars(request), "sinks": sinks}
        return attend(query, key, value, Request(**fields))

    def results(function, dtype):
        given_states = [None if part is None else part.to(dtype) for part in states]
        if not gradients:
            return (function(*given_states),)
        torch.manual_seed(1)
        weights = torch.randn(*states[0].shape[:3], states[2].shape[-1], device=states[0].device).to(dtype)
        return out_and_gradients(function, given_states, weights)

    oracle_function = plain(layout, mask, request.scale, request.softcap)
    dtype = states[0].dtype
    found, oracle = results(ours, dtype), results(oracle_function, torch.float64)
    eager = results(oracle_function, eager_dtype(dtype))
    for name, *three in zip(("out", *NAMES), found, eager, oracle, strict=False):
        if atol is None:
            assert_within_budget(*three, factor=2 if name == "out" else 3, what=name)
        else:
            torch.testing.assert_close(three[0], three[2], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    padding = layout.document_ids == -1
    for name, tensor in zip(("out", *NAMES[:3]), found, strict=False):
        assert not tensor.transpose(1, 2)[padding].any(), f"{name} is not exactly zero at padding"


def assert_form_equals_plain_attention(form, layout, states, mask, request):
    """In float64, with all gradients of the forms that have them."""
    attend = in_form(form, layout)
    assert_equals_plain_attention(attend, layout, states, mask, request, atol=1e-12, gradients=form != "column")


def in_form(form, layout):
    """`attend_in_form` as `assert_equals_plain_attention` takes it."""
    return lambda query, key, value, request: flex.attend_in_form(query, key, value, layout, request, form)


def on_the_cpu(query, key, value, layout, request):
    """In the form that the CPU's kernel has."""
    return flex.attend_in_form(query, key, value, layout, request, "column")


# --- every form, in float64 ------------------------------------------------------------------------------------------


@every_form
@every_pattern
@every_row
def test_each_form_equals_textbook_attention_with_its_gradients(form, pattern, name):
    if pattern == "anchor" and name in NO_ANCHOR:
        return
    layout = {**ROWS, **NO_ANCHOR}[name]
    with eager_flex():
        for window, keep_anchor, softcap, sinks in [
            (None, True, None, False), (None, True, 0.5, True), (6, True, None, True), (2, False, 0.5, False),
        ]:  # fmt: skip
            states = random_states(layout, dtype=torch.float64, sinks=sinks, value_dim=5)
            mask = dense_mask(layout, pattern, window, keep_anchor)
            request = request_for(states, pattern, window, keep_anchor, softcap)
            assert_form_equals_plain_attention(form, layout, states, mask, request)


@every_form
@settings(parent=quick, max_examples=25)
@given(
    request=requests(layouts(max_rows=2)),
    heads=st.sampled_from([(1, 1), (3, 1), (6, 2)]),
    head_dims=st.sampled_from([(4, 4), (3, 7), (20, 16), (16, 33)]),
    softcap=st.sampled_from([None, 0.3]),
    sinks=st.booleans(),
)
def test_any_small_batch_equals_attention_over_the_definition(form, request, heads, head_dims, softcap, sinks):
    layout, pattern, window, keep_anchor = request
    states = random_states(layout, *heads, *head_dims, torch.float64, sinks)
    mask = torch.tensor(attended_by_definition(layout.document_ids.tolist(), pattern, window, keep_anchor))
    asked = request_for(states, pattern, window, keep_anchor, softcap, scale=0.7)
    with eager_flex():
        assert_form_equals_plain_attention(form, layout, states, mask, asked)


@every_form
@pytest.mark.parametrize("tokens", LENGTHS)
def test_lengths_around_whole_blocks_equal_textbook_attention(form, tokens):
    layout = PackedLayout.from_lengths([[tokens // 2, tokens - tokens // 2 - 1] if tokens > 2 else []], seq_len=tokens)
    states = random_states(layout, 2, 1, 4, 4, torch.float64, sinks=True)
    with eager_flex():
        request = request_for(states, "anchor")
        assert_form_equals_plain_attention(form, layout, states, dense_mask(layout), request)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget(form, dtype):
    layout = ROWS["three-anchors"]
    states = random_states(layout, dtype=dtype, sinks=True)
    request = request_for(states, "anchor", 6, softcap=0.5)
    with eager_flex():
        assert_equals_plain_attention(
            in_form(form, layout), layout, states, dense_mask(layout, "anchor", 6), request, gradients=False
        )


def test_the_three_forms_agree_where_sinks_outweigh_all_scores_or_vanish():
    layout = ROWS["three-anchors"]
    states = random_states(layout, dtype=torch.float64)[:3]
    sinks = torch.tensor([-torch.inf, 300.0, -300.0, 0.0], dtype=torch.float64)
    with eager_flex():
        table, merged, column = (
            flex.attend_in_form(*states, layout, Request("anchor", 0.3, sinks=sinks), form) for form in FORMS
        )
        without = flex.attend_in_form(*states, layout, Request("anchor", 0.3), "table")

    torch.testing.assert_close(table, merged, rtol=0, atol=1e-13)
    torch.testing.assert_close(table, column, rtol=0, atol=1e-13)
    torch.testing.assert_close(table[:, 0], without[:, 0], rtol=0, atol=1e-13)
    assert table[:, 1].abs().max() < 1e-100


# --- the tables ------------------------------------------------------------------------------------------------------


def padded_mask(layout, seq_len, *request):
    """The dense mask of a layout whose rows are padded to `seq_len`."""
    ids = torch.nn.functional.pad(layout.document_ids, (0, seq_len - layout.seq_len), value=-1)
    return dense_mask(PackedLayout.from_document_ids(ids), *request)


@settings(parent=quick, max_examples=20)
@given(requests(layouts(max_rows=2)))
def test_the_table_and_the_merge_together_attend_each_pair_once(request):
    layout, *mask_key = request
    plan = flex.create_flex_plan(layout, Request(mask_key[0], 1.0, None, *mask_key[1:]), "merge")
    for side in ("key", "query"):
        pairs = walked_pairs(plan.block_mask, side)
        if plan.visible is not None:
            pairs[:, :, :, : layout.anchor_tokens] += plan.visible[:, None]
        assert torch.equal(pairs[:, 0], padded_mask(layout, pairs.shape[-1], *mask_key).long())


@pytest.mark.parametrize("lengths", [[[300, 80, 3], [511]], [[127]], [[700, 1]], [[5] * 100, []]], ids=str)
@every_pattern
@pytest.mark.parametrize("window", [None, 130])
def test_the_sink_column_is_seen_once_by_every_query_and_moves_no_other_pair(lengths, pattern, window):
    layout = PackedLayout.from_lengths(lengths)
    request = Request(pattern, 1.0, None, window, True, torch.zeros(1))
    block_mask = flex.create_flex_plan(layout, request, "column").block_mask
    pairs = walked_pairs(block_mask, "key")[:, 0]
    seen = padded_mask(layout, pairs.shape[-1], pattern, window)
    assert layout.seq_len < pairs.shape[-1]
    seen[:, :, -1] = True

    assert torch.equal(pairs, seen.long())


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 255, 256, 257, 1000])
@every_form
def test_rows_are_padded_to_whole_blocks_and_at_least_two(tokens, form):
    layout = PackedLayout.from_lengths([[]], seq_len=tokens)
    with_sinks = Request("anchor", 1.0, sinks=torch.zeros(1))
    padded = flex.create_flex_plan(layout, with_sinks, form).block_mask.shape[-1]

    assert padded == max(256, -(-(tokens + (form == "column")) // 128) * 128)


def test_kernels_are_given_sixteen_columns_at_least_and_the_rest_as_it_is():
    layout = ROWS["one-token"]
    with eager_flex(), mock.patch.object(flex, "flex_attention", wraps=flex.flex_attention) as kernel:
        out = on_the_cpu(*random_states(layout, head_dim=3, value_dim=20)[:3], layout, Request("anchor", 0.3))
    assert [states.shape[2:] for states in kernel.call_args.args[:3]] == [(256, 16), (256, 16), (256, 20)]
    assert out.shape == (1, 4, 2, 20)


@pytest.mark.parametrize("form", ["table", "merge"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("keep_anchor", [True, False])
def test_kernels_that_follow_the_tables_give_the_oracles_output_and_gradients(form, window, keep_anchor):
    layout = PackedLayout.from_lengths([[130, 90, 3], [200]], anchor_tokens=2, seq_len=230)
    states = random_states(layout, 2, 1, 16, 16, torch.float64, sinks=True)
    mask = dense_mask(layout, "anchor", window, keep_anchor)
    request = request_for(states, "anchor", window, keep_anchor)
    with walked_flex():
        assert_form_equals_plain_attention(form, layout, states, mask, request)


# --- relations -------------------------------------------------------------------------------------------------------


@every_form
def test_touching_one_document_moves_no_other_bit_for_bit(form):
    layout = PackedLayout.from_lengths([[31, 17, 40]], seq_len=100)
    states = random_states(layout, dtype=torch.float64, sinks=True)
    request = request_for(states, "anchor", softcap=2.0)
    touched = layout.document_ids[0] == 2
    moved = [torch.where(touched[:, None], part + 1.5, part) for part in states[:3]]
    with eager_flex():
        before, after = (in_form(form, layout)(*qkv, request) for qkv in (states[:3], moved))

    assert torch.equal(before[:, :, ~touched], after[:, :, ~touched])
    assert not torch.equal(before[:, :, touched], after[:, :, touched])


@every_form
@pytest.mark.parametrize("window", [None, 5])
def test_packed_equals_one_document_at_a_time_with_its_own_anchor(form, window):
    lengths = [11, 1, 23, 7]
    layout = PackedLayout.from_lengths([lengths], anchor_tokens=3)
    states = random_states(layout, dtype=torch.float64, sinks=True)
    request = request_for(states, "anchor", window, keep_anchor=False, softcap=1.0)
    with eager_flex():
        packed = in_form(form, layout)(*states[:3], request)
        for document_id, length in enumerate(lengths, start=1):
            ids = layout.document_ids[0]
            own = (ids == 0) | (ids == document_id)
            alone = in_form(form, PackedLayout.from_lengths([[length]], anchor_tokens=3))(
                *(part[:, :, own] for part in states[:3]), request
            )
            torch.testing.assert_close(packed[:, :, own], alone, rtol=1e-13, atol=1e-14)


@every_form
def test_padding_gets_zeros_and_moves_nothing(form):
    layout = ROWS["rows-that-differ"]
    padding = (layout.document_ids == -1)[:, None, :, None]
    states = random_states(layout, dtype=torch.float64, sinks=True)
    request = request_for(states, "anchor")
    with eager_flex():
        one = in_form(form, layout)(*states[:3], request)
        two = in_form(form, layout)(*(part.masked_fill(padding, 7.0) for part in states[:3]), request)

    assert torch.equal(one, two)
    assert not one.masked_select(padding).any()


# --- from call to call -----------------------------------------------------------------------------------------------


def random_layouts(count, rows, anchor_tokens=1):
    """Layouts of all lengths, with no document in some rows."""
    chance = random.Random(0)
    for _ in range(count):
        lengths = [[chance.randint(1, 150) for _ in range(chance.randint(0, 4))] for _ in range(rows)]
        yield PackedLayout.from_lengths(lengths, anchor_tokens)


@every_form
@pytest.mark.parametrize("rows", [1, 2])
def test_other_documents_lengths_and_strides_compile_nothing_again(form, rows):
    """Rows as many as key heads: sizes that agree by chance must not count as one."""
    request = Request("anchor", 0.3, 0.5, 7, True, torch.randn(2))
    with traced_flex(error_on_recompile=True):
        for index, layout in enumerate(random_layouts(50 if form == "merge" else 20, rows, anchor_tokens=2)):
            states = random_states(layout, 2, 2)[:3]
            if index % 2:
                states = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in states]
            out = flex.attend_in_form(*states, layout, request, form)
            assert out.shape == states[0].shape
        assert flex.compiled.cache_info().misses == 1


def test_gradients_off_autocast_and_inference_mode_compile_nothing_again():
    layout = ROWS["rows-that-differ"]
    states = random_states(layout)[:3]
    request = Request("anchor", 0.3)
    with traced_flex(error_on_recompile=True):
        plainly = on_the_cpu(*states, layout, request)
        with torch.no_grad():
            assert torch.equal(on_the_cpu(*states, layout, request), plainly)
        with torch.inference_mode():
            assert torch.equal(on_the_cpu(*states, layout, request), plainly)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(on_the_cpu(*states, layout, request), plainly)
        assert torch.equal(on_the_cpu(*states, layout, request), plainly)


def test_each_kind_of_input_has_its_own_function_and_its_own_limit():
    layout = ROWS["three-anchors"]
    states = random_states(layout)
    with traced_flex(error_on_recompile=True):
        for softcap in (None, 0.5, 0.25):
            out = on_the_cpu(*states[:3], layout, request_for(states, "anchor", softcap=softcap))
            expected = plain(layout, dense_mask(layout), softcap=softcap)(*states)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        assert flex.compiled.cache_info().misses == 3


def test_torchs_limit_of_recompilations_is_an_error_and_no_dense_fallback():
    layout = PackedLayout.from_lengths([[255]])
    request = Request("anchor", 0.3)
    states = random_states(layout, 2, 2, 16, 16)[:3]
    with traced_flex(recompile_limit=1):
        on_the_cpu(*states, layout, request)
        with pytest.raises(RuntimeError, match=r"^engine='flex' must be compiled once for inputs of a kind, got more"):
            on_the_cpu(*(part.mT.contiguous().mT for part in states), layout, request)


def test_a_plan_is_built_once_a_layout_and_setting():
    layout = PackedLayout.from_lengths([[5, 4]])
    states = random_states(layout)[:3]
    with eager_flex(), mock.patch.object(flex, "create_flex_plan", wraps=flex.create_flex_plan) as counted:
        for _ in range(3):
            on_the_cpu(*states, layout, Request("anchor", 0.3))
        assert counted.call_count == 1
        on_the_cpu(*states, layout, Request("anchor", 0.3, sinks=torch.zeros(4)))  # a column more
        on_the_cpu(*states, layout, Request("intra_doc", 0.3))
        assert counted.call_count == 3


def test_a_plan_made_in_inference_mode_serves_training():
    layout = PackedLayout.from_document_ids(torch.tensor([[0, 1, 2, 1, 2]]))
    states = random_states(layout)
    with eager_flex():
        with torch.inference_mode():
            in_form("merge", layout)(*states[:3], Request("anchor", 0.3))
        _, *gradients = out_and_gradients(
            lambda *qkvs: in_form("merge", layout)(*qkvs[:3], Request("anchor", 0.3)), states, torch.ones(1, 4, 5, 8)
        )
    assert all(gradient.any() for gradient in gradients)


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_bfloat16_survives_autocast_and_float32_comes_back_as_float32():
    layout = ROWS["rows-that-differ"]
    states = random_states(layout, dtype=torch.bfloat16, sinks=True)
    request = request_for(states, "anchor", softcap=2.0)
    with eager_flex():
        plainly = on_the_cpu(*states[:3], layout, request)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(on_the_cpu(*states[:3], layout, request), plainly)
            in_float32 = on_the_cpu(*(part.float() for part in states[:3]), layout, request)

    assert in_float32.dtype == torch.float32
    assert torch.equal(in_float32.bfloat16(), plainly)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_no_compiled_code_is_shared_between_functions():
    def key(form):
        return flex.KernelKey("cpu", torch.float32, (1, 1), (8, 8), 1.0, None, False, ("anchor", None, True), form,
                              False, 1, True, 128, False, False)  # fmt: skip

    with kernels(lambda kernel: kernel):
        one, two = flex.compiled(key("table")), flex.compiled(key("column"))
        assert isinstance(one, FunctionType)
        assert one.__code__ is not two.__code__
        assert flex.compiled(key("table")) is one


# --- compiled for the CPU --------------------------------------------------------------------------------------------


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [{}, {"softcap": 0.5, "window": 6, "sinks": True}], ids=str)
def test_compiled_for_the_cpu_it_equals_textbook_attention_at_every_length(dtype, features):
    """One compilation serves all; heads in threes, sizes that are no power of two, values of another size."""
    features = dict(features)
    sinks = features.pop("sinks", False)
    torch._dynamo.reset()
    with kernels(flex.compile_kernel), torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for layout in [*random_layouts(6, rows=2), PackedLayout.from_lengths([[254], [200, 54]])]:
            states = random_states(layout, 6, 2, 10, 20, dtype, sinks)
            mask = dense_mask(layout, "anchor", features.get("window"))
            request = request_for(states, "anchor", **features)
            assert_equals_plain_attention(
                lambda q, k, v, asked, layout=layout: on_the_cpu(q, k, v, layout, asked),
                layout, states, mask, request, gradients=False,
            )  # fmt: skip
        assert flex.compiled.cache_info().misses == 1


@pytest.mark.slow
@compiles
@every_pattern
@pytest.mark.parametrize("name", ["three-anchors", "interleaved"])
def test_compiled_for_the_cpu_every_kind_of_mask_keeps_its_sinks_and_windows(pattern, name):
    layout = ROWS[name]
    torch._dynamo.reset()
    with kernels(flex.compile_kernel), torch.no_grad():
        for window, keep_anchor in [(None, True), (4, False)]:
            states = random_states(layout, sinks=True)
            mask = dense_mask(layout, pattern, window, keep_anchor)
            request = request_for(states, pattern, window, keep_anchor)
            assert_equals_plain_attention(
                lambda q, k, v, asked: on_the_cpu(q, k, v, layout, asked),
                layout, states, mask, request, gradients=False,
            )  # fmt: skip


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@compiles
@on_cuda
@pytest.mark.parametrize("form", ["table", "merge"])
@every_pattern
@pytest.mark.parametrize("features", [{}, {"softcap": 0.5, "window": 100, "sinks": True}], ids=str)
@pytest.mark.parametrize("name", ["rows-that-differ", "three-anchors", "interleaved"])
def test_on_cuda_outputs_and_gradients_stay_within_the_budget(form, pattern, features, name):
    layout = ROWS[name].to("cuda")
    features = dict(features)
    states = random_states(layout, 6, 2, 24, 40, torch.bfloat16, features.pop("sinks", False))
    states = [None if part is None else part.cuda() for part in states]
    mask = dense_mask(layout, pattern, features.get("window"))
    request = request_for(states, pattern, **features)
    torch._dynamo.reset()
    with kernels(flex.compile_kernel):
        assert_equals_plain_attention(in_form(form, layout), layout, states, mask, request)


@pytest.mark.gpu
@compiles
@on_cuda
@pytest.mark.parametrize("form", ["table", "merge"])
def test_on_cuda_other_documents_neither_compile_nor_sync(form):
    torch._dynamo.reset()
    with kernels(flex.compile_kernel):
        for index, layout in enumerate(random_layouts(20, rows=2)):
            states = [part.bfloat16().cuda().requires_grad_() for part in random_states(layout, 4, 2, 64, 64)[:3]]
            on_device = layout.to("cuda")
            with torch._dynamo.config.patch(error_on_recompile=True):
                torch.cuda.set_sync_debug_mode("error" if index else "default")
                try:
                    flex.attend_in_form(*states, on_device, Request("anchor", 0.125), form).sum().backward()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            assert all(part.grad.isfinite().all() for part in states)
        assert flex.compiled.cache_info().misses == 1
