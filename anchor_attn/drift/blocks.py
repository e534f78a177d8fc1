"""Scores and attention weights of a block of queries, as a policy computes them, one row of a batch at a time."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from anchor_attn.drift.parts import Part, check_memory
from anchor_attn.drift.parts import parts_of as parts_of
from anchor_attn.drift.policies import Policy, multiply, weigh
from anchor_attn.drift.states import States


def rows_of(states: States) -> Iterator[States]:
    """Every row of the batch alone.

    Raises:
        ValueError: too large for the memory at hand.
    """
    check_memory(states)
    for row in range(states.query.shape[0]):
        yield replace(states, query=states.query[row : row + 1], key=states.key[row : row + 1])


def scores_of(part: Part, rotated: tuple[Tensor, Tensor], block: slice, policy: Policy) -> Tensor:
    """Scaled products of some of the queries with all keys, before a softcap; float64 [h, Q, S].

    Args:
        part: whose scale is meant.
        rotated: its query and key, rotated by the policy.
        block: of queries.
        policy: what they are multiplied in.
    """
    return multiply(rotated[0][:, block], rotated[1], part.states.score_scale, policy)


def weights_of(part: Part, scores: Tensor, visible: Tensor, policy: Policy) -> Tensor:
    """Attention weights of such scores, softcap and sinks included; float64 [h, Q, S], zero where nothing is visible.

    Args:
        part: whose softcap and sinks are meant.
        scores: of `scores_of`.
        visible: bool [Q, S].
        policy: whose softmax is read.
    """
    if (softcap := part.states.softcap) is not None:
        scores = softcap * (scores / softcap).tanh()
    return weigh(scores, visible, policy, part.sinks)
