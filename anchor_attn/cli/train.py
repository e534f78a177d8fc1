"""`anchor-attn train`."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from anchor_attn.cli.options import errors_by_options


@errors_by_options
def train_command(
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML: model, data, packing, pattern, positions, engine, rope, extension, training, …"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="What the config is laid over: laptop, llama-2-7b-16k, -64k, -128k, llama-3-8b-128k, …"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; as training.max_steps.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints; as training.save_steps.")] = None,
    data: Annotated[
        str | None, typer.Option(help="One source in place of the config's: a file, a folder, stdlib, a hub name.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="As training.seed.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; what there is when left out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/train"),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest sound checkpoint; from step 1 where there is none."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run as JSON at its end.")] = False,
) -> None:
    """Train a wrapped model on packed rows, and survive it: kill the run, pass --resume, and get the same losses.

    Without an argument: the laptop preset, a small model on Python's standard library. SIGTERM saves and ends the run.
    Several processes: torchrun --nproc-per-node 2 -m anchor_attn.cli train …
    """
    import torch

    from anchor_attn.train.loop import read_losses, settings_from, train
    from anchor_attn.train.loop.losses import LOSSES
    from anchor_attn.train.loop.recipes import DEFAULT, find_recipe
    from anchor_attn.train.loop.run import CONFIG
    from anchor_attn.train.loop.settings_file import merged, read_yaml

    if config is None and preset is None and resume and (out / CONFIG).is_file():
        config = out / CONFIG
    content = read_yaml(config) if config is not None else {}
    named = preset or content.pop("preset", None) or (DEFAULT if config is None else None)
    content.pop("preset", None)
    if named is not None:
        content = merged(find_recipe(named), content)
    content = merged(content, _of_options(steps, save_steps, seed, data))
    outcome = train(
        settings_from(content),
        out,
        device or ("cuda" if torch.cuda.is_available() else "cpu"),
        resume=resume,
        say=lambda line: typer.echo(line, err=True),
    )
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first one speaks
        return
    if as_json:
        meta = json.loads((out / f"{LOSSES}.meta.json").read_text(encoding="utf-8"))
        typer.echo(json.dumps({"meta": meta, "records": read_losses(out / LOSSES)}, indent=1))
    elif outcome.checkpoint is not None:
        is_done = outcome.step == outcome.steps
        ended = "done" if is_done else f"stopped at step {outcome.step} of {outcome.steps}; --resume goes on"
        typer.echo(f"{ended}. {out / LOSSES}; {outcome.checkpoint} loads with from_pretrained", err=True)


def _of_options(steps: int | None, save_steps: int | None, seed: int | None, data: str | None) -> dict[str, Any]:
    """What was typed, in the place where a config has it."""
    typed = {"max_steps": steps, "save_steps": save_steps, "seed": seed}
    training = {name: value for name, value in typed.items() if value is not None}
    sources = {} if data is None else {"data": {"sources": [{"path": data}]}}
    return ({"training": training} if training else {}) | sources
