"""From packed rows to a batch: inputs, labels, positions and the layout that attention reads."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from anchor_attn.masks import PackedLayout
from anchor_attn.masks.dialects.copied import IGNORED_LABEL
from anchor_attn.masks.layout import ANCHOR_ID, PADDING_ID, PositionPolicy, check_position_policy
from anchor_attn.masks.patterns import Pattern

if TYPE_CHECKING:
    from anchor_attn.parallel.layout import Scheme


@dataclass(frozen=True)
class PackedCollator:
    """Collate packed rows for a wrapped model; pass it to Trainer as `data_collator`.

        document_lengths   [[2, 3]]      input_ids   0 a a b b b        0 = the anchor
        labels             . . a . b b                                  . = -100
        with a BOS         . . . a . . b b            input_ids   0 B a a B b b b

    A token is labelled when the token before it in the row, from which a causal model predicts it, is its own
    document's: not the anchors, not padding, not the first token of a document. The labels are not shifted; the model
    does that. Where a document is interleaved, that also leaves out the first token of each later piece, because the
    token before it belongs to another document.

    A BOS belongs to its document and takes an ordinary position. Neither it nor the document's own first token is
    labelled, so that the labelled tokens are the same with and without.

    Attributes:
        position_policy: "continuous" or "reset", as in `PackedLayout.position_ids`.
        anchor_tokens: anchor tokens at the front of every row.
        seq_len: pad rows to this many tokens, to the longest row when None. It does not count a BOS: rows that
            outgrow it by theirs are padded to the longest.
        bos_token_id: put this token in front of every document; none when None.
        pad_token_id: what fills the padding; no document attends to it.

    Raises:
        ValueError: an unknown position policy, or anchor_tokens or seq_len too small.
    """

    position_policy: PositionPolicy = "continuous"
    _: KW_ONLY
    anchor_tokens: int = 1
    seq_len: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        check_position_policy(self.position_policy)
        if self.anchor_tokens < 0:
            raise ValueError(
                f"anchor_tokens must be at least 0, got {self.anchor_tokens}; pass the one the rows were packed with."
            )
        if self.seq_len is not None and self.seq_len <= self.anchor_tokens:
            raise ValueError(
                f"seq_len must be above anchor_tokens={self.anchor_tokens}, got {self.seq_len}; "
                "pass the one the rows were packed with."
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows.

        Args:
            features: per row `input_ids`, the anchors included, and either `document_lengths` (anchors not included)
                or `document_ids`, one a token. With `labels`, not shifted, those that are -100 stay so.

        Returns:
            `input_ids`, `labels` and `position_ids`, int64 [B, S], and `document_ids`, a `PackedLayout`.

        Raises:
            ValueError: no rows, a row without these keys, lengths that do not add up to the row, a row longer than
                `seq_len`, or ids that break the convention; the message names the row.
        """
        if not features:
            raise ValueError("features must hold at least one row, got none; drop empty batches.")
        rows = [_checked_tokens(feature, index) for index, feature in enumerate(features)]
        seq_len = max(map(len, rows)) if self.seq_len is None else self.seq_len
        for index, row in enumerate(rows):
            if len(row) > seq_len:
                raise ValueError(
                    f"features[{index}] must fit seq_len={seq_len}, got a row of {len(row)} tokens; "
                    "pack and collate with the same seq_len."
                )
        layout = self._layout(features, rows, seq_len)
        input_ids = torch.from_numpy(_padded(rows, seq_len, self.pad_token_id))
        given = [np.asarray(feature.get("labels", row)) for feature, row in zip(features, rows, strict=True)]
        for index, (row, own) in enumerate(zip(rows, given, strict=True)):
            if own.shape != row.shape:
                raise ValueError(
                    f"features[{index}]['labels'] must have one label a token, got {own.shape} for {len(row)} tokens; "
                    "leave labels out to predict every token."
                )
        labels = _labels(torch.from_numpy(_padded(given, seq_len, IGNORED_LABEL)), layout)
        if self.bos_token_id is not None:
            input_ids, labels, layout = self._with_bos(input_ids, labels, layout, self.bos_token_id)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": layout.position_ids(self.position_policy),
            "document_ids": layout,
        }

    def _layout(self, features: Sequence[Mapping[str, Any]], rows: Sequence[np.ndarray], seq_len: int) -> PackedLayout:
        for index, feature in enumerate(features):
            if "document_lengths" in feature and "document_ids" in feature:
                raise ValueError(
                    f"features[{index}] must say once which token belongs to which document, got document_lengths and "
                    "document_ids; pass one of them."
                )
        if all("document_lengths" in feature for feature in features):
            for index, (feature, row) in enumerate(zip(features, rows, strict=True)):
                tokens = self.anchor_tokens + sum(feature["document_lengths"])
                if tokens != len(row):
                    raise ValueError(
                        f"features[{index}]['document_lengths'] must add up to the row without its anchor, got "
                        f"{tokens - self.anchor_tokens} for {len(row)} tokens with anchor_tokens={self.anchor_tokens}; "
                        "pack and collate with the same anchor_tokens."
                    )
            lengths = [feature["document_lengths"] for feature in features]
            return PackedLayout.from_lengths(lengths, self.anchor_tokens, seq_len)
        ids = [
            _checked_ids(feature, row, index) for index, (feature, row) in enumerate(zip(features, rows, strict=True))
        ]
        layout = PackedLayout.from_document_ids(torch.from_numpy(_padded(ids, seq_len, PADDING_ID)))
        if layout.anchor_tokens != self.anchor_tokens:
            raise ValueError(
                f"features must have {self.anchor_tokens} anchor tokens (0) at the front of document_ids, "
                f"got {layout.anchor_tokens}; pass anchor_tokens={layout.anchor_tokens} to the collator."
            )
        return layout

    def _with_bos(
        self, input_ids: Tensor, labels: Tensor, layout: PackedLayout, bos_token_id: int
    ) -> tuple[Tensor, Tensor, PackedLayout]:
        """The same rows with a BOS in front of the first token of every document."""
        ids = layout.document_ids
        real = ids != PADDING_ID
        first = (layout.document_ranks() == 0) & real  # anchors have ranks below 0
        slots = torch.arange(layout.seq_len) + first.cumsum(dim=1)  # where each token moves to; its BOS goes before it
        width = max(int(slots[real].max()) + 1, layout.seq_len)
        tokens_row, bos_row = real.nonzero()[:, 0], first.nonzero()[:, 0]

        def moved(values: Tensor, bos: Tensor | int, padding: int) -> Tensor:
            wide = torch.full((layout.batch_size, width), padding, dtype=values.dtype)
            wide[tokens_row, slots[real]] = values[real]
            wide[bos_row, slots[first] - 1] = torch.as_tensor(bos, dtype=values.dtype)
            return wide

        return (
            moved(input_ids, bos_token_id, self.pad_token_id),
            moved(labels, IGNORED_LABEL, IGNORED_LABEL),
            PackedLayout.from_document_ids(moved(ids, ids[first], PADDING_ID)),
        )


@dataclass(frozen=True)
class SplitCollator:
    """Collates whole rows and keeps one rank's part; for Trainer, whose ranks of a mesh must then read the same rows.

        SplitCollator(PackedCollator(), mesh.get_local_rank(), mesh.size())

    Attributes:
        whole: of the rows.
        rank: as `split_batch`.
        ranks: as `split_batch`.
        scheme: as `split_batch`.
        pattern: as `split_batch`.
    """

    whole: PackedCollator
    rank: int
    ranks: int
    scheme: "Scheme" = "document"
    pattern: Pattern = "anchor"

    @property
    def seq_len(self) -> int | None:
        """Of the whole rows."""
        return self.whole.seq_len

    @property
    def anchor_tokens(self) -> int:
        """Of the whole rows."""
        return self.whole.anchor_tokens

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As `split_batch`, without its count: Trainer counts the labels of a step over all ranks by itself.

        Args:
            features: as `PackedCollator`.

        Raises:
            ValueError: as `PackedCollator` and `split_batch`.
        """
        from anchor_attn.parallel import split_batch

        part = split_batch(self.whole(features), self.rank, self.ranks, self.scheme, self.pattern)
        del part["num_items_in_batch"]
        return part


def _labels(input_ids: Tensor, layout: PackedLayout) -> Tensor:
    ids = layout.document_ids
    labelled = torch.zeros_like(ids, dtype=torch.bool)
    labelled[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > ANCHOR_ID)
    return input_ids.masked_fill(~labelled, IGNORED_LABEL)


def _padded(rows: Sequence[np.ndarray], seq_len: int, padding: int) -> np.ndarray:
    batch = np.full((len(rows), seq_len), padding, dtype=np.int64)
    for target, row in zip(batch, rows, strict=True):
        target[: len(row)] = row
    return batch


def _checked_tokens(feature: Mapping[str, Any], index: int) -> np.ndarray:
    if "input_ids" not in feature or not {"document_lengths", "document_ids"} & feature.keys():
        raise ValueError(
            f"features[{index}] must have 'input_ids' and 'document_lengths' or 'document_ids', got "
            f"{sorted(feature)}; pack with pack_documents, and give Trainer remove_unused_columns=False."
        )
    return _checked_row(feature, "input_ids", index)


def _checked_ids(feature: Mapping[str, Any], row: np.ndarray, index: int) -> np.ndarray:
    if "document_ids" not in feature:
        raise ValueError(
            f"features[{index}] must describe its documents as the other rows do, got only 'document_lengths'; "
            "give every row 'document_ids'."
        )
    ids = _checked_row(feature, "document_ids", index)
    if len(ids) != len(row):
        raise ValueError(
            f"features[{index}]['document_ids'] must have one id a token, got {len(ids)} for {len(row)} tokens; "
            "count the anchor too."
        )
    return ids


def _checked_row(feature: Mapping[str, Any], key: str, index: int) -> np.ndarray:
    row = np.asarray(feature[key])
    if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "iu":
        raise ValueError(
            f"features[{index}][{key!r}] must be a flat row of integers, got {row.dtype} {list(row.shape)}; "
            "pass one row a feature, without a batch dimension."
        )
    return row
