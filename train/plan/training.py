"""The plan of a training run: every length, scheme and pattern, from a model, devices and document lengths."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from anchor_attn.lengths import DISTRIBUTIONS, draw_distribution
from anchor_attn.masks import PATTERNS
from anchor_attn.results import check_seed
from anchor_attn.train.plan.models import ModelShape
from anchor_attn.train.plan.records import StepPlan
from anchor_attn.train.plan.schemes import SCHEMES, Scheme
from anchor_attn.train.plan.steps import Cluster, plan_step
from anchor_attn.train.plan.work import ANCHOR_TOKENS, count_row

SWEEP = tuple(4096 << power for power in range(9))  # 4K … 1M
ROWS_DRAWN = 16
LONGEST_ROW = 2**24


@dataclass(frozen=True)
class DocumentLengths:
    """Where document lengths come from.

    Attributes:
        name: of a distribution in `anchor_attn.lengths`, or what else they are.
        lengths: of documents to draw from, with repetition; None for a distribution of that name.
        seed: of what is drawn.
    """

    name: str = "web-text"
    lengths: Sequence[int] | None = None
    seed: int = 0

    def rows(self, seq_len: int, count: int) -> list[list[int]]:
        """Rows of `seq_len` tokens with the anchor; the last document of a row is cut to fit.

        Raises:
            ValueError: an unknown name, a seed out of range, or no such documents fill a row.
        """
        check_seed(self.seed)
        tokens = seq_len - ANCHOR_TOKENS
        if self.lengths is None:
            if self.name not in DISTRIBUTIONS:
                known = ", ".join(DISTRIBUTIONS)
                raise ValueError(f"name must be one of {known} without lengths, got {self.name!r}; pass one of them.")
            return [draw_distribution(self.name, tokens, self.seed + row) for row in range(count)]
        return [_drawn(self.lengths, tokens, self.seed + row) for row in range(count)]


def _drawn(lengths: Sequence[int], tokens: int, seed: int) -> list[int]:
    draw, row, room = random.Random(seed), list[int](), tokens
    while room:
        row.append(min(draw.choice(lengths), room))
        room -= row[-1]
    return row


def read_lengths(text: str, seed: int = 0) -> DocumentLengths:
    """Document lengths from words of the command line.

        read_lengths("web-text")         a distribution
        read_lengths("300,50,161")       documents to draw from
        read_lengths("lengths.txt")      the same, numbers in a file

    Raises:
        ValueError: none of these, or numbers below 1.
    """
    if text in DISTRIBUTIONS:
        return DocumentLengths(text, seed=seed)
    words, name = text, "given lengths"
    if Path(text).is_file():
        words, name = Path(text).read_text(encoding="utf-8", errors="replace"), text
    numbers = words.replace(",", " ").split()
    if not numbers or not all(number.isdecimal() and 0 < int(number) <= LONGEST_ROW for number in numbers):
        raise ValueError(
            f"lengths must be one of {', '.join(DISTRIBUTIONS)}, numbers of tokens, or a file of them, got "
            f"{text[:80]!r}; pass web-text, or 300,50,161."
        )
    return DocumentLengths(name, [int(number) for number in numbers], seed)


@dataclass(frozen=True)
class TrainingPlan:
    """What was planned.

    Attributes:
        shape: of the model.
        cluster: the devices.
        documents: where lengths come from.
        steps: every length, scheme and pattern.
        rows: the rows that were drawn, by length.
    """

    shape: ModelShape
    cluster: Cluster
    documents: DocumentLengths
    steps: Sequence[StepPlan]
    rows: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict, repr=False)

    def step(self, seq_len: int, scheme: Scheme, pattern: str) -> StepPlan:
        """One of the steps."""
        return next(
            step for step in self.steps if (step.seq_len, step.scheme, step.pattern) == (seq_len, scheme, pattern)
        )

    def fastest(self, seq_len: int, pattern: str) -> StepPlan | None:
        """The fastest scheme of those that fit the memory, or of all where none does; None where none was planned."""
        steps = [step for step in self.steps if (step.seq_len, step.pattern) == (seq_len, pattern) and step.step_s]
        fitting = [step for step in steps if step.fits]
        return min(fitting or steps, key=lambda step: step.step_s or 0.0, default=None)

    def saving(self, seq_len: int) -> float | None:
        """What anchor saves of full's step, each under its fastest scheme."""
        full, anchor = self.fastest(seq_len, "full"), self.fastest(seq_len, "anchor")
        if full is None or anchor is None or not full.step_s or not anchor.step_s:
            return None
        return 1 - anchor.step_s / full.step_s

    @property
    def seq_lens(self) -> list[int]:
        """The lengths, in order."""
        return list(dict.fromkeys(step.seq_len for step in self.steps))


def plan_training(
    shape: ModelShape, cluster: Cluster, documents: DocumentLengths, seq_lens: Sequence[int] = SWEEP
) -> TrainingPlan:
    """Plan a step of every length, scheme and pattern.

        plan_training(describe_model("llama-2-7b"), cluster, DocumentLengths("web-text"), [65_536])

    Args:
        shape: as `describe_model` gives it.
        cluster: the devices.
        documents: where lengths come from; full attention gets the same rows.
        seq_lens: tokens a row, the anchor included.

    Raises:
        ValueError: a length that no row can have, documents that fill no row, or fewer than one device, row or rank.
    """
    for name, number in (("devices", cluster.devices), ("rows", cluster.rows), ("ranks_a_row", cluster.ranks_a_row)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}; pass 8.")
    for seq_len in seq_lens:
        if not 2 <= seq_len <= LONGEST_ROW:
            raise ValueError(f"seq_len must lie between 2 and {LONGEST_ROW:,}, got {seq_len}; pass 65536.")
    drawn = {seq_len: documents.rows(seq_len, min(cluster.rows, ROWS_DRAWN)) for seq_len in dict.fromkeys(seq_lens)}
    steps: list[StepPlan] = []
    for rows in drawn.values():
        counts = {
            pattern: [count_row(shape, row, pattern, cluster.device.tile) for row in rows] for pattern in PATTERNS
        }
        steps += [
            plan_step(shape, rows, counts, pattern, scheme, cluster) for scheme in SCHEMES for pattern in PATTERNS
        ]
    return TrainingPlan(shape, cluster, documents, _with_savings(steps), drawn)


def _with_savings(steps: Sequence[StepPlan]) -> list[StepPlan]:
    """Each step beside full's: of its own scheme, of Ulysses where full cannot keep documents apart."""
    times = {(step.seq_len, step.scheme): step.step_s for step in steps if step.pattern == "full" and step.step_s}
    found = []
    for step in steps:
        full_s = times.get((step.seq_len, step.scheme), times.get((step.seq_len, "ulysses")))
        saving = None if step.step_s is None or full_s is None else 1 - step.step_s / full_s
        found.append(replace(step, saving_of_full=saving))
    return found
