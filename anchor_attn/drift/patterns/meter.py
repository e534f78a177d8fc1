"""The drift of some heads of one row under every pattern, added up pair by pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from anchor_attn.drift.parts import Part
from anchor_attn.drift.pipelines import LEVELS, Level
from anchor_attn.drift.policies import FP64, Policy
from anchor_attn.drift.view import View
from anchor_attn.masks.layout import ANCHOR_ID, PositionPolicy
from anchor_attn.masks.patterns import PATTERNS, Pattern

Moved = Literal["row", "documents"]
# The row comes first: what float64 drifts by there is the floor of both. Reset positions know no place in the row.
MOVES: Mapping[PositionPolicy, tuple[Moved, ...]] = {"continuous": ("row", "documents"), "reset": ("row",)}
PAIRED: tuple[tuple[Pattern, Pattern], ...] = (("anchor", "full"), ("anchor", "intra_doc"), ("intra_doc", "full"))


@dataclass(frozen=True)
class Case:
    """What a sum is of, in one layer."""

    position_policy: PositionPolicy
    policy: str
    shift: int
    moved: Moved
    level: Level
    pattern: Pattern


class CaseSums:
    """Sums over the queries of each row and head, by case and name; float64 [B, H] each."""

    def __init__(self, batch: int, heads: int) -> None:
        self.queries = torch.zeros(batch, 1, dtype=torch.float64)
        self._sums: dict[tuple[Case, str], Tensor] = {}

    def add(self, case: Case, name: str, row: int, heads: slice, total: Tensor, all_heads: int) -> None:
        """Add to some of the heads of a row."""
        key = case, name
        if key not in self._sums:
            self._sums[key] = torch.zeros(len(self.queries), all_heads, dtype=torch.float64)
        self._sums[key][row, heads] += total

    def mean(self, case: Case, name: str) -> Tensor:
        """Over queries, [B, H]; zeros of what was never added."""
        total = self._sums.get((case, name))
        return torch.zeros_like(self._sums[case, "mean"]) if total is None else total / self.queries

    def means(self, name: str) -> list[Case]:
        """Cases of which there is such a sum."""
        return [case for case, named in self._sums if named == name]


@dataclass(frozen=True)
class Attended:
    """Scores and weights of a block at one place."""

    scores: Tensor
    weights: dict[Pattern, Tensor]

    def less(self, other: "Attended") -> "Attended":
        """The change from another."""
        return Attended(
            self.scores - other.scores, {name: self.weights[name] - other.weights[name] for name in self.weights}
        )


@dataclass(frozen=True)
class Meter:
    """Adds the drift of some heads of one row to sums."""

    part: Part
    row: int
    ids: Tensor  # [S]
    views: dict[Pattern, View]
    position_policy: PositionPolicy
    sums: CaseSums

    def measure(self, shift: int, policies: Sequence[Policy]) -> None:
        """Of a shift and of all policies, float64 among them."""
        exact = self._places(shift, FP64)
        for policy in policies:
            places = exact if policy == FP64 else self._places(shift, policy)
            for block in self.part.blocks():
                self._measure_block(block, shift, policy, places, exact)

    def _places(self, shift: int, policy: Policy) -> dict[str, tuple[Tensor, Tensor]]:
        """Query and key where they are, and where each move brings them."""
        apart = replace(self.part, position_ids=self.part.position_ids + shift * (self.ids > ANCHOR_ID))
        places = {"still": self.part.rotated(0, policy), "row": self.part.rotated(shift, policy)}
        if "documents" in MOVES[self.position_policy]:
            places["documents"] = apart.rotated(0, policy)
        return places

    def _measure_block(
        self,
        block: slice,
        shift: int,
        policy: Policy,
        places: dict[str, tuple[Tensor, Tensor]],
        exact: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        visible = {pattern: view.sees(0, self.part.rows[block]) for pattern, view in self.views.items()}
        control = self._attend(block, exact["still"], FP64, visible)
        still = control if policy == FP64 else self._attend(block, places["still"], policy, visible)
        floor: Attended | None = None
        for moved in MOVES[self.position_policy]:
            design = self._attend(block, exact[moved], FP64, visible).less(control)
            drift = design if policy == FP64 else self._attend(block, places[moved], policy, visible).less(still)
            floor = floor or design
            changes = {
                "mean": drift.less(design) if moved == "documents" else drift,
                "floor": floor,
                **({"by_design": design} if moved == "documents" else {}),
            }
            for level in LEVELS:
                case = Case(self.position_policy, policy.name, shift, moved, level, "full")
                for pattern in PATTERNS:
                    kept = control.weights["full"]
                    self._add(replace(case, pattern=pattern), "attention", kept, visible[pattern])
                for name, change in changes.items():
                    magnitudes = _magnitudes(level, control.weights, change)
                    for pattern in PATTERNS:
                        self._add(replace(case, pattern=pattern), name, magnitudes[pattern], visible[pattern])
                    if name == "mean":
                        self._add_parts(case, magnitudes, visible)

    def _add_parts(self, case: Case, drifts: dict[Pattern, Tensor], visible: dict[Pattern, Tensor]) -> None:
        for pattern in PATTERNS:
            anchors = visible[pattern] & (self.ids == ANCHOR_ID)
            self._add(replace(case, pattern=pattern), "anchor", drifts[pattern], anchors)
        for pattern, reference in PAIRED:
            ours, theirs = visible[pattern], visible[reference]
            compared = replace(case, pattern=pattern)
            self._add(compared, f"dropped from {reference}", drifts[reference], theirs & ~ours, -1)
            self._add(compared, f"added to {reference}", drifts[pattern], ours & ~theirs)
            self._add(compared, f"kept of {reference}", drifts[pattern], ours & theirs)
            self._add(compared, f"kept of {reference}", drifts[reference], ours & theirs, -1)

    def _attend(
        self, block: slice, rotated: tuple[Tensor, Tensor], policy: Policy, visible: dict[Pattern, Tensor]
    ) -> Attended:
        scores = self.part.scores(rotated, block, policy)
        return Attended(scores, {pattern: self.part.weights(scores, seen, policy) for pattern, seen in visible.items()})

    def _add(self, case: Case, name: str, magnitudes: Tensor, pairs: Tensor, sign: int = 1) -> None:
        total = sign * (magnitudes.flatten(1) @ pairs.flatten().double())
        self.sums.add(case, name, self.row, self.part.heads, total, self.part.states.query.shape[1])


def _magnitudes(level: Level, weights: dict[Pattern, Tensor], change: Attended) -> dict[Pattern, Tensor]:
    """What each pair counts, [h, Q, S]."""
    if level == "attention":
        return {pattern: moved.abs() for pattern, moved in change.weights.items()}
    size = change.scores.abs()
    return {pattern: weight * size for pattern, weight in weights.items()}
