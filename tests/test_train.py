"""Training runs: the loss that they minimise, what they report of a step, and what they refuse."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from train_runs import STEPS, run_on_processes, tiny_settings, write_corpus, write_model_config
from transformers import AutoModelForCausalLM

from anchor_attn import wrap
from anchor_attn.hf import is_wrapped
from anchor_attn.masks import PackedLayout, attended_pairs
from anchor_attn.results import CheckError
from anchor_attn.train.collator import PackedCollator
from anchor_attn.train.loop import run as room
from anchor_attn.train.loop.assembly import build_model, open_stream, training_arguments
from anchor_attn.train.loop.losses import LOSSES, read_losses
from anchor_attn.train.loop.meter import Clock, Costs, TimedLayout, costs_of, step_line
from anchor_attn.train.loop.routers import take_router_loss
from anchor_attn.train.loop.run import train
from anchor_attn.train.loop.settings import SET_BY_US, settings_from
from anchor_attn.train.loop.sharing import RowSharing
from anchor_attn.train.loop.trainer import PackedTrainer
from anchor_attn.train.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder)
    write_model_config(folder, attention_dropout=0.0)
    return folder


def run(folder, out, **changes):
    """A run, and its lines."""
    train(tiny_settings(folder, **changes), out, say=lambda _: None)
    return read_losses(out / LOSSES)


def short(**training):
    """Three steps, nothing saved."""
    return {"training": {"max_steps": 3, "save_strategy": "no", **training}}


def first_rows(folder, count):
    """The rows that a run begins with."""
    settings = tiny_settings(folder)
    alone = RowSharing.of("data", None, 0, 1)
    stream = open_stream(settings, ByteTokenizer(), SimpleNamespace(seed=42, data_seed=None), alone)
    return [row for row, _ in zip(stream, range(count), strict=False)]


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_step_is_its_nats_over_its_labelled_tokens_whatever_the_micro_batches(folder, tmp_path):
    rows = first_rows(folder, 4)
    model = build_model(tiny_settings(folder), ByteTokenizer()).double()
    batch = PackedCollator(seq_len=64)(rows)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    expected = float(torch.nn.functional.cross_entropy(logits.mT, labels).detach())  # over all labelled tokens alike
    for number, (rows_at_once, accumulation) in enumerate([(4, 1), (2, 2), (1, 4)]):
        sizes = {"per_device_train_batch_size": rows_at_once, "gradient_accumulation_steps": accumulation}
        first, *_ = run(folder, tmp_path / str(number), **short(**sizes))
        assert first["loss"] == pytest.approx(expected, rel=1e-5)
        assert first["tokens"] == int((batch["document_ids"].document_ids > 0).sum())


def test_accumulated_gradients_are_those_of_one_batch(folder, tmp_path):
    norms = []
    for number, (rows_at_once, accumulation) in enumerate([(4, 1), (1, 4)]):
        sizes = {"per_device_train_batch_size": rows_at_once, "gradient_accumulation_steps": accumulation}
        norms.append([line["grad_norm"] for line in run(folder, tmp_path / str(number), **short(**sizes))])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_training_lowers_the_loss_and_its_checkpoint_loads_as_a_plain_model(folder, tmp_path):
    lines = run(folder, tmp_path)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "latest")
    assert not is_wrapped(model)
    config = json.loads((tmp_path / "latest" / "config.json").read_text())
    assert "anchor_attn" not in json.dumps(config)


def test_a_step_without_a_labelled_token_is_refused_before_it_makes_the_weights_no_numbers(folder, tmp_path):
    corpus = tmp_path / "short.jsonl"
    corpus.write_text('{"text": "a"}\n' * 400)
    with pytest.raises(ValueError, match=r"^data must hold labelled tokens in every step, got none at step 1"):
        run(folder, tmp_path / "out", data={"sources": [{"path": str(corpus)}]}, **short())


# --- what a line says ------------------------------------------------------------------------------------------------


def test_a_line_says_what_the_step_was(folder, tmp_path):
    lines = run(folder, tmp_path, **short())
    rows = first_rows(folder, 12)
    layouts = [PackedCollator(seq_len=64)([row])["document_ids"] for row in rows]
    tokens = 0
    for step, line in enumerate(lines, start=1):
        own, before = layouts[4 * (step - 1) : 4 * step], tokens
        tokens += sum(sum(map(sum, layout.document_lengths)) for layout in own)
        pairs, full = (sum(sum(attended_pairs(layout, p)) for layout in own) for p in ("anchor", "full"))
        assert (line["step"], line["tokens"]) == (step, tokens)
        assert line["pairs_of_full"] == pairs / full
        assert line["step_s"] > line["wait_s"] > 0
        assert line["step_s"] > line["mask_s"] > 0
        assert line["peak_bytes"] > 1e8
        assert line["lr"] == pytest.approx(1e-2 * (1 - (step - 1) / 3))
        assert line["tokens_per_s"] == pytest.approx((tokens - before) / line["step_s"])
        assert "mfu" not in line  # nobody knows a CPU's peak
        assert "\n" not in step_line(line, 3)
    meta = json.loads((tmp_path / f"{LOSSES}.meta.json").read_text())
    assert {"versions", "device", "seeds", "git_commit", "corpus", "dtype", "settings", "world_size"} <= meta.keys()


def test_mfu_is_the_models_operations_over_the_devices_peak(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("anchor_attn.train.loop.meter.costs_of", lambda *_: Costs(2.0, 3.0, 1000.0))
    for line in run(folder, tmp_path, **short()):
        assert line["mfu"] > 0
        assert "MFU" in step_line(line, 3)
    before = 0
    for line in read_losses(tmp_path / LOSSES):
        tokens, before = line["tokens"] - before, line["tokens"]
        rows = first_rows(folder, 12)[4 * (line["step"] - 1) : 4 * line["step"]]
        pairs = sum(sum(attended_pairs(PackedCollator(seq_len=64)([row])["document_ids"], "anchor")) for row in rows)
        assert line["mfu"] == pytest.approx((2 * tokens + 3 * pairs) / line["step_s"] / 1000)


def test_the_operations_of_a_model_are_those_that_torch_counts(folder):
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model(tiny_settings(folder, engine="reference"), ByteTokenizer())
    batch = PackedCollator()([{"input_ids": [256, *range(60)], "document_lengths": [60]}])
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    costs = costs_of(model, "cpu")
    tokens = batch["input_ids"].numel()
    # The dense oracle computes every pair, and torch needs no gradient of the embedding.
    assert costs.per_token * tokens + costs.per_pair * tokens**2 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_plans_are_timed_once_where_one_asks_for_another():
    clock = Clock()
    layout = TimedLayout(PackedLayout.from_lengths([[5, 6]]), clock)
    assert layout.plan("a", lambda: layout.plan("b", lambda: 1) + 1) == 2
    assert layout.plan("a", lambda: 0) == 2
    assert 0 < clock.seconds < 1
    assert clock.depth == 0
    assert layout == PackedLayout.from_lengths([[5, 6]])
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert isinstance(moved, TimedLayout)
    assert moved.clock is clock


# --- what is trained -------------------------------------------------------------------------------------------------


def test_the_settings_reach_the_model(folder):
    settings = tiny_settings(
        folder, pattern="intra_doc", rope="exact", extension={"method": "default", "theta": 1e6, "target_len": 4096}
    )
    model = build_model(settings, ByteTokenizer())
    own = model._anchor_attn
    assert (own.pattern, own.rope_precision) == ("intra_doc", "exact")
    assert model.config.rope_parameters["rope_theta"] == 1e6
    assert model.config.max_position_embeddings == 4096


@pytest.mark.parametrize("pattern", ["full", "intra_doc"])
def test_patterns_and_positions_change_the_run(folder, tmp_path, pattern):
    anchor = run(folder, tmp_path / "anchor", **short())
    other = run(folder, tmp_path / "other", pattern=pattern, **short())
    assert [line["tokens"] for line in anchor] == [line["tokens"] for line in other]
    assert [line["loss"] for line in anchor] != [line["loss"] for line in other]


def test_a_checkpoint_is_trained_further_from_its_weights_and_from_scratch_without(folder, tmp_path):
    pretrained = tmp_path / "pretrained"
    before = build_model(tiny_settings(folder), ByteTokenizer())
    torch.nn.init.zeros_(before.lm_head.weight)
    before.save_pretrained(pretrained)
    settings = {"model": str(pretrained), "tokenizer": "bytes"}
    assert (
        float(build_model(tiny_settings(folder, **settings), ByteTokenizer()).lm_head.weight.detach().abs().max()) == 0
    )
    drawn = build_model(tiny_settings(folder, **settings, scratch=True), ByteTokenizer())
    assert float(drawn.lm_head.weight.detach().abs().max()) > 0
    in_bfloat16 = build_model(tiny_settings(folder, **settings, dtype="bfloat16"), ByteTokenizer())
    assert {parameter.dtype for parameter in in_bfloat16.parameters()} == {torch.bfloat16}


def test_a_bos_per_document_is_not_counted_as_a_token(folder, tmp_path):
    plain = run(folder, tmp_path / "plain", **short())
    bos = run(folder, tmp_path / "bos", packing={"bos_per_document": True}, **short())
    assert [line["tokens"] for line in plain] == [line["tokens"] for line in bos]
    assert plain[0]["loss"] != bos[0]["loss"]


def test_two_sources_with_a_tag_and_interleaved_chunks_train(folder, tmp_path):
    corpus = str(folder / "corpus.jsonl")
    sources = [{"path": corpus, "weight": 3}, {"path": corpus, "tag": "code: "}]
    lines = run(folder, tmp_path, data={"sources": sources}, packing={"chunk_tokens": 8}, **short())
    assert len(lines) == 3


# --- PEFT, Liger, DeepSpeed ------------------------------------------------------------------------------------------


# PEFT asks for checkpointing by a name that transformers 5.23 has replaced.
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
def test_lora_trains_and_a_resumed_run_has_the_same_losses(folder, tmp_path):
    pretrained = tmp_path / "pretrained"
    build_model(tiny_settings(folder), ByteTokenizer()).save_pretrained(pretrained)
    of_model = {"model": str(pretrained), "tokenizer": "bytes"}
    lora = {**of_model, "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}}
    whole = run(folder, tmp_path / "whole", **lora)
    assert whole[0]["loss"] != whole[-1]["loss"]
    # One that stopped on the way: its checkpoint of step 3, and the rest done again.
    out = tmp_path / "stopped"
    real, seen = room.asking_to_stop, []

    class Stop:
        def __enter__(self):
            return lambda: len(seen) >= 0 and (out / "checkpoint-3").exists()

        def __exit__(self, *_):
            return None

    room.asking_to_stop = Stop
    try:
        outcome = train(tiny_settings(folder, **lora), out, say=lambda _: None)
    finally:
        room.asking_to_stop = real
    assert outcome.stopped
    assert outcome.step < STEPS
    train(tiny_settings(folder, **lora), out, resume=True, say=lambda _: None)
    assert [line["loss"] for line in read_losses(out / LOSSES)] == [line["loss"] for line in whole]


def test_a_forward_put_on_the_model_as_liger_does_still_gets_the_documents(folder, tmp_path, monkeypatch):
    """A stand-in of the same signature: Liger itself needs Triton. It binds a forward with **kwargs to the model."""
    seen = []

    def apply(model, config=None):
        plain = type(model).forward

        def lce_forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
            seen.append(kwargs.keys() & {"document_ids", "num_items_in_batch"})
            return plain(self, input_ids, attention_mask, position_ids, labels=labels, **kwargs)

        model.forward = lce_forward.__get__(model)

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    monkeypatch.setattr("transformers.training_args.is_liger_kernel_available", lambda: True, raising=False)
    plain = run(folder, tmp_path / "plain", **short())
    ours = run(folder, tmp_path / "liger", **short(use_liger_kernel=True))
    assert seen
    assert all(keys == {"document_ids", "num_items_in_batch"} for keys in seen)
    assert [line["loss"] for line in ours] == [line["loss"] for line in plain]


def test_an_engine_that_forwards_its_arguments_as_deepspeed_does_still_gets_the_documents(folder):
    """A stand-in: DeepSpeed's engine calls `self.module(*inputs, **kwargs)`, and so does this."""

    class Engine(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *inputs, **kwargs):
            return self.module(*inputs, **kwargs)

    model = build_model(tiny_settings(folder), ByteTokenizer())
    batch = PackedCollator()(first_rows(folder, 2))
    assert torch.equal(Engine(model)(**batch).loss, model(**batch).loss)


# --- mixtures of experts ---------------------------------------------------------------------------------------------

EXPERTS = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 257, "num_experts_per_tok": 2,
}  # fmt: skip


def expert_model(family="MixtralForCausalLM", **changes):
    """A small mixture of experts that adds its load-balancing loss."""
    kind = getattr(transformers, family)
    torch.manual_seed(0)
    own = (
        {"num_local_experts": 4} if family == "MixtralForCausalLM" else {"num_experts": 4, "moe_intermediate_size": 32}
    )
    model = kind(
        kind.config_class(**{**EXPERTS, **own, "output_router_logits": True, "router_aux_loss_coef": 0.5, **changes})
    )
    return wrap(model)


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_the_routers_loss_is_that_of_the_document_tokens_alone(family, folder):
    model = expert_model(family)
    plain = copy.deepcopy(model)
    router_loss = take_router_loss(model, None)
    assert router_loss.weight == 0.5
    rows = [
        {"input_ids": [256, *range(20)], "document_lengths": [8, 12]},
        {"input_ids": [256, 5, 6, 7], "document_lengths": [3]},
    ]
    batch = PackedCollator()(rows)
    out = model(**batch, output_router_logits=True)
    documents = batch["document_ids"].document_ids > 0
    # By hand: the experts' share of assignments times their share of probability.
    logits = torch.stack([layer[documents.reshape(-1)] for layer in out.router_logits]).reshape(-1, 4)
    probabilities = logits.softmax(-1)
    assigned = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1.0)
    expected = float(4 * (assigned.mean(0) * probabilities.mean(0)).sum().detach())
    assert float(router_loss(out.router_logits, batch["document_ids"]).detach()) == pytest.approx(expected, rel=1e-5)
    # The model has added nothing itself, and would have counted anchors and padding.
    labelled = batch["labels"][:, 1:]
    nats = torch.nn.functional.cross_entropy(out.logits[:, :-1].mT, labelled)
    assert float(out.loss.detach()) == pytest.approx(float(nats.detach()), rel=1e-6)
    theirs = plain(**batch, output_router_logits=True)
    assert abs(float(theirs.aux_loss.detach()) - expected) > 1e-4
    assert model.config.router_aux_loss_coef == 0.5  # what a checkpoint says of itself


def test_no_gradient_of_the_routers_loss_comes_from_anchors_or_padding(folder):
    model = expert_model()
    router_loss = take_router_loss(model, None)
    layout = PackedLayout.from_lengths([[4, 3], [5]])
    logits = tuple(torch.randn(layout.document_ids.numel(), 4, requires_grad=True) for _ in range(2))
    router_loss(logits, layout).backward()
    documents = (layout.document_ids > 0).reshape(-1)
    for layer in logits:
        assert layer.grad[~documents].abs().max() == 0
        assert layer.grad[documents].abs().min() > 0


def test_a_mixture_of_experts_trains_with_its_routers_loss_beside_the_nats(folder, tmp_path):
    model_folder = tmp_path / "experts"
    expert_model().save_pretrained(model_folder)
    settings = {"model": str(model_folder), "tokenizer": "bytes"}
    once = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    lines = run(folder, tmp_path / "a", **settings, **short(**once))
    without = run(folder, tmp_path / "b", **settings, router_weight=0.0, **short(**once))
    assert lines[0]["loss"] == without[0]["loss"]  # nats are nats
    assert lines[0]["grad_norm"] != without[0]["grad_norm"]
    assert "router_loss" in lines[0]
    assert "router_loss" not in without[0]
    assert "router" in step_line(lines[0], 3)


def test_a_routers_loss_is_refused_where_processes_share_rows(folder, tmp_path, monkeypatch):
    model_folder = tmp_path / "experts"
    expert_model().save_pretrained(model_folder)
    monkeypatch.setattr(RowSharing, "of", lambda *_: RowSharing("document", 2, 0, 2))
    with pytest.raises(ValueError, match=r"^router_weight must be 0 where processes share rows, got "):
        run(folder, tmp_path / "run", model=str(model_folder), tokenizer="bytes", **short())


def test_the_routers_loss_counts_once_whatever_the_micro_batches(folder, tmp_path):
    model_folder = tmp_path / "experts"
    expert_model(router_aux_loss_coef=50.0).save_pretrained(model_folder)  # it outweighs the nats
    settings = {"model": str(model_folder), "tokenizer": "bytes"}
    norms = []
    for number, (rows_at_once, accumulation) in enumerate([(4, 1), (1, 4)]):
        sizes = {"per_device_train_batch_size": rows_at_once, "gradient_accumulation_steps": accumulation}
        norms.append(run(folder, tmp_path / str(number), **settings, **short(**sizes))[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.3)  # of four rows each, and of all four; not four times as much


def test_a_routers_loss_in_another_form_is_refused(folder):
    model = wrap(build_model(tiny_settings(folder), ByteTokenizer()))
    assert take_router_loss(model, None) is None
    with pytest.raises(ValueError, match=r"^router_weight must be 0 for LlamaForCausalLM, whose load-balancing loss"):
        take_router_loss(model, 0.1)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_refused_without_resume_and_with_other_settings(folder, tmp_path):
    run(folder, tmp_path, **short())
    with pytest.raises(ValueError, match=r"^out must be a folder without a run, .* pass --resume"):
        run(folder, tmp_path, **short())
    with pytest.raises(ValueError, match=r"^pattern must be what the run began with, 'anchor', got 'full'; see "):
        train(tiny_settings(folder, pattern="full", **short()), tmp_path, resume=True, say=lambda _: None)
    with pytest.raises(ValueError, match=r"^packing\.seq_len must be what the run began with, 64, got 32"):
        train(tiny_settings(folder, packing={"seq_len": 32}, **short()), tmp_path, resume=True, say=lambda _: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"max_steps": -1}}, r"^training\.max_steps must be at least 1, got -1"),
        ({"training": {"seed": -1}}, r"^seed must lie between"),
        ({"training": {"optim": "adamx"}}, r"^training must hold what TrainingArguments takes, got .*adamx"),
        ({"training": {"save_total_limit": 0}}, r"^save_total_limit must be at least 1"),
        (
            {"rows_per_step": 3, "training": {"gradient_accumulation_steps": 1}},
            r"^rows_per_step must be a multiple",
        ),
        ({"model": "nowhere.json"}, r"^model must be a config file that exists"),
        ({"lora": {"rank": 4}}, r"^lora must hold what PEFT's LoraConfig takes, got \{'rank': 4\}"),
        (
            {"extension": {"method": "dynamic", "factor": 2.0}},
            r"^position_policy must be 'reset' for RoPE",
        ),
        ({"packing": {"method": "greedy"}}, r"^packing must be one of"),
        ({"parallel": "document"}, r"^parallel must be 'data' for one process, got 'document'; start with torchrun"),
    ],
)
def test_what_no_run_could_use_is_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path, **changes)


def test_a_start_that_failed_leaves_its_folder_to_the_next_one(folder, tmp_path):
    with pytest.raises(ValueError, match=r"^lora must hold"):
        run(folder, tmp_path, lora={"rank": 4}, **short())
    assert len(run(folder, tmp_path, **short())) == 3


def test_a_run_that_cannot_be_made_longer_says_how_to_go_on(folder, tmp_path):
    run(folder, tmp_path, **short())
    longer = short(max_steps=5)
    with pytest.raises(
        ValueError, match=r"^training\.max_steps must be .* 3, got 5; .* with model: this run's checkpoint"
    ):
        train(tiny_settings(folder, **longer), tmp_path, resume=True, say=lambda _: None)


def test_an_interrupt_says_where_the_run_goes_on(folder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(PackedTrainer, "log", interrupt_at(4))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_settings(folder), tmp_path, say=said.append)
    assert said[-1] == f"interrupted after step 4; --resume goes on from {tmp_path / 'checkpoint-3'}"


def interrupt_at(step):
    """A `log` that is left by Ctrl-C."""
    log = PackedTrainer.log

    def wrapped(self, *arguments):
        log(self, *arguments)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    return wrapped


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "pattern"), [("document", "anchor"), ("ulysses", "full")])
def test_two_processes_that_share_rows_train_as_one_does(folder, tmp_path, scheme, pattern):
    changes = {"pattern": pattern, "positions": "reset", **short()}
    one = run(folder, tmp_path / "one", **changes)
    two = run_on_processes(2, folder, tmp_path / scheme, parallel=scheme, **changes)
    assert_same_run(two, one)


@pytest.mark.slow
def test_two_pairs_of_processes_train_as_two_processes_with_rows_of_their_own(folder, tmp_path):
    changes = {"packing": {"bos_per_document": True}, "rows_per_step": 8, **short(gradient_accumulation_steps=1)}
    two = run_on_processes(2, folder, tmp_path / "data", **changes)
    four = run_on_processes(4, folder, tmp_path / "pairs", parallel="document", ranks_a_row=2, **changes)
    assert_same_run(four, two)


def assert_same_run(ours, theirs):
    """Counts are equal, losses and gradients to float32's rounding."""
    assert len(ours) == len(theirs) == 3
    for our, their in zip(ours, theirs, strict=True):
        assert all(our[name] == their[name] for name in ("step", "tokens", "lr"))
        for name in ("loss", "grad_norm", "pairs_of_full"):
            assert our[name] == pytest.approx(their[name], rel=2e-6)


def test_processes_that_share_rows_read_the_same_ones_and_others_read_others():
    sharings = [RowSharing.of("document", 2, process, 6) for process in range(6)]
    assert [sharing.reader for sharing in sharings] == [0, 0, 1, 1, 2, 2]
    assert [sharing.rank for sharing in sharings] == [0, 1] * 3
    assert {sharing.readers for sharing in sharings} == {3}
    assert RowSharing.of("ulysses", None, 1, 4).ranks == 4
    with pytest.raises(ValueError, match=r"^ranks_a_row must divide the 6 processes, got 4"):
        RowSharing.of("document", 4, 0, 6)


# --- more refusals ---------------------------------------------------------------------------------------------------


def test_rows_a_step_become_accumulation(folder, tmp_path):
    settings = tiny_settings(folder, rows_per_step=8, training={"gradient_accumulation_steps": 1})
    assert training_arguments(settings, tmp_path, "cpu").gradient_accumulation_steps == 4


def test_what_trainer_must_be_left_to_is_set_whatever_its_default(folder, tmp_path):
    arguments = training_arguments(tiny_settings(folder), tmp_path, "cpu")
    assert all(getattr(arguments, name, value) == value for name, (value, _) in SET_BY_US.items())


def test_missing_data_is_refused(folder, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        run(folder, tmp_path, data={"sources": [{"path": str(tmp_path / "nowhere.jsonl")}]})


def test_too_many_bad_records_end_a_run_in_one_error(folder, tmp_path):
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text("no json\n" * 50 + '{"text": "some text here"}\n' * 50)
    sources = {"sources": [{"path": str(corpus), "bad_records": 5}]}
    with pytest.raises((ValueError, CheckError), match="not JSON"):
        run(folder, tmp_path / "out", data=sources)


def test_defaults_are_a_run_that_somebody_could_start():
    assert settings_from({}).data.sources[0].path == "stdlib"
