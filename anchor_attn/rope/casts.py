"""Where a model rounds its RoPE: its own code beside each policy of `rope_precision`, at the same positions.

    Llama's cos and sin in bfloat16    model 0    bfloat16 0    float32 2.0e-03    exact 1.0e-01

No weights are needed, only the model's code. It is made from its config without storage; what runs before the first
layer's attention gets random weights when it is called, and nothing runs after.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from anchor_attn.rope.configs import at_run_time
from anchor_attn.rope.precision import ROPE_PRECISIONS, RopePrecision
from anchor_attn.rope.rotary import Rotary, RotaryForm, TableHook, rebuilt, recognise, rotaries_of

# float32 angles are off by up to a tenth of a radian at the last, bfloat16 tables from the second on.
POSITIONS = (0, 1, 2, 10, 100, 1000, 4095, 100_003, 1_000_003, 4_000_001)
SAME = 1e-6  # relative: a module may multiply by its attention factor in another order
MOST_BYTES = 4_000_000_000  # of weights before the first attention
RECORDING = "anchor_attn_rope_recording"

Way = Literal["loaded", "cast"]
# `from_pretrained(dtype=…)` keeps frequencies in float32, `.to(…)` rounds them with the weights.
WAYS: tuple[tuple[str, Way], ...] = (("float32", "loaded"), ("bfloat16", "loaded"), ("bfloat16", "cast"))


@dataclass(frozen=True)
class Casts:
    """What a model's own RoPE is equal to.

    Attributes:
        dtype: of its weights.
        way: "loaded" in this dtype, or "cast" to it by `.to()`.
        frequencies: "float32", or "bfloat16" where the cast has rounded them.
        table: largest |difference| of cos and sin to those of each policy, relative to the largest of them.
        rotation: the same of the first layer's query and key, rotated by the model itself under each policy's cos and
            sin; empty where `unseen` says why.
        rotated_in: the dtype that its rotation computes in; None where that cannot be told.
        unseen: why the first layer's query and key could not be taken.
    """

    dtype: str
    way: Way
    frequencies: str
    table: Mapping[RopePrecision, float]
    rotation: Mapping[RopePrecision, float] = field(default_factory=dict)
    rotated_in: str | None = None
    unseen: str | None = None

    @property
    def name(self) -> str:
        """Of the line: how the model came to its dtype."""
        return self.dtype if self.way == "loaded" else f".to({self.dtype})"

    @property
    def meaning(self) -> str:
        """Where the casts happen, in words."""
        same = equal_policies(self.table)
        if not same:
            tables = "cos and sin as no policy has them"
        elif "model" in same or "bfloat16" in same:
            table_dtype = self.dtype if "model" in same else "bfloat16"
            tables = f"float32 angles, cos and sin in {table_dtype}"
        else:
            tables = f"{'float32' if 'float32' in same else 'float64'} angles, cos and sin in float32"
        if self.rotated_in is None:
            return f"{tables}, rotation not known"
        after = "" if self.rotated_in == self.dtype else ", query and key cast after"
        return f"{tables}, rotation in {self.rotated_in}{after}"


def equal_policies(apart: Mapping[RopePrecision, float]) -> list[RopePrecision]:
    """The policies that differ in nothing."""
    return [policy for policy, difference in apart.items() if difference <= SAME]


def find_casts(config: PreTrainedConfig, dtype: str, way: Way = "loaded", seed: int = 0, device: str = "cpu") -> Casts:
    """Compare a model's rotary modules, and the query and key of its first layer, with each policy.

    Args:
        config: of a causal language model; left as it is.
        dtype: "float32" or "bfloat16".
        way: "loaded" in this dtype, or "cast" to it by `.to()`, buffers and all.
        seed: of weights and states.
        device: "cpu" or "cuda".

    Raises:
        ValueError: a model that cannot be made, without rotary positions, or whose rotary module is not recognised.
    """
    model = _hollow_model(config, dtype, way, device)
    forms = {rotary: recognise(rotary) for rotary in rotaries_of(model)}
    if not forms:
        raise ValueError(
            f"model must have rotary position embeddings, got {type(model).__name__} without; name another model."
        )
    sources: dict[str, dict[Rotary, RotaryForm]] = {
        "float32": forms,
        "bfloat16": {_Rounded(each.name, each.module, each.layer_type): form for each, form in forms.items()},
    }
    own, tables = _tables(forms, model.dtype), dict[str, dict[RopePrecision, float]]()
    for source, served in sources.items():
        tables[source] = {}
        for policy in ROPE_PRECISIONS:
            with _under(policy, served):
                tables[source][policy] = _apart(_tables(forms, model.dtype), own)
    frequencies = min(tables, key=lambda source: min(tables[source].values()))
    rotation: dict[RopePrecision, float] = {}
    try:
        states = _first_states(model, seed)
        for policy in ROPE_PRECISIONS:
            with _under(policy, sources[frequencies]):
                rotation[policy] = _apart(_first_states(model, seed).to(states.dtype), states)
        rotated_in = _rotation_dtype(model, seed)
    except Exception as error:  # whatever another library's model raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return Casts(dtype, way, frequencies, tables[frequencies], unseen=reason)
    return Casts(dtype, way, frequencies, tables[frequencies], rotation, rotated_in)


# --- both, under a policy --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rounded(Rotary):
    """A rotary module whose frequencies went through bfloat16."""

    def frequencies(self, seq_len: int | None = None) -> tuple[Tensor, float]:
        inv_freq, attention_factor = super().frequencies(seq_len)
        return inv_freq.bfloat16().float(), attention_factor


@contextmanager
def _under(policy: RopePrecision, served: Mapping[Rotary, RotaryForm]) -> Iterator[None]:
    hooks: dict[nn.Module, TableHook] = {}
    for rotary, form in served.items():
        hooks.setdefault(rotary.module, TableHook(policy)).serve(rotary, form)
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _apart(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.double()
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


def _tables(rotaries: Iterable[Rotary], dtype: torch.dtype) -> Tensor:
    """cos and sin of all kinds of layers, one behind the other."""
    found: list[Tensor] = []
    for rotary in rotaries:
        device = _device_of(rotary)
        states = torch.zeros(1, 1, dtype=dtype, device=device)
        layer = () if rotary.layer_type is None else (rotary.layer_type,)
        given: Any = rotary.module(states, torch.tensor([POSITIONS], device=device), *layer)
        parts = (given.real, given.imag) if isinstance(given, Tensor) else given
        found += [part.flatten().float() for part in parts]
    return torch.cat(found)


def _rotation_dtype(model: PreTrainedModel, seed: int) -> str | None:
    """The dtype in which the first layer adds x · cos and x' · sin, told from the rounding of each alone.

    In bfloat16 both products are rounded to it before they are added; in float32 only their sum is. What is not rotated
    stands on both sides.
    """
    states = {(cos, sin): _first_states_scaled(model, seed, cos, sin) for cos in (0, 1) for sin in (0, 1)}
    dtype = states[1, 1].dtype
    apart = states[1, 0] + states[0, 1]
    together = states[1, 1] + states[0, 0]
    if torch.equal(apart, together):
        return str(dtype).removeprefix("torch.")
    # Not so where a norm follows. Within float32 it is a fused multiply-add, as in complex numbers.
    is_sum = _apart(apart, together) <= 4 * torch.finfo(dtype).eps
    return "float32" if is_sum else None


def _first_states_scaled(model: PreTrainedModel, seed: int, cos: int, sin: int) -> Tensor:
    """Query and key under the model's own tables, one half of them or both taken away."""

    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return torch.complex(cos * output.real, sin * output.imag)
        return cos * output[0], sin * output[1]

    handles = [module.register_forward_hook(scale) for module in {rotary.module for rotary in rotaries_of(model)}]
    try:
        return _first_states(model, seed)
    finally:
        for handle in handles:
            handle.remove()


def _device_of(rotary: Rotary) -> torch.device:
    return next(rotary.module.buffers()).device


# --- a model without storage -----------------------------------------------------------------------------------------


class _SeenError(Exception):
    """The first layer's query and key; the rest of the model need not run."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.states = torch.cat([query.flatten(), key.flatten()])


def _hollow_model(config: PreTrainedConfig, dtype: str, way: Way, device: str) -> PreTrainedModel:
    """A model whose weights come into being when they are called for, and whose rotary modules are real."""
    config = copy.deepcopy(at_run_time(config.get_text_config()))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except Exception as error:  # whatever another library's model makes of a config
        raise ValueError(
            f"model must be a config that a causal language model can be built from, got {type(config).__name__} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); mend the config."
        ) from error
    for name, module in {rotary.name: rotary.module for rotary in rotaries_of(model)}.items():
        real = rebuilt(module, module.config).to(device)
        model.set_submodule(name, real.to(getattr(torch, dtype)) if way == "cast" else real)
    room = [MOST_BYTES]

    def fill(module: nn.Module, *_: Any) -> None:
        hollow = [parameter for parameter in module.parameters(recurse=False) if parameter.is_meta]
        if not hollow:
            return
        room[0] -= sum(parameter.numel() * parameter.element_size() for parameter in hollow)
        if room[0] < 0:
            raise MemoryError(f"more than {MOST_BYTES:,} bytes of weights before the first attention")
        module.to_empty(device=torch.device(device), recurse=False)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.ones_(parameter)

    for module in model.modules():
        module.register_forward_pre_hook(fill)
    return model


def _record(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    raise _SeenError(query, key)


@torch.no_grad()
def _first_states(model: PreTrainedModel, seed: int) -> Tensor:
    """The first layer's query and key as its attention gets them, rotated, one behind the other."""
    AttentionInterface.register(RECORDING, _record)
    model.config._attn_implementation = RECORDING
    device = _device_of(next(rotaries_of(model)))
    embeddings: Any = model.get_input_embeddings()
    width: int = embeddings.weight.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        states = torch.randn(1, len(POSITIONS), width).to(device, model.dtype)
        try:
            model(inputs_embeds=states, position_ids=torch.tensor([POSITIONS], device=device), use_cache=False)
        except _SeenError as seen:
            return seen.states
    raise TypeError(f"{type(model).__name__} ignores transformers' AttentionInterface")
