"""`anchor-attn bench rope`: the same tokens at every length, methods as `extend` makes them, claims as found."""

import copy
import json
import math
import re
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from anchor_attn.bench import rope
from anchor_attn.bench.rope import Course, Evidence, Plan, bench_rope, train_rows
from anchor_attn.bench.rope_findings import judge
from anchor_attn.bench.rope_readings import MethodReading, MethodReadings, Windows
from anchor_attn.bench.rope_report import draw_readings_figure, table_rows, write_markdown
from anchor_attn.cli import bench_rope as bench_rope_command
from anchor_attn.cli import main
from anchor_attn.rope import METHODS, extend

PLAN = Plan(**bench_rope_command.QUICK)


def stream(tokens, seed=0):
    """Words of eight that repeat: something to learn."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 256, (20, 8), generator=torch.Generator().manual_seed(99))
    return words[torch.randint(0, 20, (tokens // 8,), generator=draw)].flatten()


@pytest.fixture(scope="module")
def model():
    return rope._fresh_model(PLAN, "cpu", 0)


@pytest.fixture(scope="module")
def run_once():
    """Readings, what was found on the way, what was said."""
    said = []
    found = bench_rope(stream(4000), stream(600, 1), stream(600, 2), PLAN, seed=3, say=said.append)
    return *found, said


def evidence_of(model):
    windows = Windows(stream(600), (300, 600), PLAN.scored_tokens)
    return Evidence(model, PLAN, stream(4000), windows, searched={}, seed=0)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_the_last_tokens_of_a_window_are_scored(model):
    held_out = stream(600)
    (found,) = Windows(held_out, (300,), scored_tokens=16).nats(model, 64)
    with torch.no_grad():
        logits = model(held_out[None, 300 - 64 : 300]).logits[0]

    assert found == pytest.approx(float(F.cross_entropy(logits[-17:-1], held_out[300 - 16 : 300])), rel=1e-5)


def test_windows_of_every_length_end_at_the_same_tokens_and_share_none():
    windows = Windows.spread(stream(640), 4, 128, 16, "held_out")
    ends = windows.ends

    for seq_len in (32, 128):
        assert [tokens.tolist() for tokens in windows.of(seq_len)] == [
            stream(640)[end - seq_len : end].tolist() for end in ends
        ]
    assert ends[0] >= 128
    assert ends[-1] == 640
    assert all(later - earlier >= 128 for earlier, later in pairwise(ends))


def test_a_text_too_short_for_its_windows_is_refused():
    with pytest.raises(ValueError, match=r"^held_out must hold 4 windows of 128 tokens, got 400 tokens; pass more"):
        bench_rope(stream(4000), stream(600), stream(400), PLAN)


def test_windows_without_room_for_their_context_are_refused():
    with pytest.raises(
        ValueError, match=r"^seq_len must be at least 256, twice the scored tokens, got 255; pass 256\.$"
    ):
        Plan(seq_len=255)


@pytest.mark.parametrize("times", [(2, 16), (1, 4), (16,)])
def test_lengths_without_the_trained_or_the_tuned_one_are_refused(times):
    with pytest.raises(ValueError, match=r"^times must begin with 1 and hold tuned_times, got \(.*\) and 16; add them"):
        Plan(times=times, tuned_times=16)


def test_training_learns_and_depends_on_its_seed_alone(model):
    one, same, other = (copy.deepcopy(model) for _ in range(3))
    losses = [
        train_rows(each, stream(4000), Course(seq_len=32, steps=30, batch_tokens=256, learning_rate=1e-2), seed)
        for each, seed in ((one, 1), (same, 1), (other, 2))
    ]

    assert losses[0] < math.log(257) - 1
    assert losses[0] == losses[1] != losses[2]
    for ours, theirs in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_every_method_is_read_at_every_length_before_and_after(run_once):
    readings, found, said = run_once

    assert [(each.stage, each.method, each.times) for each in readings] == [
        (stage, method, times) for stage in rope.STAGES for method in METHODS for times in PLAN.times
    ]
    assert all(len(each.window_nats) == PLAN.windows for each in readings)
    assert list(found["searched"]) == ["2", "4"]
    assert said[0] == "training on 2,048 tokens in rows of 32"
    assert len(said) == 1 + 2 + len(METHODS)


def test_at_its_own_length_every_untrained_method_is_plain_rope(run_once):
    readings = MethodReadings(run_once[0])

    assert {readings.at("untrained", method, 1).window_nats for method in METHODS} == {readings.trained.window_nats}
    assert len({readings.at("untrained", method, 4).window_nats for method in METHODS}) >= len(METHODS) - 1


def test_factors_are_those_of_each_length_and_after_the_fine_tuning_of_its_own(run_once):
    factors = {(each.stage, each.method, each.times): each.factor for each in run_once[0]}

    assert [factors["untrained", "yarn", times] for times in PLAN.times] == [1, 2, 4]
    assert [factors["untrained", "dynamic", times] for times in PLAN.times] == [1, 2, 2]
    assert [factors["fine-tuned", "yarn", times] for times in PLAN.times] == [4, 4, 4]
    assert {factors["fine-tuned", "default", times] for times in PLAN.times} == {1}


def test_two_runs_of_a_seed_are_equal(run_once):
    again, found = bench_rope(stream(4000), stream(600, 1), stream(600, 2), PLAN, seed=3)

    assert (again, found) == run_once[:2]


def test_reading_leaves_the_trained_model_as_it_was(model):
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    for method in ("ntk", "dynamic", "yarn"):
        list(evidence_of(model).untrained(method))
        list(evidence_of(model).fine_tuned(method))

    assert model.config.to_dict() == config
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_dynamic_reads_short_windows_after_long_ones_as_if_it_were_new(model):
    """transformers' own module keeps the frequencies of the longest input: fine-tuning alone would leave them."""
    evidence = evidence_of(model)
    tuned = list(evidence.fine_tuned("dynamic"))
    fresh = extend(copy.deepcopy(model), "dynamic", 2)
    train_rows(fresh, stream(4000), Course(128, PLAN.tune_steps, PLAN.batch_tokens, PLAN.tune_learning_rate), 0)
    stale = evidence.windows.nats(fresh, 64)
    new = evidence.windows.nats(extend(fresh, "dynamic", 2), 64)

    assert tuned[1].window_nats == new != stale


# --- what is said ----------------------------------------------------------------------------------------------------

SOUND = Plan(times=(1, 4, 16), windows=3)
# Perplexities at 1, 4 and 16 times the length, as the papers would have them.
UNTRAINED = {
    "default": (4.0, 20.0, 90.0), "linear": (4.0, 5.0, 8.0), "ntk": (4.0, 4.1, 4.3), "dynamic": (4.0, 4.1, 4.2),
    "ntk_by_parts": (4.0, 4.1, 4.3), "yarn": (4.0, 3.9, 4.1), "yarn_paper": (4.0, 3.9, 4.1),
    "longrope": (4.0, 3.8, 4.0), "llama3": (4.0, 4.2, 4.3),
}  # fmt: skip
TUNED = dict.fromkeys(UNTRAINED, (4.0, 3.9, 3.8)) | {"default": (5.0, 8.0, 10.0)}


def readings_of(untrained=(), tuned=()):
    tables = {"untrained": UNTRAINED | dict(untrained), "fine-tuned": TUNED | dict(tuned)}
    return MethodReadings(
        [
            MethodReading(
                method, stage, times, 256 * times, 1.0, tuple(math.log(value) + shift for shift in (-0.1, 0.0, 0.1))
            )
            for stage, table in tables.items()
            for method, values in table.items()
            for times, value in zip(SOUND.times, values, strict=True)
        ]
    )


def verdicts(**changes):
    return [finding.verdict for finding in judge(readings_of(**changes), SOUND)]


def test_claims_that_hold_are_found():
    assert verdicts() == ["found"] * 6


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        (0, {"untrained": {"default": (4.0, 5.0, 7.9)}}),
        (1, {"untrained": {"linear": (4.0, 4.1, 4.3)}}),
        (1, {"tuned": {"linear": (4.0, 4.0, 4.5)}}),
        (2, {"untrained": {"ntk": (4.0, 4.5, 4.3)}}),
        (3, {"untrained": {"yarn": (4.0, 4.1, 4.5)}}),
        (4, {"untrained": {"longrope": (4.0, 3.8, 4.2)}}),
        (5, {"tuned": {"default": (4.0, 4.0, 4.3)}}),
    ],
)
def test_a_claim_that_does_not_hold_is_said_not_to(claim, changes):
    assert verdicts(**changes) == ["NOT found" if place == claim else "found" for place in range(6)]


def test_a_claim_comes_with_its_numbers():
    explodes, _, _, yarn, searched, _ = map(str, judge(readings_of(untrained={"yarn": (4.0, 3.9, 4.5)}), SOUND))

    assert explodes == (
        "found: plain RoPE explodes beyond its length – perplexity 4.00 at 1 ×; at 4, 16 ×: default untrained "
        "20.00, 90.00"
    )
    assert yarn == "NOT found: YaRN holds untrained – at 4, 16 ×: yarn untrained 3.90, 4.50"
    assert "4 × -0.026 ± 0.000 nats to yarn; 16 × -0.025 ± 0.000 nats to yarn_paper" in searched


def searched_beside_yarn(*gaps):
    """The search's finding where its windows lose so much more than those of the best fixed method, at two lengths."""
    yarn = (0.1, 0.2, 0.3)
    readings = [
        MethodReading(
            method, stage, times, 256 * times, 1.0,
            tuple(nats + gap for nats, gap in zip(yarn, gaps[SOUND.times[1:].index(times)], strict=True))
            if (method, times > 1) == ("longrope", True) else tuple(nats + (method != "yarn") for nats in yarn),
        )
        for stage in rope.STAGES for method in METHODS for times in SOUND.times
    ]  # fmt: skip
    return judge(MethodReadings(readings), SOUND)[4]


@pytest.mark.parametrize(
    ("gaps", "verdict", "said"),
    [
        (((0, 0, 0), (0, 0, 0)), "no difference seen", "+0.000 ± 0.000 nats to yarn, no difference seen"),
        (((-1e-6, -1e-6, -1e-6), (0, 0, 0)), "no difference seen", "4 × +0.000 ± 0.000 nats to yarn, no difference"),
        (((1e-4, 1e-4, 1e-4), (0, 0, 0)), "no difference seen", "4 × +0.000 ± 0.000 nats to yarn, no difference"),
        (((0.1, -0.1, 0.2), (-0.1, 0.1, -0.2)), "no difference seen", "4 × +0.067 ± 0.379 nats to yarn, no difference"),
        (((-0.1, -0.1, -0.1), (0, 0, 0)), "found", "4 × -0.100 ± 0.000 nats to yarn; 16 × +0.000"),
        (((-0.1, -0.1, -0.1), (0.02, 0.02, 0.03)), "NOT found", "16 × +0.023 ± 0.014 nats to yarn"),
        (((0.02, 0.02, 0.03), (0, 0, 0)), "NOT found", "4 × +0.023 ± 0.014 nats to yarn; 16 × +0.000"),
    ],
    ids=(
        "equal",
        "too-little-to-show",
        "above-too-little",
        "within-its-interval",
        "better-once",
        "mixed",
        "worse-once",
    ),
)
def test_a_difference_within_its_interval_is_said_as_none(gaps, verdict, said):
    finding = searched_beside_yarn(*gaps)

    assert finding.verdict == verdict
    assert said in str(finding)


def test_two_windows_have_no_interval_and_their_difference_is_what_it_is():
    readings = [
        MethodReading(method, stage, times, 256 * times, 1.0, (0.1 - (method == "longrope"), 0.2))
        for stage in rope.STAGES
        for method in METHODS
        for times in SOUND.times
    ]
    finding = judge(MethodReadings(readings), SOUND)[4]

    assert finding.verdict == "found"
    assert finding.found.startswith("4 × -0.500 nats to default")


def test_all_that_show_the_lowest_number_of_a_length_are_marked():
    tied = {"yarn": (4.0, 3.8, 4.1), "ntk": (4.0, 3.804, 4.3), "llama3": (4.0, 3.806, 4.3)}
    rows = {row[0]: row[1:] for row in table_rows(readings_of(untrained=tied), "untrained")}

    assert [method for method, row in rows.items() if row[1].endswith("*")] == ["ntk", "yarn", "longrope"]
    assert rows["ntk"][1] == rows["yarn"][1] == rows["longrope"][1] == "3.80 *"
    assert rows["llama3"][1] == "3.81"


def test_the_markdown_says_what_a_mark_means_and_what_was_found(tmp_path):
    meta = {"seed": 0, "device_name": "a processor", "versions": {"torch": "2"}}
    write_markdown(tmp_path / "bench.md", readings_of(), SOUND, meta)
    text = (tmp_path / "bench.md").read_text()

    assert "| longrope | 4.00 | 3.80 * | 4.00 * |" in text
    assert "\n\\* lowest of its length, ties included\n" in text
    assert text.count("\n- found: ") == 6


def test_the_best_of_every_length_is_marked():
    rows = {row[0]: row[1:] for row in table_rows(readings_of(), "untrained")}

    assert rows["longrope"] == ["4.00", "3.80 *", "4.00 *"]
    assert sum(cell.endswith("*") for row in rows.values() for cell in row) == 2


def test_the_picture_has_a_panel_a_stage_and_a_line_a_method():
    figure = draw_readings_figure(readings_of(), SOUND, "a title")
    for axes, table in zip(figure.axes, (UNTRAINED, TUNED), strict=True):
        drawn = {line.get_label(): tuple(line.get_ydata()) for line in axes.lines}
        for method, values in table.items():
            assert drawn[method] == pytest.approx(values)
        assert drawn["holds below: 1.1 × default at 1 ×"] == pytest.approx((4.4, 4.4))
        assert axes.get_xlabel() == "tokens of a window, and how many times the 256 of training"


def test_without_matplotlib_the_picture_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^a picture needs matplotlib; pip install 'anchor-attn\[plots\]'\.$"):
        draw_readings_figure(readings_of(), SOUND, "a title")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the command line on documents of our own: the standard library takes seconds to read."""
    documents = [
        {"text": f"def f{n}(x):\n    return x * {n * 7919 % 997} + {n}\n" * 40, "file": f"{n}.py"} for n in range(60)
    ]
    folder = tmp_path / "documents"
    folder.mkdir()
    for document in documents:
        (folder / document["file"]).write_text(document["text"])
    monkeypatch.setattr(bench_rope_command, "SOURCE", str(folder))
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["anchor-attn", "bench", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return call


def test_a_quick_run_writes_its_files_and_says_what_it_is(run, tmp_path):
    code, out, _ = run("rope", "--quick")
    folder = tmp_path / "runs" / "bench-rope"
    content = json.loads((folder / "bench.json").read_text())

    assert code == 0
    assert {path.name for path in folder.iterdir()} >= {"bench.csv", "bench.csv.meta.json", "bench.md", "bench.png"}
    assert len(content["records"]) == 2 * len(METHODS) * len(PLAN.times)
    assert content["meta"]["plan"]["scored_tokens"] == 16
    assert {finding["verdict"] for finding in content["meta"]["findings"]} <= {
        "found", "NOT found", "no difference seen",
    }  # fmt: skip
    assert len(content["meta"]["findings"]) == 6
    assert "* lowest of its length, ties included" in out
    assert "A quick run: what it finds means nothing." in out
    markdown = (folder / "bench.md").read_text()
    assert all(f"\n| {method} | " in markdown for method in METHODS)
    assert len(re.findall(r"\n- (found|NOT found|no difference seen): ", markdown)) == 6
    assert "the last 16 tokens of 4 held-out windows" in markdown


def test_streams_are_of_other_files_and_every_document_begins_with_the_anchor(monkeypatch, run):
    seen = []

    def stop(*streams_and_more):
        seen.extend(streams_and_more[:3])
        raise ValueError("enough")

    monkeypatch.setattr(rope, "bench_rope", stop)
    assert run("rope", "--quick")[0] == 2
    texts = [{bytes(part.tolist()).decode() for part in _documents(tokens)} for tokens in seen]

    assert all(texts)
    assert sum(map(len, texts)) == len(set.union(*texts)) == 60
    assert len(texts[0]) > len(texts[2])


def _documents(tokens):
    places = [*(tokens == 256).nonzero().flatten().tolist(), len(tokens)]
    assert places[0] == 0
    return [tokens[first + 1 : last] for first, last in pairwise(places)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rope", "--rounds", "3"], "--rounds must be for what is timed, got 3 for bench rope"),
        (["rope", "--dtype", "bfloat16"], "--dtype must be for attention or routes or step"),
        (["mask", "--quick"], "--quick must be for rope, got bench mask"),
        (["rope", "--quick", "--seq-len", "31"], "anchor-attn: --seq-len must be at least 32, twice the scored tok"),
        (["rope", "--quick", "--seq-len", "99999"], "pass more text or a smaller --seq-len."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, said):
    code, out, err = run(*arguments)

    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
