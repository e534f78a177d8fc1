"""Hypothesis strategies for packed layouts, the settings that property tests share, and the masks' definition in loops.

    from strategies import layouts, quick

    @quick
    @given(layouts())
    def test_...(layout): ...

Ids are drawn as plain lists, row by row, without any of the code under test.
"""

import torch
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from anchor_attn.masks import PackedLayout

# Nothing here waits, but the first call into torch may take a second: no deadline.
quick = settings(max_examples=40, deadline=None)

anchor_counts = st.integers(0, 3)


@st.composite
def document_lengths(draw: DrawFn, max_rows: int = 3, max_documents: int = 4, max_tokens: int = 7) -> list[list[int]]:
    """Rows of document lengths; rows differ, and may hold no document."""
    row = st.lists(st.integers(1, max_tokens), max_size=max_documents)
    return draw(st.lists(row, min_size=1, max_size=max_rows))


@st.composite
def id_rows(
    draw: DrawFn,
    *,
    interleaved: bool = False,
    anchor_tokens: SearchStrategy[int] = anchor_counts,
    max_rows: int = 3,
    max_documents: int = 4,
    max_tokens: int = 7,
) -> list[list[int]]:
    """`document_ids` as nested lists: anchors, documents (in pieces when `interleaved`), padding.

    With `interleaved`, the first row always has a document in two pieces; the other rows may.
    """
    anchors = draw(anchor_tokens)
    tokens = st.integers(1, max_tokens)
    rows = []
    for index in range(draw(st.integers(1, max_rows))):
        if interleaved:
            labels = draw(st.lists(st.integers(1, max_documents), max_size=max_documents + 1))
            labels = [1, 2, 1, *labels] if index == 0 else labels
        else:
            labels = list(range(1, draw(st.integers(0, max_documents)) + 1))
        numbers: dict[int, int] = {}
        numbered = [numbers.setdefault(label, len(numbers) + 1) for label in labels]
        rows.append([0] * anchors + [number for number in numbered for _ in range(draw(tokens))])
    seq_len = max(1, *map(len, rows)) + draw(st.integers(0, 3))
    return [row + [-1] * (seq_len - len(row)) for row in rows]


@st.composite
def contiguous_layouts(draw: DrawFn, **options: object) -> PackedLayout:
    """Layouts whose documents are all in one piece; options as `id_rows`."""
    return _read(draw(id_rows(interleaved=False, **options)))


@st.composite
def interleaved_layouts(draw: DrawFn, **options: object) -> PackedLayout:
    """Layouts with a document in several pieces; options as `id_rows`."""
    return _read(draw(id_rows(interleaved=True, **options)))


def layouts(**options: object) -> SearchStrategy[PackedLayout]:
    """Any layout: contiguous or interleaved, rows that differ, padding, 0-3 anchors; options as `id_rows`."""
    return st.one_of(contiguous_layouts(**options), interleaved_layouts(**options))


def anchored_layouts(**options: object) -> SearchStrategy[PackedLayout]:
    """Any layout with 1-3 anchors, so that every pattern is legal."""
    return layouts(anchor_tokens=st.integers(1, 3), **options)


@st.composite
def requests(draw: DrawFn, layout: SearchStrategy[PackedLayout]) -> tuple[PackedLayout, str, int | None, bool]:
    """A layout with a pattern that is legal for it, a window or None, and `keep_anchor`."""
    drawn = draw(layout)
    patterns = ["full", "intra_doc", "anchor"] if drawn.anchor_tokens else ["full", "intra_doc"]
    window = st.none() | st.integers(1, drawn.seq_len + 2)
    return drawn, draw(st.sampled_from(patterns)), draw(window), draw(st.booleans())


def attended_by_definition(
    rows: list[list[int]], pattern: str, sliding_window: int | None = None, keep_anchor: bool = True
) -> list[list[list[bool]]]:
    """The mask [B][S][S] token by token, from the table of meanings in the design, windows by counting tokens."""
    return [
        [
            [kv in visible for kv in range(len(ids))]
            for visible in (_visible(ids, q, pattern, sliding_window, keep_anchor) for q in range(len(ids)))
        ]
        for ids in rows
    ]


def _visible(ids: list[int], q: int, pattern: str, sliding_window: int | None, keep_anchor: bool) -> set[int]:
    if ids[q] == -1:
        return {q}
    past = range(q + 1)
    own = [kv for kv in past if ids[kv] == ids[q]]
    anchors = [kv for kv in past if ids[kv] == 0]
    last = 0 if sliding_window is None else -sliding_window
    if pattern == "full":
        return set(past[last:])
    if pattern == "intra_doc":
        return set(own[last:])
    if keep_anchor:
        return set(own[last:]) | set(anchors)
    stretch = own if ids[q] == 0 else anchors + own  # the anchor as an ordinary token directly before the document
    return set(stretch[last:])


def _read(rows: list[list[int]]) -> PackedLayout:
    note(f"document_ids = {rows}")
    return PackedLayout.from_document_ids(torch.tensor(rows))
