"""What README says runs, what it draws is the house, and what it claims to support is what the tests prove."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from families import FAMILIES
from refused import REFUSED
from support_matrix import BEGIN, END, SupportMatrix, columns_of, matrix, read_matrix, replace_matrix
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anchor_attn.train.presets import create_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CALLED_FOR = {(name, column) for name, family in FAMILIES.items() for column in columns_of(family)}
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_support_matrix_has_a_cell_for_all_that_the_families_call_for_and_no_other():
    """`make support` writes the table by the tests' outcome; here it must be of these families and features."""
    tested = {place for place, said in read_matrix(README).items() if said == "tested"}

    assert tested == CALLED_FOR
    assert set(read_matrix(README).values()) == {"tested", "–"}


def test_every_refused_family_is_named():
    spoken = re.sub(r"[^a-z0-9]", "", README.lower().replace("mixture of experts", "moe"))
    for name in REFUSED:
        assert name.removesuffix("_text").replace("_", "") in spoken, name


# --- the support matrix itself ---------------------------------------------------------------------------------------


def test_a_cell_is_tested_only_if_all_its_tests_passed():
    outcomes = {
        ("llama", "packed = alone"): {"passed"},
        ("llama", "generate"): {"passed", "failed"},
        ("opt", "packed = alone"): {"skipped"},
    }
    rows = [line.split(" | ") for line in matrix(outcomes).splitlines()[2:]]

    assert [[field.strip("| ") for field in row] for row in rows] == [
        ["llama", "tested", "–", "–", "–", "–", "failed", "–"],
        ["opt", "skipped", "–", "–", "–", "–", "–", "–"],
    ]


def test_a_written_matrix_is_read_back():
    outcomes = {(name, column): {"passed"} for name in ("llama", "opt") for column in ("packed = alone", "window")}
    text = replace_matrix(f"before\n{BEGIN}old\n{END}after\n", matrix(outcomes), "2 families.")

    assert {place for place, said in read_matrix(text).items() if said == "tested"} == set(outcomes)
    assert (text.split("\n")[0], text.split("\n")[-2]) == ("before", "after")
    assert "old" not in text


def run_of_tests(readme, outcomes, left_out=()):
    """What the plugin makes of a run: its session, and what it says."""
    plugin = SupportMatrix(readme)
    marked = {place: SimpleNamespace(args=[place[1]]) for place in (*outcomes, *left_out)}
    items = {
        place: mock.Mock(
            spec=pytest.Function,
            nodeid=str(place),
            callspec=SimpleNamespace(params={"family": place[0]}),
            get_closest_marker={"supports": mark}.get,
        )
        for place, mark in marked.items()
    }
    session = SimpleNamespace(items=[items[place] for place in outcomes], exitstatus=pytest.ExitCode.OK)
    plugin.pytest_deselected([items[place] for place in left_out])
    plugin.pytest_collection_finish(session)
    for place, outcome in outcomes.items():
        for when in ("setup", "call", "teardown"):
            said = outcome if when == "call" else "passed"
            report = SimpleNamespace(nodeid=str(place), when=when, outcome=said, passed=said == "passed")
            plugin.pytest_runtest_logreport(report)
    plugin.pytest_sessionfinish(session)
    return session, plugin.said


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}old\n{END}after\n")
    return path


def test_a_whole_run_that_passes_writes_the_matrix(readme):
    session, said = run_of_tests(readme, dict.fromkeys(CALLED_FOR, "passed"))

    assert said == f"{readme} has the table of this run"
    assert session.exitstatus == pytest.ExitCode.OK
    assert {place for place, cell in read_matrix(readme.read_text()).items() if cell == "tested"} == CALLED_FOR


@pytest.mark.parametrize("outcome", ["failed", "left out", "missing", "of no family"])
def test_a_run_with_a_failure_or_without_all_its_tests_writes_nothing(readme, outcome):
    """A table is of one whole run, or it is not written."""
    place, before = ("llama", "generate"), readme.read_text()
    outcomes = dict.fromkeys(sorted(CALLED_FOR - {place}), "passed")
    if outcome != "missing":
        outcomes[place] = "failed" if outcome == "failed" else "passed"
    if outcome == "of no family":
        outcomes["gru", "generate"] = "passed"
    session, said = run_of_tests(readme, outcomes, left_out=[place] if outcome == "left out" else [])

    assert said.startswith(f"{readme} keeps its table: ")
    assert ("gru" if outcome == "of no family" else str(place)) in said
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    assert readme.read_text() == before


# --- snippets, the house, links --------------------------------------------------------------------------------------


def byte_level_tokenizer():
    vocabulary = {symbol: place for place, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<s>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[0])
def test_the_snippets_run(snippet, tmp_path):
    create_model("tiny", 257, 4096, 256).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    exec(snippet.replace("path/to/model", str(tmp_path)), {})


def test_the_house_is_as_drawn_and_every_folder_has_its_line():
    tree = re.search(r"## The house\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    drawn = [line.split("/")[0] for line in tree.splitlines()]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {path.split("/")[0] for path in tracked if "/" in path and not path.startswith(".")}
    assert sorted(drawn) == sorted(folders)


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_table_of_the_readme_has_a_header():
    for block in re.findall(r"(?:^\|.*\n)+", README, flags=re.MULTILINE):
        lines = block.splitlines()
        assert re.fullmatch(r"\|(:?-+:?\|)+", lines[1].replace(" ", "")), lines[0]
