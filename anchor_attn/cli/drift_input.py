"""What the options of `anchor-attn drift` say: numbers with suffixes, names, documents."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anchor_attn.masks import PackedLayout

SUFFIXES = {"": 1, "k": 1_000, "K": 1_000, "M": 1_000_000, "Ki": 2**10, "Mi": 2**20}
# What is passed where an option is wrong.
EXAMPLES = {"layers": "0,5,11", "documents": "300,500,223", "lengths": "512,2Ki"}
NUMBER = re.compile(r"(\d[\d_]*)(k|K|M|Ki|Mi)?")


def read_numbers(text: str, name: str) -> list[int]:
    """Whole numbers apart by commas or spaces.

        read_numbers("16,30k,4M,128Ki", "shifts")      [16, 30000, 4000000, 131072]

    Args:
        text: k and M are thousands and millions, Ki and Mi 1,024 and 1,048,576.
        name: of the parameter.

    Raises:
        ValueError: none, or something else.
    """
    example = EXAMPLES.get(name, "16,1000,4M")
    words = text.replace(",", " ").split()
    found = [NUMBER.fullmatch(word) for word in words]
    for word, match in zip(words, found, strict=True):
        if match is None:
            raise ValueError(
                f"{name} must be whole numbers apart by commas, got {word!r}; pass {example}, say, with k and M for "
                "thousands and millions, Ki and Mi for 1,024 and 1,048,576."
            )
    if not words:
        raise ValueError(f"{name} must be given, got {text!r}; pass {example}, say.")
    return [int(match[1].replace("_", "")) * SUFFIXES[match[2] or ""] for match in found if match is not None]


def read_policies(text: str) -> list[str]:
    """Names apart by commas.

    Raises:
        ValueError: none, or one twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"policies must be given, got {text!r}; pass bf16_cos_sin,exact, say.")
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise ValueError(f"policies must be named once, got {twice!r} named twice; leave one out.")
    return names


def read_documents_row(documents: str | None) -> "PackedLayout | None":
    """A row of documents behind an anchor token, by their lengths; None where none are given."""
    if documents is None:
        return None
    from anchor_attn.masks import PackedLayout

    lengths = read_numbers(documents, "documents")
    if min(lengths) < 1:
        raise ValueError(f"documents must have 1 token at least each, got {min(lengths)}; pass 300,500,223, say.")
    return PackedLayout.from_lengths([lengths])


def check_lengths(lengths: Sequence[int], layout: "PackedLayout | None") -> None:
    """Raise a ValueError for a row of no tokens, of more than has exact positions, or for two lengths of one row."""
    from anchor_attn.drift.policies import POSITION_LIMIT

    if layout is not None and lengths:
        raise ValueError(
            f"lengths must be left out beside documents, got {list(lengths)}: the documents and the anchor are "
            f"{layout.seq_len:,} tokens; leave one out."
        )
    if lengths and max(lengths) >= POSITION_LIMIT:
        raise ValueError(
            f"lengths must stay below {POSITION_LIMIT:,} tokens, got {max(lengths):,}: beyond it a position times a "
            "frequency is not exact in float64; pass 128Ki, say."
        )
    if lengths and min(lengths) < 2:
        raise ValueError(f"lengths must be at least 2 tokens each, got {min(lengths)}; pass 2048, say.")
