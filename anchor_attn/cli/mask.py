"""`anchor-attn mask`."""

import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from anchor_attn.cli.tables import create_table

if TYPE_CHECKING:
    from anchor_attn.mask_numbers import MaskNumbers
    from anchor_attn.masks import PackedLayout

MOST_COLUMNS = 120  # of the picture on the terminal: small enough to be seen with its table
BLOCKS = ("full", "partial", "empty")
HEADER = ("pattern", "pairs", "of full", *(f"blocks\n{kind}" for kind in BLOCKS), "sparsity", "tables", "build")
LENGTHS_HELP = "Tokens of each document, the anchor not counted; / begins the next row: 300 50 161 / 511."
DATA_HELP = (
    "A packed dataset (.jsonl, .parquet or a folder) with document_ids, document_lengths, seq_lengths or position_ids; "
    "or documents to pack, as in compare: stdlib, a file, a folder, a hub name."
)
ANCHOR_HELP = "Anchor tokens of a row; 1, or in a packed dataset what its rows say, else its first tokens."


def mask_command(
    lengths: Annotated[list[str] | None, typer.Argument(help=LENGTHS_HELP)] = None,
    document_ids: Annotated[
        str | None, typer.Option(help="Or an id a token, for documents in pieces: '0 1 1 2 1 2 -1', rows apart by /.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    text_column: Annotated[str, typer.Option(help="Column that holds the text of documents.")] = "text",
    tokenizer: Annotated[str, typer.Option(help="For documents: bytes, or a Hugging Face name or path.")] = "bytes",
    rows: Annotated[int | None, typer.Option(help="Rows to draw at random or to read; 1.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a row, the anchor included; 4096, or the longest row given.")
    ] = None,
    anchor_tokens: Annotated[int | None, typer.Option(help=ANCHOR_HELP)] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="full, intra_doc or anchor, once for each; all of them.")
    ] = None,
    sliding_window: Annotated[int | None, typer.Option(help="Tokens that a query sees back, itself included.")] = None,
    keep_anchor: Annotated[bool, typer.Option(help="Whether the anchor stays visible outside the window.")] = True,
    block_size: Annotated[str, typer.Option(help="Tokens a block, or of queries and keys: 128,64.")] = "128",
    row: Annotated[int, typer.Option(help="The row that is drawn; the numbers are of all rows.")] = 0,
    seed: Annotated[int, typer.Option(help="Of a row drawn at random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of mask.png, mask.txt and mask.json.")] = Path("runs/mask"),
    as_json: Annotated[bool, typer.Option("--json", help="Print mask.json instead of the table.")] = False,
) -> None:
    """Draw packed rows under each pattern, and say what their block masks cost.

    Without an argument the row is drawn at random, its documents as long as those of a corpus.
    """
    from anchor_attn.cli.mask_input import MaskInput, read_layout
    from anchor_attn.mask_numbers import measure_mask
    from anchor_attn.masks.draw import draw_masks_figure, single_row
    from anchor_attn.masks.draw_text import bracketed_text
    from anchor_attn.masks.patterns import PATTERNS, check_pattern
    from anchor_attn.results import check_device, check_folder, describe_environment, write_json

    check_device(device)
    check_folder(out)
    sizes = _block_sizes(block_size)
    layout, source = read_layout(
        MaskInput(
            lengths=tuple(lengths or ()),
            document_ids=document_ids,
            data=data,
            text_column=text_column,
            tokenizer=tokenizer,
            rows=rows,
            seq_len=seq_len,
            anchor_tokens=anchor_tokens,
            seed=seed,
        )
    )
    asked = pattern or [name for name in PATTERNS if layout.anchor_tokens or name != "anchor"]
    for name in asked:
        check_pattern(layout, name, sliding_window)
    patterns = [name for name in PATTERNS if name in asked]
    one_row = single_row(layout, row)
    window: dict[str, Any] = {"sliding_window": sliding_window, "keep_anchor": keep_anchor}
    numbers = [measure_mask(layout, name, sizes, device=device, **window) for name in patterns]
    draw_masks_figure(one_row, patterns, block_size=sizes, **window).savefig(out / "mask.png")
    pictures = [bracketed_text(one_row, [name], **window) for name in patterns]
    (out / "mask.txt").write_text("\n\n".join(pictures) + "\n", encoding="utf-8")
    meta = {
        **describe_environment(device),
        "source": source,
        "rows": layout.batch_size,
        "seq_len": layout.seq_len,
        "anchor_tokens": layout.anchor_tokens,
        "document_lengths": layout.document_lengths,
        "block_size": sizes,
        **window,
        "drawn_row": row,
        "seed": seed,
    }
    write_json(out / "mask.json", {"meta": meta, "records": [asdict(each) for each in numbers]})
    if as_json:
        typer.echo((out / "mask.json").read_text(encoding="utf-8"), nl=False)
        return
    console = Console()
    columns = min(console.width, MOST_COLUMNS)
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    say(f"{_described(layout, source)}; blocks of {sizes[0]} × {sizes[1]} on {device}\n")
    console.print(_table(numbers), crop=False, no_wrap=True)
    say()
    say(bracketed_text(one_row, patterns, columns, **window))
    if not layout.anchor_tokens and not pattern:
        say("\nThese rows have no anchor: --anchor-tokens 1 makes their first token one.")
    say(f"\nWritten: {out / 'mask.png'}, {out / 'mask.txt'}, {out / 'mask.json'}")


def _described(layout: "PackedLayout", source: str) -> str:
    lengths = sorted(length for row in layout.document_lengths for length in row)
    ends = dict.fromkeys(f"{length:,}" for length in (*lengths[:1], *lengths[-1:]))  # of equal ones, one
    spread = f" of {'–'.join(ends)} token{'' if [*ends] == ['1'] else 's'}" if ends else ""
    padding = layout.batch_size * layout.seq_len - sum(layout.row_tokens)
    return (
        f"{_count(layout.batch_size, 'row')} of {_count(layout.seq_len, 'token')}, {source}: "
        f"{_count(layout.anchor_tokens, 'anchor token')} a row, {_count(len(lengths), 'document')}{spread}"
        f"{', in pieces' if layout.is_interleaved else ''}, {padding:,} padded"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _table(numbers: "list[MaskNumbers]") -> Table:
    rows = [
        (
            each.pattern,
            f"{each.pairs:,}",
            f"{100 * each.share_of_full:.1f} %",
            f"{each.blocks_full:,}",
            f"{each.blocks_partial:,}",
            f"{each.blocks_empty:,}",
            f"{100 * each.sparsity:.1f} %",
            _bytes(each.table_bytes),
            f"{each.build_ms:.1f} ms",
        )
        for each in numbers
    ]
    return create_table(HEADER, rows)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _block_sizes(text: str) -> tuple[int, int]:
    sizes = re.fullmatch(r"\s*([0-9]{1,9})(?:\s*,\s*([0-9]{1,9}))?\s*", text)
    if sizes is None or min(int(size) for size in sizes.groups() if size) < 1:
        raise ValueError(
            f"block_size must be one number of tokens, or that of queries and that of keys, got {text!r}; "
            "pass 128 or 128,64."
        )
    return int(sizes[1]), int(sizes[2] or sizes[1])
