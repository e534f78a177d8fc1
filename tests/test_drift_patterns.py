"""Drift under full, intra_doc and anchor attention: parts add up, design is told from rounding, and the answer."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from anchor_attn.drift.pages.numbers import brief_ratio
from anchor_attn.drift.patterns.measure import measure_patterns
from anchor_attn.drift.patterns.report import Comparison, PatternReport
from anchor_attn.drift.pipelines import LEVELS
from anchor_attn.drift.policies import FP64, POLICIES, Policy, multiply, rotate
from anchor_attn.drift.states import States, random_states
from anchor_attn.masks import PackedLayout, dense_mask
from anchor_attn.masks.patterns import PATTERNS
from anchor_attn.rope.precision import inverse_frequencies

BF16 = "bf16_cos_sin"
LAYOUT = PackedLayout.from_lengths([[20, 13, 14], [9, 30]], seq_len=50)  # unequal rows, padding


def draw(layout: PackedLayout = LAYOUT, heads: int = 4, kv_heads: int = 2, seed: int = 0, **fields: object) -> States:
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(layout.batch_size, number, layout.seq_len, 16, generator=generator).bfloat16()
        for number in (heads, kv_heads)
    )
    return States(query, key, inverse_frequencies(16, 10_000.0), **fields)  # type: ignore[arg-type]


def measured(
    states: States | list[States] | None = None, layout: PackedLayout = LAYOUT, **asked: object
) -> PatternReport:
    settings = {"policies": [BF16], "shifts": [1000], "queries": None, **asked}
    return measure_patterns(draw(layout) if states is None else states, layout, **settings)  # type: ignore[arg-type]


def one(report: PatternReport, **fields: object) -> Comparison:
    wanted = {
        "position_policy": "continuous",
        "reference_position_policy": "continuous",
        "moved": "row",
        "policy": BF16,
    }
    (comparison,) = report.compare(**(wanted | fields))
    return comparison


# --- against the definition, spelled out over whole matrices ----------------------------------------------------------


def attended(states: States, positions: Tensor, policy: Policy, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and weights [B, H, S, S] by one softmax over everything."""
    scores = []
    for row, where in enumerate(positions):
        key = states.key[row].repeat_interleave(states.query.shape[1] // states.key.shape[1], dim=0)
        query = rotate(states.query[row], where, states, policy)
        scores.append(multiply(query, rotate(key, where, states, policy), states.score_scale, policy))
    both = torch.stack(scores)
    capped = both if states.softcap is None else states.softcap * torch.tanh(both / states.softcap)
    shares = capped.masked_fill(~visible[:, None], -torch.inf)
    if states.sinks is not None:
        shares = torch.cat((shares, states.sinks[None, :, None, None].expand(*shares.shape[:3], 1)), dim=-1)
    weights = shares.to(torch.float64 if policy == FP64 else torch.float32).softmax(-1).double()
    return both, weights[..., : both.shape[-1]]


def spelled_out(states: States, visible: Tensor, moved: str, level: str) -> Tensor:
    """What each pair counts, [B, H, S, S], zero but for queries of documents."""
    still = LAYOUT.position_ids().long()
    away = still + 1000 * (LAYOUT.document_ids > 0 if moved == "documents" else torch.ones_like(still))
    change = {}
    for policy in (POLICIES[BF16], FP64):
        before, after = (attended(states, where, policy, visible) for where in (still, away))
        change[policy.name] = [two - one for one, two in zip(before, after, strict=True)]
    scores, weights = change[BF16]
    if moved == "documents":
        scores, weights = scores - change["fp64"][0], weights - change["fp64"][1]
    unmoved = attended(states, still, FP64, visible)[1]
    counted = weights.abs() if level == "attention" else unmoved * scores.abs()
    return counted * (LAYOUT.document_ids > 0)[:, None, :, None]


def over_queries(counted: Tensor) -> float:
    queries = (LAYOUT.document_ids > 0).sum(-1)
    return float((counted.sum((2, 3)) / queries[:, None]).mean())


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.mark.parametrize(
    "fields",
    [{}, {"softcap": 0.5, "sinks": SINKS}, {"sliding_window": 7}],
    ids=["plain", "softcap and sinks", "window"],
)
@pytest.mark.parametrize("moved", ["row", "documents"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_number_is_what_its_definition_gives_over_whole_matrices(
    level: str, moved: str, fields: dict[str, object]
) -> None:
    states = draw(**fields)
    report = measured(states)
    window = states.sliding_window
    sees = {pattern: dense_mask(LAYOUT, pattern, window, keep_anchor=False) for pattern in PATTERNS}
    counted = {pattern: spelled_out(states, visible, moved, level) for pattern, visible in sees.items()}
    asked = {"level": level, "moved": moved, "position_policy": "continuous", "policy": BF16}
    for pattern in PATTERNS:
        (record,) = report.select(pattern=pattern, **asked)
        assert record.mean == pytest.approx(over_queries(counted[pattern]), rel=1e-9)
        assert record.anchor_mean == pytest.approx(over_queries(counted[pattern][..., :1]), rel=1e-9, abs=1e-15)
    for pattern, reference in (("anchor", "full"), ("anchor", "intra_doc"), ("intra_doc", "full")):
        found = one(report, pattern=pattern, reference=reference, level=level, moved=moved)
        ours, theirs = sees[pattern][:, None], sees[reference][:, None]
        both = (counted[pattern] - counted[reference]) * (ours & theirs)
        assert found.dropped == pytest.approx(-over_queries(counted[reference] * (theirs & ~ours)), rel=1e-9)
        assert found.added == pytest.approx(over_queries(counted[pattern] * (ours & ~theirs)), rel=1e-9)
        assert found.kept == pytest.approx(over_queries(both), rel=1e-9, abs=1e-15)


# --- relations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": 7},
        {"softcap": 0.5, "sinks": SINKS},
        {"interleaved": True, "attention_factor": 1.3},
    ],
    ids=["plain", "window", "softcap and sinks", "neighbours and a factor"],
)
def test_dropped_added_and_kept_add_up_to_the_whole_difference(fields: dict[str, object]) -> None:
    report = measured([replace(draw(seed=layer, **fields), layer=layer) for layer in (0, 1)])
    assert report.comparisons
    for found in report.comparisons:
        assert found.dropped + found.added + found.kept == pytest.approx(found.mean - found.reference_mean, abs=1e-15)
        if found.policy != "fp64":
            assert found.mean > 0
            assert ((found.dropped, found.added) == (0, 0)) is (found.pattern == found.reference)


def test_a_window_lets_a_document_see_the_anchor_that_full_has_left_behind() -> None:
    found = one(measured(draw(sliding_window=15)), pattern="anchor", reference="full", level="scores")
    assert found.added > 0  # the first tokens of the later documents


def test_interleaved_documents_are_measured_like_others() -> None:
    layout = PackedLayout.from_document_ids(torch.tensor([[0, *[1] * 9, *[2] * 9, *[1] * 9]]))
    report = measured(layout=layout)
    (kept,) = {record.kept_share for record in report.select(pattern="anchor", position_policy="continuous")}
    assert 0 < kept < 1


def test_of_one_document_behind_the_anchor_anchor_attention_is_full_attention() -> None:
    report = measured(layout=PackedLayout.from_lengths([[30]] * 3))
    for found in report.compare(pattern="anchor", reference="full", policy=BF16):
        assert (found.ratio, found.dropped, found.added, found.kept) == (1.0, 0.0, 0.0, 0.0)
        assert found.verdict == "no difference seen"


def test_scores_on_pairs_that_both_attend_change_by_renormalisation_alone() -> None:
    report = measured()
    full, ours = (
        report.select(pattern=name, level="scores", position_policy="continuous") for name in ("full", "anchor")
    )
    assert all(record.kept_share == pytest.approx(1.0) for record in full)
    assert all(0 < record.kept_share < 1 for record in ours)
    assert one(report, pattern="anchor", reference="full", level="scores").kept > 0


def test_what_moves_by_design_is_the_distance_to_the_anchor_and_no_rounding() -> None:
    report = measured(policies=[BF16, "fp32"])
    for level in LEVELS:
        for pattern, moves in (("intra_doc", False), ("anchor", True)):
            records = report.select(level=level, pattern=pattern, moved="documents")
            assert len({record.by_design for record in records}) == 1  # of float64, whatever the policy
            assert (records[0].by_design > 1e-3) is moves
            assert records[0].by_design < 1e-14 or moves
            (exact,) = (record for record in records if record.policy == "fp64")
            assert exact.mean == 0
        still, moved = (
            report.select(level=level, pattern="intra_doc", position_policy="continuous", moved=moved, policy=BF16)[0]
            for moved in ("row", "documents")
        )
        assert moved.mean == pytest.approx(still.mean, abs=1e-14)
    assert not report.select(moved="documents", position_policy="reset")
    assert all(record.by_design == 0 for record in report.select(moved="row"))


def test_the_floor_is_what_float64_drifts_by() -> None:
    report = measured(shifts=[16, 4_000_000])
    for record in report.select(policy="fp64", moved="row"):
        assert record.mean == record.floor
    for record in report.records:
        assert 0 < record.floor < 1e-14
    assert all(found.verdict == "at the floor" for found in report.compare(policy="fp64"))
    assert "nothing to reduce" in report.answer("fp64")[0]


def test_blocks_and_parts_of_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sums in float32 depend on their order, and so on the size of a block.
    policies = [Policy("bf16_storage", storage="bfloat16")]
    whole = measured(policies=policies)
    monkeypatch.setattr("anchor_attn.drift.parts.BLOCK_PAIRS", 700)
    cut = measured(policies=policies)
    for one_record, other in zip(whole.records, cut.records, strict=True):
        assert other.mean == pytest.approx(one_record.mean, rel=1e-12)
    for found, again in zip(whole.comparisons, cut.comparisons, strict=True):
        assert again.kept == pytest.approx(found.kept, rel=1e-9, abs=1e-15)
        assert again.units == found.units


def test_a_seed_gives_the_same_report_and_another_seed_another() -> None:
    first, again, other = (measure_patterns(None, LAYOUT, shifts=[16], queries=8, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.records != other.records


def test_rows_are_independent_and_share_no_seed() -> None:
    layout = PackedLayout.from_lengths([[20, 20]] * 3)
    report = measure_patterns(None, layout, policies=[BF16], shifts=[16], queries=None)
    found = one(report, pattern="anchor", reference="full", level="scores")
    assert (found.unit, found.units) == ("rows", 3)
    assert found.low < found.ratio < found.high  # type: ignore[operator]


# --- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loud", "verdict"), [(1, "reduces"), (2, "increases")])
def test_drift_of_pairs_that_the_anchor_drops_is_reduced_and_of_pairs_that_it_keeps_increased(
    loud: int, verdict: str
) -> None:
    layout = PackedLayout.from_lengths([[30, 30]] * 8)
    states = draw(layout)
    size = torch.where(layout.document_ids == loud, 8.0, 0.25)[:, None, :, None]
    found = one(
        measured(replace(states, key=(states.key * size).bfloat16()), layout),
        pattern="anchor", reference="full", level="scores",
    )  # fmt: skip
    assert found.verdict == verdict
    assert f"{verdict} it" in str(found)
    assert found.dropped < 0 < found.kept


def test_the_answer_says_each_level_reference_and_way_of_moving() -> None:
    sentences = measured(shifts=[16, 1000]).answer()
    assert len(sentences) == len(set(sentences)) == 2 * 2 * 3
    assert all(sentence.startswith(BF16) and "1,000" in sentence for sentence in sentences)
    assert all("pairs no longer attended" in sentence for sentence in sentences if "against full" in sentence)


def test_verdicts_hold_over_all_comparisons_of_a_report_together() -> None:
    layout = PackedLayout.from_lengths([[20, 20]] * 3)
    few, many = (
        measured(draw(layout), layout, shifts=shifts, policies=[BF16]) for shifts in ([16], [16, 17, 18, 19, 20, 21])
    )
    for report, count in ((few, 24), (many, 144)):  # 2 levels, 6 of the row, 3 of documents, 3 of other positions
        assert {found.comparisons for found in report.comparisons} == {count}
        assert sum(found.policy != "fp64" for found in report.comparisons) == count
        for found in report.compare(policy=BF16):
            low, high, ratio = (getattr(found, name) for name in ("low", "high", "ratio"))
            one_alone, all_together = (stats.t.ppf(1 - 0.025 / n, 2) for n in (1, count))
            wide = (high - low) / 2 * all_together / one_alone
            assert found.side == int(ratio - wide > 1) - int(ratio + wide < 1)
            if found.verdict == "no difference seen":
                assert found.side == 0
    alone = [found for found in many.compare(policy=BF16) if not found.low <= 1 <= found.high]  # type: ignore[operator]
    assert any(found.verdict == "no difference seen" for found in alone)


@pytest.mark.parametrize(
    ("ratio", "said"), [(0.99956, "by 0.044%"), (0.842, "by 15.8%"), (1.0004, "by 0.04%"), (2.5, "2.50 times")]
)
def test_a_small_change_is_told_from_none(ratio: float, said: str) -> None:
    found = one(measured(), pattern="anchor", reference="full", level="scores")
    changed = replace(found, ratio=ratio, low=ratio - 1e-5, high=ratio + 1e-5, side=-1 if ratio < 1 else 1)
    assert said in str(changed)
    assert brief_ratio(ratio).rstrip("0") not in ("1.", "0.")


def test_two_heads_of_one_row_give_no_interval_and_three_speak_for_the_heads() -> None:
    layout = PackedLayout.from_lengths([[20, 20]])
    for heads, verdicts in ((2, {"no interval"}), (3, {"reduces", "increases", "no difference seen"})):
        found = one(measured(draw(layout, heads, heads), layout), pattern="anchor", reference="full", level="scores")
        assert (found.unit, found.units) == ("heads", heads)
        assert found.verdict in verdicts
        assert ("no interval" in str(found)) is (heads == 2)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="anchor_tokens=0"):
        measure_patterns(None, PackedLayout.from_lengths([[8]], anchor_tokens=0))
    with pytest.raises(ValueError, match="layout must describe 1 rows of 9 tokens, got 2 of 50"):
        measure_patterns(random_states(9, 16), LAYOUT)
    with pytest.raises(ValueError, match="states must hold one layer"):
        measure_patterns([], LAYOUT)
    with pytest.raises(ValueError, match="policies must be among"):
        measured(policies=["bf8"])
    with pytest.raises(ValueError, match="shifts must be at least 1"):
        measured(shifts=[0])
    with pytest.raises(ValueError, match="queries must meet a document in every row"):
        measured(queries=1)  # the last token, which is padding
    with pytest.raises(ValueError, match="shift must be among"):
        measured().answer(shift=17)
