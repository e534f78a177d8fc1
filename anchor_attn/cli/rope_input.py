"""What `anchor-attn rope` reads: a config, the file of a search, tokens for one."""

import logging
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from anchor_attn.rope.search.files import SearchResult
    from anchor_attn.train.tokenizers import Tokenizer

# https://arxiv.org/abs/2307.09288; transformers' own defaults are the 7B model's, but for the length.
LLAMA_2: dict[str, Any] = {"max_position_embeddings": 4096}
BYTE_VOCABULARY = 257
FRESH_TOKENS = 256  # of a model with fresh weights
DTYPES = ("float32", "bfloat16", "float16")
# Of huggingface_hub, an attempt that failed and the next one.
RETRY = re.compile(r" thrown while requesting |\[Retry \d+/\d+\]")


@contextmanager
def hub_retries_unsaid() -> Iterator[None]:
    """Without a network the hub's client says every attempt, 11 lines of them; what came of them is our one line."""
    logger = logging.getLogger("huggingface_hub.utils._http")

    def is_no_retry(record: logging.LogRecord) -> bool:
        return not RETRY.search(record.getMessage())

    logger.addFilter(is_no_retry)
    try:
        yield
    finally:
        logger.removeFilter(is_no_retry)


@hub_retries_unsaid()
def read_config(model: str) -> "PreTrainedConfig":
    """The config of a model's name: "llama-2", a size of ours, a file, a folder or a hub name; no weights.

    Raises:
        ValueError: nothing that reads by that name.
    """
    from transformers import AutoConfig, LlamaConfig

    from anchor_attn.rope.own_types import register
    from anchor_attn.train.items import one_line
    from anchor_attn.train.presets import SIZES

    if model == "llama-2":
        return LlamaConfig(**LLAMA_2)
    if model in SIZES:
        return LlamaConfig(**SIZES[model], vocab_size=BYTE_VOCABULARY, **LLAMA_2)
    try:
        register()
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # the file's, json's, the hub's, and whatever a config class makes of its values
        raise ValueError(
            f"model must be llama-2, one of {', '.join(SIZES)}, a config file (*.json), or a checkpoint's name or "
            f"folder, got {model!r} ({one_line(error)}); check the name, its files and the network."
        ) from error


def read_searched(path: Path) -> "SearchResult":
    """The result of a search.

    Raises:
        ValueError: no such file, or another one.
    """
    from anchor_attn.rope.checks import checked_factor
    from anchor_attn.rope.search.files import SearchResult

    try:
        found = SearchResult.read(path)
        checked_factor("longrope", found.factor)
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "another file"
        raise ValueError(
            f"factors must be the factors.json of a search, got {str(path)!r} ({reason}); run anchor-attn rope search."
        ) from error
    return found


@dataclass(frozen=True)
class Sequences:
    """What a search evaluates on.

    Attributes:
        tokens: int64 [N, S].
        described: what they are, in words.
    """

    tokens: "Tensor"
    described: str


@hub_retries_unsaid()
def read_sequences(
    text: str,
    text_column: str,
    tokenizer: "Tokenizer",
    limit: int | None,
    length: int,
    count: int,
    seed: int,
    shorter: str = "a smaller --factor",
) -> Sequences:
    """Sequences of equal length, drawn from the documents of a source.

    They are stretches of single documents where there are enough; else of all documents in a row, the tokenizer's
    anchor token between two.

    Args:
        text: documents: a file, a folder, stdlib or a hub name.
        text_column: of it.
        tokenizer: of the model that reads them.
        limit: most documents; all when None.
        length: tokens of a sequence.
        count: sequences.
        seed: of the choice among them.
        shorter: the option that would make sequences shorter, in the words that end an error.

    Raises:
        ValueError: nothing to read, or too little.
    """
    import numpy as np
    import torch

    from anchor_attn.train import read_documents

    if count < 1:
        raise ValueError(f"sequences must be at least 1, got {count}; pass 5, as the paper.")
    documents = read_documents(text, text_column=text_column, limit=limit)
    column = documents.dataset.column_names[-1]
    contents = documents.dataset[column][:]
    encoded = tokenizer.encode(contents) if column == "text" else [np.asarray(ids) for ids in contents]
    stretches, joined = _cut(encoded, length), ""
    if len(stretches) < count:
        anchor = np.array([tokenizer.anchor_token_id])
        stretches, joined = (
            _cut([np.concatenate([part for ids in encoded for part in (anchor, ids)])], length),
            "joined ",
        )
    if len(stretches) < count:
        raise ValueError(
            f"text must hold {count_sequences(count)} of {length:,} tokens, got {sum(map(len, encoded)):,} tokens in "
            f"{text!r}; pass more text, fewer --sequences or {shorter}."
        )
    chosen = sorted(random.Random(seed).sample(range(len(stretches)), count))
    tokens = torch.from_numpy(np.stack([stretches[i] for i in chosen]).astype(np.int64))
    described = f"{count_sequences(count)} of {length:,} tokens from {joined}documents of {text} ({tokenizer.name})"
    return Sequences(tokens, described)


@hub_retries_unsaid()
def load_model(model: str, dtype: str | None, seed: int) -> "tuple[PreTrainedModel, str]":
    """A causal model, and the name of its tokenizer.

    Raises:
        ValueError: no model by that name, or an unknown dtype.
    """
    import torch

    from anchor_attn.rope import load
    from anchor_attn.train.items import one_line
    from anchor_attn.train.presets import SIZES, create_model

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}; pass one of them.")
    if model in SIZES:
        torch.manual_seed(seed)
        fresh = create_model(model, BYTE_VOCABULARY, FRESH_TOKENS, BYTE_VOCABULARY - 1)
        return (fresh if dtype is None else fresh.to(getattr(torch, dtype))), "bytes"
    try:
        return load(model, **({} if dtype is None else {"dtype": getattr(torch, dtype)})), model
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model must be one of {', '.join(SIZES)}, or a checkpoint's name or folder, got {model!r} "
            f"({one_line(error)}); check the name, its files and the network."
        ) from error


def count_sequences(count: int) -> str:
    """1 as "1 sequence", 5 as "5 sequences"."""
    return "1 sequence" if count == 1 else f"{count} sequences"


def _cut(documents: "list[NDArray[Any]]", length: int) -> "list[NDArray[Any]]":
    return [ids[end - length : end] for ids in documents for end in range(length, len(ids) + 1, length)]
