"""`anchor-attn plan`: operations as torch counts them, tiles and shares as masks have them, steps that add up."""

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import tiny_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from anchor_attn import wrap
from anchor_attn.bench import timing
from anchor_attn.cli import main
from anchor_attn.masks import PATTERNS, PackedLayout, dense_mask
from anchor_attn.train import plan as planning
from anchor_attn.train.plan import (
    Cluster,
    DocumentLengths,
    Rates,
    StepSeconds,
    calibrate,
    calibration,
    describe_config,
    describe_model,
    expect_rates,
    find_device,
    findings,
    list_findings,
    plan_training,
    predict_steps,
    read_lengths,
    recognize_device,
)
from anchor_attn.train.plan.calibration import local_device
from anchor_attn.train.plan.devices import DEVICES
from anchor_attn.train.plan.findings import half_executed_tokens, half_tokens, longest_documents, needed_slowness
from anchor_attn.train.plan.memory import activation_bytes, plan_memory
from anchor_attn.train.plan.report import BY_LENGTH, BY_SCHEME, draw_plan, reasons
from anchor_attn.train.plan.schemes import SCHEMES, share_row, two_ended_shares
from anchor_attn.train.plan.steps import attention_bytes_per_s, exchange_bytes_per_s, gather_bytes_per_s, ranks_to_try
from anchor_attn.train.plan.tiles import CpuTile, Tile
from anchor_attn.train.plan.work import backward_flops, count_row, executed_flops, forward_flops

LLAMA = describe_model("llama-2-7b")
A100 = find_device("a100")
EIGHT = Cluster(A100, 8, expect_rates(A100), rows=8, ranks_a_row=8)
TOKENS = 24


def planned(lengths, seq_len, cluster=EIGHT, shape=LLAMA):
    return plan_training(shape, cluster, read_lengths(lengths), [seq_len])


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["anchor-attn", "plan", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


# --- models and operations -------------------------------------------------------------------------------------------


def counted(model, backward):
    """What torch counts, the angles of RoPE left out."""
    ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if backward:
            loss.backward()
    of_modules = counter.get_flop_counts()
    angles = sum(sum(ops.values()) for name, ops in of_modules.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "opt", "phi3", "starcoder2"])
def test_operations_are_those_that_torch_counts(family):
    """Eager attention computes all S × S cells: as many pairs."""
    model = tiny_model(family, torch.float32, attn_implementation="eager").train()
    shape = describe_config(model.config)
    cells = shape.layers * TOKENS**2
    forward, backward = forward_flops(shape, TOKENS, cells).total, backward_flops(shape, TOKENS, cells).total

    assert counted(model, backward=False) == forward
    assert counted(model, backward=True) == pytest.approx(forward + backward, rel=1e-12)


def test_a_token_is_multiplied_with_its_own_experts_only():
    shape = describe_config(tiny_model("mixtral", torch.float32).config)
    config = tiny_model("mixtral", torch.float32).config
    experts = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    idle = (config.num_local_experts - config.num_experts_per_tok) * experts

    assert shape.layer_weights + shape.outer_parameters + idle < shape.parameters
    assert shape.parameters - (shape.layer_weights + shape.outer_parameters + idle) == (
        (2 * config.num_hidden_layers + 1) * config.hidden_size  # norms
    )
    assert shape.mlp_size == config.num_experts_per_tok * config.intermediate_size


def test_a_flash_kernel_runs_five_products_backward_for_two_forward():
    shape = SimpleNamespace(layer_weights=0, head_weights=0, num_heads=4, head_dim=16, value_dim=24)
    query, value = (1, 4, TOKENS, 16), (1, 4, TOKENS, 24)
    forward = sdpa_flop_count(query, query, value)
    executed = executed_flops(shape, TOKENS, TOKENS**2, checkpointing=False).attention

    assert forward_flops(shape, TOKENS, TOKENS**2).attention == forward
    assert executed == forward + sdpa_backward_flop_count(value, query, query, value)


def test_checkpointing_runs_the_layers_once_more_and_not_the_head():
    without, again = (executed_flops(LLAMA, 100, 5000, checkpointing=choice) for choice in (False, True))
    forward = forward_flops(LLAMA, 100, 5000)

    assert again.attention - without.attention == forward.attention
    assert again.dense - without.dense == forward.dense - 2 * 100 * LLAMA.head_weights


def test_a_published_model_has_the_parameters_that_are_published():
    assert LLAMA.parameters == 6_738_415_616
    assert describe_model("llama-3-8b").parameters == 8_030_261_248
    assert describe_model("mistral-7b-v0.3").parameters == 7_248_023_552
    assert describe_model("qwen1.5-1.8b").parameters == 1_836_828_672


def test_windows_are_read_a_layer_at_a_time():
    assert describe_config(tiny_model("mistral", torch.float32, sliding_window=5).config).windows == (5, 5)
    alternating = tiny_model("gemma2", torch.float32, sliding_window=5).config
    assert describe_config(alternating).windows == tuple(
        5 if "sliding" in kind else None for kind in alternating.layer_types
    )
    assert set(LLAMA.windows) == {None}


@pytest.mark.parametrize(("tokens", "share"), [(16_384, 0.24), (32_768, 0.39), (65_536, 0.56), (131_072, 0.72)])
def test_attention_is_this_much_of_llamas_forward(tokens, share):
    pairs = LLAMA.layers * tokens * (tokens + 1) // 2

    assert forward_flops(LLAMA, tokens, pairs).attention_share == pytest.approx(share, abs=0.0101)


def test_a_config_that_is_no_decoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(
        ValueError, match=r"^model must be a decoder that transformers can build, got .*pass another\.$"
    ):
        describe_model(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"^model must be a config file that exists, got 'none.json'; check the path\.$"
    ):
        describe_model("none.json")


# --- pairs and tiles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 41])
@pytest.mark.parametrize("sizes", [(8, 8), (4, 8), (8, 4), (3, 5)])
def test_cells_are_those_of_tiles_that_hold_a_pair(sizes, length, window):
    place = torch.arange(length)
    distance = place[:, None] - place
    attended = (distance >= 0) & (distance < (length if window is None else window))
    queries, keys = (-(-length // size) * size for size in sizes)
    padded = torch.zeros(queries, keys, dtype=torch.bool)
    padded[:length, :length] = attended
    tiles = padded.unfold(0, sizes[0], sizes[0]).unfold(1, sizes[1], sizes[1])
    present = torch.zeros(queries, keys, dtype=torch.bool)
    present[:length, :length] = True
    touched = tiles.any(-1).any(-1)
    cut = present.unfold(0, sizes[0], sizes[0]).unfold(1, sizes[1], sizes[1]).sum((-1, -2))

    assert Tile(*sizes).cells(length, window) == int(touched.sum()) * sizes[0] * sizes[1]
    assert Tile(*sizes, is_whole=False).cells(length, window) == int(cut[touched].sum())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("windows", [(None, None), (5, None), (1, 3)])
def test_pairs_of_a_row_are_those_of_the_dense_mask(pattern, windows):
    lengths = (9, 1, 14, 3)
    layout = PackedLayout.from_lengths([lengths])
    expected = sum(int(dense_mask(layout, pattern, window, keep_anchor=window is None).sum()) for window in windows)
    work = count_row(replace(LLAMA, layers=2, windows=windows), lengths, pattern, Tile(1, 1))

    assert (work.tokens, work.pairs) == (28, expected)
    if windows == (None, None):
        # Tiles of one cell are the pairs, but for the anchor's own, which is no tile of a document.
        assert work.cells == expected - (0 if pattern == "full" else 2)


def test_a_cpu_takes_more_queries_at_once_in_longer_documents():
    tile = CpuTile(256, 512, is_whole=False)

    assert [tile.cells(length) for length in (32, 100, 191, 192)] == [32 * 32, 100 * 100, 191 * 191, 192 * 192]
    assert tile.cells(1024) == 512 * 512 + 512 * 1024
    assert tile.cells(767) > Tile(256, 512, is_whole=False).cells(767) - 767 * 256


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_what_autograd_saves(dtype):
    """The second layer's tensors, counted by torch's own hooks; they leave out what the first one brought along."""

    def saved_bytes(layers):
        size = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = tiny_model("llama", getattr(torch, dtype), num_hidden_layers=layers, **size)
        layout = PackedLayout.from_lengths([[127, 128]])
        weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
        found = {}

        def keep(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            wrap(model, "intra_doc", "varlen").train()(
                input_ids=torch.zeros_like(layout.document_ids, dtype=torch.long), document_ids=layout, use_cache=False
            )
        shape = describe_config(model.config)
        kept = sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in weights)
        return kept, shape

    (one, _), (two, shape) = saved_bytes(1), saved_bytes(2)

    assert activation_bytes(shape, dtype) * 256 == pytest.approx(two - one, rel=0.12)


def test_states_are_sharded_and_logits_can_be_left_out():
    alone, shared = (plan_memory(LLAMA, 1000, ranks, "bfloat16") for ranks in (1, 8))
    fused = plan_memory(LLAMA, 1000, 8, "bfloat16", fused_loss=True)

    assert alone.weights + alone.gradients + alone.optimizer == 16 * LLAMA.parameters
    assert (8 * shared.weights, 8 * shared.optimizer) == (alone.weights, alone.optimizer)
    assert shared.total(True) - fused.total(True) == shared.logits == 10 * 32_000 * 1000
    assert shared.total(False) - shared.total(True) == shared.activations - shared.activations_checkpointed > 0


# --- schemes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_two_ended_slices_have_the_pairs_of_the_dense_mask(pattern, ranks):
    lengths = (9, 1, 14, 15)
    rows = dense_mask(PackedLayout.from_lengths([lengths]), pattern)[0].sum(-1).reshape(2 * ranks, -1).sum(-1)
    expected = [float(rows[rank] + rows[-1 - rank]) / float(rows.sum()) for rank in range(ranks)]

    assert two_ended_shares(lengths, pattern, ranks) == pytest.approx(expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_hold_the_whole_row_between_them(scheme):
    ranks = 1 if scheme == "data" else 4
    sharing = share_row(LLAMA, [500] * 8 + [95], "anchor", scheme, ranks, 2)
    anchors = ranks if scheme == "document" else 1  # a copy each

    assert sharing.tokens.sum() == pytest.approx(4095 + anchors)
    assert sharing.pair_shares.sum() == pytest.approx(1)


def test_documents_that_fit_their_ranks_send_nothing_and_others_do():
    step = planned("500", 8 * 500 + 1).step(4001, "document", "anchor")
    long = planned("4000", 8 * 500 + 1).step(4001, "document", "anchor")

    assert (step.attention_received_bytes, step.imbalance) == (0, pytest.approx(0, abs=1e-12))
    assert long.attention_received_bytes > 0
    gathered, ulysses = (planned("500", 4001).step(4001, scheme, "anchor") for scheme in ("all_gather", "ulysses"))
    assert gathered.attention_received_bytes > ulysses.attention_received_bytes > 0


def test_what_a_scheme_cannot_do_is_left_out_with_its_reason():
    plan = planned("web-text", 4096, replace(EIGHT, devices=12, rows=12, ranks_a_row=12))

    assert "pattern must keep documents to themselves" in plan.step(4096, "document", "full").left_out
    left_out = plan.step(4096, "ulysses", "full").left_out
    assert left_out == "ranks_a_row must divide the 32 heads under ulysses, got 12; take 4, or leave it out."
    assert plan.step(4096, "ulysses", "full").step_s is None
    assert plan.step(4096, "all_gather", "full").step_s > 0
    uneven = planned("web-text", 4096, replace(EIGHT, rows=12))
    assert uneven.step(4096, "data", "full").left_out.startswith("rows must be a multiple of 8")
    assert uneven.step(4096, "ulysses", "full").step_s > 0


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_is_the_sum_of_its_parts(scheme):
    step = planned("web-text", 16_384).step(16_384, scheme, "anchor")
    parts = (step.compute_s, step.attention_exchange_s, step.weights_exchange_s, step.optimizer_s)

    assert step.step_s == pytest.approx(sum(parts))
    assert step.tokens_per_s == pytest.approx(8 * 16_384 / step.step_s)
    assert step.mfu == pytest.approx((step.forward_flops + step.backward_flops) / (step.step_s * 8 * 312e12))


def test_one_device_computes_and_waits_for_nobody():
    alone = Cluster(A100, 1, Rates(1e14, 2e14, "given"), rows=1, ranks_a_row=1)
    plan = planned("300,50,161", 4096, alone)
    for pattern in PATTERNS:
        steps = [plan.step(4096, scheme, pattern) for scheme in SCHEMES]
        executed, share = steps[0].executed_flops, steps[0].attention_of_executed

        assert len({step.step_s for step in steps}) == 1
        assert steps[0].attention_exchange_s == steps[0].weights_exchange_s == steps[0].imbalance == 0
        assert steps[0].compute_s == pytest.approx(executed * (1 - share) / 1e14 + executed * share / 2e14)


def test_the_slowest_row_of_each_turn_decides():
    """Two groups: rows 0 and 1 run at once, then rows 2 and 3."""
    documents = DocumentLengths("given", [4095, 100], seed=3)
    cluster = Cluster(A100, 2, Rates(1e14, 1e14, "given"), rows=4, ranks_a_row=1)
    step = plan_training(LLAMA, cluster, documents, [4096]).step(4096, "data", "intra_doc")
    dense = executed_flops(LLAMA, 4096, 0, step.checkpointing).dense
    attention = [
        executed_flops(LLAMA, 0, count_row(LLAMA, row, "intra_doc", A100.tile).cells, step.checkpointing).attention
        for row in documents.rows(4096, 4)
    ]

    assert len(set(attention)) > 1
    slowest = max(attention[:2]) + max(attention[2:])
    assert step.compute_s == pytest.approx((2 * dense + slowest) / 1e14)
    assert step.imbalance == pytest.approx((2 * dense + slowest) / (2 * dense + sum(attention) / 2) - 1)


def test_layers_run_again_only_where_the_memory_needs_it():
    short, long = (planned("web-text", seq_len).step(seq_len, "data", "full") for seq_len in (4096, 32_768))

    assert (short.checkpointing, short.fits, long.checkpointing, long.fits) == (False, True, True, True)
    forced = planned("web-text", 4096, replace(EIGHT, checkpointing=True)).step(4096, "data", "full")
    assert forced.memory_bytes < short.memory_bytes
    assert forced.compute_s > short.compute_s
    hopeless = planned("web-text", 32_768, replace(EIGHT, checkpointing=False)).step(32_768, "data", "full")
    assert not hopeless.fits


def test_across_nodes_a_ring_enters_by_all_cards_and_an_exchange_by_each():
    assert gather_bytes_per_s(A100, 8) == exchange_bytes_per_s(A100, 8) == 300e9
    assert gather_bytes_per_s(A100, 16) == 8 * 25e9
    assert exchange_bytes_per_s(A100, 16) == pytest.approx(25e9 * 15 / 8)
    assert attention_bytes_per_s(A100, "all_gather", 16) > attention_bytes_per_s(A100, "ulysses", 16)


def test_thousands_of_ranks_and_a_million_tokens_are_planned_on_paper():
    plan = planned("web-text", 2**20, replace(EIGHT, devices=2048, rows=64, ranks_a_row=32))
    document, gathered = (plan.step(2**20, scheme, "anchor") for scheme in ("document", "all_gather"))

    assert document.fits
    assert document.imbalance <= 0.1
    assert document.attention_received_bytes < gathered.attention_received_bytes / 10


def test_documents_that_fit_need_no_heads_for_a_thousand_ranks():
    plan = planned("all-short", 2**20, replace(EIGHT, devices=1024, rows=1, ranks_a_row=1024))
    document, ulysses = (plan.step(2**20, scheme, "anchor") for scheme in ("document", "ulysses"))

    assert document.attention_received_bytes == 0
    assert "1024" in ulysses.left_out


def test_left_out_the_ranks_a_row_are_those_of_a_node_or_the_fewest_more_that_hold_the_row():
    chosen = replace(EIGHT, devices=64, rows=64, ranks_a_row=None)
    short, long = (planned("web-text", seq_len, chosen) for seq_len in (4096, 2**20))
    fewer, given = (planned("web-text", 2**20, replace(chosen, ranks_a_row=ranks)) for ranks in (8, 16))
    for scheme in ("document", "ulysses", "all_gather"):
        held, found = short.step(4096, scheme, "anchor"), long.step(2**20, scheme, "anchor")
        assert (held.ranks_a_row, held.fits) == (8, True)
        assert (found.ranks_a_row, found.fits, fewer.step(2**20, scheme, "anchor").fits) == (16, True, False)
        assert found == given.step(2**20, scheme, "anchor")


def test_ranks_are_tried_from_a_node_upwards_and_then_downwards():
    devices = {12: [4, 6, 12, 3, 2], 8: [8, 4, 2], 1: [1], 7: [1, 7], 64: [8, 16, 32, 64, 4, 2]}
    tried = {count: ranks_to_try(replace(EIGHT, devices=count)) for count in devices}
    assert tried == devices


def test_ulysses_takes_fewer_ranks_where_a_node_has_more_than_the_heads_allow():
    shape = replace(LLAMA, num_heads=12, num_kv_heads=12)
    chosen = replace(EIGHT, ranks_a_row=None)
    assert planned("web-text", 4096, chosen, shape).step(4096, "ulysses", "full").ranks_a_row == 4
    assert planned("web-text", 4096, chosen, shape).step(4096, "document", "anchor").ranks_a_row == 8
    too_long = planned("web-text", 2**20, chosen, shape).step(2**20, "ulysses", "full")
    assert (too_long.ranks_a_row, too_long.fits, too_long.left_out) == (4, False, "")
    given = planned("web-text", 4096, EIGHT, shape).step(4096, "ulysses", "full")
    assert "must divide the 12 heads under ulysses, got 8; take 4, or leave it out." in given.left_out


def test_where_nothing_holds_a_row_the_ranks_are_those_of_a_node_and_full_stays_left_out():
    plan = planned("web-text", 2**20, replace(EIGHT, ranks_a_row=None))
    for scheme in ("document", "ulysses", "all_gather"):
        step = plan.step(2**20, scheme, "anchor")
        assert (step.ranks_a_row, step.fits) == (8, False)
    assert "must keep documents to themselves" in plan.step(2**20, "document", "full").left_out


def test_more_ranks_than_heads_keep_documents_whole_and_say_what_that_costs():
    """A document of 4,000 on 64 ranks of which each should have 1,000 tokens: as it is, for 64 does not divide 32."""
    plan = planned("4000", 64_001, replace(EIGHT, devices=64, rows=1, ranks_a_row=64))
    step = plan.step(64_001, "document", "anchor")

    assert step.kept_whole
    assert step.attention_received_bytes == 0
    assert step.imbalance == pytest.approx(3, rel=0.01)
    said = reasons(plan, 64_001)
    assert any("do not divide the 32 heads: compute is unbalanced by" in line for line in said)
    assert not any("tolerance" in line or "scheme=" in line for line in said)
    assert "Whole documents fit the ranks in balance" not in " ".join(list_findings(plan))
    level = planned("1000", 64_001, replace(EIGHT, devices=64, rows=1, ranks_a_row=64))
    assert not level.step(64_001, "document", "anchor").kept_whole
    shared = planned("4000", 64_001, replace(EIGHT, devices=32, rows=1, ranks_a_row=32)).step(
        64_001, "document", "anchor"
    )
    assert not shared.kept_whole
    assert shared.attention_received_bytes > 0


def test_what_is_said_of_a_share_is_what_it_was_measured_by(monkeypatch):
    monkeypatch.setattr(findings, "NOTICEABLE", 0.2)
    said = " ".join(list_findings(plan_training(LLAMA, EIGHT, DocumentLengths(), [4096, 65_536])))

    assert "saves less than 20 % at 4K" in said
    assert "Long documents: 20 % is saved" in said
    assert "for any mask to save 20 %" in said
    assert "10 %" not in said


# --- the picture -----------------------------------------------------------------------------------------------------


def test_lines_that_lie_on_each_other_are_told_apart_and_what_does_not_fit_is_noted():
    plan = plan_training(LLAMA, replace(EIGHT, ranks_a_row=None), DocumentLengths(), [2**19, 2**20])
    axis = draw_plan(plan).axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    one, other = lines["full, ulysses"], lines["full, all_gather"]

    assert other.get_ydata()[0] == pytest.approx(one.get_ydata()[0], rel=0.02)
    assert (one.get_marker(), one.get_linestyle()) != (other.get_marker(), other.get_linestyle())
    assert one.get_markersize() > other.get_markersize()
    assert one.get_markerfacecolor() == "none"
    assert [(note.get_text(), note.get_position()[0]) for note in axis.texts] == [("nothing fits the memory", 2**20)]
    assert axis.get_xlim()[1] > 2**20


# --- what follows ----------------------------------------------------------------------------------------------------


def test_half_is_where_attention_is_half():
    tokens = half_tokens(LLAMA)
    pairs = LLAMA.layers * tokens * (tokens + 1) / 2

    assert 50_000 < tokens < 51_000
    assert forward_flops(LLAMA, tokens, pairs).attention_share == pytest.approx(0.5)
    for checkpointing in (False, True):
        tokens = half_executed_tokens(LLAMA, checkpointing)
        cells = LLAMA.layers * tokens * (tokens + 1) / 2
        assert executed_flops(LLAMA, tokens, cells, checkpointing).attention_share == pytest.approx(0.5)


def test_the_papers_half_follows_from_64k_and_not_from_32k():
    plan = plan_training(LLAMA, EIGHT, DocumentLengths(), [4096, 32_768, 65_536])
    said = " ".join(list_findings(plan))

    assert plan.saving(65_536) > 0.5 > plan.saving(32_768) > 0.1 > plan.saving(4096)
    assert "from 50,407 tokens a row" in said
    assert "more than half of full's step at 64K of the lengths planned" in said
    assert "1.5 × at 32K" in said
    assert "all S × S cells instead of the causal half suffice from 32K" in said
    assert "less than 10 % at 4K" in said


def test_an_attention_that_is_so_much_slower_is_half_of_the_time():
    step = planned("web-text", 16_384).step(16_384, "data", "full")
    share = step.attention_of_forward
    slower = needed_slowness(step) * share

    assert slower / (slower + 1 - share) == pytest.approx(0.5)


def test_documents_of_the_longest_that_gains_leave_a_tenth():
    full = planned("web-text", 65_536).step(65_536, "data", "full")
    longest = longest_documents(full)
    left = full.attention_of_executed * longest / 65_536

    assert full.attention_of_executed - left == pytest.approx(0.1)
    assert longest_documents(replace(full, attention_of_executed=0.09)) is None


# --- devices and lengths ---------------------------------------------------------------------------------------------


def test_a_device_is_recognized_by_what_torch_calls_it_or_not_at_all():
    names = {
        "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H200": "h200", "NVIDIA B200": "b200", "NVIDIA GB200": "gb200",
        "NVIDIA L40S": "l40s", "AMD Instinct MI300X": "mi300x",
    }  # fmt: skip
    assert {torch_name: recognize_device(torch_name).name for torch_name in names} == names
    assert set(names.values()) == set(DEVICES)
    for unknown in ("NVIDIA GeForce RTX 2080", "NVIDIA H200 NVL", "Tesla V100-SXM2-32GB"):
        assert recognize_device(unknown) is None
    assert all(device.source.startswith("https://") for device in DEVICES.values())


def test_a_share_of_the_peak_is_a_share():
    assert expect_rates(A100, 0.25, 1).dense_flops_per_s == 78e12
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^attention_mfu must be above 0 and at most 1, got .*; pass 0\.5"):
            expect_rates(A100, 0.5, share)
    with pytest.raises(ValueError, match=r"^device must have a known peak"):
        expect_rates(local_device("cpu"))


def test_lengths_come_from_a_name_from_numbers_or_from_a_file(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("300\n50\n161\n")
    from_file, given = read_lengths(str(path)), read_lengths("300,50,161")

    assert from_file.rows(1000, 3) == given.rows(1000, 3)
    assert {length for row in given.rows(1000, 3) for length in row[:-1]} <= {300, 50, 161}
    assert [sum(row) for row in given.rows(1000, 3)] == [999] * 3
    assert read_lengths("web-text", 1).rows(5000, 2)[0] == read_lengths("web-text", 0).rows(5000, 2)[1]
    for wrong in ("web", "3,0", "1.5", ""):
        with pytest.raises(ValueError, match=r"^lengths must be one of uniform, web-text, .*; pass web-text"):
            read_lengths(wrong)


# --- calibration -----------------------------------------------------------------------------------------------------


def test_rates_come_back_from_the_seconds_they_make():
    shape, tile = describe_model("laptop"), Tile(64, 64)
    rates = Rates(3e10, 2e10, "given")
    rows = {pattern: StepSeconds(pattern, (700, 1300), 1.0) for pattern in PATTERNS}
    seconds = {found.pattern: found.predicted_s for found in predict_steps(shape, tile, rates, list(rows.values()), [])}
    steps = [replace(step, seconds=seconds[pattern]) for pattern, step in rows.items()]
    found = calibrate(shape, tile, steps[:2])

    assert (found.dense_flops_per_s, found.attention_flops_per_s) == pytest.approx((3e10, 2e10))
    predictions = predict_steps(shape, tile, found, steps, steps[:2])
    assert [prediction.is_calibration for prediction in predictions] == [True, True, False]
    assert np.abs([prediction.error for prediction in predictions]).max() < 1e-9


def test_seconds_that_no_rates_explain_are_refused():
    full, intra = StepSeconds("full", (700, 1300), 1.0), StepSeconds("intra_doc", (700, 1300), 9.0)
    with pytest.raises(ValueError, match=r"^measured must give rates above 0, got steps in which more attention"):
        calibrate(describe_model("laptop"), Tile(64, 64), [full, intra])
    with pytest.raises(ValueError, match=r"^measured must hold two steps, got 1; measure full and intra_doc"):
        calibrate(describe_model("laptop"), Tile(64, 64), [full])


# Two quiet cores, float32, the laptop model: benchmarks/results/cpu-2-cores/step.
COMMITTED = (302, 1347, 302, 714, 1088, 1161, 770, 382, 830, 1295)


def test_a_committed_measurement_is_explained_by_rates_near_each_other():
    """Both rates are of the same cores: attention's kernel cannot be many times faster than the dense layers."""
    steps = [StepSeconds(pattern, COMMITTED, seconds) for pattern, seconds in (("full", 2.0819), ("intra_doc", 0.6047))]
    shape, tile = describe_model("laptop"), local_device("cpu").tile
    rates = calibrate(shape, tile, steps)
    (anchor,) = predict_steps(shape, tile, rates, [StepSeconds("anchor", COMMITTED, 0.6637)], steps)

    assert 0.5 < rates.attention_flops_per_s / rates.dense_flops_per_s < 2
    assert abs(anchor.error) < 0.15


@pytest.mark.slow
def test_steps_of_other_lengths_and_of_anchor_are_foretold_from_two_at_8k(run, monkeypatch):
    """In seconds of this process on one thread: by the clock, a program beside it would make one length slower."""
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=time.process_time))
    monkeypatch.setattr(calibration.measure_steps, "__defaults__", (1, "float32"))  # one round of each
    code, out, _ = run("--device", "cpu", "--validate", "--json")
    content = json.loads(out)
    errors = {(each["seq_len"], each["pattern"]): each["error"] for each in content["predictions"]}

    assert code == 0
    assert len(errors) == 9
    assert max(map(abs, errors.values())) < 0.25, errors


# --- the command -----------------------------------------------------------------------------------------------------


def test_it_writes_a_plan_a_picture_and_a_page(run, tmp_path):
    code, out, err = run("--seq-len", "4096,65536", "--out", "here")
    content = json.loads((tmp_path / "here" / "plan.json").read_text())

    assert (code, err) == (0, "")
    assert out.startswith("llama-2-7b, 6.74B parameters, on 8 × a100; 8 rows a step, 8 ranks a row")
    assert "from 50,407 tokens a row" in out
    assert "50 % of the peak" in out
    assert (tmp_path / "here" / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (tmp_path / "here" / "plan.html").read_text()
    assert "<h1>What a training step would cost</h1>" in page
    assert "http" not in page.split("<body>")[1].replace(A100.source, "")
    assert len(content["records"]) == 2 * len(SCHEMES) * len(PATTERNS)
    assert content["meta"]["cluster"]["device"]["flops_per_s"] == 312e12
    assert set(content) == {"meta", "records", "findings", "predictions"}


def test_no_column_is_lost_in_a_narrow_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = run("--seq-len", "4096,65536")

    assert all(name in out.split() for header in (BY_LENGTH, BY_SCHEME) for title in header for name in title.split())


def test_as_json_it_prints_the_file_and_two_runs_are_equal(run, tmp_path):
    first = run("--seq-len", "4096", "--model", "tiny", "--seed", "3", "--json")
    second = run("--seq-len", "4096", "--model", "tiny", "--seed", "3", "--json")
    other = run("--seq-len", "4096", "--model", "tiny", "--seed", "4", "--json")

    assert first == second
    assert other[1] == (tmp_path / "runs" / "plan" / "plan.json").read_text()
    assert json.loads(first[1])["records"] != json.loads(other[1])["records"]


def test_thousands_of_devices_give_a_plan_that_fits(run):
    code, out, _ = run("--devices", "4096", "--seq-len", "1048576")

    assert code == 0
    assert "4,096 rows a step, 16 ranks a row where rows are shared" in out
    assert "At 1M the fastest for anchor that fits is 'document' with 16 ranks a row" in out


def test_without_an_argument_the_lengths_are_4k_to_1m(run, monkeypatch):
    seen = []

    def stop(*arguments):
        seen.append(arguments)
        raise ValueError("enough")

    monkeypatch.setattr(planning, "plan_training", stop)
    run()
    ((shape, cluster, documents, seq_lens),) = seen

    assert (shape.name, cluster.device.name, cluster.devices, documents.name) == ("llama-2-7b", "a100", 8, "web-text")
    assert list(seq_lens) == [4096 << power for power in range(9)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "v100"], "--device must be one of a100, "),
        (["--devices", "0"], "--devices must be at least 1, got 0"),
        (["--seq-len", "4k"], "--seq-len must be numbers of tokens with commas, got '4k'"),
        (["--seq-len", "1"], "--seq-len must lie between 2 and"),
        (["--lengths", "books"], "--lengths must be one of uniform"),
        (["--mfu", "2"], "--mfu must be above 0 and at most 1, got 2.0"),
        (["--validate"], "--validate must be for this machine, got --device a100"),
        (["--device", "cpu", "--devices", "2"], "--devices must be 1 for this machine, got 2"),
        (["--device", "cpu", "--mfu", "0.5"], "--mfu must be left out for this machine"),
        (["--device", "cpu", "--model", "llama-2-7b"], "--model must be a size that this machine can train"),
        (["--model", "nothing.json"], "--model must be a config file that exists"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, said):
    code, out, err = run("--seq-len", "4096", *arguments) if "--seq-len" not in arguments else run(*arguments)

    assert (code, out) == (2, "")
    assert err.startswith(f"anchor-attn: {said}")
    assert err.count("\n") == 1
