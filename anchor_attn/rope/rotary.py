"""Rotary modules of transformers: which a model has, what frequencies they stand for, and in what form they give them.

    form          what the module returns for R/2 frequencies     for example
    "halves"      cos and sin [B, S, R], all of them twice         Llama
    "neighbours"  cos and sin [B, S, R], each of them twice        Cohere
    "single"      cos and sin [B, S, R/2]                          gpt-oss
    "complex"     cos + i·sin [B, S, R/2]                          DeepSeek-V2

Nothing is known by name: a module is recognised when one of the forms gives what it gives.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from anchor_attn.rope.precision import RopePrecision, RotaryTable, check_rope_precision, rotary_table

RotaryForm = Literal["halves", "neighbours", "single", "complex"]
ROTARY_FORMS: tuple[RotaryForm, ...] = ("halves", "neighbours", "single", "complex")
# These choose frequencies by the length of the input.
BY_LENGTH = ("dynamic", "longrope")
START_HANDLES = "_anchor_attn_start_handles"


@dataclass(frozen=True)
class Rotary:
    """A rotary module, for one kind of layer where kinds differ.

    Attributes:
        name: of the module in its model.
        module: which computes cos and sin.
        layer_type: as the module is called with it; None where all layers share.
    """

    name: str
    module: Any  # an nn.Module with the attributes that transformers gives its rotary modules
    layer_type: str | None

    @property
    def rope_type(self) -> str:
        """As in the config: "default", "yarn", …"""
        rope_type = self.module.rope_type
        return rope_type if self.layer_type is None else rope_type[self.layer_type]

    def frequencies(self, seq_len: int | None = None) -> tuple[Tensor, float]:
        """Inverse frequencies, float32 [R/2] on the host, and the factor on cos and sin, both from the config.

        Never from the module's buffers, which `.to(torch.bfloat16)` would have rounded.

        Args:
            seq_len: of the input, for methods that choose by it; None for the original length.
        """
        layer: dict[str, Any] = {} if self.layer_type is None else {"layer_type": self.layer_type}
        with torch.device("cpu"):
            if self.rope_type == "default":
                return self.module.compute_default_rope_parameters(self.module.config, **layer)
            init: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS[self.rope_type]
            return init(self.module.config, torch.device("cpu"), seq_len=seq_len, **layer)

    def table_as_built(self, position_ids: Tensor) -> Any:
        """What the module gave in float32 when it was new, before a cast could round its buffers."""
        layer = () if self.layer_type is None else (self.layer_type,)
        with torch.device("cpu"):
            return type(self.module)(self.module.config)(torch.zeros(1), position_ids, *layer)


def rotaries_of(model: nn.Module) -> Iterator[Rotary]:
    """The rotary modules of a model, once for every kind of layer that they know."""
    for name, module in model.named_modules():
        rope_type = getattr(module, "rope_type", None)
        if rope_type is None and not type(module).__name__.endswith("RotaryEmbedding"):
            continue
        if isinstance(rope_type, dict):
            yield from (Rotary(name, module, layer_type) for layer_type in rope_type)
        else:
            yield Rotary(name, module, None)


def recognise(rotary: Rotary) -> RotaryForm:
    """The form in which a rotary module gives its table.

    Raises:
        ValueError: none of the forms gives what the module gives from its config's frequencies.
    """
    position_ids = torch.tensor([[0, 1, 2, 5]], device="cpu")
    try:
        inv_freq, attention_factor = rotary.frequencies(seq_len=6)
        given = rotary.table_as_built(position_ids)
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(_unrecognised(rotary, f"one that failed with {type(error).__name__}: {error}")) from error
    table = rotary_table(position_ids, inv_freq, "model", torch.float32, attention_factor)
    for form in ROTARY_FORMS:
        if _same(in_form(table, form), given):
            return form
    raise ValueError(_unrecognised(rotary, "one that gives another table than its config's frequencies"))


def rebuilt(module: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """A new rotary module of the same class for another config, on the host.

    Raises:
        ValueError: its class cannot be made from a config, or fails on this one.
    """
    try:
        with torch.device("cpu"):
            return type(module)(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model must have rotary modules that are made from a config, got {type(module).__name__}, which failed "
            f"with {type(error).__name__}: {error}; extend its config before the model is made."
        ) from error


def adopt(module: nn.Module, new: nn.Module) -> None:
    """Make a rotary module what a new one is; its hooks, its config, its mode and its device stay."""
    device = next(module.buffers()).device
    # Accelerate puts a forward of its own into the module.
    stale = [
        name for name in vars(module) if not name.startswith("_") and name not in ("training", "config", "forward")
    ]
    for name in [*stale, *module._buffers]:
        delattr(module, name)
    for name, value in vars(new).items():
        if not name.startswith("_") and name not in ("training", "config"):
            setattr(module, name, value)
    for name, buffer in new.named_buffers(recurse=False):
        module.register_buffer(name, buffer.to(device), persistent=False)
    for handle in vars(module).pop(START_HANDLES, ()):
        handle.remove()


def keep_start(rotary: Rotary, form: RotaryForm, inv_freq: Tensor, n_hat: int, length: int) -> None:
    """Let the first n̂ positions of a rotary module keep the original frequencies, as LongRoPE has it.

    Until `adopt` makes the module another one.

    Args:
        rotary: of a "longrope" module.
        form: of its tables.
        inv_freq: the original frequencies, float32 [R/2].
        n_hat: positions.
        length: the original length in tokens. Where inputs up to it have factors of their own, they have no n̂.
    """
    config: Any = rotary.module.config
    parameters = config.rope_parameters if rotary.layer_type is None else config.rope_parameters[rotary.layer_type]
    shortest = 0 if parameters["short_factor"] == parameters["long_factor"] else length + 1
    _, attention_factor = rotary.frequencies()
    hook = StartHook(rotary.layer_type, form, inv_freq, attention_factor, n_hat, shortest)
    handle = rotary.module.register_forward_hook(hook, with_kwargs=True)
    vars(rotary.module).setdefault(START_HANDLES, []).append(handle)


class StartHook:
    """A forward hook that gives the first n̂ positions the angles of other frequencies, in inputs that are long enough.

    Args:
        layer_type: whose tables are changed.
        form: of these tables.
        inv_freq: float32 [R/2].
        attention_factor: on cos and sin, which all positions share.
        n_hat: positions.
        shortest: tokens of the shortest input that is changed.
    """

    def __init__(
        self,
        layer_type: str | None,
        form: RotaryForm,
        inv_freq: Tensor,
        attention_factor: float,
        n_hat: int,
        shortest: int = 0,
    ):
        self._layer_type = layer_type
        self._form = form
        self._inv_freq = inv_freq
        self._attention_factor = attention_factor
        self._n_hat = n_hat
        self._shortest = shortest

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The module's table, its first positions changed."""
        _, position_ids, layer_type = called_with(*args, **kwargs)
        if layer_type != self._layer_type:
            return output
        if self._inv_freq.device != position_ids.device:
            self._inv_freq = self._inv_freq.to(position_ids.device)
        table = rotary_table(position_ids, self._inv_freq, "exact", torch.float32, self._attention_factor)
        is_start = (position_ids < self._n_hat) & (position_ids.max() >= self._shortest - 1)
        start = in_form(table, self._form)
        if isinstance(output, Tensor):
            return torch.where(is_start[..., None], start.to(output.dtype), output)
        pairs = zip(start, output, strict=True)
        return tuple(torch.where(is_start[..., None], one.to(two.dtype), two) for one, two in pairs)


def called_with(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor, str | None]:
    """The arguments of a rotary module, by place or by name, as transformers calls it."""
    return x, position_ids, layer_type


def override_tables(model: nn.Module, precision: RopePrecision) -> "dict[TableHook, RemovableHandle]":
    """Let the rotary modules of a model give tables of a stated precision, from their configs' frequencies.

    The model rotates in the dtype that cos and sin have, as PyTorch promotes: of bfloat16 states in float32, where the
    table is float32. What it hands to its attention is float32 then, and is cast there. A table is made where the
    model asks for one: once a batch, for all layers.

    Returns:
        A hook for each rotary module, with what takes it off again.

    Raises:
        ValueError: no rotary module, or one that is not recognised; then nothing is changed.
    """
    check_rope_precision(precision)
    rotaries = list(rotaries_of(model))
    if not rotaries:
        raise ValueError(
            f"model must have rotary position embeddings for rope_precision={precision!r}, got {type(model).__name__} "
            "without; pass rope_precision='model'."
        )
    hooks: dict[nn.Module, TableHook] = {}
    for rotary, form in [(rotary, recognise(rotary)) for rotary in rotaries]:
        hooks.setdefault(rotary.module, TableHook(precision)).serve(rotary, form)
    return {hook: module.register_forward_hook(hook, with_kwargs=True, prepend=True) for module, hook in hooks.items()}


class TableHook:
    """A forward hook that gives a rotary module's table in a stated precision, while `is_on`.

    Methods that choose frequencies by the input's length read it from the positions, as transformers does, which syncs.
    Of this input's: "dynamic" in transformers goes on with those of a longer input that came before.
    """

    def __init__(self, precision: RopePrecision):
        self.precision = precision
        self.is_on = True
        self._served: dict[str | None, tuple[Rotary, RotaryForm]] = {}
        # Of each kind of layer the last ones, and what they were made for.
        self._frequencies: dict[str | None, tuple[tuple[Any, ...], Tensor, float]] = {}

    def serve(self, rotary: Rotary, form: RotaryForm) -> None:
        """Give the tables of one kind of layer."""
        self._served[rotary.layer_type] = rotary, form

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The table for the states and the positions that the module was called with."""
        if not self.is_on:
            return output
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        states, position_ids = next(iter(given.values())), given["position_ids"]
        rotary, form = self._served[given.get("layer_type")]
        inv_freq, attention_factor = self._frequencies_for(rotary, position_ids)
        return in_form(rotary_table(position_ids, inv_freq, self.precision, states.dtype, attention_factor), form)

    def _frequencies_for(self, rotary: Rotary, position_ids: Tensor) -> tuple[Tensor, float]:
        config = rotary.module.config
        seq_len = int(position_ids.max()) + 1 if rotary.rope_type in BY_LENGTH else None
        read = repr(config.rope_parameters), config.max_position_embeddings
        asked = position_ids.device, seq_len, read
        kept = self._frequencies.get(rotary.layer_type)
        if kept is None or kept[0] != asked:
            inv_freq, attention_factor = rotary.frequencies(seq_len)
            kept = asked, inv_freq.to(position_ids.device, non_blocking=True), attention_factor
            self._frequencies[rotary.layer_type] = kept
        return kept[1], kept[2]


def in_form(table: RotaryTable, form: RotaryForm) -> Any:
    """A table as a rotary module of a form gives it."""
    cos, sin = table
    if form == "halves":
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    if form == "neighbours":
        return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    if form == "single":
        return cos, sin
    wide = torch.promote_types(cos.dtype, torch.float32)  # there is no complex bfloat16
    return torch.complex(cos.to(wide), sin.to(wide))


def _same(ours: Any, given: Any) -> bool:
    """Equal but for a rounding: a module may multiply by its attention factor in another order."""
    if isinstance(ours, Tensor) != isinstance(given, Tensor):
        return False
    pairs = [(ours, given)] if isinstance(ours, Tensor) else list(zip(ours, given, strict=False))
    return all(
        isinstance(two, Tensor) and one.shape == two.shape and bool((one - two).abs().max() <= 1e-6)
        for one, two in pairs
    )


def _unrecognised(rotary: Rotary, got: str) -> str:
    return (
        f"model must have rotary modules as transformers writes them, got {rotary.name!r} "
        f"({type(rotary.module).__name__}), {got}; pass rope_precision='model', or set its frequencies yourself."
    )
