"""A training run from its settings: model, rows, Trainer, and what makes it survive.

settings ─ folder locked, config.yaml ─ newest sound checkpoint ─ model ─ wrap ─ PackedTrainer ─ losses.jsonl
"""

import contextlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anchor_attn.results import check_device, check_folder, check_seed, describe_environment
from anchor_attn.train.checkpoints import Checkpoints, Progress, locked
from anchor_attn.train.collator import PackedCollator
from anchor_attn.train.losses import LossLog
from anchor_attn.train.presets import SIZES, check_model, create_model
from anchor_attn.train.run import check_rope
from anchor_attn.train.settings import Settings, first_difference, settings_from, value_at
from anchor_attn.train.settings_file import read_yaml, write_yaml
from anchor_attn.train.streaming import PackedStream
from anchor_attn.train.streaming_source import StreamSource
from anchor_attn.train.tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from anchor_attn.train.trainer import PackedTrainer

CONFIG = "config.yaml"
LOSSES = "losses.jsonl"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: that it reached.
        steps: that it was asked for.
        checkpoint: the newest; None where nothing was saved.
        stopped: whether SIGTERM ended it.
    """

    step: int
    steps: int
    checkpoint: Path | None
    stopped: bool


def train(
    settings: Settings, out: Path, device: str = "cpu", *, resume: bool = False, say: Callable[[str], None] = print
) -> Outcome:
    """Train, or go on.

    Args:
        settings: of the run.
        out: its folder: config.yaml, losses.jsonl, the checkpoints and `latest`.
        device: "cpu" or "cuda".
        resume: go on from the newest sound checkpoint in `out`, from the start where there is none.
        say: is told what happens, a line at a time; by the first process alone.

    Raises:
        ValueError: settings that no run could use, a folder that holds another run, or data without an end of faults.
        CheckError: the disk does not take a checkpoint; the one before stays.
    """
    check_device(device)
    check_seed(settings.training.get("seed", 0))
    check_model(settings.model)
    is_first = int(os.environ.get("RANK", "0")) == 0
    steps = settings.training.get("max_steps", -1)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"training.max_steps must be at least 1, got {steps!r}; a stream has no end, pass --steps.")
    said = say if is_first else lambda _: None
    if is_first:
        check_folder(out)
    with asking_to_stop() as asked_to_stop, locked(out, say) if is_first else contextlib.nullcontext():
        args = training_arguments(settings, out, device)  # torchrun's processes meet here
        checkpoints = Checkpoints(out, settings.training.get("save_total_limit"))
        done = _from_first(args, lambda: open_folder(settings, checkpoints, args.world_size, resume, said))
        if done is not None and done.step >= steps:
            said(f"nothing left to do: {checkpoints.path(done.step)} has {done.step} of {steps} steps")
            return Outcome(done.step, steps, checkpoints.path(done.step), False)
        trainer = create_trainer(settings, args, checkpoints, done, device, said, asked_to_stop)
        checkpoint = None if done is None else checkpoints.path(done.step)
        try:
            with _no_progress_bars():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            if trainer.journal.losses is not None:
                trainer.journal.losses.close()
        saved = checkpoints.steps()
        return Outcome(trainer.state.global_step, steps, checkpoints.path(saved[0]) if saved else None, trainer.stopped)


def open_folder(
    settings: Settings, checkpoints: Checkpoints, world_size: int, resume: bool, say: Callable[[str], None]
) -> Progress | None:
    """How far the run in a folder is, None where it begins; its config is written, or found to be the same.

    Raises:
        ValueError: another run is there, or this one without `resume`, or one of other settings or processes.
    """
    path = checkpoints.folder / CONFIG
    if path.exists() and not resume:
        raise ValueError(
            f"out must be a folder without a run, got {str(checkpoints.folder)!r}; pass --resume to go on with that "
            "run, or name another folder."
        )
    if path.exists():
        before = settings_from(read_yaml(path))
        if key := first_difference(settings, before):
            raise ValueError(
                f"{key} must be what the run began with, {value_at(before, key)!r}, got {value_at(settings, key)!r}; "
                f"see {path}, or name another --out."
            )
    write_text(path, write_yaml(settings))
    checkpoints.clear_unfinished()
    done = checkpoints.newest(say) if resume else None
    if resume and done is None:
        say("no checkpoint to go on from: beginning at step 1")
    elif done is not None and done.world_size != world_size:
        raise ValueError(
            f"processes must be as many as the run began with, {done.world_size}, got {world_size}; the rows of a rank "
            "are its own."
        )
    return done


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
    from anchor_attn.train.meter import StepMeter, costs_of
    from anchor_attn.train.routers import take_router_loss
    from anchor_attn.train.trainer import Journal, PackedTrainer, describe_parallel

    tokenizer = load_tokenizer(settings.tokenizer or _tokenizer_of(settings))
    stream = open_stream(settings, tokenizer, args)
    model = build_model(settings, tokenizer)
    router_loss = take_router_loss(model, settings.router_weight)
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
    meter = StepMeter(settings.pattern, device, costs, bos, 0 if done is None else done.tokens)
    every = settings.training.get("logging_steps", 1)
    journal = Journal(meter, losses, checkpoints, say, every, asked_to_stop)
    trainer = PackedTrainer(model, args, stream, collator, journal, router_loss)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{settings.model}: {parameters:,} parameters, {settings.pattern}, {settings.positions} positions, "
        f"{describe_parallel(trainer, settings.training)}"
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


def open_stream(settings: Settings, tokenizer: Tokenizer, args: "TrainingArguments") -> PackedStream:
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
        rank=args.process_index,
        world_size=args.world_size,
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
        "remove_unused_columns": False,
        "average_tokens_across_devices": True,
        "ignore_data_skip": True,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
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
        at_once = args.per_device_train_batch_size * args.world_size
        if settings.rows_per_step % at_once:
            raise ValueError(
                f"rows_per_step must be a multiple of the {at_once} rows that {args.world_size} processes take at "
                f"once, got {settings.rows_per_step}; change it, or training.per_device_train_batch_size."
            )
        args.gradient_accumulation_steps = settings.rows_per_step // at_once
    return args


@contextlib.contextmanager
def asking_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came, as a function, instead of the end of the process."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all, on the disk when this returns."""
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without transformers' bars, which every checkpoint would draw."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer_of(settings: Settings) -> str:
    return "bytes" if settings.model in SIZES or settings.model.endswith(".json") else settings.model


def _from_first(args: "TrainingArguments", ask: Callable[[], Any]) -> Any:
    """What the first process finds, or raises, in all of them."""
    found: list[Any] = [None]
    if args.process_index == 0:
        try:
            found = [ask()]
        except (ValueError, TypeError, OSError) as error:
            found = [error]
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]
