"""A run of `anchor-attn drift`: what is measured, written and printed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchor_attn.cli.drift_subject import ModelInput, Subject
    from anchor_attn.drift.pages.sections import Section
    from anchor_attn.drift.result import DriftResult
    from anchor_attn.drift.view import Queries
    from anchor_attn.masks import PackedLayout

RANDOM_HEADS = 4  # of documents at random: units of an interval


@dataclass(frozen=True)
class Asked:
    """Options that have been read; attributes are options.

    Attributes:
        policies: names; None for all.
        shifts: in tokens.
        lengths: of the row, in tokens.
        queries: measured of a row, as `measure_drift`.
        theta: of random states.
        layout: of `documents`.
        fix: compare the settings of `wrap`.
        fail_above: mean |drift|.
        source: of a model; None for random states.
        seed: of all that is random.
    """

    policies: list[str] | None
    shifts: list[int]
    lengths: list[int]
    queries: "Queries"
    theta: float | None
    layout: "PackedLayout | None"
    fix: bool
    fail_above: float | None
    source: "ModelInput | None"
    seed: int

    @property
    def theta_used(self) -> float | None:
        """Of random states, its default too; None of a model, whose config says its own."""
        from anchor_attn.drift.states import LLAMA_THETA

        if self.source is not None:
            return None
        return LLAMA_THETA if self.theta is None else self.theta


def run_drift(asked: Asked, out: Path, environment: dict[str, Any], as_json: bool, say: Callable[[str], None]) -> None:
    """Measure, write, print, and fail where the drift is above a limit.

    Args:
        asked: the options.
        out: folder of the files.
        environment: of the result files.
        as_json: print drift.json instead of the tables.
        say: told what is being done.
    """
    from anchor_attn.cli.drift_more import more_sections
    from anchor_attn.cli.drift_output import print_result
    from anchor_attn.drift.measure import measure_drift
    from anchor_attn.drift.pages.sections import list_sections
    from anchor_attn.drift.result import measure_lengths
    from anchor_attn.results import write_csv, write_json

    subject = _subject(asked, say)
    lengths = asked.lengths or [subject.states[0].seq_len]

    def measure(states: Any, is_longest: bool) -> Any:
        return measure_drift(
            states=states, policies=asked.policies, shifts=asked.shifts, queries=asked.queries, stages=is_longest,
            seed=asked.seed, say=say,
        )  # fmt: skip

    result = measure_lengths(subject.states, lengths, measure)
    policy = result.shown_policy
    sections = [*list_sections(result, policy), *more_sections(asked, subject, result, policy, say)]
    settings = result.reports[result.lengths[-1]].settings
    meta = {
        **environment, **settings, "seed": asked.seed, "subject": subject.described, "lengths": list(result.lengths),
        "layers": [layer for layer in result.layers if layer is not None],
        "model": None if asked.source is None else asked.source.model,
        "text": None if asked.source is None else asked.source.text,
        "dtype": str(subject.states[0].query.dtype).removeprefix("torch."),
        "theta": asked.theta_used, "fail_above": asked.fail_above,
        "document_lengths": None if asked.layout is None else asked.layout.document_lengths,
    }  # fmt: skip
    lists = result.lists() | {section.key: list(section.records) for section in sections if section.key}
    write_json(out / "drift.json", {"meta": meta, **lists})
    write_csv(out / "drift.csv", result.flat(), meta)
    pages, no_page = _write_page(out, result, policy, subject.described, sections, meta)
    print_result(sections, [out / "drift.json", out / "drift.csv", *pages], as_json, subject.described, no_page)
    _check_drift(result, asked)


def _subject(asked: Asked, say: Callable[[str], None]) -> "Subject":
    """Query and key, after all that can be refused without them."""
    from anchor_attn.cli.drift_subject import MODEL_TOKENS, RANDOM_TOKENS, capture_subject, draw_subject
    from anchor_attn.drift.measure import checked_shifts
    from anchor_attn.drift.policies import find_policies

    default = RANDOM_TOKENS if asked.source is None else MODEL_TOKENS
    seq_len = max(asked.lengths, default=default) if asked.layout is None else asked.layout.seq_len
    checked_shifts(asked.shifts, seq_len, find_policies(asked.policies))
    if asked.source is None:
        return draw_subject(seq_len, 1 if asked.layout is None else RANDOM_HEADS, asked.theta, asked.seed)
    subject = capture_subject(asked.source, seq_len)
    say(subject.described)
    return subject


def _write_page(
    out: Path, result: "DriftResult", policy: str, subject: str, sections: "Sequence[Section]", meta: dict[str, Any]
) -> tuple[list[Path], str | None]:
    """Write page and picture; returns them, and why there are none."""
    from anchor_attn.drift.pages.page import write_page

    try:
        return write_page(out, result, policy, subject, sections, meta), None
    except ImportError as missing:
        return [], f"No drift.html and no picture: {missing}"


def _check_drift(result: "DriftResult", asked: Asked) -> None:
    """Raise a CheckError, after all is written, where a policy drifts by more than it may."""
    from anchor_attn.drift.pages.numbers import brief, name_shift
    from anchor_attn.drift.result import exceeding
    from anchor_attn.results import CheckError

    if asked.fail_above is None:
        return
    worst: dict[str, Any] = {}
    for record in exceeding(result, asked.fail_above, asked.policies):
        if record.policy not in worst or not record.mean_abs <= worst[record.policy].mean_abs:
            worst[record.policy] = record
    if worst:
        named = ", ".join(
            f"{name} {brief(record.mean_abs)} at +{name_shift(record.shift)}" for name, record in worst.items()
        )
        raise CheckError(
            f"mean |Δ score| must be at most {asked.fail_above:g}, got {named}; see --fix for what removes it."
        )
