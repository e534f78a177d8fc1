"""Several sources as one stream: each gets its share of the document tokens, whatever the lengths of its documents.

    weights 3 : 1, documents of 100 and of 400 tokens     a a a b a a a a a a a a a a a a b a a …

The next document comes from the source that is furthest behind its share. Nothing is drawn, so that shares are met
after any number of documents and not on average: those of two sources never differ from their weights by more than a
document of each.
"""

from collections.abc import Sequence

from anchor_attn.train.streaming.documents import Document, DocumentStream


class Mixture:
    """Documents of several streams by weight.

    Args:
        streams: one a source.
        first: the place of the source that begins; shards begin with different ones.
        last: the place of the source that was drawn from last; None before the first draw.
    """

    def __init__(self, streams: Sequence[DocumentStream], first: int, last: int | None = None) -> None:
        self.streams = streams
        self.last_source = last
        self._weights = [stream.source.settings.weight for stream in streams]
        self._order = [(first + place) % len(streams) for place in range(len(streams))]
        self._open = set(range(len(streams)))

    def draw(self) -> Document | None:
        """The next document, or None when all sources are over; where one is, the others share its part."""
        while self._open:
            source = min((place for place in self._order if place in self._open), key=self._progress)
            document = self.streams[source].draw()
            if document is not None:
                self.last_source = source
                return document
            self._open.remove(source)
        return None

    def last(self) -> Document:
        """The document that was drawn last, once more."""
        if self.last_source is None:
            raise ValueError("mixture must have drawn a document, got none; call draw first.")
        return self.streams[self.last_source].last()

    def _progress(self, source: int) -> float:
        return self.streams[source].counts.tokens / self._weights[source]
