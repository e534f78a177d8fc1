"""`anchor-attn bench rope`: the embedded documents as token streams, and what is said of the readings."""

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from anchor_attn.cli.bench_subjects import Outcome, Task
from anchor_attn.cli.options import by_options
from anchor_attn.results import write_csv, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from anchor_attn.bench.rope import Plan
    from anchor_attn.bench.rope_readings import MethodReadings
    from anchor_attn.train.documents import Documents

SOURCE = "stdlib"
OPTIONS = ("seq_len",)  # fields of the plan
HELD_OUT, SEARCHED = 0.15, 0.05  # of the files, by the hash of their names
# Small enough for a test: it shows that all runs, and nothing about the methods.
QUICK: dict[str, Any] = {
    "seq_len": 32, "times": (1, 2, 4), "tuned_times": 4, "steps": 8, "tune_steps": 2, "batch_tokens": 256,
    "windows": 4, "scored_tokens": 16, "search_windows": 2,
    "model_size": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "search": {"population": 7, "mutations": 1, "crossovers": 1, "rounds": 1, "parents": 3},
}  # fmt: skip


def run_rope(task: Task) -> Outcome:
    """Train a small model on short rows, and read it at up to 16 times their length under every method."""
    from anchor_attn.bench.rope import bench_rope
    from anchor_attn.bench.rope_findings import judge
    from anchor_attn.bench.rope_readings import STAGES, MethodReadings
    from anchor_attn.bench.rope_report import describe_stage, draw_readings_figure, write_markdown
    from anchor_attn.train import read_documents

    if task.rounds is not None:
        raise ValueError(f"--rounds must be for what is timed, got {task.rounds} for bench rope; leave it out.")
    plan = _plan(task)
    documents = read_documents(SOURCE)
    training, unseen = documents.split_by_file(HELD_OUT)
    held_out, searched = unseen.split_by_file(SEARCHED)
    try:
        readings, found = bench_rope(
            _stream(training), _stream(searched), _stream(held_out), plan, task.device, task.seed, task.say
        )
    except ValueError as error:
        raise ValueError(by_options(str(error), OPTIONS)) from error
    meta = task.meta | {
        "seed": task.seed, "dtype": "float32", "corpus": documents.meta, "plan": plan.describe(), **found,
    }  # fmt: skip
    records = [reading.record() for reading in readings]
    all_readings = MethodReadings(readings)
    findings = judge(all_readings, plan)
    meta["findings"] = [{"claim": each.claim, "verdict": each.verdict, "found": each.found} for each in findings]
    csv, markdown, as_json = (task.out / f"bench.{kind}" for kind in ("csv", "md", "json"))
    write_csv(csv, records, meta)
    write_json(as_json, {"meta": meta, "records": records})
    write_markdown(markdown, all_readings, plan, meta)
    title = (
        f"rope, perplexity of {plan.windows} × {plan.scored_tokens} held-out tokens, "
        f"trained at {plan.seq_len} tokens, {plan.steps} steps"
    )
    lines = ["A quick run: what it finds means nothing."] if "quick" in task.given else []
    lines += map(str, findings)
    files = [csv, as_json, markdown]
    try:
        draw_readings_figure(all_readings, plan, f"{title}, {meta['device_name']}").savefig(task.out / "bench.png")
        files.append(task.out / "bench.png")
    except ImportError as missing:
        lines.append(f"No picture: {missing}")
    sections = [(describe_stage(stage, plan), stage) for stage in STAGES]
    return Outcome(title, meta, records, _table(all_readings, plan, sections), lines, files)


def _plan(task: Task) -> "Plan":
    from anchor_attn.bench.rope import Plan

    given = {name: task.given[name] for name in OPTIONS if name in task.given}
    try:
        return Plan(**((QUICK if "quick" in task.given else {}) | given))
    except ValueError as error:
        raise ValueError(by_options(str(error), OPTIONS)) from error


def _stream(documents: "Documents") -> "Tensor":
    """The bytes of all documents in a row, an anchor token in front of each."""
    import numpy as np
    import torch

    from anchor_attn.train.tokenizers import ByteTokenizer

    tokenizer = ByteTokenizer()
    anchor = np.array([tokenizer.anchor_token_id])
    encoded = tokenizer.encode(documents.dataset["text"][:])
    return torch.from_numpy(np.concatenate([part for ids in encoded for part in (anchor, ids)]).astype(np.int64))


def _table(readings: "MethodReadings", plan: "Plan", sections: list[tuple[str, Any]]) -> Table:
    from anchor_attn.bench.rope_report import LOWEST, table_rows

    table = Table(box=box.SIMPLE_HEAD, caption=f"* {LOWEST}", caption_justify="left")
    table.add_column("method", max_width=22)  # titles of sections stand there too, and may wrap
    for times in readings.times:
        table.add_column(f"{times} ×\n{times * plan.seq_len:,}", justify="right", no_wrap=True)
    for title, stage in sections:
        table.add_row(f"[b]{title}[/b]")
        for row in table_rows(readings, stage):
            table.add_row(*row)
        table.add_section()
    return table
