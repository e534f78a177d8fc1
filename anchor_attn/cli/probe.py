"""`anchor-attn probe`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from anchor_attn.masks import PackedLayout

LENGTHS = "9 6 1 11 / 3 17 2"
VOCAB_SIZE = 257
DTYPES = ("float32", "bfloat16", "float16", "float64")


def probe_command(
    model: Annotated[
        str, typer.Option(help="tiny, laptop, small, a config file (*.json), or a checkpoint's name or folder.")
    ] = "tiny",
    pattern: Annotated[
        str | None,
        typer.Option(help="What to wrap the model with, and what must hold: anchor or intra_doc; anchor."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Of the wrapped model: auto, varlen, reference, or a route such as varlen/merge; auto."),
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="Probe the model unwrapped, with transformers' own sdpa, eager, …")
    ] = None,
    positions: Annotated[
        str, typer.Option(help="Position ids: continuous, reset, reset_to_zero, or (unwrapped) copied.")
    ] = "continuous",
    mask: Annotated[str, typer.Option(help="attention_mask: none, or ones at all tokens but padding.")] = "none",
    use_cache: Annotated[bool, typer.Option("--use-cache", help="Let the model make a cache, as it does unasked.")] = (
        False
    ),
    lengths: Annotated[
        str | None, typer.Option(help=f"Tokens of each document, / begins the next row; '{LENGTHS}'.")
    ] = None,
    document_ids: Annotated[
        str | None, typer.Option(help="Or an id a token, for documents in pieces: '0 1 1 2 1 2 -1', rows apart by /.")
    ] = None,
    anchor_tokens: Annotated[int | None, typer.Option(help="Anchor tokens of a row; 1.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}; the model's own. float64 tells rounding from a leak.")
    ] = None,
    limit: Annotated[float, typer.Option(help="A movement above it, in that of the changed document, is a leak.")] = (
        1e-3
    ),
    seed: Annotated[int, typer.Option(help="Of fresh weights, tokens and changes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of probe.json.")] = Path("runs/probe"),
    as_json: Annotated[bool, typer.Option("--json", help="Print probe.json instead of the table.")] = False,
) -> None:
    """Change one document at a time and see that no other moves; change the anchor and see that every document does.

    Exit code 0 for PASS, 1 for FAIL. Without an argument a tiny wrapped model is probed.
    """
    import torch

    from anchor_attn.isolation import check_isolation
    from anchor_attn.masks.patterns import check_pattern
    from anchor_attn.results import check_device, check_folder, check_seed, describe_environment, write_json

    check_device(device)
    check_seed(seed)
    check_folder(out)
    _check_choices(pattern, engine, attn_implementation, dtype)
    layout = _layout(lengths, document_ids, anchor_tokens)
    pattern = pattern or ("anchor" if layout.anchor_tokens else "intra_doc")
    check_pattern(layout, pattern)
    probed = _model(model, layout, seed)
    probed.to(device)  # type: ignore[arg-type]  # transformers' decorator loses the signature
    if attn_implementation is None:
        from anchor_attn import wrap

        wrap(probed, pattern, engine or "auto")  # type: ignore[arg-type]  # wrap checks them
    else:
        probed.set_attn_implementation(attn_implementation)
    report = check_isolation(
        probed,
        layout,
        pattern,  # type: ignore[arg-type]  # checked above
        positions=positions,  # type: ignore[arg-type]  # check_isolation checks both
        attention_mask=mask,  # type: ignore[arg-type]
        use_cache=use_cache,
        dtype=None if dtype is None else getattr(torch, dtype),
        limit=limit,
        seed=seed,
    )
    meta: dict[str, Any] = {
        **describe_environment(device),
        "model": model,
        "attn_implementation": "anchor_attn" if attn_implementation is None else attn_implementation,
        "engine": (engine or "auto") if attn_implementation is None else None,
        "pattern": pattern,
        "positions": positions,
        "attention_mask": mask,
        "use_cache": use_cache,
        "dtype": str(probed.dtype).removeprefix("torch.") if dtype is None else dtype,
        "document_lengths": layout.document_lengths,
        "seq_len": layout.seq_len,
        "anchor_tokens": layout.anchor_tokens,
        "seed": seed,
        "limit": limit,
        "layers": report.layers,
        "noise": report.noise,
        "passed": report.passed,
        "isolated": report.isolated,
        "anchor_seen": report.anchor_seen,
        "worst_ratio": report.worst.ratio,
    }
    write_json(out / "probe.json", {"meta": meta, "records": [asdict(finding) for finding in report.findings]})
    if as_json:
        typer.echo((out / "probe.json").read_text(encoding="utf-8"), nl=False)
        report.raise_if_leaking()
        return
    typer.echo(f"{_described(meta, layout)}\n\n{report}\nWritten: {out / 'probe.json'}")
    if not report.passed:
        raise typer.Exit(1)


def _check_choices(pattern: str | None, engine: str | None, attn_implementation: str | None, dtype: str | None) -> None:
    if pattern not in (None, "anchor", "intra_doc"):
        raise ValueError(f"pattern must be anchor or intra_doc, got {pattern!r}; pass one of them.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}; pass one of them.")
    if engine is not None and attn_implementation is not None:
        raise ValueError(
            f"engine must be left out where the model is not wrapped, got {engine!r} beside attn_implementation="
            f"{attn_implementation!r}; leave one out."
        )


def _layout(lengths: str | None, document_ids: str | None, anchor_tokens: int | None) -> "PackedLayout":
    from anchor_attn.cli.mask_input import MaskInput, read_layout

    if lengths is None and document_ids is None:
        lengths = LENGTHS
    words = () if lengths is None else (lengths,)
    return read_layout(MaskInput(words, document_ids, anchor_tokens=anchor_tokens))[0]


def _described(meta: dict[str, Any], layout: "PackedLayout") -> str:
    how = (
        f"wrapped with {meta['pattern']!r}"
        if meta["engine"]
        else f"under {meta['attn_implementation']}, attention_mask {meta['attention_mask']}"
    )
    return (
        f"{meta['model']} in {meta['dtype']} on {meta['device']}, {how}, {meta['positions']} positions: "
        f"{layout.num_documents} documents in rows of {layout.seq_len} tokens"
    )


def _model(name: str, layout: "PackedLayout", seed: int) -> "PreTrainedModel":
    import torch

    from anchor_attn.train.presets import SIZES, create_model

    torch.manual_seed(seed)
    fresh = name in SIZES or name.endswith(".json")
    copies = max(map(len, layout.document_lengths)) * layout.anchor_tokens  # of the anchor, in copied rows
    # A checkpoint has the vocabulary that it has.
    return create_model(name, VOCAB_SIZE if fresh else 2, layout.seq_len + copies, 0)
