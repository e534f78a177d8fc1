"""A run from its beginning or from where a kill left it, to its end or to SIGTERM.

settings ─ folder locked, config.yaml ─ newest sound checkpoint ─ create_trainer ─ steps ─ how it ended
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anchor_attn.hf.progress import without_progress_bars
from anchor_attn.results import check_device, check_folder, check_seed
from anchor_attn.train.loop.assembly import create_trainer, training_arguments
from anchor_attn.train.loop.checkpoints import Checkpoints, Progress
from anchor_attn.train.loop.disk import locked, write_text
from anchor_attn.train.loop.losses import LOSSES
from anchor_attn.train.loop.settings import Settings, describe_at, first_difference, settings_from
from anchor_attn.train.loop.settings_file import read_yaml, write_yaml
from anchor_attn.train.presets import check_model

if TYPE_CHECKING:
    from transformers import TrainingArguments

CONFIG = "config.yaml"
LONGER = " with model: this run's checkpoint (lr_scheduler_type: constant lets a run be made longer)"


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
            with without_progress_bars():  # every checkpoint would draw some
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except KeyboardInterrupt:
            kept = str(checkpoints.path(saved[0])) if (saved := checkpoints.steps()) else "step 1"
            said(f"interrupted after step {trainer.state.global_step}; --resume goes on from {kept}")
            raise
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
    path, losses = checkpoints.folder / CONFIG, checkpoints.folder / LOSSES
    # One that ended before its first step, by a setting that did not hold, left nothing to go on from.
    begun = bool(checkpoints.steps()) or (losses.exists() and losses.stat().st_size > 0)
    if begun and not resume:
        raise ValueError(
            f"out must be a folder without a run, got {str(checkpoints.folder)!r}; pass --resume to go on with that "
            "run, or name another folder."
        )
    if begun and path.exists():
        before = settings_from(read_yaml(path))
        if key := first_difference(settings, before):
            raise ValueError(
                f"{key} must be what the run began with, {describe_at(before, key)}, got {describe_at(settings, key)}; "
                f"see {path}, or name another --out{LONGER if key == 'training.max_steps' else ''}."
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


@contextlib.contextmanager
def asking_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came, as a function, instead of the end of the process."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


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
