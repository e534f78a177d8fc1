"""A training step on paper: what the slowest rank computes, and what it waits for.

    step = slowest rank's compute  +  attention's exchange  +  what compute does not hide of the weights'  +  optimizer

Rows of a step are drawn one by one, and ranks wait for each other row by row, for FSDP gathers every layer from all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anchor_attn.masks.patterns import Pattern
from anchor_attn.train.plan.devices import Device, Rates
from anchor_attn.train.plan.memory import BYTES, STATE_BYTES, USABLE, Dtype, Memory, plan_memory
from anchor_attn.train.plan.models import ModelShape
from anchor_attn.train.plan.records import StepPlan
from anchor_attn.train.plan.schemes import Scheme, Sharing, share_row
from anchor_attn.train.plan.work import RowWork, backward_flops, executed_flops, forward_flops

OPTIMIZER_BYTES = 7 * STATE_BYTES  # a parameter: weight and moments read and written, the gradient read


@dataclass(frozen=True)
class Cluster:
    """Devices, and how a step uses them.

    Attributes:
        device: of which kind.
        devices: how many.
        rates: what each reaches.
        rows: rows a step, over all devices.
        ranks_a_row: that share a row, under any scheme but "data"; None for those of a node, or else the fewest more
            that hold the row, as `ranks_to_try`.
        dtype: of the compute.
        checkpointing: whether layers run forward again; None where they must because the memory is too small.
        fused_loss: whether logits are never held at once.
    """

    device: Device
    devices: int
    rates: Rates
    rows: int
    ranks_a_row: int | None
    dtype: Dtype = "bfloat16"
    checkpointing: bool | None = None
    fused_loss: bool = False


def plan_step(
    shape: ModelShape,
    rows: Sequence[Sequence[int]],
    counts: Mapping[Pattern, Sequence[RowWork]],
    pattern: Pattern,
    scheme: Scheme,
    cluster: Cluster,
) -> StepPlan:
    """Plan one step.

    Args:
        shape: of the model.
        rows: tokens of each document of the rows that were drawn; a step with more rows repeats them.
        counts: of these rows under this pattern and under full.
        pattern: who attends to whom.
        scheme: how rows lie on devices.
        cluster: the devices.

    Returns:
        The plan; without times and memory, and with the reason, where the scheme cannot.
    """
    works = counts[pattern]
    counted = _counted(shape, rows, counts, pattern, scheme, cluster)
    if scheme == "data" or cluster.ranks_a_row is not None:
        return _on_ranks(counted, shape, rows, works, cluster)
    first, *others = ranks_to_try(cluster)
    best = _on_ranks(replace(counted, ranks_a_row=first), shape, rows, works, cluster)
    for ranks in others:
        if best.fits:
            break
        # Documents lie less evenly than this: what does not fit so need not be balanced.
        if best.left_out or _memory(shape, works[0].tokens / ranks, cluster)[2]:
            found = _on_ranks(replace(counted, ranks_a_row=ranks), shape, rows, works, cluster)
            best = found if found.fits or (best.left_out and not found.left_out) else best
    return best


def ranks_to_try(cluster: Cluster) -> list[int]:
    """Divisors of the devices: those of a node first, then more of them, then fewer, down to two.

    12 devices in nodes of 8    4 6 12 3 2
    """
    node = math.gcd(cluster.devices, cluster.device.node_devices)
    divisors = [ranks for ranks in range(2, cluster.devices + 1) if cluster.devices % ranks == 0]
    return [node, *(ranks for ranks in divisors if ranks > node), *(ranks for ranks in divisors[::-1] if ranks < node)]


def _on_ranks(
    counted: StepPlan,
    shape: ModelShape,
    rows: Sequence[Sequence[int]],
    works: Sequence[RowWork],
    cluster: Cluster,
) -> StepPlan:
    """The step with as many ranks a row as `counted` says."""
    ranks, scheme, pattern = counted.ranks_a_row, counted.scheme, counted.pattern
    if reason := _misfit(cluster, ranks):
        return replace(counted, left_out=reason)
    try:
        sharings = [share_row(shape, lengths, pattern, scheme, ranks, BYTES[cluster.dtype]) for lengths in rows]
    except ValueError as error:
        return replace(counted, left_out=str(error))
    memory, checkpointing, fits = _memory(shape, max(float(sharing.tokens.max()) for sharing in sharings), cluster)
    planned = replace(
        _with_memory(counted, memory, checkpointing, fits), kept_whole=any(sharing.kept_whole for sharing in sharings)
    )
    return _timed(planned, shape, works, sharings, cluster)


def _memory(shape: ModelShape, tokens: float, cluster: Cluster) -> tuple[Memory, bool, bool]:
    """Of a rank with so many tokens, whether layers run forward again, and whether it then fits."""
    memory = plan_memory(shape, tokens, cluster.devices, cluster.dtype, cluster.fused_loss)
    room = USABLE * cluster.device.memory_bytes
    checkpointing = memory.total(False) > room if cluster.checkpointing is None else cluster.checkpointing
    return memory, checkpointing, memory.total(checkpointing) <= room


def _counted(
    shape: ModelShape,
    rows: Sequence[Sequence[int]],
    counts: Mapping[Pattern, Sequence[RowWork]],
    pattern: Pattern,
    scheme: Scheme,
    cluster: Cluster,
) -> StepPlan:
    works, full = counts[pattern], sum(work.pairs for work in counts["full"])
    tokens, pairs, cells = (sum(getattr(work, name) for work in works) for name in ("tokens", "pairs", "cells"))
    a_step = cluster.rows / len(rows)
    forward = forward_flops(shape, a_step * tokens, a_step * pairs)
    return StepPlan(
        seq_len=works[0].tokens,
        scheme=scheme,
        pattern=pattern,
        ranks_a_row=1 if scheme == "data" else cluster.ranks_a_row or 1,
        documents=float(np.mean([len(lengths) for lengths in rows])),
        attended_pairs=pairs / len(rows) / shape.layers,
        pairs_of_full=pairs / full,
        tile_fill=pairs / cells,
        forward_flops=forward.total,
        backward_flops=backward_flops(shape, a_step * tokens, a_step * pairs).total,
        attention_of_forward=forward.attention_share,
    )


def _misfit(cluster: Cluster, ranks: int) -> str:
    """Why rows cannot be dealt out evenly; "" where they can."""
    if cluster.devices % ranks:
        return (
            f"ranks_a_row must divide the devices, got {ranks} for {cluster.devices}; take "
            f"{math.gcd(ranks, cluster.devices)}, or leave it out."
        )
    if cluster.rows % (groups := cluster.devices // ranks):
        return f"rows must be a multiple of {groups} to keep all devices busy, got {cluster.rows}; pass {groups}."
    return ""


def _with_memory(plan: StepPlan, memory: Memory, checkpointing: bool, fits: bool) -> StepPlan:
    return replace(
        plan,
        weights_bytes=memory.weights,
        gradient_bytes=memory.gradients,
        optimizer_bytes=memory.optimizer,
        gathered_bytes=memory.gathered,
        activation_bytes=memory.activations,
        activation_checkpointed_bytes=memory.activations_checkpointed,
        logits_bytes=memory.logits,
        memory_bytes=memory.total(checkpointing),
        checkpointing=checkpointing,
        fits=fits,
    )


def _timed(
    plan: StepPlan, shape: ModelShape, works: Sequence[RowWork], sharings: Sequence[Sharing], cluster: Cluster
) -> StepPlan:
    again = bool(plan.checkpointing)
    dense_s = executed_flops(shape, 1, 0, again).dense / cluster.rates.dense_flops_per_s
    cell_s = executed_flops(shape, 0, 1, again).attention / cluster.rates.attention_flops_per_s
    seconds = [
        dense_s * sharing.tokens + cell_s * work.cells * sharing.pair_shares
        for work, sharing in zip(works, sharings, strict=True)
    ]
    exchanges = [
        shape.layers * ((1 + again) * forward + backward) for forward, backward in (s.received_bytes for s in sharings)
    ]
    groups = cluster.devices // plan.ranks_a_row
    in_turn = (np.arange(cluster.rows) % len(works)).reshape(-1, groups)  # [rows one after another, rows at once]
    slowest = np.array([each.max() for each in seconds])[in_turn].max(axis=1)
    mean = np.array([each.mean() for each in seconds])[in_turn].mean(axis=1)
    exchanged = np.array(exchanges, dtype=np.float64)[in_turn].max(axis=1)
    weights = _weights_bytes(shape, cluster)
    weights_s = weights / gather_bytes_per_s(cluster.device, cluster.devices)
    exposed_s = np.maximum(weights_s - slowest, 0.0).sum()
    exchange_s = exchanged.sum() / attention_bytes_per_s(cluster.device, plan.scheme, plan.ranks_a_row)
    optimizer_s = OPTIMIZER_BYTES * shape.parameters / cluster.devices / cluster.device.memory_bytes_per_s
    step_s = float(slowest.sum() + exchange_s + exposed_s + optimizer_s)
    a_step = cluster.rows / len(works)
    tokens, cells = (a_step * sum(getattr(work, name) for work in works) for name in ("tokens", "cells"))
    executed, peak = executed_flops(shape, tokens, cells, again), cluster.device.flops_per_s
    return replace(
        plan,
        executed_flops=executed.total,
        attention_of_executed=executed.attention_share,
        attention_received_bytes=float(exchanged.sum()),
        weights_received_bytes=weights * len(in_turn),
        imbalance=float(slowest.sum() / mean.sum() - 1),
        compute_s=float(slowest.sum()),
        attention_exchange_s=float(exchange_s),
        weights_exchange_s=float(exposed_s),
        optimizer_s=optimizer_s,
        step_s=step_s,
        tokens_per_s=tokens / step_s,
        mfu=None if peak is None else (plan.forward_flops + plan.backward_flops) / (step_s * cluster.devices * peak),
    )


def _weights_bytes(shape: ModelShape, cluster: Cluster) -> float:
    """Received by a rank for one row: weights for the forward and for the backward, and gradients to be summed."""
    others = (cluster.devices - 1) / cluster.devices
    return others * shape.parameters * (2 * BYTES[cluster.dtype] + STATE_BYTES)


def gather_bytes_per_s(device: Device, ranks: int) -> float:
    """What a rank receives in a ring over all of them; a ring across nodes enters each once, by all its cards."""
    if ranks <= device.node_devices:
        return device.link_bytes_per_s
    return min(device.link_bytes_per_s, device.node_devices * device.network_bytes_per_s)


def exchange_bytes_per_s(device: Device, ranks: int) -> float:
    """What a rank receives when each sends to each; what comes from other nodes comes by its own card."""
    if ranks <= device.node_devices:
        return device.link_bytes_per_s
    outside = (ranks - device.node_devices) / (ranks - 1)
    return 1 / max((1 - outside) / device.link_bytes_per_s, outside / device.network_bytes_per_s)


def attention_bytes_per_s(device: Device, scheme: Scheme, ranks: int) -> float:
    """What attention's exchange runs at."""
    return (gather_bytes_per_s if scheme == "all_gather" else exchange_bytes_per_s)(device, ranks)
