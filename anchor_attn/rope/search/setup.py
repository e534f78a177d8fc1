"""What a LongRoPE search begins with: the rotary module, the methods to start from, and the space around them."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from anchor_attn.masks.layout import checked_int
from anchor_attn.rope.checks import checked_number
from anchor_attn.rope.configs import RECORD, parts_of, read_original
from anchor_attn.rope.extension import extend
from anchor_attn.rope.frequencies import rescale_factors
from anchor_attn.rope.methods import METHODS, Original, frequencies_of
from anchor_attn.rope.rotary import BY_LENGTH, Rotary, rotaries_of
from anchor_attn.rope.search.evolution import Individual, Space
from anchor_attn.rope.search.files import SearchResult
from anchor_attn.rope.search.inputs import text_config

# The paper's, under our names.
STARTS = ("linear", "ntk", "yarn")
ROUNDING = 1e-6  # of float32 frequencies, relative

Rotaries = Sequence[tuple[Rotary, Original]]


@dataclass(frozen=True)
class Problem:
    """What is searched: from where, in which space, at which length.

    Attributes:
        at: "long" or "short" inputs.
        starts: by name.
        space: what genes may become.
        target_len: tokens of an evaluation.
        long: what was found for long inputs, in a search for short ones.
    """

    at: str
    starts: Mapping[str, Individual]
    space: Space
    target_len: int
    long: Individual | None = None

    def in_use(self, individual: Individual) -> Individual:
        """What `extend` makes of it: short inputs have no n̂, unless their factors are those of the long ones."""
        return self.long if self.long is not None and self.long.factors == individual.factors else individual


def long_problem(
    model: nn.Module,
    rotaries: Rotaries,
    factor: float,
    target_len: int | None,
    step: float,
    reach: float,
    n_hats: Sequence[int],
    attention_factor: float | None,
    extra_starts: Sequence[str],
) -> Problem:
    """A search for inputs beyond the original length.

    Raises:
        ValueError: a length within the original one or beyond the factor, a grid without λ, no n̂ below the
            original length, an unknown start.
    """
    length = rotaries[0][1].length
    longest = round(factor * length)
    target_len = longest if target_len is None else checked_int(target_len, "target_len")
    if not length < target_len <= longest:
        raise ValueError(
            f"target_len must be above the original {length} tokens and at most factor times it, {longest}, got "
            f"{target_len}; for inputs up to the original length search with short_of."
        )
    if not 0 < step < math.inf or not 1 <= reach < math.inf:
        raise ValueError(f"step must be above 0 and reach at least 1, got {step} and {reach}; pass 0.01 and 1.25.")
    values = tuple(n_hat for n_hat in n_hats if n_hat < length)
    if not values:
        raise ValueError(f"n_hats must be below the original length of {length}, got {tuple(n_hats)}; pass (0,).")
    starts = long_starts(model, rotaries, factor, target_len, extra_starts)
    if attention_factor is not None:
        fixed = checked_number("attention_factor", attention_factor)
        starts = {name: replace(start, attention_factor=fixed) for name, start in starts.items()}
    attention_factors = tuple(sorted({start.attention_factor for start in starts.values()}))
    space = Space(reach * factor, step, values, attention_factors)
    return Problem("long", starts, space, target_len)


def short_problem(
    rotaries: Rotaries, factor: float, step: float, found: SearchResult, ignored: Sequence[str]
) -> Problem:
    """A search for inputs up to the original length, beside a result for longer ones.

    Raises:
        ValueError: a result of another model or factor, or options that belong to long inputs.
    """
    original = rotaries[0][1]
    ours = (factor, original.length, original.rotary_dim // 2)
    theirs = (found.factor, found.original_max_position_embeddings, len(found.factors))
    if ours != theirs:
        raise ValueError(
            f"short_of must be of the same factor, original length and pairs, {ours}, got {theirs}; search the long "
            "set of this model first."
        )
    if ignored:
        raise ValueError(
            f"{', '.join(ignored)} must be left out with short_of, got {'it' if len(ignored) == 1 else 'them'}; short "
            "inputs share them with long ones, or have none."
        )
    long = Individual(tuple(found.factors), found.n_hat, found.attention_factor)
    ones = Individual((1.0,) * len(long.factors), 0, long.attention_factor)
    space = Space(max(long.factors), step, (0,), (long.attention_factor,))
    return Problem("short", {"default": ones, "long": replace(long, n_hat=0)}, space, original.length, long)


def rotaries_to_extend(model: nn.Module, layer_types: Sequence[str], original_len: int | None) -> Rotaries:
    """The rotary module whose frequencies are searched, for each kind of layer, with RoPE as it was trained.

    Raises:
        ValueError: none, several modules, or one that `extend` cannot extend.
    """
    config = text_config(model)
    rotaries = [found for found in rotaries_of(model) if found.layer_type is None or found.layer_type in layer_types]
    if len({rotary.module for rotary in rotaries}) != 1:
        names = sorted({rotary.name for rotary in rotaries})
        raise ValueError(
            f"model must have one rotary module to be extended, got {type(model).__name__} with {len(names)} for "
            f"layer_types {tuple(layer_types)}; name the kinds of its layers, or choose another model."
        )
    found = [(rotary, read_original(config, rotary.layer_type, original_len)) for rotary in rotaries]
    for rotary, original in found:
        pairs = len(rotary.frequencies()[0])
        if pairs != original.rotary_dim // 2 or pairs != found[0][1].rotary_dim // 2:
            raise ValueError(
                f"model must have as many pairs as its config says, got {pairs} in {rotary.name!r} and "
                f"{original.rotary_dim // 2} there; its factors cannot be searched."
            )
    return found


def checked_n_hats(n_hats: Sequence[int]) -> tuple[int, ...]:
    """The values of n̂, each once and in order.

    Raises:
        TypeError, ValueError: none, or no numbers of positions.
    """
    values = tuple(sorted({checked_int(n_hat, "n_hats") for n_hat in n_hats}))
    if not values or values[0] < 0:
        raise ValueError(f"n_hats must be some numbers of positions, got {tuple(n_hats)}; pass (0,) for no n̂.")
    return values


def check_extends(
    model: nn.Module,
    rotaries: Rotaries,
    factor: float,
    layer_types: Sequence[str],
    original_len: int | None,
    n_hats: Sequence[int],
) -> None:
    """Raise, before days of search, what `extend` would raise of any result."""
    config = text_config(model)
    if any("mscale_all_dim" in part for part in parts_of(config)):
        raise ValueError(
            f"model must scale its scores by no method, got {type(model).__name__} with mscale_all_dim, which `extend` "
            'takes off its layers; call extend(model, "default") first.'
        )
    ones = [1.0] * (rotaries[0][1].rotary_dim // 2)
    copied = copy.deepcopy(config)
    extend(copied, "longrope", factor, original_len=original_len, layer_types=layer_types, factors=ones)
    if max(n_hats) > 0:
        try:  # any will do: too large ones are left out of the search
            extend(copied, "longrope", factor, layer_types=layer_types, factors=ones, n_hat=1)
        except ValueError as error:
            raise ValueError(
                f"n_hats must be (0,) for {type(model).__name__}, whose config holds no n̂, got {tuple(n_hats)}; "
                "pass n_hats=(0,), on the command line --no-n-hat."
            ) from error


def long_starts(
    model: nn.Module, rotaries: Rotaries, factor: float, target_len: int, more: Sequence[str]
) -> dict[str, Individual]:
    """The methods that evolution starts from, each to a float32 rounding what `extend` makes of it.

    A model that is extended already starts from that too: as it is ("present"), and interpolated to the new length
    ("interpolated"), which is the paper's second interpolation.

    Raises:
        ValueError: a start that is no static method, or that falls or speeds a pair up.
    """
    rotary, original = rotaries[0]
    starts = {}
    for method in dict.fromkeys((*STARTS, *more)):
        if method not in METHODS or method in (*BY_LENGTH, "default"):
            choice = tuple(name for name in METHODS if name not in (*BY_LENGTH, *STARTS, "default"))
            raise ValueError(f"extra_starts must be some of {choice}, got {method!r}; leave it out.")
        inv_freq, own = frequencies_of(METHODS[method](original, factor), original, target_len)
        starts[method] = Individual(_factors(original, inv_freq), 0, float(own))
    inv_freq, own = rotary.frequencies(seq_len=target_len)
    factors = _factors(original, inv_freq)
    if max(factors) > 1:
        record = getattr(text_config(model), RECORD, None) or {}
        n_hat = record.get("options", {}).get("n_hat") or 0
        starts["present"] = Individual(factors, n_hat, float(own))
        stretch = max(1.0, factor / max(factors))
        starts["interpolated"] = Individual(tuple(stretch * value for value in factors), n_hat, float(own))
    return starts


def _factors(original: Original, inv_freq: Tensor) -> tuple[float, ...]:
    """λ of every pair, at least 1 and never falling; float32 frequencies give 16.000001 and 15.999999 for 16.

    Raises:
        ValueError: a model that has others.
    """
    factors = [1.0]
    for pair, value in enumerate(rescale_factors(original.inv_freq, inv_freq)):
        if value < factors[-1] * (1 - ROUNDING):
            raise ValueError(
                "model must have factors of at least 1 that never fall, to start from, got "
                f"{value:.6g} behind {factors[-1]:.6g} at pair {pair}; extend it by another method first, "
                "extend(model, 'yarn', factor=8), say."
            )
        near = round(value, 2)
        factors.append(max(factors[-1], near if abs(value - near) <= ROUNDING * value else value))
    return tuple(factors[1:])
