"""What was measured: a record a policy, stage, shift and bin."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class DriftRecord:
    """Magnitudes of the drift of some pairs.

    Attributes:
        level: "scores", scaled products of query and key; or "attention", their weights.
        policy: by name.
        stage: measured alone, in float64; None for the whole policy. "softmax" acts on attention alone.
        shift: of all positions.
        layer: of the model; None for states of none.
        by: "all" pairs, or those of a "head", of a stretch of "distance" or of "key" places; "pair" is what one
            frequency pair adds to scores, of a sample.
        low: first head, distance, place or frequency pair.
        high: last.
        pairs: how many of a query and a key.
        mean_abs: mean of |drift|.
        max_abs: largest.
        rms: root of the mean square.
        relative: mean_abs as a share of mean_value.
        mean_value: mean |score| or weight in float64, unshifted: of the attention to these pairs.
        share: of all |drift| of this policy and shift.
        floor: mean_abs of float64, of the same pairs.
        predicted: mean_abs that rounding is expected to cause; of scores by "all", "head" and "key", else None.
    """

    level: str
    policy: str
    stage: str | None
    shift: int
    layer: int | None
    by: str
    low: int | None
    high: int | None
    pairs: int
    mean_abs: float
    max_abs: float
    rms: float
    relative: float | None
    mean_value: float
    share: float | None
    floor: float
    predicted: float | None = None

    def record(self) -> dict[str, Any]:
        """As a result file has it."""
        return asdict(self)


@dataclass(frozen=True)
class DriftReport:
    """All records of a measurement, and what it was asked for."""

    records: tuple[DriftRecord, ...] = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)

    def select(
        self, by: str = "all", level: str = "scores", stage: str | None = None, **fields: Any
    ) -> list[DriftRecord]:
        """Records of a kind.

        Args:
            by: as `DriftRecord`.
            level: as `DriftRecord`.
            stage: as `DriftRecord`.
            fields: more of its attributes, to be equal.
        """
        wanted = {"by": by, "level": level, "stage": stage, **fields}
        return [
            record for record in self.records if all(getattr(record, name) == value for name, value in wanted.items())
        ]

    def at(self, policy: str, shift: int, **fields: Any) -> DriftRecord:
        """The one record of a policy and a shift.

        Raises:
            KeyError: none, or several, of which `layer` or another field chooses.
        """
        found = self.select(policy=policy, shift=shift, **fields)
        if len(found) != 1:
            raise KeyError(f"{len(found)} records of policy {policy!r} at shift {shift} with {fields}")
        return found[0]
