"""LongRoPE's search: evolution of the rescale factors with which a model reads its longest inputs best.

    round 0         64 individuals: PI, NTK and YaRN as they are, and mutations of these
    rounds 1 … 40   16 mutations and 16 crossovers of the best 32 so far

Only what was not seen before is evaluated: 64 + 40 · 32 = 1,344 individuals, each of them a forward of every sequence.

Source: https://arxiv.org/abs/2402.13753, section 3.2 and algorithm 1.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from torch import Tensor, nn

from anchor_attn.masks.layout import checked_int
from anchor_attn.results import describe_environment
from anchor_attn.rope.checks import checked_layer_types, shown
from anchor_attn.rope.search.evolution import N_HATS, Evolution, Individual, Space
from anchor_attn.rope.search.files import SearchResult, SearchState
from anchor_attn.rope.search.fitness import Fitness, TrialTables, on_trial, perplexity, plant_needles
from anchor_attn.rope.search.inputs import checked_sequences, hash_model, hash_tokens, text_config
from anchor_attn.rope.search.setup import (
    Problem,
    check_extends,
    checked_n_hats,
    long_problem,
    rotaries_to_extend,
    short_problem,
)

# A round may take hours: between its ends a kill costs the evaluations of so many seconds, not all of them.
SAVE_EVERY_S = 30.0


def search_factors(
    model: nn.Module,
    sequences: Sequence[Tensor] | Tensor,
    factor: float,
    *,
    target_len: int | None = None,
    short_of: SearchResult | None = None,
    fitness: Literal["perplexity", "needle"] | Fitness = "perplexity",
    population: int = 64,
    mutations: int = 16,
    crossovers: int = 16,
    probability: float = 0.3,
    rounds: int = 40,
    parents: int = 32,
    step: float = 0.01,
    reach: float = 1.25,
    n_hats: Sequence[int] = N_HATS,
    attention_factor: float | None = None,
    extra_starts: Sequence[str] = (),
    original_len: int | None = None,
    layer_types: Sequence[str] = ("full_attention",),
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> SearchResult:
    """Search LongRoPE's factors for a causal model; the model itself comes out as it went in.

        result = search_factors(model, sequences, factor=8)              for inputs beyond the original length
        result = search_factors(model, sequences, 8, short_of=result)    and for those within it
        result.write("factors.json")
        extend(model, "longrope", factors="factors.json")

    The result is never worse on its own fitness than PI, NTK and YaRN: they are individuals, with the attention factor
    that each of them has. The set for short inputs is never worse on these than no rescaling, or than the set for long
    ones; the attention factor is one for both, and n̂ is for long inputs alone.

    Args:
        model: of transformers, causal, in any dtype and on any device; wrapped or not.
        sequences: token ids, one [S] a document, longer than what is searched for; the paper takes five. More of a
            document is cut off.
        factor: how many times the original length, above 1.
        target_len: tokens of an evaluation, above the original length; factor times it when None. Shorter is cheaper.
        short_of: a result for long inputs; then factors are searched for inputs up to the original length, at that
            length, and the result comes back with both.
        fitness: "perplexity", "needle" (the perplexity of needles planted in the sequences, by `seed`), or a function
            of model and sequences that returns a float, lower being better. It must give equal floats for equal tables,
            and is told apart from others by its name alone.
        population: individuals at the beginning.
        mutations: children of one parent in a round.
        crossovers: children of two.
        probability: of a gene to be drawn anew.
        rounds: 0 for the best of the first population. A search that is over goes on from its checkpoint with more.
        parents: how many of the best have children.
        step: of λ.
        reach: the largest λ, in factors; for short inputs it is the largest of the long set.
        n_hats: the values of n̂ that are tried, those below the original length; (0,) for a result that plain
            transformers loads. The starts have 0.
        attention_factor: on cos and sin, for all individuals; when None, each start's own, inherited and mutated.
        extra_starts: more methods to start from, and to be no worse than: "ntk_by_parts", "yarn_paper", "llama3".
        original_len: as `extend`.
        layer_types: as `extend`.
        seed: of the evolution, and of the needles.
        checkpoint: a file, written after every round and every 30 seconds, from which the same call goes on after a
            kill, to the same result.
        progress: show a bar, on a terminal.

    Raises:
        TypeError: a model that is not of transformers, tokens or counts that are no integers, other wrong types.
        ValueError: what `extend` would refuse, sequences that are too short, numbers that make no evolution, a fitness
            that is nowhere finite, a checkpoint of another search.
    """
    layer_types = checked_layer_types(layer_types)
    if not isinstance(checkpoint, str | Path | None):
        raise TypeError(f"checkpoint must be a path, got {shown(checkpoint)}; name a file.")
    evolution = Evolution(population, mutations, crossovers, probability, parents)
    if checked_int(rounds, "rounds") < 0:
        raise ValueError(f"rounds must be 0 or more, got {rounds}; pass 40, as the paper.")
    values = checked_n_hats(n_hats)
    rotaries = rotaries_to_extend(model, layer_types, original_len)
    check_extends(model, rotaries, factor, layer_types, original_len, values)
    if short_of is None:
        task = long_problem(model, rotaries, factor, target_len, step, reach, values, attention_factor, extra_starts)
    else:
        own = {
            "target_len": target_len is not None,
            "n_hats": values != N_HATS,
            "attention_factor": attention_factor is not None,
            "extra_starts": bool(extra_starts),
        }
        task = short_problem(rotaries, factor, step, short_of, [name for name, is_given in own.items() if is_given])
    tokens = checked_sequences(sequences, task.target_len, text_config(model).vocab_size)
    measure = _fitness(fitness, tokens, seed)
    settings = {
        "factor": float(factor),
        "original_len": rotaries[0][1].length,
        "fitness": fitness if isinstance(fitness, str) else _name(fitness),
        "seed": seed,
        "layer_types": list(layer_types),
        **asdict(evolution),
        **asdict(task),
        "sequences": hash_tokens(tokens),
        "model": hash_model(model),
    }
    state = _begun(checkpoint, settings, evolution, task, rounds)
    tables = TrialTables(rotaries, factor)

    def evaluate(individual: Individual) -> float:
        tables.try_on(task.in_use(individual))
        value = float(measure(model, tokens))
        return value if math.isfinite(value) else math.inf

    with on_trial(model, tables), _bar(progress, population + rounds * (mutations + crossovers)) as show:
        _evolve(state, evaluate, evolution, task.space, rounds, checkpoint, show)
    meta = {**describe_environment(str(next(model.parameters()).device)), **settings, "rounds": rounds}
    return _result(state, task, short_of, meta)


def _fitness(fitness: str | Fitness, tokens: Sequence[Tensor], seed: int) -> Fitness:
    if fitness == "perplexity":
        return perplexity
    if fitness == "needle":
        planted, scored = plant_needles(tokens, seed)
        return lambda model, _: perplexity(model, planted, scored)
    if callable(fitness):
        return fitness
    raise ValueError(f"fitness must be 'perplexity', 'needle' or a function, got {fitness!r}; pass one of them.")


def _name(fitness: Fitness) -> str:
    return getattr(fitness, "__qualname__", type(fitness).__qualname__)


def _begun(
    checkpoint: str | Path | None, settings: Mapping[str, Any], evolution: Evolution, task: Problem, rounds: int
) -> SearchState:
    """The state of a search that was begun before, or a new one."""
    if checkpoint is None or not Path(checkpoint).exists():
        random = Random(settings["seed"])
        drawn = evolution.first_population(list(task.starts.values()), task.space, random)
        return SearchState(settings, random, drawn)
    state = SearchState.read(Path(checkpoint), settings)
    if state.round > rounds:
        raise ValueError(
            f"rounds must be at least the {state.round} of the checkpoint, got {rounds}; raise it, or name a new file."
        )
    return state


def _evolve(
    state: SearchState,
    evaluate: Callable[[Individual], float],
    evolution: Evolution,
    space: Space,
    rounds: int,
    checkpoint: str | Path | None,
    show: Callable[[SearchState], None],
) -> None:
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        if checkpoint is not None:
            state.write(Path(checkpoint))
            saved = time.monotonic()

    show(state)
    while True:
        for individual in state.drawn:
            if individual in state.fitness:  # before a kill
                continue
            state.fitness[individual] = evaluate(individual)
            show(state)
            if time.monotonic() - saved >= SAVE_EVERY_S:
                save()
        ranked = state.ranked()
        best = state.fitness[ranked[0]]
        if math.isinf(best):
            raise ValueError(
                f"fitness must be finite for some individual, got none among {len(ranked)}; see what it gives for the "
                "model as it is."
            )
        if len(state.records) == state.round:
            state.records.append({"round": state.round, "evaluated": len(ranked), "fitness": best})
        if state.round == rounds:
            return save()
        state.round += 1
        state.drawn = evolution.next_generation(ranked[: evolution.parents], set(state.fitness), space, state.random)
        save()


def _result(state: SearchState, task: Problem, short_of: SearchResult | None, meta: Mapping[str, Any]) -> SearchResult:
    best = state.ranked()[0]
    fitness, fitness_of = state.fitness[best], {name: state.fitness[start] for name, start in task.starts.items()}
    records = tuple({"at": task.at, **record} for record in state.records)
    if short_of is not None:
        return replace(
            short_of,
            short_factors=best.factors,
            short_fitness=fitness,
            short_fitness_of=fitness_of,
            records=(*short_of.records, *records),
            meta={**short_of.meta, task.at: meta},
        )
    return SearchResult(
        factors=best.factors,
        n_hat=best.n_hat,
        attention_factor=best.attention_factor,
        factor=meta["factor"],
        original_max_position_embeddings=meta["original_len"],
        fitness=fitness,
        fitness_of=fitness_of,
        records=records,
        meta={task.at: meta},
    )


@contextmanager
def _bar(progress: bool, individuals: int) -> Iterator[Callable[[SearchState], None]]:
    """Shows how far a search is, on a terminal only: in a log it would be a line an individual."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (progress and console.is_terminal):
        yield lambda state: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("search", total=individuals)

        def show(state: SearchState) -> None:
            best = f", best {min(state.fitness.values()):.4f}" if state.fitness else ""
            bar.update(task, completed=len(state.fitness), description=f"round {state.round}{best}")

        yield show
