"""What the evidence for the extension methods says: the claims of the papers, each beside what was found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from anchor_attn.bench.rope import Plan
from anchor_attn.bench.rope_readings import STAGES, MethodReading, MethodReadings, Stage
from anchor_attn.intervals import mean_interval

# In perplexities of the plain model at its own length, on the same tokens. Set before anything was measured.
EXPLODES = 2.0
HOLDS = 1.1
# In nats: what three digits show. A difference below it is none.
SHOWN = 5e-4

Verdict = Literal["found", "NOT found", "no difference seen"]
UNSEEN: Verdict = "no difference seen"


@dataclass(frozen=True)
class Finding:
    """A claim of the papers, and what was found here.

    Attributes:
        claim: as they have it.
        verdict: whether it was found so; a claim that compares two methods may also end in a tie.
        found: the numbers.
    """

    claim: str
    verdict: Verdict
    found: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.claim} – {self.found}"


@dataclass(frozen=True)
class Gap:
    """How much more one method loses than another on the same windows.

    Attributes:
        nats: the mean difference, below 0 where the first is better.
        width: half of its paired 95 % t interval over windows; None below 3 of them.
    """

    nats: float
    width: float | None

    @classmethod
    def between(cls, ours: MethodReading, theirs: MethodReading) -> "Gap":
        """Two methods at one length."""
        gaps = [our - their for our, their in zip(ours.window_nats, theirs.window_nats, strict=True)]
        return cls(ours.nats - theirs.nats, mean_interval(gaps).half)

    @property
    def is_seen(self) -> bool:
        """Whether it is more than its interval, and more than its digits show."""
        return abs(self.nats) > max(self.width or 0.0, SHOWN)

    def __str__(self) -> str:
        interval = "" if self.width is None else f" ± {self.width:.3f}"
        return f"{self.nats:+z.3f}{interval} nats"


def judge(readings: MethodReadings, plan: Plan) -> list[Finding]:
    """The claims of the papers, each beside what was found.

    A method "holds" where its perplexity is at most 1.1 times that of the plain model at its own length on the same
    tokens, and "explodes" from 2 times on. Two methods differ where the paired interval over windows leaves out 0.
    """
    longer, tuned_times = readings.times[1:], plan.tuned_times
    last = longer[-1]

    def listed(stage: Stage, method: str) -> str:
        values = ", ".join(f"{readings.at(stage, method, times).perplexity:.2f}" for times in longer)
        return f"{method} {stage} {values}"

    def holds(stage: Stage, method: str, times: int) -> bool:
        return readings.ratio(stage, method, times) <= HOLDS

    lengths = ", ".join(f"{times}" for times in longer)
    base = f"perplexity {readings.trained.perplexity:.2f} at 1 ×; at {lengths} ×"
    pi_before, pi_after = (readings.at(stage, "linear", tuned_times) for stage in STAGES)
    findings = [
        Finding(
            "plain RoPE explodes beyond its length",
            _found(readings.ratio("untrained", "default", last) >= EXPLODES),
            f"{base}: {listed('untrained', 'default')}",
        ),
        Finding(
            "position interpolation needs the fine-tuning, and holds after it",
            _found(not holds("untrained", "linear", tuned_times) and holds("fine-tuned", "linear", tuned_times)),
            f"at {tuned_times} × {pi_before.perplexity:.2f} untrained, {pi_after.perplexity:.2f} fine-tuned",
        ),
        *(
            Finding(
                f"{name} holds untrained",
                _found(all(holds("untrained", method, times) for times in longer)),
                f"at {lengths} ×: {listed('untrained', method)}",
            )
            for name, method in (("NTK", "ntk"), ("YaRN", "yarn"))
        ),
        _judge_search(readings, longer),
        Finding(
            "a short fine-tuning does not save plain RoPE",
            _found(not holds("fine-tuned", "default", tuned_times)),
            f"at {tuned_times} ×: {readings.at('fine-tuned', 'default', tuned_times).perplexity:.2f}",
        ),
    ]
    return findings


def _found(is_so: bool) -> Verdict:
    return "found" if is_so else "NOT found"


def _judge_search(readings: MethodReadings, longer: Sequence[int]) -> Finding:
    """Searched factors beside the fixed method that is best on the windows themselves, which it is chosen by."""
    gaps, parts = [], []
    for times in longer:
        fixed = [readings.at("untrained", method, times) for method in readings.methods if method != "longrope"]
        best = min(fixed, key=lambda reading: reading.nats)
        gaps.append(Gap.between(readings.at("untrained", "longrope", times), best))
        parts.append(f"{times} × {gaps[-1]} to {best.method}" + ("" if gaps[-1].is_seen else f", {UNSEEN}"))
    seen = [gap for gap in gaps if gap.is_seen]
    verdict = _found(all(gap.nats < 0 for gap in seen)) if seen else UNSEEN
    return Finding("searched factors are at least as good as the best fixed ones, untrained", verdict, "; ".join(parts))
