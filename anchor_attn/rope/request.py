"""What `extend` was asked for, checked as far as no config is needed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor_attn.rope.checks import checked_factor, checked_length
from anchor_attn.rope.methods import check_options


@dataclass(frozen=True)
class Request:
    """What `extend` was asked for; its arguments are explained there."""

    method: str
    factor: float | None
    target_len: int | None
    original_len: int | None
    layer_types: tuple[str, ...]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        check_options(self.method, self.options)
        if self.factor is not None and self.target_len is not None:
            raise ValueError(
                f"factor or target_len must be given, got both ({self.factor} and {self.target_len}); pass one."
            )
        if self.factor is self.target_len is None and self.method != "default":
            raise ValueError(
                f"factor or target_len must be given for method={self.method!r}, got none; pass factor=8, say."
            )
        if self.original_len is not None:
            checked_length("original_len", self.original_len)

    def scale(self, length: int) -> float:
        """How many times a length is asked for."""
        if self.target_len is None:
            return 1.0 if self.factor is None else checked_factor(self.method, self.factor)
        if checked_length("target_len", self.target_len) < length + (self.method != "default"):
            raise ValueError(
                f"target_len must be above the original length of {length} tokens, got {self.target_len}; raise it, or "
                "say with original_len what the model was trained on."
            )
        return self.target_len / length


def read_request(
    method: str,
    factor: float | None,
    target_len: int | None,
    original_len: int | None,
    layer_types: Sequence[str],
    options: dict[str, Any],
) -> Request:
    """What was asked for, with the factors of a search read from their file; what is said beside comes first."""
    path = options.get("factors")
    if method == "longrope" and isinstance(path, str | Path):
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            said = {name: found.get(name) for name in ("factors", "short_factors", "n_hat", "attention_factor")}
            searched, trained_on = (float(found["factor"]), found.get("original_max_position_embeddings"))
            said["factors"] = list(found["factors"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"factors must be the result of a search, got {str(path)!r} ({type(error).__name__}: {error}); pass "
                "the file that anchor-attn rope wrote, or a list of factors."
            ) from error
        said = {name: value for name, value in said.items() if value is not None}
        options = {**said, **options, "factors": said["factors"]}
        factor = searched if factor is target_len is None else factor
        original_len = trained_on if original_len is None else original_len
    return Request(method, factor, target_len, original_len, tuple(layer_types), options)
