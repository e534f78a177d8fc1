"""What reading yields, one item a document or a fault."""

from typing import NamedTuple

TOKENS = "input_ids"


class Found(NamedTuple):
    """What one place of a source holds: a text, or a row of columns that may hold one."""

    name: str
    file: str
    content: object


class Skipped(NamedTuple):
    """What is left out, and why."""

    name: str
    reason: str


def one_line(error: Exception) -> str:
    """The first line of somebody else's message, behind its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
