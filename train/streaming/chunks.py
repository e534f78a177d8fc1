"""Interleaved chunks: every document of a row in pieces, the pieces of different documents mixed, each in its order.

    row            0 a a a a a b b b c c        chunks of 2
    interleaved    0 a a b b c c a a b a        document_ids   0 1 1 2 2 3 3 1 1 2 1

The interleaving that the paper tested took its chunks from the front of the pack, whatever document they were to come
from (https://github.com/haonan3/AnchorContext); here the n-th chunk of a document is its own n-th chunk.
"""

import numpy as np
from numpy.typing import NDArray


def interleave_chunks(
    document_lengths: list[int], chunk_tokens: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """An order of the tokens in which chunks of different documents alternate at random, and their document ids.

        interleave_chunks([5, 3], 2, …)     order [0 1 5 6 2 3 7 4]     document_ids [1 1 2 2 1 1 2 1]

    Every interleaving that keeps the chunks of each document in order is as likely as any other.

    Args:
        document_lengths: tokens a document, one after the other.
        chunk_tokens: tokens a chunk; the last of a document may be shorter.
        rng: what the order is drawn from.

    Returns:
        Places int64 of the tokens in their new order, and ids int32, 1, 2, … by first appearance.

    Raises:
        ValueError: a chunk of no token.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}; pass 512, say.")
    lengths = np.asarray(document_lengths, dtype=np.int64)
    chunks = -(-lengths // chunk_tokens)
    drawn = rng.permutation(np.repeat(np.arange(len(lengths)), chunks))
    # A stable sort back to the documents hands the n-th place of a document to its n-th chunk.
    places = np.empty(len(drawn), dtype=np.int64)
    places[np.argsort(drawn, kind="stable")] = np.arange(len(drawn))
    first_chunks = np.cumsum(chunks) - chunks
    within = places - first_chunks[drawn]
    begins = (np.cumsum(lengths) - lengths)[drawn] + within * chunk_tokens
    sizes = np.minimum(chunk_tokens, lengths[drawn] - within * chunk_tokens)
    starts = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)
    order = starts + np.arange(int(lengths.sum()))
    first_seen = np.unique(drawn, return_index=True)[1]
    numbers = np.empty(len(lengths), dtype=np.int32)
    numbers[np.argsort(first_seen, kind="stable")] = np.arange(1, len(lengths) + 1)
    return order, np.repeat(numbers[drawn], sizes)
