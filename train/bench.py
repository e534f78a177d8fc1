"""Packing against TRL's `pack_dataset`: the same dataset of token ids, whole calls in turn, after a parity check.

TRL (https://github.com/huggingface/trl) is a rival here and no dependency. Its strategies do different work:

    wrapped     rows are cut from the stream of tokens; where documents begin is lost
    bfd         whole documents, best fit first; what is longer than a row loses its rest
    bfd_split   as bfd, but the rest becomes a document of its own
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anchor_attn.lengths import draw_corpus_lengths
from anchor_attn.results import CheckError
from anchor_attn.train.items import TOKENS
from anchor_attn.train.packing import CUTS, PackedRows, pack_documents
from anchor_attn.train.tokens import BATCH_DOCUMENTS

if TYPE_CHECKING:
    from datasets import Dataset

STRATEGIES = ("wrapped", "bfd", "bfd_split")


@dataclass(frozen=True)
class PackingTiming:
    """What one packer took; a packer that is not installed has a name and nothing else.

    Attributes:
        name: whose packer, and its strategy.
        seq_len: tokens a row.
        tokens: document tokens that went in.
        tokens_per_s: `tokens` over `seconds`.
        seconds: of the call that packs, median of the rounds, the first left out.
        fastest_s: of the counted rounds.
        slowest_s: of the counted rounds.
        read_s: of reading every row once as a numpy array, median as well; some packers leave the work to it.
        rows: rows made.
        dropped_tokens: document tokens in none of them.
        knows_documents: whether a row says where its documents begin.
        ratio_to_wrapped: tokens a second over those of TRL's wrapped.
        ratio_to_bfd: tokens a second over those of TRL's bfd.
    """

    name: str
    seq_len: int
    tokens: int
    tokens_per_s: float | None = None
    seconds: float | None = None
    fastest_s: float | None = None
    slowest_s: float | None = None
    read_s: float | None = None
    rows: int | None = None
    dropped_tokens: int | None = None
    knows_documents: bool | None = None
    ratio_to_wrapped: float | None = None
    ratio_to_bfd: float | None = None


@dataclass(frozen=True)
class Packer:
    """Something to time: `pack` is the call, the others look at what it gave."""

    name: str
    pack: Callable[[], Any]
    packed_tokens: Callable[[Any], int]
    rows: Callable[[Any], Iterable[Any]]
    knows_documents: bool


class Vocabulary:
    """As many token ids as LLaMA-2 has, and no text."""

    name = "bench"
    anchor_token_id = 1
    vocab_size = 32_000

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Nothing: the documents of the benchmark are token ids."""
        if texts:
            raise TypeError(f"texts must be none, got {len(texts)}; pass token ids.")
        return []


def bench_packing(tokens: int, seq_len: int, rounds: int, seed: int) -> list[PackingTiming]:
    """Pack documents of log-normal lengths, `tokens` in all, with `pack_documents` and with TRL.

    Ratios are None, and TRL's records empty, where TRL is not installed (`pip install --no-deps trl`).

    Raises:
        CheckError: a token is not in the rows, or not in order; then nothing is timed.
        ValueError: no token, no round, or a row too short.
    """
    if tokens < 1 or rounds < 1:
        raise ValueError(f"tokens and rounds must be at least 1, got {tokens} and {rounds}; pass 20000000 and 5, say.")
    lengths = np.array(draw_corpus_lengths(tokens, seed))
    ids = np.random.default_rng(seed).integers(0, Vocabulary.vocab_size, lengths.sum(), dtype=np.int32)
    dataset = token_dataset(ids, lengths)
    pack = partial(pack_documents, dataset, seq_len, tokenizer=Vocabulary())
    check_packing(pack(), ids, lengths)
    packers = [Packer(f"ours {cut}", partial(pack, cut=cut), _our_tokens, iter, True) for cut in CUTS]
    rivals = _trl_packers(dataset, seq_len)
    with _no_progress_bars():
        timings = time_packers(packers + rivals, seq_len, len(ids), rounds)
    absent = () if rivals else STRATEGIES
    return timings + [PackingTiming(f"TRL {strategy} (not installed)", seq_len, len(ids)) for strategy in absent]


def token_dataset(ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> "Dataset":
    """A dataset of these documents, uncopied, in chunks of 1,000 as `Dataset.map` leaves a tokenized corpus."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets import Dataset

    ends = np.concatenate([[0], lengths.cumsum()])
    chunks = []
    for first in range(0, len(lengths), BATCH_DOCUMENTS):
        offsets = ends[first : first + BATCH_DOCUMENTS + 1]
        values = pa.array(ids[offsets[0] : offsets[-1]])
        chunks.append(pa.ListArray.from_arrays(pa.array((offsets - offsets[0]).astype(np.int32)), values))
    return Dataset(pa.table({TOKENS: pa.chunked_array(chunks)}))


def check_packing(rows: PackedRows, ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
    """Raise unless the rows hold every token in order, and say of each where its document begins.

    Raises:
        CheckError: they do not.
    """
    place = 0
    bounds: list[NDArray[np.int64]] = []
    for row in rows:
        own = row[TOKENS][rows.anchor_tokens :]
        if not np.array_equal(own, ids[place : place + len(own)]):
            raise CheckError(
                f"rows must hold the documents' tokens in order before they are timed, got others from token {place} "
                "on; report this with the version of datasets."
            )
        bounds.append(place + np.cumsum(row["document_lengths"]))
        place += len(own)
    if place != len(ids):
        raise CheckError(
            f"rows must hold every token before they are timed, got {place} of {len(ids)}; "
            "report this with the version of datasets."
        )
    row_ends = [bound[-1] for bound in bounds]
    if not np.array_equal(np.concatenate(bounds), np.union1d(row_ends, lengths.cumsum())):
        raise CheckError(
            "rows must say where documents begin before they are timed, got other bounds than the documents'; "
            "report this with the version of numpy."
        )


def time_packers(packers: list[Packer], seq_len: int, tokens: int, rounds: int) -> list[PackingTiming]:
    """Time packers, `rounds` times each in a drawn order, after one round that is not counted."""
    # Fresh memory is dear behind a packer that has just given much back: nobody keeps that place.
    order = random.Random(0)
    pack_s: dict[str, list[float]] = {packer.name: [] for packer in packers}
    read_s: dict[str, list[float]] = {packer.name: [] for packer in packers}
    counts: dict[str, tuple[int, int]] = {}
    for _ in range(rounds + 1):
        for packer in order.sample(packers, len(packers)):
            start = time.perf_counter()
            packed = packer.pack()
            end = time.perf_counter()
            for _row in packer.rows(packed):
                pass
            pack_s[packer.name].append(end - start)
            read_s[packer.name].append(time.perf_counter() - end)
            counts[packer.name] = len(packed), packer.packed_tokens(packed)
            del packed  # two results at once would be twice the memory
    medians = {name: median(seconds[1:]) for name, seconds in pack_s.items()}
    wrapped, bfd = medians.get("TRL wrapped"), medians.get("TRL bfd")
    return [
        PackingTiming(
            name=packer.name,
            seq_len=seq_len,
            tokens=tokens,
            tokens_per_s=tokens / (seconds := medians[packer.name]),
            seconds=seconds,
            fastest_s=min(pack_s[packer.name][1:]),
            slowest_s=max(pack_s[packer.name][1:]),
            read_s=median(read_s[packer.name][1:]),
            rows=counts[packer.name][0],
            dropped_tokens=tokens - counts[packer.name][1],
            knows_documents=packer.knows_documents,
            ratio_to_wrapped=None if wrapped is None else wrapped / seconds,
            ratio_to_bfd=None if bfd is None else bfd / seconds,
        )
        for packer in packers
    ]


def _our_tokens(rows: PackedRows) -> int:
    return rows.report.packed_tokens


def _trl_packers(dataset: "Dataset", seq_len: int) -> list[Packer]:
    """TRL's strategies; none where TRL is not installed."""
    from pyarrow import compute

    try:
        from trl import pack_dataset
    except ImportError:
        return []

    def packed_tokens(packed: "Dataset") -> int:
        lengths = compute.list_value_length(packed.with_format("arrow")[:].column(TOKENS))
        return int(compute.sum(lengths).as_py())

    def rows(packed: "Dataset") -> Iterable[Any]:
        return iter(packed.with_format("numpy"))

    return [
        Packer(f"TRL {strategy}", partial(pack_dataset, dataset, seq_len, strategy), packed_tokens, rows, knows)
        for strategy, knows in zip(STRATEGIES, (False, True, True), strict=True)
    ]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without the bars of `datasets`, which TRL's packing draws."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
