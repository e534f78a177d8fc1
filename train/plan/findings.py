"""What follows from a plan, in sentences: where the mask alone can halve a step, and where it gains nothing."""

from collections.abc import Sequence

from anchor_attn.train.plan.models import ModelShape
from anchor_attn.train.plan.records import StepPlan
from anchor_attn.train.plan.training import TrainingPlan
from anchor_attn.train.plan.work import executed_flops, forward_flops

HALF = 0.5  # "> 50 % less training time": https://arxiv.org/abs/2411.13476
NOTICEABLE = 0.1


def half_tokens(shape: ModelShape) -> float:
    """Tokens of a row from which full attention is half of the forward, so that leaving all of it out saves half.

        half_tokens(describe_model("llama-2-7b"))    50_409

    Below it no mask can halve the operations; layers with a window are taken to have none.
    """
    dense, a_pair = forward_flops(shape, 1, 0).dense, forward_flops(shape, 0, shape.layers).attention
    return 2 * dense / a_pair - 1  # of T·(T+1)/2 pairs


def half_executed_tokens(shape: ModelShape, checkpointing: bool) -> float:
    """The same by what kernels run, in which attention weighs more: its backward computes the scores again."""
    dense = executed_flops(shape, 1, 0, checkpointing).dense
    a_pair = executed_flops(shape, 0, shape.layers, checkpointing).attention
    return 2 * dense / a_pair - 1


def needed_slowness(step: StepPlan) -> float:
    """How many times slower an operation of full attention must run than a dense one to be half of the time."""
    return 1 / step.attention_of_forward - 1


def longest_documents(full: StepPlan, saving: float = NOTICEABLE) -> float | None:
    """Tokens of equal documents in a row of which the mask still saves so much of full's operations; None for none.

    Documents of d in a row of S leave d/S of the pairs.
    """
    share = full.attention_of_executed or full.attention_of_forward
    return full.seq_len * (1 - saving / share) if share > saving else None


def list_findings(plan: TrainingPlan) -> list[str]:
    """Sentences, of any plan."""
    shape = plan.shape
    full = [plan.step(seq_len, "data", "full") for seq_len in plan.seq_lens]
    shares = ", ".join(f"{100 * step.attention_of_forward:.0f} % at {short(step.seq_len)}" for step in full)
    found = [
        f"Full attention is this much of {shape.name}'s forward: {shares}.",
        f"A mask can save more than half of the operations from {half_tokens(shape):,.0f} tokens a row, where "
        f"attention is half of the forward; by what kernels run, from {half_executed_tokens(shape, False):,.0f} (with "
        f"checkpointing {half_executed_tokens(shape, True):,.0f}), if nothing of attention were left.",
    ]
    return [*found, *_halved(plan), *_below(full, shape), *_ends(full, plan), *_schemes(plan)]


def _halved(plan: TrainingPlan) -> list[str]:
    """From which planned length these documents halve the step."""
    savings = {seq_len: plan.saving(seq_len) for seq_len in plan.seq_lens}
    halved = [short(seq_len) for seq_len, saving in savings.items() if saving is not None and saving > HALF]
    said = ", ".join(halved) or "none"
    return [
        f"With these documents ({plan.documents.name}) anchor saves more than half of full's step at {said} of the "
        "lengths planned."
    ]


def _below(full: Sequence[StepPlan], shape: ModelShape) -> list[str]:
    below = [step for step in full if step.seq_len < half_tokens(shape)]
    if not below:
        return []
    factors = ", ".join(f"{needed_slowness(step):.1f} × at {short(step.seq_len)}" for step in below)
    doubled = [step.seq_len for step in below if needed_slowness(step) <= 2]
    dense = (
        f"all S × S cells instead of the causal half suffice from {short(doubled[0])}"
        if doubled
        else "all S × S cells instead of the causal half do not suffice"
    )
    return [
        f"A figure of {_percent(HALF)} less below that contains something else than the pairs: a full attention whose "
        f"operations run slower than the dense layers' ({factors}); {dense}; a dense mask, a mask built in every step, "
        "or padding and waiting that one arm has and the other has not."
    ]


def _ends(full: Sequence[StepPlan], plan: TrainingPlan) -> list[str]:
    found = []
    savings = {seq_len: plan.saving(seq_len) for seq_len in plan.seq_lens}
    little = [short(seq_len) for seq_len, saving in savings.items() if saving is not None and saving < NOTICEABLE]
    if little:
        found.append(f"With these documents it saves less than {_percent(NOTICEABLE)} at {', '.join(little)}.")
    bounds = [(step.seq_len, longest_documents(step)) for step in full]
    reach = ", ".join(f"{bound:,.0f} of {short(seq_len)}" for seq_len, bound in bounds if bound is not None)
    none = [seq_len for seq_len, bound in bounds if bound is None]
    if reach:
        found.append(
            f"Long documents: {_percent(NOTICEABLE)} is saved while equal documents have at most {reach} tokens."
        )
    if none:
        found.append(
            f"In rows up to {short(max(none))} attention is too little for any mask to save {_percent(NOTICEABLE)}."
        )
    return found


def _schemes(plan: TrainingPlan) -> list[str]:
    found = []
    longest = plan.seq_lens[-1]
    steps = [step for step in plan.steps if step.seq_len == longest and step.pattern == "anchor" and step.step_s]
    fitting = [step for step in steps if step.fits]
    if fitting:
        best = min(fitting, key=lambda step: step.step_s or 0.0)
        chosen = plan.cluster.ranks_a_row is None and best.ranks_a_row > 1
        shared = f" with {best.ranks_a_row} ranks a row" if chosen else ""
        found.append(
            f"At {short(longest)} the fastest for anchor that fits is {best.scheme!r}{shared}, {best.step_s:,.2f} s, "
            f"compute unbalanced by {100 * (best.imbalance or 0):.1f} %."
        )
    else:
        more = "devices" if plan.cluster.ranks_a_row is None else "ranks a row"
        found.append(f"At {short(longest)} no scheme fits the memory; more {more}, or a fused loss, take less of it.")
    given = [step for step in plan.steps if (step.scheme, step.pattern) == ("document", "anchor") and step.step_s]
    silent = [
        short(step.seq_len)
        for step in given
        if step.ranks_a_row > 1 and not step.attention_received_bytes and not step.kept_whole
    ]
    if silent:
        found.append(f"Whole documents fit the ranks in balance, and attention sends nothing, at {', '.join(silent)}.")
    return found


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def short(tokens: int) -> str:
    """Tokens in a few letters.

    short(65_536)    "64K"
    """
    if tokens % 2**20 == 0:
        return f"{tokens // 2**20}M"
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"
