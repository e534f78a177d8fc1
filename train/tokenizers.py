"""Tokenizers: bytes, and those of Hugging Face without their special tokens. Either names the anchor."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from anchor_attn.train.items import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@runtime_checkable
class Tokenizer(Protocol):
    """What packing asks of a tokenizer."""

    @property
    def name(self) -> str:
        """What `load_tokenizer` makes it from."""

    @property
    def anchor_token_id(self) -> int:
        """The token that stands at the front of every row."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens and the anchor included."""

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """The token ids of each text, and nothing in front of or behind them."""


class ByteTokenizer:
    """A token a UTF-8 byte, 0 … 255, and 256 as the anchor."""

    name = "bytes"
    anchor_token_id = 256
    vocab_size = 257

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """The UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]


class HuggingFaceTokenizer:
    """A transformers tokenizer without its special tokens; its BOS, or else its EOS, is the anchor.

    Raises:
        ValueError: a tokenizer with neither.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
        anchor = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if anchor is None:
            raise ValueError(
                f"tokenizer must have a BOS or an EOS token for the anchor, got {name!r} with neither; "
                "set one with tokenizer.add_special_tokens({'bos_token': '<s>'}) and pass that tokenizer."
            )
        self.tokenizer = tokenizer
        self.name = name
        self.anchor_token_id = int(anchor)
        # Not tokenizer.vocab_size, which leaves out added tokens, nor len() alone, which is short where ids have gaps.
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """The token ids of each text, neither cut nor padded."""
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,  # many add a BOS by themselves, and then every document has one
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a document longer than the model's context is no news here
        )
        return [np.asarray(ids, dtype=np.int32) for ids in encoded[TOKENS]]


def load_tokenizer(tokenizer: "str | PathLike[str] | Tokenizer | PreTrainedTokenizerBase" = "bytes") -> Tokenizer:
    """The tokenizer of a name: "bytes", or one of Hugging Face by its name or path. Tokenizers pass through.

    Raises:
        ValueError: nothing loads by that name, or it has neither BOS nor EOS for the anchor.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if not isinstance(tokenizer, str | PathLike):
        return HuggingFaceTokenizer(tokenizer, str(getattr(tokenizer, "name_or_path", type(tokenizer).__name__)))
    if tokenizer == ByteTokenizer.name:
        return ByteTokenizer()
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # OSError, ValueError, KeyError or the tokenizer's own, by what is wrong
        where = "the files there" if Path(tokenizer).exists() else "the name and the network"
        raise ValueError(
            f"tokenizer must be 'bytes' or the name or path of a Hugging Face tokenizer, got {str(tokenizer)!r}, "
            f"which does not load ({type(error).__name__}); check {where}."
        ) from error
    return HuggingFaceTokenizer(loaded, str(tokenizer))
