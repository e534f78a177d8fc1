"""What a layer's rotation is, told from what its attention got under three tables, and proven to the bit.

cos and sin     query and key        tell
1 and 0         x                    what there is to rotate
0 and 2         2 · x, turned        which numbers, in which pairs, and that nothing comes after
its own         as the model ran     that x turned by them is this, to the bit
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anchor_attn.drift.models.replay import TWICE_TURNED, Table
from anchor_attn.drift.states import States
from anchor_attn.rope.precision import rotary_table
from anchor_attn.rope.rotary import BY_LENGTH

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a layer's attention; each pair is a query [B, H, S, D] and a key [B, K, S, D].

    Attributes:
        name: of the layer, for a message.
        place: of the layer.
        rotated: what its attention got.
        plain: the same, unturned.
        turned: the same, turned by 90° and twice as large.
        tables: what rotary modules gave to the layer.
        dtype: of the values, and so of the model.
        arguments: of the attention function.
    """

    name: str
    place: int
    rotated: Pair
    plain: Pair
    turned: Pair
    tables: Sequence[Table]
    dtype: torch.dtype
    arguments: dict[str, Any]


def proven_states(call: Call) -> States | None:
    """The states of a layer on the host, in the model's dtype; None where the layer rotates nothing.

    Raises:
        ValueError: more than a rotation stands between these states and the attention, or the rotation is another than
            the config says.
    """
    moved = _moved(call)
    if not moved.any():
        return None
    if len(call.tables) != 1:
        raise ValueError(_refusal(call, f"{len(call.tables)} tables of cos and sin"))
    table = call.tables[0]
    inv_freq, attention_factor = _frequencies(call, table)
    arguments, sinks = call.arguments, call.arguments.get("s_aux")
    query, key = (_narrowed(x, call.dtype) for x in call.plain)
    states = States(
        query,
        key,
        inv_freq,
        attention_factor,
        rotary_start=int(moved.nonzero()[0]),
        scale=arguments.get("scaling"),
        softcap=arguments.get("softcap"),
        sliding_window=arguments.get("sliding_window"),
        sinks=None if sinks is None else sinks.detach().cpu().clone(),
        layer=call.place,
    )
    states = _with_pairs(call, states)
    _prove(call, states, table)
    return replace(states, query=query.cpu(), key=key.cpu())


def _moved(call: Call) -> Tensor:
    """Which numbers of a head the turn moves, bool [D]."""
    return torch.stack(
        [(turned != plain).flatten(0, 2).any(dim=0) for turned, plain in zip(call.turned, call.plain, strict=True)]
    ).any(dim=0)


def _with_pairs(call: Call, states: States) -> States:
    """The states with the pairs in which they are turned: halves, or neighbours."""
    cos, sin = TWICE_TURNED
    for interleaved in (False, True):
        found = replace(states, interleaved=interleaved)
        turned = (_turned(found, x, lambda a, b: (a * cos - b * sin, b * cos + a * sin)) for x in call.plain)
        if all(torch.equal(ours, theirs) for ours, theirs in zip(turned, call.turned, strict=True)):
            return found
    raise ValueError(_refusal(call, "more than a rotation before its attention (a norm behind it, say)"))


def _frequencies(call: Call, table: Table) -> tuple[Tensor, float]:
    """The frequencies of the config, and the factor on cos and sin; the layer's own table must come from them."""
    rotary, position_ids = table.rotary, table.position_ids
    last = int(position_ids.max())
    inv_freq, attention_factor = rotary.frequencies(last + 1 if rotary.rope_type in BY_LENGTH else None)
    given = [part.double().cpu() for part in table.pairs()]
    eps = torch.finfo(table.pairs().cos.dtype).eps
    # Angles in float32 are off by half a unit of their last place, cos and sin by as much, and the table by its own.
    allowed = attention_factor * (2 * eps + 1e-6 + (last + 1) * torch.finfo(torch.float32).eps)
    apart = []
    # `.to(torch.bfloat16)` rounds a module's frequencies with the weights, which turns pairs at other rates, but alike.
    for own in (inv_freq, inv_freq.to(call.dtype).float()):
        expected = rotary_table(position_ids.cpu(), own, "exact", torch.float64, attention_factor)
        apart.append(max(float((one - two).abs().max()) for one, two in zip(expected, given, strict=True)))
    if not min(apart) <= allowed:
        raise ValueError(
            _refusal(call, f"cos and sin that are {min(apart):.1e} from those of its config ({rotary.rope_type})")
        )
    return inv_freq, attention_factor


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the model's dtype, of which a wide table of cos and sin made a wide one."""
    narrow = x.to(dtype)
    return narrow if torch.equal(narrow.to(x.dtype), x) else x


# --- the proof -------------------------------------------------------------------------------------------------------

Rotate = Callable[[Tensor, Tensor], Pair]


def _prove(call: Call, states: States, table: Table) -> None:
    """Raise unless the states, turned as some model turns them, are what the attention got."""
    cos, sin = (part[:, None] for part in table.pairs())
    apart = []
    for arithmetic in (_as_given, _in_float32, _complex):
        found = [
            _turned(states, x, arithmetic(cos, sin)).to(theirs.dtype)
            for x, theirs in zip((states.query, states.key), call.rotated, strict=True)
        ]
        if all(torch.equal(ours, theirs) for ours, theirs in zip(found, call.rotated, strict=True)):
            return
        apart.append(max(float((o - t).abs().max()) for o, t in zip(found, call.rotated, strict=True)))
    raise ValueError(_refusal(call, f"a rotation of its own (by {min(apart):.1e}), or more behind it"))


def _turned(states: States, x: Tensor, rotate: Rotate) -> Tensor:
    before, first, second, after = states.split(x)
    return states.join(before, *rotate(first, second), after)


def _as_given(cos: Tensor, sin: Tensor) -> Rotate:
    """In the dtype of states and table, as Llama has it."""
    return lambda first, second: (first * cos - second * sin, second * cos + first * sin)


def _in_float32(cos: Tensor, sin: Tensor) -> Rotate:
    """Of states cast to float32, as Cohere has it."""
    own = _as_given(cos, sin)
    return lambda first, second: own(first.float(), second.float())


def _complex(cos: Tensor, sin: Tensor) -> Rotate:
    """By complex numbers, as DeepSeek-V2 has it."""

    def rotate(first: Tensor, second: Tensor) -> Pair:
        # Rows apart, as those of a part of a head: the CPU multiplies the last numbers of a row without fused sums.
        together = torch.complex(first.float(), second.float())
        apart = together.new_empty(*together.shape[:-1], together.shape[-1] + 1)[..., :-1].copy_(together)
        turned = apart * torch.complex(cos.float(), sin.float())
        return turned.real, turned.imag

    return rotate


def _refusal(call: Call, got: str) -> str:
    return (
        f"layers must do nothing but rotate query and key before they attend, got {call.name} with {got}; choose "
        "others with layers=[…]."
    )
