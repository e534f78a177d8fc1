"""`anchor-attn rope`: what a model's RoPE is, what a factor would make of it, and where it is rounded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from anchor_attn.cli.options import errors_by_options
from anchor_attn.cli.rope_search import search_command

if TYPE_CHECKING:
    from anchor_attn.rope.casts import Casts
    from anchor_attn.rope.inspection import RopeNow, RopeUnder
    from anchor_attn.rope.search.files import SearchResult

FACTOR = 8.0  # where nothing asks for another
MODEL_HELP = (
    "A config file (*.json), a folder or a hub name, of which only the config is read; tiny, laptop or small; or "
    "llama-2, a config like Llama 2's: theta 10,000, 4,096 tokens."
)

rope_app = typer.Typer(name="rope", invoke_without_command=True, rich_markup_mode="rich")
rope_app.command("search")(search_command)


@dataclass(frozen=True)
class Sight:
    """All that is said of one model.

    Attributes:
        kinds: of its layers, as they are now.
        extended: the kind that the methods are for.
        scale: how many times its original length.
        under: that kind, by method.
        left_out: methods that have no meaning there, and why.
        casts: where the model rounds, by the way its weights are loaded.
    """

    kinds: "Sequence[RopeNow]"
    extended: "RopeNow"
    scale: float
    under: "Mapping[str, RopeUnder]"
    left_out: Mapping[str, str]
    casts: "Sequence[Casts]"

    def summary(self) -> dict[str, Any]:
        """As a result file says it; the pairs are its records."""
        return {
            "factor": self.scale,
            "target_len": round(self.extended.original.length * self.scale),
            "layers": [now.summary() for now in self.kinds],
            "methods": {method: rope.summary() for method, rope in self.under.items()},
            "methods_left_out": dict(self.left_out),
            "casts": [{**asdict(each), "meaning": each.meaning} for each in self.casts],
        }

    def records(self) -> list[dict[str, Any]]:
        """A line a pair of every kind of layer."""
        from anchor_attn.rope.inspection import list_pairs

        return [
            record
            for now in self.kinds
            for record in list_pairs(now, self.under if now is self.extended else dict.fromkeys(self.under))
        ]


@rope_app.callback()
@errors_by_options
def rope_command(
    context: typer.Context,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "llama-2",
    factor: Annotated[
        float | None,
        typer.Option(help="Times the original length; when left out, that of --factors, of the config, or 8."),
    ] = None,
    target_len: Annotated[int | None, typer.Option(help="Or the longer length, in tokens.")] = None,
    original_len: Annotated[
        int | None, typer.Option(help="Tokens of training rows, if the config does not say.")
    ] = None,
    factors: Annotated[
        Path | None,
        typer.Option(help="The factors.json of a search: shown as longrope, at the factor it was searched for."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights with which rounding is looked at.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for rope.json, rope.csv and rope.png.")] = Path("runs/rope"),
    as_json: Annotated[bool, typer.Option("--json", help="Print rope.json instead of the tables.")] = False,
) -> None:
    """Show a model's RoPE: how far each pair turns, how each method would slow it, and where the model rounds.

    Only the config is read. To search factors for a model, as LongRoPE does: anchor-attn rope search.
    """
    if context.invoked_subcommand is not None:
        _check_nothing_before(context)
        return
    from anchor_attn.cli.rope_input import read_searched
    from anchor_attn.results import check_device, check_folder, check_seed, describe_environment, write_csv, write_json

    check_device(device)
    check_seed(seed)
    check_folder(out)
    searched = None if factors is None else read_searched(factors)
    seen = _look(model, factor, target_len, original_len, searched, seed, device)
    records, meta = seen.records(), {**describe_environment(device), "model": model, "seed": seed, **seen.summary()}
    meta["factors"] = None if factors is None else str(factors)
    write_json(out / "rope.json", {"meta": meta, "records": records})
    write_csv(out / "rope.csv", records, meta)
    no_picture = _draw(out / "rope.png", seen, model)
    if as_json:
        typer.echo((out / "rope.json").read_text(encoding="utf-8"), nl=False)
        return
    _print(seen, None if searched is None else (factors, searched))
    if no_picture is not None:
        typer.echo(no_picture)
    names = ("rope.json", "rope.csv") if no_picture else ("rope.json", "rope.csv", "rope.png")
    typer.echo(f"Written: {', '.join(str(out / name) for name in names)}")


def _look(
    model: str,
    factor: float | None,
    target_len: int | None,
    original_len: int | None,
    searched: "SearchResult | None",
    seed: int,
    device: str,
) -> Sight:
    """A model by its config alone."""
    from anchor_attn.cli.rope_input import read_config
    from anchor_attn.rope.casts import WAYS, find_casts
    from anchor_attn.rope.checks import Extension
    from anchor_attn.rope.inspection import compare_methods, describe_rope, kind_to_extend

    config = read_config(model)
    kinds = describe_rope(config, original_len)
    extended = kind_to_extend(kinds)
    if factor is None and target_len is None:
        present = extended.factor if extended.factor > 1 else FACTOR
        factor = present if searched is None else searched.factor
    scale = Extension("linear", factor, target_len).scale(extended.original.length)
    options: dict[str, Any] | None = None
    if searched is not None:
        _check_search(searched, scale, extended.original.length, target_len is not None)
        options = {name: getattr(searched, name) for name in ("factors", "n_hat", "attention_factor")}
    under, left_out = compare_methods(extended.original, scale, options)
    casts = [find_casts(config, dtype, way, seed, device) for dtype, way in WAYS]
    return Sight(kinds, extended, scale, under, left_out, casts)


def _check_search(searched: "SearchResult", scale: float, length: int, by_length: bool) -> None:
    """Factors mean something at the length alone that they were searched for, and from the one they were searched from.

    Raises:
        ValueError: another length, or another factor.
    """
    theirs = searched.original_max_position_embeddings
    if theirs != length:
        raise ValueError(
            f"original_len must be the {theirs:,} tokens that the factors were searched from, got {length:,}; pass "
            f"--original-len {theirs} if the model was trained on them, or the factors of a search on this model."
        )
    if math.isclose(scale, searched.factor, rel_tol=1e-9):
        return
    if by_length:
        rule = f"target_len must be the {round(length * searched.factor):,} tokens"
        got, wanted = f"{round(length * scale):,}", f"--target-len {round(length * scale)}"
    else:
        rule, got, wanted = f"factor must be the {searched.factor:g}", f"{scale:g}", f"--factor {scale:g}"
    raise ValueError(
        f"{rule} that the factors were searched for, got {got}; leave it out, or run anchor-attn rope search {wanted}."
    )


def _print(seen: Sight, searched: "tuple[Path | None, SearchResult] | None") -> None:
    """What is so now, what each method would make of it, and where the model rounds."""
    from anchor_attn.cli.rope_tables import casts_table, describe_casts, describe_kind, describe_search, pairs_table

    console = Console(highlight=False, soft_wrap=True, markup=False)
    for now in seen.kinds:
        console.print(describe_kind(now))
    console.print(f"\nθ'/θ by each method, {seen.scale:g} × {seen.extended.original.length:,} tokens")
    console.print(pairs_table(seen.extended, seen.under), crop=False, no_wrap=True)
    if searched is not None:
        console.print(f"longrope: {searched[0]}, {describe_search(searched[1])}")
    for method, reason in seen.left_out.items():
        console.print(f"Left out: {method}: {reason}")
    console.print("\nWhere it is rounded: the model's own code beside each rope_precision")
    console.print(casts_table(seen.casts), crop=False, no_wrap=True)
    for line in describe_casts(seen.casts):
        console.print(line)


def _check_nothing_before(context: typer.Context) -> None:
    """Options of `rope` in front of "search" would be dropped without a word."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--json" if name == "as_json" else f"--{name.replace('_', '-')}"
            verb = context.invoked_subcommand
            raise ValueError(f"{option} must stand behind {verb!r}, got it before; write rope {verb} {option} …")


def _draw(path: Path, seen: Sight, model: str) -> str | None:
    """Draw a picture; returns why there is none."""
    from anchor_attn.rope.draw import draw_methods_figure

    original = seen.extended.original
    title = f"{model}: θ = {original.theta:,.0f}, {original.length:,} tokens × {seen.scale:g}"
    try:
        draw_methods_figure(seen.extended, seen.under, seen.scale, title).savefig(path)
    except ImportError as missing:
        return f"No picture: {missing}"
    return None
