"""An anchor in front of rows that somebody packed without one.

input_ids      a a a b b        last_token="drop"    0 a a a b      the row keeps its length
seq_lengths    3 2              last_token="keep"    0 a a a b b    no token is lost
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from anchor_attn.masks import PackedLayout
from anchor_attn.masks.dialects.copied import IGNORED_LABEL
from anchor_attn.masks.layout import ANCHOR_ID, PADDING_ID
from anchor_attn.train.items import TOKENS
from anchor_attn.train.packed_dataset import COLUMNS, layout_of_columns

LastToken = Literal["drop", "keep"]
LAST_TOKEN = ("drop", "keep")


def insert_anchor(
    row: Mapping[str, Any],
    anchor_token_id: int,
    *,
    last_token: LastToken,
    anchor_tokens: int = 1,
    layout: PackedLayout | None = None,
) -> dict[str, Any]:
    """A packed row with the anchor in front, as `PackedCollator` takes it.

        insert_anchor({"input_ids": [7, 8, 9], "seq_lengths": [2, 1]}, 256, last_token="drop")
        {"input_ids": [256, 7, 8], "document_ids": [0, 1, 1]}

    For a whole dataset: `dataset.map(partial(insert_anchor, anchor_token_id=1, last_token="drop"),
    remove_columns=dataset.column_names)`; the old columns would contradict the new ones.

    Args:
        row: `input_ids`, and where its documents are, as `document_ids`, `document_lengths`, `seq_lengths` or
            `position_ids` that begin again at 0; `labels`, not shifted, go with their tokens.
        anchor_token_id: the token that becomes the anchor.
        last_token: what becomes of the tokens at the end of a full row: "drop" keeps its length, "keep" its tokens.
            Padding gives way first under both.
        anchor_tokens: how often the anchor stands in front.
        layout: the documents of this row [1, S], where other columns or another convention say them: whatever a
            `from_…` of `anchor_attn.masks.dialects` has read.

    Returns:
        `input_ids` and `document_ids`, and `labels` where the row has them; int32 [S] or, with "keep", up to
        [S + anchor_tokens].

    Raises:
        ValueError: a row that has an anchor already, that does not say where its documents are or says two things, or
            that is too short.
    """
    if last_token not in LAST_TOKEN:
        raise ValueError(f"last_token must be one of {LAST_TOKEN}, got {last_token!r}; pass one of them.")
    if anchor_tokens < 1:
        raise ValueError(f"anchor_tokens must be at least 1, got {anchor_tokens}; leave the row as it is for none.")
    tokens = np.asarray(row[TOKENS], dtype=np.int32)
    layout = _layout_of(row, tokens) if layout is None else layout
    if tuple(layout.document_ids.shape) != (1, len(tokens)):
        raise ValueError(
            f"layout must describe this row, [1, {len(tokens)}], got {list(layout.document_ids.shape)}; pass one row."
        )
    if layout.anchor_tokens:
        raise ValueError(f"row must have no anchor yet, got {layout.anchor_tokens} in front of it; leave it as it is.")
    (own_tokens,) = layout.row_tokens
    seq_len = len(tokens) if last_token == "drop" else max(len(tokens), own_tokens + anchor_tokens)
    kept = min(own_tokens, seq_len - anchor_tokens)
    if kept < 1:
        raise ValueError(
            f"row must have room for {anchor_tokens} anchor tokens and one of its own, got {len(tokens)} tokens; "
            "drop the row, or pass last_token='keep'."
        )
    padding = tokens[own_tokens:][: seq_len - anchor_tokens - kept]
    ids = layout.document_ids[0, :kept].cpu().numpy()
    result = {
        TOKENS: _framed(anchor_tokens, anchor_token_id, tokens[:kept], padding),
        "document_ids": _framed(anchor_tokens, ANCHOR_ID, ids, np.full_like(padding, PADDING_ID)),
    }
    if "labels" in row:
        labels = np.asarray(row["labels"], dtype=np.int32)
        if labels.shape != tokens.shape:
            raise ValueError(
                f"labels must have one entry a token, got {labels.shape} for {len(tokens)} input_ids; mend the row."
            )
        result["labels"] = _framed(anchor_tokens, IGNORED_LABEL, labels[:kept], np.full_like(padding, IGNORED_LABEL))
    return result


def _framed(anchor_tokens: int, anchor: int, own: np.ndarray, padding: np.ndarray) -> np.ndarray:
    return np.concatenate([np.full(anchor_tokens, anchor, dtype=np.int32), own, padding]).astype(np.int32)


def _layout_of(row: Mapping[str, Any], tokens: np.ndarray) -> PackedLayout:
    columns = {name: np.asarray(row[name]).tolist() for name in COLUMNS if row.get(name) is not None}
    if not columns:
        raise ValueError(
            f"row must say where its documents are, in one of {', '.join(COLUMNS)}, got the columns {sorted(row)}; "
            "pass layout=…, or pack the documents again."
        )
    return layout_of_columns([{**columns, TOKENS: tokens.tolist()}], None, None)[0]
