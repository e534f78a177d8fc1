"""One thread a test: bit for bit needs one order of summation, and on a busy machine threads wait for each other.

`pytest --support-matrix README.md` writes README's table of families by the outcome of the tests marked `supports`.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for this process, torch not being imported yet, and those it starts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-matrix", type=Path, metavar="FILE", help="write the table of families into this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "supports(column): a test of this column of the support matrix")
    if path := config.getoption("--support-matrix"):
        from support_matrix import SupportMatrix  # brings torch and transformers

        config.pluginmanager.register(SupportMatrix(path), "support-matrix")
