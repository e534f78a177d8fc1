"""What of a layer fits into memory at once: some heads of a row of the batch, some of its queries, blocks of scores."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anchor_attn.drift.memory import HELD_PAIRS, check_memory
from anchor_attn.drift.policies import Policy, multiply, rotate, weigh
from anchor_attn.drift.states import States
from anchor_attn.drift.view import View

# Of scores that are worked on at once.
BLOCK_PAIRS = 2**20


@dataclass(frozen=True)
class Part:
    """Some heads of one row of the batch.

    Attributes:
        states: of the layer.
        query: floating [h, Q, D].
        key: floating [h, S, D], repeated where heads share one.
        heads: which.
        rows: places of the queries, int64 [Q].
        position_ids: before a shift, int64 [S].
        sees: visible keys, bool [Q, S], of some of the places.
        sinks: learned logits [h].
    """

    states: States
    query: Tensor
    key: Tensor
    heads: slice
    rows: Tensor
    position_ids: Tensor
    sees: Callable[[Tensor], Tensor]
    sinks: Tensor | None

    def rotated(self, shift: int, policy: Policy) -> tuple[Tensor, Tensor]:
        """Query and key of a policy, all positions moved."""
        position_ids = self.position_ids + shift
        query = rotate(self.query, position_ids[self.rows], self.states, policy)
        return query, rotate(self.key, position_ids, self.states, policy)

    def scores(self, rotated: tuple[Tensor, Tensor], block: slice, policy: Policy) -> Tensor:
        """Scaled products of some of the queries with all keys, before a softcap; float64 [h, Q, S].

        Args:
            rotated: query and key, by `rotated` of the same policy.
            block: of queries.
            policy: what they are multiplied in.
        """
        return multiply(rotated[0][:, block], rotated[1], self.states.score_scale, policy)

    def weights(self, scores: Tensor, visible: Tensor, policy: Policy) -> Tensor:
        """Attention weights of such scores, softcap and sinks included; float64 [h, Q, S], 0 where hidden.

        Args:
            scores: before a softcap.
            visible: bool [Q, S].
            policy: whose softmax is read.
        """
        if (softcap := self.states.softcap) is not None:
            scores = softcap * (scores / softcap).tanh()
        return weigh(scores, visible, policy, self.sinks)

    def blocks(self) -> Iterator[slice]:
        """Of queries."""
        return self._slices(BLOCK_PAIRS)

    def pieces(self) -> Iterator["Part"]:
        """The same heads, and so many of the queries that all their scores can be held."""
        for few in self._slices(HELD_PAIRS):
            yield replace(self, query=self.query[:, few], rows=self.rows[few])

    def _slices(self, pairs: int) -> Iterator[slice]:
        size = max(1, pairs // (len(self.query) * self.key.shape[1]))
        return (slice(start, start + size) for start in range(0, len(self.rows), size))


def parts_of(states: States, view: View) -> Iterator[Part]:
    """The parts of a layer, each with all the queries of its heads.

    Args:
        states: query and key.
        view: which pairs.
    """
    batch, heads, seq_len, _ = states.query.shape
    together = max(1, HELD_PAIRS // 4 // (min(len(view.rows), 64) * seq_len))
    for row in range(batch):
        for start in range(0, heads, together):
            part = slice(start, min(heads, start + together))
            key_heads = torch.arange(part.start, part.stop) // states.repeats
            yield Part(
                states=states,
                query=states.query[row, part][:, view.rows],
                key=states.key[row, key_heads],
                heads=part,
                rows=view.rows,
                position_ids=view.position_ids[row],
                sees=lambda rows, row=row: view.sees(row, rows),  # type: ignore[misc]
                sinks=None if states.sinks is None else states.sinks[part],
            )


def rows_of(states: States) -> Iterator[States]:
    """Every row of the batch alone.

    Raises:
        ValueError: too large for the memory at hand.
    """
    check_memory(states.seq_len, states.head_dim)
    for row in range(states.query.shape[0]):
        yield replace(states, query=states.query[row : row + 1], key=states.key[row : row + 1])
