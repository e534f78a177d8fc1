"""drift.html: what was measured, what may be said of it, and every picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_attn.drift.pages import draw
from anchor_attn.drift.pages.numbers import name_shift
from anchor_attn.drift.pages.sections import Section
from anchor_attn.drift.policies import FP64, STAGES
from anchor_attn.drift.result import DriftResult
from anchor_attn.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFINITION = (
    "A score is query · key × scale after rotation. In exact arithmetic it depends on how far apart the two stand, and "
    "on nothing else; the drift is by how much it changes when all positions move by the same shift. Every policy "
    "rotates the same query and key by the same float32 frequencies: what differs is rounding alone."
)


def write_page(
    out: Path, result: DriftResult, policy: str, subject: str, sections: Sequence[Section], meta: Mapping[str, Any]
) -> list[Path]:
    """Write `drift.html`, and the first picture as `drift.png`.

    Args:
        out: folder.
        result: of the measurement.
        policy: of the heat map.
        subject: what was measured, in words.
        sections: above the pictures.
        meta: versions, machine, settings.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is missing.
    """
    figures = _draw_all(result, policy, subject)
    page = Page("Drift of RoPE in finite precision")
    page.paragraph(f"Measured: {subject}.")
    page.paragraph(DEFINITION)
    add_sections(page, sections)
    for heading, figure, caption in figures:
        page.heading(heading)
        page.figure(figure, caption)
    page.heading("What each policy rounds to")
    policies = meta["policies"]
    page.table(("policy", *STAGES), [(name, *policies[name].values()) for name in policies if name != FP64.name])
    add_provenance(page, meta)
    page.write(out / "drift.html")
    figures[0][1].savefig(out / "drift.png")
    return [out / "drift.html", out / "drift.png"]


def add_sections(page: Page, sections: Sequence[Section]) -> None:
    """Headings with their tables and sentences."""
    for section in sections:
        page.heading(section.heading)
        if section.rows:
            page.table(section.header, section.rows)
        if section.note is not None:
            page.paragraph(section.note)
        if section.sentences:
            page.bullets(section.sentences)


def add_provenance(page: Page, meta: Mapping[str, Any]) -> None:
    """What the numbers depend on besides their input."""
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    page.heading("Where it comes from")
    page.code(
        f"{versions}\n{meta['device_name']}, {meta['threads']} threads, seed {meta['seed']}\n"
        f"commit {meta['git_commit'] or 'of an installed release'}\n{meta['command']}"
    )


def _draw_all(result: DriftResult, policy: str, subject: str) -> "list[tuple[str, Figure, str]]":
    """Heading, figure and caption of each, in the order of the page.

    Args:
        result: of a measurement.
        policy: of the heat map.
        subject: what was measured, above every figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    shown, last = name_shift(result.shown_shift), name_shift(result.shifts[-1])
    drawn = (
        (
            "Against shift",
            draw.draw_shifts_figure(result, subject),
            "Mean |score moved − score unmoved| by policy, as predicted (dashed), and what float64 itself drifts by.",
        ),
        (
            "Against length",
            draw.draw_lengths_figure(result, subject),
            f"All positions moved by {shown}: the same tokens, in rows of other lengths.",
        ),
        (
            "Per key",
            draw.draw_keys_figure(result, subject),
            f"All positions moved by {shown}; places in bins of powers of two, the first token alone.",
        ),
        ("Layer × head", draw.draw_heads_figure(result, policy, subject), f"{policy}, all positions moved by {shown}."),
        (
            "Frequency pairs",
            draw.draw_pairs_figure(result, subject),
            f"Each pair's own part of a score, all positions moved by {last}.",
        ),
        (
            "Stage by stage",
            draw.draw_stages_figure(result, subject),
            f"Each stage alone, float64 everywhere else, moved by {shown}; the line is the whole policy.",
        ),
    )
    return [(heading, figure, caption) for heading, figure, caption in drawn if figure is not None]
