"""The comparison: arms differ in what they say they differ in, and in nothing else."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import set_seed

from anchor_attn import wrap
from anchor_attn.masks import attended_pairs
from anchor_attn.train import ByteTokenizer, pack_documents, read_documents
from anchor_attn.train import compare as compare_room
from anchor_attn.train import run as run_room
from anchor_attn.train.compare import Comparison, Difference, Result, compare, paired_difference, unigram_loss
from anchor_attn.train.presets import create_model
from anchor_attn.train.report import findings
from anchor_attn.train.run import Arm, RunSpec, TokenLosses, collator_of, measure_loss, run_arm

ARMS = ["full", "intra_doc", "anchor", "intra_doc+reset", "intra_doc+bos", "anchor+reset+bos"]
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i * i}\n" * (1 + i % 5) for i in range(60)]


@pytest.fixture
def rows():
    return pack_documents(TEXTS, 256, max_rows=4)


@pytest.fixture
def spec(tmp_path):
    return RunSpec(
        arm=Arm("anchor"),
        seed=0,
        model="tiny",
        vocab_size=257,
        anchor_token_id=256,
        seq_len=256,
        steps=4,
        batch_size=1,
        learning_rate=1e-3,
        engine="auto",
        device="cpu",
        dtype="float32",
        out=tmp_path,
    )


@pytest.fixture
def held_out():
    return [pack_documents([text], 256, cut="drop")[0] for text in TEXTS[-3:]]


@pytest.mark.parametrize("name", ARMS)
def test_an_arms_name_is_read_back_as_the_arm(name):
    assert Arm.parse(name).name == name
    assert Arm.parse(name) == Arm.parse(f" {name} ")


@pytest.mark.parametrize("name", ["", "anchors", "anchor+", "anchor+BOS", "+bos", "anchor+reset+x"])
def test_an_unknown_arm_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"arm must be one of full, intra_doc, anchor, with \+reset or \+bos behind"):
        Arm.parse(name)


def test_the_arms_see_the_same_tokens_and_label_the_same_tokens(rows, spec):
    seen, labelled = set(), set()
    for name in ARMS:
        batch = collator_of(replace(spec, arm=Arm.parse(name)))([rows[0], rows[1]])
        ids = batch["input_ids"]
        seen.add(tuple(ids[(batch["document_ids"].document_ids > 0) & (ids != 256)].tolist()))
        labelled.add(tuple(batch["labels"][batch["labels"] != -100].tolist()))
    assert len(seen) == 1
    assert len(labelled) == 1
    assert sum(map(len, rows.document_lengths[:2])) + len(*labelled) == len(*seen)


def test_the_arms_start_from_the_same_weights_and_another_seed_from_others(rows, spec, held_out, monkeypatch):
    weights = {}

    def note_weights(run, model, *_):
        weights[run.arm.name, run.seed] = torch.cat([p.detach().flatten() for p in model.parameters()])
        return run_room.Training([{"step": 1, "loss": 1.0, "tokens": 1, "seconds": 1.0}], [1], [1])

    monkeypatch.setattr(run_room, "_train", note_weights)
    for name, seed in [("full", 0), ("anchor", 0), ("intra_doc+bos", 0), ("anchor", 1)]:
        run_arm(replace(spec, arm=Arm.parse(name), seed=seed, steps=1), rows, rows, held_out)
    assert torch.equal(weights["full", 0], weights["anchor", 0])
    assert torch.equal(weights["full", 0], weights["intra_doc+bos", 0])
    assert not torch.equal(weights["anchor", 0], weights["anchor", 1])


def test_the_held_out_loss_depends_on_the_weights_and_not_on_the_arm(rows, spec, held_out, monkeypatch):
    untrained = run_room.Training([{"step": 1, "loss": 1.0, "tokens": 1, "seconds": 1.0}], [1], [1])
    monkeypatch.setattr(run_room, "_train", lambda *_: untrained)
    records = {name: run_arm(replace(spec, arm=Arm.parse(name), steps=1), rows, rows, held_out) for name in ARMS}
    full, own_mask = records["full"], "held_out_loss_as_trained"
    for record in records.values():
        assert record["held_out_loss"] == pytest.approx(full["held_out_loss"], rel=1e-6)
    assert records["intra_doc"][own_mask] != pytest.approx(full["held_out_loss"], rel=1e-5)
    for name in ("full", "anchor", "intra_doc+bos"):  # a BOS of its own is to a document what the anchor is
        assert records[name][own_mask] == pytest.approx(full["held_out_loss"], rel=1e-5)
    packed = {name: record["held_out_loss_packed"] for name, record in records.items()}
    assert len({round(packed[name], 4) for name in ("full", "intra_doc", "anchor")}) == 3
    assert packed["intra_doc+reset"] == pytest.approx(packed["intra_doc"], rel=1e-5)  # RoPE is relative in float32


def test_two_runs_of_a_seed_are_bit_equal_and_another_arm_is_not(rows, spec, held_out):
    first, second = (run_arm(spec, rows, rows, held_out) for _ in range(2))
    losses = [[step["loss"] for step in record["curve"]] for record in (first, second)]
    assert losses[0] == losses[1]
    for key in ("loss", "held_out_loss", "held_out_loss_packed", "held_out_loss_by_position"):
        assert first[key] == second[key]
    other = run_arm(replace(spec, arm=Arm("full")), rows, rows, held_out)
    assert other["held_out_loss"] != first["held_out_loss"]


def test_a_record_counts_tokens_pairs_and_the_last_tenth_of_the_losses(rows, spec, held_out):
    record = run_arm(spec, rows, rows, held_out)
    lengths = rows.document_lengths
    layouts = [collator_of(spec)([row])["document_ids"] for row in rows]
    assert [step["tokens"] for step in record["curve"]] == list(np.cumsum([sum(row) for row in lengths]))
    assert record["attended_pairs"] == np.mean([attended_pairs(layout, "anchor")[0] for layout in layouts])
    assert record["loss"] == record["curve"][-1]["loss"]
    seconds = np.diff([0, *(step["seconds"] for step in record["curve"])])
    assert record["step_s"] == pytest.approx(seconds[3])
    assert record["tokens_per_s"] == pytest.approx(sum(lengths[3]) / seconds[3])
    assert record["peak_bytes"] > 1e8


def test_training_lowers_the_loss_below_the_first_steps(rows, spec, held_out):
    record = run_arm(replace(spec, steps=20, learning_rate=3e-3), rows, rows, held_out)
    assert record["loss"] < 0.8 * record["curve"][0]["loss"]


def test_the_measured_loss_is_the_mean_over_labelled_tokens_of_every_row(rows, spec):
    set_seed(0)
    model = create_model("tiny", 257, 512, 256).eval()
    wrap(model, "anchor")
    measured = measure_loss(model, rows, collator_of(spec), spec.dtype)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            batch = collator_of(spec)([row])
            count = int((batch["labels"] != -100).sum())
            nats += float(model(**batch).loss) * count
            tokens += count
    assert len(measured.nats) == tokens
    assert measured.mean() == pytest.approx(nats / tokens, rel=1e-5)


def test_losses_by_position_are_means_over_their_buckets():
    places = torch.tensor([1, 63, 64, 127, 128, 5000])
    losses = TokenLosses(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0]), places)
    assert losses.by_position() == [
        {"first_position": 0, "tokens": 2, "loss": 2.0},
        {"first_position": 64, "tokens": 2, "loss": 6.0},
        {"first_position": 128, "tokens": 1, "loss": 9.0},
        {"first_position": 4096, "tokens": 1, "loss": 11.0},
    ]


def test_the_unigram_loss_knows_token_frequencies_only():
    rows = pack_documents(["aab"], 8)
    held_out = [pack_documents(["xab"], 8)[0]]  # the first token of a document is not labelled
    expected = -(math.log(3 / 260) + math.log(2 / 260)) / 2
    assert unigram_loss(rows, held_out) == pytest.approx(expected)


def test_a_paired_difference_has_a_t_interval_from_three_seeds_on():
    below = paired_difference("a", "b", [1.0, 2.0], [0.5, 1.0])
    assert (below.mean, below.low, below.high) == (0.75, None, None)
    assert "no interval below 3 seeds" in str(below)
    # differences 1, 2, 3: mean 2, standard error 1/√3, t(0.975, 2) = 4.30265
    three = paired_difference("a", "b", [2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert three.mean == 2
    assert three.high - three.mean == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert three.mean - three.low == pytest.approx(three.high - three.mean)
    assert "no difference seen" in str(three)  # the interval reaches below zero
    assert "a difference" in str(paired_difference("a", "b", [2.0, 2.1, 2.2], [1.0, 1.0, 1.0]))
    assert paired_difference("a", "b", [2.0] * 3, [1.0] * 3) == Difference("a", "b", 1.0, 1.0, 1.0)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def inline(monkeypatch):
    """Runs in this process, not in one each: the slow test of the command line takes the real way."""
    monkeypatch.setattr(compare_room, "_run_in_own_process", run_arm)


def test_compare_writes_results_that_say_where_they_come_from(corpus, tmp_path, inline):
    settings = Comparison(
        arms=("full", "anchor"),
        seeds=(0, 1, 2),
        data=str(corpus),
        model="tiny",
        seq_len=128,
        steps=2,
        held_out_rows=1,
        out=tmp_path / "out",
    )
    said = []
    result = compare(settings, said.append)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(written) == {"meta", "records"}
    assert [(r["arm"], r["seed"]) for r in written["records"]] == [(a, s) for s in range(3) for a in ("full", "anchor")]
    keys = "arm pattern position_policy bos_per_document rope_precision seed step_s tokens_per_s loss held_out_loss"
    keys += " held_out_loss_packed attended_pairs peak_bytes"
    assert set(keys.split()) <= set(written["records"][0])
    meta = written["meta"]
    assert meta["corpus_hash"] == result.meta["corpus"]["corpus_hash"]
    assert meta["seeds"] == [0, 1, 2]
    assert {"versions", "device", "dtype", "git_commit", "document_lengths"} <= set(meta)
    losses = (tmp_path / "out" / "runs" / "anchor-seed1" / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in losses] == [1, 2]
    assert any("anchor, seed 2" in line for line in said)
    (difference,) = result.differences()
    full, anchor = ([record["held_out_loss"] for record in result.of_arm(arm)] for arm in ("full", "anchor"))
    assert difference.mean == pytest.approx(np.mean(full) - np.mean(anchor))


def test_another_seed_packs_the_rows_in_another_order(corpus, tmp_path, monkeypatch):
    firsts = []

    def note_first_row(spec, rows, *_):
        firsts.append(tuple(rows[0]["input_ids"].tolist()))
        raise ValueError("seen enough")

    monkeypatch.setattr(compare_room, "_run_in_own_process", note_first_row)
    for seed in (0, 1, 0):
        with pytest.raises(ValueError, match="seen enough"):
            compare(Comparison(arms=("full",), seeds=(seed,), data=str(corpus), seq_len=128, out=tmp_path))
    assert firsts[0] != firsts[1]
    assert firsts[0] == firsts[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ()}, "arms must name at least one, got none"),
        ({"arms": ("full", "full")}, "arms must differ, got full, full"),
        ({"arms": ("full+bos+reset", "full+reset+bos")}, "arms must differ"),
        ({"seeds": ()}, "seeds must name at least one"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seq_len": -1}, "seq_len must be at least 3, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"dtype": "float8"}, "dtype must be float32 or bfloat16, got 'float8'"),
        ({"engine": "flash"}, "engine must be one of"),
        ({"device": "warp"}, "device must be cpu or cuda, got 'warp'"),
        ({"cut": "maybe"}, "cut must be one of"),
        ({"model": "absent.json"}, "model must be a config file that exists"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(change, message, monkeypatch):
    monkeypatch.setattr(compare_room, "read_documents", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match=message):
        compare(replace(Comparison(), **change))


def test_a_model_is_a_size_a_config_or_a_checkpoint(tmp_path):
    tiny = create_model("tiny", 300, 64, 256)
    assert tiny.config.vocab_size == 300
    tiny.save_pretrained(tmp_path / "checkpoint")
    loaded = create_model(str(tmp_path / "checkpoint"), 257, 64, 256)
    assert torch.equal(loaded.lm_head.weight, tiny.lm_head.weight)
    fresh = create_model(str(tmp_path / "checkpoint" / "config.json"), 257, 64, 256)
    assert fresh.config.vocab_size == 257
    with pytest.raises(ValueError, match=r"vocabulary of at least the tokenizer's 400, got .* with 300"):
        create_model(str(tmp_path / "checkpoint"), 400, 64, 256)
    with pytest.raises(ValueError, match="model must be a config file that exists"):
        create_model(str(tmp_path / "absent.json"), 257, 64, 256)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="model must be a readable transformers config"):
        create_model(str(tmp_path / "broken.json"), 257, 64, 256)
    with pytest.raises(ValueError, match="model must be one of tiny, laptop, small, a config file"):
        create_model(str(tmp_path / "nowhere"), 257, 64, 256)


def test_a_run_in_its_own_process_hands_its_record_back(spec, rows, held_out):
    theirs = compare_room._run_in_own_process(replace(spec, steps=2), rows, rows, held_out)
    ours = run_arm(replace(spec, steps=2), rows, rows, held_out)
    assert theirs["held_out_loss"] == ours["held_out_loss"]


def test_a_run_in_its_own_process_hands_its_error_back_in_one_line(spec, rows, held_out):
    with pytest.raises(ValueError, match="model must be a config file that exists"):
        compare_room._run_in_own_process(replace(spec, model="absent.json"), rows, rows, held_out)


def test_rows_that_run_out_are_read_again_and_counted_as_they_were_read(spec, held_out):
    rows = pack_documents(TEXTS, 128, max_rows=3)
    record = run_arm(replace(spec, seq_len=128, batch_size=2, steps=4), rows, rows, held_out)
    tokens = [sum(lengths) for lengths in rows.document_lengths]
    steps = [tokens[0] + tokens[1], tokens[2], tokens[0] + tokens[1], tokens[2]]  # an epoch ends with what is left
    assert [step["tokens"] for step in record["curve"]] == list(np.cumsum(steps))


def test_a_diverged_run_is_a_result_that_says_so(corpus, tmp_path, inline):
    settings = Comparison(
        arms=("full", "anchor"), data=str(corpus), model="tiny", seq_len=128, steps=3, held_out_rows=1, out=tmp_path
    )
    result = compare(replace(settings, learning_rate=1e38))
    assert any("Diverged" in sentence for sentence in findings(result))
    assert "nothing can be said" in str(result.differences()[0])
    assert [r["held_out_loss"] for r in json.loads((tmp_path / "results.json").read_text())["records"]] == [None, None]


def test_a_document_without_tokens_shifts_no_other_in_the_held_out_rows(tmp_path):
    class DropsX(ByteTokenizer):
        def encode(self, texts):
            return super().encode([text.replace("x", "") for text in texts])

    path = tmp_path / "corpus.jsonl"
    texts = ["xxx", *(f"text {i} of some length" for i in range(8))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    held = compare_room._hold_out(read_documents(path), Comparison(seq_len=64, held_out_rows=9), DropsX())
    assert len(held.alone) == 8
    assert held.documents == 9
    packed = [tuple(row["input_ids"][1:]) for row in held.packed]
    assert [token for row in held.alone for token in row["input_ids"][1:]] == [t for row in packed for t in row]


def test_result_keeps_the_order_of_arms():
    records = [{"arm": arm, "held_out_loss": 1.0} for arm in ("full", "anchor", "full", "anchor")]
    result = Result({}, records, None)
    assert result.arms == ["full", "anchor"]
    assert len(result.of_arm("full")) == 2


def test_a_config_that_cannot_be_built_is_refused_in_one_line(tmp_path):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 33, "num_attention_heads": 2}))
    with pytest.raises(ValueError, match="model must be a"):
        create_model(str(path), 257, 64, 256)
    path.write_text(json.dumps({"model_type": "gpt2", "n_positions": 32, "n_embd": 32, "n_head": 2, "n_layer": 1}))
    with pytest.raises(ValueError, match=r"model must have positions for rows of 64 tokens, got .* with 32"):
        create_model(str(path), 257, 64, 256)
    assert create_model(str(path), 257, 32, 256).config.vocab_size == 257


def test_held_out_documents_that_are_trained_on_too_are_left_out(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i % 20} of these"}) + "\n" for i in range(200)))
    train, held_out = read_documents(path).split_by_file(0.5)
    with pytest.raises(ValueError, match="data must hold different documents, got"):
        compare_room._without_twins(held_out, train)
    path.write_text("".join(json.dumps({"text": f"document {i} of these"}) + "\n" for i in range(20)))
    train, held_out = read_documents(path).split_by_file(0.5)
    assert len(compare_room._without_twins(held_out, train)) == len(held_out)


def test_losses_of_an_earlier_comparison_do_not_stay_behind(tmp_path):
    old, mine = tmp_path / "full-seed7", tmp_path / "mine"
    for folder in (old, mine):
        folder.mkdir()
    (old / "losses.jsonl").write_text("")
    (mine / "notes.txt").write_text("kept")
    compare_room._forget_runs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
