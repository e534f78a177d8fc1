"""What `anchor-attn drift` prints: its sections and where its files are, or the first of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import typer
from rich.console import Console

from anchor_attn.cli.tables import create_table
from anchor_attn.drift.pages.sections import Section


def print_result(
    sections: Iterable[Section],
    written: Sequence[Path],
    as_json: bool,
    measured: str | None = None,
    no_page: str | None = None,
) -> None:
    """Print what was measured.

    Args:
        sections: in order.
        written: files, the JSON first.
        as_json: print that file instead.
        measured: what, in words.
        no_page: why there is no page.
    """
    if as_json:
        typer.echo(written[0].read_text(encoding="utf-8"), nl=False)
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if measured is not None:
        console.print(f"Measured: {measured}")
    for section in sections:
        _print_section(console, section)
    if no_page is not None:
        console.print(no_page)
    console.print(f"\nWritten: {', '.join(map(str, written))}")


def _print_section(console: Console, section: Section) -> None:
    console.print(f"\n{section.heading}", style="bold")
    if section.rows:
        console.print(create_table(section.header, section.rows), crop=False, no_wrap=True)
    if section.note is not None:
        console.print(section.note, style="dim")
    for sentence in section.sentences:
        console.print(sentence)
