"""What was measured under each pattern, how patterns compare, and what may be said of the anchor."""

from dataclasses import asdict, dataclass, field
from typing import Any

# A drift this many times float64's own is of rounding in a policy; below, there is nothing to reduce.
ABOVE_FLOOR = 10


@dataclass(frozen=True)
class PatternRecord:
    """The drift that the queries of documents see under one pattern.

    Attributes:
        level: "scores", weighted by attention; or "attention", of the weights themselves.
        pattern: "full", "intra_doc" or "anchor".
        position_policy: "continuous" or "reset".
        moved: all of the "row", the anchor too; or the "documents", behind an anchor that stays where it is.
        policy: by name.
        shift: by how much.
        layer: of the model; None for states of none.
        mean: Σ_j over the keys of a query, mean over queries, heads and rows. Of moved documents only what float64
            does not do: the drift less the change that is by design.
        floor: the same of float64 when the row is moved.
        by_design: of moved documents, the change in float64: their distance to the anchor is another. 0 of a moved row.
        anchor_mean: the part of the mean that is on anchor tokens.
        kept_share: of full's attention, what is on pairs that this pattern attends.
    """

    level: str
    pattern: str
    position_policy: str
    moved: str
    policy: str
    shift: int
    layer: int | None
    mean: float
    floor: float
    by_design: float
    anchor_mean: float
    kept_share: float

    def record(self) -> dict[str, Any]:
        """As a result file has it."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """One pattern against another, all layers together; mean − reference_mean = dropped + added + kept.

    Attributes:
        level: as `PatternRecord`.
        pattern: what is compared.
        position_policy: its positions.
        reference: what it is compared with.
        reference_position_policy: the positions of that.
        moved: as `PatternRecord`.
        policy: by name.
        shift: by how much.
        mean: of the pattern.
        reference_mean: of the reference.
        floor: of the reference, in float64.
        ratio: mean / reference_mean; None where that is 0.
        low: lower end of its 95 % interval, paired by unit; None below three units.
        high: its upper end.
        side: 1 if the ratio is above 1, −1 if it is below, 0 if nothing can be said: by an interval that all
            `comparisons` of a report hold together in 95 % (Bonferroni), which is wider.
        comparisons: of the report that are judged.
        units: how many.
        unit: what they are, "rows", or "heads" where rows are fewer than three: then it speaks for these rows only.
        dropped: minus the reference's drift on pairs that the pattern does not attend.
        added: the pattern's drift on pairs that the reference does not attend.
        kept: on pairs that both attend, the pattern's drift less the reference's: what their weights gain as other
            pairs go, or lose as others come; of another position policy, all of it.
    """

    level: str
    pattern: str
    position_policy: str
    reference: str
    reference_position_policy: str
    moved: str
    policy: str
    shift: int
    mean: float
    reference_mean: float
    floor: float
    ratio: float | None
    low: float | None
    high: float | None
    side: int
    comparisons: int
    units: int
    unit: str
    dropped: float
    added: float
    kept: float

    @property
    def verdict(self) -> str:
        """Of "reduces", "increases", "no difference seen", "no interval" and "at the floor"."""
        if self.ratio is None or self.reference_mean <= ABOVE_FLOOR * self.floor:
            return "at the floor"
        if self.low is None or self.high is None:
            return "no interval"
        return {-1: "reduces", 0: "no difference seen", 1: "increases"}[self.side]

    def __str__(self) -> str:
        where = f"{self.policy}, {self.position_policy} positions, {self.moved} moved by {self.shift:,}"
        other = self.reference
        if self.reference_position_policy != self.position_policy:
            other = f"{other} with {self.reference_position_policy} positions"
        if self.verdict == "at the floor" or self.ratio is None:
            return f"{where}: drift of {self.level} under {other} is at the floor of float64, nothing to reduce."
        change = f"by {_percent(abs(self.ratio - 1)).lstrip('+')}" if self.ratio < 2 else f"{self.ratio:.2f} times"
        said = {
            "reduces": f"reduces it {change}",
            "increases": f"increases it {change}",
            "no difference seen": "no difference seen",
            "no interval": f"{self.ratio:.3f} of it, and {self.units} {self.unit} give no interval",
        }[self.verdict]
        interval = ""
        if self.low is not None and self.high is not None:
            ends = f"{_percent(self.low - 1)} … {_percent(self.high - 1)}"
            interval = f" (95 % {ends}, {self.units} {self.unit}; judged as 1 of {self.comparisons})"
        parts = ", ".join(
            f"{_percent(part / self.reference_mean)} {words}"
            for part, words in (
                (self.dropped, "on pairs no longer attended"),
                (self.kept, "on pairs that both attend"),
                (self.added, "on pairs newly attended"),
            )
            if part
        )
        return (
            f"{where}: {self.pattern} against {other}, drift of {self.level}: {said}{interval}; {parts or 'no change'}."
        )

    def record(self) -> dict[str, Any]:
        """As a result file has it."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class PatternReport:
    """All records, all comparisons, and what was asked for."""

    records: tuple[PatternRecord, ...] = field(repr=False)
    comparisons: tuple[Comparison, ...] = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)

    def select(self, **fields: Any) -> list[PatternRecord]:
        """Records whose attributes equal these."""
        return [record for record in self.records if _has(record, fields)]

    def compare(self, **fields: Any) -> list[Comparison]:
        """Comparisons whose attributes equal these."""
        return [comparison for comparison in self.comparisons if _has(comparison, fields)]

    def answer(self, policy: str | None = None, shift: int | None = None) -> list[str]:
        """Does the anchor reduce the drift? A sentence for each level, position policy, reference and way of moving.

        Args:
            policy: by name; the first that was measured when None.
            shift: the largest when None.

        Raises:
            ValueError: one that was not measured.
        """
        asked = {"policy": policy, "shift": shift}
        for name, known in (("policy", self.settings["policies"]), ("shift", self.settings["shifts"])):
            if asked[name] is None:
                asked[name] = known[0] if name == "policy" else max(known)
            elif asked[name] not in known:
                raise ValueError(f"{name} must be among {known}, got {asked[name]!r}; measure it first.")
        return [
            str(comparison)
            for comparison in self.compare(pattern="anchor", **asked)
            if comparison.reference != "anchor"
        ]


def _percent(change: float) -> str:
    """With a sign, and two digits that differ from none: 0.123 as "+12.3%", 0.00044 as "+0.044%"."""
    return f"{change:+.1%}" if abs(change) >= 0.1 else f"{100 * change:+.2g}%"


def _has(record: PatternRecord | Comparison, fields: dict[str, Any]) -> bool:
    return all(getattr(record, name) == value for name, value in fields.items())
