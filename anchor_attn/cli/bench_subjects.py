"""What `anchor-attn bench` times, subject by subject: inputs from options, files from records."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from anchor_attn.cli import bench_tables as tables
from anchor_attn.lengths import DISTRIBUTIONS, LONGEST_TOKENS, SHORTEST_TOKENS, draw_distribution
from anchor_attn.results import write_csv, write_json

SWEEP = tuple(1024 << power for power in range(8))
SWEPT = tuple(name for name in DISTRIBUTIONS if name != "uniform")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The routes of a CPU at 4,096 tokens: the dense reference takes seconds there, and minutes beyond.
ROUTE_TOKENS = {"cpu": 4096, "cuda": 16_384}
PACKED_TOKENS = 20_000_000


@dataclass(frozen=True)
class Task:
    """What is asked.

    Attributes:
        given: the options that were given, by name.
        rounds: counted, or None.
        seed: of lengths and values.
        device: "cpu" or "cuda".
        out: a folder that can be written.
        meta: what a number depends on besides its inputs.
        say: told what is being done.
    """

    given: dict[str, Any]
    rounds: int | None
    seed: int
    device: str
    out: Path
    meta: dict[str, Any]
    say: Callable[[str], None]

    def shape(self) -> dict[str, Any]:
        """Heads, head size and dtype: as given, or small ones on a CPU and a 7B model's on CUDA."""
        on_cuda = self.device == "cuda"
        heads = self.given.get("heads", "32/8" if on_cuda else "8")
        return {
            "heads": _read_heads(heads),
            "head_dim": _at_least_one("head_dim", self.given.get("head_dim", 128 if on_cuda else 64)),
            "dtype": self.dtype(),
        }

    def dtype(self) -> torch.dtype:
        """As given; else float32 on a CPU, bfloat16 on CUDA."""
        name = self.given.get("dtype", "bfloat16" if self.device == "cuda" else "float32")
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {tuple(DTYPES)}, got {name!r}; pass one of them.")
        return DTYPES[name]

    def lengths(self, distribution: str, seq_len: int) -> list[int]:
        """Documents of a row of `seq_len` tokens, the anchor included.

        Raises:
            ValueError: bounds for another distribution than "uniform", or lengths that do not fit.
        """
        bounds = {"shortest": SHORTEST_TOKENS, "longest": LONGEST_TOKENS}
        given = {name: self.given[name] for name in bounds if name in self.given}
        if given and distribution != "uniform":
            raise ValueError(
                f"shortest and longest must be for distribution='uniform', got {distribution!r}; leave them out."
            )
        return draw_distribution(distribution, seq_len - 1, self.seed, **bounds | given)


@dataclass(frozen=True)
class Outcome:
    """What was found.

    Attributes:
        title: the input, in words.
        meta: of the records.
        records: flat.
        table: for a terminal.
        lines: below it.
        files: written.
    """

    title: str
    meta: dict[str, Any]
    records: list[dict[str, Any]]
    table: Table
    lines: Sequence[str]
    files: Sequence[Path]


def run_attention(task: Task) -> Outcome:
    """Rows of one length, or of a sweep, each of one or several distributions."""
    from anchor_attn.bench.attention import Setting, Sized, bench_attention
    from anchor_attn.bench.report import describe_rates, write_markdown

    sweep, shape = "sweep" in task.given, task.shape()
    if sweep and "seq_len" in task.given:
        raise ValueError(f"seq_len must be left out with --sweep, got {task.given['seq_len']}; pass one of them.")
    names = task.given.get("distribution", ",".join(SWEPT) if sweep else "uniform").split(",")
    rounds = 5 if task.rounds is None else task.rounds
    setting = Setting(
        **shape, device=task.device, rounds=rounds, budget_s=task.given.get("budget_s", 30.0 if sweep else 100.0),
        seed=task.seed, with_flex="flex" in task.given,
    )  # fmt: skip
    rows = [
        Sized(seq_len, name, task.lengths(name, seq_len))
        for seq_len in (SWEEP if sweep else [task.given.get("seq_len", 16_384)])
        for name in names
    ]
    meta = task.meta | _described(shape) | {
        "seed": task.seed, "rounds": rounds, "budget_s": setting.budget_s,
        "document_lengths": [[row.distribution, row.seq_len, *row.lengths] for row in rows],
    }  # fmt: skip
    csv, markdown, picture = (task.out / name for name in ("bench.csv", "bench.md", "bench.png"))
    timings = []
    for found in bench_attention(rows, setting, task.say):
        timings += found
        write_csv(csv, [asdict(timing) for timing in timings], meta)  # a sweep that is stopped keeps its rows
    write_markdown(markdown, timings, meta)
    title = f"attention, {meta['heads']} heads of {meta['head_dim']}, {meta['dtype']}"
    lines, files = [*tables.reasons(timings), *describe_rates(timings)], [csv, markdown]
    try:
        from anchor_attn.bench.report import draw_figure

        draw_figure(timings, f"{title}, {meta['device_name']}").savefig(picture, dpi=150)
        files.append(picture)
    except ImportError:
        lines.append("No picture: pip install matplotlib.")
    records = [asdict(timing) for timing in timings]
    return Outcome(title, meta, records, tables.attention_table(timings), lines, files)


def run_routes(task: Task) -> Outcome:
    """Every route of every kind of call, and the table that the choice reads."""
    from importlib.resources import files

    from anchor_attn.bench.routes import bench_routes, merge_records
    from anchor_attn.masks import PackedLayout

    shape, seq_len = task.shape(), task.given.get("seq_len", ROUTE_TOKENS[task.device])
    lengths = task.lengths("uniform", seq_len)
    layout = PackedLayout.from_lengths([lengths]).to(task.device)
    rounds, budget_s = 5 if task.rounds is None else task.rounds, task.given.get("budget_s", 420.0)
    about = task.meta | _described(shape) | {
        "seed": task.seed, "seq_len": seq_len, "document_lengths": lengths, "rounds": rounds,
    }  # fmt: skip
    name = task.meta["device_name"]
    found = bench_routes(
        layout, **shape, device_name=name, rounds=rounds, budget_s=budget_s, seed=task.seed, say=task.say
    )
    left_out = [f"{' '.join(map(str, case))} {route}: {reason}" for case, route, reason in found.left_out]
    shipped = json.loads((files("anchor_attn.engines") / "measured.json").read_text())
    merged = merge_records(shipped, found.timings, about | {"left_out": left_out})
    path = task.out / "routes.json"
    write_json(path, merged)
    described = f"{len(lengths)} documents of {min(lengths):,}–{max(lengths):,}"
    lines = [*(f"Left out: {line}" for line in left_out)]
    lines.append(f"To let engine='auto' choose by it: cp {path} anchor_attn/engines/measured.json")
    return Outcome(
        f"routes, {seq_len:,} tokens in {described}, {about['dtype']}",
        about, [asdict(timing) for timing in found.timings], tables.route_table(found.timings), lines, [path],
    )  # fmt: skip


def run_step(task: Task) -> Outcome:
    """A training step of a model of one of the sizes."""
    from anchor_attn.bench.step import ONE_BILLION, RIVALS, bench_step
    from anchor_attn.bench.timing import Row
    from anchor_attn.masks import PackedLayout
    from anchor_attn.train.presets import SIZES

    given, sizes = task.given, {**SIZES, "1b": ONE_BILLION}
    size = given.get("size", "laptop")
    if size not in sizes:
        raise ValueError(f"size must be one of {tuple(sizes)}, got {size!r}; pass one of them.")
    seq_len, distribution = given.get("seq_len", 8192), given.get("distribution", "uniform")
    lengths = task.lengths(distribution, seq_len)
    asked = given["rivals"].split(",") if "rivals" in given else list(RIVALS)
    rounds, dtype = 5 if task.rounds is None else task.rounds, task.dtype()
    timings = bench_step(
        Row(PackedLayout.from_lengths([lengths]), distribution),
        sizes[size], rounds, task.device, task.seed,
        dtype=dtype, engine=given.get("engine", "auto"), checkpointing="checkpointing" in given,
        names=asked, budget_s=given.get("budget_s", float("inf")),
    )  # fmt: skip
    meta = task.meta | {
        "dtype": _name(dtype), "size": size, "shapes": sizes[size], "checkpointing": "checkpointing" in given,
        "document_lengths": lengths, "seed": task.seed, "rounds": rounds,
    }  # fmt: skip
    described = f"{len(lengths)} documents of {min(lengths):,}–{max(lengths):,}"
    title = f"step of {size}, {seq_len:,} tokens in {described}, {meta['dtype']}"
    return _write_csv(task, title, meta, timings, tables.step_table(timings), tables.reasons(timings))


def run_masks(task: Task) -> Outcome:
    """Block masks of one length, or of all."""
    from anchor_attn.bench import masks

    seq_len, rounds = task.given.get("seq_len"), 20 if task.rounds is None else task.rounds
    longest = max(masks.MASK_SEQ_LENS)  # the table with the anchor's column takes 4 GB there
    if seq_len is not None and not 2 <= seq_len <= longest:
        raise ValueError(f"seq_len must lie between 2 and {longest:,} for masks, got {seq_len:,}; pass 131072, say.")
    seq_lens = [seq_len] if seq_len else masks.MASK_SEQ_LENS
    timings = masks.bench_masks(seq_lens, rounds, task.seed, task.device)
    exponents = masks.measure_growth(timings)
    title = (
        "mask, blocks of 128, narrow tables, one row of documents of log-normal lengths (6.5, 1.2); "
        "eager: times faster than torch's create_block_mask"
    )
    meta = task.meta | {
        "input": title, "block_size": 128, "growth_with_blocks": exponents, "seed": task.seed, "rounds": rounds,
    }  # fmt: skip
    lines = [f"{name}: seconds ∝ blocks^{exponent:.2f}" for name, exponent in exponents.items()]
    return _write_csv(task, title, meta, timings, tables.mask_table(timings), lines)


def run_packing(task: Task) -> Outcome:
    """Rows of one length, against TRL's."""
    from anchor_attn.train.bench import bench_packing

    rounds = 5 if task.rounds is None else task.rounds
    timings = bench_packing(PACKED_TOKENS, task.given.get("seq_len", 4096), rounds, task.seed)
    absent = any(timing.seconds is None for timing in timings)
    title = (
        f"packing, {timings[0].tokens:,} tokens, documents of log-normal lengths (6.5, 1.2); "
        "wrapped, bfd: times faster than TRL's"
    )
    meta = task.meta | {"input": title, "dtype": "int32", "seed": task.seed, "rounds": rounds}
    lines = ["TRL is not here to compare with: pip install --no-deps trl"] if absent else []
    return _write_csv(task, title, meta, timings, tables.packing_table(timings), lines)


def run_rope(task: Task) -> Outcome:
    """Extension methods of RoPE, on a model that is trained for it."""
    from anchor_attn.cli import bench_rope

    return bench_rope.run_rope(task)


SUBJECTS: dict[str, Callable[[Task], Outcome]] = {
    "attention": run_attention,
    "routes": run_routes,
    "step": run_step,
    "mask": run_masks,
    "packing": run_packing,
    "rope": run_rope,
}


def _write_csv(
    task: Task, title: str, meta: dict[str, Any], timings: Sequence[Any], table: Table, lines: Sequence[str]
) -> Outcome:
    records, path = [asdict(timing) for timing in timings], task.out / "bench.csv"
    write_csv(path, records, meta)
    return Outcome(title, meta, records, table, lines, [path])


def _described(shape: dict[str, Any]) -> dict[str, Any]:
    query_heads, key_heads = shape["heads"]
    return {"heads": f"{query_heads}/{key_heads}", "head_dim": shape["head_dim"], "dtype": _name(shape["dtype"])}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_heads(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"heads must be a number, or query heads/key heads, got {text!r}; pass 8 or 32/8.")
    query_heads, key_heads = int(parts[0]), int(parts[-1])
    if query_heads % key_heads:
        raise ValueError(f"heads must be a multiple of the key heads, got {text!r}; pass 32/8, say.")
    return query_heads, key_heads


def _at_least_one(name: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}; pass 64.")
    return number
