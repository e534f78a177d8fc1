"""Does an anchor reduce the drift? The same query and key under full, intra_doc and anchor attention.

    scores       Σ_j a_ij · |drift of the score ij|      a: weights of the pattern itself, in float64, unmoved
    attention    Σ_j |drift of the weight ij|            twice the total variation

of a query i of a document, over the keys j that the pattern lets it see; the mean over queries. A score drifts by its
pair alone, whoever attends it. So a pattern changes which pairs count, and by what weight:

    E(anchor) − E(full)   =   − full's part of E on pairs that the anchor pattern does not attend           dropped
                              + the anchor pattern's part of E on pairs that full does not attend           added
                              + on pairs that both attend, the anchor pattern's part less full's            kept

Of scores the last is nothing but renormalisation: full's weights on those pairs over their sum are the anchor's.

Source of the question: https://arxiv.org/abs/2411.13476
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from anchor_attn.drift.measure import checked_shifts
from anchor_attn.drift.parts import parts_of, rows_of
from anchor_attn.drift.patterns.meter import MOVES, PAIRED, Case, CaseSums, Meter
from anchor_attn.drift.patterns.report import Comparison, PatternRecord, PatternReport
from anchor_attn.drift.policies import FP64, Policy, find_policies
from anchor_attn.drift.states import States, list_layers, random_states
from anchor_attn.drift.view import Queries, View, count_queries
from anchor_attn.intervals import UNITS_FOR_AN_INTERVAL, ratio_interval
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import ANCHOR_ID, PositionPolicy
from anchor_attn.masks.patterns import PATTERNS, Pattern, check_pattern

PATTERN_SHIFTS = (16, 1_000, 130_000)
PATTERN_POLICIES = ("bf16_cos_sin", "fp32")
PATTERN_QUERIES = 128
RANDOM_HEADS = 4


def measure_patterns(
    states: States | Sequence[States] | None,
    layout: PackedLayout,
    *,
    policies: Sequence[str | Policy] | None = PATTERN_POLICIES,
    shifts: Sequence[int] = PATTERN_SHIFTS,
    queries: Queries = PATTERN_QUERIES,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> PatternReport:
    """Measure the drift of scores and attention under every pattern and position policy, and compare them.

        measure_patterns(None, PackedLayout.from_lengths([[500] * 4] * 3)).answer()

    Positions are moved in two ways. With all of the row, the anchor too: in exact arithmetic nothing changes. And under
    continuous positions the documents alone, as if they stood elsewhere in their row, the anchor at its front: scores
    between their own tokens stay, those to the anchor change by design, for its distance does. What float64 changes
    is told apart as `by_design`, and the mean is of what a policy does besides. (Under "full" that is a gap between the
    anchor and all else: documents that stand elsewhere would see other ones, and there are no pairs to compare.)

    Args:
        states: of one layer or of several, as `capture_states` returns them; random normal, 4 heads of 128, when None.
        layout: the documents of their rows, with an anchor.
        policies: names of `POLICIES` or a `Policy`; all of them when None. float64 is always measured.
        shifts: Δ, each at least 1.
        queries: how many are looked at, evenly over the row; None for all. Those at anchors and padding do not count.
        seed: of random states.
        say: told what is being done.

    Raises:
        ValueError: a layout of other shape, without an anchor or without documents where queries are, an unknown
            policy, a shift that positions or a policy cannot hold, or states too large for the memory at hand.
    """
    check_pattern(layout, "anchor")
    found = find_policies(policies)
    shifts = checked_shifts(shifts, layout.seq_len, found)
    layers = _as_layers(states, layout, seed)
    sums: list[CaseSums] = []
    for layer in layers:
        if layer.layer is not None:
            say(f"layer {layer.layer}")
        sums.append(_measure_layer(layer, layout, found, shifts, queries))
    cases = [case for case in sums[0].means("mean") if case.pattern == PATTERNS[0]]
    compared = [pair for case in cases for pair in _pairs(case)]
    # float64, the floor, is not judged.
    judged = sum(case.policy != FP64.name for case, _ in compared)
    return PatternReport(
        records=tuple(record for layer, one in zip(layers, sums, strict=True) for record in _records(layer, one)),
        comparisons=tuple(_compare(case, reference, sums, judged) for case, reference in compared),
        settings={
            "seq_len": layout.seq_len, "rows": layout.batch_size, "layers": len(layers),
            "documents": [list(lengths) for lengths in layout.document_lengths],
            "policies": [policy.name for policy in found], "shifts": list(shifts), "seed": seed,
            "queries": count_queries(layout.seq_len, queries),
        },
    )  # fmt: skip


# --- the loops -------------------------------------------------------------------------------------------------------


def _measure_layer(
    states: States, layout: PackedLayout, policies: Sequence[Policy], shifts: Sequence[int], queries: Queries
) -> CaseSums:
    sums = CaseSums(layout.batch_size, states.query.shape[1])
    for row, alone in enumerate(rows_of(states)):
        ids = layout.document_ids[row : row + 1].cpu()
        row_layout = PackedLayout(ids, layout.anchor_tokens, layout.runs[row : row + 1])
        for position_policy in MOVES:
            views = {
                pattern: _document_view(alone, row_layout, pattern, position_policy, queries) for pattern in PATTERNS
            }
            sums.queries[row] = len(views["full"].rows)
            for part in parts_of(alone, views["full"]):
                meter = Meter(part, row, ids[0], views, position_policy, sums)
                for shift in shifts:
                    meter.measure(shift, policies)
    return sums


def _document_view(
    states: States, layout: PackedLayout, pattern: Pattern, position_policy: PositionPolicy, queries: Queries
) -> View:
    view = View.of(states, layout, pattern, position_policy, queries)
    rows = view.rows[layout.document_ids[0][view.rows] > ANCHOR_ID]
    if not len(rows):
        raise ValueError(
            f"queries must meet a document in every row, got {len(view.rows)} of {layout.seq_len} tokens, all of them "
            "anchors or padding; pass more queries, or None, and rows with documents."
        )
    return replace(view, rows=rows)


# --- records ---------------------------------------------------------------------------------------------------------


def _records(states: States, sums: CaseSums) -> Iterator[PatternRecord]:
    for case in sums.means("mean"):
        mean, floor, by_design, anchor, kept = (
            float(sums.mean(case, name).mean()) for name in ("mean", "floor", "by_design", "anchor", "attention")
        )
        whole = float(sums.mean(replace(case, pattern="full"), "attention").mean())
        yield PatternRecord(
            level=case.level,
            pattern=case.pattern,
            position_policy=case.position_policy,
            moved=case.moved,
            policy=case.policy,
            shift=case.shift,
            layer=states.layer,
            mean=mean,
            floor=floor,
            by_design=by_design,
            anchor_mean=anchor,
            kept_share=kept / whole,
        )


def _pairs(full: Case) -> Iterator[tuple[Case, Case]]:
    """Of a case of the full pattern: patterns among each other, and each with itself under other positions."""
    for pattern, reference in PAIRED:
        yield replace(full, pattern=pattern), replace(full, pattern=reference)
    if full.position_policy == "reset":
        for pattern in PATTERNS:
            case = replace(full, pattern=pattern)
            yield case, replace(case, position_policy="continuous")


def _parts(case: Case, reference: Case, sums: Sequence[CaseSums]) -> tuple[float, ...]:
    """Of the difference: dropped, added and kept."""
    if case.pattern == reference.pattern:
        return 0.0, 0.0, _over_layers(sums, case, "mean") - _over_layers(sums, reference, "mean")
    names = ("dropped from", "added to", "kept of")
    return tuple(_over_layers(sums, case, f"{name} {reference.pattern}") for name in names)


def _compare(case: Case, reference: Case, sums: Sequence[CaseSums], judged: int) -> Comparison:
    ours, theirs, unit = _units(case, reference, sums)
    ratio, together = (ratio_interval(ours, theirs, count) for count in (1, max(1, judged)))
    dropped, added, kept = _parts(case, reference, sums)
    return Comparison(
        level=case.level,
        pattern=case.pattern,
        position_policy=case.position_policy,
        reference=reference.pattern,
        reference_position_policy=reference.position_policy,
        moved=case.moved,
        policy=case.policy,
        shift=case.shift,
        mean=_over_layers(sums, case, "mean"),
        reference_mean=_over_layers(sums, reference, "mean"),
        floor=_over_layers(sums, reference, "floor"),
        ratio=None if ratio is None else ratio.mean,
        low=None if ratio is None else ratio.low,
        high=None if ratio is None else ratio.high,
        side=0 if together is None else together.side(1.0),
        comparisons=judged,
        units=0 if ratio is None else ratio.units,
        unit=unit,
        dropped=dropped,
        added=added,
        kept=kept,
    )


def _units(case: Case, reference: Case, sums: Sequence[CaseSums]) -> tuple[list[float], list[float], str]:
    """Of both, over rows, each the mean of its layers and heads; or over heads of every layer where rows are few."""
    rows = len(sums[0].queries)
    unit = "rows" if rows >= UNITS_FOR_AN_INTERVAL else "heads"

    def means_of(one: Case) -> list[float]:
        means = [layer.mean(one, "mean") for layer in sums]
        if unit == "heads":
            return [float(value) for layer in means for value in layer.flatten()]
        return [float(value) for value in torch.stack([layer.mean(1) for layer in means]).mean(0)]

    return means_of(case), means_of(reference), unit


def _over_layers(sums: Sequence[CaseSums], case: Case, name: str) -> float:
    return float(torch.stack([layer.mean(case, name).mean() for layer in sums]).mean())


# --- what is asked for -----------------------------------------------------------------------------------------------


def _as_layers(states: States | Sequence[States] | None, layout: PackedLayout, seed: int) -> list[States]:
    if states is None:
        rows = [
            random_states(layout.seq_len, num_heads=RANDOM_HEADS, seed=seed * layout.batch_size + row)
            for row in range(layout.batch_size)
        ]
        query, key = (torch.cat([getattr(row, name) for row in rows]) for name in ("query", "key"))
        return [replace(rows[0], query=query, key=key)]
    layers = list_layers(states)
    for layer in layers:
        View.of(layer, layout)  # of one shape with the layout
    return layers
