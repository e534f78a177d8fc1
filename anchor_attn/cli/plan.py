"""`anchor-attn plan`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from anchor_attn.cli.options import errors_by_options
from anchor_attn.cli.tables import create_table

if TYPE_CHECKING:
    from anchor_attn.train.plan import Device, ModelShape, Rates, TrainingPlan
    from anchor_attn.train.plan.calibration import Prediction, StepSeconds

LOCAL = ("cpu", "cuda")
CALIBRATION_TOKENS = 8192
VALIDATION_TOKENS = (4096, 8192, 16_384)
MOST_LOCAL_PARAMETERS = 2e9  # a model that is measured here is built here, with gradients and moments

MODEL_HELP = (
    "llama-2-7b, llama-3-8b, llama-3-70b, mistral-7b-v0.3, qwen1.5-1.8b, tiny, laptop, small, 1b, a config file, or a "
    "checkpoint's folder or hub name; its weights are not read. llama-2-7b, and laptop on this machine."
)
LENGTHS_HELP = (
    "Of documents: uniform, web-text, all-short, one-long, prolong-like; numbers to draw from, 300,50,161; or a file."
)
DEVICE_HELP = (
    "a100, a100-40gb, h100, h100-pcie, h200, b200, gb200, l40s, mi300x; cpu or cuda measures this machine first."
)


@errors_by_options
def plan_command(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    seq_len: Annotated[
        str | None, typer.Option(help="Tokens a row, the anchor included; several with commas. 4096 … 1048576.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help=f"{LENGTHS_HELP} web-text, and uniform on this machine.")] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "a100",
    devices: Annotated[int | None, typer.Option(help="How many; 8, and 1 on this machine.")] = None,
    ranks_a_row: Annotated[
        int | None,
        typer.Option(
            help="Devices that share a row, where a scheme shares rows; a node's, or the fewest more that hold it."
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Rows a step, all devices together; one a device.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the peak that the dense layers reach; 0.5.")] = None,
    attention_mfu: Annotated[
        float | None, typer.Option(help="Share of the peak that attention reaches in the tiles it computes; 0.5.")
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option(help="Whether layers keep their inputs alone; where the memory needs it.")
    ] = None,
    fused_loss: Annotated[
        bool, typer.Option("--fused-loss", help="Logits are never held at once, as in Liger.")
    ] = False,
    validate: Annotated[
        bool,
        typer.Option(
            "--validate", help="Measure steps of 4K, 8K and 16K too, and say how wrong the plan is (cpu, cuda)."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of document lengths.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of plan.json, plan.png and plan.html.")] = Path("runs/plan"),
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead of the tables.")] = False,
) -> None:
    """Say what a training step would cost under each pattern and parallel scheme: operations, memory, bytes, seconds.

    Without an argument: LLaMA-2-7B on 8 A100, rows of 4K to 1M tokens, documents as long as those of the web.
    """
    from anchor_attn.results import check_device, check_folder, describe_environment
    from anchor_attn.train.plan import Cluster, describe_model, list_findings, plan_training, read_lengths
    from anchor_attn.train.plan.training import SWEEP

    is_local = device in LOCAL
    if is_local:
        check_device(device)
    if validate and not is_local:
        raise ValueError(f"validate must be for this machine, got --device {device}; pass --device cpu.")
    check_folder(out)
    documents = read_lengths(lengths or ("uniform" if is_local else "web-text"), seed)
    shape = describe_model(model or ("laptop" if is_local else "llama-2-7b"))
    count = (1 if is_local else 8) if devices is None else devices
    sizes = _numbers(seq_len) if seq_len is not None else list(VALIDATION_TOKENS if is_local else SWEEP)
    say = (lambda line: None) if as_json else Console(stderr=True, highlight=False, soft_wrap=True).print
    kind, rates, predictions = _rates(device, shape, count, (mfu, attention_mfu), validate, seed, say)
    cluster = Cluster(
        kind,
        count,
        rates,
        rows=count if rows is None else rows,
        ranks_a_row=ranks_a_row,
        dtype="float32" if device == "cpu" else "bfloat16",
        checkpointing=checkpointing,
        fused_loss=fused_loss,
    )
    plan = plan_training(shape, cluster, documents, sizes)
    meta = {
        **describe_environment(device if is_local else "cpu"),
        "model": asdict(shape),
        "cluster": asdict(cluster),
        "lengths": documents.name,
        "document_lengths": {tokens: [list(row) for row in drawn[:1]] for tokens, drawn in plan.rows.items()},
        "rows_drawn": {tokens: len(drawn) for tokens, drawn in plan.rows.items()},
        "seed": seed,
    }
    findings = list_findings(plan)
    _write(out, plan, meta, findings, predictions)
    if as_json:
        typer.echo((out / "plan.json").read_text(encoding="utf-8"), nl=False)
        return
    _say(plan, findings, predictions, out)


def _rates(
    device: str,
    shape: "ModelShape",
    devices: int,
    shares: tuple[float | None, float | None],
    validate: bool,
    seed: int,
    say: Any,
) -> "tuple[Device, Rates, list[Prediction]]":
    """What a device reaches: a share of its peak, or what this machine was measured at."""
    from anchor_attn.train.plan import calibrate, expect_rates, find_device, predict_steps
    from anchor_attn.train.plan.calibration import PATTERNS_OF_RATES, local_device
    from anchor_attn.train.plan.devices import ATTENTION_MFU, MFU

    if device not in LOCAL:
        kind, (mfu, attention_mfu) = find_device(device), shares
        rates = expect_rates(
            kind, MFU if mfu is None else mfu, ATTENTION_MFU if attention_mfu is None else attention_mfu
        )
        return kind, rates, []
    if devices != 1:
        raise ValueError(f"devices must be 1 for this machine, got {devices}; name a kind of device.")
    for name, share in zip(("mfu", "attention_mfu"), shares, strict=True):
        if share is not None:
            raise ValueError(f"{name} must be left out for this machine, got {share}; its rates are measured.")
    kind, measured = local_device(device), _measured(shape, device, validate, seed, say)
    calibration = [
        step for step in measured if step.seq_len == CALIBRATION_TOKENS and step.pattern in PATTERNS_OF_RATES
    ]
    rates = calibrate(shape, kind.tile, calibration)
    predictions = predict_steps(shape, kind.tile, rates, measured, calibration) if validate else []
    return kind, rates, predictions


def _measured(shape: "ModelShape", device: str, validate: bool, seed: int, say: Any) -> "list[StepSeconds]":
    from anchor_attn.lengths import draw_distribution
    from anchor_attn.masks import PATTERNS
    from anchor_attn.train.plan import measure_steps
    from anchor_attn.train.plan.calibration import PATTERNS_OF_RATES
    from anchor_attn.train.plan.models import size_fields

    size = size_fields(shape.name)
    if size is None or shape.parameters > MOST_LOCAL_PARAMETERS:
        raise ValueError(
            f"model must be a size that this machine can train, to be measured, got {shape.name!r}; "
            "pass tiny, laptop, small or 1b, or name a kind of device."
        )
    lengths = VALIDATION_TOKENS if validate else (CALIBRATION_TOKENS,)
    say(f"Measuring steps of {shape.name} at {', '.join(f'{tokens:,}' for tokens in lengths)} tokens …")
    rows = [draw_distribution("uniform", tokens - 1, seed) for tokens in lengths]
    dtype = "float32" if device == "cpu" else "bfloat16"
    return measure_steps(
        dict(size),
        rows,
        PATTERNS if validate else PATTERNS_OF_RATES,
        device,
        seed,
        dtype=dtype,  # type: ignore[arg-type]
    )


def _write(
    out: Path, plan: "TrainingPlan", meta: dict[str, Any], findings: list[str], predictions: "list[Prediction]"
) -> None:
    from anchor_attn.results import write_json
    from anchor_attn.train.plan.report import draw_plan, write_page

    content = {
        "meta": meta,
        "records": [asdict(step) for step in plan.steps],
        "findings": findings,
        "predictions": [asdict(found) for found in predictions],
    }
    write_json(out / "plan.json", content)
    figure = draw_plan(plan)
    figure.savefig(out / "plan.png", dpi=150)
    write_page(out / "plan.html", plan, findings, predictions, meta, figure)


def _say(plan: "TrainingPlan", findings: list[str], predictions: "list[Prediction]", out: Path) -> None:
    from anchor_attn.train.plan import report
    from anchor_attn.train.plan.findings import short

    console, seq_len = Console(highlight=False, soft_wrap=True), report.detailed_length(plan)
    console.print(report.describe_plan(plan) + "\n", markup=False)
    console.print(create_table(report.BY_LENGTH, report.lines_by_length(plan)), crop=False)
    console.print("attention: of full's forward, in operations; c: with checkpointing; *: does not fit\n", markup=False)
    console.print(f"By scheme, at {short(seq_len)}; attn. and weights: what a rank receives in a step", markup=False)
    console.print(create_table(report.BY_SCHEME, report.lines_by_scheme(plan, seq_len)), crop=False)
    for line in report.reasons(plan, seq_len):
        console.print(line, markup=False)
    if predictions:
        console.print(create_table(report.BY_PREDICTION, report.lines_of_predictions(predictions)), crop=False)
    for line in (*findings, *report.describe_assumptions(plan)):
        console.print(f"- {line}", markup=False)
    files = ", ".join(str(out / name) for name in ("plan.json", "plan.png", "plan.html"))
    console.print(f"\nWritten: {files}", markup=False)


def _numbers(text: str) -> list[int]:
    words = text.replace(" ", "").split(",")
    if not all(word.isdecimal() and len(word) <= 9 for word in words):
        raise ValueError(f"seq_len must be numbers of tokens with commas, got {text!r}; pass 16384,65536.")
    return [int(word) for word in words]
