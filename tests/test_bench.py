"""Lengths, timing, memory, parity and tables of the benchmarks: ratios are what they say, reasons are given."""

import math
from dataclasses import asdict
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anchor_attn import lengths
from anchor_attn.bench import masks, memory, timing
from anchor_attn.bench.parity import Inputs, Reference, parity_layout
from anchor_attn.bench.report import HEADER, describe_rates, draw_figure, list_lines, write_markdown
from anchor_attn.bench.timing import Pace, Rival, Row, Timing, time_rivals
from anchor_attn.masks import PackedLayout, attended_pairs
from anchor_attn.results import CheckError

LAYOUT = PackedLayout.from_lengths([[10, 10]])
CPU = torch.device("cpu")

# --- lengths ---------------------------------------------------------------------------------------------------------


@given(st.integers(2_000, 40_000), st.integers(0, 5))
def test_drawn_lengths_add_up_and_keep_their_bounds(tokens, seed):
    drawn = lengths.draw_lengths(tokens, 300, 1400, seed)
    assert sum(drawn) == tokens
    assert all(300 <= length <= 1400 for length in drawn)
    assert drawn == lengths.draw_lengths(tokens, 300, 1400, seed)


def test_lengths_that_cannot_add_up_are_refused():
    with pytest.raises(ValueError, match="seq_len must hold documents of 300 to 1400 tokens, got room for 299"):
        lengths.draw_lengths(299, 300, 1400, 0)


@pytest.mark.parametrize(("shortest", "longest"), [(0, 0), (0, 9), (9, 8)])
def test_lengths_in_the_wrong_order_are_refused(shortest, longest):
    with pytest.raises(ValueError, match="shortest and longest must be lengths in this order, got"):
        lengths.draw_lengths(1000, shortest, longest, 0)


@given(st.integers(1, 200_000), st.integers(0, 5))
def test_lengths_of_a_corpus_add_up_and_keep_their_bounds(tokens, seed):
    drawn = lengths.draw_corpus_lengths(tokens, seed)
    assert sum(drawn) == tokens
    assert all(8 <= length <= 32_768 for length in drawn[:-1])
    assert drawn == lengths.draw_corpus_lengths(tokens, seed)


def test_lengths_of_a_corpus_are_log_normal():
    logs = [math.log(length) for length in lengths.draw_corpus_lengths(10_000_000, 0)]
    assert mean(logs) == pytest.approx(6.5, abs=0.05)
    assert stdev(logs) == pytest.approx(1.2, abs=0.05)


@given(st.sampled_from(lengths.DISTRIBUTIONS), st.integers(1_023, 200_000), st.integers(0, 3))
def test_every_distribution_fills_the_row_and_is_drawn_from_the_seed(name, tokens, seed):
    drawn = lengths.draw_distribution(name, tokens, seed)
    assert sum(drawn) == tokens
    assert min(drawn) >= 1
    assert drawn == lengths.draw_distribution(name, tokens, seed)


@pytest.mark.parametrize("tokens", [4_095, 131_071])
def test_distributions_hold_what_their_names_say(tokens):
    short, one_long, prolong = (lengths.draw_distribution(n, tokens, 0) for n in lengths.DISTRIBUTIONS[2:])
    assert 128 <= min(short) <= max(short) <= 512
    assert sorted(one_long)[-1] == tokens // 2
    assert sorted(one_long)[-2] <= 512
    assert max(prolong) == min(65_536, round(0.6 * tokens))
    assert 0.6 * tokens - 1 <= sum(sorted(prolong)[-1 - (tokens > 65_536 / 0.6) :]) <= 0.6 * tokens + 1


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match=r"distribution must be one of \('uniform', .*\), got 'zipf'; pass one"):
        lengths.draw_distribution("zipf", 1000, 0)


# --- timing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Time stands still but for what rivals take; `takes(name, seconds…)` is the run of a rival."""
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def takes(name, *seconds, phase="both"):
        rounds = iter(seconds)

        def run(watch):
            order.append(name)
            with watch(phase):
                now[0] += next(rounds)

        return run

    takes.order = order
    return takes


def full_and_ours(takes, ours=(99, 1, 2, 3), full=(99, 4, 8, 4)):
    return [
        Rival("full", "torch", "sdpa", "full", takes("full", *full)),
        Rival("ours", "varlen", "sdpa", "anchor", takes("ours", *ours), form="gather"),
    ]


def test_rivals_alternate_and_ratios_are_to_full(clock):
    full, ours = time_rivals(full_and_ours(clock), Row(LAYOUT, "uniform", {"both": 6.0}), 3)

    assert clock.order == ["full", "ours"] * 4
    assert (full.seconds, ours.seconds, ours.fastest_s, ours.slowest_s, ours.rounds) == (4, 2, 1, 3, 3)
    assert (ours.route, ours.documents, ours.distribution, full.route) == ("varlen/sdpa/gather", 2, "uniform", "")
    assert ours.speedup == 2
    pairs = [attended_pairs(LAYOUT, pattern)[0] for pattern in ("anchor", "full")]
    assert ours.share_of_ideal == pytest.approx(2 * pairs[0] / pairs[1])
    assert ours.tokens_per_s == 21 / 2
    assert ours.tflops_per_s == pytest.approx(6.0 * pairs[0] / 2 / 1e12)
    assert ours.share_of_ideal == pytest.approx(ours.tflops_per_s / full.tflops_per_s), "the rate on attended pairs"


def test_rounds_end_with_the_budget_but_the_first_is_counted(clock):
    for budget_s, rounds in [(1.0, 1), (202.0, 1), (205.0, 2), (math.inf, 3)]:
        timings = time_rivals(full_and_ours(clock), Row(LAYOUT), 3, budget_s)
        assert [found.rounds for found in timings] == [rounds, rounds], budget_s


def test_a_rival_that_would_take_too_long_is_left_out_with_the_reason(clock):
    pace = Pace()
    time_rivals(full_and_ours(clock), Row(LAYOUT), 1, math.inf, pace)
    longer = PackedLayout.from_lengths([[10] * 20])
    growth = attended_pairs(longer, "full")[0] / attended_pairs(LAYOUT, "full")[0]
    full, ours = time_rivals(full_and_ours(clock, ours=(1, 1)), Row(longer), 1, 16 * growth - 0.1, pace)

    assert full.left_out == f"a round would take about {4 * growth:,.0f} s; pass --budget-s {math.ceil(16 * growth)}"
    assert (full.seconds, full.speedup, full.rounds) == (None, None, 0)
    assert (ours.left_out, ours.seconds, ours.speedup, ours.share_of_ideal) == ("", 1, None, None)
    pace.note(full_and_ours(clock)[0], LAYOUT, 4)
    full, _ = time_rivals(full_and_ours(clock, ours=(1, 1), full=(7, 7)), Row(longer), 1, 16 * growth + 0.1, pace)
    assert (full.left_out, full.seconds) == ("", 7)


def test_a_rival_whose_cells_do_not_fit_is_left_out_with_the_reason(clock, monkeypatch):
    monkeypatch.setattr(timing, "available_bytes", lambda device: 2**30)
    dense = Rival("dense", "torch", "sdpa", "full", clock("dense"), is_dense=True, bytes_a_cell=2**30)
    (found,) = time_rivals([dense], Row(LAYOUT), 1)

    assert found.left_out == "its S × S cells would take 441 GiB, 1 GiB are free"
    assert clock.order == []


def test_a_rival_that_runs_out_of_memory_is_left_out_with_the_reason(clock):
    def run(watch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has less.")

    rivals = [*full_and_ours(clock), Rival("big", "torch", "sdpa", "anchor", run, phases=("forward", "both"))]
    *others, forward, both = time_rivals(rivals, Row(LAYOUT), 1)

    assert forward.left_out == both.left_out == "out of memory: CUDA out of memory"
    assert all(other.seconds for other in others)


def test_phases_within_phases_are_each_timed(clock):
    def run(watch):
        with watch("both"):
            clock("x", 1, phase="forward")(watch)
            clock("x", 2, phase="backward")(watch)

    rival = Rival("x", "torch", "sdpa", "full", run, phases=("forward", "backward", "both"))
    assert [found.seconds for found in time_rivals([rival], Row(LAYOUT), 1)] == [1, 2, 3]


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_peak_is_that_of_tensors_held_at_once_and_not_of_all():
    held = torch.empty(1000)
    with memory.measure_peak(CPU) as peak:
        one = torch.empty(1 << 20)
        del one
        two = torch.empty(1 << 18)
    assert 4 << 20 <= peak.tensor_bytes < (4 << 20) + 4096
    assert two.numel() + held.numel() > 0


def test_buffers_inside_a_kernel_count_to_the_peak():
    query = torch.randn(1, 1, 256, 16)
    mask = torch.ones(256, 256, dtype=torch.bool)
    with memory.measure_peak(CPU) as peak:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, mask)
    assert peak.tensor_bytes > 4 * 256 * 256  # the mask as numbers, which no Python code makes


def test_the_host_says_what_memory_is_free(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9 kB\nMemAvailable:    7 kB\n")
    monkeypatch.setattr(memory, "Path", lambda _: meminfo)
    assert memory.available_bytes(CPU) == 7 * 1024
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "absent")
    assert memory.available_bytes(CPU) is None


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    layout = parity_layout("cpu")
    return Reference(Inputs.draw(layout, (2, 1), 16, torch.float32, 0), layout, "anchor", {})


def exact_attention(query, key, value):
    from anchor_attn import anchor_attention

    return anchor_attention(query, key, value, parity_layout("cpu"), engine="varlen/sdpa/gather")


def test_what_is_right_passes_within_its_budget(reference):
    assert 0 < reference.check("ours", exact_attention) <= 1


@pytest.mark.parametrize("wrong", [lambda out: out * 1.0001, lambda out: out * math.nan], ids=["a little", "nan"])
def test_a_wrong_output_is_told(reference, wrong):
    with pytest.raises(
        CheckError, match=r"ours must agree with the reference before it is timed, got an error of .* out"
    ):
        reference.check("ours", lambda *states: wrong(exact_attention(*states)))


def test_a_wrong_gradient_is_told(reference):
    def attend(query, key, value):
        return exact_attention(query, key, value * 1.001 - (value * 0.001).detach())

    with pytest.raises(CheckError, match=r"got an error of \S+ in value where \S+ is allowed"):
        reference.check("ours", attend)
    assert reference.check("ours", attend, has_backward=False) <= 1


# --- tables and pictures ---------------------------------------------------------------------------------------------


def record(name, pattern, phase, seq_len=1024, seconds=1.0, **more):
    given = {"speedup": 2.0, "share_of_ideal": 0.5, "tokens_per_s": 3.0, "rounds": 1} if seconds else {}
    spread = {"fastest_s": seconds, "slowest_s": seconds}
    fields = {"distribution": "web-text", "documents": 3, "seq_len": seq_len, "seconds": seconds, **spread}
    return Timing(name, "torch", "k", "", "", pattern, phase, **{**fields, **given, **more})


def test_a_line_holds_all_phases_of_a_rival_and_says_why_one_was_left_out():
    timings = [record("a", "anchor", phase, seconds=s) for phase, s in [("forward", 1.0), ("backward", 2), ("both", 3)]]
    timings += [record("b", "anchor", "forward"), record("c", "full", "both", seconds=None, left_out="too slow")]
    a, b, c = (dict(zip(HEADER, line.cells(), strict=True)) for line in list_lines(timings))

    assert (a["forward s"], a["backward s"], a["both s"], a["speed-up"]) == ("1.000", "2.000", "3.000", "2.00 ×")
    assert (b["backward s"], b["both s"], b["speed-up"]) == ("–", "–", "2.00 × (forward)")
    assert c["forward s"] == "left out: too slow"


def test_the_fastest_of_our_routes_is_described_by_its_rate_on_attended_pairs():
    timings = [record("slow", "anchor", "both", speedup=1.0), record("quick", "anchor", "both", speedup=6.84)]
    timings += [record("other", "intra_doc", "both", speedup=9.0), record("none", "anchor", "both", 2048, None)]
    expected = "quick at 1,024 tokens (web-text): 6.8 × full SDPA, 50 % of its rate on attended pairs"
    assert describe_rates(timings) == [expected]


@pytest.mark.parametrize("seq_lens", [(1024,), (1024, 2048)], ids=["bars", "lines"])
def test_files_hold_every_rival(seq_lens, tmp_path):
    names = ["full SDPA", "anchor by ours", "slow one"]
    timings = [
        record(name, pattern, "both", seq_len, left_out="too slow" if name == names[2] else "",
               seconds=None if name == names[2] else 1.0)
        for seq_len in seq_lens for name, pattern in zip(names, ("full", "anchor", "intra_doc"), strict=True)
    ]  # fmt: skip
    meta = {"device_name": "a CPU", "threads": 2, "versions": {"torch": "2"}, "dtype": "f", "heads": "8", "head_dim": 4}
    write_markdown(tmp_path / "bench.md", timings, meta)
    text = (tmp_path / "bench.md").read_text()
    figure = draw_figure(timings, "title")
    figure.savefig(tmp_path / "bench.png")

    assert all(f"## {seq_len:,} tokens, web-text, 3 documents" in text for seq_len in seq_lens)
    assert text.count("left out: too slow") == len(seq_lens)
    assert {len(line.split("|")) for line in text.splitlines() if line.startswith("|")} == {len(HEADER) + 2}
    drawn = {label.get_text() for axis in figure.axes for label in axis.get_yticklabels()}
    drawn |= {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert set(names[:2]) <= drawn
    assert names[2] not in drawn


# --- block masks -----------------------------------------------------------------------------------------------------


def test_a_block_mask_that_differs_from_torchs_is_not_timed(monkeypatch):
    right = masks.create_packed_block_mask
    monkeypatch.setattr(
        masks,
        "create_packed_block_mask",
        lambda layout, pattern, *rest, **more: right(layout, "full", *rest, **more),
    )
    with pytest.raises(CheckError, match="block masks must equal torch's before they are timed, got another one for"):
        masks.bench_masks([512], 1, 0, "cpu")


def test_builders_are_counted_by_their_blocks_and_compared_with_eager(monkeypatch):
    monkeypatch.setattr(masks.torch, "compile", lambda function, **_: function)  # it takes 8 seconds
    timings = masks.bench_masks([1024, 2048], 2, 0, "cpu")
    ours = {timing.seq_len: timing for timing in timings if timing.name == "ours anchor"}
    eager = {timing.seq_len: timing for timing in timings if timing.name == "torch eager"}

    for seq_len in (1024, 2048):
        assert (ours[seq_len].blocks_full, ours[seq_len].blocks_partial) == (
            eager[seq_len].blocks_full,
            eager[seq_len].blocks_partial,
        )
        assert ours[seq_len].ratio_to_eager == eager[seq_len].seconds / ours[seq_len].seconds
    assert 0 < ours[2048].share_of_table <= 1


def test_growth_is_the_slope_of_seconds_over_blocks():
    def made(blocks, seconds):
        return masks.MaskTiming("ours", "ours", "", "anchor", 1, seconds, 0, 0, blocks - 2, 2, 1, 1, None)

    assert masks.measure_growth([made(10, 1.0), made(100, 100.0)])["ours"] == pytest.approx(2)


def test_the_columns_that_others_read_stay_put():
    columns = list(asdict(record("a", "full", "both")))
    assert {"name", "engine", "kernel", "pattern", "seq_len", "seconds", "share_of_ideal"} <= set(columns)
