"""What is read of a model under an extension method: the loss of the same last tokens, behind windows of any length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anchor_attn.intervals import mean_interval
from anchor_attn.rope.methods import METHODS
from anchor_attn.rope.search.fitness import perplexity

Stage = Literal["untrained", "fine-tuned"]
STAGES: tuple[Stage, ...] = ("untrained", "fine-tuned")


@dataclass(frozen=True)
class Windows:
    """Windows of a stream that end at the same tokens, however long they are.

    Attributes:
        stream: token ids, int64 [N].
        ends: of each window, where it ends.
        scored_tokens: the last ones of every window, whose loss counts.
    """

    stream: Tensor
    ends: tuple[int, ...]
    scored_tokens: int

    @classmethod
    def spread(cls, stream: Tensor, count: int, longest: int, scored_tokens: int, name: str) -> "Windows":
        """Spread evenly, none of the longest reaching before the stream or into its neighbour.

        Raises:
            ValueError: a stream too short for them, by its name.
        """
        if len(stream) < count * longest:
            raise ValueError(
                f"{name} must hold {count} windows of {longest:,} tokens, got {len(stream):,} tokens; pass more text "
                "or a smaller seq_len."
            )
        ends = tuple(len(stream) * (place + 1) // count for place in range(count))
        return cls(stream, ends, scored_tokens)

    def of(self, seq_len: int) -> list[Tensor]:
        """All of them at one length, int64 [seq_len] each."""
        return [self.stream[end - seq_len : end] for end in self.ends]

    def perplexity(self, model: nn.Module, sequences: Sequence[Tensor]) -> float:
        """Of the scored tokens of some of them: what a search minimises."""
        masks = [torch.arange(len(tokens)) >= len(tokens) - self.scored_tokens for tokens in sequences]
        return perplexity(model, sequences, masks)

    def nats(self, model: nn.Module, seq_len: int) -> tuple[float, ...]:
        """The mean loss of the scored tokens of each."""
        with torch.no_grad():
            return tuple(math.log(self.perplexity(model, [tokens])) for tokens in self.of(seq_len))


@dataclass(frozen=True)
class MethodReading:
    """One method at one length.

    Attributes:
        method: as `extend`; "default" is plain RoPE.
        stage: "untrained", or "fine-tuned" at the length that the plan says.
        times: the length, in multiples of the trained one.
        seq_len: tokens of a window.
        factor: that the method was given; 1 where nothing is extended.
        window_nats: mean loss of the scored tokens of each window.
    """

    method: str
    stage: Stage
    times: int
    seq_len: int
    factor: float
    window_nats: tuple[float, ...]

    @property
    def nats(self) -> float:
        """Mean loss of a scored token."""
        return fmean(self.window_nats)

    @property
    def perplexity(self) -> float:
        """Of the scored tokens of all windows."""
        return math.exp(self.nats) if self.nats < 700 else math.inf

    def record(self) -> dict[str, Any]:
        """As a result file has it; the interval is a 95 % t of the mean over windows, ± so many nats."""
        return {
            "name": f"{self.method} {self.stage}",
            "method": self.method,
            "stage": self.stage,
            "times": self.times,
            "seq_len": self.seq_len,
            "factor": self.factor,
            "perplexity": self.perplexity,
            "nats_per_token": self.nats,
            "interval_nats": mean_interval(self.window_nats).half,
            "windows": len(self.window_nats),
        }


class MethodReadings:
    """Readings by stage, method and length."""

    def __init__(self, readings: Sequence[MethodReading]) -> None:
        self._found = {(reading.stage, reading.method, reading.times): reading for reading in readings}
        self.times = sorted({reading.times for reading in readings})
        self.methods = [method for method in METHODS if any(method == reading.method for reading in readings)]

    def at(self, stage: Stage, method: str, times: int) -> MethodReading:
        """One of them."""
        return self._found[stage, method, times]

    @property
    def trained(self) -> MethodReading:
        """Plain RoPE at its own length."""
        return self.at("untrained", "default", self.times[0])

    def ratio(self, stage: Stage, method: str, times: int) -> float:
        """A perplexity, as a multiple of the plain model's at its own length."""
        return self.at(stage, method, times).perplexity / self.trained.perplexity
