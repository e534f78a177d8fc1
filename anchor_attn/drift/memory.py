"""What a measurement takes, so that it can refuse before it begins."""

from bisect import bisect_right

import torch

from anchor_attn.bench.memory import available_bytes

# Of unshifted scores and weights that are kept while shifts come and go.
HELD_PAIRS = 2**23
# Float64 numbers for each number of a head's keys: given, rotated, as they are multiplied, and while they are made.
KEY_COPIES = 4
# And for each pair that is held: scores and weights of the policies that share a rotation.
HELD_COPIES = 12
DRAWN_BYTES = 2 + 2 + 4 + 4  # query and key in bfloat16, one of them still in float32, and what draws it


def check_memory(seq_len: int, head_dim: int, drawn_heads: int = 0) -> None:
    """Raise a ValueError, which says what would fit, where states of this size cannot be measured.

    Args:
        seq_len: tokens.
        head_dim: numbers of a head; one head is measured at a time.
        drawn_heads: random ones that are still to be drawn.
    """
    free = available_bytes(torch.device("cpu"))

    def needed(tokens: int) -> int:
        held = max(tokens, min(HELD_PAIRS, tokens**2))
        return 8 * (KEY_COPIES * tokens * head_dim + HELD_COPIES * held) + DRAWN_BYTES * drawn_heads * tokens * head_dim

    if free is not None and needed(seq_len) > free:
        fitting = bisect_right(range(seq_len), free, key=needed) - 1
        raise ValueError(
            f"states must fit into memory, got {seq_len:,} tokens, which take {needed(seq_len) / 2**30:.1f} GiB of "
            f"{free / 2**30:.1f} free; pass at most {fitting:,} tokens."
        )
