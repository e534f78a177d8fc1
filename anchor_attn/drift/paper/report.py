"""What the paper's protocol gave: a record a length, shift, policy and layer, and profiles by key."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from anchor_attn.drift.policies import FP64
from anchor_attn.intervals import mean_interval, ratio_interval

MEASURES = ("d_signed", "d_abs", "d_logit_signed", "d_logit_abs", "first_token_d_abs", "first_token_attention")


@dataclass(frozen=True)
class PaperRecord:
    """D and D_logit, means over sequences and heads; each interval is ± half of the 95 % t, None below 3 sequences.

    Attributes:
        length: tokens.
        delta1: Δ1.
        delta2: Δ2.
        policy: by name.
        layer: of the model; None for the mean over layers.
        sequences: how many.
        d_signed: Eq 4.
        d_signed_interval: of it.
        d_abs: Eq 4 of absolute differences.
        d_abs_interval: of it.
        d_abs_floor: the same of float64.
        d_logit_signed: Eq 5.
        d_logit_signed_interval: of it.
        d_logit_abs: Eq 5 of absolute differences.
        d_logit_abs_interval: of it.
        d_logit_abs_floor: the same of float64.
        first_token_share: of d_abs, what is on the first key; None where d_abs is 0.
        first_token_share_interval: of it.
        first_token_attention: of the attention, weighed alike, what is on the first key.
    """

    length: int
    delta1: int
    delta2: int
    policy: str
    layer: int | None
    sequences: int
    d_signed: float
    d_signed_interval: float | None
    d_abs: float
    d_abs_interval: float | None
    d_abs_floor: float
    d_logit_signed: float
    d_logit_signed_interval: float | None
    d_logit_abs: float
    d_logit_abs_interval: float | None
    d_logit_abs_floor: float
    first_token_share: float | None
    first_token_share_interval: float | None
    first_token_attention: float

    def record(self) -> dict[str, Any]:
        """As a result file has it."""
        return asdict(self)


@dataclass(frozen=True)
class KeyProfile:
    """The differences of each key, means over sequences, layers, heads and the queries that see it.

    Attributes:
        length: tokens.
        delta1: Δ1.
        delta2: Δ2.
        policy: by name.
        attention_signed: of weights; their sum is d_signed.
        attention_abs: their sum is d_abs.
        score_abs: of scores; the first is d_logit_abs.
    """

    length: int
    delta1: int
    delta2: int
    policy: str
    attention_signed: tuple[float, ...] = field(repr=False)
    attention_abs: tuple[float, ...] = field(repr=False)
    score_abs: tuple[float, ...] = field(repr=False)

    def records(self) -> Iterator[dict[str, Any]]:
        """As a result file has them, one a key."""
        columns = zip(self.attention_signed, self.attention_abs, self.score_abs, strict=True)
        for key, (signed, absolute, score) in enumerate(columns):
            yield {
                "length": self.length, "delta1": self.delta1, "delta2": self.delta2, "policy": self.policy, "key": key,
                "attention_signed": signed, "attention_abs": absolute, "score_abs": score,
            }  # fmt: skip


@dataclass(frozen=True)
class PaperReport:
    """All records of the protocol, profiles by key, and what was asked for.

    Attributes:
        records: of each length, shift and policy, the mean over layers and then each layer that has a number.
        profiles: by key, of one length and shift.
        per_sequence: by length, delta1 and policy, float64 [sequences, 6] as `MEASURES`, means over layers.
        settings: what was asked for.
    """

    records: tuple[PaperRecord, ...] = field(repr=False)
    profiles: tuple[KeyProfile, ...] = field(repr=False)
    per_sequence: Mapping[tuple[int, int, str], Tensor] = field(repr=False, compare=False)
    settings: dict[str, Any] = field(default_factory=dict)

    def select(self, layer: int | None = None, **fields: Any) -> list[PaperRecord]:
        """Records whose attributes equal these, means over layers when none is named."""
        wanted = {"layer": layer, **fields}
        return [
            record for record in self.records if all(getattr(record, name) == value for name, value in wanted.items())
        ]

    def samples(self, name: str, policy: str, length: int, delta1: int) -> list[float] | None:
        """One of `MEASURES` for every sequence; None of what was not measured."""
        values = self.per_sequence.get((length, delta1, policy))
        return None if values is None else [float(value) for value in values[:, MEASURES.index(name)]]


def paper_records(
    samples: Mapping[tuple[int, int, str], Tensor], layers: Sequence[int | None], delta2: int
) -> Iterator[PaperRecord]:
    """The records of samples [sequences, layers, 6], as `MEASURES`.

    Args:
        samples: by length, delta1 and policy; of float64 too.
        layers: their numbers.
        delta2: of the protocol.
    """
    for (length, delta1, policy), values in samples.items():
        floors = samples[length, delta1, FP64.name]
        for place, layer in [
            (slice(None), None),
            *((slice(i, i + 1), n) for i, n in enumerate(layers) if n is not None),
        ]:
            columns, floor = (of[:, place].mean(1).T.tolist() for of in (values, floors))
            named, floor_of = dict(zip(MEASURES, columns, strict=True)), dict(zip(MEASURES, floor, strict=True))
            yield _record((length, delta1, delta2, policy, layer), named, floor_of)


# --- records ---------------------------------------------------------------------------------------------------------


def _record(
    case: tuple[int, int, int, str, int | None], values: Mapping[str, list[float]], floors: Mapping[str, list[float]]
) -> PaperRecord:
    length, delta1, delta2, policy, layer = case
    found = {name: mean_interval(column) for name, column in values.items()}
    share = ratio_interval(values["first_token_d_abs"], values["d_abs"])
    return PaperRecord(
        length=length,
        delta1=delta1,
        delta2=delta2,
        policy=policy,
        layer=layer,
        sequences=found["d_abs"].units,
        d_signed=found["d_signed"].mean,
        d_signed_interval=found["d_signed"].half,
        d_abs=found["d_abs"].mean,
        d_abs_interval=found["d_abs"].half,
        d_abs_floor=mean_interval(floors["d_abs"]).mean,
        d_logit_signed=found["d_logit_signed"].mean,
        d_logit_signed_interval=found["d_logit_signed"].half,
        d_logit_abs=found["d_logit_abs"].mean,
        d_logit_abs_interval=found["d_logit_abs"].half,
        d_logit_abs_floor=mean_interval(floors["d_logit_abs"]).mean,
        first_token_share=None if share is None else share.mean,
        first_token_share_interval=None if share is None else share.half,
        first_token_attention=found["first_token_attention"].mean,
    )
