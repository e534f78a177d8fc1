"""Rows over 2 and 4 gloo processes: the steps of one process, Ulysses bit for bit, and the bytes of the formula."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from parallel_ranks import (
    ATTENTIONS,
    CASES,
    HEADS,
    QUICK,
    attend_with_gradients,
    attention_layout,
    batch_of,
    gradients_of,
    hidden_states,
    one_process,
    own_module,
    run_on_ranks,
    states_of,
)

from anchor_attn import anchor_attention
from anchor_attn.parallel import communication_bytes

FP32_ROUNDING = 5e-6  # of the largest number of a tensor
# Where queries and keys are rounded to bfloat16, the last bit of float32 now and then decides on one of theirs.
BF16_ROUNDING = torch.finfo(torch.bfloat16).eps

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What each rank got, rank by rank: a function of how many ranks there are, and of the step that is asked for."""

    @cache
    def run_once(ranks, names):
        return run_on_ranks(ranks, names, tmp_path_factory.mktemp("gloo"))

    def run_with(ranks, name=QUICK[0]):
        return run_once(ranks, QUICK if ranks == 4 and name in QUICK else tuple(CASES))

    return run_with


@pytest.fixture(params=[2, 4], ids=lambda ranks: f"{ranks} ranks")
def on_ranks(run, request):
    """What each of 2 and of 4 ranks got."""
    return run(request.param)


def steps():
    """Every step on 2 and on 4 ranks; on 4 only a few are fast."""
    return [
        pytest.param(
            ranks, name, marks=[pytest.mark.slow] * (ranks == 4 and name not in QUICK), id=f"{ranks} ranks, {name}"
        )
        for ranks in (2, 4)
        for name in CASES
    ]


def assert_close(ours, theirs, what, relative=FP32_ROUNDING):
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=relative * float(theirs.abs().max()), msg=lambda m: f"{what}: {m}"
    )


def put_back(parts, slots, like):
    """Values by rank as one tensor a row, and how often each slot came; the last rank's copy of the anchor stands."""
    whole, times = torch.zeros_like(like), torch.zeros(like.shape[:2], dtype=torch.int64)
    for part, where in zip(parts, slots, strict=True):
        rows, places = (where >= 0).nonzero(as_tuple=True)
        whole[rows, where[rows, places]] = part[rows, places]
        times[rows, where[rows, places]] += 1
    return whole, times


# --- a training step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "name"), steps())
def test_ranks_train_as_one_process_does(run, ranks, name):
    results = [result["steps"][name] for result in run(ranks, name)]
    rounding = BF16_ROUNDING if CASES[name].precision == "bfloat16" else FP32_ROUNDING
    loss, gradients, logits = one_process(CASES[name])

    layout = batch_of()["document_ids"]
    found, times = put_back([result["logits"] for result in results], [result["slots"] for result in results], logits)
    assert (times[:, 0] == ranks).all()  # the anchor
    assert (times[:, 1:] == (layout.document_ids[:, 1:] >= 0)).all()
    real = layout.document_ids >= 0
    assert_close(found[real], logits[real], "logits", rounding)
    for result in results:
        torch.testing.assert_close(result["loss"], loss, rtol=rounding, atol=0)
        assert result["gradients"].keys() == gradients.keys()
        for parameter, grad in gradients.items():
            assert_close(result["gradients"][parameter], grad, parameter, rounding)


def test_cases_share_documents_or_not_as_they_say(on_ranks):
    for name, result in on_ranks[0]["steps"].items():
        assert result["shared"] == (CASES[name].tolerance is not None), name


def test_copies_of_the_anchor_are_alike_on_all_ranks(on_ranks):
    for name in on_ranks[0]["steps"]:
        if CASES[name].precision != "bfloat16":
            first, *others = [result["steps"][name]["logits"][:, 0] for result in on_ranks]
            for other in others:
                assert_close(other, first, name)


# --- attention alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTENTIONS)
def test_ulysses_gives_the_bits_of_one_process(on_ranks, name):
    heads, settings = ATTENTIONS[name]
    layout = attention_layout()
    out, *gradients = attend_with_gradients(
        states_of(*HEADS[heads], layout.seq_len), lambda q, k, v: anchor_attention(q, k, v, layout, **settings)
    )
    ours, *our_gradients = (
        torch.cat(parts, dim=2) for parts in zip(*(result["attentions"][name] for result in on_ranks), strict=True)
    )

    assert torch.equal(ours, out)
    for what, grad, theirs in zip(("query", "key", "value"), our_gradients, gradients, strict=True):
        assert_close(grad, theirs, what)


@pytest.mark.parametrize("scheme", ["document", "ulysses"])
def test_a_module_of_ones_own_takes_a_ranks_part(on_ranks, scheme):
    layout = batch_of()["document_ids"]
    module = own_module()
    out = module(hidden_states(layout), layout)
    real = (layout.document_ids >= 0)[..., None]
    (out * real).square().sum().backward()
    results = [result["modules"][scheme] for result in on_ranks]
    found, _ = put_back([result["out"] for result in results], [result["slots"] for result in results], out)

    assert_close(found * real, (out * real).detach(), "out")
    for name, grad in gradients_of(module).items():
        assert_close(results[0]["gradients"][name], grad, name)


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_ranks_receive_the_bytes_of_the_formula_and_none_for_whole_documents(on_ranks):
    ranks = len(on_ranks)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "value_dim": 16, "bytes_per_value": 4}
    for result in on_ranks:
        counted = result["bytes"]
        assert counted["all_gather"] == communication_bytes(attention_layout(), "all_gather", ranks, **sizes)
        # gloo has no all-to-all: DTensor gathers all that ranks have, and keeps its part of it.
        with_all_to_all = {name: tuple(bytes_ / ranks for bytes_ in both) for name, both in counted.items()}
        layout = batch_of()["document_ids"]
        assert with_all_to_all["document, some shared"] == communication_bytes(layout, "document", ranks, **sizes)
        assert counted["document"] == communication_bytes(layout, "document", ranks, tolerance=None, **sizes) == (0, 0)
        assert counted["document, some shared"] > (0, 0)
