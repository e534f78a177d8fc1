"""The tables that commands print: no number is cut short, in a narrow terminal they run over its edge."""

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.table import Table

FAINT = "  "  # rows that belong to the one above begin so


def create_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    justify: Literal["left", "right"] = "right",
    foot: Sequence[str] | None = None,
    gap: int = 1,
) -> Table:
    """A table of cells, to be printed with `crop=False, no_wrap=True`.

    Args:
        header: of each column; a cell may have several lines.
        rows: a cell a column.
        justify: of all columns but the first.
        foot: below the rows.
        gap: columns of the terminal between two of the table, besides the one that every cell begins with.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, gap), pad_edge=False, show_edge=False, show_footer=bool(foot))
    feet = [""] * len(header) if foot is None else foot
    for place, (name, last) in enumerate(zip(header, feet, strict=True)):
        table.add_column(name, last, justify=justify if place else "left")
    for row in rows:
        table.add_row(*row, style="dim" if row[0].startswith(FAINT) else None)
    return keep_whole(table)


def keep_whole(table: Table) -> Table:
    """The same table of text, each column at least as wide as its widest cell; to be printed with `crop=False`."""
    for column in table.columns:
        cells = (column.header, *column.cells, column.footer)
        column.min_width = max(len(line) for cell in cells for line in str(cell).split("\n"))
    return table
