"""Query and key of an attention layer under other tables of cos and sin: the layer's own code, run once more.

    cos    sin    what its attention gets
    1      0      query and key as they are before rotation
    0      2      twice of them, turned by 90°: exact in every dtype, so that it shows which numbers are turned, in
                  which pairs, and that nothing stands between the rotation and the attention

The tables come from the model's rotary modules, and are found again among what the layer was called with.
Nothing is patched, and no key that layers share is overwritten.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from anchor_attn.configs import configs_of
from anchor_attn.rope.precision import RotaryTable
from anchor_attn.rope.rotary import Rotary, RotaryForm, recognise, rotaries_of

Turn = tuple[float, float]  # one cos and one sin for all positions and pairs
UNTURNED: Turn = (1.0, 0.0)
TWICE_TURNED: Turn = (0.0, 2.0)


class SeenError(Exception):
    """What the attention of a replayed layer was given; nothing behind it need run."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        super().__init__()
        self.query = query
        self.key = key


@dataclass(frozen=True, eq=False)
class Table:
    """What a rotary module gave once, as it gave it.

    Attributes:
        rotary: the module, and the kind of layer that it was called for.
        form: of the output.
        position_ids: integers [B, S] or [1, S].
        output: cos and sin, or both in one complex tensor.
    """

    rotary: Rotary
    form: RotaryForm
    position_ids: Tensor
    output: Any

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """cos and sin, or the one complex tensor."""
        return (self.output,) if isinstance(self.output, Tensor) else tuple(self.output)

    def pairs(self) -> RotaryTable:
        """cos and sin of each pair [B, S, R/2]; the inverse of `in_form`."""
        if self.form == "complex":
            return RotaryTable(self.output.real, self.output.imag)
        cos, sin = self.output
        if self.form == "single":
            return RotaryTable(cos, sin)
        first = slice(0, None, 2) if self.form == "neighbours" else slice(0, cos.shape[-1] // 2)
        return RotaryTable(cos[..., first], sin[..., first])

    def turning(self, turn: Turn) -> tuple[Tensor, ...]:
        """Parts of the same shapes and dtypes, every pair turned alike."""
        fill = (complex(*turn),) if self.form == "complex" else turn
        return tuple(torch.full_like(part, value) for part, value in zip(self.parts, fill, strict=True))


class Replay:
    """Watches a model's forward, so that a layer that is running can be run again under another table.

    Args:
        model: whose rotary modules give the tables.

    Raises:
        ValueError: no rotary module, or one that is not recognised.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forms = {(each.module, each.layer_type): (each, recognise(each)) for each in rotaries_of(model)}
        if not self._forms:
            raise ValueError(
                f"model must have rotary position embeddings, got {type(model).__name__} without; "
                "pass a model that rotates query and key."
            )
        self._running: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._tables: list[Table] = []
        self._shared: dict[int, tuple[Tensor, Mapping[Turn, Tensor]]] = {}
        self._turn: Turn | None = None
        self._used: list[Table] = []

    @property
    def is_on(self) -> bool:
        """Whether a layer is being run again; its attention has to raise `SeenError` then."""
        return self._turn is not None

    def watch(self) -> list[RemovableHandle]:
        """Hooks on the rotary modules, and on those that may be attention layers: the ones that hold a config."""
        rotaries = dict.fromkeys(module for module, _ in self._forms)
        handles = [module.register_forward_hook(self._note_table, with_kwargs=True) for module in rotaries]
        for module in self._model.modules():
            if configs_of(module) and module not in rotaries:
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        return handles

    def run(self, layer: nn.Module, turn: Turn) -> tuple[Tensor, Tensor, list[Table]]:
        """Run the attention layer that is running once more.

        Returns:
            Query and key as its attention gets them, and the tables that the layer was given or asked for.
        """
        args, kwargs = self._running[layer]
        self._turn, self._used = turn, []
        try:
            layer.forward(*self._swapped(args, turn), **self._swapped(kwargs, turn))
        except SeenError as seen:
            return seen.query, seen.key, list(dict.fromkeys(self._used))
        finally:
            self._turn = None
        raise AssertionError(f"{type(layer).__name__} attended, and did not when it was run again")

    def is_shared(self, layer: nn.Module, key: Tensor) -> bool:
        """Whether a layer that is running leaves its key where later layers find it."""
        args, kwargs = self._running[layer]
        return any(each is key for each in _in_mappings((*args, *kwargs.values())))

    def share(self, key: Tensor, turned: Mapping[Turn, Tensor]) -> None:
        """Give later layers the key of another turn, where they are run again and find this one."""
        self._shared[id(key)] = key, turned

    # --- hooks ---

    def _note_table(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        rotary, form = self._forms[module, given.get("layer_type")]
        table = Table(rotary, form, given["position_ids"], output)
        if self._turn is None:
            self._tables.append(table)  # kept to the end, so that no other tensor gets its id
            return output
        self._used.append(table)
        turned = table.turning(self._turn)
        return turned[0] if isinstance(output, Tensor) else turned

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running[module] = args, kwargs

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop(module, None)

    # --- arguments under another table ---

    def _swapped(self, value: Any, turn: Turn) -> Any:
        """Arguments of a layer, every table in them turned; containers are copied, so that none is written to."""
        if isinstance(value, Tensor):
            return self._swapped_tensor(value, turn)
        if isinstance(value, list | tuple):
            parts = [self._swapped(part, turn) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, MutableMapping):
            copied = copy.copy(value)
            for name in list(copied):
                copied[name] = self._swapped(copied[name], turn)
            return copied
        return value

    def _swapped_tensor(self, value: Tensor, turn: Turn) -> Tensor:
        if id(value) in self._shared:
            return self._shared[id(value)][1][turn]
        places = [(table, place) for table in self._tables for place in range(len(table.parts))]
        found = [(table, place) for table, place in places if _same(table.parts[place], value)]
        if not found:
            return value
        # Two kinds of layers may have equal tables; a model that hands a copy on has one of each value.
        table, place = next((each for each in found if each[0].parts[each[1]].data_ptr() == value.data_ptr()), found[0])
        self._used.append(table)
        return table.turning(turn)[place]


def _same(part: Tensor, value: Tensor) -> bool:
    return part.dtype == value.dtype and part.shape == value.shape and torch.equal(part, value)


def _in_mappings(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors that stand in mappings, and in what they hold."""
    for value in values:
        if isinstance(value, Mapping):
            for held in value.values():
                yield from held if isinstance(held, tuple | list) else (held,)
