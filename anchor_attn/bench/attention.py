"""Attention alone: forward, backward and both, every route that is present against what others compute it with.

full SDPA                    scaled_dot_product_attention(is_causal=True) over the row, documents ignored
transformers packed SDPA     transformers' own attention with the S × S mask that it builds where positions restart
intra_doc …, anchor …        ours, by every route that can be taken here
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anchor_attn.attention import anchor_attention
from anchor_attn.bench.parity import Attend, Inputs, Reference, parity_layout
from anchor_attn.bench.timing import Pace, Rival, Row, Timing, Watch, time_rivals
from anchor_attn.engines.choice import FORWARD_ONLY, ROUTES, absence, refusal
from anchor_attn.lengths import draw_distribution
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.patterns import Pattern
from anchor_attn.request import Call

PHASES = ("forward", "backward", "both")
OUR_PATTERNS: tuple[Pattern, ...] = ("intra_doc", "anchor")
REFERENCE_TOKENS = 4096  # its matrices take eight times the memory at each next length that anyone would ask for
PROBE_TOKENS = 4096
# Of a query–key pair and a head of size 1: two products forward, five backward, two operations each.
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10
EAGER_COPIES = 6  # scores, masked scores, weights, and their gradients, all in float32


@dataclass(frozen=True)
class Setting:
    """What all rows of a benchmark share.

    Attributes:
        heads: query heads and key heads.
        head_dim: of queries, keys and values.
        dtype: of all tensors.
        device: "cpu" or "cuda".
        rounds: counted at most, a row.
        budget_s: seconds a row.
        seed: of lengths and values.
        with_flex: whether flex is compiled where it has no backward.
    """

    heads: tuple[int, int] = (8, 8)
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rounds: int = 5
    budget_s: float = 100.0
    seed: int = 0
    with_flex: bool = False

    @property
    def flops_a_pair(self) -> dict[str, float]:
        """Floating-point operations of each phase for an attended pair, all heads."""
        forward, backward = (count * self.heads[0] * self.head_dim for count in (FORWARD_FLOPS, BACKWARD_FLOPS))
        return {"forward": forward, "backward": backward, "both": forward + backward}


class Contender(NamedTuple):
    """One way to attend over a layout: `attend` takes query, key and value; the rest is as in `Rival`."""

    name: str
    engine: str
    kernel: str
    form: str
    pattern: Pattern
    attend: Attend
    has_backward: bool = True
    is_dense: bool = False
    bytes_a_cell: float = 0.0


class Sized(NamedTuple):
    """A row to be timed: its tokens, and what its documents are drawn from."""

    seq_len: int
    distribution: str
    lengths: Sequence[int]


def bench_attention(
    rows: Sequence[Sized], setting: Setting, say: Callable[[str], None] = lambda line: None
) -> Iterator[list[Timing]]:
    """Time every contender on every row, the records of a row at a time.

    Args:
        rows: one packed row each, in any order; shorter ones first foretell what longer ones will take.
        setting: what they share.
        say: told what is being done.

    Raises:
        CheckError: a contender disagrees with the float64 reference; then nothing is timed.
    """
    say(f"parity of {len(check_parity(setting))} rivals holds; timing")
    pace = Pace()
    if min(row.seq_len for row in rows) > PROBE_TOKENS:
        probe = Sized(PROBE_TOKENS, "uniform", draw_distribution("uniform", PROBE_TOKENS - 1, setting.seed))
        _time_row(probe, setting, pace, rounds=1)
    for row in rows:
        say(f"{row.seq_len:,} tokens, {row.distribution}, {len(row.lengths)} documents")
        yield _time_row(row, setting, pace, setting.rounds)


def check_parity(setting: Setting) -> dict[str, float]:
    """Compare every contender with the float64 reference on a small row, in the dtype that is timed.

    Returns:
        Each one's largest error, as a share of what it may err.

    Raises:
        CheckError: one errs by more.
    """
    layout = parity_layout(setting.device)
    inputs = Inputs.draw(layout, setting.heads, setting.head_dim, setting.dtype, setting.seed)
    errors: dict[str, float] = {}
    references: dict[Pattern, Reference] = {}
    for contender in create_contenders(layout, setting):
        pattern = contender.pattern
        if pattern not in references:
            references[pattern] = Reference(inputs, layout, pattern, {})
        errors[contender.name] = references[pattern].check(contender.name, contender.attend, contender.has_backward)
    return errors


def create_contenders(layout: PackedLayout, setting: Setting) -> list[Contender]:
    """What can attend over a layout here; full SDPA first."""
    grouped = setting.heads[0] != setting.heads[1]
    full = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=grouped)
    theirs = _transformers_attention(layout, setting)
    # torch's SDPA takes a mask of numbers beside the one of booleans.
    mask_bytes = 1 + torch.finfo(setting.dtype).bits / 8
    contenders = [
        Contender("full SDPA", "torch", "sdpa", "", "full", full),
        Contender(
            "transformers packed SDPA", "transformers", "sdpa, S × S mask", "", "intra_doc", theirs,
            is_dense=True, bytes_a_cell=mask_bytes,
        ),
    ]  # fmt: skip
    return contenders + [contender for pattern in OUR_PATTERNS for contender in _ours(layout, pattern, setting)]


def _ours(layout: PackedLayout, pattern: Pattern, setting: Setting) -> Iterator[Contender]:
    """A contender for every route of ours that can be taken here."""
    for route in ROUTES:
        is_reference = route.engine == "reference"
        if is_reference and (pattern != "anchor" or layout.seq_len > REFERENCE_TOKENS):
            continue
        has_backward = route.engine != "flex" or setting.device not in FORWARD_ONLY
        if not (has_backward or setting.with_flex):
            continue
        call = Call(torch.device(setting.device), setting.dtype, setting.head_dim, has_backward, pattern)
        if refusal(route, call) is not None or absence(route, call) is not None:
            continue
        yield Contender(
            name=f"{pattern} {route.name}",
            engine=route.engine,
            kernel=route.kernel,
            form=route.form,
            pattern=pattern,
            attend=partial(anchor_attention, layout=layout, pattern=pattern, engine=route.name),
            has_backward=has_backward,
            is_dense=is_reference,
            bytes_a_cell=4 * EAGER_COPIES * setting.heads[0] if is_reference else 0.0,
        )


def _transformers_attention(layout: PackedLayout, setting: Setting) -> Attend:
    """transformers' SDPA attention with its own mask, which is made once, as in a model whose layers share it."""
    module = nn.Module()
    module.num_key_value_groups = setting.heads[0] // setting.heads[1]  # type: ignore[assignment]

    @cache
    def mask() -> Any:
        from transformers import LlamaConfig
        from transformers.masking_utils import create_causal_mask

        config = LlamaConfig()
        config._attn_implementation = "sdpa"
        restart = layout.document_ranks().clamp(min=0)  # the anchor stands alone there, as under intra_doc
        return create_causal_mask(
            config=config,
            inputs_embeds=torch.empty(*restart.shape, 1, dtype=setting.dtype, device=layout.device),
            attention_mask=None,
            past_key_values=None,
            position_ids=restart,
        )

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(module, query, key, value, mask())
        return out.transpose(1, 2)

    return attend


def _time_row(row: Sized, setting: Setting, pace: Pace, rounds: int) -> list[Timing]:
    layout = PackedLayout.from_lengths([row.lengths], seq_len=row.seq_len).to(setting.device)
    inputs = Inputs.draw(layout, setting.heads, setting.head_dim, setting.dtype, setting.seed)
    rivals = [
        Rival(
            name=contender.name,
            engine=contender.engine,
            kernel=contender.kernel,
            pattern=contender.pattern,
            run=partial(_run_phases, contender, inputs),
            form=contender.form,
            phases=PHASES if contender.has_backward else ("forward",),
            is_dense=contender.is_dense,
            bytes_a_cell=contender.bytes_a_cell,
        )
        for contender in create_contenders(layout, setting)
    ]
    return time_rivals(rivals, Row(layout, row.distribution, setting.flops_a_pair), rounds, setting.budget_s, pace)


def _run_phases(contender: Contender, inputs: Inputs, watch: Watch) -> Any:
    with torch.no_grad(), watch("forward"):
        contender.attend(*inputs.detached)
    if contender.has_backward:
        with watch("both"):
            out = contender.attend(*inputs.states)
            with watch("backward"):
                torch.autograd.grad(out, inputs.states, inputs.cotangent)
