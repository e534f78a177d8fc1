"""What is said of one planned step: a flat record, as plan.json holds it."""

from dataclasses import dataclass

from anchor_attn.masks.patterns import Pattern
from anchor_attn.train.plan.schemes import Scheme


@dataclass(frozen=True)
class StepPlan:
    """One pattern under one scheme, at one length. What is None was not planned, for the reason in `left_out`.

    Attributes:
        seq_len: tokens a row, the anchor included.
        scheme: how rows lie on devices.
        pattern: who attends to whom.
        ranks_a_row: devices that share a row.
        documents: a row, in the mean.
        attended_pairs: a row, in the mean; one head, in the mean of the layers.
        pairs_of_full: the same over those of full attention.
        tile_fill: attended pairs over the cells of the tiles that are computed for them.
        forward_flops: of a step, all devices.
        backward_flops: the same of the backward, twice the forward.
        attention_of_forward: attention's share of the forward's operations.
        executed_flops: what kernels run: cells of tiles, scores again, and layers again with checkpointing.
        attention_of_executed: attention's share of those.
        weights_bytes: of a rank, as the next seven.
        gradient_bytes: its gradients.
        optimizer_bytes: its moments.
        gathered_bytes: other ranks' weights that it holds at once.
        activation_bytes: kept for backward without checkpointing.
        activation_checkpointed_bytes: kept with it.
        logits_bytes: at the loss.
        memory_bytes: all of them, with checkpointing or without as it is planned.
        checkpointing: whether layers run forward again.
        fits: whether 90 % of the device's memory hold that.
        attention_received_bytes: by a rank in a step, for attention.
        weights_received_bytes: by a rank in a step, for weights and gradients.
        imbalance: compute of the slowest ranks, row by row, over the mean, minus 1.
        compute_s: of the slowest ranks.
        attention_exchange_s: what attention waits for.
        weights_exchange_s: what is left of the weights' exchange when compute has hidden what it can.
        optimizer_s: of the update.
        step_s: all of it.
        tokens_per_s: of all devices.
        mfu: forward and backward operations, over what the devices could do in that time; None without a known peak.
        kept_whole: whether documents that fit no rank stay whole, for the ranks do not divide the heads ("document").
        saving_of_full: what is saved of full's step under the same scheme, or under "ulysses" where full has none.
        left_out: why there is no step.
    """

    seq_len: int
    scheme: Scheme
    pattern: Pattern
    ranks_a_row: int
    documents: float
    attended_pairs: float
    pairs_of_full: float
    tile_fill: float
    forward_flops: float
    backward_flops: float
    attention_of_forward: float
    executed_flops: float | None = None
    attention_of_executed: float | None = None
    weights_bytes: float | None = None
    gradient_bytes: float | None = None
    optimizer_bytes: float | None = None
    gathered_bytes: float | None = None
    activation_bytes: float | None = None
    activation_checkpointed_bytes: float | None = None
    logits_bytes: float | None = None
    memory_bytes: float | None = None
    checkpointing: bool | None = None
    fits: bool | None = None
    attention_received_bytes: float | None = None
    weights_received_bytes: float | None = None
    imbalance: float | None = None
    compute_s: float | None = None
    attention_exchange_s: float | None = None
    weights_exchange_s: float | None = None
    optimizer_s: float | None = None
    step_s: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    kept_whole: bool = False
    saving_of_full: float | None = None
    left_out: str = ""
