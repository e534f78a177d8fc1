"""`anchor-attn rope`: what a model's RoPE is, what a factor would make of it, and where it is rounded."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from anchor_attn.cli.rope_search import search_command

if TYPE_CHECKING:
    from torch import Tensor

    from anchor_attn.rope.casts import Casts
    from anchor_attn.rope.inspection import RopeNow

FACTOR = 8.0  # where nothing asks for another
MODEL_HELP = (
    "A config file (*.json), a folder or a hub name, of which the config alone is read; tiny, laptop or small; or "
    "llama-2, a config like Llama 2's: theta 10,000, 4,096 tokens."
)

rope_app = typer.Typer(name="rope", invoke_without_command=True, rich_markup_mode="rich")
rope_app.command("search")(search_command)


@rope_app.callback()
def rope_command(
    context: typer.Context,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "llama-2",
    factor: Annotated[
        float | None, typer.Option(help="How many times the original length; what the model has now, else 8.")
    ] = None,
    target_len: Annotated[int | None, typer.Option(help="Or the length itself, in tokens.")] = None,
    original_len: Annotated[
        int | None, typer.Option(help="Tokens the model was trained on, where its config does not say.")
    ] = None,
    factors: Annotated[
        Path | None, typer.Option(help="The factors.json of a search, to stand beside the other methods.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and states that the casts are looked at with.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of rope.json, rope.csv and rope.png.")] = Path("runs/rope"),
    as_json: Annotated[bool, typer.Option("--json", help="Print rope.json instead of the tables.")] = False,
) -> None:
    """Say what a model's RoPE is, what every method would make of its pairs, and where the model rounds.

    No weights are read. "rope search" searches factors, as LongRoPE does; its options stand behind "search".
    """
    if context.invoked_subcommand is not None:
        _check_nothing_before(context)
        return
    from anchor_attn.cli.rope_input import read_config, read_searched
    from anchor_attn.results import check_device, check_folder, check_seed, describe_environment, write_csv, write_json
    from anchor_attn.rope.casts import WAYS, find_casts
    from anchor_attn.rope.checks import Extension
    from anchor_attn.rope.inspection import compare_methods, describe_rope, list_pairs

    check_device(device)
    check_seed(seed)
    check_folder(out)
    config = read_config(model)
    kinds = describe_rope(config, original_len)
    extended = next((now for now in kinds if now.is_extendable), kinds[0])
    searched = None if factors is None else read_searched(factors)
    if factor is None and target_len is None:
        present = extended.factor if extended.factor > 1 else FACTOR
        factor = present if searched is None else searched.factor
    scale = Extension("linear", factor, target_len).scale(extended.original.length)
    ratios, left_out = compare_methods(extended.original, scale, None if searched is None else searched.factors)
    casts = [find_casts(config, dtype, way, seed, device) for dtype, way in WAYS]
    records = [
        record for now in kinds for record in list_pairs(now, ratios if now is extended else dict.fromkeys(ratios))
    ]
    meta = {
        **describe_environment(device),
        "model": model,
        "factor": scale,
        "target_len": round(extended.original.length * scale),
        "seed": seed,
        "layers": [now.summary() for now in kinds],
        "methods_left_out": left_out,
        "casts": [{**asdict(each), "meaning": each.meaning} for each in casts],
    }
    write_json(out / "rope.json", {"meta": meta, "records": records})
    write_csv(out / "rope.csv", records, meta)
    files = [out / "rope.json", out / "rope.csv", *_draw(out / "rope.png", extended, ratios, scale, model)]
    if as_json:
        typer.echo((out / "rope.json").read_text(encoding="utf-8"), nl=False)
        return
    _print(kinds, extended, scale, ratios, left_out, casts)
    if len(files) == 2:
        typer.echo("No picture: pip install matplotlib.")
    typer.echo(f"Written: {', '.join(map(str, files))}")


def _print(
    kinds: "Sequence[RopeNow]",
    extended: "RopeNow",
    scale: float,
    ratios: "Mapping[str, Tensor]",
    left_out: Mapping[str, str],
    casts: "Sequence[Casts]",
) -> None:
    """What is so now, what each method would make of it, and where the model rounds."""
    from anchor_attn.cli.rope_tables import casts_table, describe_kind, pairs_table
    from anchor_attn.rope.inspection import list_pairs

    console = Console(highlight=False, soft_wrap=True, markup=False)
    for now in kinds:
        console.print(describe_kind(now))
    console.print(f"\nθ'/θ by each method, {scale:g} × {extended.original.length:,} tokens")
    console.print(pairs_table(extended, list_pairs(extended, ratios), list(ratios)), crop=False, no_wrap=True)
    for method, reason in left_out.items():
        console.print(f"Left out: {method}: {reason}")
    console.print("\nWhere it is rounded: the model's own code beside each rope_precision")
    console.print(casts_table(casts), crop=False, no_wrap=True)


def _check_nothing_before(context: typer.Context) -> None:
    """Options of `rope` in front of "search" would be dropped without a word."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--json" if name == "as_json" else f"--{name.replace('_', '-')}"
            verb = context.invoked_subcommand
            raise ValueError(f"{option} must stand behind {verb!r}, got it before; write rope {verb} {option} …")


def _draw(path: Path, now: "RopeNow", ratios: dict[str, Any], scale: float, model: str) -> list[Path]:
    from anchor_attn.rope.draw import draw_methods_figure

    title = f"{model}: θ = {now.original.theta:,.0f}, {now.original.length:,} tokens × {scale:g}"
    try:
        draw_methods_figure(now, ratios, scale, title).savefig(path)
    except ImportError:
        return []
    return [path]
