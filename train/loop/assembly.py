"""What a run is made of, from its settings: model, stream, collator, Trainer, and where it leaves its traces.

settings ─ tokenizer ─ stream of this process ─ model, extended, with LoRA, wrapped ─ meter and journal ─ PackedTrainer
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anchor_attn.results import describe_environment
from anchor_attn.train.collator import PackedCollator
from anchor_attn.train.loop.checkpoints import Checkpoints, Progress
from anchor_attn.train.loop.losses import LOSSES, LossLog
from anchor_attn.train.loop.settings import SET_BY_US, Settings, training_hints
from anchor_attn.train.loop.sharing import RowSharing
from anchor_attn.train.presets import check_rope, create_model, own_tokenizer
from anchor_attn.train.streaming import PackedStream, StreamSource
from anchor_attn.train.tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from anchor_attn.train.loop.trainer import PackedTrainer


def create_trainer(
    settings: Settings,
    args: "TrainingArguments",
    checkpoints: Checkpoints,
    done: Progress | None,
    device: str,
    say: Callable[[str], None],
    asked_to_stop: Callable[[], bool],
) -> "PackedTrainer":
    """Everything that trains, standing where the checkpoint of `done` left it."""
    from anchor_attn.train.loop.meter import StepMeter, costs_of
    from anchor_attn.train.loop.routers import take_router_loss
    from anchor_attn.train.loop.trainer import Journal, PackedTrainer, describe_parallel

    tokenizer = load_tokenizer(settings.tokenizer or own_tokenizer(settings.model))
    sharing = RowSharing.of(settings.parallel, settings.ranks_a_row, args.process_index, args.world_size)
    stream = open_stream(settings, tokenizer, args, sharing)
    model = build_model(settings, tokenizer)
    router_loss = take_router_loss(model, settings.router_weight)
    if router_loss is not None and sharing.ranks > 1:
        raise ValueError(
            f"router_weight must be 0 where processes share rows, got {router_loss.weight:g}: none of them sees all "
            "tokens that it would balance; pass router_weight: 0, or parallel: data."
        )
    model = sharing.spread(model, device)
    costs = costs_of(model, device)
    bos = settings.packing.bos_per_document
    collator = PackedCollator(
        settings.positions,
        anchor_tokens=settings.packing.anchor_tokens,
        seq_len=settings.packing.seq_len,
        bos_token_id=tokenizer.anchor_token_id if bos else None,
    )
    losses = None
    if args.process_index == 0:
        corpus = {"sources": [asdict(source) for source in settings.data.sources], "tokenizer": tokenizer.name}
        meta = {**describe_environment(device), "settings": asdict(settings), "seeds": [args.seed], "corpus": corpus}
        losses = LossLog(checkpoints.folder / LOSSES, {**meta, "dtype": settings.dtype, "world_size": args.world_size})
        if absent := losses.go_on_after(0 if done is None else done.step):
            say(f"{losses.path} has no line for {len(absent)} steps, {absent[0]} the first: somebody else wrote to it")
    meter = StepMeter(settings.pattern, device, costs, bos, 0 if done is None else done.tokens, sharing.ranks)
    every = settings.training.get("logging_steps", 1)
    journal = Journal(meter, losses, checkpoints, say, every, asked_to_stop)
    collate = sharing.part_of(collator, settings.pattern)
    trainer = PackedTrainer(model, args, stream, collate, journal, router_loss)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{settings.model}: {parameters:,} parameters, {settings.pattern}, {settings.positions} positions, "
        f"{describe_parallel(trainer, settings.training)}{sharing}"
    )
    if done is not None:
        say(f"going on after step {done.step}, from {checkpoints.path(done.step)}")
        trainer.resume_data(checkpoints.path(done.step))
    return trainer


def build_model(settings: Settings, tokenizer: Tokenizer) -> Any:
    """The model of the settings, extended and wrapped, its weights drawn from the seed where none are loaded."""
    from transformers import set_seed

    from anchor_attn.hf import wrap
    from anchor_attn.rope import extend

    set_seed(settings.training.get("seed", 42))
    packing = settings.packing
    model: Any = create_model(
        settings.model,
        tokenizer.vocab_size,
        packing.seq_len * (2 if packing.bos_per_document else 1),
        tokenizer.anchor_token_id,
        scratch=settings.scratch,
        dtype=getattr(torch, settings.dtype),
    )
    if settings.extension is not None:
        extend(model, **settings.extension)
    check_rope(model, settings.positions)
    if settings.lora is not None:
        model = _with_lora(model, dict(settings.lora))
    return wrap(model, settings.pattern, settings.engine, settings.rope)


def _with_lora(model: Any, options: dict[str, Any]) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora must have PEFT, got none; install it with pip install peft.") from error
    try:
        return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **options}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora must hold what PEFT's LoraConfig takes, got {options} ({error}); mend it.") from error


def open_stream(
    settings: Settings, tokenizer: Tokenizer, args: "TrainingArguments", sharing: RowSharing
) -> PackedStream:
    """The rows of this process."""
    data, packing = settings.data, settings.packing
    return PackedStream(
        [StreamSource(**asdict(source)) for source in data.sources],
        packing.seq_len,
        tokenizer=tokenizer,
        anchor_tokens=packing.anchor_tokens,
        packing=packing.method,  # type: ignore[arg-type]  # the stream checks it
        open_rows=packing.open_rows,
        chunk_tokens=packing.chunk_tokens,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        shuffle=data.shuffle,
        window_documents=data.window_documents,
        rank=sharing.reader,
        world_size=sharing.readers,
    )


def training_arguments(settings: Settings, out: Path, device: str) -> "TrainingArguments":
    """Trainer's arguments: those of the settings, and those that have to be what they are.

    Raises:
        ValueError: what TrainingArguments does not take, or rows a step that the processes cannot share.
    """
    from transformers import TrainingArguments

    given = dict(settings.training)
    if device == "cpu":
        given.setdefault("ddp_backend", "gloo" if "RANK" in os.environ else None)
    given |= {
        "output_dir": str(out),
        "use_cpu": device == "cpu",
        **{name: value for name, (value, _) in SET_BY_US.items() if name in training_hints()},
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_total_limit": None,  # the envelope lets go of old checkpoints
        "report_to": given.get("report_to", "none"),
    }
    given.setdefault("save_strategy", "steps")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # names that only one of the releases in use has
            args = TrainingArguments(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training must hold what TrainingArguments takes, got {error}; mend the config.") from error
    if args.n_gpu > 1:
        raise ValueError(
            f"device must be one GPU a process, got {args.n_gpu}; start with torchrun --nproc-per-node {args.n_gpu} "
            "-m anchor_attn.cli train …, or choose one with CUDA_VISIBLE_DEVICES=0."
        )
    if settings.rows_per_step is not None:
        sharing = RowSharing.of(settings.parallel, settings.ranks_a_row, args.process_index, args.world_size)
        at_once = args.per_device_train_batch_size * sharing.readers
        if settings.rows_per_step % at_once:
            raise ValueError(
                f"rows_per_step must be a multiple of the {at_once} rows that {args.world_size} processes take at "
                f"once, got {settings.rows_per_step}; change it, or training.per_device_train_batch_size."
            )
        args.gradient_accumulation_steps = settings.rows_per_step // at_once
    return args
