"""Full, intra-document and anchor attention on the same tokens: what is the difference, and what did it cost?

documents ─ split by file ─┬─ packed by seed ─ one process an arm and seed ─ records ─ paired differences
                           └─ held out: alone behind the anchor, and packed
"""

import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from anchor_attn.engines.choice import check_engine
from anchor_attn.intervals import UNITS_FOR_AN_INTERVAL, mean_interval
from anchor_attn.masks.layout import PackedLayout
from anchor_attn.results import (
    CheckError,
    check_device,
    check_folder,
    check_seed,
    describe_environment,
    write_json,
    write_jsonl,
)
from anchor_attn.train.documents import Documents, read_documents
from anchor_attn.train.packing import CUTS, Cut, PackedRows, pack_documents
from anchor_attn.train.presets import check_model, own_tokenizer
from anchor_attn.train.run import Arm, RunSpec, run_arm
from anchor_attn.train.tokenizers import Tokenizer, load_tokenizer

HELD_OUT_SHARE = 0.1
PATIENCE_S = 10
NAMED = 3  # documents left out for one reason, by name on the terminal


@dataclass(frozen=True)
class Comparison:
    """What to compare, on what.

    Attributes:
        arms: names as `Arm.parse` reads them.
        seeds: each gives initial weights and a row order that all arms share; three or more give an interval.
        data: as `read_documents`.
        text_column: as `read_documents`.
        tokenizer: as `load_tokenizer`; the model's own when None and the model is a checkpoint, else "bytes".
        model: as `create_model`.
        seq_len: tokens a row, the anchor included.
        steps: optimizer steps of each run.
        batch_size: rows a step.
        learning_rate: peak of the cosine.
        cut: as `pack_documents`.
        held_out_rows: rows of held-out documents to measure on.
        engine: as `anchor_attention`.
        device: "cpu" or "cuda".
        dtype: "float32", or "bfloat16" for autocast over float32 weights.
        out: folder of the results.
    """

    arms: tuple[str, ...] = ("full", "intra_doc", "anchor")
    seeds: tuple[int, ...] = (0,)
    data: str = "stdlib"
    text_column: str = "text"
    tokenizer: str | None = None
    model: str = "laptop"
    seq_len: int = 4096
    steps: int = 120
    batch_size: int = 1
    learning_rate: float = 3e-3
    cut: Cut = "continue"
    held_out_rows: int = 12
    engine: str = "auto"
    device: str = "cpu"
    dtype: str = "float32"
    out: Path = Path("runs/compare")


@dataclass(frozen=True)
class Difference:
    """How two arms differ on one measure, seed by seed.

    Attributes:
        first: an arm.
        second: another arm.
        mean: of first minus second over the seeds.
        low: lower end of the 95 % interval, paired t; None below three seeds.
        high: its upper end.
    """

    first: str
    second: str
    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return f"{self.first} − {self.second}: a run diverged, nothing can be said"
        text = f"{self.first} − {self.second}: {self.mean:+.4f} nats"
        if self.low is None or self.high is None:
            return f"{text} (no interval below {UNITS_FOR_AN_INTERVAL} seeds)"
        verdict = "no difference seen" if self.low <= 0 <= self.high else "a difference"
        return f"{text}, 95 % [{self.low:+.4f}, {self.high:+.4f}]: {verdict}"


@dataclass(frozen=True)
class Result:
    """What a comparison found.

    Attributes:
        meta: where the numbers come from.
        records: one an arm and seed, with `curve`, the losses by step.
        example: the layout of the first training row, for a picture.
    """

    meta: dict[str, Any]
    records: list[dict[str, Any]]
    example: PackedLayout

    def of_arm(self, arm: str) -> list[dict[str, Any]]:
        """The records of one arm, by seed."""
        return [record for record in self.records if record["arm"] == arm]

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in order."""
        return list(dict.fromkeys(record["arm"] for record in self.records))

    def differences(self, key: str = "held_out_loss") -> list[Difference]:
        """Every pair of arms, compared seed by seed."""
        return [
            paired_difference(first, second, *([record[key] for record in self.of_arm(arm)] for arm in (first, second)))
            for first, second in combinations(self.arms, 2)
        ]


def paired_difference(first: str, second: str, ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """First minus second over paired seeds, with a 95 % paired t interval from three seeds on."""
    found = mean_interval([our - their for our, their in zip(ours, theirs, strict=True)])
    return Difference(first, second, found.mean, found.low, found.high)


def compare(settings: Comparison, say: Callable[[str], None] = lambda _: None) -> Result:
    """Train every arm on every seed, each in a process of its own, and write `results.json`.

    Args:
        settings: what to compare.
        say: is told what happens, a line at a time.

    Returns:
        The result; per-step losses lie in `runs/<arm>-seed<k>/losses.jsonl` under `settings.out`.

    Raises:
        ValueError: a setting, a source or a model that cannot be used.
        CheckError: a run that died.
    """
    arms = [Arm.parse(name) for name in settings.arms]
    _check(settings)
    documents = read_documents(settings.data, text_column=settings.text_column)
    say(f"{documents.source}: {len(documents):,} documents, {len(documents.skipped):,} left out")
    for reason, count in documents.skipped_by_reason.items():
        names = [skipped.name for skipped in documents.skipped if skipped.reason == reason]
        say(f"  {count:,} {reason}: {', '.join(names[:NAMED])}{', …' if count > NAMED else ''}")
    train, held_out = documents.split_by_file(HELD_OUT_SHARE)
    tokenizer = load_tokenizer(settings.tokenizer or own_tokenizer(settings.model))
    held_out = _without_twins(held_out, train)
    held = _hold_out(held_out, settings, tokenizer)
    say(f"trained on {len(train):,} documents, {len(held_out):,} held out, {len(held.alone):,} of them measured")

    def pack(seed: int) -> PackedRows:
        rows = settings.steps * settings.batch_size
        return pack_documents(
            train, settings.seq_len, tokenizer=tokenizer, cut=settings.cut, shuffle_seed=seed, max_rows=rows
        )

    first_rows = pack(settings.seeds[0])
    if not any(len(row["input_ids"]) > 2 for row in held.alone):
        raise ValueError(
            "data must hold documents of at least two tokens, got shorter ones only; pass other documents."
        )
    say(str(first_rows.report))
    meta = _meta(settings, documents, first_rows, held)
    _forget_runs(settings.out / "runs")
    records: list[dict[str, Any]] = []
    names_of_arms = [arm.name for arm in arms]
    for turn, seed in enumerate(settings.seeds):
        rows = pack(seed) if turn else first_rows
        # Each seed begins with another arm: none always meets the coldest machine.
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
            say(f"{arm.name}, seed {seed}: {settings.steps} steps of {settings.batch_size} × {settings.seq_len:,}")
            spec = _spec(settings, arm, seed, tokenizer)
            record = _run_in_own_process(spec, rows, held.packed, held.alone)
            write_jsonl(spec.out / "losses.jsonl", record["curve"], meta)
            records.append(record)
            records.sort(key=lambda record: (record["seed"], names_of_arms.index(record["arm"])))
            flat = [{key: value for key, value in record.items() if key != "curve"} for record in records]
            write_json(settings.out / "results.json", {"meta": meta, "records": flat})
    return Result(meta, records, PackedLayout.from_lengths([first_rows[0]["document_lengths"]]))


def _forget_runs(folder: Path) -> None:
    """Remove the losses that an earlier comparison left in the same place, and nothing else."""
    for losses in folder.glob("*/losses.jsonl"):
        losses.unlink()
        losses.with_name("losses.jsonl.meta.json").unlink(missing_ok=True)
        if not any(losses.parent.iterdir()):
            losses.parent.rmdir()


def _spec(settings: Comparison, arm: Arm, seed: int, tokenizer: Tokenizer) -> RunSpec:
    return RunSpec(
        arm=arm,
        seed=seed,
        model=settings.model,
        vocab_size=tokenizer.vocab_size,
        anchor_token_id=tokenizer.anchor_token_id,
        seq_len=settings.seq_len,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        engine=settings.engine,
        device=settings.device,
        dtype=settings.dtype,
        out=settings.out / "runs" / f"{arm.name}-seed{seed}",
    )


def _check(settings: Comparison) -> None:
    """Raise for settings that no run could use, before anything is read."""
    arms = [Arm.parse(name).name for name in settings.arms]  # two spellings of one arm are one arm
    for name, values in (("arms", arms), ("seeds", settings.seeds)):
        if not values:
            raise ValueError(f"{name} must name at least one, got none; pass one.")
        if len(set(values)) != len(values):
            raise ValueError(f"{name} must differ, got {', '.join(map(str, values))}; name each once.")
    least = {"seq_len": 3, "steps": 1, "batch_size": 1, "held_out_rows": 1}  # an anchor, a token, and one to predict
    for name, smallest in least.items():
        if (value := getattr(settings, name)) < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}; pass more.")
    for seed in settings.seeds:
        check_seed(seed)
    if not 0 < settings.learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be positive, got {settings.learning_rate}; pass 3e-3, say.")
    if settings.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {settings.dtype!r}; pass one of them.")
    if settings.cut not in CUTS:
        raise ValueError(f"cut must be one of {CUTS}, got {settings.cut!r}; pass one of them.")
    check_model(settings.model)
    check_engine(settings.engine)
    check_device(settings.device)
    check_folder(settings.out)


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents to measure on.

    Attributes:
        documents: how many were held out; `alone` holds those of them that `packed` does.
        packed: as in training.
        alone: the same documents, a row each.
        cut_documents: documents longer than a row, and measured up to its end.
    """

    documents: int
    packed: PackedRows
    alone: list[dict[str, Any]]
    cut_documents: int


def _without_twins(held_out: Documents, train: Documents) -> Documents:
    """Held-out documents whose content is not trained on.

    Raises:
        ValueError: none is left.
    """
    column = train.dataset.column_names[-1]
    trained = {str(content) for content in train.dataset[column]}
    kept = [place for place, content in enumerate(held_out.dataset[column]) if str(content) not in trained]
    if not kept:
        raise ValueError(
            f"data must hold different documents, got {len(held_out)} held out that are all trained on too; "
            "pass more documents."
        )
    return held_out.select(kept)


def _hold_out(held_out: Documents, settings: Comparison, tokenizer: Tokenizer) -> HeldOut:
    documents = held_out.dataset.shuffle(seed=0)
    seq_len, rows = settings.seq_len, settings.held_out_rows
    packed = pack_documents(documents, seq_len, tokenizer=tokenizer, cut=settings.cut, max_rows=rows)
    empty = set(packed.report.empty_documents)
    read = packed.report.documents - packed.report.unread_documents
    singles: list[PackedRows] = []
    for row in documents:
        if len(singles) == read:
            break
        if row["name"] not in empty:
            singles.append(pack_documents([row], seq_len, tokenizer=tokenizer, cut="drop"))
    cut_documents = sum(single.report.dropped_documents for single in singles)
    return HeldOut(len(held_out), packed, [single[0] for single in singles], cut_documents)


def _run_in_own_process(
    spec: RunSpec, rows: PackedRows, packed: PackedRows, alone: list[dict[str, Any]]
) -> dict[str, Any]:
    """`run_arm` in a fresh process: its peak memory is its own, and no arm inherits another's state."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, spec, rows, packed, alone), name=spec.arm.name)
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        process.join()
        raise CheckError(
            f"arm {spec.arm.name} of seed {spec.seed} must run to its end, got exit code {process.exitcode}; "
            "see what it said above."
        ) from None
    except BaseException:
        process.join(PATIENCE_S)  # an interrupt reaches it too, and it has semaphores to give back
        process.terminate()
        raise
    finally:
        process.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _child(
    sender: Connection, spec: RunSpec, rows: PackedRows, packed: PackedRows, alone: list[dict[str, Any]]
) -> None:
    try:
        sender.send(run_arm(spec, rows, packed, alone))
    except (ValueError, TypeError, ImportError, OSError) as error:  # the caller's to mend: one line there
        sender.send(ValueError(str(error) or type(error).__name__))
    except KeyboardInterrupt:
        sys.exit(130)


def _meta(settings: Comparison, documents: Documents, rows: PackedRows, held: HeldOut) -> dict[str, Any]:
    return {
        **describe_environment(settings.device),
        "settings": {**asdict(settings), "out": str(settings.out)},
        "dtype": settings.dtype,
        "seeds": list(settings.seeds),
        "corpus": documents.meta,
        "corpus_hash": documents.corpus_hash,
        "tokenizer": rows.tokenizer.name,
        "held_out": {
            "documents": len(held.alone),
            "of_documents": held.documents,
            "packed_rows": len(held.packed),
            "cut_documents": held.cut_documents,
        },
        "packing": asdict(rows.report),
        "document_lengths": asdict(rows.report.document_lengths),
        "unigram_loss": unigram_loss(rows, held.alone),
    }


def unigram_loss(rows: PackedRows, held_out: Sequence[dict[str, Any]]) -> float:
    """Nats per held-out document token of a model that knows only how frequent each token is in training rows."""
    counts = np.bincount(rows.tokens, minlength=rows.tokenizer.vocab_size) + 1.0
    anchors = rows.anchor_tokens
    unseen = np.concatenate([row["input_ids"][anchors + 1 :] for row in held_out])
    return float(-np.log(counts / counts.sum())[unseen].mean())
