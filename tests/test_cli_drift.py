"""`anchor-attn drift`: what is measured is what is printed, written and drawn; one line for bad input."""

import csv
import io
import json
import logging
import math
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from families import tiny_model
from transformers import BertConfig, BertModel

from anchor_attn.cli import drift_run, main
from anchor_attn.cli.drift_input import read_numbers
from anchor_attn.drift import DriftReport, States, measure_drift, random_states
from anchor_attn.drift.models.fix import measure_fix, policy_of
from anchor_attn.drift.pages import draw, page
from anchor_attn.drift.pages.choice_sections import describe_fix
from anchor_attn.drift.pages.draw_sweep import draw_sweep_figure
from anchor_attn.drift.pages.findings import describe_findings
from anchor_attn.drift.pages.numbers import brief, name_shift
from anchor_attn.drift.policies import rotate
from anchor_attn.drift.result import DriftResult, exceeding, measure_lengths, pool_layers
from anchor_attn.drift.sweep import sweep_drift
from anchor_attn.rope.precision import ROPE_PRECISIONS, apply_rotary, rotary_table

FILES = ("drift.json", "drift.csv", "drift.html", "drift.png")
SMALL = ("--lengths", "64", "--queries", "16", "--policies", "bf16_cos_sin,exact", "--shifts", "16,4M")
POLICIES, SHIFTS = ("bf16_cos_sin", "exact", "fp64"), (16, 4_000_000)
TINY_MODEL = ("--model", "tiny", *SMALL)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the command line in a folder of its own; returns exit code, stdout, stderr. Pictures take seconds."""
    monkeypatch.setattr(page, "write_page", unavailable)
    return caller(monkeypatch, capsys, tmp_path)


@pytest.fixture
def run_whole(monkeypatch, capsys, tmp_path):
    """The same, with page and picture."""
    return caller(monkeypatch, capsys, tmp_path)


def unavailable(*_, **__):
    raise ImportError("a picture needs matplotlib")


def caller(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["anchor-attn", "drift", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return call


def content(tmp_path, name="drift.json", out="runs/drift"):
    return json.loads((tmp_path / out / name).read_text())


def measured(seq_len=64, shifts=SHIFTS, policies=POLICIES, stages=True, **options):
    return measure_drift(
        states=random_states(seq_len), policies=policies, shifts=shifts, queries=16, stages=stages, **options
    )


@pytest.fixture(scope="module")
def result():
    return DriftResult.of({64: measured()})


# --- what is said ----------------------------------------------------------------------------------------------------


def test_the_table_says_what_measure_drift_says(run):
    code, out, err = run(*SMALL)
    lines = out.splitlines()
    report = measured()

    assert (code, err) == (0, "")
    assert lines[0].startswith("Measured: random normal query and key in bfloat16: 64 tokens, 1 head of 128")
    for policy in POLICIES[:2]:
        records = [report.at(policy, shift) for shift in SHIFTS]
        place = next(i for i, line in enumerate(lines) if line.split()[:1] == [policy])
        assert lines[place].split()[1:] == [brief(record.mean_abs) for record in records]
        assert lines[place + 1].split() == ["predicted", *(brief(record.predicted) for record in records)]
    floors = next(line for line in lines if line.startswith("fp64 (floor)"))
    assert floors.split()[2:] == [brief(report.at("fp64", shift).mean_abs) for shift in SHIFTS]


def test_stages_alone_stand_in_a_table_of_their_own(run):
    _, out, _ = run(*SMALL)
    part = out[out.index("Where it comes from: each stage alone, +4M") :].splitlines()
    header = part[1].split()
    stages = dict(zip(header, part[4].split(), strict=True))

    assert header == ["policy", "whole", "angles", "table", "rotation", "storage", "accumulation"]
    assert part[3].split()[0] == "bf16_cos_sin"
    assert stages["policy"] == "exact"
    assert stages["angles"] == "–"
    assert stages["storage"] == brief(measured().at("exact", 4_000_000, stage="storage").mean_abs)


def test_stages_alone_of_the_attention_stand_behind_those_of_the_scores(run, tmp_path):
    _, out, _ = run(*SMALL)
    part = out[out.index("Where it comes from, attention weights: each stage alone, +4M") :].splitlines()
    header, report = part[1].split(), measured()
    stages = dict(zip(header, part[4].split(), strict=True))

    assert header == ["policy", "whole", "angles", "table", "rotation", "storage", "accumulation"]
    expected = report.at("exact", 4_000_000, stage="storage", level="attention")
    assert (stages["policy"], stages["storage"]) == ("exact", brief(expected.mean_abs))
    assert stages["whole"] == brief(report.at("exact", 4_000_000, level="attention").mean_abs)
    alone = [report.at(p, 4_000_000, stage="softmax", level="attention") for p in POLICIES[:2]]
    worst = max(alone, key=lambda record: record.mean_abs)
    assert part[6].startswith(f"softmax alone: {brief(worst.mean_abs)} (floor {brief(worst.floor)}); a shift reaches")
    found = {(record["stage"], record["level"]) for record in content(tmp_path)["stages"]}
    assert ("softmax", "attention") in found
    assert ("softmax", "scores") not in found
    assert {stage for stage, level in found if level == "scores"} == {s for s, _ in found} - {"softmax"}


def test_nothing_runs_over_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("--lengths", "64", "--queries", "4")
    tables = out[: out.index("What may be said")].splitlines()

    assert max(map(len, tables[1:])) <= 80
    assert "…" not in out


def test_sentences_are_computed_from_the_records(result):
    said = " ".join(describe_findings(result))
    grown = result.at("bf16_cos_sin", 4_000_000).mean_abs / result.at("bf16_cos_sin", 16).mean_abs

    assert f"moves a score by {brief(result.at('bf16_cos_sin', 4_000_000).mean_abs)} on average at +4M" in said
    assert "of its stages alone, angles moves it most" in said
    assert f"it grows: bf16_cos_sin {grown:.1f} ×; the same at any shift: exact" in said
    assert "what it leaves is query and key stored in bfloat16" in said
    assert f"The float64 floor is {brief(max(result.at('fp64', shift).mean_abs for shift in SHIFTS))} or less" in said


def test_what_was_not_measured_is_not_said():
    alone = DriftResult.of({32: measured(32, shifts=(16,), policies=("exact",), stages=False)})
    said = " ".join(describe_findings(alone))

    assert "exact moves a score by" in said
    assert "grows" not in said
    assert "stages" not in said
    assert "Angles in float64" not in said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0043, "4.3e-3"), (0.2, "0.20"), (12.0, "12.00"), (1e-17, "1.0e-17"), (0, "0"), (None, "–"), (math.nan, "nan"),
     (math.inf, "inf")],
)  # fmt: skip
def test_magnitudes_are_brief(value, said):
    assert brief(value) == said


def test_shifts_have_short_names():
    assert [name_shift(shift) for shift in (16, 130_000, 1_000_000, 1_500_000)] == ["16", "130,000", "1M", "1,500,000"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_records_hold_each_policy_shift_and_length_once(run, tmp_path):
    run(*SMALL, "--lengths", "32,64")
    found = content(tmp_path)
    cases = Counter((record["policy"], record["shift"], record["seq_len"]) for record in found["records"])

    assert cases == Counter((policy, shift, length) for policy in POLICIES for shift in SHIFTS for length in (32, 64))
    assert set(found["records"][0]) == {
        "policy", "shift", "seq_len", "mean_abs", "max_abs", "rms", "relative", "floor", "predicted", "pairs",
    }  # fmt: skip
    assert found["meta"]["lengths"] == [32, 64]
    assert (found["meta"]["theta"], found["meta"]["queries"]) == (10_000.0, 16)
    assert {"versions", "device", "git_commit", "seed", "dtype", "command", "policies"} <= found["meta"].keys()


def test_the_files_hold_what_the_function_says(run, tmp_path):
    run(*SMALL)
    found, report = content(tmp_path), measured()
    rows = list(csv.DictReader((tmp_path / "runs" / "drift" / "drift.csv").read_text().splitlines()))

    for record in found["records"]:
        expected = report.at(record["policy"], record["shift"])
        assert all(record[name] == getattr(expected, name) for name in record if name != "seq_len")
    assert len(rows) == len(report.records)
    assert [float(row["mean_abs"]) for row in rows] == [record.mean_abs for record in report.records]
    assert {"by", "low", "high", "layer", "level", "stage"} <= rows[0].keys()
    assert (tmp_path / "runs" / "drift" / "drift.csv.meta.json").exists()
    for by, name in (("key", "keys"), ("distance", "distances"), ("pair", "pairs")):
        kept = [record for record in report.records if record.by == by and record.stage is None]
        assert [line["mean_abs"] for line in found[name]] == [record.mean_abs for record in kept]
    assert {record["stage"] for record in found["stages"]} >= {"angles", "table", "rotation", "storage"}


def test_a_shorter_length_is_the_first_tokens_of_the_same_states(run, tmp_path):
    run(*SMALL, "--lengths", "24,64")
    whole = random_states(64)
    first = replace(whole, query=whole.query[:, :, :24], key=whole.key[:, :, :24])
    expected = measure_drift(states=first, policies=["exact"], shifts=SHIFTS, queries=16, stages=False).at("exact", 16)
    (found,) = [
        record
        for record in content(tmp_path)["records"]
        if (record["policy"], record["shift"], record["seq_len"]) == ("exact", 16, 24)
    ]

    assert found["mean_abs"] == expected.mean_abs


def test_two_runs_of_a_seed_are_equal_and_those_of_two_seeds_are_not(run, tmp_path):
    for seed in ("3", "3", "4"):
        run(*SMALL, "--seed", seed)
        (tmp_path / "runs" / "drift" / "drift.csv").rename(tmp_path / f"{len(list(tmp_path.glob('*.csv')))}.csv")
    one, two, other = (tmp_path.joinpath(f"{place}.csv").read_text() for place in range(3))

    assert one == two
    assert one != other


def test_as_json_it_prints_the_file_and_nothing_else(run, tmp_path):
    code, out, err = run(*SMALL, "--json", "--out", "here")

    assert (code, err) == (0, "")
    assert out == (tmp_path / "here" / "drift.json").read_text()


def test_layers_are_pooled_as_if_they_were_heads_of_one():
    both = random_states(48, num_heads=2)
    halves = [
        replace(both, query=both.query[:, [head]], key=both.key[:, [head]], layer=head, inv_freq=both.inv_freq)
        for head in range(2)
    ]
    options = {"policies": POLICIES, "shifts": [16], "queries": 16}
    together = measure_drift(states=both, **options)
    pooled = pool_layers(measure_drift(states=halves, **options).records)
    expected = [record for record in together.records if record.by in ("all", "key", "distance")]
    found = [record for record in pooled if record.by in ("all", "key", "distance")]

    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        kind = [(r.level, r.policy, r.stage, r.shift, r.by, r.low, r.high, r.pairs, r.layer) for r in (one, other)]
        assert kind[0] == kind[1]
        for name in ("mean_abs", "max_abs", "rms", "relative", "mean_value", "share", "floor"):
            value = getattr(other, name)
            assert getattr(one, name) == (None if value is None else pytest.approx(value, rel=1e-9)), name
        if other.by == "all" and other.predicted:
            assert one.predicted == pytest.approx(other.predicted, rel=0.2)


# --- a limit ---------------------------------------------------------------------------------------------------------


def test_above_a_limit_the_exit_code_is_1_and_all_is_written(run, tmp_path):
    code, out, err = run(*SMALL, "--fail-above", "0.005")
    worst = measured().at("bf16_cos_sin", 4_000_000).mean_abs

    assert code == 1
    assert err.count("\n") == 1
    assert f"mean |Δ score| must be at most 0.005, got bf16_cos_sin {brief(worst)} at +4M;" in err
    assert "exact" not in err
    assert "Written:" in out
    assert content(tmp_path)["meta"]["fail_above"] == 0.005


def test_within_a_limit_the_exit_code_is_0(run):
    assert run(*SMALL, "--fail-above", "1")[0] == 0


def test_a_drift_that_is_no_number_is_above_any_limit(result):
    records = [replace(record, mean_abs=math.nan) for record in result.select(policy="exact")]
    broken = DriftResult.of({64: DriftReport(tuple(records))})

    assert exceeding(result, 1.0) == []
    assert {record.policy for record in exceeding(broken, 1.0)} == {"exact"}


def test_the_floor_is_judged_where_it_is_asked_for_alone(result):
    assert {record.policy for record in exceeding(result, 0.0)} == {"bf16_cos_sin", "exact"}
    assert {record.policy for record in exceeding(result, 0.0, ["fp64"])} == {"fp64"}


# --- a model ---------------------------------------------------------------------------------------------------------


def test_a_model_is_measured_layer_by_layer_and_as_a_whole(run, tmp_path):
    code, out, err = run(*TINY_MODEL)
    found = content(tmp_path)

    assert code == 0
    assert "tiny in float32 on 1 sequence of 64 random tokens, 2 layers" in err
    assert found["meta"]["layers"] == [0, 1]
    scores = [(r["layer"], r["head"]) for r in found["heads"] if (r["level"], r["policy"], r["shift"]) == (
        "scores", "exact", 16)]  # fmt: skip
    assert scores == [(layer, head) for layer in range(2) for head in range(4)]
    assert [(sink["layer"], sink["head"]) for sink in found["sinks"]] == scores
    assert {r["layer"] for r in found["layers"]} == {0, 1}
    assert {(r["dtype"], r["rope_precision"]) for r in found["shifted"]} == {
        ("bfloat16", "model"), ("float32", "model"), ("float64", "model"), ("float64", "exact"),
    }  # fmt: skip
    for heading in ("Heads whose attention drifts most", "Sinks: the first token", "The whole model, the same tokens"):
        assert heading in out
    pairs = Counter((record["policy"], record["shift"]) for record in found["records"])
    assert set(pairs.values()) == {1}


def test_missing_weights_are_said_of_a_model_that_is_measured(run, tmp_path):
    model = tiny_model("llama")
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path / "partial", state_dict=state)
    with said_by_transformers() as said:
        assert run("--model", "partial", *SMALL)[0] == 0
    assert "layers.1.mlp" in said.getvalue()


@contextmanager
def said_by_transformers():
    """Its log goes to the stderr that there was when it was imported."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("transformers").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("transformers").removeHandler(handler)


def test_layers_and_text_are_chosen(run, tmp_path):
    (tmp_path / "t.txt").write_text("a text of a few words, and of a few more. " * 9)
    code, _, err = run(*TINY_MODEL, "--text", "t.txt", "--layers", "1", "--dtype", "bfloat16", "--sequences", "2")
    meta = content(tmp_path)["meta"]

    assert code == 0
    assert (meta["layers"], meta["dtype"], meta["text"]) == ([1], "bfloat16", "t.txt")
    assert "2 sequences of 64 tokens from" in err


def test_copies_that_do_not_fit_are_left_out_and_named(run, monkeypatch):
    from anchor_attn.bench import memory

    model = tiny_model("llama")
    numbers = model.num_parameters()
    for free, said in ((3 * numbers, "float64 and float32"), (numbers, "a copy in bfloat16")):
        monkeypatch.setattr(memory, "available_bytes", lambda device, free=free: free)
        section = shifted_of(model)
        assert said in " ".join(section.sentences)
        assert {record["dtype"] for record in section.records} == ({"bfloat16"} if free > numbers else set())


def shifted_of(model):
    from anchor_attn.cli.drift_more import _shifted

    return _shifted(model, torch.zeros(1, 8, dtype=torch.long), [16], lambda line: None)


def test_documents_answer_whether_an_anchor_reduces_it(run, tmp_path):
    code, out, _ = run(*SMALL[2:], "--documents", "20,30,13")
    found = content(tmp_path)

    assert code == 0
    assert found["meta"]["document_lengths"] == [[20, 30, 13]]
    assert found["meta"]["seq_len"] == 64
    assert {record["pattern"] for record in found["patterns"]} == {"full", "intra_doc", "anchor"}
    assert "Does the anchor reduce it? bf16_cos_sin, moved by 4M" in out
    verdicts = {record["verdict"] for record in found["patterns"] if record["kind"] == "comparison"}
    assert any(verdict in out for verdict in verdicts)


# --- the fix ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", ROPE_PRECISIONS)
def test_a_setting_is_the_policy_that_rotates_as_wrap_does(precision, dtype):
    states = random_states(32, head_dim=16)
    states = States(states.query.to(dtype), states.key.to(dtype), states.inv_freq)
    position_ids = torch.arange(32) + 130_000
    table = rotary_table(position_ids[None], states.inv_freq, precision, dtype)
    expected = apply_rotary(states.query, *table, precision)[0]

    assert torch.equal(rotate(states.query[0], position_ids, states, policy_of(precision, dtype)), expected)


def test_a_dtype_without_settings_is_refused():
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32, got float64"):
        policy_of("exact", torch.float64)


def test_the_fix_names_the_line_and_what_stays(run, tmp_path):
    code, out, _ = run(*SMALL, "--fix")
    fixed = {(record["rope_precision"], record["shift"]): record for record in content(tmp_path)["fix"]}
    before, after = (brief(fixed[precision, 4_000_000]["mean_abs"]) for precision in ("model", "exact"))

    assert code == 0
    assert 'wrap(model, rope_precision="exact") takes the drift of scores from' in out
    assert f"{before} → {after} at +4M" in out
    assert "is mostly of query and key as they are stored, which no setting changes" in out
    assert fixed["exact", 4_000_000]["ratio"] < 0.2
    assert fixed["exact", 16]["logits_mean_abs"] is None


def test_where_nothing_improves_it_says_so():
    states = random_states(64)
    states = replace(
        states, query=states.query[..., :2].float(), key=states.key[..., :2].float(), inv_freq=torch.ones(1)
    )
    records, result = measure_fix([states], [1], queries=16)
    said = describe_fix([replace(record, mean_abs=1e-3) for record in records], result)

    assert said[0].startswith("No rope_precision takes 20 % off it at any of these shifts: leave wrap(model) as it is.")


def test_of_a_model_the_fix_is_measured_on_the_wrapped_model(run, tmp_path):
    code, out, _ = run(*TINY_MODEL, "--fix")
    fixed = {(record["rope_precision"], record["shift"]): record for record in content(tmp_path)["fix"]}

    assert code == 0
    # In float32 the states of this model are rotated in float32: only the angles' own precision is left to gain.
    assert fixed["exact", 4_000_000]["logits_mean_abs"] < 0.1 * fixed["model", 4_000_000]["logits_mean_abs"]
    assert fixed["bfloat16", 16]["logits_mean_abs"] > 10 * fixed["model", 16]["logits_mean_abs"]
    assert "The model's own logits then move by" in out


# --- the paper -------------------------------------------------------------------------------------------------------


PAPER = ("--paper", "--sequences", "3", "--lengths", "16,32", "--queries", "16")


def test_the_protocol_of_the_paper_runs_at_random_and_judges_its_claims(run_whole, tmp_path):
    code, out, err = run_whole(*PAPER)
    found = content(tmp_path, "paper.json")

    assert code == 0
    assert err.splitlines() == ["sequence 1", "sequence 2", "sequence 3"]
    assert out.splitlines()[0].startswith("Measured: 3 × random normal query and key")
    assert [claim["claim"] for claim in found["claims"]] == [
        "float32 removes it", "it grows with the length", "the first token carries most of it",
    ]  # fmt: skip
    assert all(claim["verdict"] in out for claim in found["claims"])
    assert {record["delta1"] for record in found["records"] if record["length"] == 32} == set(found["meta"]["deltas1"])
    assert (tmp_path / "runs" / "drift" / "paper.png").read_bytes().startswith(b"\x89PNG")
    assert "The paper&#x27;s claims" in (tmp_path / "runs" / "drift" / "paper.html").read_text()
    assert not (tmp_path / "runs" / "drift" / "drift.json").exists()


def test_the_protocol_runs_on_a_model_one_sequence_at_a_time(run, monkeypatch, tmp_path):
    from anchor_attn.drift.paper import page as paper_page

    monkeypatch.setattr(paper_page, "write_paper_page", unavailable)
    code, out, _ = run("--model", "tiny", "--layers", "0", *PAPER)

    assert code == 0
    assert "No paper.html and no picture: a picture needs matplotlib" in out
    assert content(tmp_path, "paper.json")["meta"]["sequences"] == 3
    assert content(tmp_path, "paper.json")["meta"]["layers"] == 1


# --- pictures --------------------------------------------------------------------------------------------------------


def test_page_and_picture_are_written_over_what_was_there(run_whole, tmp_path):
    folder = tmp_path / "runs" / "drift"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("of a run before")
    code, out, _ = run_whole(*SMALL, "--lengths", "32,64")
    assert code == 0
    text = (folder / "drift.html").read_text()

    assert all((folder / name).stat().st_size for name in FILES)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "drift.csv.meta.json"])
    assert (folder / "drift.png").read_bytes().startswith(b"\x89PNG")
    for heading in ("Against shift", "Against length", "Per key", "Frequency pairs", "Stage by stage", "What may be"):
        assert f"<h2>{heading}" in text
    assert "Layer × head" not in text  # of one head
    assert out.splitlines()[-1].endswith("runs/drift/drift.html, runs/drift/drift.png")


def test_the_picture_shows_every_policy_its_prediction_and_the_floor(result):
    (axes,) = draw.draw_shifts_figure(result, "title").axes
    lines = {line.get_label(): line for line in axes.lines}

    for policy in POLICIES[:2]:
        assert list(lines[policy].get_xdata()) == list(SHIFTS)
        assert list(lines[policy].get_ydata()) == [result.at(policy, shift).mean_abs for shift in SHIFTS]
    assert list(lines["float64, the floor"].get_ydata()) == [result.at("fp64", shift).mean_abs for shift in SHIFTS]
    drawn = [list(line.get_ydata()) for line in axes.lines]
    assert [result.at("exact", shift).predicted for shift in SHIFTS] in drawn
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_the_heat_map_has_a_cell_a_layer_and_head():
    layers = [replace(random_states(24, num_heads=3, seed=layer), layer=layer) for layer in (2, 5)]
    found = measure_lengths(layers, [24], lambda states, _: measure_drift(
        states=states, policies=["exact"], shifts=[16], queries=8, stages=False))  # fmt: skip
    figure = draw.draw_heads_figure(found, "exact", "title")
    cells = figure.axes[0].images[0].get_array()

    assert cells.shape == (2, 3)
    assert cells[1, 2] == next(r.mean_abs for r in found.heads("exact", 16) if (r.layer, r.low) == (5, 2))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["2", "5"]


def test_the_first_token_is_marked_and_a_key_bin_is_a_point(result):
    left, right = draw.draw_keys_figure(result, "title").axes
    records = result.select("key", policy="exact", shift=4_000_000)

    assert list(left.lines[1].get_ydata()) == [record.mean_abs for record in records]
    assert "first token" in [patch.get_label() for patch in left.patches]
    assert "first token" in [patch.get_label() for patch in right.patches]


def test_policies_of_ones_own_have_a_colour():
    styles = [draw.style_of(name) for name in ("mine", "yours")]

    assert all(style["color"] in draw.OTHERS for style in styles)
    assert draw.style_of("mine") == draw.style_of("mine")


def test_without_matplotlib_numbers_are_written_and_the_rest_is_said(run, tmp_path):
    code, out, _ = run(*SMALL)

    assert code == 0
    assert "No drift.html and no picture: a picture needs matplotlib" in out
    assert out.splitlines()[-1] == "Written: runs/drift/drift.json, runs/drift/drift.csv"
    assert not (tmp_path / "runs" / "drift" / "drift.html").exists()


# --- bad input -------------------------------------------------------------------------------------------------------


def test_numbers_have_suffixes():
    assert read_numbers("16, 30k 4M,128Ki,1_000,2Mi,5K", "shifts") == [
        16,
        30_000,
        4_000_000,
        131_072,
        1000,
        2**21,
        5000,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "bf16"], "--policies must be among bf16_angles, "),
        (["--policies", "exact,exact"], "--policies must be named once, got 'exact' named twice; leave one out."),
        (["--lengths", "900M"], "--lengths must stay below 536,870,912 tokens, got 900,000,000"),
        (["--model", "tiny", "--layers=-1"], "--layers must be whole numbers apart by commas, got '-1'; pass 0,5,11,"),
        (["--documents", "nan"], "--documents must be whole numbers apart by commas, got 'nan'; pass 300,500,223,"),
        (["--policies", " , "], "--policies must be given"),
        (["--shifts=-5"], "--shifts must be whole numbers apart by commas, got '-5'"),
        (["--shifts", "1G"], "--shifts must be whole numbers apart by commas, got '1G'"),
        (["--shifts", ""], "--shifts must be given"),
        (["--shifts", "0"], "--shifts must be at least 1 each"),
        (["--shifts", "600M"], "--shifts must stay below 536,868,865 for 2,048 tokens, got 600,000,000"),
        (["--lengths", "1"], "--lengths must be at least 2 tokens each, got 1"),
        (["--lengths", "200M"], "must fit into memory, got 200,000,000 tokens"),
        (["--lengths", "32", "--documents", "5"], "--lengths must be left out beside documents"),
        (["--documents", "5,0"], "--documents must have 1 token at least each, got 0"),
        (["--queries", "0"], "--queries must be at least 1, got 0"),
        (["--theta", "0"], "--theta must be above 0 and finite, got 0.0"),
        (["--fail-above", "nan"], "--fail-above must be at least 0, got nan"),
        (["--text", "stdlib"], "--text must stand beside a model, got 'stdlib' without one"),
        (["--layers", "0"], "--layers must stand beside a model"),
        (["--sequences", "2"], "--sequences must stand beside a model"),
        (["--paper", "--fix"], "--fix must be left out beside --paper"),
        (["--paper", "--shifts", "16"], "--shifts must be left out beside --paper"),
        (["--paper", "--sequences", "0"], "--sequences must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must lie between 0 and 2**32 - 1"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--out", "file"], "--out must be a folder that can be written"),
        (["--model", "tiny", "--theta", "5"], "--theta must be left out beside a model, got 5"),
        (["--model", "tiny", "--dtype", "int8"], "--dtype must be one of"),
        (["--model", "tiny", "--layers", "7", "--lengths", "16"], "--layers must be among 0 … 1, got 7"),
        (["--model", "tiny", "--lengths", "9000M", "--shifts", "1"], "--lengths must stay below"),
        (["--model", "tiny", "--lengths", "400M"], "--lengths must fit into memory, got 400,000,000 tokens"),
        (["--model", "tiny", "--text", "none.txt"], "which does not exist"),
        (["--model", "tiny", "--text", "file.txt"], "--text must hold 1 sequence of 1,024 tokens, got 13"),
        (["--model", "no/such/folder"], "--model must be one of tiny, laptop"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "file.txt").write_text("thirteen byte")
    code, out, err = run(*arguments)

    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith("anchor-attn: ")
    assert message in err
    assert not list(tmp_path.glob("runs/drift/*"))


def test_a_model_without_rotary_positions_and_one_that_makes_nan_are_refused(run, tmp_path, capsys):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    broken = tiny_model("llama")
    broken.model.layers[1].self_attn.k_proj.weight.data[0, 0] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**sizes, vocab_size=64)).save_pretrained(
        tmp_path / "bert"
    )  # without the head that is asked for
    capsys.readouterr()  # bars of what was saved
    for model, message in (
        ("gpt2", "--model must have rotary position"),
        ("bert", "--model must have rotary position"),
        ("broken", "key must be finite, got nan or inf in layer 1"),
    ):
        with said_by_transformers() as said:
            code, out, err = run("--model", model, "--lengths", "16")
        assert not said.getvalue()
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1, err
        assert not list(tmp_path.glob("runs/drift/*"))


def test_an_interrupted_measurement_ends_as_other_commands_do(run, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(drift_run, "_subject", interrupted)
    code, out, err = run()

    assert (code, out, err) == (130, "", "anchor-attn: interrupted\n")
    assert not list(tmp_path.glob("runs/drift/*"))


def test_it_explains_its_options(run):
    code, out, _ = run("--help")

    assert code == 0
    for option in ("--out", "--json", "--seed", "--device", "--model", "--text", "--fail-above", "--fix", "--paper"):
        assert option in out


# --- the sweep -------------------------------------------------------------------------------------------------------


def test_a_sweep_has_every_base_and_method(run, tmp_path):
    code, out, _ = run(
        "--sweep", "--lengths", "32", "--queries", "8", "--shifts", "130k", "--policies", "fp32", "--out", "swept"
    )

    assert code == 0
    swept = json.loads((tmp_path / "swept/sweep.json").read_text())["records"]
    assert len({(record["base"], record["method"], record["policy"]) for record in swept}) == 5 * 7 * 2
    interpolated, plain = (
        next(r["mean_abs"] for r in swept if (r["base"], r["method"], r["policy"]) == (1e4, method, "fp32"))
        for method in ("linear", "default")
    )
    assert plain / interpolated == pytest.approx(16, rel=0.2)  # angles, and with them their errors, are divided by 16
    assert "fp32: mean |Δ score| in % of the mean |score|" in out
    assert "Not in it: longrope" in out
    assert (tmp_path / "swept/sweep.png").stat().st_size > 10_000


def test_the_picture_of_a_sweep_has_a_panel_a_policy_and_a_line_a_method():
    bases, methods = (1e4, 1e6), ("default", "linear", "yarn")
    for shifts, shown in (((16, 1_000_000, 4_000_000), 1_000_000), ((16, 30_000), 30_000)):
        swept = sweep_drift(bases, methods, policies=["exact", "fp32"], shifts=shifts, seq_len=24, head_dim=16)
        figure = draw_sweep_figure(swept, "24 tokens")
        assert [axes.get_title() for axes in figure.axes] == ["exact", "fp32"]
        assert name_shift(shown) in figure._suptitle.get_text()
        for axes in figure.axes:
            for line, method in zip(axes.lines, methods, strict=True):
                own = [r for r in swept if (r.method, r.drift.policy, r.drift.shift) == (
                    method, axes.get_title(), shown)]  # fmt: skip
                assert line.get_label() == method
                assert list(line.get_xdata()) == list(bases)
                assert list(line.get_ydata()) == [100 * record.drift.relative for record in own]


@pytest.mark.parametrize("option", [["--fix"], ["--paper"], ["--model", "tiny"], ["--documents", "3,4"]])
def test_a_sweep_is_alone(run, option):
    code, _, err = run("--sweep", *option)

    assert code == 2
    assert f"{option[0]} must be left out beside --sweep" in err
