"""Which route computes a call: an engine, a kernel of it, and a form of the sum, by measured seconds.

    route                                   what it is
    varlen/flash_attn_3/gather              the anchor's keys in front of each document's, one kernel call
    varlen/flash_attn_3/merge               each document to itself, the anchor and sinks joined by log-sum-exp
    varlen/sdpa/gather                      scaled_dot_product_attention, a document at a time
    flex/flex_attention/table               the anchor in the block table
    reference/eager/dense                   the S × S matrix

`anchor-attn bench routes` times every route that a machine has, feature by feature, and writes the table that is read
here. Where it has no figure, the first route of `ROUTES` that can is taken, and the log says so.
"""

import json
import logging
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import torch

from anchor_attn.engines.kernels import KERNELS
from anchor_attn.request import Call

ENGINES = ("reference", "flex", "varlen")
FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Devices whose flex kernel has neither a backward nor a log-sum-exp (torch 2.13).
FORWARD_ONLY = ("cpu", "mps")

logger = logging.getLogger("anchor_attn")


class Route(NamedTuple):
    """One way to compute an attention; its name is the three joined by "/"."""

    engine: str
    kernel: str
    form: str

    @property
    def name(self) -> str:
        """As it is asked for, and as tables have it."""
        return "/".join(self)


# The order where nothing is measured.
ROUTES = (
    *(Route("varlen", kernel, form) for kernel in KERNELS for form in ("gather", "merge")),
    *(Route("flex", "flex_attention", form) for form in ("merge", "table", "column")),
    Route("reference", "eager", "dense"),
)


def check_engine(engine: str) -> None:
    """Raise unless `engine` is "auto", an engine, or an engine with a kernel, a form or both: "varlen/sdpa/merge".

    Raises:
        ValueError: an unknown engine, kernel or form.
    """
    if engine != "auto" and not _routes_of(engine):
        known = ("auto", *ENGINES)
        raise ValueError(
            f"engine must be one of {known}, or a route such as 'varlen/sdpa/gather', got {engine!r}; pass one of them."
        )


def choose_route(engine: str, call: Call) -> Route:
    """The fastest measured route of an engine that can compute a call; the first that can where none is measured.

        choose_route("auto", Call(torch.device("cpu"), torch.float32, 64, True, "anchor")).name    'varlen/sdpa/gather'

    "auto" does not take flex on a device where it has no backward: compiling it takes half a minute and a compiler.

    Args:
        engine: "auto", an engine, or an engine with a kernel, a form or both.
        call: what is to be computed.

    Raises:
        ValueError: no such route has what is asked for; the message names those that have.
        ImportError: the named kernel has it, and cannot be called here.
    """
    named = _routes_of(engine)
    possible = [route for route in named if refusal(route, call) is None and absence(route, call) is None]
    if engine == "auto":
        possible = [route for route in possible if route.engine != "flex" or call.device.type not in FORWARD_ONLY]
    if not possible:
        _refuse(engine, named, call)
    seconds = measured_seconds(call)
    timed = [route for route in possible if route.name in seconds]
    chosen = min(timed, key=lambda route: seconds[route.name], default=possible[0])
    if engine == "auto":
        _say(chosen, call, seconds)
    return chosen


def refusal(route: Route, call: Call) -> str | None:
    """What is asked for and a route has not, in words that follow "got"; None where it has everything."""
    if route.engine == "varlen":
        if route.form == "merge" and not call.has_sinks and call.pattern != "anchor":
            return f"pattern={call.pattern!r} without sinks, where nothing is to be merged"
        return KERNELS[route.kernel].refusal(call, merged=route.form == "merge")
    return _flex_refusal(route.form, call) if route.engine == "flex" else None


def absence(route: Route, call: Call) -> str | None:
    """Why this machine cannot take a route, with what to do about it; None where it can."""
    return KERNELS[route.kernel].absence(call.device) if route.engine == "varlen" else None


def measured_seconds(call: Call) -> dict[str, float]:
    """Seconds by route of calls like this one, from the table; of another model of device where it has not this one."""
    device_name = _device_name(call)
    alike = [
        record
        for record in read_measurements()
        if (record["device"], record["needs_grad"]) == (call.device.type, call.needs_grad)
        and (record["pattern"], record["features"]) == (call.pattern, call.features)
    ]
    here = [record for record in alike if record["device_name"] == device_name] or alike
    return {record["route"]: record["seconds"] for record in here}


@cache
def read_measurements() -> list[dict[str, Any]]:
    """The records of the table that `anchor-attn bench routes` wrote."""
    return json.loads((files("anchor_attn.engines") / "measured.json").read_text())["records"]


def _routes_of(engine: str) -> Sequence[Route]:
    if engine == "auto":
        return ROUTES
    name, *parts = str(engine).split("/")
    asked = set(parts)
    if len(asked) < len(parts):
        return []
    return [route for route in ROUTES if route.engine == name and asked <= {route.kernel, route.form}]


def _flex_refusal(form: str, call: Call) -> str | None:
    if call.dtype not in FLEX_DTYPES:
        return f"{call.dtype}"
    if call.dropout:
        return f"dropout={call.dropout}"
    forward_only = call.device.type in FORWARD_ONLY
    if forward_only and call.needs_grad:
        return f"inputs that require gradients on {call.device.type}"
    if forward_only != (form == "column"):
        return f"{call.device.type}, where flex has {'form column only' if forward_only else 'forms merge and table'}"
    if form == "merge" and call.pattern != "anchor":
        return f"pattern={call.pattern!r}, where no anchor is to be merged"
    return None


def _refuse(engine: str, named: Sequence[Route], call: Call) -> None:
    able = [route for route in named if refusal(route, call) is None]
    if able:
        raise ImportError(
            f"engine={engine!r} must be callable on {call.device}, got a kernel that {absence(able[0], call)}."
        )
    reasons = dict.fromkeys(str(refusal(route, call)) for route in named)
    own = engine.split("/")[0]
    others = dict.fromkeys(
        f"engine={route.engine!r}" if route.engine != own else f"engine='{own}/{route.kernel}'"
        for route in ROUTES
        if refusal(route, call) is None and absence(route, call) is None
    )
    raise ValueError(
        f"engine={engine!r} must support the call, got {' and '.join(reasons)}; pass {' or '.join(others)}."
    )


def _device_name(call: Call) -> str:
    return torch.cuda.get_device_name(call.device) if call.device.type == "cuda" else ""


def _say(chosen: Route, call: Call, seconds: dict[str, float]) -> None:
    figure = "the fastest measured" if chosen.name in seconds else "not measured here, the first that can"
    gradients = "with gradients" if call.needs_grad else "without gradients"
    _say_once(
        f"engine='auto' chose {chosen.name!r} for {call.pattern} attention ({call.features}, {call.dtype}, "
        f"{gradients}, on {call.device.type}): {figure}"
    )


@cache
def _say_once(message: str) -> None:
    logger.info(message)
