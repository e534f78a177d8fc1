"""Which route computes what: by name, by measured seconds, and what is said where none can."""

import logging
import re
import sys

import pytest
import torch
from standins import MODULES, standin

from anchor_attn import PackedLayout, anchor_attention
from anchor_attn.engines import choice
from anchor_attn.engines.choice import ROUTES, Route, choose_route, measured_seconds, refusal
from anchor_attn.engines.kernels import KERNELS
from anchor_attn.request import Call, Request, create_call

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
LAYOUT = PackedLayout.from_lengths([[5, 4], [3, 2, 4]], anchor_tokens=1)
PLAIN = Call(CPU, torch.bfloat16, 64, needs_grad=True, pattern="anchor")


def states_for(layout=LAYOUT, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(layout.batch_size, 2, layout.seq_len, 8, dtype=dtype) for _ in range(3)]


@pytest.fixture
def measured(monkeypatch):
    """A table of measurements in place of the one that is shipped; takes records' fields that differ."""

    def put(*records):
        common = {"device": "cpu", "device_name": "a CPU", "needs_grad": True, "pattern": "anchor", "features": "plain"}
        monkeypatch.setattr(choice, "read_measurements", lambda: [{**common, **record} for record in records])

    put()
    return put


# --- by name ---------------------------------------------------------------------------------------------------------


def test_every_engine_kernel_and_form_has_a_route():
    assert {route.engine for route in ROUTES} == set(choice.ENGINES)
    assert list(dict.fromkeys(route.kernel for route in ROUTES if route.engine == "varlen")) == list(KERNELS)
    assert len({route.name for route in ROUTES}) == len(ROUTES)


@pytest.mark.parametrize("engine", ["auto", *choice.ENGINES, "varlen/sdpa", "varlen/merge", *(r.name for r in ROUTES)])
def test_engines_kernels_forms_and_routes_are_names(engine):
    choice.check_engine(engine)


@pytest.mark.parametrize("engine", ["", "dense", "sdpa", "varlen/", "varlen/table", "flex/sdpa", "auto/sdpa"])
def test_other_names_are_refused(engine):
    message = (
        "engine must be one of ('auto', 'reference', 'flex', 'varlen'), or a route such as 'varlen/sdpa/gather', "
        f"got {engine!r}; pass one of them."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        anchor_attention(*states_for(), LAYOUT, engine=engine)


@pytest.mark.parametrize("engine", ["reference", "varlen/sdpa", "varlen/gather", "varlen/merge"])
def test_a_route_taken_by_its_name_computes_the_same(engine):
    states = states_for(dtype=torch.float64)
    expected = anchor_attention(*states, LAYOUT, engine="reference")

    torch.testing.assert_close(anchor_attention(*states, LAYOUT, engine=engine), expected, rtol=0, atol=1e-14)


# --- by seconds ------------------------------------------------------------------------------------------------------


def test_the_fastest_measured_route_is_taken(measured):
    gather, merge = "varlen/sdpa/gather", "varlen/sdpa/merge"
    measured({"route": gather, "seconds": 2.0}, {"route": merge, "seconds": 1.0})
    assert choose_route("auto", PLAIN).name == choose_route("varlen", PLAIN).name == merge

    measured({"route": gather, "seconds": 1.0}, {"route": merge, "seconds": 2.0})
    assert choose_route("auto", PLAIN).name == choose_route("varlen", PLAIN).name == gather
    assert choose_route("varlen/merge", PLAIN).name == merge, "what is named is not replaced by what is faster"


@pytest.mark.parametrize(
    "other",
    [{"needs_grad": False}, {"pattern": "full"}, {"features": "window"}, {"device": "cuda"}],
    ids=str,
)
def test_seconds_of_other_calls_decide_nothing(measured, other):
    measured({"route": "varlen/sdpa/merge", "seconds": 1.0, **other})

    assert measured_seconds(PLAIN) == {}
    assert choose_route("auto", PLAIN).name == "varlen/sdpa/gather"


def test_seconds_of_this_model_of_device_go_before_another_ones(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fast")
    slow = {"device": "cuda", "device_name": "Slow", "route": "varlen/sdpa/gather", "seconds": 2.0}
    fast = {**slow, "device_name": "Fast", "seconds": 1.0}
    for records, expected in [((slow, fast), 1.0), ((slow,), 2.0)]:
        measured(*records)
        assert measured_seconds(PLAIN._replace(device=CUDA)) == {"varlen/sdpa/gather": expected}


def test_a_route_that_cannot_is_not_taken_however_fast(measured):
    measured({"route": "varlen/sdpa/merge", "seconds": 1.0, "features": "softcap"})

    assert choose_route("auto", PLAIN._replace(softcap=30.0)).name == "varlen/sdpa/gather"


def test_auto_compiles_nothing_on_a_cpu(measured):
    asked = PLAIN._replace(needs_grad=False)
    measured({"route": "flex/flex_attention/column", "seconds": 1.0, "needs_grad": False})

    assert choose_route("auto", asked).engine == "varlen"
    assert choose_route("flex", asked).form == "column"


def test_the_shipped_table_holds_routes_and_seconds():
    records = choice.read_measurements()
    assert records
    assert {record["route"] for record in records} <= {route.name for route in ROUTES}
    assert all(record["seconds"] > 0 for record in records)
    assert all(measured_seconds(PLAIN._replace(pattern=pattern)) for pattern in ("full", "intra_doc", "anchor"))


@pytest.mark.parametrize(
    ("given", "features"),
    [
        ({}, "plain"),
        ({"sliding_window": 4}, "kept_anchor"),
        ({"sliding_window": 4, "keep_anchor": False}, "window"),
        ({"sliding_window": 4, "pattern": "full"}, "window"),
        ({"softcap": 1.0, "sinks": torch.zeros(2), "dropout": 0.1}, "softcap+sinks+dropout"),
    ],
    ids=str,
)
def test_features_are_what_is_asked_beyond_plain_attention(given, features):
    request = Request(**{"pattern": "anchor", "scale": 1.0, **given})

    assert create_call(*states_for(), LAYOUT, request).features == features


def test_a_call_is_in_autocasts_dtype_and_knows_whether_a_backward_follows():
    states = states_for()
    request = Request("anchor", 1.0, sinks=torch.zeros(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert create_call(*states, LAYOUT, request).dtype == torch.bfloat16
        assert create_call(*(part.double() for part in states), LAYOUT, request).dtype == torch.float64
    assert not create_call(*states, LAYOUT, request).needs_grad
    for leaf in (*states, request.sinks):
        leaf.requires_grad_()
        assert create_call(*states, LAYOUT, request).needs_grad
        with torch.no_grad():
            assert not create_call(*states, LAYOUT, request).needs_grad
        leaf.requires_grad_(False)


def test_auto_says_what_it_chose_once_and_a_named_engine_nothing(caplog, measured):
    choice._say_once.cache_clear()
    measured({"route": "varlen/sdpa/gather", "seconds": 1.0, "needs_grad": False})
    with caplog.at_level(logging.INFO, "anchor_attn"):
        for engine, pattern in [("varlen", "anchor"), ("auto", "anchor"), ("auto", "anchor"), ("auto", "full")]:
            anchor_attention(*states_for(), LAYOUT.to("cpu"), pattern, engine)
            anchor_attention(*states_for(), PackedLayout.from_lengths([[5, 4], [3, 2, 4]]), pattern, engine)

    plain = "(plain, torch.float32, without gradients, on cpu)"
    assert caplog.messages == [
        f"engine='auto' chose 'varlen/sdpa/gather' for anchor attention {plain}: the fastest measured",
        f"engine='auto' chose 'varlen/sdpa/gather' for full attention {plain}: not measured here, the first that can",
    ]
    choice._say_once.cache_clear()


# --- by what a kernel can --------------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(monkeypatch):
    """Every kernel's stand-in, on a device of the capability that is asked for."""

    def of(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    of(9, 0)
    with standin("flash_attn_3"), standin("flash_attn_4"), standin("flash_attn_2"), standin("varlen_attn"):
        yield of


@pytest.mark.parametrize(
    ("capability", "kernel"), [((7, 5), "sdpa"), ((9, 0), "flash_attn_3"), ((10, 0), "flash_attn_4")], ids=str
)
def test_unmeasured_the_newest_kernel_that_is_built_for_the_device_is_taken(on_cuda, measured, capability, kernel):
    on_cuda(*capability)

    assert choose_route("auto", PLAIN._replace(device=CUDA)) == Route("varlen", kernel, "gather")


@pytest.mark.parametrize(
    ("asked", "route"),
    [
        ({}, "varlen/flash_attn_3/gather"),
        ({"dtype": torch.float32}, "varlen/sdpa/gather"),
        ({"head_dim": 320}, "varlen/sdpa/gather"),
        ({"softcap": 30.0}, "varlen/flash_attn_3/gather"),
        ({"window": 9}, "varlen/flash_attn_3/gather"),
        ({"window": 9, "keeps_anchor_outside": True}, "varlen/flash_attn_3/merge"),
        ({"has_sinks": True}, "varlen/flash_attn_3/merge"),
        ({"dropout": 0.1}, "varlen/flash_attn_2/gather"),
        ({"dropout": 0.1, "softcap": 30.0}, "varlen/sdpa/gather"),
        ({"dropout": 0.1, "has_sinks": True}, "varlen/sdpa/gather"),
    ],
    ids=str,
)
def test_unmeasured_the_first_kernel_that_has_everything_is_taken(on_cuda, measured, asked, route):
    assert choose_route("auto", PLAIN._replace(device=CUDA, **asked)).name == route


def test_an_old_varlen_attn_has_windows_only_by_the_merge():
    asked = PLAIN._replace(window=9, dtype=torch.bfloat16)
    with standin("varlen_attn with is_causal"):
        assert choose_route("varlen/varlen_attn", asked).form == "merge"
        assert refusal(Route("varlen", "varlen_attn", "gather"), asked) == (
            "sliding_window=9 in form gather, for which this torch is too old"
        )
    with standin("varlen_attn without enable_gqa"):
        assert choose_route("varlen/varlen_attn", asked).form == "gather"


@pytest.mark.parametrize("form", [*MODULES, "sdpa"])
def test_without_sinks_and_without_an_anchor_nothing_is_merged(form):
    route = Route("varlen", form.split()[0], "merge")

    assert "nothing is to be merged" in refusal(route, PLAIN._replace(pattern="intra_doc"))


REFUSED = [
    ("gradients of flex on a CPU", ValueError, "flex", {},
     "engine='flex' must support the call, got inputs that require gradients on cpu; "
     "pass engine='varlen' or engine='reference'."),
    ("float64 for flex", ValueError, "flex", {"dtype": torch.float64, "needs_grad": False},
     "engine='flex' must support the call, got torch.float64; "
     "pass engine='varlen' or engine='reference'."),
    ("dropout for flex", ValueError, "flex", {"dropout": 0.5, "needs_grad": False},
     "engine='flex' must support the call, got dropout=0.5; "
     "pass engine='varlen' or engine='reference'."),
    ("a form of another device", ValueError, "flex/merge", {"needs_grad": False},
     "engine='flex/merge' must support the call, got cpu, where flex has form column only; "
     "pass engine='varlen' or engine='flex/flex_attention' or engine='reference'."),
    ("a kernel for CUDA on a CPU", ValueError, "varlen/flash_attn_2", {},
     "engine='varlen/flash_attn_2' must support the call, got tensors on cpu; "
     "pass engine='varlen/sdpa' or engine='reference'."),
    ("float32 for flash", ValueError, "varlen/flash_attn_3", {"dtype": torch.float32},
     "engine='varlen/flash_attn_3' must support the call, got torch.float32; "
     "pass engine='varlen/sdpa' or engine='reference'."),
    ("a softcap for varlen_attn", ValueError, "varlen/varlen_attn", {"softcap": 30.0},
     "engine='varlen/varlen_attn' must support the call, got softcap=30.0; "
     "pass engine='varlen/sdpa' or engine='reference'."),
    ("wide heads for 4", ValueError, "varlen/flash_attn_4", {"head_dim": 256},
     "engine='varlen/flash_attn_4' must support the call, got a head size of 256; "
     "pass engine='varlen/sdpa' or engine='reference'."),
    ("dropout for 3", ValueError, "varlen/flash_attn_3/gather", {"dropout": 0.5},
     "engine='varlen/flash_attn_3/gather' must support the call, got dropout=0.5; "
     "pass engine='varlen/sdpa' or engine='reference'."),
    ("dropout and a merge", ValueError, "varlen/sdpa/merge", {"dropout": 0.5},
     "engine='varlen/sdpa/merge' must support the call, got dropout=0.5 with an anchor or a sink that is merged; "
     "pass engine='varlen/sdpa' or engine='reference'."),
    ("a merge of SDPA elsewhere", ValueError, "varlen/sdpa/merge", {"device": META},
     "engine='varlen/sdpa/merge' must support the call, got a merge on meta, where SDPA gives no log-sum-exp; "
     "pass engine='varlen/sdpa' or engine='flex' or engine='reference'."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "engine", "asked", "message"), [pytest.param(*case, id=name) for name, *case in REFUSED]
)
def test_what_a_route_has_not_is_said_in_one_line_that_names_who_has(measured, error, engine, asked, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        choose_route(engine, PLAIN._replace(**asked))


@pytest.mark.parametrize("index", range(4))
def test_flex_on_a_cpu_refuses_any_input_that_requires_gradients(index):
    leaves = [*states_for(), torch.zeros(2)]
    leaves[index].requires_grad_()
    with pytest.raises(ValueError, match=r"^engine='flex' must support .*, got inputs that require gradients on cpu"):
        anchor_attention(*leaves[:3], LAYOUT, engine="flex", sinks=leaves[3])


def test_a_named_kernel_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(KERNELS["flash_attn_2"], "device_types", ("cpu",), raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
    with pytest.raises(ImportError, match=r"got a kernel that cannot be imported \(.*\); pip install 'flash-attn>="):
        choose_route("varlen/flash_attn_2", PLAIN)


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["reference", "varlen/gather"])
@pytest.mark.parametrize("features", [{}, {"sliding_window": 2}, {"softcap": 1.0}], ids=str)
def test_dropout_drops_weights_and_keeps_their_mean(engine, features):
    """Of values of one: each output is the share of weights that stayed, over the share that does."""
    query, key, value = states_for()
    torch.manual_seed(1)
    outs = torch.stack(
        [
            anchor_attention(query, key, torch.ones_like(value), LAYOUT, engine=engine, dropout=0.25, **features)
            for _ in range(600)
        ]
    )
    spread = outs.std(dim=0)

    assert spread.min() > 0.1
    assert ((outs.mean(dim=0) - 1).abs() < 6 * spread / 600**0.5).all()


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_without_meaning_is_refused(dropout):
    with pytest.raises(ValueError, match=rf"^dropout must lie in \[0, 1\), got {dropout}; pass 0.0 for no dropout\.$"):
        anchor_attention(*states_for(), LAYOUT, dropout=dropout)
