"""README's table of families, written by the outcome of the tests: `pytest --support-matrix README.md`.

@pytest.mark.supports("generate")          a test of one cell; its parameter `family` is the row

| family | packed = alone | window | … |
|---|---|---|---|
| mistral | tested | tested | … |          every test of that cell passed in that run
| llama | tested | – | … |                 the family has no such feature
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, Family

# Keywords of `anchor_attention` that have a column.
FEATURES = {"sliding_window": "window", "softcap": "softcap", "sinks": "sinks"}
COLUMNS = ("packed = alone", *FEATURES.values(), "unequal heads", "generate", "checkpointing")
BEGIN, END = "<!-- support matrix: `make support` writes it -->\n", "<!-- end of the support matrix -->\n"


def columns_of(family: Family) -> set[str]:
    """The cells that a family's configuration calls for."""
    always = {"packed = alone", "generate"}
    features = {FEATURES[feature] for feature in family.bites if feature in FEATURES}
    others = {"unequal heads": family.unequal_heads, "checkpointing": family.checkpoints}
    return always | features | {column for column, called_for in others.items() if called_for}


def matrix(outcomes: dict[tuple[str, str], set[str]]) -> str:
    """The table, from the outcomes of each cell's tests: "passed", "failed", "skipped" or "not run".

    matrix({("llama", "window"): {"passed"}})      | llama | – | tested | – | …
    """
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in sorted({family for family, _ in outcomes}):
        lines.append(f"| {family} | {' | '.join(cell(outcomes.get((family, column))) for column in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def cell(outcomes: set[str] | None) -> str:
    """What a cell says: "tested" only if every test of it passed."""
    if not outcomes:
        return "–"
    return "tested" if outcomes == {"passed"} else ", ".join(sorted(outcomes - {"passed"}))


def replace_matrix(text: str, table: str, versions: str) -> str:
    """The text with a new table between its two comments."""
    assert text.count(BEGIN) == text.count(END) == 1, "README must hold the support matrix's two comments once"
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{versions}\n{END}{rest.split(END)[1]}"


def read_matrix(text: str) -> dict[tuple[str, str], str]:
    """The cells of a written table, by family and column."""
    table = text.split(BEGIN)[1].split(END)[0]
    lines = re.findall(r"^\|(.*)\|$", table, flags=re.MULTILINE)
    head, _, *rows = ([field.strip() for field in line.split("|")] for line in lines)
    return {(row[0], column): said for row in rows for column, said in zip(head[1:], row[1:], strict=True)}


class SupportMatrix:
    """A pytest plugin that notes the outcome of every test marked `supports`, and writes the table at the end.

    Nothing is written unless every cell that the families call for has its tests, and none of these failed or was left
    out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, tuple[str, str]] = {}
        self.outcomes: dict[str, str] = {}
        self.left_out: list[str] = []
        self.said = ""

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.left_out += [item.nodeid for item in items if item.get_closest_marker("supports")]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if (marker := item.get_closest_marker("supports")) is not None:
                self.cells[item.nodeid] = (_parameters(item)["family"], marker.args[0])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:  # a failing setup or teardown too
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)
        for nodeid, place in self.cells.items():
            outcomes[place].add(self.outcomes.get(nodeid, "not run"))
        called_for = {(name, column) for name, family in FAMILIES.items() for column in columns_of(family)}
        problems = [nodeid for nodeid in self.cells if self.outcomes.get(nodeid) not in ("passed", "skipped")]
        problems += [*self.left_out, *(f"a test of {place}" for place in sorted(called_for ^ outcomes.keys()))]
        if problems:
            self.said = f"{self.path} keeps its table: {len(problems)} tests failed or were left out, as {problems[0]}"
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
        versions = f"{len(FAMILIES)} families, torch {torch.__version__}, transformers {transformers.__version__}."
        self.path.write_text(replace_matrix(self.path.read_text(), matrix(outcomes), versions))
        self.said = f"{self.path} has the table of this run"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(self.said)


def _parameters(item: pytest.Item) -> dict[str, Any]:
    assert isinstance(item, pytest.Function), f"{item.nodeid} is no test function"
    return item.callspec.params
