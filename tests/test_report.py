"""The report says what the records say, opens without a network, and never claims more than an interval allows."""

import base64
import json
import re
import sys
from dataclasses import asdict

import pytest

from anchor_attn.masks import PackedLayout
from anchor_attn.page import Page
from anchor_attn.results import write_csv, write_json, write_jsonl
from anchor_attn.train import pack_documents
from anchor_attn.train.compare import Result
from anchor_attn.train.report import HEADER, findings, table_rows, write_report

LAYOUT = PackedLayout.from_lengths([[30, 20, 13]])
SECONDS = {"full": 2.0, "anchor": 0.5}
SEED_LOSSES = {"full": [2.0, 2.2, 2.1], "anchor": [2.0, 2.3, 2.0]}


def record(arm, seed):
    loss = SEED_LOSSES[arm][seed]
    return {
        "arm": arm,
        "seed": seed,
        "step_s": SECONDS[arm],
        "tokens_per_s": 64 / SECONDS[arm],
        "loss": loss,
        "held_out_loss": loss,
        "held_out_loss_packed": loss,
        "held_out_loss_as_trained": loss,
        "pairs_of_full": {"full": 1.0, "anchor": 0.25}[arm],
        "held_out_loss_by_position": [
            {"first_position": 0, "tokens": 5, "loss": loss},
            {"first_position": 64, "tokens": 5, "loss": loss - 0.1},
        ],
        "attended_pairs": {"full": 2080.0, "anchor": 520.0}[arm],
        "peak_bytes": 3 * 2**20,
        "parameters": 1234,
        "curve": [{"step": i, "loss": 5 - i / 10, "tokens": 63 * i, "seconds": i * 0.5} for i in range(1, 13)],
    }


def result_of(seeds):
    rows = pack_documents(["abc"] * 40, 64)
    meta = {
        "versions": {"torch": "2.13.0"},
        "device_name": "a <processor>",
        "threads": 2,
        "git_commit": None,
        "settings": {"steps": 12, "batch_size": 1, "seq_len": 64, "model": "tiny"},
        "dtype": "float32",
        "seeds": list(range(seeds)),
        "corpus": {"source": "a & b", "corpus_hash": "ff", "documents": 40, "skipped": {"too short": 3}},
        "held_out": {"documents": 4, "of_documents": 9, "packed_rows": 1, "cut_documents": 0},
        "packing": asdict(rows.report),
        "unigram_loss": 3.0,
    }
    return Result(meta, [record(arm, seed) for seed in range(seeds) for arm in ("full", "anchor")], LAYOUT)


def test_the_table_gives_shares_of_full_and_spreads_over_seeds():
    full, anchor = table_rows(result_of(3))
    assert len(full) == len(HEADER)
    assert full[:4] == ["full", "100 %", "2.00", "100 %"]
    assert anchor[:4] == ["anchor", "25 %", "0.50", "25 %"]
    assert anchor[7] == "128"
    assert anchor[5] == "2.100 ± 0.173"
    assert table_rows(result_of(1))[1][5] == "2.000"


def test_findings_say_no_difference_seen_where_the_interval_includes_zero():
    sentences = findings(result_of(3))
    assert "token frequencies alone give 3.000: all arms learned" in sentences[0]
    assert any("full − anchor" in sentence and "no difference seen" in sentence for sentence in sentences)
    single = findings(result_of(1))
    assert any("no interval below 3 seeds" in sentence for sentence in single)
    assert any("may be chance" in sentence for sentence in single)


def test_findings_admit_an_arm_that_learned_nothing():
    result = result_of(1)
    result.records[0]["held_out_loss"] = 3.5
    assert "not every arm learned" in findings(result)[0]


def test_the_page_holds_its_pictures_and_asks_nothing_of_a_network(tmp_path):
    written = write_report(result_of(3), tmp_path)
    page = written[0].read_text()
    assert not re.search(r"(?:src|href)=[\"'](?!data:)|https?://|<script|@import", page)
    pictures = re.findall(r"base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == len(written) - 1 == 4
    for picture, path in zip(pictures, written[1:], strict=True):
        assert base64.b64decode(picture).startswith(b"\x89PNG")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "a &lt;processor&gt;" in page
    assert "a &amp; b" in page
    assert "3 too short" in page


def test_without_matplotlib_the_report_names_the_install_command_before_training(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"the report needs matplotlib; pip install 'anchor-attn\[plots\]'"):
        write_report(result_of(1), tmp_path)


def test_a_page_escapes_all_that_it_is_given(tmp_path):
    page = Page("<t>")
    for add in (page.heading, page.paragraph, page.code):
        add("<b>&")
    page.bullets(["<i>"])
    page.table(["<h>"], [["<c>"]])
    page.write(tmp_path / "deep" / "page.html")
    text = (tmp_path / "deep" / "page.html").read_text()
    assert not re.search(r"<(t|b|i|h|c)>", text)
    assert text.count("&lt;b&gt;&amp;") == 3


def test_result_files_come_with_their_meta_and_never_half_written(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"meta": {}, "records": []})
    before = path.read_text()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"loss": object()})
    assert path.read_text() == before
    write_json(path, {"loss": float("nan"), "losses": (1.5, float("inf"))})
    assert json.loads(path.read_text()) == {"loss": None, "losses": [1.5, None]}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    write_jsonl(tmp_path / "losses.jsonl", [{"step": 1}, {"step": 2}], {"seed": 0})
    write_csv(tmp_path / "bench.csv", [{"name": "a", "seconds": 0.5}], {"seed": 0})
    assert (tmp_path / "losses.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "bench.csv").read_text().splitlines() == ["name,seconds", "a,0.5"]
    for name in ("losses.jsonl", "bench.csv"):
        assert '"seed": 0' in (tmp_path / f"{name}.meta.json").read_text()
