"""LongRoPE's individuals, and how children come of them: what is pure chance and knows no model.

    factors           λ of each pair, from 1.0 to 1.25 s in steps of 0.01, never falling: pair i turns with θᵢ/λᵢ
    n_hat             positions below it keep θᵢ
    attention_factor  on cos and sin. The paper has none, but YaRN is not YaRN without it: every start brings its
                      method's own, and children inherit one

The paper draws at random and keeps what does not fall. Among 64 pairs hardly a draw would be kept; these draw from what
is left of the same chances, and never reject.

Source: https://arxiv.org/abs/2402.13753, section 3.2, table 4 and algorithm 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random

from anchor_attn.masks.layout import checked_int

N_HATS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)

# A small space may have no new child left; a child that is not new costs a draw and no evaluation.
DRAWS_A_CHILD = 100


@dataclass(frozen=True)
class Individual:
    """One setting of a model's rotary embeddings.

    Attributes:
        factors: λ of each pair, never falling.
        n_hat: how many positions keep the original frequencies.
        attention_factor: on cos and sin.
    """

    factors: tuple[float, ...]
    n_hat: int = 0
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Space:
    """What genes may become.

    Attributes:
        largest: λ.
        step: of λ, from 1.0 on.
        n_hats: the values of n̂.
        attention_factors: the values of the attention factor.
    """

    largest: float
    step: float
    n_hats: tuple[int, ...]
    attention_factors: tuple[float, ...]

    def between(self, low: float, high: float) -> range:
        """The places on the grid of λ from `low` to `high`, both included.

        With steps of 0.01, 1.0 to 1.035 are places 0, 1, 2 and 3.
        """
        # Compared as numbers: (1.07 - 1) / 0.01 is 7.000000000000006, and a start's λ may lie a hair beside the grid.
        low, high = max(low, 1.0), min(high, self.largest)
        first, last = math.floor((low - 1.0) / self.step), math.ceil((high - 1.0) / self.step)
        while self.at(first) < low:
            first += 1
        while self.at(last) > high:
            last -= 1
        return range(first, last + 1)

    def at(self, place: int) -> float:
        """λ at a place of the grid."""
        return round(1.0 + place * self.step, 10)


def mutate(parent: Individual, space: Space, probability: float, random: Random) -> Individual:
    """A child in which every gene is drawn anew with a probability.

    Neighbouring genes that are drawn anew lie between the two that stay: as many draws from there, in order.
    """
    drawn = [random.random() < probability for _ in parent.factors]
    factors: list[float] = []
    for anew, run in groupby(zip(drawn, parent.factors, strict=True), key=lambda gene: gene[0]):
        old = [value for _, value in run]
        end = len(factors) + len(old)
        low = factors[-1] if factors else 1.0
        high = parent.factors[end] if end < len(parent.factors) else space.largest
        places = space.between(low, high) if anew else range(0)
        # A start's λ lie off the grid, and two of them may have no place between.
        factors += [space.at(place) for place in sorted(random.choices(places, k=len(old)))] if places else old
    n_hat = random.choice(space.n_hats) if random.random() < probability else parent.n_hat
    attention = random.choice(space.attention_factors) if random.random() < probability else parent.attention_factor
    return Individual(tuple(factors), n_hat, attention)


def cross(one: Individual, two: Individual, random: Random) -> Individual:
    """A child of genes from two parents, every mixture that does not fall being equally likely.

    (1, 4) and (2, 3)      (1, 4), (1, 3), (2, 4) or (2, 3), a quarter each
    (1, 1) and (2, 2)      (1, 1), (1, 2) or (2, 2), a third each: (2, 1) falls
    """
    genes = list(zip(one.factors, two.factors, strict=True))
    # ways[i][k]: in how many ways the pairs behind i can go on, when pair i comes from parent k.
    ways = [(1, 1)]
    for here, behind in zip(reversed(genes[:-1]), reversed(genes[1:]), strict=True):
        first, second = (sum(ways[-1][k] for k in (0, 1) if behind[k] >= value) for value in here)
        ways.append((first, second))
    factors: list[float] = []
    for gene, weights in zip(genes, reversed(ways), strict=True):
        allowed = [k for k in (0, 1) if not factors or gene[k] >= factors[-1]]
        # Integers: at 64 pairs there are more ways than a float can count.
        draw = random.randrange(sum(weights[k] for k in allowed))
        factors.append(gene[allowed[0] if draw < weights[allowed[0]] else allowed[-1]])
    parents = (one, two)
    return Individual(tuple(factors), random.choice(parents).n_hat, random.choice(parents).attention_factor)


def draw_new(child: Callable[[], Individual], count: int, seen: set[Individual]) -> list[Individual]:
    """So many children that were not seen before, or as many as are found; they are added to `seen`."""
    children: list[Individual] = []
    for _ in range(count * DRAWS_A_CHILD):
        if len(children) == count:
            break
        if (drawn := child()) not in seen:
            seen.add(drawn)
            children.append(drawn)
    return children


@dataclass(frozen=True)
class Evolution:
    """How many are born of whom.

    Attributes:
        population: individuals at the beginning, the starts and mutations of them.
        mutations: children of one parent in a round.
        crossovers: children of two.
        probability: of a gene to be drawn anew in a mutation.
        parents: how many of the best have children.

    Raises:
        TypeError, ValueError: numbers that make no evolution.
    """

    population: int = 64
    mutations: int = 16
    crossovers: int = 16
    probability: float = 0.3
    parents: int = 32

    def __post_init__(self) -> None:
        for name, least in (("population", 1), ("mutations", 0), ("crossovers", 0), ("parents", 1)):
            if checked_int(getattr(self, name), name) < least:
                paper = type(self).__dataclass_fields__[name].default
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}; the paper has {paper}.")
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must be above 0 and at most 1, got {self.probability}; the paper has 0.3.")
        if self.crossovers and self.parents < 2:
            raise ValueError("parents must be at least 2 for crossovers, got 1; pass crossovers=0 for mutations alone.")

    def first_population(self, starts: Sequence[Individual], space: Space, random: Random) -> list[Individual]:
        """The starts themselves, and mutations of them.

        Raises:
            ValueError: a population that is smaller than its starts.
        """
        population = list(dict.fromkeys(starts))
        missing = self.population - len(population)
        if missing < 0:
            raise ValueError(
                f"population must hold its {len(population)} starts, got {self.population}; raise it to that at least."
            )
        parents, seen = tuple(population), set(population)
        return population + draw_new(lambda: self.mutate(random.choice(parents), space, random), missing, seen)

    def next_generation(
        self, parents: Sequence[Individual], seen: set[Individual], space: Space, random: Random
    ) -> list[Individual]:
        """Mutations of random parents, then mixtures of two, none of them seen before."""

        def mixture() -> Individual:
            one, two = random.sample(parents, 2)
            return cross(one, two, random)

        children = draw_new(lambda: self.mutate(random.choice(parents), space, random), self.mutations, seen)
        # Two parents there are always, but in a space of one individual.
        return children + (draw_new(mixture, self.crossovers, seen) if len(parents) > 1 else [])

    def mutate(self, parent: Individual, space: Space, random: Random) -> Individual:
        """A child as `mutate` has it."""
        return mutate(parent, space, self.probability, random)
