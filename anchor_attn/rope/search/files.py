"""What a LongRoPE search leaves on disk: its result, and the state that it goes on from after a kill."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from anchor_attn.results import write_json
from anchor_attn.rope.search.evolution import Individual


@dataclass(frozen=True)
class SearchResult:
    """Searched factors, as `extend(model, "longrope", factors=FILE)` takes them.

    Attributes:
        factors: λ of each pair.
        n_hat: positions below it keep the original frequencies.
        attention_factor: on cos and sin, for inputs of every length.
        factor: how many times the original length.
        original_max_position_embeddings: that length, in tokens.
        fitness: of these factors; lower is better.
        fitness_of: of each start by its name: "linear", "ntk", "yarn", and what else was asked for.
        short_factors: λ for inputs up to the original length; None before a second search, the same factors then.
        short_fitness: of these.
        short_fitness_of: of ones ("default") and of `factors` ("long") on the same short inputs.
        records: of each round, what was the best so far, and how many individuals had been evaluated.
        meta: environment, settings and seed of the searches.
    """

    factors: tuple[float, ...]
    n_hat: int
    attention_factor: float
    factor: float
    original_max_position_embeddings: int
    fitness: float
    fitness_of: Mapping[str, float]
    short_factors: tuple[float, ...] | None = None
    short_fitness: float | None = None
    short_fitness_of: Mapping[str, float] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        write_json(Path(path), asdict(self))

    @classmethod
    def read(cls, path: str | Path) -> "SearchResult":
        """A result that was written.

        Raises:
            ValueError: another file.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            short = found["short_factors"]
            found |= {
                "factors": tuple(found["factors"]),
                "short_factors": None if short is None else tuple(short),
                "fitness_of": _with_infinities(found["fitness_of"]),
                "short_fitness_of": _with_infinities(found["short_fitness_of"]),
            }
            return cls(**found)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"path must be the result of a search, got {str(path)!r}, which is not; pass what write() wrote."
            ) from error


@dataclass
class SearchState:
    """All that a search goes on from.

    Attributes:
        settings: what makes two searches the same one.
        random: where chance stands, the individuals of this round being drawn already.
        drawn: the individuals of this round.
        fitness: of all that were evaluated, in that order.
        round: 0 while the first population is evaluated.
        records: of the rounds that are over.
    """

    settings: Mapping[str, Any]
    random: Random
    drawn: list[Individual]
    fitness: dict[Individual, float] = field(default_factory=dict)
    round: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the state, whole or not at all."""
        version, numbers, gauss = self.random.getstate()
        content = {
            "settings": self.settings,
            "round": self.round,
            "random": [version, list(numbers), gauss],
            "drawn": [asdict(individual) for individual in self.drawn],
            "evaluated": [[asdict(individual), fitness] for individual, fitness in self.fitness.items()],
            "records": self.records,
        }
        write_json(path, content)

    @classmethod
    def read(cls, path: Path, settings: Mapping[str, Any]) -> "SearchState":
        """The state that a search of the same settings left.

        Raises:
            ValueError: another file, or the state of another search.
        """
        try:
            left = json.loads(path.read_text(encoding="utf-8"))
            version, numbers, gauss = left["random"]
            random = Random()
            random.setstate((version, tuple(numbers), gauss))
            state = cls(
                left["settings"],
                random,
                [_individual(genes) for genes in left["drawn"]],
                {_individual(genes): _number(fitness) for genes, fitness in left["evaluated"]},
                left["round"],
                [{**record, "fitness": _number(record["fitness"])} for record in left["records"]],
            )
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"checkpoint must be the state of a search, got {str(path)!r} ({type(error).__name__}), which is not; "
                "name a new file."
            ) from error
        ours = json.loads(json.dumps(settings))
        if other := [name for name in ours if state.settings.get(name) != ours[name]]:
            raise ValueError(
                f"checkpoint must be of the same search, got {str(path)!r} with another {', '.join(other)}; name a "
                "new file, or repeat the call that began it."
            )
        return state

    def ranked(self) -> list[Individual]:
        """All that were evaluated, the best first, the earlier of two that are equal before the later."""
        return sorted(self.fitness, key=self.fitness.__getitem__)


def _individual(genes: Mapping[str, Any]) -> Individual:
    return Individual(tuple(genes["factors"]), genes["n_hat"], genes["attention_factor"])


def _number(written: float | None) -> float:
    """JSON has no infinity, and write_json none of its own."""
    return math.inf if written is None else written


def _with_infinities(numbers: Mapping[str, float | None]) -> dict[str, float]:
    return {name: _number(number) for name, number in numbers.items()}
