"""Varlen kernels by one gather against textbook attention, and who is chosen when.

The GPU kernels are stand-ins with their real signatures (standins.py); per-document SDPA runs itself.
"""

import contextlib
import inspect

import pytest
import torch
from budget import assert_within_budget, plain_attention
from hypothesis import given
from hypothesis import strategies as st
from standins import HALF, MODULES, on_a_gpu, standin
from strategies import layouts, quick, requests

from anchor_attn import PackedLayout
from anchor_attn.engines.kernels import KERNELS, Scoring, create_kernel_plan
from anchor_attn.engines.varlen import attend_gathered
from anchor_attn.masks import PATTERNS, dense_mask

CPU = torch.device("cpu")
EXACT = (torch.float64,)
LAYOUT = PackedLayout.from_document_ids(torch.tensor([[0, 0, 1, 1, 1, 2, 2, 1, 3, -1], [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]))

every_form = pytest.mark.parametrize("form", [*MODULES, "sdpa"])


def present(form, dtypes=EXACT):
    """The kernel callable here: a stand-in, or SDPA as it is."""
    return contextlib.nullcontext([]) if form == "sdpa" else standin(form, dtypes)


def random_states(layout, heads=(4, 2), sizes=(8, 8), dtype=torch.float64):
    """query, key and value that ask for gradients."""
    torch.manual_seed(0)
    shape = layout.batch_size, layout.seq_len
    query = torch.randn(shape[0], heads[0], shape[1], sizes[0])
    key = torch.randn(shape[0], heads[1], shape[1], sizes[0])
    value = torch.randn(shape[0], heads[1], shape[1], sizes[1])
    return [states.to(dtype).requires_grad_() for states in (query, key, value)]


def textbook(layout, mask, scoring):
    def attend(query, key, value):
        out = plain_attention(query, key, value, mask, scoring.scale, scoring.softcap)
        return out.masked_fill((layout.document_ids == -1)[:, None, :, None], 0)

    return attend


def gathered(form, layout, pattern, scoring):
    plan = create_kernel_plan(layout, pattern)
    return lambda *qkv: attend_gathered(*qkv, plan, KERNELS[form.split()[0]], scoring)


def with_gradients(attend, states):
    out = attend(*states)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), states)]


# --- against the oracle ----------------------------------------------------------------------------------------------


@every_form
@quick
@given(
    request=requests(layouts(max_rows=2)),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    sizes=st.sampled_from([(8, 8), (5, 5), (8, 3), (4, 16)]),
    scale=st.sampled_from([0.4, 1.1]),
    softcap=st.sampled_from([None, 0.6]),
)
def test_any_small_batch_equals_textbook_attention(form, request, heads, sizes, scale, softcap):
    layout, pattern, window, _ = request
    if not sum(layout.row_tokens):
        return  # nothing but padding: no output depends on anything
    kernel = KERNELS[form.split()[0]]
    window = None if form == "varlen_attn with is_causal" else window
    scoring = Scoring(scale, softcap if kernel.has_softcap else None, window)
    states = random_states(layout, heads, sizes)
    mask = dense_mask(layout, pattern, window, keep_anchor=False)
    oracle = with_gradients(textbook(layout, mask, scoring), states)
    with present(form):
        ours = with_gradients(gathered(form, layout, pattern, scoring), states)

    for one, two in zip(ours, oracle, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@every_form
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_within_the_budget(form, dtype):
    """In the dtypes that the real kernels take: the stand-ins refuse any other."""
    scoring = Scoring(0.3)
    states = random_states(LAYOUT, dtype=dtype)
    attend = textbook(LAYOUT, dense_mask(LAYOUT), scoring)
    eager = with_gradients(attend, states)
    oracle = with_gradients(attend, [part.detach().double().requires_grad_() for part in states])
    with present(form, HALF):
        ours = with_gradients(gathered(form, LAYOUT, "anchor", scoring), states)

    for name, *results in zip(("out", "query", "key", "value"), ours, eager, oracle, strict=True):
        assert_within_budget(*results, factor=2 if name == "out" else 3, what=name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "sdpa"])
@pytest.mark.parametrize("window", [None, 64])
def test_on_a_gpu_the_real_kernels_are_within_the_budget(name, window):
    host = PackedLayout.from_lengths([[300, 129, 127, 1], [557]], anchor_tokens=2, seq_len=600)
    layout, scoring = on_a_gpu(name, host), Scoring(0.125, window=window)
    states = [part.detach().cuda().requires_grad_() for part in random_states(host, sizes=(64, 64), dtype=HALF[0])]
    attend = textbook(layout, dense_mask(layout, "anchor", window, keep_anchor=False), scoring)
    eager = with_gradients(attend, states)
    oracle = with_gradients(attend, [part.detach().double().requires_grad_() for part in states])
    ours = with_gradients(gathered(name, layout, "anchor", scoring), states)

    for what, *results in zip(("out", "query", "key", "value"), ours, eager, oracle, strict=True):
        assert_within_budget(*results, factor=2 if what == "out" else 3, what=what)


@every_form
def test_padding_gets_exact_zeros_and_no_gradient(form):
    padding = LAYOUT.document_ids == -1
    with present(form):
        results = with_gradients(gathered(form, LAYOUT, "anchor", Scoring(0.3)), random_states(LAYOUT))

    assert all(not part.transpose(1, 2)[padding].any() for part in results)


@pytest.mark.parametrize("form", ["flash_attn_2", "flash_attn_3", "flash_attn_4", "varlen_attn without enable_gqa"])
def test_a_window_wider_than_any_segment_is_handed_on_as_none(form):
    with standin(form, EXACT) as calls:
        for window in (None, 7, 2**70):
            gathered(form, LAYOUT, "anchor", Scoring(0.3, window=window))(*random_states(LAYOUT))

    assert all(arguments["window_size"] in ((-1, 0), (None, 0)) for _, arguments in calls)
    assert len(calls) == 3


@pytest.mark.parametrize("form", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_torchs_deterministic_mode_is_handed_on(form):
    settings = []
    with standin(form, EXACT) as calls:
        for asked in (False, True):
            torch.use_deterministic_algorithms(asked)
            try:
                gathered(form, LAYOUT, "anchor", Scoring(0.3))(*random_states(LAYOUT))
            finally:
                torch.use_deterministic_algorithms(False)
            settings.append(calls[-1][1]["deterministic"])

    assert settings == [False, True]


def test_dropout_is_handed_on():
    with standin("flash_attn_2", EXACT) as calls:
        gathered("flash_attn_2", LAYOUT, "anchor", Scoring(0.3, dropout=0.25))(*random_states(LAYOUT))
    assert calls[-1][1]["dropout_p"] == 0.25

    query, key, value = random_states(LAYOUT)
    ones = torch.ones_like(value)
    dropped = gathered("sdpa", LAYOUT, "anchor", Scoring(0.3, dropout=0.5))(query, key, ones)
    kept = gathered("sdpa", LAYOUT, "anchor", Scoring(0.3))(query, key, ones)
    assert not torch.allclose(dropped, kept)


# --- the gather ------------------------------------------------------------------------------------------------------


@quick
@given(layouts(), st.sampled_from(PATTERNS))
def test_the_gathers_gradient_is_that_of_index_select(layout, pattern):
    if pattern == "anchor" and not layout.anchor_tokens:
        return
    plan = create_kernel_plan(layout, pattern)
    states = torch.randn(layout.batch_size, 2, layout.seq_len, 3, dtype=torch.float64, requires_grad=True)
    flat = states.transpose(1, 2).flatten(0, 1)
    for ours, indices in [
        (plan.pack_queries(states), plan.segments.q_indices),
        (plan.pack_keys(states), plan.segments.k_indices),
    ]:
        theirs = flat.index_select(0, indices)
        weights = torch.randn_like(theirs)
        one, two = (torch.autograd.grad(part, states, weights, retain_graph=True)[0] for part in (ours, theirs))
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_the_gradient_of_an_anchor_before_a_thousand_documents_is_rounded_once():
    layout = PackedLayout.from_lengths([[1] * 1001, [1] * 501], anchor_tokens=2)
    plan = create_kernel_plan(layout, "anchor")
    states = torch.zeros(2, 1, layout.seq_len, 4, dtype=torch.bfloat16, requires_grad=True)
    keys = plan.pack_keys(states)
    torch.manual_seed(0)
    gradient = torch.rand_like(keys)
    keys.backward(gradient)
    exact = torch.zeros(2 * layout.seq_len, 1, 4, dtype=torch.float64)
    exact.index_add_(0, plan.segments.k_indices, gradient.double())

    assert torch.equal(states.grad.transpose(1, 2).flatten(0, 1), exact.bfloat16())


# --- plans -----------------------------------------------------------------------------------------------------------


@quick
@given(layouts(), st.sampled_from(PATTERNS))
def test_the_host_knows_what_the_boundaries_say(layout, pattern):
    if pattern == "anchor" and not layout.anchor_tokens:
        return
    plan = create_kernel_plan(layout, pattern)
    tokens = layout.batch_size * layout.seq_len

    assert list(plan.q_lens) == plan.segments.cu_seqlens_q.diff().tolist()
    assert list(plan.k_lens) == plan.segments.cu_seqlens_k.diff().tolist()
    assert plan.in_place == torch.equal(plan.segments.q_indices, torch.arange(tokens))


def test_tokens_in_place_are_not_copied():
    layout = PackedLayout.from_lengths([[3, 2], [4, 1]])
    states = torch.randn(2, 6, 4, 8).transpose(1, 2)
    plan = create_kernel_plan(layout, "intra_doc")
    for packed in (plan.pack_queries(states), plan.pack_keys(states)):
        assert packed.data_ptr() == states.data_ptr()
        assert packed.is_contiguous()


def test_a_plan_is_made_once_a_layout_and_pattern():
    layout = PackedLayout.from_lengths([[3, 2]])

    assert create_kernel_plan(layout, "anchor") is create_kernel_plan(layout, "anchor")
    assert create_kernel_plan(layout, "anchor") is not create_kernel_plan(layout, "intra_doc")


@every_form
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("window", [None, 2])
def test_a_step_reads_nothing_from_the_device(form, pattern, window):
    """Meta tensors have nothing to read: a sync would raise."""
    layout = LAYOUT.to("meta")
    states = [part.detach().to("meta").requires_grad_() for part in random_states(LAYOUT, dtype=torch.bfloat16)]
    scoring = Scoring(0.3, window=None if form == "varlen_attn with is_causal" else window)
    with present(form, HALF):
        results = with_gradients(gathered(form, layout, pattern, scoring), states)

    assert [(part.shape, part.dtype) for part in results[1:]] == [(part.shape, part.dtype) for part in states]


def test_a_batch_of_padding_alone_is_zeros():
    layout = PackedLayout.from_lengths([[]], anchor_tokens=0, seq_len=3)
    out = gathered("sdpa", layout, "full", Scoring(0.3))(*random_states(layout))

    assert torch.equal(out, torch.zeros(1, 4, 3, 8, dtype=torch.float64))


# --- signatures ------------------------------------------------------------------------------------------------------

SIGNATURES = {
    ("flash_attn_2", "flash_attn_varlen_func"): "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False, block_table=None)",
    ("flash_attn_2", "_flash_attn_varlen_backward"): "(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, "
    "cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, "
    "window_size_right, softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False)",
    ("flash_attn_3", "flash_attn_varlen_func"): "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    "seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
    "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0, return_attn_probs=False)",
    ("flash_attn_3", "_flash_attn_backward"): "(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, "
    "cu_seqlens_k=None, sequed_q=None, sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, "
    "dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, "
    "deterministic=False, sm_margin=0)",
    ("flash_attn_4", "flash_attn_varlen_func"): "(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, "
    "gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None), "
    "learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, "
    "score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, "
    "return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False)",
    ("flash_attn_4", "_flash_attn_bwd"): "(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, "
    "window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, "
    "pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, "
    "AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, "
    "seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, "
    "dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, "
    "block_sparse_tensors=None, dlse=None, learnable_sink=None)",
    ("varlen_attn with is_causal", "varlen_attn"): "(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, "
    "is_causal=False, return_aux=None)",
    ("varlen_attn without enable_gqa", "varlen_attn"): "(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, "
    "return_aux=None, scale=None, window_size=(-1, -1))",
}


@pytest.mark.parametrize(("form", "name"), SIGNATURES, ids=[" ".join(key) for key in SIGNATURES])
def test_a_standin_has_the_real_signature(form, name):
    """As the sources named in standins.py have it."""
    with standin(form):
        assert str(inspect.signature(getattr(KERNELS[form.split()[0]]._functions(), name))) == SIGNATURES[form, name]


@pytest.mark.parametrize("form", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_an_installed_package_has_the_signatures_that_we_stand_in_for(form):
    real = pytest.importorskip(KERNELS[form].module, reason="the package is not installed", exc_type=ImportError)
    for ours in MODULES[form](HALF)[KERNELS[form].module]:
        theirs = inspect.signature(getattr(real, ours.__name__)).parameters.values()
        assert [(p.name, p.default) for p in theirs] == [
            (p.name, p.default) for p in inspect.signature(ours).parameters.values()
        ]
