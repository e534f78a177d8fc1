"""`anchor-attn rope search`: LongRoPE's search on a model and a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from anchor_attn.cli.options import errors_by_options

if TYPE_CHECKING:
    from anchor_attn.rope.search.files import SearchResult

STATE, SHORT_STATE, RESULT = "search.json", "search-short.json", "factors.json"


@errors_by_options
def search_command(
    model: Annotated[str, typer.Option(help="A folder or a hub name; tiny, laptop or small: fresh weights.")],
    text: Annotated[
        str, typer.Option(help="Documents that the model has not seen: a file, a folder, stdlib or a hub name.")
    ],
    factor: Annotated[float | None, typer.Option(help="Times the original length.")] = None,
    target_len: Annotated[int | None, typer.Option(help="Or the longer length, in tokens.")] = None,
    original_len: Annotated[
        int | None, typer.Option(help="Tokens of training rows, if the config does not say.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences that are read; the paper takes five.")] = 5,
    text_column: Annotated[str, typer.Option(help="Column that holds the text of documents.")] = "text",
    tokenizer: Annotated[str | None, typer.Option(help="bytes, a folder or a hub name; else the model's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most documents to read; all when left out.")] = None,
    fitness: Annotated[str, typer.Option(help="perplexity, or needle: that of planted needles alone.")] = "perplexity",
    short: Annotated[
        bool, typer.Option("--short", help="Search a second set of factors too, for inputs within the original length.")
    ] = False,
    n_hat: Annotated[
        bool,
        typer.Option(help="Let the first n̂ positions be as before; plain transformers loads only n̂ = 0."),
    ] = True,
    population: Annotated[int, typer.Option(help="Individuals that the evolution begins with.")] = 64,
    mutations: Annotated[int, typer.Option(help="Mutated children a round.")] = 16,
    crossovers: Annotated[int, typer.Option(help="Crossed children a round.")] = 16,
    probability: Annotated[float, typer.Option(help="That a mutation draws a factor anew.")] = 0.3,
    rounds: Annotated[int, typer.Option(help="Rounds of the evolution.")] = 40,
    parents: Annotated[int, typer.Option(help="How many of the best may have children.")] = 32,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search begun in --out.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as saved when left out.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of sequences and of the evolution.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help=f"Folder for {RESULT} and the search's state.")] = Path("runs/rope-search"),
    as_json: Annotated[bool, typer.Option("--json", help=f"Print {RESULT} instead of the table.")] = False,
) -> None:
    """Search the factors with which a model reads long inputs best, by LongRoPE's evolution.

    extend(model, "longrope", factors="factors.json") takes the result, and "anchor-attn rope --factors factors.json"
    shows it. A search that was killed comes to the same result with --resume.
    """
    from anchor_attn.cli.rope_input import hub_retries_unsaid, load_model, read_sequences
    from anchor_attn.results import check_device, check_folder, check_seed
    from anchor_attn.rope.checks import Extension
    from anchor_attn.rope.inspection import describe_rope, kind_to_extend
    from anchor_attn.rope.search import search_factors
    from anchor_attn.train.tokenizers import load_tokenizer

    check_device(device)
    check_seed(seed)
    if fitness not in ("perplexity", "needle"):
        raise ValueError(f"fitness must be perplexity or needle, got {fitness!r}; pass one of them.")
    if factor is None and target_len is None:
        raise ValueError("factor or target_len must be given, got none; pass factor=8, say.")
    check_folder(out)
    say = Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print
    _check_resume(out, resume, say)
    loaded, own_tokenizer = load_model(model, dtype, seed)
    now = kind_to_extend(describe_rope(loaded.config, original_len))
    scale = Extension("longrope", factor, target_len).scale(now.original.length)
    with hub_retries_unsaid():
        tokens_of = load_tokenizer(tokenizer or own_tokenizer)
    length = round(now.original.length * scale)
    found = read_sequences(text, text_column, tokens_of, limit, length, sequences, seed)
    say(f"{model} on {found.described}")
    common: dict[str, Any] = {
        "fitness": fitness, "population": population, "mutations": mutations, "crossovers": crossovers,
        "probability": probability, "rounds": rounds, "parents": parents, "original_len": original_len, "seed": seed,
        "progress": not as_json,
    }  # fmt: skip
    if not n_hat:
        common["n_hats"] = (0,)
    loaded.to(device)  # type: ignore[arg-type]  # transformers' decorator loses the signature
    result = search_factors(loaded, found.tokens, scale, checkpoint=out / STATE, **common)
    if short:
        result = search_factors(loaded, found.tokens, scale, short_of=result, checkpoint=out / SHORT_STATE, **common)
    result.write(out / RESULT)
    if as_json:
        typer.echo((out / RESULT).read_text(encoding="utf-8"), nl=False)
        return
    from anchor_attn.cli.rope_tables import fitness_table

    console = Console(highlight=False, soft_wrap=True, markup=False)
    for line in _described(result, fitness):
        console.print(line)
    console.print(fitness_table(result), crop=False, no_wrap=True)
    console.print(f"Written: {out / RESULT}; to use it: extend(model, 'longrope', factors={str(out / RESULT)!r})")


def _check_resume(out: Path, resume: bool, say: Any) -> None:
    """A search that was begun is neither overwritten nor gone on with unasked."""
    begun = (out / STATE).exists()
    if begun and not resume:
        raise ValueError(
            f"out must be without a search that was begun, got {str(out / STATE)!r}; pass --resume, or another folder."
        )
    if resume and not begun:
        say(f"Nothing to resume in {out}: the search begins.")


def _described(result: "SearchResult", fitness: str) -> list[str]:
    from anchor_attn.cli.rope_tables import describe_search

    length = result.original_max_position_embeddings
    lines = [describe_search(result)]
    if result.short_factors is not None:
        lines.append(f"up to {length:,} tokens: λ from {result.short_factors[0]:.2f} to {result.short_factors[-1]:.2f}")
    meaning = "perplexity" if fitness == "perplexity" else "perplexity of the needles"
    return [*lines, f"{meaning}, lower is better"]
