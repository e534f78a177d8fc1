"""Stand-ins for the varlen kernels that need a GPU: the real signatures, the real demands, plain math in float64.

    with standin("flash_attn_2", dtypes=(torch.float64,)) as calls:
        KERNELS["flash_attn_2"]                          # calls the stand-in, here on the CPU
        calls                                            # [("flash_attn_varlen_func", {"dropout_p": 0.0, …}), …]

Sources, read in October 2026:
    flash_attn 2   flash_attn/flash_attn_interface.py of Dao-AILab/flash-attention, tag v2.8.3
    flash_attn 3   hopper/flash_attn_interface.py at 0251105a2fb19d2957484b7f023cd8c115286ced
    flash_attn 4   flash_attn/cute/interface.py at the same commit
    varlen_attn    torch/nn/attention/varlen.py: the module of the torch that is installed (2.13) runs itself, over
                   stand-ins for the two aten ops below it; 255ac567 of pytorch/pytorch has the form before
                   `enable_gqa`, and the documentation of torch 2.10 the one with `is_causal`
What they demand is what csrc/flash_attn/flash_api.cpp and the asserts of 4 do: int32 boundaries, the last axis
contiguous, heads of a multiple of 8, one dtype, and a float32 log-sum-exp [H, Tq].
"""

# ruff: noqa: N803 - argument names are theirs
import contextlib
import sys
import types
from unittest import mock

import pytest
import torch

from anchor_attn.engines.kernels import KERNELS

HALF = (torch.bfloat16, torch.float16)


def attend(q, k, v, cu_q, cu_k, scale, window, softcap):
    """The output [Tq, H, V] and the log-sum-exp [H, Tq] in float64; `window` (left, right), -1 for all."""
    if q.is_meta:
        return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[1], len(q))
    outs, sums = [], []
    for q_part, k_part, v_part in segments(q, k, v, cu_q, cu_k):
        scores, _ = scores_of(q_part, k_part, scale, window, softcap)
        sums.append(scores.logsumexp(-1))
        outs.append(((scores - sums[-1][..., None]).exp() @ heads(v_part, q)).transpose(0, 1))
    return torch.cat(outs), torch.cat(sums, dim=1)


def differentiate(dout, q, k, v, out, lse, cu_q, cu_k, scale, window, softcap):
    """Gradients by the flash formulas, `out` and `lse` taken as given: P = exp(S - lse), dS = P ∘ (dP - δ)."""
    if q.is_meta:
        return [torch.empty_like(states) for states in (q, k, v)]
    delta = (dout.double() * out.double()).sum(-1).T
    dq, dk, dv = ([] for _ in range(3))
    parts = segments(q, k, v, cu_q, cu_k)
    lengths = cu_q.diff().tolist()
    for (q_part, k_part, v_part), do, total, d in zip(
        parts, dout.double().split(lengths), lse.double().split(lengths, 1), delta.split(lengths, 1), strict=True
    ):
        scores, slope = scores_of(q_part, k_part, scale, window, softcap)
        weights = (scores - total[..., None]).exp()
        do = do.transpose(0, 1)
        dscores = weights * (do @ heads(v_part, q).mT - d[..., None]) * slope * scale
        dq.append((dscores @ heads(k_part, q)).transpose(0, 1))
        for grads, grad, states in ((dk, dscores.mT @ q_part.transpose(0, 1), k), (dv, weights.mT @ do, v)):
            grads.append(grad.transpose(0, 1).unflatten(1, (states.shape[1], -1)).sum(2))
    return [torch.cat(grads).to(q.dtype) for grads in (dq, dk, dv)]


def segments(q, k, v, cu_q, cu_k):
    q_lens, k_lens = cu_q.diff().tolist(), cu_k.diff().tolist()
    return list(zip(q.double().split(q_lens), k.double().split(k_lens), v.double().split(k_lens), strict=True))


def heads(states, q):
    """[n, K, D] as [H, n, D]."""
    return states.repeat_interleave(q.shape[1] // states.shape[1], dim=1).transpose(0, 1)


def scores_of(q, k, scale, window, softcap):
    """[H, n, m], -inf where query i of n does not see key j of m, and the slope of the softcap."""
    scores = q.transpose(0, 1) @ heads(k, q).mT * scale
    slope = torch.ones_like(scores)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
        slope = 1 - (scores / softcap) ** 2
    bottom_right = torch.arange(len(q))[:, None] + len(k) - len(q)
    distance = bottom_right - torch.arange(len(k))
    left, right = window
    visible = (distance <= left if left >= 0 else True) & (distance >= -right if right >= 0 else distance == distance)
    return scores.masked_fill(~visible, -torch.inf), slope


# --- what the kernels demand -----------------------------------------------------------------------------------------


def check_inputs(q, k, v, cu_q, cu_k, max_q, max_k, dtypes, unequal_value=False):
    assert q.dtype in dtypes
    assert q.dtype == k.dtype == v.dtype
    for states, cu, longest in ((q, cu_q, max_q), (k, cu_k, max_k)):
        assert states.ndim == 3
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert type(longest) is int
        if cu.is_meta:
            continue  # nothing to read: what a test of syncs is about
        assert longest == int(cu.diff().max()), "a wrong maximum is wrong answers, not an error"
        assert int(cu[0]) == 0
        assert int(cu[-1]) == len(states)
        assert int(cu.diff().min()) > 0
    assert len(cu_q) == len(cu_k)
    assert k.shape[:2] == v.shape[:2]
    assert q.shape[1] % k.shape[1] == 0
    assert q.shape[2] == k.shape[2]
    assert unequal_value or q.shape[2] == v.shape[2]
    for states in (q, k, v):
        assert states.stride(-1) == 1
        assert states.shape[-1] % 8 == 0


def check_gradients(dout, out, lse, q, v):
    assert dout.shape == out.shape == (*q.shape[:2], v.shape[-1])
    assert dout.dtype == out.dtype == q.dtype
    assert dout.stride(-1) == out.stride(-1) == 1
    assert lse.shape == (q.shape[1], len(q))
    assert lse.dtype == lse_dtype(q)
    assert lse.is_contiguous()


def lse_dtype(q):
    """float32 as the kernels have it; float64 where a test asks for exactness."""
    return torch.promote_types(q.dtype, torch.float32)


class Flash(torch.autograd.Function):
    """(out, lse) of packed tokens; differentiates out."""

    @staticmethod
    def forward(ctx, q, k, v, *settings):
        out, lse = attend(q, k, v, *settings)
        out, lse = out.to(q.dtype), lse.to(lse_dtype(q))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = settings
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, out, lse = ctx.saved_tensors
        return *differentiate(dout, q, k, v, out, lse, *ctx.settings), *[None] * len(ctx.settings)


# --- the functions, by their real signatures -------------------------------------------------------------------------


def flash_attn_2(dtypes):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dtypes)
        assert causal
        assert not (softcap and dropout_p)
        out, lse = Flash.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size, softcap)
        return (out, lse, None) if return_attn_probs else out

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dtypes)
        check_gradients(dout, out, softmax_lse, q, v)
        assert causal
        window = window_size_left, window_size_right
        found = differentiate(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, window, softcap
        )
        for ours, theirs in zip((dq, dk, dv), found, strict=True):
            ours.copy_(theirs)
        return softmax_lse

    return {"flash_attn.flash_attn_interface": (flash_attn_varlen_func, _flash_attn_varlen_backward)}


def flash_attn_3(dtypes):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dtypes)
        assert causal
        out, lse = Flash.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size, softcap)
        return (out, lse) if return_attn_probs else out

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dtypes)
        check_gradients(dout, out, softmax_lse, q, v)
        assert is_causal
        window = window_size_left, window_size_right
        found = differentiate(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, window, softcap
        )
        for ours, theirs in zip((dq, dk, dv), found, strict=True):
            ours.copy_(theirs)
        return softmax_lse

    return {"flash_attn_interface": (flash_attn_varlen_func, _flash_attn_backward)}


def flash_attn_4(dtypes):
    def sides(window):
        """4 says None where the others say -1, and takes a -1 for a bound of its own."""
        assert all(side is None or side >= 0 for side in window)
        return tuple(-1 if side is None else side for side in window)

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False,
    ):  # fmt: skip
        check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dtypes, unequal_value=True)
        assert causal
        out, lse = Flash.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, sides(window_size), softcap)
        # Without a gradient and unasked, the real one computes no log-sum-exp.
        return out, (lse if return_lse or q.requires_grad else None)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
        learnable_sink=None,
    ):  # fmt: skip
        check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dtypes, unequal_value=True)
        check_gradients(dout, out, lse, q, v)
        assert causal
        window = sides((window_size_left, window_size_right))
        found = differentiate(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, window, softcap)
        return *found, None

    return {"flash_attn.cute.interface": (flash_attn_varlen_func, _flash_attn_bwd)}


def varlen_attn_with_is_causal(dtypes):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        check_inputs(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, dtypes)
        assert is_causal
        return Flash.apply(query, key, value, cu_seq_q, cu_seq_k, query.shape[-1] ** -0.5, (-1, 0), 0.0)[0]

    return {"torch.nn.attention.varlen": (varlen_attn,)}


def varlen_attn_without_gqa(dtypes):
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        check_inputs(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, dtypes)
        assert isinstance(window_size, tuple)
        return Flash.apply(query, key, value, cu_seq_q, cu_seq_k, scale, window_size, 0.0)[0]

    return {"torch.nn.attention.varlen": (varlen_attn,)}


def aten_ops(dtypes):
    """Implementations for the CPU of the two ops that torch has for CUDA only."""

    def forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
        num_splits=None,
    ):  # fmt: skip
        check_inputs(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dtypes)
        window = window_size_left, window_size_right
        assert is_causal == (window == (-1, 0))
        out, lse = attend(query, key, value, cum_seq_q, cum_seq_k, scale, window, 0.0)
        rng_state = torch.zeros(2, dtype=torch.uint64)
        return out.to(query.dtype), lse.to(lse_dtype(query)), rng_state, torch.empty(0), torch.empty(0)

    def backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        check_inputs(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dtypes)
        check_gradients(grad_out, out, logsumexp, query, value)
        window = window_size_left, window_size_right
        assert is_causal == (window == (-1, 0))
        return tuple(
            differentiate(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, scale, window, 0.0)
        )

    return {"_flash_attention_forward": forward, "_flash_attention_backward": backward}


MODULES = {
    "flash_attn_2": flash_attn_2,
    "flash_attn_3": flash_attn_3,
    "flash_attn_4": flash_attn_4,
    "varlen_attn with is_causal": varlen_attn_with_is_causal,
    "varlen_attn without enable_gqa": varlen_attn_without_gqa,
    "varlen_attn": lambda dtypes: {},  # torch's own, over the aten ops
}


@contextlib.contextmanager
def standin(form, dtypes=HALF):
    """The kernel of `form` callable on the CPU with `dtypes`; yields the calls: name and arguments by keyword."""
    kernel, calls = KERNELS[form.split()[0]], []
    with contextlib.ExitStack() as stack:
        for path, functions in MODULES[form](dtypes).items():
            module = types.ModuleType(path)
            for function in functions:
                setattr(module, function.__name__, recorded(function, calls))
            stack.enter_context(installed(path, module))
        if kernel.name == "varlen_attn":
            library = torch.library.Library("aten", "IMPL")
            stack.callback(library._destroy)
            for name, function in aten_ops(dtypes).items():
                library.impl(name, function, "CPU")
        stack.enter_context(mock.patch.multiple(kernel, create=True, device_types=("cpu", "cuda"), dtypes=dtypes))
        yield calls


@contextlib.contextmanager
def installed(path, module):
    """A module to import. mock.patch.dict would forget what else is imported meanwhile; torch imports itself once."""
    before = sys.modules.get(path)
    sys.modules[path] = module
    try:
        yield
    finally:
        del sys.modules[path]
        if before is not None:
            sys.modules[path] = before


def recorded(function, calls):
    """The function with its own signature (`inspect` follows __wrapped__), noting its keyword arguments."""

    def call(*args, **kwargs):
        calls.append((function.__name__, kwargs))
        return function(*args, **kwargs)

    call.__wrapped__ = function
    call.__name__ = function.__name__
    return call


def on_a_gpu(name, layout):
    """The layout on a GPU where the real kernel can be called, or a skip that says why not."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if (absence := KERNELS[name].absence(torch.device("cuda"))) is not None:
        pytest.skip(f"{name} {absence}")
    return layout.to("cuda")
