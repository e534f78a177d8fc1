"""Evidence for the extension methods: a small model is trained on short rows and read at up to 16 times their length.

    tokens       256     512   1,024   2,048   4,096
    scored                                        ▇▇      the same last tokens at every length, behind ever more of the
                                   ·············▇▇      text before them: only what is seen differs

Every method is read twice: as it comes, at the factor of each length; and after a short fine-tuning at one length and
the factor of that. Perplexity of longer windows is the same or lower if a method works.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anchor_attn.bench.rope_readings import STAGES, MethodReading, Stage, Windows
from anchor_attn.rope.extension import extend
from anchor_attn.rope.methods import METHODS
from anchor_attn.rope.search import search_factors

# The `a` of dynamic NTK, one for all lengths: its base follows the input by itself.
DYNAMIC_FACTOR = 2.0
# What a search starts from beside PI, NTK and YaRN, so that on its own text it is no worse than any fixed method.
EXTRA_STARTS = ("ntk_by_parts", "yarn_paper", "llama3")
WARM_UP_SHARE = 0.1
LAPTOP: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Plan:
    """All that the evidence depends on besides its text.

    Attributes:
        seq_len: tokens of the rows that the model is trained on.
        times: lengths it is read at, in multiples of seq_len; the first is 1.
        tuned_times: length of the fine-tuning, one of these.
        model_size: fields of a LlamaConfig.
        vocab_size: of the tokenizer.
        steps: of the training.
        tune_steps: of a fine-tuning.
        batch_tokens: a step, of either.
        learning_rate: peak of the training's cosine.
        tune_learning_rate: peak of a fine-tuning's.
        windows: that are read at every length.
        scored_tokens: the last ones of every window.
        search: options of `search_factors`.
        search_windows: that a search reads, of another text than the windows above.
    """

    seq_len: int = 256
    times: tuple[int, ...] = (1, 2, 4, 8, 16)
    tuned_times: int = 16
    model_size: dict[str, Any] = field(default_factory=lambda: dict(LAPTOP))
    vocab_size: int = 257
    steps: int = 500
    tune_steps: int = 100
    batch_tokens: int = 4096
    learning_rate: float = 2e-3
    tune_learning_rate: float = 1e-3
    windows: int = 16
    scored_tokens: int = 128
    search: dict[str, Any] = field(
        default_factory=lambda: {"population": 14, "mutations": 5, "crossovers": 5, "rounds": 4, "parents": 8}
    )
    search_windows: int = 4

    def __post_init__(self) -> None:
        if self.seq_len < 2 * self.scored_tokens:
            raise ValueError(
                f"seq_len must be at least {2 * self.scored_tokens}, twice the scored tokens, got {self.seq_len}; "
                "pass 256."
            )
        if self.times[0] != 1 or self.tuned_times not in self.times[1:]:
            raise ValueError(
                f"times must begin with 1 and hold tuned_times, got {self.times} and {self.tuned_times}; add them."
            )

    @property
    def training(self) -> "Course":
        """Of the model."""
        return Course(self.seq_len, self.steps, self.batch_tokens, self.learning_rate)

    @property
    def fine_tuning(self) -> "Course":
        """Of a method."""
        return Course(self.seq_len * self.tuned_times, self.tune_steps, self.batch_tokens, self.tune_learning_rate)

    def describe(self) -> dict[str, Any]:
        """As a result file says it."""
        return asdict(self) | {"dynamic_factor": DYNAMIC_FACTOR, "extra_starts": list(EXTRA_STARTS)}


@dataclass(frozen=True)
class Course:
    """Steps of training.

    Attributes:
        seq_len: tokens of a row.
        steps: of the optimizer.
        batch_tokens: a step.
        learning_rate: peak of the cosine.
    """

    seq_len: int
    steps: int
    batch_tokens: int
    learning_rate: float


def bench_rope(
    training: Tensor,
    searched: Tensor,
    held_out: Tensor,
    plan: Plan,
    device: str = "cpu",
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[MethodReading], dict[str, Any]]:
    """Train, search, read, fine-tune and read again.

    Args:
        training: token ids, int64 [N], of documents in a row.
        searched: the same of other documents, for the searches.
        held_out: the same of yet others, which are read.
        plan: sizes and steps.
        device: "cpu" or "cuda".
        seed: of weights, rows and searches.
        say: told what is being done.

    Returns:
        Readings; and what was found on the way: the training loss, and the factors of every search.

    Raises:
        ValueError: too little text for its windows.
    """
    longest = plan.seq_len * max(plan.times)
    windows = Windows.spread(held_out, plan.windows, longest, plan.scored_tokens, "held_out")
    search_windows = Windows.spread(searched, plan.search_windows, longest, plan.scored_tokens, "searched")
    model = _fresh_model(plan, device, seed)
    say(f"training on {plan.steps * plan.batch_tokens:,} tokens in rows of {plan.seq_len}")
    loss = train_rows(model, training, plan.training, seed)
    options: dict[int, dict[str, Any]] = {}
    for times in plan.times[1:]:
        say(f"searching factors for {times} × {plan.seq_len:,} tokens")
        found = search_factors(
            model, search_windows.of(times * plan.seq_len), times, fitness=search_windows.perplexity,
            extra_starts=EXTRA_STARTS, seed=seed, **plan.search,
        )  # fmt: skip
        options[times] = {
            "factors": list(found.factors), "n_hat": found.n_hat, "attention_factor": found.attention_factor,
        }  # fmt: skip
    evidence = Evidence(model, plan, training, windows, options, seed)
    readings: list[MethodReading] = []
    for method in METHODS:
        say(f"reading {method}, then fine-tuning it at {plan.tuned_times} × {plan.seq_len:,} tokens")
        readings += [*evidence.untrained(method), *evidence.fine_tuned(method)]
    readings.sort(key=lambda reading: STAGES.index(reading.stage))
    return readings, {"training_loss": loss, "searched": {str(times): found for times, found in options.items()}}


def train_rows(model: nn.Module, stream: Tensor, course: Course, seed: int) -> float:
    """Train on rows from anywhere in a stream: AdamW, a cosine with a warm-up.

    Returns:
        The mean loss over the last tenth of the steps, in nats per token.
    """
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, course.steps))
    rows, losses = max(1, course.batch_tokens // course.seq_len), []
    model.train()
    for _ in range(course.steps):
        starts = torch.randint(len(stream) - course.seq_len, (rows,), generator=draw).tolist()
        batch = torch.stack([stream[start : start + course.seq_len] for start in starts]).to(device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    return float(torch.stack(losses[-max(1, course.steps // 10) :]).mean())


@dataclass(frozen=True)
class Evidence:
    """A trained model, and what it is read with.

    Attributes:
        model: stays as it is.
        plan: sizes and steps.
        training: the stream that a fine-tuning goes on with.
        windows: that are read.
        searched: options of "longrope" by the length they were searched for, in multiples of the trained one.
        seed: of the rows of a fine-tuning.
    """

    model: nn.Module
    plan: Plan
    training: Tensor
    windows: Windows
    searched: Mapping[int, Mapping[str, Any]]
    seed: int

    def untrained(self, method: str) -> Iterator[MethodReading]:
        """A method as it comes, at the factor of each length."""
        for times in self.plan.times:
            extended, factor = self.under(copy.deepcopy(self.model), method, times)
            yield self._read(extended, method, "untrained", times, factor)

    def fine_tuned(self, method: str) -> Iterator[MethodReading]:
        """A method after a fine-tuning, at the factor of that, at every length."""
        tuned, factor = self.under(copy.deepcopy(self.model), method, self.plan.tuned_times)
        train_rows(tuned, self.training, self.plan.fine_tuning, self.seed)
        for times in self.plan.times:
            # Anew for every length: transformers' "dynamic" keeps the frequencies of the longest input it has seen.
            self.under(tuned, method, self.plan.tuned_times)
            yield self._read(tuned, method, "fine-tuned", times, factor)

    def under(self, model: nn.Module, method: str, times: int) -> tuple[nn.Module, float]:
        """A model under a method for so many times its length, and the factor that the method got."""
        if method == "default" or times == 1:
            return extend(model, "default"), 1.0
        factor = DYNAMIC_FACTOR if method == "dynamic" else float(times)
        return extend(model, method, factor, **(self.searched[times] if method == "longrope" else {})), factor

    def _read(self, model: nn.Module, method: str, stage: Stage, times: int, factor: float) -> MethodReading:
        seq_len = times * self.plan.seq_len
        return MethodReading(method, stage, times, seq_len, factor, self.windows.nats(model, seq_len))


def _fresh_model(plan: Plan, device: str, seed: int) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(**plan.model_size, vocab_size=plan.vocab_size, max_position_embeddings=plan.seq_len)
    return AutoModelForCausalLM.from_config(config).to(device)


def _cosine(step: int, steps: int) -> float:
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
