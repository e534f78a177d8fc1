"""What the ranks of the sequence-parallel tests run, and the same in one process.

    results = run_on_ranks(4, tuple(CASES), folder)      from one forkserver, which imports torch and transformers once

Every rank saves what it got, case by case; `one_process` says what it should be.
"""

import multiprocessing
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from families import VOCAB_SIZE, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from anchor_attn import AnchorAttention, PackedLayout, anchor_attention, wrap
from anchor_attn.parallel import parallelize, split_batch, ulysses_attention
from anchor_attn.train import PackedCollator

# Installed modules alone: before Python 3.13 the server does not find those of tests/, and says nothing.
PRELOADED = [
    "anchor_attn.parallel.wrapping",
    "anchor_attn.train",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
]

# Row 0 has a document longer than a rank's share; row 1 an interleaved one, and padding.
LENGTHS = [[4, 33, 9, 2, 7, 5, 6, 3], [10, 6, 11, 3, 8, 1, 9, 4]]


@dataclass(frozen=True)
class Case:
    """One way to train a step over several ranks.

    Attributes:
        scheme: as `parallelize`.
        pattern: as `wrap`.
        engine: as `wrap`.
        tolerance: as `parallelize`.
        family: of the tiny model.
        options: of its config.
        policy: of the positions.
        precision: of RoPE.
        training: "plain" (the test means the gradients itself), "ddp" or "fsdp2".
        checkpointing: compute the forward again in the backward.
        split: "model" (it gets the whole batch) or "collator" (it gets its part).
        pad_to_multiple: as `parallelize`.
    """

    scheme: str = "document"
    pattern: str = "anchor"
    engine: str = "varlen"
    tolerance: float | None = 0.1
    family: str = "llama"
    options: dict = field(default_factory=dict)
    policy: str = "continuous"
    precision: str = "model"
    training: str = "plain"
    checkpointing: bool = False
    split: str = "model"
    pad_to_multiple: int = 1


SIX_KEY_HEADS = {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6}

CASES = {
    **{
        f"{scheme}-{pattern}-{engine}": Case(scheme, pattern, engine)
        for scheme, patterns in {
            "document": ["intra_doc", "anchor"],
            "ulysses": ["full", "intra_doc", "anchor"],
        }.items()
        for pattern in patterns
        for engine in ("reference", "varlen")
    },
    **{
        f"whole documents-{pattern}-{engine}": Case("document", pattern, engine, tolerance=None)
        for pattern in ("intra_doc", "anchor")
        for engine in ("reference", "varlen")
    },
    **{
        f"{family}-{scheme}": Case(scheme, family=family)
        for family in ("gemma2", "gpt_oss")  # softcap and windows; sinks and windows
        for scheme in ("document", "ulysses")
    },
    "deepseek_v3-ulysses": Case("ulysses", family="deepseek_v3"),  # values narrower than keys
    "six key heads-ulysses": Case("ulysses", options=SIX_KEY_HEADS),
    **{f"{precision}-document": Case(precision=precision) for precision in ("bfloat16", "float32", "exact")},
    "reset-document": Case(policy="reset"),
    "reset-ulysses": Case("ulysses", policy="reset"),
    "merge-document": Case(engine="varlen/sdpa/merge"),
    "padded-document": Case(pad_to_multiple=16),
    "collator-document": Case(split="collator"),
    "checkpointing-document": Case(checkpointing=True),
    **{
        f"{training}-{scheme}": Case(scheme, training=training, checkpointing=training == "fsdp2")
        for training in ("ddp", "fsdp2")
        for scheme in ("document", "ulysses")
    },
}


# What 4 ranks run in the fast tests; all take them three times as long.
QUICK = (
    "document-anchor-varlen",
    "ulysses-full-varlen",
    "whole documents-intra_doc-reference",
    "gpt_oss-document",
    "six key heads-ulysses",
    "ddp-document",
    "fsdp2-document",
)


def batch_of(policy: str = "continuous") -> dict:
    """Two packed rows with labels; every process makes the same."""
    generator = np.random.default_rng(0)
    rows = []
    for row, lengths in enumerate(LENGTHS):
        ids = np.repeat([0, *range(1, len(lengths) + 1)], [1, *lengths])
        if row == 1:
            ids[ids == 4] = 2  # a later piece of document 2
            ids[ids > 4] -= 1
        tokens = generator.integers(3, VOCAB_SIZE, len(ids))
        tokens[0] = 1
        rows.append({"input_ids": tokens, "document_ids": ids})
    return PackedCollator(policy)(rows)


def model_of(case: Case) -> torch.nn.Module:
    """The case's model, the same in every process."""
    model = tiny_model(case.family, torch.float32, **case.options).train()
    if case.checkpointing:
        name = "activation_checkpointing_enable"
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})
    return wrap(model, pattern=case.pattern, engine=case.engine, rope_precision=case.precision)


def one_process(case: Case) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """Loss, gradients and logits of a step without ranks."""
    model = model_of(case)
    out = model(**batch_of(case.policy))
    out.loss.backward()
    return out.loss.detach(), gradients_of(model), out.logits.detach()


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients by the plain model's names."""
    return {
        name.removeprefix("module."): getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def step_on_a_rank(case: Case, mesh) -> dict:
    """Mean loss and mean gradients over ranks, and this rank's logits with their slots in the whole rows."""
    model = model_of(case)
    parallelize(model, mesh, case.scheme, case.tolerance, case.pad_to_multiple)
    batch = batch_of(case.policy)
    local = split_batch(
        batch, mesh.get_local_rank(), mesh.size(), case.scheme, case.pattern, case.tolerance, case.pad_to_multiple
    )
    if case.training == "ddp":
        model = DistributedDataParallel(model)
    elif case.training == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    out = model(**(local if case.split == "collator" else batch))
    out.loss.backward()
    loss, gradients = out.loss.detach().clone(), gradients_of(model)
    for tensor in (loss, *(gradients.values() if case.training == "plain" else ())):
        dist.all_reduce(tensor)
        tensor /= mesh.size()
    layout = local["document_ids"]
    return {
        "loss": loss,
        "gradients": gradients,
        "logits": out.logits.detach(),
        "slots": layout.slots,
        "shared": layout.shared is not None,
    }


# --- attention alone -------------------------------------------------------------------------------------------------

HEADS = {"as many key heads": (4, 4), "grouped": (4, 2), "one key head": (4, 1)}


def states_of(num_heads: int, num_kv_heads: int, seq_len: int) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    # Values of 6 would leave rows of a single head unaligned, where torch's CPU kernel rounds in another order.
    sizes = [(num_heads, 8), (num_kv_heads, 8), (num_kv_heads, 16), (num_heads, 16)]
    return [torch.randn(2, heads, seq_len, size, generator=generator) for heads, size in sizes]


@cache
def attention_layout() -> PackedLayout:
    """A row of several documents and one of an interleaved one with padding; 96 tokens, a multiple of 2 and 4."""
    ids = torch.zeros(2, 96, dtype=torch.int64)
    ids[0, 1:] = torch.repeat_interleave(torch.arange(1, 6), torch.tensor([10, 40, 5, 23, 17]))
    ids[1, 1:] = torch.repeat_interleave(torch.tensor([1, 2, 1, 3, -1]), torch.tensor([20, 30, 15, 21, 9]))
    return PackedLayout.from_document_ids(ids)


def attend_with_gradients(states: list[torch.Tensor], attend) -> list[torch.Tensor]:
    """Output and the three gradients."""
    *inputs, grad = states
    inputs = [part.clone().requires_grad_() for part in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


ATTENTIONS = {
    f"{heads}-{pattern}-{engine}": (heads, {"pattern": pattern, "engine": engine})
    for heads in HEADS
    for pattern in ("full", "intra_doc", "anchor")
    for engine in ("reference", "varlen")
}
ATTENTIONS["window"] = ("grouped", {"sliding_window": 7})
ATTENTIONS["window, anchor let go"] = ("grouped", {"sliding_window": 7, "keep_anchor": False})
ATTENTIONS["softcap"] = ("grouped", {"softcap": 1.5, "engine": "reference"})
ATTENTIONS["sinks"] = ("grouped", {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])})


def attention_on_a_rank(name: str, mesh) -> list[torch.Tensor]:
    """This rank's tokens of output and gradients by Ulysses."""
    heads, settings = ATTENTIONS[name]
    layout = attention_layout()
    mine = [part.chunk(mesh.size(), 2)[mesh.get_local_rank()] for part in states_of(*HEADS[heads], layout.seq_len)]
    return attend_with_gradients(mine, lambda q, k, v: ulysses_attention(q, k, v, layout, mesh, **settings))


# --- a module of one's own -------------------------------------------------------------------------------------------


def own_module() -> AnchorAttention:
    torch.manual_seed(3)
    return AnchorAttention(32, 4, num_kv_heads=2, rope_theta=100.0, rope_precision="exact", sinks=True)


def hidden_states(layout: PackedLayout) -> torch.Tensor:
    """Token states that depend on the whole row's slots; the anchor's are the same in every row."""
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(layout.batch_size, layout.seq_len, 32, generator=generator)
    states[:, 0] = states[0, 0]
    return states


def module_on_a_rank(scheme: str, mesh) -> dict:
    """Output of this rank's tokens and the summed gradients of a module that knows nothing of ranks."""
    batch = batch_of()
    layout = split_batch(batch, mesh.get_local_rank(), mesh.size(), scheme)["document_ids"].bind(mesh)
    states, real = hidden_states(layout.whole), layout.slots >= 0
    local = states.gather(1, layout.slots.clamp(min=0)[..., None].expand(-1, -1, 32)) * real[..., None]
    module = own_module()
    out = module(local, layout)
    counted = real & ((layout.slots > 0) | (layout.rank == 0))  # the anchor's output on one rank
    (out.square() * counted[..., None]).sum().backward()
    gradients = gradients_of(module)
    for grad in gradients.values():
        dist.all_reduce(grad)
    return {"out": out.detach(), "slots": layout.slots, "gradients": gradients}


# --- bytes -----------------------------------------------------------------------------------------------------------


class ReceivedBytes(TorchDispatchMode):
    """Counts what this rank receives from others in collectives, and refuses one that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if "c10d" in name or "_dtensor" in name:
            if "all_gather_into_tensor" in name:
                self.bytes += out.nbytes - args[0].nbytes
            elif "reduce_scatter_tensor" in name:
                self.bytes += args[0].nbytes - out.nbytes
            elif not any(local in name for local in ("wait_tensor", "_wrap_tensor")):
                raise AssertionError(f"{name} is not counted")
        return out


def all_gather_attention(query, key, value, layout: PackedLayout, mesh) -> torch.Tensor:
    """All-gather context parallel as a textbook has it: every rank gets all keys and values."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    gathered = [
        DTensor.from_local(states, mesh, [Shard(2)])
        .redistribute(placements=[Replicate()])
        .to_local(grad_placements=[Partial()])
        for states in (key, value)
    ]
    empty = torch.zeros(*query.shape[:2], layout.seq_len - query.shape[2], query.shape[3])
    rank, tokens = mesh.get_local_rank(), query.shape[2]
    padded = torch.cat([empty[:, :, : rank * tokens], query, empty[:, :, rank * tokens :]], dim=2)
    return anchor_attention(padded, *gathered, layout)[:, :, rank * tokens :][:, :, :tokens]


def bytes_on_a_rank(mesh) -> dict:
    """Per scheme, the bytes that this rank received in the forward and in the backward of one attention."""
    counts = {}
    layout = attention_layout()
    for name, attend in {"all_gather": all_gather_attention, "ulysses": ulysses_attention}.items():
        mine = [part.chunk(mesh.size(), 2)[mesh.get_local_rank()] for part in states_of(4, 2, layout.seq_len)]
        counts[name] = count_bytes(mine, lambda q, k, v, attend=attend: attend(q, k, v, layout, mesh))
    batch = batch_of()
    for name, tolerance in {"document, some shared": 0.1, "document": None}.items():
        local = split_batch(batch, mesh.get_local_rank(), mesh.size(), tolerance=tolerance)["document_ids"].bind(mesh)
        counts[name] = count_bytes(
            states_of(4, 2, local.seq_len), lambda q, k, v, local=local: anchor_attention(q, k, v, local)
        )
    return counts


def count_bytes(states: list[torch.Tensor], attend) -> tuple[int, int]:
    *inputs, grad = states
    inputs = [part.clone().requires_grad_() for part in inputs]
    with ReceivedBytes() as forward:
        out = attend(*inputs)
    with ReceivedBytes() as backward:
        out.backward(grad)
    return forward.bytes, backward.bytes


# --- processes -------------------------------------------------------------------------------------------------------


def run_rank(rank: int, ranks: int, names: tuple[str, ...], folder: str) -> None:
    """The named steps and all else on one rank; what came out is saved in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    results = {
        "steps": {name: step_on_a_rank(CASES[name], mesh) for name in names},
        "attentions": {name: attention_on_a_rank(name, mesh) for name in ATTENTIONS},
        "modules": {scheme: module_on_a_rank(scheme, mesh) for scheme in ("document", "ulysses")},
        "bytes": bytes_on_a_rank(mesh),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    # Torch 2.13 may wait for ever where a process group ends; see test_wrap_training.
    os._exit(0)


def run_on_ranks(ranks: int, names: tuple[str, ...], folder: Path) -> list[dict]:
    """What each rank got, rank by rank; `names` are those of the steps."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = [context.Process(target=run_rank, args=(rank, ranks, names, str(folder))) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    assert codes == [0] * ranks, f"exit codes {codes}"
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
