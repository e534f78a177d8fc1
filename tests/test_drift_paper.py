"""The paper's D and D_logit: its definitions, its weights, its protocol, and what is said of its claims."""

import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from anchor_attn.drift.paper.claims import BF16, FOUND, FP32, NOT_FOUND, UNMEASURED, UNSEEN, judge_paper
from anchor_attn.drift.paper.measure import DELTAS1, LENGTHS, measure_paper, random_sequences
from anchor_attn.drift.paper.report import MEASURES, PaperReport
from anchor_attn.drift.policies import FP64, POLICIES, Policy, multiply, rotate
from anchor_attn.drift.states import States, random_states

SMALL = {"length": 48, "lengths": (16, 32, 48), "deltas1": (0, 16, 20)}


def measured(count: int = 3, **asked: object) -> PaperReport:
    return measure_paper(random_sequences(count, 48, 16, 2), **(SMALL | asked))  # type: ignore[arg-type]


# --- the definitions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [BF16, FP32, "fp64"])
def test_d_is_the_difference_of_each_column_over_the_queries_that_see_it(name: str) -> None:
    states, policy, length = random_states(48, 16), POLICIES[name], 32

    def at(shift: int) -> tuple[torch.Tensor, torch.Tensor]:
        where = torch.arange(length) + shift
        query, key = (rotate(x[0, :, :length], where, states, policy) for x in (states.query, states.key))
        scores = multiply(query, key, states.score_scale, policy)[0]
        hidden = torch.ones(length, length).triu(1).bool()
        masked = scores.masked_fill(hidden, -torch.inf).to(torch.float64 if policy == FP64 else torch.float32)
        return scores, masked.softmax(-1).double()

    (scores1, one), (scores2, two) = at(20), at(16)
    weights = 1 / torch.arange(length, 0, -1, dtype=torch.float64)  # 1/L of the first key … 1 of the last
    (record,) = measure_paper([states], length=length, lengths=(), deltas1=[20]).select(policy=name)
    assert record.d_signed == pytest.approx(float((weights * (one - two).sum(0)).sum()), rel=1e-9, abs=1e-17)
    assert record.d_abs == pytest.approx(float((weights * (one - two).abs().sum(0)).sum()), rel=1e-9)
    assert record.d_logit_signed == pytest.approx(float((scores1 - scores2)[:, 0].mean()), rel=1e-9, abs=1e-17)
    assert record.d_logit_abs == pytest.approx(float((scores1 - scores2)[:, 0].abs().mean()), rel=1e-9)
    first = float((one - two)[:, 0].abs().mean())
    assert record.first_token_share == pytest.approx(first / record.d_abs, rel=1e-9)


def test_equal_shifts_give_exactly_nothing_in_any_precision() -> None:
    report = measured(policies=None)
    for record in report.select(delta1=16):
        assert (record.d_signed, record.d_abs, record.d_logit_signed, record.d_logit_abs) == (0, 0, 0, 0)
        assert record.first_token_share is None
    assert all(record.d_abs > 0 for record in report.select(delta1=20))


def test_float64_shows_nothing_but_its_own_last_bits() -> None:
    report = measured(deltas1=DELTAS1)
    for record in report.select(policy="fp64"):
        assert max(record.d_abs, record.d_logit_abs, abs(record.d_signed)) <= 1e-14
        assert record.d_abs == record.d_abs_floor
    for record in report.select(policy=BF16):
        assert record.delta1 == 16 or record.d_abs > 1e-4 > 1e-14 > record.d_abs_floor > 0


def test_an_error_on_one_key_shows_at_that_key_and_nowhere_else() -> None:
    states = random_states(48, 16)
    key = torch.zeros_like(states.key)
    key[:, :, 5] = states.key[:, :, 5]  # a key of zeros is rotated without error
    report = measure_paper([replace(states, key=key)], length=48, lengths=(), deltas1=[0])
    (profile,) = (profile for profile in report.profiles if profile.policy == BF16)
    assert [place for place, size in enumerate(profile.score_abs) if size] == [5]
    # The softmax hands the change on to its rows, all of which see key 5: none of the queries before it.
    largest = max(range(48), key=lambda place: profile.attention_abs[place] * (48 - place))
    assert largest == 5
    (record,) = report.select(policy=BF16)
    assert record.d_logit_abs == 0  # of the first key
    first = key.roll(-5, dims=2)
    (record,) = measure_paper([replace(states, key=first)], length=48, lengths=(), deltas1=[0]).select(policy=BF16)
    assert record.d_logit_abs > 1e-4


def test_columns_add_up_to_d_and_without_their_weights_to_nothing() -> None:
    report = measured()
    assert {(profile.length, profile.delta1) for profile in report.profiles} == {(48, 0)}
    for profile in report.profiles:
        (record,) = report.select(length=48, delta1=0, policy=profile.policy)
        assert sum(profile.attention_abs) == pytest.approx(record.d_abs, rel=1e-9)
        assert sum(profile.attention_signed) == pytest.approx(record.d_signed, rel=1e-9, abs=1e-17)
        assert profile.score_abs[0] == pytest.approx(record.d_logit_abs, rel=1e-9)
        unweighted = [value * (48 - place) for place, value in enumerate(profile.attention_signed)]
        assert abs(sum(unweighted)) < 1e-6 < sum(map(abs, unweighted)) or profile.policy != BF16
        assert profile.attention_abs[0] == pytest.approx(record.first_token_share * record.d_abs)  # type: ignore[operator]
    keys = list(report.profiles[0].records())
    assert [line["key"] for line in keys] == list(range(48))


# --- relations --------------------------------------------------------------------------------------------------------


def test_the_front_of_a_long_sequence_is_a_short_one() -> None:
    states = random_states(48, 16)
    front = replace(states, query=states.query[:, :, :20], key=states.key[:, :, :20])
    long, short = (measure_paper([each], length=20, lengths=(8, 20), deltas1=[0, 3]) for each in (states, front))
    assert long.records == short.records


def test_blocks_and_shifts_held_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sums in float32 depend on their order, and so on the size of a block.
    policies = [Policy("bf16_storage", storage="bfloat16")]
    whole = measured(policies=policies)
    monkeypatch.setattr("anchor_attn.drift.parts.BLOCK_PAIRS", 48 * 5)
    monkeypatch.setattr("anchor_attn.drift.paper.measure.HELD_BYTES", 1)
    for record, other in zip(whole.records, measured(policies=policies).records, strict=True):
        assert other.d_abs == pytest.approx(record.d_abs, rel=1e-9)
        assert other.d_signed == pytest.approx(record.d_signed, rel=1e-9, abs=1e-15)
        assert other.d_logit_abs == pytest.approx(record.d_logit_abs, rel=1e-9)


def test_rows_of_a_batch_are_sequences_of_their_own() -> None:
    alone = list(random_sequences(3, 48, 16, 2))
    together = replace(
        alone[0],
        query=torch.cat([states.query for states in alone]),
        key=torch.cat([states.key for states in alone]),
    )
    one, other = (measure_paper(given, **SMALL) for given in (alone, [together]))  # type: ignore[arg-type]
    assert one.records == other.records
    assert one.settings["sequences"] == 3


def test_a_sequence_is_let_go_before_the_next_but_one_is_taken() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def counted() -> Iterator[list[States]]:
        for states in random_sequences(5, 48, 16):
            assert sum(reference() is not None for reference in alive) <= 1
            alive.append(weakref.ref(states.query))
            yield [states]
            del states

    assert measure_paper(counted(), **SMALL).settings["sequences"] == 5  # type: ignore[arg-type]


def test_layers_stand_beside_their_mean() -> None:
    sequences = [
        [replace(random_states(48, 16, seed=10 * n + layer), layer=layer) for layer in (2, 5)] for n in (1, 2, 3)
    ]
    report = measure_paper(sequences, **SMALL)  # type: ignore[arg-type]
    asked = {"policy": BF16, "length": 48, "delta1": 0}
    (mean,), (two,), (five,) = (report.select(layer=layer, **asked) for layer in (None, 2, 5))
    assert mean.d_abs == pytest.approx((two.d_abs + five.d_abs) / 2)
    assert two.d_abs != five.d_abs
    assert len(report.records) == 3 * len(report.select())


def test_all_queries_asked_for_by_number_are_all_queries_and_fewer_are_near() -> None:
    whole, named, some = (
        measure_paper(random_sequences(4, 256, 16), length=256, lengths=(), deltas1=[0], queries=queries)
        for queries in (None, 256, 64)
    )
    assert whole.records == named.records
    assert some.select(policy=BF16)[0].d_abs == pytest.approx(whole.select(policy=BF16)[0].d_abs, rel=0.2)


def test_the_protocol_is_that_of_figure_1_and_below_three_sequences_there_is_no_interval() -> None:
    assert (len(DELTAS1), LENGTHS[0], LENGTHS[-1]) == (19, 64, 8192)
    report = measured(2)
    assert {record.delta1 for record in report.select(length=48)} == {0, 16, 20}
    assert {record.delta1 for record in report.select(length=16)} == {0}
    assert {record.policy for record in report.records} == {BF16, FP32, "fp64"}
    assert all(record.d_abs_interval is None for record in report.records)
    assert all(record.d_abs_interval is not None for record in measured(3).records)
    assert measured(3) == measured(3)


# --- the claims -------------------------------------------------------------------------------------------------------


def pretended(
    d_abs: dict[str, list[float]], growth: float = 0.0, first: float = 0.1, random: float = 1.0
) -> PaperReport:
    """A report in which each length doubles D_logit by 2^growth, and the first token has that share."""
    per_sequence = {}
    for policy, values in d_abs.items():
        for length in (64, 128, 256):
            size = (length / 64) ** growth
            row = {"d_abs": 1.0, "d_logit_abs": size, "first_token_d_abs": first, "first_token_attention": 0.05}
            per_sequence[length, 0, policy] = torch.tensor(
                [[random * value * row.get(name, 0.0) for name in MEASURES] for value in values]
            )
    settings = {"length": 256, "lengths": [64, 128, 256], "deltas1": [0, 16], "delta2": 16, "lengths_delta1": 0}
    return PaperReport((), (), per_sequence, settings)


NOISY = [1.0, 1.1, 0.9, 1.05]


@pytest.mark.parametrize(
    ("left", "verdict"), [(0.01, FOUND), (0.5, NOT_FOUND), (1.0, UNSEEN), (2.0, NOT_FOUND)], ids=str
)
def test_float32_removes_it_when_little_is_left(left: float, verdict: str) -> None:
    fp32 = [left * value for value in (1.05, 1.0, 0.95, 1.1)]
    assert judge_paper(pretended({BF16: NOISY, FP32: fp32}))[0].verdict == verdict


@pytest.mark.parametrize(("growth", "verdict"), [(0.5, FOUND), (-0.5, NOT_FOUND)])
def test_it_grows_when_every_length_shows_more(growth: float, verdict: str) -> None:
    claim = judge_paper(pretended({BF16: NOISY, FP32: NOISY}, growth=growth))[1]
    assert claim.verdict == verdict
    assert f"{100 * (2**growth - 1):.3g}" in claim.numbers


@pytest.mark.parametrize(("share", "verdict"), [(0.9, FOUND), (0.05, NOT_FOUND), (0.5, UNSEEN)])
def test_the_first_token_carries_most_when_it_has_more_than_half(share: float, verdict: str) -> None:
    report = pretended({BF16: [1.0, 1.0, 1.0], FP32: NOISY[:3]}, first=share)
    if share == 0.5:  # not all alike
        report.per_sequence[256, 0, BF16][:, MEASURES.index("first_token_d_abs")] += torch.tensor([0.1, -0.1, 0.0])
    assert judge_paper(report)[2].verdict == verdict


@pytest.mark.parametrize(("random", "verdict"), [(0.1, FOUND), (10.0, NOT_FOUND), (1.0, UNSEEN)])
def test_training_amplifies_it_when_random_weights_show_less(random: float, verdict: str) -> None:
    arms = {BF16: NOISY, FP32: NOISY}
    assert judge_paper(pretended(arms), pretended(arms, random=random))[3].verdict == verdict


def test_what_was_not_measured_and_what_two_sequences_say_is_not_judged() -> None:
    assert [claim.verdict for claim in judge_paper(measured(policies=["exact"]))] == [UNMEASURED] * 3
    two, one = measured(2), measured(1)
    assert {claim.verdict for claim in judge_paper(two, two)} == {"cannot be told from 2 sequences"}
    assert {claim.verdict for claim in judge_paper(one)} == {"cannot be told from 1 sequence"}
    assert {claim.verdict for claim in judge_paper(measured(3), two)[3:]} == {"cannot be told from 2 sequences"}
    assert "no interval below 3" in judge_paper(measured(2))[0].numbers


def test_of_random_states_float32_removes_it_and_the_first_token_carries_little() -> None:
    claims = judge_paper(measure_paper(random_sequences(4, 128), length=128, lengths=(32, 64, 128), deltas1=[0, 17]))
    assert [claims[0].verdict, claims[2].verdict] == [FOUND, NOT_FOUND]
    assert str(claims[0]).startswith("float32 removes it: found.")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="sequences must hold one at least"):
        measure_paper([])
    with pytest.raises(ValueError, match="as long as the greatest length, 8,192 tokens, got 48 in sequence 1"):
        measure_paper(random_sequences(1, 48))
    with pytest.raises(ValueError, match="deltas1 and delta2 must not be negative, got -1"):
        measured(deltas1=[-1])
    with pytest.raises(ValueError, match="lengths must be at least 2 tokens, got 1"):
        measured(lengths=[1])
    with pytest.raises(ValueError, match="must name one measurement"):
        measured(lengths=[], deltas1=[])
    with pytest.raises(ValueError, match="exact in float64"):
        measured(deltas1=[2**30])
    with pytest.raises(TypeError, match="deltas1 must be an integer"):
        measured(deltas1=[0.5])
    states = random_states(48, 16)
    with pytest.raises(ValueError, match="sequences must have the same layers"):
        measure_paper([[states], [states, states]], **SMALL)  # type: ignore[arg-type]
