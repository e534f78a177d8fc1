"""RoPE and attention in finite precision: what each stage is rounded to, and the pipeline that runs them.

    stage          what is rounded
    angles         position × frequency
    table          cos and sin of it
    rotation       two products and their sum, for each number of query and key
    storage        the rotated query and key, as attention reads them
    accumulation   the products of query and key, and their sum
    softmax        the attention weights

All policies take the same float32 frequencies and the same query and key, so that each measures rounding alone. A stage
is measured alone by putting it into the pipeline that is float64 everywhere else.

RoPE: https://arxiv.org/abs/2104.09864
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from anchor_attn.drift.states import States

Rounding = Literal["bfloat16", "float16", "tf32", "float32", "float64"]
Stage = Literal["angles", "table", "rotation", "storage", "accumulation", "softmax"]
STAGES: tuple[Stage, ...] = ("angles", "table", "rotation", "storage", "accumulation", "softmax")
DTYPES: Mapping[Rounding, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
}
# A float32 frequency has 24 bits: times a position below 2^29 it is exact in float64.
POSITION_LIMIT = 2**29
# Of tokens that are rotated at once, so that what is in between stays small.
STRETCH = 1024


@dataclass(frozen=True)
class Policy:
    """What every stage is rounded to.

        Policy("mine", rotation="bfloat16")      float64 but for the rotation

    Attributes:
        name: as results have it.
        angles: "float64" reduces them there.
        table: of "float64" or "float32"; narrower ones are rounded from a cosine in float32, as libraries do.
        rotation: of both products, then of their sum.
        storage: of rotated query and key.
        accumulation: query and key are rounded to it and multiplied; "bfloat16" and "float16" sum in float32 and round
            the score, as eager attention does.
        softmax: of the scores that it reads, and of the weights.
    """

    name: str
    angles: Rounding = "float64"
    table: Rounding = "float64"
    rotation: Rounding = "float64"
    storage: Rounding = "float64"
    accumulation: Rounding = "float64"
    softmax: Rounding = "float64"

    def __post_init__(self) -> None:
        for stage in STAGES:
            if getattr(self, stage) not in DTYPES:
                raise ValueError(
                    f"{stage} must be rounded to one of {tuple(DTYPES)}, got {getattr(self, stage)!r} in policy "
                    f"{self.name!r}; pass one of them."
                )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that round to less than float64."""
        return tuple(stage for stage in STAGES if getattr(self, stage) != "float64")

    @property
    def stage_roundings(self) -> dict[str, str]:
        """What each stage is rounded to, as a result file says it."""
        return {stage: getattr(self, stage) for stage in STAGES}

    def alone(self, stage: Stage) -> "Policy":
        """The float64 pipeline with this one stage of the policy's."""
        rounding: Rounding = getattr(self, stage)
        return replace(FP64, name=self.name, **{stage: rounding})


FP64 = Policy("fp64")
POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("bf16_angles", "bfloat16", "bfloat16", "bfloat16", "bfloat16", "float32", "float32"),
        Policy("bf16_cos_sin", "float32", "bfloat16", "bfloat16", "bfloat16", "float32", "float32"),
        Policy("fp16_cos_sin", "float32", "float16", "float16", "float16", "float32", "float32"),
        Policy("fp32_rotation", "float32", "float32", "float32", "bfloat16", "float32", "float32"),
        Policy("exact", "float64", "float32", "float32", "bfloat16", "float32", "float32"),
        Policy("tf32", "float32", "float32", "float32", "float32", "tf32", "float32"),
        Policy("fp32", "float32", "float32", "float32", "float32", "float32", "float32"),
        Policy("exact_fp32", "float64", "float32", "float32", "float32", "float32", "float32"),
        FP64,
    )
}


def find_policies(asked: Iterable[str | Policy] | None = None) -> list[Policy]:
    """Policies by name, or as they are; all that are known for None. float64 is always the last: it is the floor.

    Raises:
        ValueError: an unknown name, a name twice, or another policy under the name of the floor.
        TypeError: neither a name nor a policy.
    """
    if isinstance(asked, str | Policy):
        asked = [asked]
    found: dict[str, Policy] = {}
    for policy in POLICIES if asked is None else asked:
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ValueError(
                    f"policies must be among {', '.join(POLICIES)}, got {policy!r}; pass one of them, or a Policy."
                )
            policy = POLICIES[policy]
        elif not isinstance(policy, Policy):
            raise TypeError(f"policies must be names or Policy, got {type(policy).__name__}; pass Policy(name, …).")
        if policy.name in found or (policy.name == FP64.name and policy != FP64):
            raise ValueError(
                f"policies must have names of their own, got {policy.name!r} twice; leave one out, or rename it."
            )
        found[policy.name] = policy
    found.pop(FP64.name, None)
    return [*found.values(), FP64]


def rounded(values: Tensor, rounding: Rounding) -> Tensor:
    """Values in the dtype of a rounding, rounded to it: to nearest, ties to even."""
    values = values.to(DTYPES[rounding])
    if rounding != "tf32":
        return values
    bits = values.view(torch.int32)  # 13 of the mantissa's 23 bits go
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def rotary_tables(position_ids: Tensor, inv_freq: Tensor, policy: Policy, attention_factor: float = 1.0) -> Tensor:
    """cos and sin as a policy has them, [2, N, R/2] in the dtype of its table.

    Args:
        position_ids: integers [N].
        inv_freq: float32 [R/2].
        policy: of whose stages angles and table are read.
        attention_factor: on cos and sin.
    """
    angles = rounded(position_ids, policy.angles)[:, None] * rounded(inv_freq, policy.angles)
    # Of a low-precision angle libraries take the cosine in float32.
    wide = angles.to(torch.promote_types(angles.dtype, torch.float32))
    if policy.table == "float64":
        wide = wide.double()
    return torch.stack([rounded(part * attention_factor, policy.table) for part in (wide.cos(), wide.sin())])


def rotate(x: Tensor, position_ids: Tensor, states: States, policy: Policy) -> Tensor:
    """Query or key as a policy rotates and stores it, [H, N, D] in the dtype of its storage.

    Args:
        x: query or key [H, N, D].
        position_ids: integers [N].
        states: whose frequencies and layout of pairs are meant.
        policy: what the first four stages are rounded to.
    """
    turned = torch.empty(x.shape, dtype=DTYPES[policy.storage])
    for start in range(0, x.shape[-2], STRETCH):
        part = slice(start, start + STRETCH)
        turned[..., part, :] = _rotated(x[..., part, :], position_ids[part], states, policy)
    return turned


def _rotated(x: Tensor, position_ids: Tensor, states: States, policy: Policy) -> Tensor:
    cos, sin = rotary_tables(position_ids, states.inv_freq, policy, states.attention_factor)
    wide = torch.promote_types(torch.promote_types(cos.dtype, DTYPES[policy.rotation]), torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    before, first, second, after = states.split(rounded(x, policy.rotation).to(wide))

    def add(one: Tensor, two: Tensor) -> Tensor:  # native arithmetic of the rotation's dtype: each step is rounded
        return rounded(rounded(one, policy.rotation) + rounded(two, policy.rotation), policy.rotation).to(wide)

    turned = states.join(before, add(first * cos, -second * sin), add(second * cos, first * sin), after)
    return rounded(turned, policy.storage)


def read(x: Tensor, policy: Policy) -> Tensor:
    """Stored query or key as it is multiplied: rounded to the accumulation, in the dtype of its sums."""
    x = rounded(x, policy.accumulation)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def multiply(query: Tensor, key: Tensor, scale: float, policy: Policy) -> Tensor:
    """Scores of stored query and key, scaled, float64 [H, Q, K]."""
    return multiply_read(read(query, policy), read(key, policy), scale, policy)


def multiply_read(query: Tensor, key: Tensor, scale: float, policy: Policy) -> Tensor:
    """The same of query and key that were `read`: once, where many queries meet the same keys."""
    products = query @ key.mT
    return rounded(products, policy.accumulation if policy.accumulation != "tf32" else "float32").double() * scale


def weigh(scores: Tensor, visible: Tensor, policy: Policy, sinks: Tensor | None = None) -> Tensor:
    """Attention weights of scores, float64 [H, Q, K]; zeros where nothing is visible.

    Args:
        scores: float64 [H, Q, K].
        visible: bool [Q, K].
        policy: whose softmax is read.
        sinks: learned logits [H], a share that no key gets.
    """
    wide = torch.promote_types(DTYPES[policy.softmax], torch.float32)
    scores = rounded(scores, policy.softmax).to(wide).masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(wide)[:, None, None].expand(*scores.shape[:2], 1)
        weights = torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    if not visible.any(-1).all():
        weights = weights.nan_to_num(0.0)  # a query without keys has no weights
    return rounded(weights, policy.softmax).double()
