"""Benchmarks: ratios against named rivals on the same input, in one run, after a parity check in that run.

Every measurement alternates the rivals round by round, so that a noisy machine disturbs all of them alike, and
reports medians.
"""

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anchor_attn.attention import anchor_attention
from anchor_attn.masks import PATTERNS, PackedLayout, attended_pairs
from anchor_attn.masks.patterns import Pattern
from anchor_attn.results import CheckError

PARITY_TOKENS = 700
PARITY_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Timing:
    """What one rival took.

    Attributes:
        name: of the rival.
        engine: of ours, or whose it is.
        kernel: what computed it.
        pattern: who attended to whom.
        seq_len: tokens a row.
        seconds: median of the rounds, the first left out.
        fastest_s: of the counted rounds.
        slowest_s: of the counted rounds.
        speedup: full's seconds over these.
        share_of_ideal: the speedup, over full's pairs divided by this pattern's pairs.
    """

    name: str
    engine: str
    kernel: str
    pattern: Pattern
    seq_len: int
    seconds: float
    fastest_s: float
    slowest_s: float
    speedup: float
    share_of_ideal: float


@dataclass(frozen=True)
class Rival:
    """Something to time: `run` does one round of it."""

    name: str
    engine: str
    kernel: str
    pattern: Pattern
    run: Callable[[], Any]


def draw_lengths(tokens: int, shortest: int, longest: int, seed: int) -> list[int]:
    """Document lengths between `shortest` and `longest` that add up to `tokens`, from a seed.

    Raises:
        ValueError: no number of such documents adds up to `tokens`.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(
            f"shortest and longest must be lengths in this order, got {shortest} and {longest}; pass 300 and 1400, say."
        )
    fewest, most = -(-tokens // longest), tokens // shortest
    if fewest > most or tokens < 1:
        raise ValueError(
            f"seq_len must hold documents of {shortest} to {longest} tokens, got room for {tokens}; "
            "raise seq_len, or lower shortest."
        )
    documents = min(max(round(2 * tokens / (shortest + longest)), fewest), most)
    draw = random.Random(seed)
    spare, lengths = tokens - documents * shortest, []
    for left in range(documents - 1, -1, -1):  # what is drawn leaves no more and no less than the others can take
        extra = draw.randint(max(0, spare - left * (longest - shortest)), min(longest - shortest, spare))
        lengths.append(shortest + extra)
        spare -= extra
    draw.shuffle(lengths)
    return lengths


def bench_attention(
    layout: PackedLayout, num_heads: int, head_dim: int, rounds: int, device: str, seed: int
) -> list[Timing]:
    """Forward and backward of full SDPA and of the varlen engine under every pattern; float32.

    Raises:
        CheckError: an engine disagrees with the float64 reference; then nothing is timed.
    """
    check_parity(num_heads, head_dim, device, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.batch_size, num_heads, layout.seq_len, head_dim)
    states = [torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(3)]
    cotangent = torch.randn(shape, generator=generator).to(device)
    layout = layout.to(device)

    def forward_backward(attend: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attend(*states), states, cotangent)

    def varlen(pattern: Pattern) -> Rival:
        attend = partial(anchor_attention, layout=layout, pattern=pattern, engine="varlen")
        return Rival(f"varlen {pattern}", "varlen", "sdpa per document", pattern, forward_backward(attend))

    full = forward_backward(partial(F.scaled_dot_product_attention, is_causal=True))
    rivals = [Rival("full SDPA", "torch", "sdpa", "full", full), varlen("intra_doc"), varlen("anchor")]
    return time_rivals(rivals, layout, rounds)


def bench_step(layout: PackedLayout, model_size: dict[str, Any], rounds: int, device: str, seed: int) -> list[Timing]:
    """One training step (forward, backward, AdamW) of a Llama under every pattern, and of transformers' own packing.

    The rival "transformers packed SDPA" is the unwrapped model on the same rows with positions that restart at every
    document, which is how transformers recognises packed rows.

    Raises:
        CheckError: an engine disagrees with the float64 reference; then nothing is timed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from anchor_attn.hf import wrap

    config = LlamaConfig(**model_size, vocab_size=257, max_position_embeddings=layout.seq_len)
    check_parity(config.num_attention_heads, config.hidden_size // config.num_attention_heads, device, seed)
    torch.manual_seed(seed)
    with torch.device(device):
        plain = LlamaForCausalLM(config)
    layout = layout.to(device)
    ids = torch.randint(0, 256, (layout.batch_size, layout.seq_len), device=device)
    restart = layout.document_ranks().clamp(min=0)  # the anchor stands alone there, as under intra_doc
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False, "position_ids": restart}
    wrapped = {pattern: wrap(copy.deepcopy(plain), pattern, engine="varlen") for pattern in PATTERNS}
    with torch.no_grad():
        ours = float(wrapped["intra_doc"](**inputs, document_ids=layout).loss)
        theirs = float(plain(**inputs).loss)
    if abs(ours - theirs) > PARITY_TOLERANCE * theirs:
        raise CheckError(
            f"intra_doc must equal transformers' packed attention before it is timed, got losses {ours} and {theirs}; "
            "report this with the versions of torch and transformers."
        )

    def step(model: Any, **extra: Any) -> Callable[[], Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def run() -> None:
            model(**inputs, **extra).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    rivals = [
        Rival(f"wrapped {pattern}", "varlen", "sdpa per document", pattern, step(model, document_ids=layout))
        for pattern, model in wrapped.items()
    ]
    rivals.append(Rival("transformers packed SDPA", "transformers", "sdpa, S × S mask", "intra_doc", step(plain)))
    return time_rivals(rivals, layout, rounds)


def check_parity(num_heads: int, head_dim: int, device: str, seed: int) -> float:
    """Compare the varlen engine with the float64 reference, output and gradients, on a small row of this shape.

    Returns:
        The largest error relative to the largest value.

    Raises:
        CheckError: it is above 1e-4.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = PackedLayout.from_lengths([draw_lengths(PARITY_TOKENS - 1, 50, 300, seed)]).to(device)
    shape = (1, num_heads, PARITY_TOKENS, head_dim)
    inputs = [torch.randn(shape, generator=generator).to(device) for _ in range(4)]
    worst = 0.0
    for pattern in PATTERNS:
        results = []
        precisions = {"reference": torch.float64, "varlen": torch.float32}
        for engine, dtype in precisions.items():
            query, key, value = (tensor.to(dtype).requires_grad_() for tensor in inputs[:3])
            out = anchor_attention(query, key, value, layout, pattern, engine)
            results.append([out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3].to(dtype))])
        for oracle, ours in zip(*results, strict=True):
            worst = max(worst, float((oracle - ours).abs().max() / oracle.abs().max()))
    if worst > PARITY_TOLERANCE:
        raise CheckError(
            f"varlen must agree with the reference before it is timed, got an error of {worst:.1e}; "
            "report this with the version of torch."
        )
    return worst


def time_rivals(rivals: Sequence[Rival], layout: PackedLayout, rounds: int) -> list[Timing]:
    """Time rivals in turn, `rounds` times after one round that is not counted; ratios are to the "full" pattern."""
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for _ in range(rounds + 1):
        for rival in rivals:
            start = time.perf_counter()
            rival.run()
            if layout.device.type == "cuda":
                torch.cuda.synchronize(layout.device)
            seconds[rival.name].append(time.perf_counter() - start)
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    full_name = next(rival.name for rival in rivals if rival.pattern == "full")
    pairs = {pattern: sum(attended_pairs(layout, pattern)) for pattern in PATTERNS}
    return [
        Timing(
            name=rival.name,
            engine=rival.engine,
            kernel=rival.kernel,
            pattern=rival.pattern,
            seq_len=layout.seq_len,
            seconds=medians[rival.name],
            fastest_s=min(seconds[rival.name][1:]),
            slowest_s=max(seconds[rival.name][1:]),
            speedup=(speedup := medians[full_name] / medians[rival.name]),
            share_of_ideal=speedup * pairs[rival.pattern] / pairs["full"],
        )
        for rival in rivals
    ]
