"""The sections of a report of drift, in the terminal."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from anchor_attn.drift.sections import Section

FAINT = "  "  # rows that belong to the one above begin so


def print_sections(console: Console, sections: Iterable[Section]) -> None:
    """Headings, tables and sentences.

    Args:
        console: that wraps no line and reads no markup.
        sections: in order.
    """
    for section in sections:
        console.print(f"\n{section.heading}", style="bold")
        if section.rows:
            console.print(_table(section), crop=False, no_wrap=True)
        if section.note is not None:
            console.print(section.note, style="dim")
        for sentence in section.sentences:
            console.print(sentence)


def _table(section: Section) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    for place, cells in enumerate(zip(section.header, *section.rows, strict=True)):
        # A number is never cut short: in a narrow terminal the table runs over its edge.
        width = max(len(line) for cell in cells for line in cell.split("\n"))
        table.add_column(cells[0], justify="right" if place else "left", min_width=width)
    for row in section.rows:
        table.add_row(*row, style="dim" if row[0].startswith(FAINT) else None)
    return table
