"""The loader of a stream: torchdata's, whose state holds those of its workers."""

import warnings
from typing import TYPE_CHECKING, Any

from anchor_attn.train.collator import PackedCollator, SplitCollator
from anchor_attn.train.streaming.stream import PackedStream

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader


def create_loader(
    stream: PackedStream,
    batch_size: int,
    collator: PackedCollator | SplitCollator,
    *,
    num_workers: int = 0,
    **options: Any,
) -> "StatefulDataLoader":
    """Batches of a stream, with a `state_dict` that says where every worker stands.

        loader = create_loader(stream, 2, PackedCollator(seq_len=8192), num_workers=2)

    The state is that behind the batch that was given out last: what workers have read ahead is read again. Neither
    Accelerate nor a sampler may split it once more, for the stream does that: leave it out of `accelerator.prepare`.

    Args:
        stream: for this rank.
        batch_size: rows a batch.
        collator: with the `seq_len` of the stream, as its rows may be shorter.
        num_workers: processes that read, tokenize and pack; a resumed run needs as many.
        options: others of torchdata's StatefulDataLoader.

    Raises:
        ImportError: torchdata is not installed.
        ValueError: a collator that pads to another length, or expects other anchors, than the stream has.
    """
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise ImportError(
            "create_loader needs torchdata, which is not installed; pip install 'torchdata>=0.11'."
        ) from error
    for name in ("seq_len", "anchor_tokens"):
        own, streams = getattr(collator, name), getattr(stream, name)
        if own != streams:
            raise ValueError(
                f"collator must have the stream's {name}={streams}, got {own}; pass PackedCollator({name}={streams})."
            )
    stream.settings  # noqa: B018 - samples the files once, before there are workers that would each do it
    with warnings.catch_warnings():
        # torchdata 0.11 calls what torch 2.12 deprecates; TODO drop this when a torchdata does not.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
        return StatefulDataLoader(
            stream, batch_size=batch_size, num_workers=num_workers, collate_fn=collator, **options
        )
