"""Which of the paper's claims a measurement bears out, with the numbers that say so."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from anchor_attn.drift.paper.report import PaperReport
from anchor_attn.intervals import Interval, mean_interval, ratio_interval

BF16, FP32 = "bf16_cos_sin", "fp32"
# The share of bfloat16's D that is left, below which it counts as removed.
REMOVED = 0.1
FOUND, NOT_FOUND, UNSEEN, UNMEASURED = "found", "NOT found", "no difference seen", "not measured"


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims, and what was seen of it.

    Attributes:
        claim: in a few words.
        verdict: "found", "NOT found", "no difference seen", "not measured", or below three sequences "cannot be told
            from 2 sequences".
        numbers: what it rests on.
    """

    claim: str
    verdict: str
    numbers: str

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict}. {self.numbers}"

    def record(self) -> dict[str, Any]:
        """As a result file has it."""
        return asdict(self)


def judge_paper(report: PaperReport, random: PaperReport | None = None) -> list[Claim]:
    """What the measurement says of each claim of the paper.

        float32 removes it: found. D abs left of bf16_cos_sin's at 4,096 tokens, in %: 0.433 (95 % 0.43 … 0.436, 50)

    Args:
        report: of a trained model, or of whatever is to be judged.
        random: the same protocol with random weights, for the claim that training amplifies it.
    """
    claims = [_judge_removal(report), _judge_growth(report), _judge_first_token(report)]
    return claims if random is None else [*claims, _judge_training(report, random)]


def untold(sequences: int) -> str:
    """The verdict on any claim below three sequences."""
    return f"cannot be told from {sequences} sequence{'' if sequences == 1 else 's'}"


# --- the claims ------------------------------------------------------------------------------------------------------


def _judge_removal(report: PaperReport) -> Claim:
    claim = "float32 removes it"
    length, delta2 = report.settings["length"], report.settings["delta2"]
    means = []
    for policy in (FP32, BF16):
        of_deltas = [report.samples("d_abs", policy, length, d) for d in report.settings["deltas1"] if d != delta2]
        means.append([math.fsum(values) / len(values) for values in zip(*filter(None, of_deltas), strict=True)])
    left = ratio_interval(means[0], means[1]) if all(means) else None
    if left is None:
        return Claim(claim, UNMEASURED, f"It takes {FP32} and {BF16} at a Δ1 other than Δ2.")
    if left.half is None:
        verdict = untold(left.units)
    else:
        verdict = FOUND if left.side(REMOVED) < 0 else NOT_FOUND if left.side(1.0) else UNSEEN
    return Claim(claim, verdict, f"D abs left of {BF16}'s at {length:,} tokens, in %: {left.text(times=100)}")


def _judge_growth(report: PaperReport) -> Claim:
    claim = "it grows with the length"
    lengths, delta1 = report.settings["lengths"], report.settings["lengths_delta1"]
    slopes = {name: _growth(report, name, lengths, delta1) for name in ("d_logit_abs", "d_abs")}
    logit, attention = slopes.values()
    if logit is None or attention is None:
        return Claim(claim, UNMEASURED, f"It takes {BF16} at two lengths or more, and a Δ1 other than Δ2.")
    doublings = math.log2(lengths[-1] / lengths[0])
    numbers = (
        f"{lengths[0]:,} to {lengths[-1]:,} tokens, of {BF16}, a doubling adds, in %: to D_logit abs, a mean over "
        f"queries, {logit.text(times=100)}; to D abs {attention.text(times=100)}; in all that is "
        f"× {(1 + logit.mean) ** doublings:.3g} and × {(1 + attention.mean) ** doublings:.3g}"
    )
    return Claim(claim, _verdict(logit, 0.0), numbers)


def _verdict(value: Interval, boundary: float) -> str:
    if value.half is None:
        return untold(value.units)
    return {1: FOUND, 0: UNSEEN, -1: NOT_FOUND}[value.side(boundary)]


def _growth(report: PaperReport, name: str, lengths: Sequence[int], delta1: int) -> Interval | None:
    """By which share a measure grows a doubling: 2 to the slope of its log2 against the length's, less 1."""
    columns = [report.samples(name, BF16, length, delta1) for length in lengths]
    if len(lengths) < 2 or any(column is None or min(column) <= 0 for column in columns):
        return None
    steps = [math.log2(length) for length in lengths]
    centre = math.fsum(steps) / len(steps)
    spread = math.fsum((step - centre) ** 2 for step in steps)
    slopes = [
        math.fsum((step - centre) * math.log2(value) for step, value in zip(steps, values, strict=True)) / spread
        for values in zip(*filter(None, columns), strict=True)
    ]
    return mean_interval([2**slope - 1 for slope in slopes])


def _judge_first_token(report: PaperReport) -> Claim:
    claim = "the first token carries most of it"
    length, delta1 = report.settings["length"], report.settings["lengths_delta1"]
    first, whole, attention = (
        report.samples(name, BF16, length, delta1) for name in ("first_token_d_abs", "d_abs", "first_token_attention")
    )
    share = None if first is None or whole is None else ratio_interval(first, whole)
    if share is None or attention is None:
        return Claim(claim, UNMEASURED, f"It takes {BF16} at {length:,} tokens, and a Δ1 other than Δ2.")
    return Claim(
        claim,
        _verdict(share, 0.5),
        f"Its share of D abs at {length:,} tokens, in %: {share.text(times=100)}; of the attention, weighed alike, "
        f"{mean_interval(attention).text(times=100)}; of the keys {100 / length:.3g}",
    )


def _judge_training(report: PaperReport, random: PaperReport) -> Claim:
    claim = "training amplifies it"
    length, delta1 = report.settings["length"], report.settings["lengths_delta1"]
    ours, theirs = (one.samples("d_abs", BF16, length, delta1) for one in (report, random))
    if not ours or not theirs or min(theirs) <= 0:
        return Claim(claim, UNMEASURED, f"It takes {BF16} at {length:,} tokens and Δ1 = {delta1} in both reports.")
    both = [mean_interval(values) for values in (ours, theirs)]
    apart = {(True, False): FOUND, (False, True): NOT_FOUND}
    above, below = ((first.low or 0.0) > (second.high or 0.0) for first, second in (both, both[::-1]))
    fewest = min(both, key=lambda one: one.units)
    verdict = untold(fewest.units) if fewest.half is None else apart.get((above, below), UNSEEN)
    return Claim(claim, verdict, f"D abs of {BF16}: {both[0].text()}; of random weights {both[1].text()}")
