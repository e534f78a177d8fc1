"""Document lengths drawn from a seed, as rows of different corpora have them.

    name           what a row holds
    uniform        documents of 300 … 1,400 tokens, or of other bounds
    web-text       log-normal (6.5, 1.2), clipped to 8 … 32,768: median 665, mean about 1,360
    all-short      documents of 128 … 512
    one-long       one document of half the row, the rest as all-short
    prolong-like   60 % of the row in documents of 65,536, the rest as web-text

"prolong-like" follows the ratio of ProLong's best mix, 60 % long documents (books and code repositories, in pieces of
64K tokens) to 40 % short ones (https://arxiv.org/abs/2410.02660, sections 3 and 4); in a row too short for it, the long
document is cut to 60 % of the row.
"""

import random
from collections.abc import Callable

DISTRIBUTIONS = ("uniform", "web-text", "all-short", "one-long", "prolong-like")
SHORTEST_TOKENS, LONGEST_TOKENS = 300, 1400

MEAN_LOG_TOKENS, SD_LOG_TOKENS = 6.5, 1.2
CORPUS_SHORTEST_TOKENS, CORPUS_LONGEST_TOKENS = 8, 32_768
SHORT_TOKENS = (128, 512)
PROLONG_TOKENS, PROLONG_SHARE = 65_536, 0.6


def draw_distribution(
    name: str, tokens: int, seed: int, shortest: int = SHORTEST_TOKENS, longest: int = LONGEST_TOKENS
) -> list[int]:
    """Document lengths of a distribution that add up to `tokens`, in a drawn order.

        draw_distribution("one-long", 4095, 0)[:6]    [382, 325, 510, 2047, 148, 343]

    Args:
        name: one of `DISTRIBUTIONS`.
        tokens: of all documents, the anchor not counted.
        seed: of lengths and order.
        shortest: tokens of the shortest document of "uniform".
        longest: tokens of the longest document of "uniform".

    Raises:
        ValueError: an unknown name, or no such documents add up to `tokens`.
    """
    draws: dict[str, Callable[[], list[int]]] = {
        "uniform": lambda: draw_lengths(tokens, shortest, longest, seed),
        "web-text": lambda: draw_corpus_lengths(tokens, seed),
        "all-short": lambda: draw_lengths(tokens, *SHORT_TOKENS, seed),
        "one-long": lambda: [tokens // 2, *draw_lengths(tokens - tokens // 2, *SHORT_TOKENS, seed)],
        "prolong-like": lambda: _prolong_lengths(tokens, seed),
    }
    if name not in draws:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {name!r}; pass one of them.")
    lengths = draws[name]()
    if name in ("one-long", "prolong-like"):
        random.Random(seed).shuffle(lengths)
    return lengths


def draw_lengths(tokens: int, shortest: int, longest: int, seed: int) -> list[int]:
    """Document lengths between `shortest` and `longest` that add up to `tokens`, from a seed.

    Raises:
        ValueError: no number of such documents adds up to `tokens`.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(
            f"shortest and longest must be lengths in this order, got {shortest} and {longest}; pass 300 and 1400, say."
        )
    fewest, most = -(-tokens // longest), tokens // shortest
    if fewest > most or tokens < 1:
        raise ValueError(
            f"seq_len must hold documents of {shortest} to {longest} tokens, got room for {tokens}; "
            "raise seq_len, or lower shortest."
        )
    documents = min(max(round(2 * tokens / (shortest + longest)), fewest), most)
    draw = random.Random(seed)
    spare, lengths = tokens - documents * shortest, []
    for left in range(documents - 1, -1, -1):  # what is drawn leaves no more and no less than the others can take
        extra = draw.randint(max(0, spare - left * (longest - shortest)), min(longest - shortest, spare))
        lengths.append(shortest + extra)
        spare -= extra
    draw.shuffle(lengths)
    return lengths


def draw_corpus_lengths(tokens: int, seed: int) -> list[int]:
    """Document lengths as corpora have them, log-normal and clipped to 8 … 32,768; the last is cut to fit `tokens`."""
    draw, lengths = random.Random(seed), list[int]()
    room = tokens
    while room:
        drawn = round(draw.lognormvariate(MEAN_LOG_TOKENS, SD_LOG_TOKENS))
        lengths.append(min(max(drawn, CORPUS_SHORTEST_TOKENS), CORPUS_LONGEST_TOKENS, room))
        room -= lengths[-1]
    return lengths


def _prolong_lengths(tokens: int, seed: int) -> list[int]:
    long_tokens = round(PROLONG_SHARE * tokens)
    whole, rest = divmod(long_tokens, PROLONG_TOKENS)
    return [PROLONG_TOKENS] * whole + [rest] * (rest > 0) + draw_corpus_lengths(tokens - long_tokens, seed)
