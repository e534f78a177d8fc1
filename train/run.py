"""One run: an arm of the comparison, a seed, the Hugging Face Trainer, and a record of what came out."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from anchor_attn.masks import PATTERNS, attended_pairs
from anchor_attn.masks.dialects.copied import IGNORED_LABEL
from anchor_attn.masks.layout import PositionPolicy
from anchor_attn.masks.patterns import Pattern
from anchor_attn.rope.precision import RopePrecision
from anchor_attn.train.collator import PackedCollator
from anchor_attn.train.packing import PackedRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP_STEPS = 3  # left out of tokens_per_s
LAST_SHARE = 10  # `loss` is the mean over the last tenth of the steps
POSITION_BUCKETS = (0, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Arm:
    """What one arm of a comparison does differently; all arms see the same document tokens in the same order.

    Attributes:
        pattern: "full", "intra_doc" or "anchor".
        position_policy: "continuous" over the row, or "reset" at every document.
        bos_per_document: every document begins with a BOS of its own, so that it has an attention sink without the
            shared anchor.
        rope_precision: as `wrap`.
    """

    pattern: Pattern
    position_policy: PositionPolicy = "continuous"
    bos_per_document: bool = False
    rope_precision: RopePrecision = "model"

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Read an arm's name: a pattern, then "+reset" and "+bos" as wanted.

            Arm.parse("intra_doc+reset+bos")

        Raises:
            ValueError: an unknown pattern or option.
        """
        pattern, *options = name.strip().split("+")
        if pattern not in PATTERNS or set(options) - {"reset", "bos"} or len(options) != len(set(options)):
            raise ValueError(
                f"arm must be one of {', '.join(PATTERNS)}, with +reset or +bos behind it, got {name!r}; "
                "for example intra_doc+reset."
            )
        policy: PositionPolicy = "reset" if "reset" in options else "continuous"
        return cls(pattern, policy, "bos" in options)

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        reset = "+reset" if self.position_policy == "reset" else ""
        return self.pattern + reset + ("+bos" if self.bos_per_document else "")


@dataclass(frozen=True)
class RunSpec:
    """All that a run depends on besides its rows.

    Attributes:
        arm: what this arm does.
        seed: of the initial weights and of the row order.
        model: as `create_model`.
        vocab_size: of the tokenizer.
        anchor_token_id: the anchor, and the BOS of arms that have one a document.
        seq_len: tokens a row.
        steps: optimizer steps.
        batch_size: rows a step.
        learning_rate: peak of the cosine.
        engine: as `anchor_attention`.
        device: "cpu" or "cuda".
        dtype: "float32", or "bfloat16" for autocast over float32 weights.
        out: the run's folder.
    """

    arm: Arm
    seed: int
    model: str
    vocab_size: int
    anchor_token_id: int
    seq_len: int
    steps: int
    batch_size: int
    learning_rate: float
    engine: str
    device: str
    dtype: str
    out: Path


def run_arm(spec: RunSpec, rows: PackedRows, packed: PackedRows, alone: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Train one arm and measure it.

    Args:
        spec: the run.
        rows: training rows, read in order, again from the front when they run out.
        packed: rows of held-out documents, packed as in training.
        alone: the same documents, a row each.

    Returns:
        The record of this run, and `curve`: per step the loss in nats per labelled token, the document tokens so far
        and the seconds so far.
    """
    from transformers import set_seed

    from anchor_attn.hf import set_pattern, wrap
    from anchor_attn.train.presets import check_rope, create_model

    set_seed(spec.seed)
    # A BOS per document makes rows longer, by one token a document at most: positions must reach there.
    max_positions = spec.seq_len * (2 if spec.arm.bos_per_document else 1)
    model = create_model(spec.model, spec.vocab_size, max_positions, spec.anchor_token_id)
    check_rope(model, spec.arm.position_policy)
    wrap(model, pattern=spec.arm.pattern, engine=spec.engine, rope_precision=spec.arm.rope_precision)
    collator = collator_of(spec)
    training = _train(spec, model, rows, collator)
    peak = peak_bytes(spec.device)
    model.eval()
    packed_losses = measure_loss(model, packed, collator, spec.dtype)
    own_losses = measure_loss(model, alone, collator, spec.dtype)
    # Plain causal behind the anchor for every arm, and without a BOS: the same rows, so that arms may be compared.
    set_pattern(model, "full")
    alone_losses = measure_loss(model, alone, PackedCollator(), spec.dtype)
    curve = training.curve
    seconds = np.diff([step["seconds"] for step in curve], prepend=0.0)
    tokens = np.diff([step["tokens"] for step in curve], prepend=0)
    settled = slice(min(WARM_UP_STEPS, spec.steps - 1), None)
    return {
        "arm": spec.arm.name,
        **asdict(spec.arm),
        "seed": spec.seed,
        "steps": spec.steps,
        "seq_len": spec.seq_len,
        "step_s": float(np.median(seconds[settled])),
        "tokens_per_s": float(tokens[settled].sum() / seconds[settled].sum()),
        "loss": float(np.mean([step["loss"] for step in curve[-max(1, spec.steps // LAST_SHARE) :]])),
        "held_out_loss": alone_losses.mean(),
        "held_out_loss_as_trained": own_losses.mean(),
        "held_out_loss_packed": packed_losses.mean(),
        "held_out_loss_by_position": alone_losses.by_position(),
        "attended_pairs": float(np.mean(training.pairs)),
        "pairs_of_full": float(np.sum(training.pairs) / np.sum(training.full_pairs)),
        "peak_bytes": peak,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "curve": curve,
    }


def collator_of(spec: RunSpec) -> PackedCollator:
    """The collator that an arm's rows go through."""
    bos = spec.anchor_token_id if spec.arm.bos_per_document else None
    return PackedCollator(spec.arm.position_policy, bos_token_id=bos)


@dataclass(frozen=True)
class Training:
    """What was trained on, noted while it happened.

    Attributes:
        curve: per step the loss in nats per labelled token, the document tokens so far and the seconds so far.
        pairs: per row, the pairs that the arm attended.
        full_pairs: per row, those that plain causal attention would have.
    """

    curve: list[dict[str, float]] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    full_pairs: list[int] = field(default_factory=list)


def _train(spec: RunSpec, model: "PreTrainedModel", rows: PackedRows, collator: PackedCollator) -> Training:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    training = Training()
    losses: list[Tensor] = []
    tokens = 0

    class NotingTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal tokens
            layout = inputs["document_ids"]
            bos_tokens = layout.num_documents if spec.arm.bos_per_document else 0
            tokens += sum(map(sum, layout.document_lengths)) - bos_tokens
            training.pairs.extend(attended_pairs(layout, spec.arm.pattern))
            training.full_pairs.extend(attended_pairs(layout, "full"))
            result = super().compute_loss(model, inputs, *args, **kwargs)
            losses.append((result[0] if isinstance(result, tuple) else result).detach())
            return result

        def log(self, *_: Any, **__: Any) -> None:
            """The record says it; Trainer would print a dictionary through the progress bar."""

    class StepClock(TrainerCallback):
        """Seconds and tokens at the end of each step; data loading is inside, evaluation is not."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            loss = float(torch.stack(losses).sum())  # waits for the device, so the clock below is honest
            losses.clear()
            seconds = time.perf_counter() - self.start
            training.curve.append({"step": len(training.curve) + 1, "loss": loss, "tokens": tokens, "seconds": seconds})

    arguments = TrainingArguments(
        output_dir=str(spec.out),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, spec.steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        seed=spec.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=spec.device == "cpu",
        bf16=spec.dtype == "bfloat16",
        dataloader_pin_memory=spec.device != "cpu",
    )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"device must be one GPU for a comparison, got {arguments.n_gpu}; choose one with CUDA_VISIBLE_DEVICES=0."
        )
    trainer = NotingTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[StepClock()]
    )
    trainer.train()
    return training


@dataclass(frozen=True)
class TokenLosses:
    """Losses in nats of labelled tokens, each with its place in its document."""

    nats: Tensor
    places: Tensor

    def mean(self) -> float:
        """Nats per labelled token."""
        return float(self.nats.mean())

    def by_position(self) -> list[dict[str, float]]:
        """Mean loss by place in the document, in buckets that hold a token; each is named by its first place."""
        bucket = torch.bucketize(self.places, torch.tensor(POSITION_BUCKETS), right=True) - 1
        return [
            {
                "first_position": POSITION_BUCKETS[index],
                "tokens": int((bucket == index).sum()),
                "loss": float(self.nats[bucket == index].mean()),
            }
            for index in bucket.unique().tolist()
        ]


@torch.no_grad()
def measure_loss(
    model: "PreTrainedModel",
    rows: PackedRows | Sequence[dict[str, Any]],
    collator: Callable[[Sequence[Any]], dict[str, Any]],
    dtype: str,
) -> TokenLosses:
    """The loss of every labelled token of some rows, a row at a time.

    Returns:
        Losses in float32, on the host.
    """
    nats, places = [], []
    device = next(model.parameters()).device
    for index in range(len(rows)):
        batch = {name: value.to(device) for name, value in collator([rows[index]]).items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        labelled = labels != IGNORED_LABEL
        nats.append(losses[labelled].cpu())
        places.append(batch["document_ids"].document_ranks()[:, 1:][labelled].cpu())
    return TokenLosses(torch.cat(nats), torch.cat(places))


def peak_bytes(device: str) -> int:
    """CUDA's peak, or the peak resident size of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
