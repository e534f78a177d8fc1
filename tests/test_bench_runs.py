"""Whole benchmarks on small inputs: attention, routes, a step, and the command that runs them."""

import csv
import io
import json
import sys

import pytest
import torch
from rich.console import Console

from anchor_attn.bench import attention, masks, routes, step
from anchor_attn.bench.attention import Setting, Sized, bench_attention, create_contenders
from anchor_attn.bench.routes import RouteTiming, bench_routes, list_cases, merge_records
from anchor_attn.bench.timing import Row
from anchor_attn.cli import bench_subjects, main
from anchor_attn.cli.bench_tables import route_table
from anchor_attn.engines import choice
from anchor_attn.masks import PackedLayout
from anchor_attn.results import CheckError
from anchor_attn.train.presets import SIZES

LAYOUT = PackedLayout.from_lengths([[40, 30, 20]])
SMALL = Setting(heads=(2, 1), head_dim=16, rounds=1)
# torch 2.13's compiler trips over torch's own deprecations when it is imported.
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the command line; returns exit code, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["anchor-attn", "bench", *arguments, "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def engines_wrong(monkeypatch):
    """Every engine but the reference gives a little more than it should, where `room` calls it."""

    def spoil(room):
        right = room.anchor_attention

        def wrong(query, key, value, layout, pattern, engine, **more):
            out = right(query, key, value, layout, pattern, engine, **more)
            return out if engine.startswith("reference") else out * 1.001

        monkeypatch.setattr(room, "anchor_attention", wrong)

    return spoil


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "heads"), [(torch.float32, (2, 2)), (torch.float32, (4, 2)), (torch.bfloat16, (4, 1))], ids=str
)
def test_every_contender_agrees_with_the_reference_in_the_timed_dtype(dtype, heads):
    errors = attention.check_parity(Setting(heads=heads, head_dim=16, dtype=dtype))

    assert list(errors)[:2] == ["full SDPA", "transformers packed SDPA"]
    assert {"anchor varlen/sdpa/gather", "anchor varlen/sdpa/merge", "anchor reference/eager/dense"} < set(errors)
    assert all(0 < error <= 1 for error in errors.values())


def test_nothing_is_timed_before_parity_holds(engines_wrong):
    engines_wrong(attention)
    row = Sized(91, "uniform", (40, 30, 20))
    with pytest.raises(CheckError, match="intra_doc varlen/sdpa/gather must agree with the reference before it is"):
        next(bench_attention([row], SMALL))


def test_a_mask_of_transformers_that_misses_the_documents_is_told(monkeypatch):
    """Positions that run on are one document to it."""
    monkeypatch.setattr(PackedLayout, "document_ranks", lambda self: torch.arange(self.seq_len)[None])
    with pytest.raises(CheckError, match=r"^transformers packed SDPA must agree with the reference before it is timed"):
        attention.check_parity(SMALL)


def test_every_phase_of_every_contender_is_recorded():
    rows = [Sized(91, "uniform", (40, 30, 20)), Sized(300, "web-text", (250, 49))]
    said = []
    first, second = bench_attention(rows, SMALL, said.append)
    names = [contender.name for contender in create_contenders(LAYOUT, SMALL)]

    assert said == [
        "parity of 6 rivals holds; timing",
        "91 tokens, uniform, 3 documents",
        "300 tokens, web-text, 2 documents",
    ]
    for found, row in ((first, rows[0]), (second, rows[1])):
        assert [timing.name for timing in found] == [name for name in names for _ in attention.PHASES]
        assert [timing.phase for timing in found] == [*attention.PHASES] * len(names)
        assert all(timing.seconds > 0 and timing.peak_bytes > 0 for timing in found)
        assert {(timing.seq_len, timing.distribution) for timing in found} == {(row.seq_len, row.distribution)}
    by_phase = {timing.phase: timing for timing in first[:3]}
    assert by_phase["both"].seconds > by_phase["backward"].seconds


def test_the_reference_stays_out_of_long_rows(monkeypatch):
    monkeypatch.setattr(attention, "REFERENCE_TOKENS", 90)
    assert not any(contender.engine == "reference" for contender in create_contenders(LAYOUT, SMALL))


def test_a_budget_leaves_out_what_a_shorter_row_foretells(monkeypatch):
    """A row longer than the probe is not begun by a rival that would take a quarter of the budget."""
    monkeypatch.setattr(attention, "PROBE_TOKENS", 301)
    setting = Setting(heads=(2, 1), head_dim=16, rounds=1, budget_s=1e-9)
    (found,) = bench_attention([Sized(400, "uniform", (399,))], setting)

    assert {timing.rounds for timing in found} == {0}
    assert all("pass --budget-s" in timing.left_out for timing in found)


@pytest.mark.slow
@compiles
def test_flex_runs_forward_on_a_cpu_when_asked():
    setting = Setting(heads=(2, 1), head_dim=16, rounds=1, with_flex=True)
    (found,) = bench_attention([Sized(300, "uniform", (100, 199))], setting)
    flex = [(timing.name, timing.phase) for timing in found if timing.engine == "flex"]

    assert flex == [(f"{pattern} flex/flex_attention/column", "forward") for pattern in ("intra_doc", "anchor")]


# --- routes ----------------------------------------------------------------------------------------------------------


def time_routes(monkeypatch, cases, **more):
    monkeypatch.setattr(routes, "list_cases", lambda: cases)
    layout = PackedLayout.from_lengths([[400, 300]])
    return bench_routes(layout, (2, 1), 16, torch.float32, "a CPU", 2, **more)


def test_cases_are_keys_of_the_choice_each_once(monkeypatch):
    cases = list_cases()
    assert len(set(cases)) == len(cases) == 2 * (3 * 6 + 1)
    layout = PackedLayout.from_lengths([[400, 300]])
    for case in cases:
        inputs = attention.Inputs.draw(layout, (2, 1), 16, torch.float32, 0, "sinks" in case.features)
        call = routes._call(case, layout, inputs)
        assert (call.features, call.pattern, call.needs_grad) == case


def test_where_there_is_a_choice_every_route_is_timed_and_the_fastest_is_taken(monkeypatch):
    cases = [case for case in list_cases() if case.needs_grad and case.pattern == "anchor"]
    found = time_routes(monkeypatch, cases)
    by_case = {}
    for timing in found.timings:
        by_case.setdefault(timing.features, {})[timing.route] = timing
    environment = {"device": "cpu", "device_name": "a CPU"}
    table = merge_records({"meta": {}, "records": []}, found.timings, environment)
    monkeypatch.setattr(choice, "read_measurements", lambda: table["records"])

    assert found.left_out == []
    # On a CPU a softcap leaves one route to choose from.
    assert set(by_case) == {"plain", "window", "kept_anchor", "sinks", "window+sinks"}
    both = {"varlen/sdpa/gather", "varlen/sdpa/merge"}
    assert set(by_case["plain"]) == both | {"reference/eager/dense"}
    assert set(by_case["kept_anchor"]) == set(by_case["window+sinks"]) == both
    assert all(timing.share_of_budget <= 1 and timing.compile_s is None for timing in found.timings)
    plain = {name: timing.seconds for name, timing in by_case["plain"].items()}
    call = choice.Call(torch.device("cpu"), torch.float32, 16, True, "anchor")
    assert choice.measured_seconds(call) == plain
    assert choice.choose_route("auto", call).name == min(plain, key=plain.get)


def test_a_wrong_route_is_not_timed(monkeypatch, engines_wrong):
    engines_wrong(routes)
    with pytest.raises(CheckError, match=r"varlen/sdpa/gather for Case\(.*\) must agree with the reference before"):
        time_routes(monkeypatch, list_cases()[:1])


def test_cases_behind_the_budget_are_named(monkeypatch):
    cases = [case for case in list_cases() if case.needs_grad][:3]
    found = time_routes(monkeypatch, cases, budget_s=1e-9)

    assert {tuple(left.case) for left in found.left_out} >= {tuple(case) for case in cases[1:]}
    assert all("the budget of 0 s was spent; raise --budget-s" in left.reason for left in found.left_out)


def test_a_reference_without_room_is_named(monkeypatch):
    monkeypatch.setattr(routes, "available_bytes", lambda device: 0)
    found = time_routes(monkeypatch, list_cases()[:1])

    assert [(left.route, left.reason) for left in found.left_out] == [
        ("reference/eager/dense", "its matrices would take 0 GiB, 0 GiB are free")
    ]
    assert [timing.route for timing in found.timings] == ["varlen/sdpa/gather"]


def test_the_table_keeps_other_devices_and_drops_what_is_measured_anew():
    def record(device, name, seconds=1.0):
        return RouteTiming(device, name, True, "anchor", "plain", "varlen/sdpa/gather", seconds, 0, 0, 1, None, 0.5)

    old = [vars(record(*key)) for key in (("cpu", "old CPU"), ("cuda", "H200"), ("cuda", "B200"))]
    shipped = {"meta": {"devices": {"old CPU": 1, "H200": 2, "B200": 3}}, "records": old}
    on_cpu = merge_records(shipped, [record("cpu", "new CPU", 2.0)], {"device": "cpu", "device_name": "new CPU"})
    on_gpu = merge_records(shipped, [record("cuda", "H200", 2.0)], {"device": "cuda", "device_name": "H200"})

    assert [(r["device_name"], r["seconds"]) for r in on_cpu["records"]] == [("H200", 1), ("B200", 1), ("new CPU", 2)]
    assert list(on_cpu["meta"]["devices"]) == ["H200", "B200", "new CPU"]
    assert [(r["device_name"], r["seconds"]) for r in on_gpu["records"]] == [("old CPU", 1), ("B200", 1), ("H200", 2)]


# --- a step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_timed_for_every_pattern_and_for_transformers_own_packing(checkpointing):
    timings = step.bench_step(Row(LAYOUT), SIZES["tiny"], 1, "cpu", 0, checkpointing=checkpointing)
    assert [timing.name for timing in timings] == [*step.RIVALS.values()]
    assert all(timing.seconds > 0 and timing.phase == "step" for timing in timings)
    assert [timing.engine for timing in timings] == ["varlen"] * 4 + ["transformers"]


def test_rivals_of_a_step_hold_the_same_parameters():
    plain = step._create_model(SIZES["tiny"], 91, "cpu", torch.float32, 0)
    wrapped = step._wrapped(plain, "anchor", "auto")

    assert [id(part) for part in wrapped.parameters()] == [id(part) for part in plain.parameters()]
    assert plain.config._attn_implementation == "sdpa" != wrapped.config._attn_implementation


def test_a_step_in_bfloat16_has_the_loss_of_transformers_own_packing():
    plain = step._create_model(SIZES["tiny"], 91, "cpu", torch.bfloat16, 0)
    assert step.check_loss(plain, "auto", "cpu", 0) < 1e-2


def test_a_loss_that_differs_is_not_timed(monkeypatch):
    right = step._wrapped
    monkeypatch.setattr(step, "_wrapped", lambda plain, pattern, *rest: right(plain, "full", *rest))
    with pytest.raises(CheckError, match="intra_doc must equal transformers' packed attention before it is timed"):
        step.bench_step(Row(LAYOUT), {**SIZES["tiny"], "initializer_range": 0.5}, 1, "cpu", 0)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "seq_len", "last"), [("mask", "512", "torch compiled"), ("packing", "256", "ours drop")]
)
def test_bench_prints_the_rivals_that_it_writes(subject, seq_len, last, run, tmp_path, monkeypatch):
    monkeypatch.setattr(masks.torch, "compile", lambda function, **_: function)  # it takes 8 seconds
    monkeypatch.setattr(bench_subjects, "PACKED_TOKENS", 50_000)
    monkeypatch.setitem(sys.modules, "trl", None)
    code, out, err = run(subject, "--seq-len", seq_len, "--rounds", "1")
    records = csv.DictReader((tmp_path / "bench.csv").read_text().splitlines())
    timed = [record["name"] for record in records if record["seconds"]]

    assert (code, err, timed[-1]) == (0, "", last)
    assert all(f" {name} " in out for name in timed)
    assert ("pip install --no-deps trl" in out) == (subject == "packing")


def test_bench_attention_writes_a_table_a_page_and_a_picture(run, tmp_path, monkeypatch):
    arguments = ["attention", "--seq-len", "400", "--distribution", "all-short,web-text", "--heads", "2/1",
                 "--head-dim", "16", "--rounds", "1"]  # fmt: skip
    code, out, err = run(*arguments)
    records = list(csv.DictReader((tmp_path / "bench.csv").read_text().splitlines()))
    meta = json.loads((tmp_path / "bench.csv.meta.json").read_text())

    assert code == 0
    assert "parity of 6 rivals holds" in err
    assert {record["distribution"] for record in records} == {"all-short", "web-text"}
    assert (meta["heads"], meta["head_dim"], meta["dtype"]) == ("2/1", 16, "float32")
    assert meta["versions"]["torch"] == torch.__version__
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "% of its rate on attended pairs" in out
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "No picture: pip install matplotlib." in run(*arguments)[1]


def test_bench_routes_writes_the_table_that_the_choice_reads(run, tmp_path, monkeypatch):
    monkeypatch.setattr(routes, "list_cases", lambda: list_cases()[:1])
    code, out, _ = run("routes", "--seq-len", "512", "--heads", "2", "--head-dim", "16", "--rounds", "1")
    table = json.loads((tmp_path / "routes.json").read_text())
    measured = [record for record in table["records"] if record["device"] == "cpu"]

    assert code == 0
    assert [record["route"] for record in measured] == ["varlen/sdpa/gather", "reference/eager/dense"]
    assert table["meta"]["devices"][measured[0]["device_name"]]["seq_len"] == 512
    assert "anchor_attn/engines/measured.json" in out.replace("\n", "")


def test_no_number_of_a_table_is_cut_short_in_a_narrow_terminal():
    timing = RouteTiming("cpu", "a CPU", True, "anchor", "plain", "varlen/sdpa/gather", 1.2345, 1.1, 1.6, 5, None, 0.5)
    said = Console(width=30, file=io.StringIO())
    said.print(route_table([timing]), crop=False)

    assert all(cell in said.file.getvalue() for cell in (" varlen/sdpa/gather ", " 1.2345 ", " 1.1000–1.6000 ", " – "))


def test_bench_step_takes_some_rivals_by_short_names(run):
    code, out, _ = run("step", "--seq-len", "128", "--shortest", "20", "--longest", "60", "--size", "tiny", "--rounds",
                       "1", "--rivals", "full,anchor", "--json")  # fmt: skip
    content = json.loads(out)
    assert code == 0
    assert [record["name"] for record in content["records"]] == ["wrapped full", "wrapped anchor"]
    assert content["meta"]["size"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mask", "--heads", "8"], "--heads must be for attention or routes, got bench mask; leave it out."),
        (["step", "--sweep"], "--sweep must be for attention, got bench step; leave it out."),
        (["--sweep", "--seq-len", "9"], "seq_len must be left out with --sweep, got 9; pass one of them."),
        (["--distribution", "zipf"], "distribution must be one of ("),
        (["--distribution", "web-text", "--longest", "9"], "shortest and longest must be for distribution='uniform'"),
        (["--heads", "8/3"], "heads must be a multiple of the key heads, got '8/3'; pass 32/8, say."),
        (["--heads", "8/"], "heads must be a number, or query heads/key heads, got '8/'; pass 8 or 32/8."),
        (["--head-dim", "0"], "head_dim must be at least 1, got 0; pass 64."),
        (["--dtype", "float8"], "dtype must be one of ('float32', 'bfloat16', 'float16'), got 'float8'"),
        (["--budget-s", "0"], "budget_s must be above 0, got 0.0; pass 100."),
        (["step", "--size", "70b"], "size must be one of ('tiny', 'laptop', 'small', '1b'), got '70b'"),
        (["step", "--rivals", "full,mine"], "rivals must be among ("),
        (["step", "--engine", "warp"], "engine must be one of ("),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"anchor-attn: {message}")
    assert not out
