"""The measures of the paper that said it first, under its own protocol.

    a(Δ)       attention weights [L, L] of query and key with all positions moved by Δ
    D          Σ_j 1/(L − j) Σ_i (a_ij(Δ1) − a_ij(Δ2))       Eq 4: of each key column its mean over the queries that see
                                                             it, L of the first key, 1 of the last; signed as printed
    D abs      the same of |a_ij(Δ1) − a_ij(Δ2)|             nothing cancels
    D_logit    1/L Σ_i (s_i0(Δ1) − s_i0(Δ2))                 Eq 5: of the scores of the first key, before the softmax

Rows of attention add up to 1 whatever is rounded: without the weights D would be 0. D_logit is a mean over queries, so
that lengths compare; as a sum it would grow with L whether or not anything does. Each figure stands beside the same of
float64: positions in exact arithmetic change nothing, and what float64 shows is not of RoPE.

Source: https://arxiv.org/abs/2411.13476, Eq 4, Eq 5 and figure 1.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anchor_attn.drift.measure import checked_shifts
from anchor_attn.drift.paper.report import MEASURES, KeyProfile, PaperReport, paper_records
from anchor_attn.drift.parts import Part, parts_of, rows_of
from anchor_attn.drift.policies import Policy, find_policies
from anchor_attn.drift.states import LLAMA_THETA, States, random_states
from anchor_attn.drift.view import Queries, View
from anchor_attn.masks.layout import checked_int

DELTA2 = 16
DELTAS1 = (0, 2, 4, 6, 8, 10, 12, 14, 15, 17, 18, 20, 22, 50, 100, 200, 500, 1000, 2000)
LENGTH = 4096
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
SEQUENCES = 50
PAPER_POLICIES = ("bf16_cos_sin", "fp32")
# Of rotated keys that are held at once, for as many shifts as fit.
HELD_BYTES = 2**28
Key = tuple[int, int, str]  # length, delta1, policy


def measure_paper(
    sequences: Iterable[States | Sequence[States]],
    *,
    deltas1: Sequence[int] = DELTAS1,
    delta2: int = DELTA2,
    length: int = LENGTH,
    lengths: Sequence[int] = LENGTHS,
    lengths_delta1: int = 0,
    policies: Sequence[str | Policy] | None = PAPER_POLICIES,
    queries: Queries = None,
    say: Callable[[str], None] = lambda line: None,
) -> PaperReport:
    """D and D_logit of many sequences: against Δ1 at one length, and against the length at one Δ1.

        measure_paper(random_sequences(3, seq_len=512), length=512, lengths=(64, 512)).select(delta1=0)

    Sequences are taken one by one, and of each only a few numbers stay. Of a causal model the first L tokens of a
    long sequence are a sequence of L tokens: states are captured once, at the greatest length.

    Args:
        sequences: of each the states of its layers, as `capture_states` returns them; rows of a batch count alone.
        deltas1: Δ1 at `length`; of one equal to delta2 everything is exactly 0.
        delta2: Δ2.
        length: tokens.
        lengths: tokens, at `lengths_delta1`; of it and of `length` there is a profile by key, too.
        lengths_delta1: Δ1 of them.
        policies: names of `POLICIES` or a `Policy`; all of them when None. float64 is always measured.
        queries: how many, evenly over the length, the last among them; all when None, as the paper has it. Columns
            are then means over those that see them.
        say: told what is being done.

    Raises:
        ValueError: no sequence, one shorter than a length, layers that differ from the first sequence's, a negative
            shift or one that a policy cannot hold, or states too large for the memory at hand.
    """
    found = find_policies(policies)
    cases = _checked_cases(deltas1, delta2, length, lengths, lengths_delta1, found)
    samples: dict[Key, list[Tensor]] = {}
    profiles: dict[Key, Tensor] = {}
    layers: list[int | None] | None = None
    count = 0
    for given in sequences:
        sequence = [given] if isinstance(given, States) else list(given)
        layers = _checked_layers(sequence, layers, max(cases), count)
        for row in zip(*(rows_of(layer) for layer in sequence), strict=True):
            count += 1
            say(f"sequence {count}")
            for key, columns in _measure_sequence(row, cases, delta2, found, queries):
                samples.setdefault(key, []).append(columns.measures)
                if key[:2] == (length, lengths_delta1):
                    profiles[key] = profiles.get(key, 0) + columns.profile
    if layers is None:
        raise ValueError("sequences must hold one at least, got none; pass states of one, or random_sequences().")
    stacked = {key: torch.stack(values) for key, values in samples.items()}
    return PaperReport(
        records=tuple(paper_records(stacked, layers, delta2)),
        profiles=tuple(
            KeyProfile(*key[:2], delta2, key[2], *(tuple(line.tolist()) for line in total / count))
            for key, total in profiles.items()
        ),
        per_sequence={key: values.mean(1) for key, values in stacked.items()},
        settings={
            "sequences": count, "layers": len(layers), "deltas1": sorted(set(deltas1)), "delta2": delta2,
            "length": length, "lengths": sorted(set(lengths)), "lengths_delta1": lengths_delta1, "queries": queries,
            "policies": [policy.name for policy in found],
        },
    )  # fmt: skip


def random_sequences(
    count: int = SEQUENCES,
    seq_len: int = max(LENGTHS),
    head_dim: int = 128,
    num_heads: int = 1,
    theta: float = LLAMA_THETA,
    seed: int = 0,
) -> Iterator[States]:
    """So many `random_states`, one after the other, each of a seed of its own.

    Args:
        count: of sequences.
        seq_len: tokens; 8,192 are the greatest length of the protocol.
        head_dim: as `random_states`.
        num_heads: as `random_states`.
        theta: as `random_states`.
        seed: of the first is seed · count.
    """
    return (random_states(seq_len, head_dim, num_heads, theta, seed * count + index) for index in range(count))


# --- the loops -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Of one sequence, length, shift and policy.

    Attributes:
        measures: of each layer, float64 [layers, 6] as `MEASURES`, mean over heads.
        profile: of each key, mean over layers, heads and the queries that see it, float64 [3, L]: signed and absolute
            difference of attention, absolute difference of scores.
    """

    measures: Tensor
    profile: Tensor


def _measure_sequence(
    layers: Sequence[States],
    cases: dict[int, tuple[int, ...]],
    delta2: int,
    policies: Sequence[Policy],
    queries: Queries,
) -> Iterator[tuple[Key, Columns]]:
    for length, deltas1 in cases.items():
        sums: dict[Key, list[Tensor]] = {}
        for layer in layers:
            prefix = layer.first(length)
            view = View.of(prefix, queries=queries)
            seen: dict[Key, Tensor] = {}
            for part in parts_of(prefix, view):
                for policy in policies:
                    for delta1, columns in _part_columns(part, deltas1, delta2, policy):
                        key = length, delta1, policy.name
                        seen[key] = seen.get(key, 0) + columns / prefix.query.shape[1]
            for key, columns in seen.items():
                sums.setdefault(key, []).append(columns)
        for key, values in sums.items():
            yield key, Columns(torch.stack([_measures(value) for value in values]), torch.stack(values).mean(0)[:3])


def _part_columns(part: Part, deltas1: Sequence[int], delta2: int, policy: Policy) -> Iterator[tuple[int, Tensor]]:
    """Of each Δ1 the key columns, [5, L]: means over the queries that see a key, summed over the heads of the part."""
    fixed = part.rotated(delta2, policy)
    together = max(1, HELD_BYTES // (8 * part.key.numel()))
    for start in range(0, len(deltas1), together):
        some = deltas1[start : start + together]
        moved = [part.rotated(delta1, policy) for delta1 in some]
        totals = torch.zeros(len(some), 5, part.key.shape[1], dtype=torch.float64)
        count = torch.zeros(part.key.shape[1], dtype=torch.float64)
        for block in part.blocks():
            visible = part.sees(part.rows[block])
            count += visible.sum(0)
            scores2 = part.scores(fixed, block, policy)
            weights2 = part.weights(scores2, visible, policy)
            for total, rotated in zip(totals, moved, strict=True):
                scores1 = part.scores(rotated, block, policy)
                total += _column_sums(scores1, scores2, part.weights(scores1, visible, policy), weights2, visible)
        # Of a window the last sampled query may leave early keys unseen: they have no column, and count nothing.
        yield from zip(some, totals / count.clamp(min=1), strict=True)


def _column_sums(scores1: Tensor, scores2: Tensor, weights1: Tensor, weights2: Tensor, visible: Tensor) -> Tensor:
    """Of each key, over heads and queries, [5, K]: Δ attention, its size, size of Δ scores, Δ scores, attention."""
    attention, scores = weights1 - weights2, (scores1 - scores2) * visible
    parts = (attention, attention.abs(), scores.abs(), scores, weights2)
    return torch.stack([part.sum((0, 1)) for part in parts])


def _measures(columns: Tensor) -> Tensor:
    """The numbers of `MEASURES`, of key columns [5, L]."""
    signed, absolute, logit_abs, logit_signed, attention = columns
    values = {
        "d_signed": signed.sum(),
        "d_abs": absolute.sum(),
        "d_logit_signed": logit_signed[0],
        "d_logit_abs": logit_abs[0],
        "first_token_d_abs": absolute[0],
        "first_token_attention": attention[0] / attention.sum(),
    }
    return torch.stack([values[name] for name in MEASURES])


# --- what is asked for -----------------------------------------------------------------------------------------------


def _checked_cases(
    deltas1: Sequence[int],
    delta2: int,
    length: int,
    lengths: Sequence[int],
    lengths_delta1: int,
    policies: Sequence[Policy],
) -> dict[int, tuple[int, ...]]:
    """The Δ1 of every length."""
    cases: dict[int, set[int]] = {}
    for tokens, deltas in ((length, deltas1), *((tokens, (lengths_delta1,)) for tokens in lengths)):
        if checked_int(tokens, "lengths") < 2:
            raise ValueError(f"lengths must be at least 2 tokens, got {tokens}; one token attends to itself alone.")
        cases.setdefault(tokens, set()).update(checked_int(delta, "deltas1") for delta in deltas)
    cases = {tokens: deltas for tokens, deltas in sorted(cases.items()) if deltas}
    if not cases:
        raise ValueError("deltas1 and lengths must name one measurement, got none of both; pass deltas1=[0], say.")
    shifts = {checked_int(delta2, "delta2")}.union(*cases.values())
    if min(shifts) < 0:
        raise ValueError(f"deltas1 and delta2 must not be negative, got {min(shifts)}; pass positions to move by.")
    if max(shifts):
        checked_shifts([max(shifts)], max(cases), policies)
    return {tokens: tuple(sorted(deltas)) for tokens, deltas in cases.items()}


def _checked_layers(
    sequence: Sequence[States], known: list[int | None] | None, longest: int, count: int
) -> list[int | None]:
    """The layers of a sequence, which are those of the sequences before it."""
    layers = [layer.layer for layer in sequence]
    if not layers or (known is not None and layers != known):
        raise ValueError(
            f"sequences must have the same layers, got {layers} after {known}; pass what capture_states returns of one "
            "model."
        )
    if (shortest := min(layer.seq_len for layer in sequence)) < longest:
        raise ValueError(
            f"sequences must be as long as the greatest length, {longest:,} tokens, got {shortest:,} in sequence "
            f"{count + 1}; pass longer ones, or length and lengths up to {shortest}."
        )
    return layers
