"""What a stream has read, packed and left out, read from its state or from a loader's."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from anchor_attn.train.documents import NAMED_IN_META
from anchor_attn.train.streaming.documents import Counts
from anchor_attn.train.streaming.rows import RowCounts

STATE_FORMAT = "anchor_attn PackedStream 1"


@dataclass(frozen=True)
class SourceReport:
    """What came of one source; all numbers over all workers that the state knows.

    Attributes:
        name: how the user names it.
        weight: that was asked for.
        share: of the document tokens that it has; the weights' where no document is drawn yet is 0.
        documents: drawn, again in every epoch.
        tokens: of these, tags not counted.
        epochs: epochs begun, by the worker that has begun most.
        thinned_documents: left out so that long ones are drawn more often.
        records: read in the first epoch.
        bad_records: of these, without a document, by reason, most frequent first, then by name.
        first_bad: the first of them by name, "data.jsonl:17: not JSON".
        left_out: files of its folder that are not read.
    """

    name: str
    weight: float
    share: float
    documents: int
    tokens: int
    epochs: int
    thinned_documents: int
    records: int
    bad_records: dict[str, int]
    first_bad: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class StreamReport:
    """Where the tokens of a stream went; of one process with all its workers.

    Attributes:
        rows: rows made.
        seq_len: tokens a full row, the anchor included.
        documents: drawn from all sources.
        packed_tokens: in the rows, tags included, the anchor not.
        padded_tokens: slots that a collator fills up.
        cut_documents: documents in more than one row, or that lost their rest.
        dropped_tokens: what they lost.
        open_tokens: drawn, and in no row yet.
        sources: one a source.
    """

    rows: int
    seq_len: int
    documents: int
    packed_tokens: int
    padded_tokens: int
    cut_documents: int
    dropped_tokens: int
    open_tokens: int
    sources: tuple[SourceReport, ...]

    @property
    def padding_share(self) -> float:
        """Of the slots behind the anchors, those that are padded; 0 without a row."""
        slots = self.packed_tokens + self.padded_tokens
        return self.padded_tokens / slots if slots else 0.0

    @property
    def meta(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "padding_share": self.padding_share}

    def __str__(self) -> str:
        lines = [
            f"{self.documents:,} documents -> {self.rows:,} rows of {self.seq_len:,}, {self.packed_tokens:,} tokens; "
            f"{self.padding_share:.2%} of the slots padded, {self.cut_documents:,} documents cut, "
            f"{self.dropped_tokens:,} tokens dropped"
        ]
        for source in self.sources:
            bad = ", ".join(f"{count:,} × {reason}" for reason, count in source.bad_records.items())
            lines.append(
                f"{source.name}: {source.share:.1%} of the tokens, {source.documents:,} documents, "
                f"epoch {source.epochs:,}, {source.thinned_documents:,} thinned, "
                f"{sum(source.bad_records.values()):,} of {source.records:,} records bad{f' ({bad})' if bad else ''}"
            )
        return "\n".join(lines)


def read_report(state: Mapping[str, Any]) -> StreamReport:
    """The report of a stream's state, or of a StatefulDataLoader's with the states of all its workers in it.

    Raises:
        ValueError: no stream's state is in it.
    """
    states = list(_stream_states(state))
    if not states:
        raise ValueError(
            f"state must hold that of a PackedStream, got the keys {sorted(map(str, state))}; pass the state of the "
            "stream, or of the loader that reads it."
        )
    settings = states[0]["settings"]
    counts = Counter[str]()
    for own in states:
        counts.update(own["packer"]["counts"])
    sources = _source_reports(states, settings["sources"])
    rows = {field.name: counts[field.name] for field in fields(RowCounts)}
    open_tokens = sum(_open_tokens(own["packer"]) for own in states)
    documents = sum(source.documents for source in sources)
    return StreamReport(
        seq_len=settings["seq_len"], documents=documents, open_tokens=open_tokens, sources=sources, **rows
    )


def _stream_states(state: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(state, Mapping):
        if state.get("format") == STATE_FORMAT:
            yield state
        else:
            for value in state.values():
                yield from _stream_states(value)


def _open_tokens(packer: Mapping[str, Any]) -> int:
    lengths = [length for row in packer["open"].values() for length, _ in row["documents"]]
    return sum(lengths) + packer["rest_tokens"]


def _source_reports(states: list[Mapping[str, Any]], settings: Mapping[str, Any]) -> tuple[SourceReport, ...]:
    counts = [[Counts(**own["sources"][number]["counts"]) for own in states] for number in range(len(settings))]
    total = sum(count.tokens for source in counts for count in source)
    reports = []
    for number, name in enumerate(states[0]["names"]):
        own, reasons = settings[str(number)], Counter[str]()
        for count in counts[number]:
            reasons.update(count.bad)
        tokens = sum(count.tokens for count in counts[number])
        reports.append(
            SourceReport(
                name=name,
                weight=own["weight"],
                share=tokens / total if total else 0.0,
                documents=sum(count.documents for count in counts[number]),
                tokens=tokens,
                epochs=1 + max(state["sources"][number]["position"][0] for state in states),
                thinned_documents=sum(count.thinned for count in counts[number]),
                records=sum(count.records for count in counts[number]),
                bad_records=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
                first_bad=tuple(bad for count in counts[number] for bad in count.first_bad)[:NAMED_IN_META],
                left_out=tuple(own["left_out"]),
            )
        )
    return tuple(reports)
