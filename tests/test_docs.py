"""What README says runs, what it draws is the house, and what it claims to support is what the tests prove."""

import re
import subprocess
from pathlib import Path

import pytest
from families import FAMILIES, REFUSED
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anchor_attn.train.presets import create_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def support_matrix():
    """The README's table of families, from the configurations that the tests run."""
    marks = dict.fromkeys(("sliding_window", "softcap", "sinks"), "tested")
    lines = ["| family | sliding window | softcap | learned sinks |", "|---|---|---|---|"]
    for name, family in sorted(FAMILIES.items()):
        cells = [marks[feature] if feature in family.bites else "–" for feature in marks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_support_matrix_is_the_one_that_the_tests_prove():
    assert support_matrix() in README


def test_every_refused_family_is_named():
    spoken = re.sub(r"[^a-z0-9]", "", README.lower())
    for name in REFUSED:
        assert name.removesuffix("_text").replace("_", "") in spoken, name


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
