"""What a training run is asked for: a YAML file, every key of it known, and nothing read that was not asked for.

model: path/to/model
data: {sources: [{path: web.jsonl, weight: 3}, {path: books, weight: 1}]}
packing: {seq_len: 16384}
extension: {method: default, theta: 1e6, target_len: 16384}
training: {max_steps: 2000, learning_rate: 2e-5, bf16: true}      all of transformers' TrainingArguments
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

from anchor_attn.engines.choice import check_engine
from anchor_attn.masks.layout import PositionPolicy, check_position_policy
from anchor_attn.masks.patterns import Pattern, check_pattern_name
from anchor_attn.parallel.balance import check_whole_documents
from anchor_attn.rope.precision import RopePrecision, check_rope_precision
from anchor_attn.train.loop.settings_file import flat, plain, read_as, refuse_unknown, value_as

# What Trainer must be left to, with the reason; a config may repeat the value, and no other.
SET_BY_US: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "Trainer would take document_ids out of the batch"),
    "average_tokens_across_devices": (True, "the loss divides by the labelled tokens of all ranks"),
    "ignore_data_skip": (True, "the stream itself goes on where it was"),
    "logging_strategy": ("steps", "losses.jsonl has a line a step"),
    "logging_nan_inf_filter": (False, "a loss that is no number must be seen"),
    "enable_jit_checkpoint": (False, "SIGTERM saves by itself"),
}
REFUSED: dict[str, str] = {
    "output_dir": "pass --out",
    "resume_from_checkpoint": "pass --resume",
    "num_train_epochs": "a stream has no end; set max_steps",
    "use_cpu": "pass --device cpu",
    "do_train": "train trains",
    "do_eval": "measure a checkpoint after the run",
    "do_predict": "measure a checkpoint after the run",
    "eval_strategy": "measure a checkpoint after the run",
    "eval_on_start": "measure a checkpoint after the run",
    "load_best_model_at_end": "there is no evaluation to choose by",
    "auto_find_batch_size": "a second try would have lost the rows of the first",
    "push_to_hub": "upload the finished checkpoint",
    "save_only_model": "a resumed run needs the optimizer too",
    "train_sampling_strategy": "set data.shuffle",
    "parallelism_config": "use torchrun, with fsdp in training, and parallel beside it",
    "local_rank": "use torchrun",
}
# May differ in a resumed run: where it says something, not what it computes.
FREE = {
    "training.logging_steps", "training.logging_first_step", "training.report_to", "training.run_name",
    "training.project", "training.log_level", "training.log_level_replica", "training.log_on_each_node",
    "training.disable_tqdm", "training.save_steps", "training.save_strategy", "training.save_total_limit",
    "training.dataloader_prefetch_factor", "training.dataloader_pin_memory", "training.skip_memory_metrics",
    "training.ddp_timeout", "training.trackio_space_id",
}  # fmt: skip
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


@dataclass(frozen=True)
class Source:
    """Where documents come from, as `StreamSource`."""

    path: str = "stdlib"
    weight: float = 1.0
    text_column: str = "text"
    split: str = "train"
    subset: str | None = None
    tag: str | None = None
    long_tokens: int | None = None
    long_factor: float = 1.0
    bad_records: int = 100


@dataclass(frozen=True)
class Data:
    """The mixture.

    Attributes:
        sources: drawn from by their weights.
        shuffle: documents in a drawn order, or as they lie.
        window_documents: how many the shuffle reaches over.
    """

    sources: tuple[Source, ...] = (Source(),)
    shuffle: bool = True
    window_documents: int = 4096


@dataclass(frozen=True)
class Packing:
    """How documents become rows, as `PackedStream` and `PackedCollator`.

    Attributes:
        seq_len: tokens a row, the anchor included.
        method: "concat", "best_fit" or "drop".
        anchor_tokens: at the front of every row.
        open_rows: of best_fit.
        chunk_tokens: interleave chunks of so many tokens; whole documents when None.
        bos_per_document: every document begins with a BOS of its own.
    """

    seq_len: int = 4096
    method: str = "concat"
    anchor_tokens: int = 1
    open_rows: int = 64
    chunk_tokens: int | None = None
    bos_per_document: bool = False


@dataclass(frozen=True)
class Settings:
    """All that a run depends on besides its machine.

    Attributes:
        model: a size ("tiny", "laptop", "small"), a config file (*.json), or a checkpoint's name or folder.
        scratch: take a checkpoint's config alone, and draw its weights from the seed.
        dtype: of the weights; `training.bf16` computes in bfloat16 over float32 weights.
        tokenizer: as `load_tokenizer`; the model's own when None and the model is a checkpoint, else "bytes".
        data: the mixture.
        packing: how documents become rows.
        pattern: "full", "intra_doc" or "anchor".
        positions: "continuous" over the row, or "reset" at every document.
        engine: as `anchor_attention`.
        rope: precision of the rotation, as `wrap`.
        extension: arguments of `extend`: method, factor or target_len, theta, …; none when None.
        lora: arguments of PEFT's LoraConfig; all weights are trained when None.
        router_weight: of the load-balancing loss of a mixture of experts; what the model's config says when None.
        rows_per_step: rows an optimizer step over all processes; sets the accumulation. From `training` when None.
        parallel: "data": every process has rows of its own; "document" or "ulysses": processes share rows, as
            `parallelize`.
        ranks_a_row: processes that share a row; all when None.
        training: arguments of transformers' TrainingArguments.
    """

    model: str = "laptop"
    scratch: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    tokenizer: str | None = None
    data: Data = Data()
    packing: Packing = Packing()
    pattern: Pattern = "anchor"
    positions: PositionPolicy = "continuous"
    engine: str = "auto"
    rope: RopePrecision = "model"
    extension: Mapping[str, Any] | None = None
    lora: Mapping[str, Any] | None = None
    router_weight: float | None = None
    rows_per_step: int | None = None
    parallel: Literal["data", "document", "ulysses"] = "data"
    ranks_a_row: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


def settings_from(content: Mapping[str, Any]) -> Settings:
    """Settings from what a config file holds; all that can be checked without a model and without data is.

    Raises:
        ValueError: an unknown key, or a value that no run could use; the message names the key.
        TypeError: a value of another type.
    """
    settings = read_as(Settings, content, "")
    check_pattern_name(settings.pattern)
    check_position_policy(settings.positions)
    check_engine(settings.engine)
    check_rope_precision(settings.rope)
    _check_parallel(settings)
    if not settings.data.sources:
        raise ValueError("data.sources must name at least one, got none; pass {path: …}.")
    if settings.rows_per_step is not None and settings.rows_per_step < 1:
        raise ValueError(f"rows_per_step must be at least 1, got {settings.rows_per_step}; pass 8, say.")
    if settings.extension is not None and "method" not in settings.extension:
        raise ValueError(
            f"extension must have a method, got {sorted(settings.extension)}; pass {{method: default, theta: 1e6, …}}."
        )
    _check_training(settings)
    return settings


def _check_parallel(settings: Settings) -> None:
    if settings.parallel == "document":
        check_whole_documents(settings.pattern)
    if settings.ranks_a_row is None:
        return
    if settings.parallel == "data":
        raise ValueError(
            f"ranks_a_row must be left out where parallel is 'data', got {settings.ranks_a_row}; "
            "set parallel: document."
        )
    if settings.ranks_a_row < 2:
        raise ValueError(f"ranks_a_row must be at least 2, got {settings.ranks_a_row}; or set parallel: data.")


def _check_training(settings: Settings) -> None:
    training = settings.training
    refuse_unknown(training, training_hints(), "training.")
    for name, (value, reason) in SET_BY_US.items():
        if training.get(name, value) != value:
            raise ValueError(f"training.{name} must be {value}, got {training[name]!r}; leave it out: {reason}.")
    for name, advice in REFUSED.items():
        # What does nothing may stand there: a file that somebody wrote out whole.
        if training.get(name) not in (None, False, "no"):
            raise ValueError(f"training.{name} must be left out, got {training[name]!r}; {advice}.")
    if training.get("save_strategy", "steps") not in ("steps", "no"):
        raise ValueError(
            f"training.save_strategy must be steps or no, got {training['save_strategy']!r}; a stream has no epochs."
        )
    if training.get("gradient_accumulation_steps", 1) != 1 and settings.rows_per_step is not None:
        raise ValueError(
            "rows_per_step must stand alone, got it beside training.gradient_accumulation_steps; leave one out."
        )
    for name, hint in training_hints().items():
        if training.get(name) is not None and is_number(hint):
            value_as(hint, training[name], f"training.{name}")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if training.get(name, 1) < 1:
            raise ValueError(f"training.{name} must be at least 1, got {training[name]}; pass 1, say.")
    for name in ("save_steps", "logging_steps"):
        if not (isinstance(steps := training.get(name, 1), int) and steps >= 1):
            raise ValueError(f"training.{name} must be a whole number of steps, got {steps!r}; pass 100, say.")


def first_difference(ours: Settings, theirs: Settings) -> str | None:
    """The first key in which a resumed run differs from the one that it goes on with; None where none counts.

    A run may be made longer only where the learning rate of a step does not depend on the last one.
    """
    first, second = flat(plain(asdict(ours))), flat(plain(asdict(theirs)))
    free = set(FREE)
    if ours.training.get("lr_scheduler_type") in CONSTANT_SCHEDULES:
        free.add("training.max_steps")
    for key in sorted(first.keys() | second.keys()):
        if key not in free and first.get(key) != second.get(key):
            return key
    return None


def describe_at(settings: Settings, key: str) -> str:
    """What stands at a flat key, for an error line."""
    values = flat(plain(asdict(settings)))
    return repr(values[key]) if key in values else "its default"


@cache
def training_hints() -> Mapping[str, Any]:
    """The arguments of the TrainingArguments that is installed, and their types."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {name: hints[name] for name in sorted(one.name for one in fields(TrainingArguments) if one.init)}


def is_number(hint: Any) -> bool:
    """Whether a type is of numbers, truth values and nothing else."""
    return set(get_args(hint) or (hint,)) <= {int, float, bool, NoneType}
