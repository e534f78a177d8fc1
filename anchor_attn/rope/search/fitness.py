"""How good a LongRoPE individual is on a model: its rotary tables put in for a while, and perplexity under them.

    "perplexity"  of all tokens but the first of every sequence
    "needle"      of the needles' tokens alone, as LongRoPE2 has it

    a b c d K1 V1 e f g h i K2 V2 j k l K2 V2 K1 V1      needles in the haystack, asked again at its end: only the last
                                            ^^    ^^     values are scored, and nothing but the haystack tells them

Source: https://arxiv.org/abs/2402.13753 and https://arxiv.org/abs/2502.20082.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anchor_attn.rope.methods import METHODS, Original, frequencies_of
from anchor_attn.rope.precision import RopePrecision, rotary_table
from anchor_attn.rope.rotary import Rotary, RotaryForm, StartHook, TableHook, called_with, in_form, recognise
from anchor_attn.rope.search.evolution import Individual

# Lower is better.
Fitness = Callable[[nn.Module, Sequence[Tensor]], float]

NEEDLES, KEY_TOKENS, VALUE_TOKENS = 4, 4, 8
# Logits that are upcast at a time, in tokens: of 128K tokens and as many words the copy alone would be 64 GiB.
UPCAST_TOKENS = 1_024


class TrialTables:
    """A forward hook that gives a rotary module the tables of the individual on trial, those that `extend` makes.

    Args:
        rotaries: of one module, those to be extended, with RoPE as each was trained.
        factor: how many times the original length.
    """

    def __init__(self, rotaries: Sequence[tuple[Rotary, Original]], factor: float):
        self.module, self._factor = rotaries[0][0].module, factor
        self._served: dict[str | None, tuple[RotaryForm, Original]] = {
            rotary.layer_type: (recognise(rotary), original) for rotary, original in rotaries
        }
        self._frequencies: dict[str | None, tuple[Tensor, float]] = {}
        self._starts: dict[str | None, StartHook] = {}

    def try_on(self, individual: Individual) -> None:
        """Give the tables of this individual from now on."""
        self._starts.clear()
        for layer_type, (form, original) in self._served.items():
            parameters = METHODS["longrope"](
                original,
                self._factor,
                factors=individual.factors,
                short_factors=individual.factors,
                attention_factor=individual.attention_factor,
            )
            self._frequencies[layer_type] = frequencies_of(parameters, original)
            if n_hat := individual.n_hat:
                _, attention_factor = self._frequencies[layer_type]
                self._starts[layer_type] = StartHook(layer_type, form, original.inv_freq, attention_factor, n_hat)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The table for the states and the positions that the module was called with."""
        states, position_ids, layer_type = called_with(*args, **kwargs)
        if layer_type not in self._served:
            return output
        form, _ = self._served[layer_type]
        inv_freq, attention_factor = self._frequencies[layer_type]
        # A wrapped model states a precision for packed forwards, and in others computes as it did before.
        hooks = [hook for hook in module._forward_hooks.values() if isinstance(hook, TableHook) and hook.is_on]
        precision: RopePrecision = hooks[-1].precision if hooks else "model"
        table = in_form(rotary_table(position_ids, inv_freq, precision, states.dtype, attention_factor), form)
        keep_start = self._starts.get(layer_type)
        return keep_start(module, args, kwargs, table) if keep_start else table


@contextmanager
def on_trial(model: nn.Module, tables: TrialTables) -> Iterator[None]:
    """The model in evaluation, without gradients and with the tables of trials; then as it was, to the bit."""
    modes = {module: module.training for module in model.modules()}
    handle = tables.module.register_forward_hook(tables, with_kwargs=True)
    model.eval()
    try:
        # Not inference mode: a buffer that a rotary module makes there could never be trained with.
        with torch.no_grad():
            yield
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode


def perplexity(model: nn.Module, sequences: Sequence[Tensor], scored: Sequence[Tensor] | None = None) -> float:
    """exp of the mean loss in nats over the scored tokens of all sequences, one sequence at a time.

    A forward holds the logits of its scored tokens only, where the model takes `logits_to_keep`; else of all.

    Args:
        model: causal; its forward returns `logits`.
        sequences: token ids [S] each.
        scored: bool [S] for each sequence; all tokens but the first when None, which nothing predicts.

    Returns:
        The perplexity; infinite where it overflows.
    """
    device = next(model.parameters()).device
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    total = count = 0.0
    for i, tokens in enumerate(sequences):
        tokens = tokens.to(device)
        asked = torch.arange(1, len(tokens), device=device)
        if scored is not None:
            asked = asked[scored[i].to(device)[1:]]
        kept = {"logits_to_keep": asked - 1} if keeps else {}
        logits = model(input_ids=tokens[None], use_cache=False, **kept).logits[0]
        logits = logits if keeps else logits[asked - 1]
        for some, labels in zip(logits.split(UPCAST_TOKENS), tokens[asked].split(UPCAST_TOKENS), strict=True):
            total += float(F.cross_entropy(some.float(), labels.to(some.device), reduction="sum"))
        count += len(asked)
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def plant_needles(
    sequences: Sequence[Tensor],
    seed: int,
    needles: int = NEEDLES,
    key_tokens: int = KEY_TOKENS,
    value_tokens: int = VALUE_TOKENS,
) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences with needles in them, and which of their tokens a needle's perplexity is of.

    A needle is a random key and a random value, of tokens that occur in the sequences: no tokenizer is needed, and a
    model finds the value as it finds any repetition. Each stands somewhere in its own stretch of the haystack, so that
    all depths occur; at the end all keys come again in random order, each with its value. Tokens are written over, and
    lengths stay.

    Args:
        sequences: token ids [S] each.
        seed: of keys, values, places and order; equal seeds give equal needles.
        needles: in every sequence.
        key_tokens: of a key.
        value_tokens: of a value.

    Returns:
        Sequences [S], and bool [S] for each: the values at the end.

    Raises:
        ValueError: sequences too short for their needles, or with too few different tokens for their keys.
    """
    random, words = Random(seed), sorted(set(torch.cat(list(sequences)).tolist()))
    needle_tokens = key_tokens + value_tokens
    shortest, needed = min(map(len, sequences)), 2 * needles * needle_tokens
    if shortest < needed:
        raise ValueError(
            f"sequences must have at least {needed} tokens for {needles} needles of {needle_tokens}, got {shortest}; "
            "pass longer ones, or fitness='perplexity'."
        )
    if len(words) ** key_tokens < needles:
        raise ValueError(
            f"sequences must hold tokens enough for {needles} keys of {key_tokens}, got {len(words)} different; "
            "pass text."
        )
    planted, scored = [], []
    for tokens in sequences:
        hay = len(tokens) - needles * needle_tokens
        keys: dict[tuple[int, ...], list[int]] = {}
        while len(keys) < needles:
            keys[tuple(random.choices(words, k=key_tokens))] = random.choices(words, k=value_tokens)
        planted.append(tokens.clone())
        scored.append(torch.zeros(len(tokens), dtype=torch.bool))
        for i, (key, value) in enumerate(keys.items()):
            place = random.randint(hay * i // needles, hay * (i + 1) // needles - needle_tokens)
            planted[-1][place : place + needle_tokens] = torch.tensor([*key, *value])
        for i, (key, value) in enumerate(random.sample(list(keys.items()), needles)):
            place = hay + i * needle_tokens
            planted[-1][place : place + needle_tokens] = torch.tensor([*key, *value])
            scored[-1][place + key_tokens : place + needle_tokens] = True
    return planted, scored
