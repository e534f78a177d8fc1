"""`anchor-attn drift --paper`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchor_attn.cli.drift_run import Asked
    from anchor_attn.drift import States


def run_paper(
    asked: "Asked",
    count: int,
    out: Path,
    environment: dict[str, Any],
    as_json: bool,
    say: Callable[[str], None],
) -> None:
    """The protocol of figure 1, on a model or at random.

    Args:
        asked: of whose options policies, lengths, layers, queries, theta, source and seed are read.
        count: of sequences.
        out: folder of paper.json, paper.csv, paper.html and paper.png.
        environment: of the result files.
        as_json: print paper.json instead of the tables.
        say: told of every sequence.
    """
    from anchor_attn.cli.drift_output import print_result
    from anchor_attn.drift.paper.measure import LENGTH, LENGTHS, PAPER_POLICIES, measure_paper
    from anchor_attn.drift.paper.page import paper_sections, write_paper_page
    from anchor_attn.results import write_csv, write_json

    lengths = sorted(set(asked.lengths)) or list(LENGTHS)
    sequences, described = _sequences(asked, count, lengths[-1])
    report = measure_paper(
        sequences,
        length=min(LENGTH, lengths[-1]),
        lengths=lengths,
        policies=asked.policies or PAPER_POLICIES,
        queries=asked.queries,
        say=say,
    )
    meta = {
        **environment, **report.settings, "subject": described,
        "model": None if asked.source is None else asked.source.model,
        "text": None if asked.source is None else asked.source.text, "theta": asked.theta_used,
    }  # fmt: skip
    sections = paper_sections(report)
    records = [record.record() for record in report.records]
    profiles = [line for profile in report.profiles for line in profile.records()]
    lists = {section.key: list(section.records) for section in sections if section.key}
    write_json(out / "paper.json", {"meta": meta, "records": records, **lists, "profiles": profiles})
    write_csv(out / "paper.csv", records, meta)
    written = [out / "paper.json", out / "paper.csv"]
    no_page = None
    try:
        written += write_paper_page(out, report, described, meta)
    except ImportError as missing:
        no_page = f"No paper.html and no picture: {missing}"
    print_result(sections, written, as_json, described, no_page)


def _sequences(asked: "Asked", count: int, seq_len: int) -> "tuple[Iterator[list[States]], str]":
    """One sequence after the other, and what they are in words."""
    if asked.source is None:
        from anchor_attn.drift.paper.measure import random_sequences

        theta = asked.theta_used or 0.0
        drawn = random_sequences(count, seq_len, theta=theta, seed=asked.seed)
        described = f"{count} × random normal query and key in bfloat16, {seq_len:,} tokens, theta {theta:,.0f}"
        return ([states] for states in drawn), described
    from anchor_attn.cli.drift_subject import load_tokens
    from anchor_attn.drift import capture_states

    layers = asked.source.layers
    model, ids, described = load_tokens(asked.source, seq_len, together=1)
    return (capture_states(model, row[None], layers=layers) for row in ids), described
