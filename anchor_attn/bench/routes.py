"""Every route of a call that this machine has, feature by feature, and the table that `engines.choice` reads.

needs_grad × pattern × features        forward and backward, or forward alone

plain           nothing but the pattern
window          256 tokens, the anchor an ordinary token before each document
kept_anchor     256 tokens, the anchor visible outside too; pattern "anchor" only
softcap         30
sinks           a learned logit a head
window+softcap, window+sinks

The reference takes part in the plain calls only; where beyond them one route is left, nothing is to choose, and the
case is not timed.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from anchor_attn.attention import anchor_attention
from anchor_attn.bench.attention import EAGER_COPIES
from anchor_attn.bench.memory import available_bytes, release
from anchor_attn.bench.parity import Inputs, Reference, parity_layout
from anchor_attn.bench.timing import Watch
from anchor_attn.engines.choice import ROUTES, Route, absence, refusal
from anchor_attn.masks import PATTERNS, PackedLayout
from anchor_attn.masks.patterns import Pattern
from anchor_attn.request import Call, Request, create_call

WINDOW, SOFTCAP = 256, 30.0
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": WINDOW, "keep_anchor": False},
    "kept_anchor": {"sliding_window": WINDOW, "keep_anchor": True},
    "softcap": {"softcap": SOFTCAP},
    "sinks": {},
    "window+softcap": {"sliding_window": WINDOW, "keep_anchor": False, "softcap": SOFTCAP},
    "window+sinks": {"sliding_window": WINDOW, "keep_anchor": False},
}
# The dense reference is run once and no more where that takes so many times the fastest route's seconds.
HOPELESS = 5
# A first call of so many seconds, and so many times the second, has compiled something.
COMPILING_S, COMPILING_TIMES = 1.0, 4


class Case(NamedTuple):
    """One kind of call: a key of the table."""

    features: str
    pattern: Pattern
    needs_grad: bool


@dataclass(frozen=True)
class RouteTiming:
    """What one route took for one kind of call; the fields that `engines.choice` reads, and the spread.

    Attributes:
        device: "cpu" or "cuda".
        device_name: its model.
        needs_grad: whether the backward is counted in.
        pattern: who attended to whom.
        features: what was asked beyond it.
        route: as `engine=` takes it.
        seconds: median of the counted rounds.
        fastest_s: of the counted rounds.
        slowest_s: of the counted rounds.
        rounds: how many were counted.
        compile_s: of the first call, where it compiled.
        share_of_budget: the largest error, over what the parity check allows.
    """

    device: str
    device_name: str
    needs_grad: bool
    pattern: Pattern
    features: str
    route: str
    seconds: float
    fastest_s: float
    slowest_s: float
    rounds: int
    compile_s: float | None
    share_of_budget: float


class LeftOut(NamedTuple):
    """A route or a whole case that was not timed."""

    case: Case
    route: str
    reason: str


@dataclass
class RouteTable:
    """What a run found, case by case."""

    timings: list[RouteTiming]
    left_out: list[LeftOut]


def bench_routes(
    layout: PackedLayout,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device_name: str,
    rounds: int,
    budget_s: float = math.inf,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> RouteTable:
    """Time every route of every case on one batch, alternating, each after a parity check.

    Args:
        layout: on the device.
        heads: query heads and key heads.
        head_dim: of queries, keys and values.
        dtype: of all tensors.
        device_name: recorded, and looked up by the choice.
        rounds: counted at most, after one that is not; of the reference, where it is hopeless, that one counts.
        budget_s: no case is begun after so many seconds.
        seed: of values.
        say: told the case that is begun.

    Raises:
        CheckError: a route disagrees with the float64 reference.
    """
    table, started = RouteTable([], []), time.perf_counter()
    for case in list_cases():
        if time.perf_counter() - started > budget_s:
            table.left_out.append(LeftOut(case, "", f"the budget of {budget_s:,.0f} s was spent; raise --budget-s"))
            continue
        say(f"{case.features}, {case.pattern}, {'with' if case.needs_grad else 'without'} gradients")
        _time_case(case, layout, (heads, head_dim, dtype, seed), device_name, rounds, table)
    return table


def list_cases() -> list[Case]:
    """Every kind of call that is timed, the plain ones first."""
    return [
        Case(features, pattern, needs_grad)
        for features in FEATURES
        for pattern in PATTERNS
        for needs_grad in (True, False)
        if features != "kept_anchor" or pattern == "anchor"
    ]


def merge_records(
    shipped: Mapping[str, Any], timings: Sequence[RouteTiming], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """The shipped table with one device's records replaced: what goes to `engines/measured.json`.

    Records of the same case stay together: on the CPU, whose model the choice does not ask for, all others go.
    """
    device, name = environment["device"], environment["device_name"]

    def stays(record: Mapping[str, Any]) -> bool:
        return record["device"] != device or (device != "cpu" and record["device_name"] != name)

    kept = [dict(record) for record in shipped["records"] if stays(record)]
    names = {record["device_name"] for record in kept}
    devices = {key: about for key, about in shipped["meta"].get("devices", {}).items() if key in names}
    records = kept + [asdict(timing) for timing in timings]
    return {"meta": {"devices": devices | {name: dict(environment)}}, "records": records}


def _time_case(
    case: Case,
    layout: PackedLayout,
    shape: tuple[tuple[int, int], int, torch.dtype, int],
    device_name: str,
    rounds: int,
    table: RouteTable,
) -> None:
    heads, head_dim, dtype, seed = shape
    features, with_sinks = FEATURES[case.features], "sinks" in case.features
    inputs = Inputs.draw(layout, heads, head_dim, dtype, seed, with_sinks)
    routes = list(_present(case, layout, inputs, table))
    if len(routes) < (1 if case.features == "plain" else 2):
        return
    small = parity_layout(layout.device.type)
    small_inputs = Inputs.draw(small, heads, head_dim, dtype, seed, with_sinks)
    reference = Reference(small_inputs, small, case.pattern, features)
    errors, compile_s, runs = dict[str, float](), dict[str, float | None](), dict[str, Callable[[Watch], None]]()
    for route in routes:

        def attend(*states: Any, where: PackedLayout = layout, name: str = route.name) -> Any:
            query, key, value, *sinks = states
            return anchor_attention(
                query, key, value, where, case.pattern, name, sinks=sinks[0] if sinks else None, **features
            )

        on_small = partial(attend, where=small)
        first, second = (_seconds_of(on_small, small_inputs, case.needs_grad, layout.device) for _ in range(2))
        compile_s[route.name] = first if first > max(COMPILING_S, COMPILING_TIMES * second) else None
        errors[route.name] = reference.check(f"{route.name} for {case}", on_small, case.needs_grad)
        runs[route.name] = partial(_run, attend, inputs, case.needs_grad)
    for name, seconds in _alternate(runs, rounds, layout.device, case, table).items():
        table.timings.append(
            RouteTiming(
                device=layout.device.type,
                device_name=device_name,
                needs_grad=case.needs_grad,
                pattern=case.pattern,
                features=case.features,
                route=name,
                seconds=median(seconds),
                fastest_s=min(seconds),
                slowest_s=max(seconds),
                rounds=len(seconds),
                compile_s=compile_s[name],
                share_of_budget=errors[name],
            )
        )


def _present(case: Case, layout: PackedLayout, inputs: Inputs, table: RouteTable) -> Iterator[Route]:
    """The routes that can be taken here; what the memory forbids is noted."""
    call = _call(case, layout, inputs)
    for route in ROUTES:
        if refusal(route, call) is not None or absence(route, call) is not None:
            continue
        if route.engine == "reference" and case.features != "plain":
            continue
        if route.engine == "reference":
            cells = layout.batch_size * inputs.states[0].shape[1] * layout.seq_len**2
            free, needed = available_bytes(layout.device), 4 * EAGER_COPIES * cells
            if free is not None and needed > free:
                reason = f"its matrices would take {needed / 2**30:,.0f} GiB, {free / 2**30:,.0f} GiB are free"
                table.left_out.append(LeftOut(case, route.name, reason))
                continue
        yield route


def _call(case: Case, layout: PackedLayout, inputs: Inputs) -> Call:
    sinks = inputs.states[3] if len(inputs.states) > 3 else None
    query, key, value = inputs.states[:3]
    request = Request(pattern=case.pattern, scale=1.0, sinks=sinks, **FEATURES[case.features])
    return create_call(query, key, value, layout, request)._replace(needs_grad=case.needs_grad)


def _alternate(
    runs: Mapping[str, Callable[[Watch], None]], rounds: int, device: torch.device, case: Case, table: RouteTable
) -> dict[str, list[float]]:
    """Seconds of the counted rounds by route."""
    seconds: dict[str, list[float]] = {}
    for name, run in runs.items():
        release(device)
        watch = Watch(device)
        try:
            run(watch)
        except torch.OutOfMemoryError as error:
            table.left_out.append(LeftOut(case, name, f"out of memory: {str(error).partition('.')[0]}"))
            continue
        seconds[name] = [watch.seconds["call"]]
    if not seconds:
        return {}
    fastest = min(first for (first,) in seconds.values())
    dense = next((name for name in seconds if name.startswith("reference/")), None)
    hopeless = {dense} if dense is not None and seconds[dense][0] > HOPELESS * fastest else set()
    for _ in range(rounds):
        for name in (name for name in seconds if name not in hopeless):
            watch = Watch(device)
            runs[name](watch)
            seconds[name].append(watch.seconds["call"])
    return {name: taken if name in hopeless else taken[1:] for name, taken in seconds.items()}


def _run(attend: Callable[..., Any], inputs: Inputs, needs_grad: bool, watch: Watch) -> None:
    states = inputs.states if needs_grad else inputs.detached
    with torch.set_grad_enabled(needs_grad), watch("call"):
        out = attend(*states)
        if needs_grad:
            torch.autograd.grad(out, states, inputs.cotangent)


def _seconds_of(attend: Callable[..., Any], inputs: Inputs, needs_grad: bool, device: torch.device) -> float:
    watch = Watch(device)
    _run(attend, inputs, needs_grad, watch)
    return watch.seconds["call"]
