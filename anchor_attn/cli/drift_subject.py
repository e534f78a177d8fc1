"""What `anchor-attn drift` measures: query and key at random, or of the layers of a model that reads tokens."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from anchor_attn.drift import States

RANDOM_TOKENS, MODEL_TOKENS = 2048, 1024  # where no length is asked for
ACTIVATIONS = 12  # numbers of a forward for each of a hidden state, those of a wide MLP among them


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        states: a layer each.
        described: in words.
        model: that they are of; None at random.
        input_ids: that it read, int64 [B, S].
    """

    states: "list[States]" = field(repr=False)
    described: str
    model: "PreTrainedModel | None" = field(default=None, repr=False)
    input_ids: "Tensor | None" = field(default=None, repr=False)


def draw_subject(seq_len: int, num_heads: int, theta: float | None, seed: int) -> Subject:
    """Query and key at random."""
    from anchor_attn.drift import random_states
    from anchor_attn.drift.states import LLAMA_THETA

    base = LLAMA_THETA if theta is None else theta
    states = random_states(seq_len, num_heads=num_heads, theta=base, seed=seed)
    heads = "head" if num_heads == 1 else "heads"
    return Subject(
        [states],
        f"random normal query and key in bfloat16: {seq_len:,} tokens, {num_heads} {heads} of "
        f"{states.head_dim}, theta {base:,.0f}",
    )


@dataclass(frozen=True)
class ModelInput:
    """What a model is run on; attributes are options.

    Attributes:
        model: a size or a checkpoint.
        text: documents; random tokens when None.
        text_column: of it.
        tokenizer: of it; the model's own when None.
        limit: of its documents.
        sequences: how many.
        dtype: of the weights; as saved when None.
        seed: of fresh weights, random tokens and the choice of sequences.
        device: where it runs.
        layers: that are captured; None for all.
    """

    model: str
    text: str | None
    text_column: str
    tokenizer: str | None
    limit: int | None
    sequences: int
    dtype: str | None
    seed: int
    device: str
    layers: Sequence[int] | None = None


def load_tokens(asked: ModelInput, seq_len: int, together: int) -> "tuple[PreTrainedModel, Tensor, str]":
    """The model, its tokens int64 [N, S], and both in words.

    Args:
        asked: the options.
        seq_len: tokens of a sequence.
        together: sequences that are captured at once.

    Raises:
        ValueError: a model that does not load, a text that is too short, or too much to hold.
    """
    import torch

    from anchor_attn.cli.rope_input import count_sequences, load_model
    from anchor_attn.drift.models.capture import check_model

    with _said_of_what_can_be_measured():
        model, own_tokenizer = load_model(asked.model, asked.dtype, asked.seed)
        check_model(model)
    model.to(asked.device)  # type: ignore[arg-type]  # transformers' decorator loses the signature
    model.eval()
    _check_memory(model, together, seq_len, asked.layers)
    embeddings: Any = model.get_input_embeddings()
    name = f"{asked.model} in {str(model.dtype).removeprefix('torch.')}"
    if asked.text is None:
        draw = torch.Generator().manual_seed(asked.seed)
        ids = torch.randint(embeddings.num_embeddings, (asked.sequences, seq_len), generator=draw)
        return model, ids, f"{name} on {count_sequences(asked.sequences)} of {seq_len:,} random tokens"
    ids, described = _read_text(asked, own_tokenizer, seq_len)
    if (most := int(ids.max())) >= embeddings.num_embeddings:
        raise ValueError(
            f"tokenizer must belong to the model, got token {most} of {asked.tokenizer or own_tokenizer!r} for an "
            f"embedding of {embeddings.num_embeddings}; pass the model's own."
        )
    return model, ids, f"{name} on {described}"


def capture_subject(asked: ModelInput, seq_len: int) -> Subject:
    """Query and key of a model's layers.

    Raises:
        ValueError: as `capture_states`, a model that does not load, or a text that is too short.
    """
    from anchor_attn.drift import capture_states

    model, ids, described = load_tokens(asked, seq_len, asked.sequences)
    states = capture_states(model, ids, layers=asked.layers)
    return Subject(states, f"{described}, {len(states)} layers", model, ids)


@contextmanager
def _said_of_what_can_be_measured() -> Iterator[None]:
    """What transformers says while it loads, missing weights say, comes behind it, or not where an error is all."""
    from anchor_attn.hf.progress import without_progress_bars

    held: list[tuple[logging.Handler, logging.LogRecord]] = []
    handlers = list(logging.getLogger("transformers").handlers)
    filters = []
    for handler in handlers:

        def hold(record: logging.LogRecord, handler: logging.Handler = handler) -> bool:
            held.append((handler, record))
            return False

        filters.append(hold)
        handler.addFilter(hold)
    try:
        with without_progress_bars():
            yield
    finally:
        for handler, hold in zip(handlers, filters, strict=True):
            handler.removeFilter(hold)
    for handler, record in held:
        handler.handle(record)


def _read_text(asked: ModelInput, own_tokenizer: str, seq_len: int) -> "tuple[Tensor, str]":
    from anchor_attn.cli.rope_input import hub_retries_unsaid, read_sequences
    from anchor_attn.train.tokenizers import load_tokenizer

    text: Any = asked.text
    with hub_retries_unsaid():
        tokens_of = load_tokenizer(asked.tokenizer or own_tokenizer)
    found = read_sequences(
        text, asked.text_column, tokens_of, asked.limit, seq_len, asked.sequences, asked.seed, "smaller --lengths"
    )
    return found.tokens, found.described


def _check_memory(model: "PreTrainedModel", sequences: int, seq_len: int, layers: Sequence[int] | None) -> None:
    """Refuse what cannot be held, before hours of a forward: query and key of all layers, the widest states of one."""
    import torch

    from anchor_attn.bench.memory import available_bytes

    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    item_bytes = model.dtype.itemsize
    captured_layers = config.num_hidden_layers if layers is None else len(layers)
    captured = sequences * captured_layers * (heads + key_heads) * head_dim * item_bytes
    per_token = captured + sequences * ACTIVATIONS * config.hidden_size * item_bytes
    free = available_bytes(torch.device("cpu"))
    if free is not None and per_token * seq_len > free:
        raise ValueError(
            f"lengths must fit into memory, got {seq_len:,} tokens, of which query and key of all layers take "
            f"{per_token * seq_len / 2**30:.1f} GiB of {free / 2**30:.1f} free; pass at most {free // per_token:,}, or "
            "fewer sequences."
        )
