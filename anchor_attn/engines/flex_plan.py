"""A layout as flex takes it: block tables of padded rows, and what joins after the kernel.

Rows are padded to whole blocks before the kernel sees them: flex's backward has given NaN at other lengths.
"""

from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from anchor_attn.engines.merge import anchor_visibility
from anchor_attn.masks import PackedLayout, create_packed_block_mask
from anchor_attn.masks.layout import PADDING_ID
from anchor_attn.masks.patterns import MaskMod
from anchor_attn.request import Request

Form = Literal["table", "merge", "column"]

BLOCK = 128
# To the compiler one block would be a shape of its own.
LEAST_TOKENS = 2 * BLOCK
LEAST_TABLE_TOKENS = 1 << 17


@dataclass(frozen=True)
class FlexPlan:
    """A layout as flex takes it.

    Attributes:
        block_mask: of the rows, padded to whole blocks.
        visible: bool [B, padded S, A], the anchors that each query sees besides those in the table; None where the
            table shows them all.
        sink_slot: int32 [], the padding slot in which sinks stand as a key; None where they do not.
    """

    block_mask: BlockMask
    visible: Tensor | None
    sink_slot: Tensor | None


def create_flex_plan(layout: PackedLayout, request: Request, form: Form) -> FlexPlan:
    """The block mask of the padded rows, and what a merge adds to it."""
    has_column = form == "column" and request.sinks is not None
    blocks = -(-(layout.seq_len + has_column) // BLOCK)
    padded_len = max(LEAST_TOKENS, blocks * BLOCK)
    ids = F.pad(layout.document_ids, (0, padded_len - layout.seq_len), value=PADDING_ID)
    padded = PackedLayout(ids, layout.anchor_tokens, layout.runs)
    pattern, sliding_window, keep_anchor = request.mask_key
    block_mask = create_packed_block_mask(
        padded, pattern, BLOCK, sliding_window, keep_anchor, anchor_column=form != "merge"
    )
    block_mask.mask_mod = _with_static_captures(block_mask.mask_mod, padded)
    visible = sink_slot = None
    if has_column:
        sink_slot = torch.full((), padded_len - 1, dtype=torch.int32, device=layout.device)
        block_mask = _with_sink_column(block_mask, sink_slot)
    if pattern == "anchor" and form == "merge":
        visible = anchor_visibility(padded, request)
    return FlexPlan(block_mask, visible, sink_slot)


def _with_static_captures(mask_mod: MaskMod, layout: PackedLayout) -> MaskMod:
    """A mask_mod that holds no number and no table of a size that varies: neither is a symbol in the compiled mask.

    The CPU lowering of torch 2.13 finds its own symbols by name in the code that it wrote, ks1 within ks14 too: what
    a mask captures as a symbol may give code that is none.
    """

    def captured(held: Any) -> Any:
        if type(held) is int:
            return torch.full((), held, dtype=torch.int32, device=layout.device)
        if not isinstance(held, Tensor):
            return held
        table = held.new_empty(table_tokens(layout.batch_size * layout.seq_len))
        table[: len(held)] = held  # what stands behind is never read
        torch._dynamo.mark_static(table)
        return table

    cells = (CellType(captured(cell.cell_contents)) for cell in mask_mod.__closure__ or ())
    return FunctionType(mask_mod.__code__, mask_mod.__globals__, mask_mod.__name__, None, tuple(cells))


def table_tokens(tokens: int) -> int:
    """Entries of a mask's table: one size for all batches up to 128K tokens, then powers of two."""
    return max(LEAST_TABLE_TOKENS, 1 << (tokens - 1).bit_length())


def _with_sink_column(block_mask: BlockMask, sink_slot: Tensor) -> BlockMask:
    """A block mask whose last slot, a padding slot, is seen by every query: the sinks' key.

    Every query block but the last gets one more partial block. The last has it already, for its own padding: that slot
    sees itself alone, so the block is not full. There is room, as before the last a query block sees fewer blocks than
    there are. The query side stays as it was: it is for a backward.
    """
    mask_mod = block_mask.mask_mod
    num_blocks, indices = block_mask.kv_num_blocks.clone(), block_mask.kv_indices.clone()
    indices[:, :, :-1].scatter_(-1, num_blocks[:, :, :-1, None].long(), num_blocks.shape[-1] - 1)
    num_blocks[:, :, :-1] += 1

    def with_column(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx, kv_idx) | (kv_idx == sink_slot)

    tables = {**tables_of(block_mask), "kv_num_blocks": num_blocks, "kv_indices": indices}
    return BlockMask(block_mask.seq_lengths, **tables, mask_mod=with_column)


def tables_of(block_mask: BlockMask) -> dict[str, Any]:
    """The tables as arguments of their own: the sizes of tensors inside a BlockMask are compiled in."""
    tables = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
    names = [*tables, *(f"full_{name}" for name in tables)]
    return {name: getattr(block_mask, name) for name in names} | {"BLOCK_SIZE": block_mask.BLOCK_SIZE}
