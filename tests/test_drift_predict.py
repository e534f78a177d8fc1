"""What rounding is expected to cause against what it does cause: no policy, stage or key is off by a factor of 2."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_attn import PackedLayout
from anchor_attn.drift import POLICIES, Policy, States, measure_drift, random_states
from anchor_attn.drift.policies import DTYPES, STAGES, rotate, rounded
from anchor_attn.drift.predict import predict_drift
from anchor_attn.drift.rounding import spacing
from anchor_attn.drift.view import View
from anchor_attn.rope import inverse_frequencies

SHIFTS = (16, 1_000, 30_000, 130_000, 1_000_000, 4_000_000)
WITHIN = 2.0
ROUNDINGS = tuple(DTYPES)


def random_heads(seq_len=256, head_dim=64, theta=1e4, heads=1, key_heads=1, **changes):
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, n, seq_len, head_dim, generator=draw).bfloat16() for n in (heads, key_heads))
    return States(query, key, **{"inv_freq": inverse_frequencies(head_dim, theta), **changes})


def captured_like(seq_len=160, head_dim=64, theta=5e5):
    """As of models: means far from 0, two numbers of the key that dwarf the rest, and a first token of its own."""
    states = random_heads(seq_len, head_dim, theta, heads=2)
    draw = torch.Generator().manual_seed(1)
    query, key = states.query.float(), states.key.float()
    query = query + 2 * torch.randn(1, 2, 1, head_dim, generator=draw)
    key = key + 3 * torch.randn(1, 1, 1, head_dim, generator=draw)
    key[..., [5, head_dim // 2 + 30]] += torch.tensor([40.0, -25.0])  # of a fast pair and of a slow one
    key[:, :, 0] *= 0.05
    return replace(states, query=query.bfloat16(), key=key.bfloat16())


def measured(states, policies=None, shifts=SHIFTS, queries=64, stages=False, **options):
    return measure_drift(states=states, policies=policies, shifts=shifts, queries=queries, stages=stages, **options)


def assert_predicted(record, within=WITHIN):
    """Where float64 itself cannot see less than its floor, the floor is what is expected."""
    expected = max(record.predicted, record.floor)
    assert expected / within < record.mean_abs < expected * within, (expected / record.mean_abs, record)


def assert_all_predicted(report, within=WITHIN, fewest=1):
    records = [record for record in report.records if record.predicted is not None and record.pairs >= fewest]
    assert {record.by for record in records} == {"all", "head", "key"}
    for record in records:
        assert_predicted(record, within)


# --- every policy, stage, shift and key ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default():
    """Random states of 512 tokens, all policies, stages and shifts."""
    return measure_drift(states=random_states(512), queries=64)


def test_every_policy_and_every_key_is_predicted_at_every_shift(default):
    assert_all_predicted(default)


def test_whole_policies_are_predicted_within_a_tenth(default):
    for record in default.select():
        if record.policy != "bf16_angles":  # at 1M all of 512 positions are one bfloat16
            assert_predicted(record, within=1.1)


def test_every_stage_alone_is_predicted(default):
    stages = [record for stage in STAGES[:-1] for record in default.select(stage=stage)]
    assert len(stages) == sum(len(policy.stages) - 1 for policy in POLICIES.values() if policy.stages) * len(SHIFTS)
    for record in stages:
        assert_predicted(record, within=1.2)
        assert record.mean_abs > record.floor


def test_what_is_not_a_score_of_all_keys_or_a_head_is_not_predicted(default):
    for record in default.records:
        is_predicted = record.level == "scores" and record.by in ("all", "key", "head") and record.stage != "softmax"
        if record.stage == "softmax":  # behind the scores: what is left is float64's own
            continue
        assert (record.predicted is not None) == is_predicted, record


@pytest.mark.parametrize("theta", [1e4, 5e5, 5e6, 5e7])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_base_and_head_size_is_predicted(theta, head_dim):
    assert_all_predicted(measured(random_heads(128, head_dim, theta)), fewest=64)


LAYOUTS = {
    "interleaved": {"interleaved": True},
    "partial": {"inv_freq": inverse_frequencies(32, 1e4)},
    "in the middle": {"inv_freq": inverse_frequencies(16, 1e4), "rotary_start": 8},
    "attention factor": {"attention_factor": 1.28, "scale": 0.3},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_a_head_is_predicted(changes):
    changes = dict(changes)
    dtype = changes.pop("dtype", torch.bfloat16)
    states = random_heads(heads=4, key_heads=2, seq_len=160, **changes)
    if dtype == torch.float32:
        draw = torch.Generator().manual_seed(2)
        states = replace(
            states,
            query=torch.randn(states.query.shape, generator=draw),
            key=torch.randn(states.key.shape, generator=draw),
        )
    assert_all_predicted(measured(states, shifts=(16, 130_000)), fewest=64)


@pytest.mark.parametrize("theta", [1e4, 5e5, 5e7])
def test_large_means_outliers_and_a_small_first_key_are_predicted(theta):
    report = measured(captured_like(theta=theta))
    assert_all_predicted(report)
    first, rest = (report.select(by="key", policy="exact", shift=16)[place] for place in (0, -1))
    assert rest.predicted > 10 * first.predicted  # and that the keys differ is seen


@pytest.mark.parametrize("position_policy", ["continuous", "reset"])
def test_documents_and_rows_that_differ_are_predicted(position_policy):
    states = random_heads(seq_len=200)
    states = replace(states, query=states.query.repeat(2, 1, 1, 1), key=states.key.repeat(2, 1, 1, 1).flip(2))
    layout = PackedLayout.from_lengths([[60, 139], [20, 100, 79]])
    report = measured(
        states, shifts=(16, 30_000), queries=None, layout=layout, pattern="anchor", position_policy=position_policy
    )
    assert_all_predicted(report, fewest=64)


policies = st.builds(Policy, st.just("drawn"), *(st.sampled_from(ROUNDINGS) for _ in STAGES[:-1]))


@settings(max_examples=12, deadline=None)
@given(policies, st.sampled_from([16, 1_000, 30_000]), st.sampled_from([1e4, 5e6]))
def test_any_policy_is_predicted(policy, shift, theta):
    states = random_heads(seq_len=128, theta=theta)
    assert_all_predicted(measured(states, [policy], [shift], queries=None), fewest=128)


# --- what the model says ---------------------------------------------------------------------------------------------


def test_float32_angles_err_in_proportion_to_the_position_as_predicted():
    shifts = [30_011 * 2**power for power in range(8)]
    report = measured(random_states(1024), [Policy("angles", angles="float32")], shifts)
    records = report.select(policy="angles")
    for record, twice in pairwise(records):
        assert twice.mean_abs / record.mean_abs == pytest.approx(2, rel=0.10)
        assert twice.predicted / record.predicted == pytest.approx(2, rel=0.10)
    for record in records:
        assert record.predicted == pytest.approx(record.mean_abs, rel=0.25)


def test_bfloat16_angles_saturate_as_predicted():
    report = measured(random_states(512), [Policy("angles", angles="bfloat16")], (2**17, 2**20, 2**23))
    records = report.select(policy="angles")
    assert records[-1].mean_abs < 1.5 * records[0].mean_abs  # and do not grow by 64
    for record in records:
        assert record.predicted == pytest.approx(record.mean_abs, rel=0.2)


def test_what_was_rounded_already_is_not_rounded_again():
    states, view = random_heads(), View.of(random_heads())
    rotated = predict_drift(states, Policy("a", rotation="bfloat16"), 1_000, view)
    for storage in ("bfloat16", "float16", "float32"):
        assert predict_drift(states, Policy("b", rotation="bfloat16", storage=storage), 1_000, view) == rotated
    stored = predict_drift(states, Policy("c", storage="bfloat16"), 1_000, view)
    assert 1e-3 < stored.mean_abs < rotated.mean_abs


def test_a_stage_alone_is_the_policy_that_is_float64_elsewhere():
    states = random_heads()
    alone = predict_drift(states, "bf16_cos_sin", 1_000, stage="table")
    assert alone == predict_drift(states, Policy("mine", table="bfloat16"), 1_000)
    assert alone != predict_drift(states, "bf16_cos_sin", 1_000)
    assert alone.mean_abs < alone.rms < 1.5 * alone.mean_abs


def test_records_carry_the_prediction_of_their_policy_and_key():
    states = captured_like()
    prediction = predict_drift(states, "bf16_cos_sin", 30_000, View.of(states, queries=64))
    report = measured(states, shifts=[30_000])
    assert report.at("bf16_cos_sin", 30_000).predicted == prediction.mean_abs == prediction.all.mean_abs
    for record in report.select(by="key", policy="bf16_cos_sin"):
        assert record.predicted == prediction.keys[record.low].mean_abs
    for record in report.select(by="head", policy="bf16_cos_sin"):
        assert record.predicted == prediction.heads[record.low].mean_abs
    assert report.at("bf16_cos_sin", 30_000).rms == pytest.approx(prediction.rms, rel=0.5)


def test_nothing_is_rounded_but_positions_and_frequencies(monkeypatch):
    asked, policies = [], set()

    def seen(x, rounding):
        asked.append(tuple(x.shape))
        return rounded(x, rounding)

    def turned(x, position_ids, states, policy):
        policies.add(policy.name)
        return rotate(x, position_ids, states, policy)

    monkeypatch.setattr("anchor_attn.drift.rounding.rounded", seen)
    monkeypatch.setattr("anchor_attn.drift.rounding.rotate", turned)
    predict_drift(random_heads(), "bf16_angles", 16)
    assert policies == {"fp64"}
    assert {len(shape) for shape in asked} == {1, 2}
    assert {shape for shape in asked if len(shape) == 1} == {(32,)}


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_spacing_is_that_of_the_formats_neighbours(rounding):
    values = torch.tensor([1.0, 1.5, 300.0, 0.007, -5.0, 2.0**-20, 0.0], dtype=torch.float64)
    gaps = spacing(values, rounding)
    assert gaps[-1] == 0
    for value, gap in zip(values[:-1], gaps[:-1], strict=True):
        held = rounded(value[None].abs(), rounding).double()
        assert rounded(held + gap, rounding).double() == held + gap
        assert rounded(held + gap / 4, rounding).double() == held
