"""Wrapped models under what people train with: dropout, checkpointing, autocast, PEFT, Trainer, DDP, FSDP2."""

import copy
import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from families import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from anchor_attn import unwrap, wrap
from anchor_attn.hf import is_wrapped
from anchor_attn.train import PackedCollator

# Two rows, cut differently, the second padded.
ROWS = [{"input_ids": list(range(3, 4 + sum(lengths))), "document_lengths": lengths} for lengths in ([7, 5, 2], [4, 6])]
BATCH = PackedCollator()(ROWS)
LAYOUT = BATCH["document_ids"]

# `checkpointing_enable` and its argument have another name in transformers 5.23, and PEFT asks by the old one.
renamed = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")


def gradients_of(model, named=lambda name: name):
    """Parameter gradients by name."""
    return {named(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def train_step(model, **changes):
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(**{**BATCH, **changes}).loss
    loss.backward()
    return loss.detach(), {name: grad.clone() for name, grad in gradients_of(model).items()}


def assert_same_step(ours, theirs, relative=1e-12):
    """Losses and all gradients, measured by the largest of each tensor."""
    (loss, gradients), (expected_loss, expected) = ours, theirs
    torch.testing.assert_close(loss, expected_loss, rtol=relative, atol=0)
    assert gradients.keys() == expected.keys()
    assert expected
    for name, grad in expected.items():
        atol = relative * float(grad.abs().max())
        torch.testing.assert_close(gradients[name], grad, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def enable_checkpointing(model, **kwargs):
    """`gradient_checkpointing_enable`, by the name that this transformers does not warn about."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(kwargs)


# --- dropout ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("engine", ["reference", "varlen"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_attention_dropout_keeps_the_mean_of_a_layer_and_changes_nothing_in_evaluation(family, engine):
    layers = {"num_hidden_layers": 1} | ({"layer_types": ["sliding_attention"]} if family == "gpt_oss" else {})
    model = wrap(tiny_model(family, attention_dropout=0.3, **layers), engine=engine)
    outs = []
    model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: outs.append(out[0]))
    without = wrap(tiny_model(family, **layers), engine=engine)(**BATCH).logits
    assert torch.equal(model(**BATCH).logits, without)

    expected = outs.pop()
    model.train()
    torch.manual_seed(0)
    for _ in range(400):
        model(**BATCH)
    draws = torch.stack(outs)
    error, deviation = (draws.mean(0) - expected).abs(), draws.std(0)
    # Of these 900 means, the farthest may be 4 standard errors off; float64 rounds where nothing is drawn (padding).
    assert (error <= 5 * deviation / 400**0.5 + 1e-12).all()
    assert (deviation[LAYOUT.document_ids >= 0].amax(-1) > 1e-3).all()


@torch.no_grad()
def test_flex_has_no_dropout_and_says_so():
    model = wrap(tiny_model("llama", torch.float32, attention_dropout=0.1), engine="flex").train()
    with pytest.raises(ValueError, match=r"^engine='flex' .*dropout"):
        model(**BATCH)


# --- checkpointing, precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True], ids=["layout", "tensor"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_checkpointing_changes_no_gradient(family, use_reentrant, as_tensor):
    model = wrap(tiny_model(family)).train()
    expected = train_step(model)
    enable_checkpointing(model, use_reentrant=use_reentrant)

    assert_same_step(train_step(model, document_ids=LAYOUT.document_ids if as_tensor else LAYOUT), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_drops_the_same_weights_again(use_reentrant):
    model = wrap(tiny_model("llama", attention_dropout=0.3)).train()
    torch.manual_seed(5)
    expected = train_step(model)
    assert train_step(model)[0] != expected[0]  # other draws
    enable_checkpointing(model, use_reentrant=use_reentrant)
    torch.manual_seed(5)

    assert_same_step(train_step(model), expected)


def test_torchs_own_checkpoint_around_the_model_changes_no_gradient():
    model = wrap(tiny_model("llama")).train()
    expected = train_step(model)
    model.zero_grad()
    loss = checkpoint(model, use_reentrant=False, **BATCH).loss
    loss.backward()

    assert_same_step((loss.detach(), gradients_of(model)), expected)


@pytest.mark.parametrize("engine", ["reference", "varlen"])
def test_autocast_trains_in_bfloat16_near_float32(engine):
    model = wrap(tiny_model("llama", torch.float32), engine=engine).train()
    loss, gradients = train_step(model)
    with torch.autocast("cpu", torch.bfloat16):
        low_loss, low_gradients = train_step(model)
        assert model(**BATCH).logits.dtype == torch.bfloat16

    torch.testing.assert_close(low_loss, loss, rtol=1e-2, atol=0)
    assert low_gradients.keys() == gradients.keys()
    assert (
        min(
            float(torch.cosine_similarity(low_gradients[name].flatten(), grad.flatten(), dim=0))
            for name, grad in gradients.items()
        )
        > 0.99
    )


# --- PEFT ------------------------------------------------------------------------------------------------------------


def with_adapters(model):
    """LoRA whose second factors are not the zeros that they begin as, the same each time."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return adapted


def adapted_models(plain):
    """A model with adapters, wrapped in each order."""
    pytest.importorskip("peft")
    inside = with_adapters(copy.deepcopy(plain))
    wrap(inside.get_base_model())
    return {
        "wrap, then PEFT": with_adapters(wrap(copy.deepcopy(plain))),
        "PEFT, then wrap": wrap(with_adapters(copy.deepcopy(plain))),
        "PEFT, then wrap inside": inside,
    }


@renamed
def test_adapters_train_alike_in_each_order_and_nothing_else_does():
    plain = tiny_model("llama", torch.float32)
    models = adapted_models(plain)
    without = wrap(copy.deepcopy(plain))(**BATCH).loss
    steps = {order: train_step(model.train()) for order, model in models.items()}
    expected = steps["wrap, then PEFT"]

    for order, model in models.items():
        assert is_wrapped(model), order
        assert {name for name, _ in model.named_parameters() if "lora_" in name} == steps[order][1].keys(), order
        assert_same_step(steps[order], expected, 1e-6)
        assert (steps[order][0] - without).abs() > 1e-3, "the adapters do nothing"


@renamed
def test_adapters_do_not_hide_missing_document_ids():
    for model in adapted_models(tiny_model("llama", torch.float32)).values():
        with pytest.raises(ValueError, match=r"^document_ids must be given to a wrapped LlamaForCausalLM"):
            model.train()(input_ids=BATCH["input_ids"])
        with pytest.raises(ValueError, match=r"^document_ids must be given to a wrapped LlamaForCausalLM"):
            model.eval()(input_ids=BATCH["input_ids"], labels=BATCH["labels"])


@renamed
@torch.no_grad()
def test_adapters_are_saved_loaded_merged_and_unwrapped(tmp_path):
    peft = pytest.importorskip("peft")
    plain = tiny_model("llama", torch.float32)
    for order, model in adapted_models(plain).items():
        packed = model.eval()(**BATCH).logits
        model.save_pretrained(tmp_path / order)
        loaded = wrap(peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / order))
        assert torch.equal(loaded.eval()(**BATCH).logits, packed), order

        merged = loaded.merge_and_unload()
        assert is_wrapped(merged)
        torch.testing.assert_close(merged(**BATCH).logits, packed, rtol=0, atol=1e-5 * float(packed.abs().max()))
        assert unwrap(model) is model
        assert not is_wrapped(model)
        assert torch.equal(
            model(input_ids=BATCH["input_ids"]).logits, with_adapters(copy.deepcopy(plain))(BATCH["input_ids"]).logits
        )


# --- Trainer and Accelerate ------------------------------------------------------------------------------------------


@renamed
@pytest.mark.parametrize("low_precision", [False, True], ids=["float32", "bfloat16"])
def test_trainer_takes_the_steps_of_a_plain_loop_with_checkpointing_and_autocast(tmp_path, low_precision):
    model = wrap(tiny_model("llama", torch.float32)).train()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    losses = []
    for row in ROWS:
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            loss = twin(**PackedCollator()([row])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", bf16=low_precision, train_sampling_strategy="sequential",
        remove_unused_columns=False, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        logging_strategy="no", **{name: True},
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=ROWS, data_collator=PackedCollator())
    result = trainer.train()

    assert result.training_loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()), msg=name)


def test_accelerate_prepares_a_wrapped_model_its_batches_and_its_offloading():
    model = wrap(tiny_model("llama", torch.float32)).train()
    expected = train_step(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(ROWS, batch_size=2, collate_fn=PackedCollator())
    prepared, loader = accelerator.prepare(model, loader)
    prepared.zero_grad()
    (inputs,) = loader
    loss = prepared(**inputs).loss
    accelerator.backward(loss)

    assert_same_step((loss.detach(), gradients_of(prepared)), expected)
    assert is_wrapped(accelerator.unwrap_model(prepared))
    offloaded = cpu_offload(copy.deepcopy(model).eval(), torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(offloaded(**BATCH).logits, model.eval()(**BATCH).logits)


# --- DDP and FSDP2: two gloo processes against one -------------------------------------------------------------------

SHARDINGS = ["ddp", "fsdp2"]


def train_on_a_rank(rank, folder):
    """A step on this rank's row for each way of sharding, wrapped before and after; rank 0 writes what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for sharding in SHARDINGS:
        for wrapped_first in (True, False):
            for checkpointing in (False, True):
                model = tiny_model("llama", torch.float32).train()
                if checkpointing:
                    enable_checkpointing(model, use_reentrant=False)
                if wrapped_first:
                    wrap(model)
                if sharding == "ddp":
                    sharded = DistributedDataParallel(model)
                else:
                    for layer in model.model.layers:
                        fully_shard(layer, mesh=mesh)
                    sharded = fully_shard(model, mesh=mesh)
                if not wrapped_first:
                    wrap(model)
                loss = sharded(**PackedCollator()([ROWS[rank]])).loss
                loss.backward()
                mean = loss.detach().clone()
                dist.all_reduce(mean)
                gradients = {
                    name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                    for name, grad in gradients_of(model).items()
                }
                results[sharding, wrapped_first, checkpointing] = mean / 2, gradients
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    # Torch 2.13 may wait for ever where a process group ends: its destructor holds the GIL and joins a thread that
    # wants it, to forget the Python state of the last all-reduce.
    os._exit(0)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Per sharding, order and checkpointing: the mean loss and the whole gradients of two processes."""
    if not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(train_on_a_rank, args=(str(folder),), nprocs=2)
    return torch.load(folder / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("wrapped_first", [True, False], ids=["wrapped before", "wrapped after"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_train_as_one_does(two_processes, sharding, wrapped_first, checkpointing):
    model = wrap(tiny_model("llama", torch.float32)).train()
    losses = [model(**PackedCollator()([row])).loss for row in ROWS]
    loss = torch.stack(losses).mean()
    loss.backward()

    assert_same_step(
        two_processes[sharding, wrapped_first, checkpointing], (loss.detach(), gradients_of(model)), relative=1e-5
    )
