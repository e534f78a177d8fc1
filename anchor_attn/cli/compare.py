"""`anchor-attn compare`."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from anchor_attn.cli.tables import keep_whole

TERMINAL_COLUMNS = 6  # the rest of the report's columns would not fit 80 characters


def compare_command(
    arms: Annotated[
        str, typer.Option(help="Comma-separated: full, intra_doc, anchor, each with +reset or +bos behind it.")
    ] = "full,intra_doc,anchor",
    data: Annotated[
        str, typer.Option(help="stdlib, stdlib-files, a .jsonl, .parquet or text file, a folder, or a hub name.")
    ] = "stdlib",
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    model: Annotated[
        str, typer.Option(help="tiny, laptop, small, a config file (*.json), or a checkpoint's name or folder.")
    ] = "laptop",
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, or a Hugging Face name or path; a checkpoint brings its own.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a row, the anchor included.")] = 4096,
    steps: Annotated[int, typer.Option(help="Optimizer steps a run.")] = 120,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine.")] = 3e-3,
    cut: Annotated[str, typer.Option(help="A document cut at the row's end: continue in the next row, or drop.")] = (
        "continue"
    ),
    seeds: Annotated[int, typer.Option(help="How many seeds; three or more give an interval.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    engine: Annotated[str, typer.Option(help="auto, varlen or reference.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for autocast.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/compare"),
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the table.")] = False,
) -> None:
    """Train full, intra-document and anchor attention on the same tokens, and say what the difference is."""
    from anchor_attn.page import require_matplotlib
    from anchor_attn.train.compare import Comparison, compare
    from anchor_attn.train.report import HEADER, findings, table_rows, write_report

    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}; pass 3 for an interval.")
    settings = Comparison(
        arms=tuple(name.strip() for name in arms.split(",") if name.strip()),
        seeds=tuple(range(seed, seed + seeds)),
        data=data,
        text_column=text_column,
        tokenizer=tokenizer,
        model=model,
        seq_len=seq_len,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        cut=cut,  # type: ignore[arg-type]  # pack_documents checks it
        engine=engine,
        device=device,
        dtype=dtype,
        out=out,
    )
    require_matplotlib("the report")
    said = Console(stderr=True, highlight=False, soft_wrap=True)
    result = compare(settings, say=said.print)
    written = write_report(result, out)
    if as_json:
        typer.echo((out / "results.json").read_text(encoding="utf-8"), nl=False)
        return
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, caption="losses in nats per labelled token, times are medians")
    rows = [row[:TERMINAL_COLUMNS] for row in table_rows(result)]
    for place, name in enumerate(HEADER[:TERMINAL_COLUMNS]):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    console.print(keep_whole(table), crop=False)
    for sentence in findings(result):
        console.print(sentence, highlight=False)
    console.print(f"Written: {out / 'results.json'}, {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
