"""What `anchor-attn drift` says besides: sinks and shifts of a whole model, documents, the fix."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from anchor_attn.cli.drift_run import Asked
    from anchor_attn.cli.drift_subject import Subject
    from anchor_attn.drift.models.shifted import Dtype
    from anchor_attn.drift.pages.sections import Section
    from anchor_attn.drift.result import DriftResult

Say = Callable[[str], None]
# Dtypes of the whole model, and whether float64 is the floor, by the bytes of the widest: copies are made one by one.
RUNS: "tuple[tuple[int, tuple[Dtype, ...], bool], ...]" = (
    (8, ("bfloat16", "float32"), True),
    (4, ("bfloat16", "float32"), False),
    (2, ("bfloat16",), False),
)


def more_sections(
    asked: "Asked", subject: "Subject", result: "DriftResult", policy: str, say: Say
) -> "Iterator[Section]":
    """Sections behind those that all measurements have.

    Args:
        asked: the options.
        subject: what was measured.
        result: of the measurement.
        policy: of sinks and documents.
        say: told what is being done.
    """
    if subject.model is not None and subject.input_ids is not None:
        from anchor_attn.drift.models.sinks import measure_sinks
        from anchor_attn.drift.pages.model_sections import sinks_section

        yield sinks_section(measure_sinks(subject.states, policy, result.shown_shift, queries=asked.queries))
        yield _shifted(subject.model, subject.input_ids[:1], sorted({result.shifts[0], result.shown_shift}), say)
    if asked.layout is not None:
        from anchor_attn.drift.pages.model_sections import patterns_section
        from anchor_attn.drift.patterns.measure import measure_patterns

        rows = list(asked.layout.document_lengths) * subject.states[0].query.shape[0]
        report = measure_patterns(
            subject.states,
            type(asked.layout).from_lengths(rows),
            policies=[policy],
            shifts=asked.shifts,
            queries=asked.queries,
            say=say,
        )
        yield patterns_section(report, policy)
    if asked.fix:
        from anchor_attn.drift.models.fix import measure_fix
        from anchor_attn.drift.pages.choice_sections import fix_section

        ids = None if subject.input_ids is None else subject.input_ids[:1]
        records, fixed = measure_fix(
            subject.states, asked.shifts, queries=asked.queries, model=subject.model, input_ids=ids, say=say
        )
        yield fix_section(records, fixed)


def _shifted(model: "PreTrainedModel", input_ids: "Tensor", shifts: list[int], say: Say) -> "Section":
    """The whole model, in as many dtypes as its copies fit into memory."""
    import torch

    from anchor_attn.bench.memory import available_bytes
    from anchor_attn.drift import measure_shifted
    from anchor_attn.drift.pages.model_sections import left_out_section, shifted_section

    config: Any = model.config.get_text_config()
    of_tokens = 2 * input_ids.numel() * (config.vocab_size + (config.num_hidden_layers + 1) * config.hidden_size)
    numbers = model.num_parameters() + of_tokens
    free = available_bytes(torch.device(model.device))
    for item_bytes, dtypes, floor in RUNS:
        if free is None or item_bytes * numbers <= free:
            left_out = "" if floor else f"float64{'' if 'float32' in dtypes else ' and float32'}"
            report = measure_shifted(model, input_ids, shifts, dtypes, floor, say)
            return shifted_section(report, left_out and f"left out: {left_out}, which {_need(numbers, free)}")
    return left_out_section(f"Left out: a copy in bfloat16 {_need(numbers, free, 2)}.")


def _need(numbers: int, free: int | None, item_bytes: int = 4) -> str:
    return f"takes {item_bytes * numbers / 2**30:.1f} GiB or more of {(free or 0) / 2**30:.1f} free"
