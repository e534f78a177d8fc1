"""One source of a stream, as one shard sees it: its documents in a drawn order, epoch after epoch.

    blocks    drawn order  ->  windows of documents, shuffled  ->  token ids  ->  short ones thinned where long ones
                                                                                  are wanted more often

Every draw follows from (seed, source, shard, epoch, window): no buffer has to be saved. What is saved is where the
window began and how many of its documents are out, a few numbers; a resumed run reads that one window again.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anchor_attn.train.documents import NAMED_IN_META, text_fault, tokens_fault
from anchor_attn.train.items import TOKENS, one_line
from anchor_attn.train.streaming.parts import Record, shard_blocks
from anchor_attn.train.streaming.source import OpenSource
from anchor_attn.train.tokenizers import Tokenizer

WINDOW_BYTES = 16 * 2**20
ENCODED_TOGETHER = 256
MOST_COUNTED = 1_000  # documents, where a shard has none and the error says how many there are
ORDER_OF_BLOCKS, ORDER_OF_WINDOW, THINNING = range(3)  # what is drawn, so that no two draws share numbers


class Shard(NamedTuple):
    """Which part of the whole: of all workers of all ranks, counted together."""

    number: int
    num_shards: int


class Draws(NamedTuple):
    """How a stream draws its order."""

    seed: int
    shuffle: bool
    window_documents: int
    epochs: int | None


class Document(NamedTuple):
    """Token ids int32 of a document, the first `unlabelled` of which (tag, first own token) are not learned."""

    ids: NDArray[np.int32]
    unlabelled: int = 0


@dataclass
class Counts:
    """What one shard has seen of one source.

    Attributes:
        documents: drawn, again in every epoch.
        tokens: of these, tags not counted.
        thinned: documents left out so that long ones are drawn more often.
        records: read in the first epoch, bad ones included.
        bad: records that hold no document, by reason, in the first epoch.
        first_bad: the first of them, "data.jsonl:17: not JSON".
    """

    documents: int
    tokens: int
    thinned: int
    records: int
    bad: dict[str, int]
    first_bad: list[str]


class Held(NamedTuple):
    """A document of the window, and where it came from."""

    content: "str | NDArray[np.int32]"
    part: int
    place: int


class DocumentStream:
    """The documents of one source for one shard.

    Args:
        source: the source with its parts.
        number: its place among the sources, so that each draws another order.
        tokenizer: makes token ids of its texts, a few hundred at a time.
        shard: which part of it is read.
        draws: seed, order, window and epochs.
        state: of another one, from which to go on; the front when None.

    Raises:
        ValueError: more bad records than the source allows, or no document for this shard. Where epochs are counted and
            all documents lie with other shards, it warns and gives nothing.
    """

    def __init__(
        self,
        source: OpenSource,
        number: int,
        tokenizer: Tokenizer,
        shard: Shard,
        draws: Draws,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.number, self.tokenizer, self.shard, self.draws = source, number, tokenizer, shard, draws
        self.counts = Counts(**_unshared(state["counts"])) if state else Counts(0, 0, 0, 0, {}, [])
        self._blocks = shard_blocks(source.parts, *shard)
        self._tag = tokenizer.encode([source.settings.tag])[0] if source.settings.tag else None
        self._epoch: int
        self._window_number: int
        self._block: int  # with `_place`, where reading goes on
        self._place: int | None
        self._out: int  # documents of the window that have been drawn
        self._found_any: bool
        position = state["position"] if state else (0, 0, 0, None, 0, False)
        self._epoch, self._window_number, self._block, self._place, self._out, self._found_any = position
        self._open_epoch()
        self._open_window(again=state is not None)

    def state_dict(self) -> dict[str, Any]:
        """Where the next document comes from: numbers and reasons, no text."""
        position = [self._epoch, self._window_number, *self._window_begin, self._out, self._found_any]
        return {"position": position, "counts": _unshared(vars(self.counts))}

    def draw(self) -> Document | None:
        """The next document, or None when all epochs are over."""
        while True:
            while self._out < len(self._window):
                place, self._out = self._out, self._out + 1
                ids = self._encode(place)
                if not len(ids):
                    self._count_bad(self._window[place].part, self._window[place].place, "no token")
                elif self._is_thinned(place, len(ids)):
                    self.counts.thinned += 1
                else:
                    self.counts.documents += 1
                    self.counts.tokens += len(ids)
                    self._found_any = True
                    return self._document(ids)
            if self._window:
                self._window_number, self._out = self._window_number + 1, 0
                self._open_window()
            elif not self._next_epoch():
                return None

    def last(self) -> Document:
        """The document that was drawn last, once more."""
        return self._document(self._encode(self._out - 1))

    def _document(self, ids: NDArray[np.int32]) -> Document:
        return Document(ids) if self._tag is None else Document(np.concatenate([self._tag, ids]), len(self._tag) + 1)

    def _is_thinned(self, place: int, tokens: int) -> bool:
        settings = self.source.settings
        if settings.long_tokens is None or tokens >= settings.long_tokens:
            return False
        return bool(self._thinning[place] * settings.long_factor >= 1)

    def _next_epoch(self) -> bool:
        """Open the next epoch; False where there is none."""
        # A thinned shard may be left with nothing once.
        if not (self._found_any or self.counts.thinned) and self._epoch == 0:
            self._say_empty()
        if self.draws.epochs == self._epoch + 1:
            return False
        self._epoch, self._window_number, self._block, self._place, self._out = self._epoch + 1, 0, 0, None, 0
        self._open_epoch()
        self._open_window()
        return True

    def _say_empty(self) -> None:
        """Raise a ValueError; warn where epochs are counted and other shards have the documents."""
        found = self._count_documents()
        said = (
            f"sources[{self.number}] must hold a document for each of {self.shard.num_shards} shards (ranks × "
            f"workers), got {'at least ' if found == MOST_COUNTED else ''}{found:,} in {self.source.name!r} and none "
            f"for shard {self.shard.number}{_first(self.counts)}; use fewer workers or ranks, or a source with more "
            "documents."
        )
        if self.draws.epochs is None or self.counts.records or not found:
            raise ValueError(said)
        warnings.warn(f"A shard gives no row of a source: {said}", stacklevel=2)

    def _count_documents(self) -> int:
        """Those of all shards, as far as `MOST_COUNTED`."""
        found = 0
        for part in self.source.parts:
            try:
                for begin, end in part.blocks(0, part.size):
                    for record in part.read(begin, end, None):
                        found += self._content(record)[1] is None
                        if found == MOST_COUNTED:
                            return found
            except Exception:  # what cannot be read holds none; its own shard says so
                continue
        return found

    def _open_epoch(self) -> None:
        count = len(self._blocks)
        self._order = self._rng(ORDER_OF_BLOCKS).permutation(count) if self.draws.shuffle else np.arange(count)
        self._records = self._read(self._block, self._place)

    def _read(self, block: int, place: int | None) -> Iterator[tuple[int, Record]]:
        """Part and record, to the end of the epoch; `_block` and `_place` say where reading goes on."""
        for index in range(block, len(self._blocks)):
            self._block, self._place = index, place
            part, begin, end = self._blocks[self._order[index]]
            try:
                for record in self.source.parts[part].read(begin, end, place):
                    self._place = record.next_place
                    yield part, record
            except Exception as error:  # of a decompressor, pyarrow, datasets, the file system or the network
                at, self._block, self._place = self._place or 0, index + 1, None
                yield part, Record(None, f"cannot be read from here on, {one_line(error)}", at, at)
            place = None
        self._block, self._place = len(self._blocks), None

    def _open_window(self, *, again: bool = False) -> None:
        """Read the next documents and draw their order; what is read again is not counted again."""
        self._window_begin = self._block, self._place
        found: list[Held] = []
        room_bytes = WINDOW_BYTES
        for part, record in self._records:
            content, fault = self._content(record)
            if not again and self._epoch == 0:
                self.counts.records += 1
                if fault is not None:
                    self._count_bad(part, record.place, fault)
            if fault is None:
                found.append(Held(content, part, record.place))
                room_bytes -= len(content) if isinstance(content, str) else content.nbytes
            if len(found) == self.draws.window_documents or room_bytes <= 0:
                break
        order = self._rng(ORDER_OF_WINDOW, self._window_number).permutation(len(found))
        self._window = [found[place] for place in order] if self.draws.shuffle else found
        self._thinning = self._rng(THINNING, self._window_number).random(len(found))
        self._encoded: tuple[int, list[NDArray[np.int32]]] = -1, []

    def _encode(self, place: int) -> NDArray[np.int32]:
        batch, within = divmod(place, ENCODED_TOGETHER)
        if self._encoded[0] != batch:
            first = batch * ENCODED_TOGETHER
            contents = [held.content for held in self._window[first : first + ENCODED_TOGETHER]]
            texts = iter(self.tokenizer.encode([content for content in contents if isinstance(content, str)]))
            self._encoded = batch, [next(texts) if isinstance(content, str) else content for content in contents]
        return self._encoded[1][within]

    def _content(self, record: Record) -> "tuple[str | NDArray[np.int32], str | None]":
        """The text or the token ids of a record, and why it has none."""
        if record.fault is not None:
            return "", record.fault
        column = self.source.settings.text_column
        row: Mapping[str, Any] = record.content if isinstance(record.content, Mapping) else {column: record.content}
        if column in row:
            text = row[column]
            return (text, None) if (fault := text_fault(text)) is None else ("", fault)
        if TOKENS not in row:
            if not row:
                return "", "a record without columns"
            return "", f"no column {column!r} or {TOKENS!r} among {', '.join(map(repr, row))}"
        tokens = row[TOKENS]
        fault = tokens_fault(tokens)
        if fault is None and max(tokens) >= self.tokenizer.vocab_size:
            fault = f"token id outside the vocabulary of {self.tokenizer.vocab_size:,}"
        return (np.array(tokens, dtype=np.int32), None) if fault is None else ("", fault)

    def _count_bad(self, part: int, place: int, fault: str) -> None:
        if self._epoch:
            return
        self.counts.bad[fault] = self.counts.bad.get(fault, 0) + 1
        bad, allowed = sum(self.counts.bad.values()), self.source.settings.bad_records
        if bad > allowed or len(self.counts.first_bad) < NAMED_IN_META:
            self.counts.first_bad.append(f"{self.source.parts[part].name_of(place)}: {fault}")
        if bad > allowed:
            raise ValueError(
                f"sources[{self.number}] must hold at most bad_records={allowed} bad records a worker, got {bad} "
                f"within the first {self.counts.records} of {self.source.name!r}{_first(self.counts)}; mend them, or "
                "raise bad_records."
            )

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.draws.seed, self.number, *self.shard, self._epoch, *what])


def _first(counts: Counts) -> str:
    return f" ({'; '.join(counts.first_bad[-3:])})" if counts.first_bad else ""


def _unshared(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {**counts, "bad": dict(counts["bad"]), "first_bad": list(counts["first_bad"])}
