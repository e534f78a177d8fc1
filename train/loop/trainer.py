"""Hugging Face's Trainer on packed rows: our loader, our numbers a step, our envelope around its checkpoints.

get_batch_samples   rows of all micro-batches, timed, their labelled tokens counted over all processes
compute_loss        the model's own loss; the load-balancing loss of document tokens
log                 a line of losses.jsonl; trackers get the same numbers
_save_checkpoint    Trainer's files and the loader's state, hidden until they are whole
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from anchor_attn.results import CheckError
from anchor_attn.train.collator import PackedCollator, SplitCollator
from anchor_attn.train.items import one_line
from anchor_attn.train.loop.checkpoints import UNFINISHED, Checkpoints, Progress
from anchor_attn.train.loop.losses import LossLog
from anchor_attn.train.loop.meter import StepMeter, step_line
from anchor_attn.train.loop.routers import RouterLoss
from anchor_attn.train.streaming import PackedStream, create_loader


@dataclass
class Journal:
    """Where a run leaves its traces.

    Attributes:
        meter: of the steps.
        losses: the file of the steps; None in all processes but the first.
        checkpoints: of the run.
        say: is told what happens, a line at a time.
        say_every: steps a line of the terminal and of the trackers.
        asked_to_stop: whether somebody wants the run to save and end.
    """

    meter: StepMeter
    losses: LossLog | None
    checkpoints: Checkpoints
    say: Callable[[str], None]
    say_every: int
    asked_to_stop: Callable[[], bool]


class PackedTrainer(Trainer):
    """A Trainer of a wrapped model.

    Args:
        model: wrapped.
        args: with logging_steps=1.
        stream: the rows.
        collator: of the rows, or of this process's part of them.
        journal: where the run leaves its traces.
        router_loss: of a mixture of experts; None for other models.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        stream: PackedStream,
        collator: PackedCollator | SplitCollator,
        journal: Journal,
        router_loss: RouterLoss | None = None,
    ) -> None:
        self.stream, self.collator, self.journal, self.router_loss = stream, collator, journal, router_loss
        self.stopped = False
        self._loader_state: dict[str, Any] | None = None
        self._loader: Any = None
        super().__init__(model=model, args=args, train_dataset=stream, data_collator=collator)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if not self.model_accepts_loss_kwargs:
            raise ValueError(
                f"model must divide its loss by num_items_in_batch, got {type(model).__name__}, whose forward takes no "
                "further keywords; its loss would be wrong under gradient accumulation."
            )

    # --- data --------------------------------------------------------------------------------------------------------

    def resume_data(self, checkpoint: Path) -> None:
        """Let the loader go on where it was when this process wrote its part of a checkpoint."""
        path = checkpoint / data_state_name(self.args.process_index)
        self._loader_state = torch.load(path, weights_only=True)

    def get_train_dataloader(self) -> Any:
        """A loader that knows where it stands. Accelerate must not shard it: the stream has done that."""
        workers = self.args.dataloader_num_workers
        self._loader = create_loader(
            self.stream,
            self.args.per_device_train_batch_size,
            self.collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            # Its own, or it would draw from torch's, in a resumed run after that was set to where it stood.
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        if self._loader_state is not None:
            self._loader.load_state_dict(self._loader_state)
        return self._loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, and the labelled tokens in those of all processes."""
        self.journal.meter.start()
        batches, labelled = super().get_batch_samples(self.journal.meter.wait(epoch_iterator), num_batches, device)
        if labelled is None or int(labelled) == 0:
            raise ValueError(
                f"data must hold labelled tokens in every step, got none at step {self.state.global_step + 1}; give it "
                "documents of at least two tokens, or more rows a step."
            )
        return batches, labelled

    # --- a step ------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a micro-batch: its labelled tokens' nats over the labelled tokens of the step."""
        layout = self.journal.meter.add_layout(inputs["document_ids"])
        inputs = {**inputs, "document_ids": layout.to(self.args.device)}
        if self.router_loss is not None:
            inputs["output_router_logits"] = True
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # Trainer has multiplied by the processes, whose gradients are averaged: the mean over them is the step's loss.
        nats, balance = loss.detach().clone(), None
        if self.router_loss is not None:
            balance = self.router_loss(outputs.router_logits, layout)
            loss = loss + self.router_loss.weight * balance / self.current_gradient_accumulation_steps
        self.journal.meter.add_loss(nats, balance)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Write down a step; what Trainer logs besides goes to the trackers alone."""
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        numbers, stop = self.journal.meter.take(self.accelerator.gather, self.journal.asked_to_stop())
        step = self.state.global_step
        record = {
            "step": step,
            "loss": numbers.pop("loss"),
            "tokens": numbers.pop("tokens"),
            "lr": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]),
            **numbers,
        }
        if self.journal.losses is not None:
            self.journal.losses.append(record)
            if step % self.journal.say_every == 0 or step in (1, self.state.max_steps):
                self.journal.say(step_line(record, self.state.max_steps))
        if step % self.journal.say_every == 0:
            super().log({name: value for name, value in record.items() if name != "step"}, start_time)
            self.state.log_history.clear()  # losses.jsonl has it, and every checkpoint would hold all of it again
        if stop:
            self.stopped = self.control.should_save = self.control.should_training_stop = True

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.journal.checkpoints.folder / UNFINISHED)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's checkpoint, in our envelope."""
        checkpoints, step = self.journal.checkpoints, self.state.global_step
        with self._agreed(step):
            staged = checkpoints.unfinished / checkpoints.path(step).name
            if self.args.process_index == 0:
                checkpoints.stage(step)
        with self._agreed(step):
            super()._save_checkpoint(model, trial)
            torch.save(self._loader.state_dict(), staged / data_state_name(self.args.process_index))
        with self._agreed(step):
            if self.args.process_index == 0:
                self._commit(staged, step)

    def _commit(self, staged: Path, step: int) -> None:
        processes = range(self.args.world_size)
        if absent := [name for name in map(data_state_name, processes) if not (staged / name).is_file()]:
            raise OSError(f"{absent[0]} is not there: out must be a folder that all processes see")
        if self.journal.losses is not None:
            self.journal.losses.sync()
        progress = Progress(step, self.journal.meter.tokens, self.args.world_size)
        self.journal.say(f"saved {self.journal.checkpoints.commit(progress)}")

    @contextlib.contextmanager
    def _agreed(self, step: int) -> Iterator[None]:
        """End in all processes alike, with one line where one of them could not write."""
        fault = None
        try:
            yield
        except Exception as error:  # OSError, or what torch and safetensors make of it
            fault = error
        failed = torch.tensor([float(fault is not None)], device=self.args.device)
        if not bool(self.accelerator.gather(failed).any()):
            return
        checkpoints = self.journal.checkpoints
        if self.args.process_index == 0:
            with contextlib.suppress(OSError):
                checkpoints.clear_unfinished()  # a full disk may want it back
        last = checkpoints.steps()
        said = "a fault in another process" if fault is None else one_line(fault)
        kept = f"checkpoint-{last[0]} is as it was" if last else "there is none yet"
        raise CheckError(
            f"checkpoint {step} must be written whole, got {said}; "
            f"free space in {str(checkpoints.folder)!r} and pass --resume: {kept}."
        ) from fault


def data_state_name(process: int) -> str:
    """The file that holds where the loader of a process stands."""
    return f"data_state_{process}.pt"


def describe_parallel(trainer: Trainer, asked: Mapping[str, Any]) -> str:
    """What carries the run: "1 process on cpu", "2 processes on cpu, DDP", "8 processes on cuda, FSDP2".

    Raises:
        ValueError: FSDP was asked for and several processes would train without it.
    """
    world_size, device = trainer.args.world_size, trainer.args.device.type
    processes = f"{world_size} process{'es' if world_size > 1 else ''} on {device}"
    if trainer.is_fsdp_enabled:
        return f"{processes}, FSDP{getattr(trainer.accelerator.state.fsdp_plugin, 'fsdp_version', 1)}"
    if asked.get("fsdp") and world_size > 1:
        raise ValueError(
            f"training.fsdp must have accelerators, got {device}: Accelerate shards nothing there, and would train DDP "
            "without a word; leave fsdp out."
        )
    if trainer.is_deepspeed_enabled:
        return f"{processes}, DeepSpeed"
    left_out = ", FSDP left out: there is nobody to share with" if asked.get("fsdp") else ""
    return processes + (", DDP" if world_size > 1 else "") + left_out
