"""Evidence for the extension methods: a small model is trained on short rows and read at up to 16 times their length.

    tokens       256     512   1,024   2,048   4,096
    scored                                        ▇▇      the same last tokens at every length, behind ever more of the
                                   ·············▇▇      text before them: only what is seen differs

Every method is read twice: as it comes, at the factor of each length; and after a short fine-tuning at one length and
the factor of that. Perplexity of longer windows is the same or lower if a method works.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

import torch
from scipy import stats
from torch import Tensor, nn

from anchor_attn.rope.extension import extend
from anchor_attn.rope.methods import METHODS
from anchor_attn.rope.search import search_factors
from anchor_attn.rope.search.fitness import perplexity

Stage = Literal["untrained", "fine-tuned"]
STAGES: tuple[Stage, ...] = ("untrained", "fine-tuned")
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
    tune_steps: int = 25
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


@dataclass(frozen=True)
class Reading:
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
            "interval_nats": half_width(self.window_nats),
            "windows": len(self.window_nats),
        }


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % t interval of a mean; None below 3 values."""
    if len(values) < 3:
        return None
    return float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def bench_rope(
    training: Tensor,
    searched: Tensor,
    held_out: Tensor,
    plan: Plan,
    device: str = "cpu",
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Reading], dict[str, Any]]:
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
    ends = _window_ends(held_out, longest, plan.windows, "held_out")
    search_ends = _window_ends(searched, longest, plan.search_windows, "searched")
    model = _fresh_model(plan, device, seed)
    say(f"training on {plan.steps * plan.batch_tokens:,} tokens in rows of {plan.seq_len}")
    loss = train_rows(model, training, plan.seq_len, plan.steps, plan.batch_tokens, plan.learning_rate, seed)
    options: dict[int, dict[str, Any]] = {}
    for times in plan.times[1:]:
        say(f"searching factors for {times} × {plan.seq_len:,} tokens")
        windows = [searched[end - times * plan.seq_len : end] for end in search_ends]
        found = search_factors(
            model, windows, times, fitness=_scoring(plan.scored_tokens), extra_starts=EXTRA_STARTS, seed=seed,
            **plan.search,
        )  # fmt: skip
        options[times] = {
            "factors": list(found.factors), "n_hat": found.n_hat, "attention_factor": found.attention_factor,
        }  # fmt: skip
    readings: list[Reading] = []
    for method in METHODS:
        say(f"reading {method}, then fine-tuning it at {plan.tuned_times} × {plan.seq_len:,} tokens")
        readings += _untrained(model, method, options, held_out, ends, plan)
        readings += _tuned(model, method, options, training, held_out, ends, plan, seed)
    readings.sort(key=lambda reading: STAGES.index(reading.stage))
    return readings, {"training_loss": loss, "searched": {str(times): found for times, found in options.items()}}


def train_rows(
    model: nn.Module, stream: Tensor, seq_len: int, steps: int, batch_tokens: int, learning_rate: float, seed: int
) -> float:
    """Train on rows from anywhere in a stream: AdamW, a cosine with a warm-up.

    Returns:
        The mean loss over the last tenth of the steps, in nats per token.
    """
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps))
    rows, losses = max(1, batch_tokens // seq_len), []
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(stream) - seq_len, (rows,), generator=draw).tolist()
        batch = torch.stack([stream[start : start + seq_len] for start in starts]).to(device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def read_windows(model: nn.Module, held_out: Tensor, ends: Sequence[int], seq_len: int, scored: int) -> Iterator[float]:
    """The mean loss of the last tokens of each window, in nats."""
    mask = torch.arange(seq_len) >= seq_len - scored
    with torch.no_grad():
        for end in ends:
            yield math.log(perplexity(model, [held_out[end - seq_len : end]], [mask]))


# --- methods ---------------------------------------------------------------------------------------------------------


def _untrained(
    model: nn.Module, method: str, options: dict[int, dict[str, Any]], held_out: Tensor, ends: list[int], plan: Plan
) -> Iterator[Reading]:
    for times in plan.times:
        extended, factor = _under(copy.deepcopy(model), method, times, options)
        yield _read(extended, method, "untrained", times, factor, held_out, ends, plan)


def _tuned(
    model: nn.Module,
    method: str,
    options: dict[int, dict[str, Any]],
    training: Tensor,
    held_out: Tensor,
    ends: list[int],
    plan: Plan,
    seed: int,
) -> Iterator[Reading]:
    length = plan.seq_len * plan.tuned_times
    tuned, factor = _under(copy.deepcopy(model), method, plan.tuned_times, options)
    train_rows(tuned, training, length, plan.tune_steps, plan.batch_tokens, plan.tune_learning_rate, seed)
    for times in plan.times:
        # Anew for every length: transformers' "dynamic" keeps the frequencies of the longest input that it has seen.
        _under(tuned, method, plan.tuned_times, options)
        yield _read(tuned, method, "fine-tuned", times, factor, held_out, ends, plan)


def _under(model: nn.Module, method: str, times: int, options: dict[int, dict[str, Any]]) -> tuple[nn.Module, float]:
    """A model under a method for so many times its length, and the factor that the method got."""
    if method == "default" or times == 1:
        return extend(model, "default"), 1.0
    factor = DYNAMIC_FACTOR if method == "dynamic" else float(times)
    return extend(model, method, factor, **(options[times] if method == "longrope" else {})), factor


def _read(
    model: nn.Module,
    method: str,
    stage: Stage,
    times: int,
    factor: float,
    held_out: Tensor,
    ends: list[int],
    plan: Plan,
) -> Reading:
    seq_len = times * plan.seq_len
    nats = tuple(read_windows(model, held_out, ends, seq_len, plan.scored_tokens))
    return Reading(method, stage, times, seq_len, factor, nats)


# --- the rest --------------------------------------------------------------------------------------------------------


def _fresh_model(plan: Plan, device: str, seed: int) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(**plan.model_size, vocab_size=plan.vocab_size, max_position_embeddings=plan.seq_len)
    return AutoModelForCausalLM.from_config(config).to(device)


def _scoring(scored: int) -> Callable[[nn.Module, Sequence[Tensor]], float]:
    """What a search minimises: what is read of windows."""

    def last_tokens(model: nn.Module, sequences: Sequence[Tensor]) -> float:
        masks = [torch.arange(len(tokens)) >= len(tokens) - scored for tokens in sequences]
        return perplexity(model, sequences, masks)

    return last_tokens


def _window_ends(stream: Tensor, longest: int, count: int, name: str) -> list[int]:
    """Where windows end, spread evenly, none of the longest reaching before the stream or into its neighbour."""
    if len(stream) < count * longest:
        raise ValueError(
            f"{name} must hold {count} windows of {longest:,} tokens, got {len(stream):,} tokens; pass more text or a "
            "smaller seq_len."
        )
    return [len(stream) * (place + 1) // count for place in range(count)]


def _cosine(step: int, steps: int) -> float:
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def describe_plan(plan: Plan) -> dict[str, Any]:
    """As a result file says it."""
    return asdict(plan) | {"dynamic_factor": DYNAMIC_FACTOR, "extra_starts": list(EXTRA_STARTS)}
