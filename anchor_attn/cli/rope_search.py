"""`anchor-attn rope search`: LongRoPE's search on a model and a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from anchor_attn.rope.search.files import SearchResult

STATE, SHORT_STATE, RESULT = "search.json", "search-short.json", "factors.json"


def search_command(
    model: Annotated[str, typer.Option(help="A checkpoint's name or folder; tiny, laptop or small for fresh weights.")],
    text: Annotated[
        str, typer.Option(help="Documents that the model has not seen: a file, a folder, stdlib or a hub name.")
    ],
    factor: Annotated[float | None, typer.Option(help="How many times the original length.")] = None,
    target_len: Annotated[int | None, typer.Option(help="Or the length itself, in tokens.")] = None,
    original_len: Annotated[
        int | None, typer.Option(help="Tokens the model was trained on, where its config does not say.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Of the target length; the paper takes five.")] = 5,
    text_column: Annotated[str, typer.Option(help="Column that holds the text of documents.")] = "text",
    tokenizer: Annotated[str | None, typer.Option(help="bytes, or a name or path; the model's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents to read at most; all.")] = None,
    fitness: Annotated[str, typer.Option(help="perplexity, or needle: that of planted needles alone.")] = "perplexity",
    short: Annotated[
        bool, typer.Option("--short", help="Search a second set, for inputs within the original length.")
    ] = False,
    n_hat: Annotated[
        bool, typer.Option(help="Let first positions be kept; without, plain transformers loads what is found.")
    ] = True,
    population: Annotated[int, typer.Option(help="Individuals at the beginning.")] = 64,
    mutations: Annotated[int, typer.Option(help="Of the best, a round.")] = 16,
    crossovers: Annotated[int, typer.Option(help="Of the best, a round.")] = 16,
    probability: Annotated[float, typer.Option(help="That a gene is drawn anew.")] = 0.3,
    rounds: Annotated[int, typer.Option(help="Of the evolution.")] = 40,
    parents: Annotated[int, typer.Option(help="How many of the best have children.")] = 32,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search that was begun in --out.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as saved.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sequences and the evolution.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help=f"Folder of {RESULT} and of the search's state.")] = Path(
        "runs/rope-search"
    ),
    as_json: Annotated[bool, typer.Option("--json", help=f"Print {RESULT} instead of the table.")] = False,
) -> None:
    """Search the factors with which a model reads long inputs best, by LongRoPE's evolution.

    The result is what extend(model, "longrope", factors="factors.json") takes. A search that was killed goes on with
    --resume, to the same result.
    """
    from anchor_attn.cli.rope_input import load_model, read_sequences
    from anchor_attn.results import check_device, check_folder, check_seed
    from anchor_attn.rope.checks import Extension
    from anchor_attn.rope.inspection import describe_rope
    from anchor_attn.rope.search import search_factors
    from anchor_attn.train.tokenizers import load_tokenizer

    check_device(device)
    check_seed(seed)
    if fitness not in ("perplexity", "needle"):
        raise ValueError(f"fitness must be perplexity or needle, got {fitness!r}; pass one of them.")
    if factor is None and target_len is None:
        raise ValueError("factor or target_len must be given, got none; pass --factor 8, say.")
    check_folder(out)
    say = Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print
    _check_resume(out, resume, say)
    loaded, own_tokenizer = load_model(model, dtype, seed)
    kinds = describe_rope(loaded.config, original_len)
    now = next((now for now in kinds if now.is_extendable), kinds[0])
    scale = Extension("longrope", factor, target_len).scale(now.original.length)
    found = read_sequences(
        text, text_column, load_tokenizer(tokenizer or own_tokenizer), limit,
        round(now.original.length * scale), sequences, seed,
    )  # fmt: skip
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
    length = result.original_max_position_embeddings
    low, high = result.factors[0], result.factors[-1]
    lines = [
        f"{result.factor:g} × {length:,} tokens: λ from {low:.2f} to {high:.2f} over {len(result.factors)} pairs, "
        f"n̂ {result.n_hat}, attention factor {result.attention_factor:.4f}",
    ]
    if result.short_factors is not None:
        lines.append(f"up to {length:,} tokens: λ from {result.short_factors[0]:.2f} to {result.short_factors[-1]:.2f}")
    meaning = "perplexity" if fitness == "perplexity" else "perplexity of the needles"
    return [*lines, f"{meaning}, lower is better"]
