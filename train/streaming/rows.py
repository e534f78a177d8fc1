"""Documents into rows while they come: what is open stays bounded, and every token is accounted for.

documents   [a a a] [b b b b b] [c c]            seq_len 6
concat      0 a a a b b     0 b b b c c          the rest of b opens the next row, as a document of its own
drop        0 a a a b b     0 c c                the rest of b is thrown away
best_fit    0 b b b b b     0 a a a c c          whole where they fit; what is longer than a row is cut
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anchor_attn.train.streaming.documents import Document

Packing = Literal["concat", "drop", "best_fit"]
PACKINGS = ("concat", "drop", "best_fit")


class Row(NamedTuple):
    """The documents of a row, in order, the anchor not among them."""

    documents: list[Document]


@dataclass
class RowCounts:
    """What became of the tokens so far; tags are counted as tokens.

    Attributes:
        rows: rows made.
        packed_tokens: in the rows, the anchor not counted.
        padded_tokens: slots of the rows that a collator fills up.
        cut_documents: documents that a row's end cuts, in two or in more.
        dropped_tokens: of documents that lost their rest.
    """

    rows: int = 0
    packed_tokens: int = 0
    padded_tokens: int = 0
    cut_documents: int = 0
    dropped_tokens: int = 0


class RowPacker:
    """Rows from documents, one document at a time.

    `add` a document, then `take` rows until there are none; at the end `close` until there are none.

    Args:
        packing: "concat", "drop" or "best_fit".
        room: document tokens a row.
        open_rows: rows that "best_fit" holds open; the others have one.
        state: of another packer, from which to go on.
        rest_of: the document that the other one had not done with.
    """

    def __init__(
        self,
        packing: Packing,
        room: int,
        open_rows: int,
        state: Mapping[str, Any] | None = None,
        rest_of: Document | None = None,
    ) -> None:
        self.packing, self.room, self.most_open = packing, room, open_rows if packing == "best_fit" else 1
        self.counts = RowCounts(**state["counts"]) if state else RowCounts()
        self._open = {int(name): _OpenRow.load(row) for name, row in state["open"].items()} if state else {}
        self._next_row = state["next_row"] if state else 0
        self._rest = Document(np.zeros(0, dtype=np.int32))
        if state and rest_of is not None:
            self._rest = _behind(rest_of, len(rest_of.ids) - state["rest_tokens"])

    @property
    def rest_tokens(self) -> int:
        """Tokens of the last document that are in no row yet."""
        return len(self._rest.ids)

    def state_dict(self) -> dict[str, Any]:
        """The open rows, and how much of the last document is to come; not its tokens, which can be read again.

        Rows are told apart by their numbers, never by their order: torchdata sends what has changed of a worker's
        state as a set of keys, and its dicts come back in any order.
        """
        return {
            "counts": dict(vars(self.counts)),
            "open": {str(name): row.state_dict() for name, row in self._open.items()},
            "next_row": self._next_row,
            "rest_tokens": self.rest_tokens,
        }

    def add(self, document: Document) -> None:
        """Take in the next document; the one before it must be in its rows."""
        self._rest = document
        room = self.room if self.packing == "best_fit" else self._room_of_open()
        self.counts.cut_documents += len(document.ids) > room

    def take(self) -> Row | None:
        """A row that is ready, or None when the next document is needed."""
        while self.rest_tokens:
            row = self._take_best_fit() if self.packing == "best_fit" else self._take_in_order()
            if row is not None:
                return row
        return None

    def close(self) -> Row | None:
        """Of the rows that are still open the one that was opened first, or None when there are none."""
        return self._finish(min(self._open)) if self._open else None

    def _take_in_order(self) -> Row | None:
        name = next(iter(self._open)) if self._open else self._new_row()
        row = self._open[name]
        space = self.room - row.tokens
        row.append(Document(self._rest.ids[:space], self._rest.unlabelled))
        self._rest = _behind(self._rest, space)
        if row.tokens < self.room:
            return None
        if self.packing == "drop":
            self.counts.dropped_tokens += self.rest_tokens
            self._rest = _behind(self._rest, self.rest_tokens)
        return self._finish(name)

    def _take_best_fit(self) -> Row | None:
        tokens = self.rest_tokens
        if tokens >= self.room:
            full = _OpenRow()
            full.append(Document(self._rest.ids[: self.room], self._rest.unlabelled))
            self._rest = _behind(self._rest, self.room)
            return self._counted(full)
        most = self.room - tokens
        fitting = [(-row.tokens, name) for name, row in self._open.items() if row.tokens <= most]
        if not fitting and len(self._open) == self.most_open:
            # The fullest gives way; the document finds its place at the next call.
            return self._finish(min((-row.tokens, name) for name, row in self._open.items())[1])
        name = min(fitting)[1] if fitting else self._new_row()
        self._open[name].append(self._rest)
        self._rest = _behind(self._rest, tokens)
        return self._finish(name) if self._open[name].tokens == self.room else None

    def _room_of_open(self) -> int:
        return self.room - sum(row.tokens for row in self._open.values())

    def _new_row(self) -> int:
        self._open[self._next_row] = _OpenRow()
        self._next_row += 1
        return self._next_row - 1

    def _finish(self, name: int) -> Row:
        return self._counted(self._open.pop(name))

    def _counted(self, row: "_OpenRow") -> Row:
        self.counts.rows += 1
        self.counts.packed_tokens += row.tokens
        self.counts.padded_tokens += self.room - row.tokens
        return Row(row.documents)


class _OpenRow:
    """Documents of a row that has room left."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.tokens = 0
        self._state: dict[str, Any] | None = None

    def append(self, document: Document) -> None:
        # A copy: what is open would keep whole batches of token ids in memory.
        self.documents.append(document._replace(ids=document.ids.copy()))
        self.tokens += len(document.ids)
        self._state = None

    def state_dict(self) -> dict[str, Any]:
        """Kept until the row changes: a loader that saves a state a batch sends only what is another object."""
        if self._state is None:
            ids = np.concatenate([document.ids for document in self.documents]).astype("<i4")
            documents = [[len(document.ids), document.unlabelled] for document in self.documents]
            self._state = {"ids": ids.tobytes(), "documents": documents}
        return self._state

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> "_OpenRow":
        row, begin = cls(), 0
        ids: NDArray[np.int32] = np.frombuffer(state["ids"], dtype="<i4").astype(np.int32)
        for length, unlabelled in state["documents"]:
            row.append(Document(ids[begin : begin + length], unlabelled))
            begin += length
        return row


def _behind(document: Document, tokens: int) -> Document:
    """What is left of a document behind so many tokens."""
    return Document(document.ids[tokens:], max(0, document.unlabelled - tokens))
