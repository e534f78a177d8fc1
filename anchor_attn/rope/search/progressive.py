"""LongRoPE's way to 2048K tokens, of which no more than 256K are ever trained, as a preset.

    leg     what                                   length   for LLaMA-2-7B, of 4K
    0, 1    search on the model as it is           128K, 256K
    2       fine-tune with the factors of leg 0    128K     400 steps
    3       go on with the factors of leg 1        256K     600 steps
    4       search on the fine-tuned model         2048K    half the population
    5       search beside it for short inputs      4K

With a model, its documents' tokens and your trainer that is

    for leg in PROGRESSIVE[:2]:
        found = search_factors(model, sequences, checkpoint=…, **leg.search_options(4096))
        found.write(f"{leg.length_tokens}.json")
    for leg in PROGRESSIVE[2:4]:
        extend(model, "longrope", factors=f"{leg.length_tokens}.json")     replaces what was before
        train(model, rows of leg.length_tokens, leg.steps, leg.learning_rate, leg.batch_rows)
    long, short = PROGRESSIVE[4:]
    result = search_factors(model, longer_sequences, checkpoint=…, **long.search_options(4096))
    result = search_factors(model, sequences, result.factor, short_of=result)
    result.write("2048K.json")
    extend(model, "longrope", factors="2048K.json")

`search_factors` finds by itself that the model of leg 4 is extended already, and starts from its present factors too.
The rows of 128K and more need sequence parallelism, and a search at 2048K several accelerators. The paper searches for
short inputs of 4K and of 8K; transformers' "longrope" keeps one set for them, up to the original length.

Source: https://arxiv.org/abs/2402.13753, section 3.3 for the legs, their lengths and steps; section 4.1 for the
learning rate, the batch, and how many are born in a search, half of them beyond 512K. Ours: three sequences at 2048K,
and 4K alone for short inputs.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Leg:
    """One part of the way.

    Attributes:
        does: "search", "fine_tune", or "search_short".
        length_tokens: of its inputs.
        sequences: that a search reads.
        population: of a search.
        mutations: of a search.
        crossovers: of a search.
        steps: of a fine-tuning.
        learning_rate: at its beginning; it falls linearly.
        batch_rows: rows of a step.
    """

    does: Literal["search", "fine_tune", "search_short"]
    length_tokens: int
    sequences: int = 5
    population: int = 64
    mutations: int = 16
    crossovers: int = 16
    steps: int = 0
    learning_rate: float = 2e-5
    batch_rows: int = 32

    def search_options(self, original_len: int) -> dict[str, Any]:
        """What `search_factors` takes.

            Leg("search", 131_072).search_options(4096)["factor"]      32.0

        Args:
            original_len: tokens that the model was trained on.

        Raises:
            ValueError: a leg that does not search for longer inputs.
        """
        if self.does != "search":
            raise ValueError(f"does must be 'search' for options of a search, got {self.does!r}; take another leg.")
        return {
            "factor": self.length_tokens / original_len,
            "population": self.population,
            "mutations": self.mutations,
            "crossovers": self.crossovers,
        }


PROGRESSIVE = (
    Leg("search", 128 * 1024),
    Leg("search", 256 * 1024),
    Leg("fine_tune", 128 * 1024, steps=400),
    Leg("fine_tune", 256 * 1024, steps=600),
    Leg("search", 2048 * 1024, sequences=3, population=32, mutations=8, crossovers=8),
    Leg("search_short", 4 * 1024),
)
