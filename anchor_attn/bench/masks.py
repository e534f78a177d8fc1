"""How long block masks take to build, against torch's own builder, eager and compiled, on the same row in one run."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import linear_regression, median
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from anchor_attn.lengths import draw_corpus_lengths
from anchor_attn.mask_numbers import mask_bytes
from anchor_attn.masks import PATTERNS, PackedLayout, create_packed_block_mask, dense_mask, packed_mask_mod
from anchor_attn.masks.patterns import MaskMod, Pattern
from anchor_attn.results import CheckError

PARITY_TOKENS = 700
SIDES = ("kv", "full_kv", "q", "full_q")
MASK_SEQ_LENS = tuple(2**power for power in range(13, 23))
LONGEST_RIVAL_TOKENS = 32_768  # torch's eager builder takes 11 GB there, and four times as much at the next length


@dataclass(frozen=True)
class MaskTiming:
    """What one builder took.

    Attributes:
        name: of the builder.
        engine: "ours" or "torch".
        kernel: how it builds.
        pattern: who may attend to whom.
        seq_len: tokens of the row.
        seconds: median of the rounds, the first left out.
        fastest_s: of the counted rounds.
        slowest_s: of the counted rounds.
        blocks_full: key blocks that query blocks see whole, all together.
        blocks_partial: those that they see some of.
        table_bytes: of all tables, those of the mask_mod included.
        share_of_table: what the kept blocks need, four bytes on either side, over the bytes of the block tables.
        ratio_to_eager: seconds of torch's eager builder over these; None where it was not run.
    """

    name: str
    engine: str
    kernel: str
    pattern: Pattern
    seq_len: int
    seconds: float
    fastest_s: float
    slowest_s: float
    blocks_full: int
    blocks_partial: int
    table_bytes: int
    share_of_table: float
    ratio_to_eager: float | None


@dataclass(frozen=True)
class Builder:
    """Something to time: `build` makes a block mask of a layout; the slow ones are run for fewer rounds."""

    name: str
    engine: str
    kernel: str
    pattern: Pattern
    build: Callable[[PackedLayout], BlockMask]
    rounds: int


def bench_masks(seq_lens: Sequence[int], rounds: int, seed: int, device: str) -> list[MaskTiming]:
    """Build the masks of one row of each length: ours with tables for CUDA, and torch's up to 32,768 tokens.

    The layout lies on the host, where packing makes it; the mask_mod is part of ours and given to torch's.

    Raises:
        CheckError: a mask differs from torch's on a small row; then nothing is timed.
    """
    check_mask_parity(seed, device)
    compiled = torch.compile(create_block_mask, dynamic=False)
    timings = []
    for seq_len in seq_lens:
        lengths = draw_corpus_lengths(seq_len - 1, seed)
        builders = [
            _ours("anchor", rounds, device),
            _ours("anchor", rounds, device, anchor_column=False),
            _ours("intra_doc", rounds, device),
        ]
        if seq_len <= LONGEST_RIVAL_TOKENS:
            few = -(-rounds // 10)
            builders += [
                _torchs("eager", create_block_mask, few, device),
                _torchs("compiled", compiled, few, device),
            ]
        timings += time_builders(builders, lengths, seq_len, device)
    return timings


def time_builders(builders: Sequence[Builder], lengths: list[int], seq_len: int, device: str) -> list[MaskTiming]:
    """Time builders in turn, each for its rounds after one that is not counted."""
    seconds: dict[str, list[float]] = {builder.name: [] for builder in builders}
    masks: dict[str, BlockMask] = {}
    for number in range(max(builder.rounds for builder in builders) + 1):
        for builder in builders:
            if number > builder.rounds:
                continue
            layout = PackedLayout.from_lengths([lengths], seq_len=seq_len)
            masks.pop(builder.name, None)
            start = time.perf_counter()
            block_mask = builder.build(layout)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[builder.name].append(time.perf_counter() - start)
            masks[builder.name] = block_mask
            del block_mask
    counted = {name: values[1:] for name, values in seconds.items()}
    eager = next((builder.name for builder in builders if builder.kernel == "eager"), None)
    eager_s = None if eager is None else median(counted[eager])
    return [_timing(builder, masks[builder.name], counted[builder.name], seq_len, eager_s) for builder in builders]


def _timing(
    builder: Builder, block_mask: BlockMask, seconds: list[float], seq_len: int, eager_s: float | None
) -> MaskTiming:
    full, partial = int(cast(Tensor, block_mask.full_kv_num_blocks).sum()), int(block_mask.kv_num_blocks.sum())
    return MaskTiming(
        name=builder.name,
        engine=builder.engine,
        kernel=builder.kernel,
        pattern=builder.pattern,
        seq_len=seq_len,
        seconds=median(seconds),
        fastest_s=min(seconds),
        slowest_s=max(seconds),
        blocks_full=full,
        blocks_partial=partial,
        table_bytes=mask_bytes(block_mask),
        share_of_table=8 * (full + partial) / _table_bytes(block_mask),
        ratio_to_eager=None if eager_s is None else eager_s / median(seconds),
    )


def measure_growth(timings: Sequence[MaskTiming]) -> dict[str, float]:
    """Per builder of ours, the exponent x in seconds ∝ blocks^x over all lengths: 1 is a cost of kept blocks alone."""
    exponents = {}
    for name in dict.fromkeys(timing.name for timing in timings if timing.engine == "ours"):
        own = [timing for timing in timings if timing.name == name]
        if len(own) > 1:
            blocks = [math.log(timing.blocks_full + timing.blocks_partial) for timing in own]
            exponents[name] = linear_regression(blocks, [math.log(timing.seconds) for timing in own]).slope
    return exponents


def check_mask_parity(seed: int, device: str) -> None:
    """Compare our block mask with torch's, from both sides, on a small row of the same kind.

    Raises:
        CheckError: a block differs.
    """
    lengths = draw_corpus_lengths(PARITY_TOKENS - 1, seed)
    layout = PackedLayout.from_lengths([lengths])
    for pattern in PATTERNS:
        mask_mod = _looking_up(dense_mask(layout.to(device), pattern))
        theirs = create_block_mask(mask_mod, 1, None, PARITY_TOKENS, PARITY_TOKENS, device, 32)
        ours = create_packed_block_mask(layout, pattern, 32, device=device, narrow=True)
        if _blocks(ours) != _blocks(theirs):
            raise CheckError(
                f"block masks must equal torch's before they are timed, got another one for {pattern!r} of {lengths}; "
                "report this with the version of torch."
            )


def _looking_up(mask: Tensor) -> MaskMod:
    """A dense mask [B, S, S] as a mask_mod."""
    return lambda b, h, q_idx, kv_idx: mask[b, q_idx, kv_idx]


def _ours(pattern: Pattern, rounds: int, device: str, anchor_column: bool = True) -> Builder:
    name = f"ours {pattern}" if anchor_column else f"ours {pattern}, no column"

    def build(layout: PackedLayout) -> BlockMask:
        return create_packed_block_mask(layout, pattern, anchor_column=anchor_column, device=device, narrow=True)

    return Builder(name, "ours", "from bounds", pattern, build, rounds)


def _torchs(kernel: str, create: Callable[..., BlockMask], rounds: int, device: str) -> Builder:
    mask_mods: dict[PackedLayout, MaskMod] = {}

    def build(layout: PackedLayout) -> BlockMask:
        if layout not in mask_mods:
            mask_mods[layout] = packed_mask_mod(layout.to(device), "anchor")
        return create(mask_mods[layout], 1, None, layout.seq_len, layout.seq_len, device=device)

    return Builder(f"torch {kernel}", "torch", kernel, "anchor", build, rounds)


def _blocks(block_mask: BlockMask) -> list[list[list[int]]]:
    """Per side, the kept blocks of every row of blocks."""
    kept = []
    for side in SIDES:
        counts, indices = getattr(block_mask, f"{side}_num_blocks"), getattr(block_mask, f"{side}_indices")
        kept.append([row[:count] for count, row in zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)])
    return kept


def _table_bytes(block_mask: BlockMask) -> int:
    tables = [getattr(block_mask, f"{side}_{part}") for side in SIDES for part in ("num_blocks", "indices")]
    return sum(table.nbytes for table in tables)
