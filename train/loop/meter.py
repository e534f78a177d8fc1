"""What a step did and what it cost, over all processes, for the log and for losses.jsonl."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from anchor_attn.masks import PackedLayout, attended_pairs
from anchor_attn.masks.patterns import Pattern
from anchor_attn.parallel.layout import ShardedLayout
from anchor_attn.train.run import peak_bytes

T = TypeVar("T")


@dataclass
class Clock:
    """Seconds added up, those inside others once."""

    seconds: float = 0.0
    depth: int = 0

    def time(self, build: Callable[[], T]) -> T:
        """What `build` makes."""
        start, self.depth = time.perf_counter(), self.depth + 1
        try:
            return build()
        finally:
            self.depth -= 1
            if not self.depth:
                self.seconds += time.perf_counter() - start


class TimedLayout(PackedLayout):
    """A layout that adds up the seconds, on the host, in which its plans are made: masks, bounds and gathers."""

    def __init__(self, layout: PackedLayout, clock: Clock) -> None:
        super().__init__(layout.document_ids, layout.anchor_tokens, layout.runs)
        self.clock = clock

    def plan(self, key: Hashable, build: Callable[[], T]) -> T:
        """As `PackedLayout.plan`."""
        return super().plan(key, lambda: self.clock.time(build))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedLayout:
        """The same layout on `device`, on the same clock."""
        moved = super().to(device, non_blocking)
        return moved if moved is self else TimedLayout(moved, self.clock)


@dataclass(frozen=True)
class Costs:
    """FLOPs of a model's forward and backward: of one document token, and of one attended pair in all its heads.

    Attributes:
        per_token: of the products with weights, 6 a weight.
        per_pair: of scores and values, forward once and backward twice, in all layers and heads.
        peak_flops_per_s: of the device in bfloat16; None where it is not known.
    """

    per_token: float
    per_pair: float
    peak_flops_per_s: float | None


@dataclass
class StepMeter:
    """Adds up one optimizer step of this process; `take` closes it over all of them.

    Attributes:
        pattern: of the model's mask.
        device: "cpu" or "cuda".
        costs: of the model, for MFU.
        bos_tokens: whether every document has a BOS of its own, which is not counted.
        tokens: document tokens of all processes since the run began.
        ranks_a_row: processes that share a row, and count it each.
    """

    pattern: Pattern
    device: str
    costs: Costs
    bos_tokens: bool = False
    tokens: int = 0
    ranks_a_row: int = 1
    _start: float = 0.0
    _wait_s: float = 0.0
    _mask: Clock = field(default_factory=Clock)
    _own_tokens: int = 0
    _pairs: int = 0
    _full_pairs: int = 0
    _losses: list[Tensor] = field(default_factory=list)
    _router_losses: list[Tensor] = field(default_factory=list)

    def start(self) -> None:
        """Begin a step."""
        self._start, self._wait_s = time.perf_counter(), 0.0
        self._mask.seconds = 0.0
        self._own_tokens = self._pairs = self._full_pairs = 0
        self._losses.clear()
        self._router_losses.clear()

    def wait(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches, and the seconds that it takes to get them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._wait_s += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add_layout(self, layout: PackedLayout | ShardedLayout) -> PackedLayout | ShardedLayout:
        """Count a micro-batch, its rows whole, and time what its layout will make."""
        whole = layout.whole if isinstance(layout, ShardedLayout) else layout
        extra = whole.num_documents if self.bos_tokens else 0
        self._own_tokens += sum(map(sum, whole.document_lengths)) - extra
        self._pairs += sum(attended_pairs(whole, self.pattern))
        self._full_pairs += sum(attended_pairs(whole, "full"))
        if isinstance(layout, PackedLayout):
            return TimedLayout(layout, self._mask)
        own, shared = (part and TimedLayout(part, self._mask) for part in (layout.own, layout.shared))
        return replace(layout, own=own, shared=shared)

    def add_loss(self, loss: Tensor, router_loss: Tensor | None) -> None:
        """A micro-batch's share of the step's loss, and its load-balancing loss where the model has one."""
        self._losses.append(loss.detach())
        if router_loss is not None:
            self._router_losses.append(router_loss.detach())

    def take(self, gather: Callable[[Tensor], Tensor], asked_to_stop: bool) -> tuple[dict[str, Any], bool]:
        """The step over all processes.

        Args:
            gather: float64 [1, n] of every process to [processes, n].
            asked_to_stop: whether this process was.

        Returns:
            The numbers, and whether any process was asked to stop.
        """
        loss = float(torch.stack(self._losses).double().sum())  # waits for the device, so the clock below is honest
        router = float(torch.stack(self._router_losses).double().mean()) if self._router_losses else 0.0
        own = [
            loss, router, self._own_tokens, self._pairs, self._full_pairs, self._mask.seconds, self._wait_s,
            time.perf_counter() - self._start, peak_bytes(self.device), asked_to_stop,
        ]  # fmt: skip
        table = gather(torch.tensor([own], dtype=torch.float64, device=self._losses[0].device)).cpu()
        means, sums, most = table.mean(0).tolist(), table.sum(0).tolist(), table.amax(0).tolist()
        seconds = most[7]
        tokens, pairs = sums[2] / self.ranks_a_row, sums[3] / self.ranks_a_row
        self.tokens += round(tokens)
        numbers: dict[str, Any] = {
            "loss": means[0],
            "tokens": self.tokens,
            "tokens_per_s": tokens / seconds,
            "step_s": seconds,
            "wait_s": most[6],
            "mask_s": most[5],
            "pairs_of_full": sums[3] / sums[4],
            "peak_bytes": round(most[8]),
        }
        if self._router_losses:
            numbers["router_loss"] = means[1]
        if self.costs.peak_flops_per_s is not None:
            flops = self.costs.per_token * tokens + self.costs.per_pair * pairs
            numbers["mfu"] = flops / seconds / (self.costs.peak_flops_per_s * len(table))
        return numbers, most[9] > 0


def costs_of(model: Any, device: str) -> Costs:
    """A model's costs on the device that it is trained on."""
    from anchor_attn.train.plan.devices import recognize_device
    from anchor_attn.train.plan.models import describe_config

    shape = describe_config(model.config)
    known = recognize_device(torch.cuda.get_device_name()) if device.startswith("cuda") else None
    pair = 6 * shape.layers * shape.num_heads * (shape.head_dim + shape.value_dim)
    return Costs(
        6.0 * (shape.layer_weights + shape.head_weights), float(pair), None if known is None else known.flops_per_s
    )


def step_line(record: Mapping[str, Any], steps: int) -> str:
    """A step on one line of the terminal."""
    parts = [
        f"step {record['step']}/{steps}",
        f"loss {record['loss']:.4f}",
        *([f"router {record['router_loss']:.4f}"] if "router_loss" in record else []),
        f"lr {record['lr']:.2e}",
        f"gradient {record['grad_norm']:.3f}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        f"pairs {record['pairs_of_full']:.1%}",
        f"mask {record['mask_s']:.4f} s",
        f"wait {record['wait_s']:.4f} s",
        f"{record['peak_bytes'] / 2**30:.2f} GiB",
        *([f"MFU {record['mfu']:.1%}"] if "mfu" in record else []),
    ]
    return " · ".join(parts)
