"""Packed rows from a stream of documents, for runs whose corpus does not fit a machine.

    sources -> shard (rank, worker) -> drawn order -> tokens -> mixture by weight -> rows -> PackedCollator

A stream is resumed, not replayed: `state_dict` says where each source stands, which rows are open and how much of the
last document is to come, and the next row is the one that the first run would have seen.
"""

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from anchor_attn.masks.dialects.copied import IGNORED_LABEL
from anchor_attn.train.items import TOKENS
from anchor_attn.train.packing import check_room
from anchor_attn.train.streaming.chunks import interleave_chunks
from anchor_attn.train.streaming.documents import DocumentStream, Draws, Shard
from anchor_attn.train.streaming.mixture import Mixture
from anchor_attn.train.streaming.report import STATE_FORMAT, StreamReport, read_report
from anchor_attn.train.streaming.rows import PACKINGS, Packing, Row, RowPacker
from anchor_attn.train.streaming.source import open_sources
from anchor_attn.train.tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN_ROWS = 64
WINDOW_DOCUMENTS = 4_096
INTERLEAVING = 1_000_000  # beside the numbers of sources, so that no two draws share numbers


class PackedStream(IterableDataset[dict[str, Any]]):
    """Packed rows without an end, as an iterable dataset for a DataLoader; give it torchdata's StatefulDataLoader.

        stream = PackedStream([StreamSource("web", weight=3), StreamSource("books.jsonl")], seq_len=8192)
        loader = StatefulDataLoader(stream, batch_size=2, num_workers=2, collate_fn=PackedCollator(seq_len=8192))
        loader.load_state_dict(state)      the next batch is the one that came after loader.state_dict()

    A row is as `pack_documents` makes it: `input_ids` int32 with the anchor, and `document_lengths`; `document_ids`
    where chunks are interleaved, and `labels` where a source has a tag. It may be shorter than `seq_len`.

    Every worker of every rank is a shard of its own: together they read every record once an epoch, whatever the
    number of files. Order, thinning and interleaving follow from the seed and the shard.

    Args:
        sources: a path, a name or documents as in `StreamSource`, one of these, or a sequence of them.
        seq_len: tokens a row, the anchor included [S].
        tokenizer: as in `load_tokenizer`; it runs in the workers.
        anchor_tokens: how often the anchor stands at the front of a row.
        packing: "concat" cuts documents at a row's end and goes on in the next, as the paper does; "drop" throws the
            rest away; "best_fit" keeps documents whole where they fit, and leaves slots open.
        open_rows: rows that "best_fit" holds open; more of them leave fewer slots open.
        chunk_tokens: cut documents into chunks of so many tokens and interleave them, inside each row; not when None.
        seed: of every order that is drawn.
        shuffle: draw the order of blocks and, window by window, of documents; keep the files' order when False.
        window_documents: documents of a source that are held to be shuffled, at most 16 MiB of text.
        epochs: how often every source is read; without an end when None. Ranks may then differ in their rows.
        rank: of this process; what torch.distributed or torchrun says when None, 0 where there is neither.
        world_size: processes in all; found as `rank` is.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a setting out of its range, or nothing to read.
    """

    def __init__(
        self,
        sources: Any,
        seq_len: int,
        *,
        tokenizer: "str | PathLike[str] | Tokenizer | PreTrainedTokenizerBase" = "bytes",
        anchor_tokens: int = 1,
        packing: Packing = "concat",
        open_rows: int = OPEN_ROWS,
        chunk_tokens: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        window_documents: int = WINDOW_DOCUMENTS,
        epochs: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if packing not in PACKINGS:
            raise ValueError(f"packing must be one of {PACKINGS}, got {packing!r}; pass one of them.")
        counts = {"open_rows": open_rows, "chunk_tokens": chunk_tokens, "window_documents": window_documents}
        for name, count in {**counts, "epochs": epochs}.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}; leave it out for its default.")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}; pass another one.")
        self.seq_len, self.anchor_tokens, self.packing = seq_len, anchor_tokens, packing
        self.room = check_room(seq_len, anchor_tokens)
        self.open_rows, self.chunk_tokens = open_rows, chunk_tokens
        self.draws = Draws(seed, shuffle, window_documents, epochs)
        self.rank, self.world_size = _process(rank, world_size)
        self.tokenizer = load_tokenizer(tokenizer)
        self.sources = open_sources(sources)
        self._run: _Run | None = None
        self._state: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        shard = self._shard()
        state, self._state = self._state, None
        if state is not None:
            _check_same({"shard": list(shard)}, {"shard": state["shard"]})
        self._run = _Run(self, shard, state)
        return self._run.rows()

    def state_dict(self) -> dict[str, Any]:
        """Where this stream stands: of plain values and bytes, as `torch.load(weights_only=True)` reads them.

        It is that of this copy; the copies in the workers of a StatefulDataLoader are in the loader's own.
        """
        if self._state is not None:
            return dict(self._state)
        run = self._run or _Run(self, self._shard(), None)
        names = [source.name for source in self.sources]  # not among the settings: a folder may move
        return {"format": STATE_FORMAT, "settings": self.settings, "names": names, **run.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the stream of this state stood, at the next `iter`.

        Raises:
            ValueError: the state of something else, or of a stream with other settings, sources or shards.
        """
        if state.get("format") != STATE_FORMAT:
            raise ValueError(
                f"state must be of a PackedStream in the format {STATE_FORMAT!r}, got {state.get('format')!r}; "
                "give a loader's state to the loader."
            )
        _check_same(self.settings, state["settings"])
        self._state, self._run = dict(state), None

    def report(self) -> StreamReport:
        """What this copy has read, packed and left out; for a loader with workers, `read_report` its state."""
        return read_report(self.state_dict())

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that the rows depend on, ready for JSON."""
        return {
            "seq_len": self.seq_len,
            "anchor_tokens": self.anchor_tokens,
            "tokenizer": self.tokenizer.name,
            "packing": self.packing,
            "open_rows": self.open_rows,
            "chunk_tokens": self.chunk_tokens,
            **self.draws._asdict(),
            "sources": {str(number): source.meta() for number, source in enumerate(self.sources)},
        }

    def _shard(self) -> Shard:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        return Shard(self.rank * workers + index, self.world_size * workers)


class _Run:
    """One pass over a stream: everything that moves."""

    def __init__(self, stream: PackedStream, shard: Shard, state: Mapping[str, Any] | None) -> None:
        self.stream, self.shard = stream, shard
        saved = state["sources"] if state else [None] * len(stream.sources)
        self.streams = [
            DocumentStream(source, number, stream.tokenizer, shard, stream.draws, own)
            for number, (source, own) in enumerate(zip(stream.sources, saved, strict=True))
        ]
        self.mixture = Mixture(self.streams, shard.number, state["last_source"] if state else None)
        packer = state["packer"] if state else None
        rest_of = self.mixture.last() if packer and packer["rest_tokens"] else None
        self.packer = RowPacker(stream.packing, stream.room, stream.open_rows, packer, rest_of)
        self._anchor = np.full(stream.anchor_tokens, stream.tokenizer.anchor_token_id, dtype=np.int32)
        self._has_labels = any(source.settings.tag for source in stream.sources)

    def state_dict(self) -> dict[str, Any]:
        return {
            "shard": list(self.shard),
            "sources": [stream.state_dict() for stream in self.streams],
            "last_source": self.mixture.last_source,
            "packer": self.packer.state_dict(),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        while True:
            while (row := self.packer.take()) is not None:
                yield self._finished(row)
            document = self.mixture.draw()
            if document is None:
                break
            self.packer.add(document)
        while (row := self.packer.close()) is not None:
            yield self._finished(row)

    def _finished(self, row: Row) -> dict[str, Any]:
        lengths = [len(document.ids) for document in row.documents]
        own = np.concatenate([document.ids for document in row.documents])
        labels = _labels(own, row) if self._has_labels else None
        where: dict[str, Any] = {"document_lengths": lengths}
        if self.stream.chunk_tokens is not None:
            rng = np.random.default_rng([self.stream.draws.seed, INTERLEAVING, *self.shard, self.packer.counts.rows])
            order, ids = interleave_chunks(lengths, self.stream.chunk_tokens, rng)
            own, labels = own[order], None if labels is None else labels[order]
            where = {"document_ids": np.concatenate([np.zeros(len(self._anchor), dtype=np.int32), ids])}
        finished = {TOKENS: np.concatenate([self._anchor, own]), **where}
        if labels is not None:
            finished["labels"] = np.concatenate([np.full_like(self._anchor, IGNORED_LABEL), labels])
        return finished


def _labels(own: NDArray[np.int32], row: Row) -> NDArray[np.int32]:
    labels, begin = own.copy(), 0
    for document in row.documents:
        labels[begin : begin + document.unlabelled] = IGNORED_LABEL
        begin += len(document.ids)
    return labels


def _process(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size must be given together, got {rank} and {world_size}; pass both.")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank must be from 0 to world_size - 1, got {rank} of {world_size}; pass both as torchrun does."
        )
    return rank, world_size


def _check_same(own: Mapping[str, Any], saved: Mapping[str, Any], where: str = "") -> None:
    """Raise a ValueError that names the first difference."""
    for name in dict.fromkeys([*own, *saved]):
        here, there = own.get(name), saved.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            _check_same(here, there, f"{where}{name}: ")
        elif here != there:
            raise ValueError(
                f"state must be of the same stream, got {where}{name}={there!r} where this one has {here!r}; "
                "resume with the settings, files, ranks and workers that it was saved with."
            )
