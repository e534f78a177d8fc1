"""Drift: the design's table, the pipeline against one in complex float64, and sums against sums over a dense matrix."""

import dataclasses
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts, quick

from anchor_attn import PackedLayout
from anchor_attn.drift import POLICIES, Policy, States, measure_drift, memory, parts, random_states
from anchor_attn.drift.measure import checked_shifts
from anchor_attn.drift.policies import FP64, STAGES, multiply, read, rotate, rounded, weigh
from anchor_attn.drift.spectrum import pair_contributions
from anchor_attn.drift.tally import Bins, Pairs, Tallies
from anchor_attn.drift.view import View, count_queries
from anchor_attn.masks import dense_mask
from anchor_attn.rope import apply_rotary, inverse_frequencies, rotary_table

SHIFTS = (16, 1_000, 30_000, 130_000, 1_000_000, 4_000_000)
# Mean |score at Δ − score at 0|, all queries × all keys of 2,048 random ones, D = 128, base 1e4.
TABLE = {
    "bf16_angles": (3.8e-1, 5.3e-1, 7.8e-1, 9.0e-1, None, None),
    "bf16_cos_sin": (4.2e-3, 4.3e-3, 4.3e-3, 4.4e-3, 7.2e-3, 2.3e-2),
    "fp32_rotation": (2.6e-3, 2.6e-3, 2.6e-3, 2.7e-3, 6.3e-3, 2.3e-2),
    "exact": (2.6e-3, 2.6e-3, 2.6e-3, 2.6e-3, 2.6e-3, 2.6e-3),
    "fp32": (9.8e-6, 1.4e-5, 1.8e-4, 7.3e-4, 5.7e-3, 2.3e-2),
}
FLOOR = 1e-14
# Nothing but one rounding, so that what float64 does behind it is the same in any order.
STORED = Policy("stored", storage="bfloat16")
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def some_states(seq_len=40, head_dim=16, heads=4, key_heads=2, rows=1, seed=0, dtype=torch.bfloat16, **changes):
    """Random, with several heads of query to one of key."""
    draw = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(rows, n, seq_len, head_dim, generator=draw).to(dtype) for n in (heads, key_heads))
    return States(query, key, **{"inv_freq": inverse_frequencies(head_dim, 10_000.0), **changes})


def measured(states, policies=("exact",), shifts=(1_000,), queries=None, stages=False, **options):
    return measure_drift(states=states, policies=policies, shifts=shifts, queries=queries, stages=stages, **options)


def by_place(report):
    """All figures of a report, by what they are of."""
    keys = ("level", "policy", "stage", "shift", "layer", "by", "low", "high")
    return {
        tuple(getattr(record, name) for name in keys): (
            record.pairs,
            record.mean_abs,
            record.max_abs,
            record.rms,
            record.mean_value,
            record.floor,
            record.predicted,
        )
        for record in report.records
    }


def assert_close(report, other, but=()):
    """To 1e-12, or to what float64 leaves behind when it sums in another order."""
    one, two = by_place(report), by_place(other)
    assert one.keys() == two.keys()
    for name in one:
        if name[5] not in but:
            assert one[name][:5] == pytest.approx(two[name][:5], rel=1e-12, abs=1e-14), name


# --- the design's table ----------------------------------------------------------------------------------------------


def assert_the_table(report):
    for policy, row in TABLE.items():
        for shift, expected in zip(SHIFTS, row, strict=True):
            if expected is not None:
                assert report.at(policy, shift).mean_abs == pytest.approx(expected, rel=0.10), (policy, shift)
    for shift in SHIFTS:
        assert report.at("fp64", shift).mean_abs < FLOOR


@pytest.fixture(scope="module")
def report():
    """The default run, of fewer queries."""
    return measure_drift(queries=64, stages=False)


def test_random_states_show_the_designs_table(report):
    assert_the_table(report)


@pytest.mark.slow
def test_with_no_argument_it_is_the_designs_table():
    assert_the_table(measure_drift())


def test_the_floor_is_below_1e_14_of_every_head_key_and_distance(report):
    assert all(record.floor < FLOOR for record in report.records)
    assert {record.policy for record in report.records} == set(POLICIES)


def test_exact_angles_do_not_drift_further_as_positions_grow(report):
    near, far = (report.at("exact", shift).mean_abs for shift in (16, 4_000_000))
    assert far == pytest.approx(near, rel=0.03)
    assert report.at("fp32", 4_000_000).mean_abs > 1_000 * report.at("fp32", 16).mean_abs


def test_shares_of_heads_keys_distances_and_pairs_are_whole(report):
    for by in ("head", "key", "distance", "pair"):
        for policy in POLICIES:
            shares = [record.share for record in report.select(by=by, policy=policy, shift=16)]
            assert sum(shares) == pytest.approx(1)


def test_two_runs_of_a_seed_are_bit_equal_and_another_seed_is_not():
    one, two, other = (
        measure_drift(policies=["bf16_cos_sin", "fp32"], shifts=[16], queries=8, seed=seed) for seed in (3, 3, 4)
    )
    assert one.records == two.records
    assert one.records != other.records


# --- the pipeline ----------------------------------------------------------------------------------------------------


def scores_in_complex_float64(states, position_ids):
    """[B, H, S, S]: pairs as complex numbers, turned by e^(i · position · frequency)."""
    turn = torch.polar(
        torch.ones(()).double() * states.attention_factor, position_ids[:, None] * states.inv_freq.double()
    )
    start, stop = states.rotary_start, states.rotary_start + 2 * len(states.inv_freq)

    def turned(x):
        x = x.double()
        part = x[..., start:stop]
        first, second = (part[..., ::2], part[..., 1::2]) if states.interleaved else part.chunk(2, -1)
        return torch.complex(first, second) * turn, torch.cat((x[..., :start], x[..., stop:]), -1)

    repeats = states.query.shape[1] // states.key.shape[1]
    (query, passed), (key, kept) = turned(states.query), turned(states.key.repeat_interleave(repeats, 1))
    return ((query @ key.mH).real + passed @ kept.mT) * states.score_scale


LAYOUTS = {
    "halves": {},
    "interleaved": {"interleaved": True},
    "partial": {"inv_freq": inverse_frequencies(8, 10_000.0)},
    "in the middle": {"inv_freq": inverse_frequencies(8, 10_000.0), "rotary_start": 4},
    "scaled": {"attention_factor": 1.28, "scale": 0.5, "interleaved": True},
}


# Of the largest score; all others hold what bfloat16 and float16 do.
HELD_BITS = {"bf16_angles": 1, "tf32": 9, "fp32": 19, "exact_fp32": 19, "fp64": 50}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
@every_policy
def test_scores_are_those_of_complex_float64_but_for_the_rounding(changes, policy):
    states = some_states(**changes)
    position_ids = torch.arange(40) + 100
    query, key = (rotate(x[0], position_ids, states, policy) for x in (states.query, states.key))
    scores = multiply(query, key.repeat_interleave(2, 0), states.score_scale, policy)
    oracle = scores_in_complex_float64(states, position_ids)[0]
    error = float((scores - oracle).abs().max() / oracle.abs().max())
    bits = HELD_BITS.get(policy.name, 6)
    assert error < 2.0**-bits
    if policy != FP64:
        assert error > 1e-9  # something was rounded


@pytest.mark.parametrize(
    ("name", "precision"), [("bf16_cos_sin", "bfloat16"), ("fp32_rotation", "float32"), ("exact", "exact")]
)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotated_states_are_those_of_the_library_to_the_bit(name, precision, interleaved):
    states = some_states(interleaved=interleaved, seq_len=200, head_dim=64, inv_freq=inverse_frequencies(48, 5e5))
    position_ids = torch.arange(200) + 1_000_000
    x = states.query if precision == "bfloat16" else states.query.float()
    cos, sin = rotary_table(position_ids[None], states.inv_freq, precision, x.dtype)
    theirs = apply_rotary(x, cos, sin, precision, interleaved)[0].bfloat16()
    assert torch.equal(rotate(states.query[0], position_ids, states, POLICIES[name]), theirs)


def test_long_states_are_rotated_in_stretches_as_at_once(monkeypatch):
    states = some_states(seq_len=300)
    at_once = rotate(states.query[0], torch.arange(300), states, POLICIES["fp32"])
    monkeypatch.setattr("anchor_attn.drift.policies.STRETCH", 7)
    assert torch.equal(rotate(states.query[0], torch.arange(300), states, POLICIES["fp32"]), at_once)


def test_tf32_keeps_eleven_bits_rounded_to_nearest_even():
    ulp = 2.0**-10
    given = torch.tensor([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + 0.51 * ulp, -1 - 0.49 * ulp, 0.0])
    assert rounded(given, "tf32").tolist() == [1.0, 1 + 2 * ulp, 1 + ulp, -1.0, 0.0]


def test_a_narrow_accumulation_rounds_what_it_reads_and_the_score():
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 5, 8, generator=draw) for _ in range(2))
    scores = multiply(query, key, 1.0, Policy("p", accumulation="bfloat16"))
    assert torch.equal(scores, (query.bfloat16().float() @ key.bfloat16().float().mT).bfloat16().double())
    assert torch.equal(scores, scores.bfloat16().double())


def test_weights_are_a_softmax_with_the_sinks_share_left_out():
    draw = torch.Generator().manual_seed(0)
    scores, sinks = torch.randn(2, 5, 5, generator=draw).double(), torch.tensor([0.5, -1.0])
    visible = torch.ones(5, 5).tril().bool()
    visible[2] = False
    weights = weigh(scores, visible, FP64, sinks)
    expected = scores.exp() * visible
    expected = expected / (expected.sum(-1, keepdim=True) + sinks.double().exp()[:, None, None])
    assert torch.allclose(weights, expected, atol=1e-15, rtol=1e-12)
    assert not weigh(scores, visible, FP64)[:, 2].any()  # a query without keys
    low = weigh(scores, visible, Policy("p", softmax="bfloat16"), sinks)
    assert torch.equal(low, low.bfloat16().double())
    assert torch.allclose(low, weights, rtol=2e-2, atol=1e-3)


# --- figures against a dense matrix ----------------------------------------------------------------------------------


def dense_drift(states, policy, shift, layout, pattern, position_policy):
    """Visible pairs [B, S, S], and the drift of scores and of weights [B, H, S, S], at once."""
    visible = dense_mask(layout, pattern, states.sliding_window, keep_anchor=False)
    found = []
    for moved in (0, shift):
        both = [[], []]
        for row in range(states.query.shape[0]):
            position_ids = layout.position_ids(position_policy)[row].long() + moved
            query, key = (rotate(x[row], position_ids, states, policy) for x in (states.query, states.key))
            repeats = query.shape[0] // key.shape[0]
            scores = multiply(query, key.repeat_interleave(repeats, 0), states.score_scale, policy)
            capped = scores if states.softcap is None else states.softcap * (scores / states.softcap).tanh()
            both[0].append(scores)
            both[1].append(weigh(capped, visible[row], policy, states.sinks))
        found.append([torch.stack(level) for level in both])
    return visible, {level: (found[1][i] - found[0][i]).abs() for i, level in enumerate(("scores", "attention"))}


CASES = {
    "full": ({}, "full", "continuous"),
    "documents": ({}, "intra_doc", "continuous"),
    "anchor, reset": ({}, "anchor", "reset"),
    "softcap and sinks": ({"softcap": 0.7, "sinks": torch.tensor([1.0, 0.0, -1.0, 2.0])}, "anchor", "continuous"),
    "window": ({"sliding_window": 5}, "full", "continuous"),
    "window of documents": ({"sliding_window": 3}, "intra_doc", "reset"),
}


@pytest.mark.parametrize(("changes", "pattern", "positions"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("policy", ["bf16_cos_sin", "fp32"])
def test_figures_are_those_of_a_dense_matrix(changes, pattern, positions, policy):
    states = some_states(rows=2, seq_len=37, **changes)
    layout = PackedLayout.from_lengths([[9, 20], [3, 4, 16, 5]], seq_len=37)
    report = measured(states, [policy], layout=layout, pattern=pattern, position_policy=positions)
    visible, drift = dense_drift(states, POLICIES[policy], 1_000, layout, pattern, positions)
    distance = torch.arange(37)[:, None] - torch.arange(37)
    for level in ("scores", "attention"):
        for record in report.select(by="all", level=level, policy=policy):
            assert_figures(record, drift[level], visible[:, None].expand(2, 4, 37, 37))
        for by, place in (("key", torch.arange(37).expand(37, 37)), ("distance", distance)):
            records = report.select(by=by, level=level, policy=policy)
            for record in records:
                inside = visible & (place >= record.low) & (place <= record.high)
                assert_figures(record, drift[level], inside[:, None].expand(2, 4, 37, 37))
            assert sum(record.pairs for record in records) == 4 * int(visible.sum())
        for record in report.select(by="head", level=level, policy=policy):
            assert_figures(record, drift[level][:, record.low], visible)


def assert_figures(record, drift, which):
    chosen = drift[which]
    assert record.pairs == len(chosen)
    expected = (chosen.mean(), chosen.max(), chosen.square().mean().sqrt())
    assert (record.mean_abs, record.max_abs, record.rms) == pytest.approx([float(x) for x in expected], rel=1e-12)


@quick
@given(layouts(max_rows=1), st.sampled_from(["full", "intra_doc"]), st.integers(1, 3))
def test_sums_by_distance_and_by_key_are_those_of_single_pairs(layout, pattern, heads):
    if not layout.seq_len:
        return
    size = layout.seq_len
    visible = dense_mask(layout, pattern)[0][::2]
    rows = torch.arange(size)[::2]
    draw = torch.Generator().manual_seed(size)
    magnitudes = torch.rand(heads, len(rows), size, generator=draw).double() * visible
    bins = Bins.below(size)
    tallies = Tallies(heads, bins, bins, True)
    Pairs(visible, rows, bins, bins).tally(magnitudes, slice(0, heads), tallies)
    places = {"distance": rows[:, None] - torch.arange(size), "key": torch.arange(size).expand(len(rows), size)}
    for by, place in places.items():
        for index, (low, high) in enumerate(bins.bounds()):
            chosen = magnitudes[:, visible & (place >= low) & (place <= high)]
            sums = tallies.by[by]
            assert sums.count[index] == chosen.numel()
            assert float(sums.total[index]) == pytest.approx(float(chosen.sum()))
            assert float(sums.squares[index]) == pytest.approx(float(chosen.square().sum()))
            assert float(sums.largest[index]) == (float(chosen.max()) if chosen.numel() else 0.0)


@given(st.integers(1, 300))
def test_bins_are_powers_of_two_that_hold_every_number_once(size):
    bins = Bins.below(size)
    bounds = list(bins.bounds())
    assert [number for low, high in bounds for number in range(low, high + 1)] == list(range(size))
    for place, (low, high) in enumerate(bounds):
        assert set(bins.place(torch.arange(low, high + 1)).tolist()) == {place}
        assert high < 2 * max(low, 1)


@quick
@given(layouts(max_rows=2), st.sampled_from(["full", "intra_doc"]))
def test_a_view_and_its_sample_see_what_the_dense_mask_shows(layout, pattern):
    if not layout.seq_len:
        return
    states = some_states(rows=layout.batch_size, seq_len=layout.seq_len)
    view, mask = View.of(states, layout, pattern), dense_mask(layout, pattern)
    bins = Bins.below(layout.seq_len)
    for row in range(layout.batch_size):
        assert torch.equal(view.sees(row, view.rows), mask[row])
        sample = view.sample(row, bins, per_bin=3)
        assert mask[row][sample.queries, sample.keys].all()
        assert float(sample.weights.sum()) == pytest.approx(int(mask[row].sum()))
        assert torch.equal(bins.place(sample.keys), sample.bins)


# --- relations -------------------------------------------------------------------------------------------------------


def test_blocks_and_pieces_do_not_matter(monkeypatch):
    states = some_states(rows=2, heads=4, seq_len=50)
    policy = Policy("p", "float32", "bfloat16", "bfloat16", "bfloat16")  # float32 sums depend on a product's size
    at_once = measured(states, [policy], stages=True)
    monkeypatch.setattr(parts, "BLOCK_PAIRS", 170)
    monkeypatch.setattr(parts, "HELD_PAIRS", 900)
    pieces = [piece for part in parts.parts_of(states, View.of(states)) for piece in part.pieces()]
    assert len(pieces) > 8
    assert len(list(pieces[0].blocks())) > 1
    assert_close(measured(states, [policy], stages=True), at_once)


@every_policy
def test_shared_keys_are_repeated_keys(policy):
    states = some_states()
    repeated = replace(states, key=states.key.repeat_interleave(2, 1))
    assert measured(states, [policy]).records == measured(repeated, [policy]).records


def test_neighbouring_pairs_are_halves_in_another_order():
    states = some_states(interleaved=True)
    order = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2)))
    halves = replace(states, query=states.query[..., order], key=states.key[..., order], interleaved=False)
    assert_close(measured(states, [STORED]), measured(halves, [STORED]))


def test_where_the_rotated_part_begins_does_not_matter():
    states = some_states(inv_freq=inverse_frequencies(8, 10_000.0), rotary_start=4)
    front = replace(states, rotary_start=0, **{
        name: getattr(states, name)[..., [*range(4, 12), *range(4), *range(12, 16)]] for name in ("query", "key")
    })  # fmt: skip
    assert_close(measured(states, [STORED]), measured(front, [STORED]), but=["pair"])


def test_what_is_not_rotated_does_not_drift():
    states = some_states(inv_freq=inverse_frequencies(2, 10_000.0), dtype=torch.float32)
    frozen = replace(states, query=states.query.clone(), key=states.key.clone())
    frozen.query[..., :2] = 0
    assert measured(frozen, [STORED]).at("stored", 1_000).max_abs == 0
    assert measured(states, [STORED]).at("stored", 1_000).max_abs > 0


def test_a_row_of_reset_documents_is_each_of_them_alone():
    lengths = [7, 20, 13]
    states = some_states()
    layout = PackedLayout.from_lengths([lengths], anchor_tokens=0)
    row = measured(states, ["bf16_cos_sin"], layout=layout, pattern="intra_doc", position_policy="reset")
    starts = [0, 7, 27]
    alone = [
        measured(
            replace(states, query=states.query[:, :, a : a + n], key=states.key[:, :, a : a + n]), ["bf16_cos_sin"]
        )
        for a, n in zip(starts, lengths, strict=True)
    ]
    for level in ("scores", "attention"):
        whole = row.at("bf16_cos_sin", 1_000, level=level)
        each = [report.at("bf16_cos_sin", 1_000, level=level) for report in alone]
        assert whole.pairs == sum(record.pairs for record in each) == 4 * sum(n * (n + 1) // 2 for n in lengths)
        assert whole.mean_abs == pytest.approx(sum(r.mean_abs * r.pairs for r in each) / whole.pairs)
        assert whole.max_abs == max(record.max_abs for record in each)


def test_a_stage_alone_is_the_policy_that_is_float64_elsewhere():
    states = some_states()
    staged = measured(states, ["bf16_cos_sin"], stages=True)
    for stage in STAGES:
        rounding = getattr(POLICIES["bf16_cos_sin"], stage)
        alone = measured(states, [Policy("alone", **{stage: rounding})])
        for level in ("attention",) if stage == "softmax" else ("scores", "attention"):
            one, two = staged.at("bf16_cos_sin", 1_000, stage=stage, level=level), alone.at("alone", 1_000, level=level)
            assert dataclasses.replace(one, policy="", stage=None) == dataclasses.replace(two, policy="")


def test_every_stage_alone_is_measured_at_both_levels_but_the_softmax_which_is_behind_the_scores():
    report = measured(some_states(), ["bf16_cos_sin", "exact"], stages=True)
    for policy in ("bf16_cos_sin", "exact"):
        stages = set(POLICIES[policy].stages)
        for level, expected in (("scores", stages - {"softmax"}), ("attention", stages)):
            found = [r for r in report.records if r.stage and (r.policy, r.level) == (policy, level)]
            assert {record.stage for record in found} == expected
            assert {(record.by, record.share) for record in found if record.mean_abs} == {("all", 1.0)}
    softmax, storage = (
        report.at("exact", 1_000, stage=stage, level="attention").mean_abs for stage in ("softmax", "storage")
    )
    assert softmax < 1e-6 * storage


def test_a_softmax_in_bfloat16_acts_on_what_other_stages_moved_and_is_at_the_floor_alone():
    states = some_states(heads=1, key_heads=1)
    policy = Policy("narrow", storage="bfloat16", softmax="bfloat16")
    report = measured(states, [policy, STORED], stages=True)
    found = {name: report.at(name, 1_000, level="attention").mean_abs for name in ("narrow", "stored")}
    weights = []
    for moved in (0, 1_000):
        turned = []
        for x in (states.query[0, 0].double(), states.key[0, 0].double()):
            angles = (torch.arange(40) + moved)[:, None] * states.inv_freq.double()
            first, second = x.chunk(2, -1)
            cos, sin = angles.cos(), angles.sin()
            turned.append(torch.cat((first * cos - second * sin, second * cos + first * sin), -1).bfloat16().double())
        scores = (turned[0] @ turned[1].mT / 4).bfloat16().float()
        rows = [scores[row, : row + 1].softmax(0).bfloat16().double() for row in range(40)]
        weights.append(torch.cat(rows))
    assert found["narrow"] == pytest.approx(float((weights[1] - weights[0]).abs().mean()), rel=1e-9)
    assert found["narrow"] > 1.1 * found["stored"]
    alone = report.at("narrow", 1_000, stage="softmax", level="attention")
    assert alone.mean_abs < 10 * alone.floor


def test_a_softmax_alone_is_seen_where_scores_stand_between_two_numbers_of_its_format():
    between = 1 + 2.0**-24  # of 1 and its neighbour in float32: the last bit of float64 decides
    query = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 40, 2)
    states = States(query, query * between, torch.ones(1), scale=1.0)
    report = measured(states, [Policy("mine", softmax="float32")], stages=True)
    alone = report.at("mine", 1_000, stage="softmax", level="attention")
    assert alone.mean_abs > 10 * alone.floor
    assert not report.select(policy="mine", stage="softmax")


@pytest.mark.parametrize(
    ("seq_len", "count"), [(1, 1), (2_048, 512), (16_384, 512), (32_768, 256), (131_072, 64), (10**6, 64)]
)
def test_by_default_fewer_queries_of_a_longer_row_are_measured(seq_len, count):
    assert count_queries(seq_len, "by length") == count
    assert count_queries(seq_len, None) == seq_len
    assert count_queries(seq_len, 3) == min(3, seq_len)


def test_the_settings_say_how_many_queries_were_measured():
    report = measure_drift(states=some_states(seq_len=600, heads=1, key_heads=1), policies=["exact"], shifts=[16])
    assert report.settings["queries"] == 512
    assert measured(some_states(seq_len=40)).settings["queries"] == 40


def test_a_users_policy_is_measured_beside_the_known_ones():
    mine = Policy("mine", rotation="float16")
    report = measured(some_states(), [mine, "fp64", "fp32"], stages=True)
    assert list(report.settings["policies"]) == ["mine", "fp32", "fp64"]
    assert [record.stage for record in report.records if record.policy == "mine" and record.stage] == ["rotation"] * 2
    assert report.at("mine", 1_000).mean_abs > 100 * report.at("fp32", 1_000).floor


def test_only_so_many_queries_are_measured_and_the_last_is_among_them():
    assert View.of(some_states(), queries=3).rows.tolist() == [12, 25, 39]
    assert View.of(some_states(), queries=1).rows.tolist() == [39]
    assert measured(some_states(), queries=1).at("exact", 1_000).pairs == 4 * 40


def test_several_layers_are_measured_one_by_one():
    layers = [replace(some_states(seed=layer), layer=layer) for layer in (0, 3)]
    said = []
    report = measured(layers, say=said.append)
    assert said == ["layer 0", "layer 3"]
    assert report.at("exact", 1_000, layer=3) == measured(layers[1]).at("exact", 1_000)
    with pytest.raises(KeyError, match="2 records of policy 'exact'"):
        report.at("exact", 1_000)


# --- frequency pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("policy", [FP64, STORED, Policy("p", "float32", "bfloat16", "bfloat16", "bfloat16")], ids=str)
def test_what_frequency_pairs_add_is_the_drift_of_the_score(changes, policy):
    states = some_states(**changes)
    view = View.of(states)
    sample = view.sample(0, Bins.below(40), 8)
    position_ids = view.position_ids[0]
    for head in range(4):
        still, moved = (pair_contributions(states, policy, 0, head, position_ids + n, sample) for n in (0, 1_000))
        scores = []
        for ids in (position_ids, position_ids + 1_000):
            query, key = (rotate(x[0], ids, states, policy) for x in (states.query, states.key))
            scores.append(
                multiply(query[head], key[head // 2], states.score_scale, policy)[sample.queries, sample.keys]
            )
        assert torch.allclose((moved - still).sum(-1), scores[1] - scores[0], rtol=0, atol=2e-14)


def test_records_by_frequency_pair_have_a_sample_of_visible_pairs():
    states = some_states()
    records = measured(states, ["fp32", STORED], shifts=[1_000_000]).select(by="pair", policy="fp32")
    assert [(record.low, record.high) for record in records] == [(pair, pair) for pair in range(8)]
    assert {record.pairs for record in records} == {1024}
    # An angle's spacing grows with the angle: pair 0 is exact at a base's frequency of 1, and behind it each is finer.
    drift = [record.mean_abs for record in records]
    assert drift[1] > 5 * drift[3] > 5 * drift[5]
    view = View.of(states)
    sample = view.sample(0, Bins((0, 40)), 256)
    of_pairs = [
        (
            pair_contributions(states, POLICIES["fp32"], 0, head, view.position_ids[0] + 1_000_000, sample)
            - pair_contributions(states, POLICIES["fp32"], 0, head, view.position_ids[0], sample)
        )
        for head in range(4)
    ]
    assert drift == pytest.approx(torch.cat(of_pairs).abs().mean(0).tolist(), rel=1e-12)


# --- what is refused -------------------------------------------------------------------------------------------------

NORMAL = torch.zeros(1, 2, 8, 16)
FREQUENCIES = inverse_frequencies(16, 10_000.0)
REFUSED = {
    "query alone": (lambda: measure_drift(NORMAL), ValueError, "query and key must come together, got query alone"),
    "key alone": (lambda: measure_drift(key=NORMAL), ValueError, "query and key must come together, got key alone"),
    "states and query": (lambda: measure_drift(NORMAL, states=some_states()), ValueError, "states must come alone"),
    "no layer": (lambda: measure_drift(states=[]), ValueError, "states must hold one layer at least, got none"),
    "nan": (lambda: measure_drift(NORMAL, NORMAL / 0), ValueError, "key must be finite, got nan or inf; see"),
    "nan in a layer": (
        lambda: States(NORMAL * math.nan, NORMAL, FREQUENCIES, layer=3),
        ValueError,
        "query must be finite, got nan or inf in layer 3",
    ),
    "integers": (
        lambda: measure_drift(NORMAL.long(), NORMAL),
        TypeError,
        "query must be a floating tensor, got torch.int64",
    ),
    "a list": (lambda: States([1.0], NORMAL, FREQUENCIES), TypeError, "query must be a floating tensor, got list"),
    "another device": (
        lambda: States(NORMAL.to("meta"), NORMAL, FREQUENCIES),
        ValueError,
        "query must be on the CPU, got meta; move it with query.cpu()",
    ),
    "three dimensions": (
        lambda: measure_drift(NORMAL[0], NORMAL),
        ValueError,
        "query must have shape [B, H, S, D], got [2, 8, 16]; add the missing",
    ),
    "heads that do not divide": (
        lambda: measure_drift(NORMAL, NORMAL.repeat(1, 2, 1, 1)[:, :3]),
        ValueError,
        "with K dividing H, got [1, 2, 8, 16] and [1, 3, 8, 16]",
    ),
    "no tokens": (
        lambda: measure_drift(NORMAL[:, :, :0], NORMAL[:, :, :0]),
        ValueError,
        "query and key must have shapes",
    ),
    "cast frequencies": (
        lambda: measure_drift(NORMAL, NORMAL, inv_freq=FREQUENCIES.bfloat16()),
        ValueError,
        "inv_freq must be float32 [R/2], got torch.bfloat16 [8]",
    ),
    "too many frequencies": (
        lambda: measure_drift(NORMAL, NORMAL, inv_freq=torch.ones(9)),
        ValueError,
        "inv_freq must have at most 8 pairs for a head of 16, got 9",
    ),
    "no shift": (lambda: measure_drift(shifts=[]), ValueError, "shifts must be at least 1 each, got []"),
    "shift of 0": (lambda: measure_drift(shifts=[16, 0]), ValueError, "shifts must be at least 1 each, got [16, 0]"),
    "half a shift": (lambda: measure_drift(shifts=[1.5]), TypeError, "shifts must be"),
    "a far shift": (
        lambda: measure_drift(shifts=[2**29]),
        ValueError,
        "shifts must stay below 536,868,865 for 2,048 tokens, got 536,870,912",
    ),
    "a shift beyond float16": (
        lambda: measure_drift(policies=[Policy("half", angles="float16")], shifts=[65_000]),
        ValueError,
        "shifts must leave positions up to 65,504 for policy 'half', whose angles are float16, got 65,000",
    ),
    "an unknown policy": (lambda: measure_drift(policies=["bf16"]), ValueError, "policies must be among bf16_angles, "),
    "no policy": (lambda: measure_drift(policies=[3]), TypeError, "policies must be names or Policy, got int"),
    "a policy twice": (lambda: measure_drift(policies=["fp32", Policy("fp32")]), ValueError, "got 'fp32' twice"),
    "another floor": (
        lambda: measure_drift(policies=[Policy("fp64", table="float32")]),
        ValueError,
        "got 'fp64' twice",
    ),
    "an unknown rounding": (lambda: Policy("p", table="int8"), ValueError, "table must be rounded to one of"),
    "a layout of others": (
        lambda: measured(some_states(), layout=PackedLayout.from_lengths([[5]])),
        ValueError,
        "layout must describe 1 rows of 40 tokens, got 1 of 6",
    ),
    "shifts in words": (
        lambda: measure_drift(shifts="16"),
        TypeError,
        "shifts must be a sequence of integers, got '16'",
    ),
    "one shift": (lambda: measure_drift(shifts=16), TypeError, "shifts must be a sequence of integers, got 16; pass ["),
    "more tokens than exact positions": (
        lambda: checked_shifts([16], 900_000_000, [FP64]),
        ValueError,
        "seq_len must stay below 536,870,912 tokens, got 900,000,000",
    ),
    "queries in words": (lambda: measure_drift(queries="few"), TypeError, "queries must be an integer"),
    "no queries": (lambda: measure_drift(queries=0), ValueError, "queries must be at least 1, got 0"),
    "no heads": (lambda: random_states(num_heads=0), ValueError, "num_heads must be at least 1, got 0"),
    "beyond float16": (
        lambda: measured(replace(some_states(), query=torch.full((1, 4, 40, 16), 1e5)), ["fp16_cos_sin"]),
        ValueError,
        "states must stay finite under policy 'fp16_cos_sin', got nan scores at shift 1,000",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_refused(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_what_does_not_fit_into_memory_is_refused_before_it_is_drawn(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**30)
    said = (
        r"states must fit into memory, got ([\d,]+) tokens, which take [\d.]+ GiB of 1\.0 free; pass at most ([\d,]+)"
    )
    with pytest.raises(ValueError, match=said) as refused:
        random_states(10**12)
    fitting = int(re.search(said, str(refused.value))[2].replace(",", ""))
    memory.check_memory(fitting, 128, 1)
    with pytest.raises(ValueError, match=said):
        memory.check_memory(fitting + 1, 128, 1)


def test_given_states_that_cannot_be_measured_are_refused_too(monkeypatch):
    states = some_states()
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1_000)
    with pytest.raises(ValueError, match="states must fit into memory, got 40 tokens"):
        measured(states)
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)  # a machine that does not say
    measured(states)


def test_shifts_come_sorted_and_once():
    assert checked_shifts([1_000, 16, 16], 40, [FP64]) == (16, 1_000)


def test_read_is_what_is_multiplied_and_reading_twice_changes_nothing():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for policy in POLICIES.values():
        once = read(x, policy)
        assert torch.equal(read(once, policy), once)
