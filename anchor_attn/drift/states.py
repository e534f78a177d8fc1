"""Query and key before rotation, and all that turns them into scores: of a model's layer, or random ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from anchor_attn.drift.memory import check_memory
from anchor_attn.masks.layout import checked_int
from anchor_attn.rope.precision import inverse_frequencies

LLAMA_THETA = 10_000.0


@dataclass(frozen=True)
class States:
    """Query and key of one layer, before rotation.

        States(query, key, inverse_frequencies(128, 10_000.0))

    B batch · H heads · K key heads · S tokens · D head size · R of it rotated, in R/2 pairs

    Attributes:
        query: floating [B, H, S, D].
        key: floating [B, K, S, D]; K divides H.
        inv_freq: float32 [R/2], recomputed from the config.
        attention_factor: on cos and sin, of YaRN and LongRoPE.
        interleaved: pairs are neighbours, 2i and 2i + 1; else halves, i and i + R/2.
        rotary_start: where the rotated numbers of a head begin.
        scale: on the scores; 1/√D when None.
        softcap: c of c · tanh(score / c), before the softmax.
        sliding_window: the current token and this many less one before it.
        sinks: learned logits [H].
        layer: its place in its model; None for states of none.
    """

    query: Tensor = field(repr=False)
    key: Tensor = field(repr=False)
    inv_freq: Tensor = field(repr=False)
    attention_factor: float = 1.0
    interleaved: bool = False
    rotary_start: int = 0
    scale: float | None = None
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: Tensor | None = field(default=None, repr=False)
    layer: int | None = None

    def __post_init__(self) -> None:
        self._check_shapes()
        for name in ("query", "key"):
            if not torch.isfinite(getattr(self, name)).all():
                where = "" if self.layer is None else f" in layer {self.layer}"
                raise ValueError(f"{name} must be finite, got nan or inf{where}; see what made it.")

    def _check_shapes(self) -> None:
        for name in ("query", "key"):
            x = getattr(self, name)
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise TypeError(f"{name} must be a floating tensor, got {_kind(x)}; pass states before rotation.")
            if x.device.type != "cpu":
                raise ValueError(f"{name} must be on the CPU, got {x.device}; move it with {name}.cpu().")
            if x.ndim != 4:
                raise ValueError(
                    f"{name} must have shape [B, H, S, D], got {list(x.shape)}; add the missing dimensions with [None]."
                )
        query, key = self.query, self.key
        fits = query.shape[0] == key.shape[0] and query.shape[2:] == key.shape[2:] and not query.shape[1] % key.shape[1]
        if not fits or 0 in query.shape:
            raise ValueError(
                f"query and key must have shapes [B, H, S, D] and [B, K, S, D] with K dividing H, got "
                f"{list(query.shape)} and {list(key.shape)}; pass both of one layer."
            )
        if self.inv_freq.ndim != 1 or self.inv_freq.dtype != torch.float32:
            raise ValueError(
                f"inv_freq must be float32 [R/2], got {self.inv_freq.dtype} {list(self.inv_freq.shape)}; compute it "
                "with inverse_frequencies, never from a buffer that a cast may have rounded."
            )
        if not 0 < 2 * len(self.inv_freq) <= self.head_dim - self.rotary_start:
            raise ValueError(
                f"inv_freq must have at most {(self.head_dim - self.rotary_start) // 2} pairs for a head of "
                f"{self.head_dim}, got {len(self.inv_freq)}; pass one frequency a rotated pair."
            )

    @property
    def seq_len(self) -> int:
        """Tokens."""
        return self.query.shape[2]

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.query.shape[3]

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that are rotated."""
        return 2 * len(self.inv_freq)

    @property
    def repeats(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def score_scale(self) -> float:
        """On the products of query and key."""
        return 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    def first(self, tokens: int) -> "States":
        """Of the first tokens alone: a causal model makes no others of a shorter row."""
        return replace(self, query=self.query[:, :, :tokens], key=self.key[:, :, :tokens])

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What stands before the rotated numbers, first and second of each pair, and what stands behind; [..., n]."""
        start, stop = self.rotary_start, self.rotary_start + self.rotary_dim
        rotated = x[..., start:stop]
        first, second = (rotated[..., 0::2], rotated[..., 1::2]) if self.interleaved else rotated.chunk(2, dim=-1)
        return x[..., :start], first, second, x[..., stop:]

    def join(self, before: Tensor, first: Tensor, second: Tensor, after: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.interleaved:
            rotated = torch.stack((first, second), dim=-1).flatten(-2)
        else:
            rotated = torch.cat((first, second), dim=-1)
        return torch.cat((before, rotated, after), dim=-1)


def random_states(
    seq_len: int = 2048,
    head_dim: int = 128,
    num_heads: int = 1,
    theta: float = LLAMA_THETA,
    seed: int = 0,
) -> States:
    """Query and key of a random normal, rounded to bfloat16, under plain RoPE.

    Args:
        seq_len: tokens.
        head_dim: all of it rotated; even.
        num_heads: of query and key.
        theta: base of the frequencies.
        seed: of the numbers.

    Raises:
        ValueError: sizes that are none, or that the memory at hand does not hold.
    """
    for name, value in (("seq_len", seq_len), ("num_heads", num_heads)):
        if checked_int(value, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; pass 2048 tokens, or 1 head.")
    inv_freq = inverse_frequencies(head_dim, theta)
    check_memory(seq_len, head_dim, num_heads)
    draw = torch.Generator().manual_seed(seed)
    shape = (1, num_heads, seq_len, head_dim)
    query, key = (torch.randn(shape, generator=draw).bfloat16() for _ in range(2))
    return States(query, key, inv_freq)


def list_layers(states: States | Sequence[States]) -> list[States]:
    """One layer or several, as several.

    Raises:
        ValueError: none.
    """
    layers = [states] if isinstance(states, States) else list(states)
    if not layers:
        raise ValueError("states must hold one layer at least, got none; pass what capture_states returns.")
    return layers


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
