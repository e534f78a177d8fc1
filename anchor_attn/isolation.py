"""The leak probe: change one document of a packed batch, and see that no other moves.

    document_ids        0 1 1 1 2 2 3
    document 1 changed    x x x . . .     x moved · must not move
    anchor changed      x x x x x x x     "anchor": every document sees it; "intra_doc": none does

What moved is said in the movement of the changed document itself, layer by layer: experts compute a token in another
order when other tokens change beside it, and move it by 1e-7 without a leak.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anchor_attn.attention import as_layout
from anchor_attn.hf.proof import LEAK_RATIO
from anchor_attn.isolation_calls import (
    ATTENTION_MASKS,
    AttentionMaskInput,
    Probed,
    States,
    at_rest,
    changed,
    checked_inputs,
    decoder_call,
    decoder_in,
    function_call,
    pattern_of,
)
from anchor_attn.isolation_report import Finding as Finding
from anchor_attn.isolation_report import IsolationReport as IsolationReport
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.dialects import POSITION_CONVENTIONS, PositionConvention
from anchor_attn.masks.layout import ANCHOR_ID, PADDING_ID
from anchor_attn.masks.patterns import Pattern, check_pattern


def assert_isolated(model: Probed, layout: PackedLayout | Tensor, **options: Any) -> IsolationReport:
    """`check_isolation` for a test: the report, or an AssertionError that shows it.

    Raises:
        AssertionError: a document moved another, or the anchor was not seen as the pattern has it.
    """
    __tracebackhide__ = True  # pytest then shows the caller's line
    report = check_isolation(model, layout, **options)
    if not report.passed:
        raise AssertionError(f"isolation\n{report}")
    return report


def check_isolation(
    model: Probed,
    layout: PackedLayout | Tensor,
    pattern: Pattern | None = None,
    *,
    inputs: Tensor | None = None,
    positions: PositionConvention = "continuous",
    attention_mask: AttentionMaskInput = "none",
    use_cache: bool = False,
    dtype: torch.dtype | None = None,
    limit: float = LEAK_RATIO,
    seed: int = 0,
) -> IsolationReport:
    """Change one document at a time, and see that no other moved; change the anchor, and see who did.

        check_isolation(wrap(model), PackedLayout.from_lengths([[9, 6, 11], [3, 17]])).passed     True
        check_isolation(lambda states, layout: attention(states), layout, inputs=torch.randn(1, 64, 32))

    One forward pass a document, and three more; in eval mode, without gradients, and the model is left as it was. Each
    document's tokens are all changed, to others that occur in the inputs. What comes out of every layer is compared, of
    the last behind the final norm.

    Args:
        model: a transformers decoder, also inside PEFT, DDP or torch.compile: one from `wrap` is given the layout,
            another has what follows to tell documents by. Or a function or module of (inputs, layout) that returns
            states [B, S, …], alone, in a sequence or by name.
        layout: the batch; a row needs two documents to show a leak.
        pattern: what must hold, "anchor" or "intra_doc"; that of a wrapped model when None, else "anchor" where the
            layout has one.
        inputs: token ids int [B, S] or states [B, S, …]; random tokens of the model's vocabulary when None.
        positions: position ids of a decoder; "copied" gives it rows in which every document has its own anchor.
        attention_mask: "none", or "ones" at all tokens but padding.
        use_cache: as the model's own argument; with a cache transformers looks for no documents in position ids.
        dtype: a copy of the model computes in it; torch.float64 tells rounding from a leak.
        limit: a ratio above it is a leak.
        seed: of tokens and changes.

    Raises:
        TypeError: inputs that are no tensor, or no tokens for a decoder.
        ValueError: nothing to compare, options that do not fit the model, or a model that answers other tokens alike,
            the same tokens differently, or with NaN.
    """
    layout = as_layout(layout)
    _check_options(layout, positions, attention_mask, dtype, limit)
    generator = torch.Generator().manual_seed(seed)
    with at_rest(model, dtype) as resting, torch.no_grad():
        decoder = decoder_in(resting)
        if pattern is None:
            pattern = pattern_of(decoder, layout)
        check_pattern(layout, pattern)
        if pattern == "full":
            raise ValueError("pattern must be 'anchor' or 'intra_doc', got 'full', in which documents see each other.")
        inputs = checked_inputs(inputs, decoder, layout, dtype, generator)
        layout = layout.to(inputs.device)
        if decoder is not None:
            forward = decoder_call(resting, decoder, layout, positions, attention_mask, use_cache)
        elif (positions, attention_mask, use_cache) != ("continuous", "none", False):
            raise ValueError(
                "positions, attention_mask and use_cache must be left out for a function, got "
                f"{positions!r}, {attention_mask!r} and {use_cache}; choose them inside it."
            )
        else:
            forward = function_call(resting, layout)
        return _probe(forward, inputs, layout, pattern, limit, generator)


def _check_options(
    layout: PackedLayout, positions: str, attention_mask: str, dtype: torch.dtype | None, limit: float
) -> None:
    if max(map(len, layout.document_lengths)) < 2:
        raise ValueError(
            f"layout must have a row of two documents to show a leak, got {layout!r}; add a document to a row."
        )
    if positions not in POSITION_CONVENTIONS:
        raise ValueError(f"positions must be one of {POSITION_CONVENTIONS}, got {positions!r}; pass one of them.")
    if attention_mask not in ATTENTION_MASKS:
        raise ValueError(f"attention_mask must be one of {ATTENTION_MASKS}, got {attention_mask!r}; pass one of them.")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating one, got {dtype}; pass torch.float64.")
    if not 0 < limit < math.inf:
        raise ValueError(f"limit must be above 0 and finite, got {limit}; pass {LEAK_RATIO:g}.")


def _probe(
    forward: Callable[[Tensor], States],
    inputs: Tensor,
    layout: PackedLayout,
    pattern: Pattern,
    limit: float,
    generator: torch.Generator,
) -> IsolationReport:
    ids = layout.document_ids.cpu()
    # Copies: a function may write into its input, or into one buffer for every output.
    before = {name: state.clone() for name, state in forward(inputs.clone()).items()}
    _check_states(before, ids)

    def move(where: Tensor) -> Tensor:
        return _movement(before, forward(changed(inputs, where, generator)))

    documents = [(row, i + 1) for row, lengths in enumerate(layout.document_lengths) for i in range(len(lengths))]
    padded = [(row, PADDING_ID) for row, tokens in enumerate(layout.row_tokens) if tokens < layout.seq_len]
    moved = {touched: move(_tokens_of(ids, touched)) for touched in documents + padded}
    own = {touched: moved[touched][:, _tokens_of(ids, touched)].amax(dim=1) for touched in documents}
    for (row, document), movement in own.items():
        if not movement.max() > 0:  # NaN too
            raise ValueError(
                f"model must answer other tokens with other outputs, got a movement of {float(movement.max())} for "
                f"document {document} of row {row}; initialise or load its weights first."
            )
    largest = torch.stack(list(own.values())).amax(dim=0)
    noise = float(_shares(_movement(before, forward(inputs.clone()))[:, ids != PADDING_ID], largest).max())
    if not noise <= limit:
        raise ValueError(
            f"model must answer the same tokens twice alike, got outputs apart by {noise:.1e} of a document's "
            "movement; turn off dropout and other noise."
        )
    anchor_ratios: dict[tuple[int, int], float] = {}
    if layout.anchor_tokens:
        by_anchor = move(ids == ANCHOR_ID)
        anchor_ratios = {
            touched: float(_shares(by_anchor[:, _tokens_of(ids, touched)], own[touched]).max()) for touched in documents
        }
    findings = []
    for touched, movement in moved.items():
        shares = _shares(movement, own.get(touched, largest))
        findings.append(_finding(touched, ids, shares, tuple(before), anchor_ratios.get(touched), pattern, limit))
    return IsolationReport(pattern, limit, tuple(before), noise, tuple(findings))


def _finding(
    touched: tuple[int, int],
    ids: Tensor,
    shares: Tensor,
    layers: tuple[str, ...],
    anchor_ratio: float | None,
    pattern: Pattern,
    limit: float,
) -> Finding:
    """What the shares [layers, B, S] of the movement of one changed document, (row, id), come to."""
    row, document = touched
    own = _tokens_of(ids, touched)
    others = (ids != PADDING_ID) & ~own
    same_row = torch.zeros_like(own)
    same_row[row] = True
    later = torch.arange(ids.shape[1]) > int(own[row].nonzero()[0])
    layer = moved_row = moved_document = position = None
    judged = shares.nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(~others, 0)
    leaking = (judged.flatten(1).amax(dim=1) > limit).nonzero()
    if len(leaking):
        first = int(leaking[0])
        layer = layers[first]
        moved_row, position = divmod(int(judged[first].argmax()), ids.shape[1])
        moved_document = int(ids[moved_row, position])
    # NaN is as the pattern has it under none of them.
    as_asked = anchor_ratio is None or (anchor_ratio > limit if pattern == "anchor" else anchor_ratio <= limit)
    return Finding(
        row=row,
        document=document,
        tokens=int(own.sum()),
        later_ratio=_largest(shares[:, others & same_row & later]),
        earlier_ratio=_largest(shares[:, others & same_row & ~later]),
        other_rows_ratio=_largest(shares[:, others & ~same_row]),
        layer=layer,
        moved_row=moved_row,
        moved_document=moved_document,
        position=position,
        anchor_ratio=anchor_ratio,
        anchor_seen=None if anchor_ratio is None else anchor_ratio > limit,
        passed=layer is None and as_asked,
    )


def _check_states(states: States, ids: Tensor) -> None:
    if not states:
        raise ValueError("model must return states to compare, got none; return a tensor [B, S, …].")
    for name, state in states.items():
        if state.shape[:2] != ids.shape:
            raise ValueError(
                f"model must return states [{ids.shape[0]}, {ids.shape[1]}, …], got {list(state.shape)} for {name}; "
                "move the sequence to dimension 1."
            )
        if state[(ids != PADDING_ID).to(state.device)].isnan().any():
            raise ValueError(
                f"model must return numbers, got NaN in {name}; mend the model or pass dtype=torch.float64."
            )


def _movement(before: States, after: States) -> Tensor:
    """The largest difference a token, float64 [layers, B, S] on the host."""
    rows = []
    for name, state in before.items():
        other = after[name]
        if state.dtype in (torch.bfloat16, torch.float16):
            state, other = state.float(), other.float()
        difference = torch.where(state == other, 0, state - other).abs()  # masked logits: ∞ - ∞ is no movement
        rows.append(difference.reshape(*difference.shape[:2], -1).amax(dim=-1).to("cpu").double())
    return torch.stack(rows)


def _shares(moved: Tensor, own: Tensor) -> Tensor:
    """Movements [layers, …] in those of the changed document [layers]; what did not move is 0, whatever moved it."""
    return torch.where(moved == 0, 0, moved / own.view(-1, *[1] * (moved.ndim - 1)))


def _tokens_of(ids: Tensor, touched: tuple[int, int]) -> Tensor:
    """Where a document stands, or a row's padding, given as (row, id); bool [B, S]."""
    row, document = touched
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[row] = ids[row] == document
    return where


def _largest(shares: Tensor) -> float | None:
    return float(shares.max()) if shares.numel() else None
