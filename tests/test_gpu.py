"""What has to hold on CUDA as on the CPU: the same bodies on both devices, so that a slip cannot hide where no GPU is.

Parity and gradients by route, no sync in a step, equal bits from call to call, and a wrapped model. What flex does from
batch to batch on CUDA stands in test_flex.py; each flash kernel by itself in test_kernels.py and test_merge.py.
"""

import contextlib
import itertools
import os

import pytest
import torch
from budget import assert_within_budget
from families import VOCAB_SIZE, tiny_model
from test_attention import out_and_gradients, plain

from anchor_attn import PackedLayout, anchor_attention, wrap
from anchor_attn.engines.choice import FORWARD_ONLY, ROUTES, absence, refusal
from anchor_attn.engines.kernels import create_kernel_plan
from anchor_attn.masks import PATTERNS, dense_mask
from anchor_attn.request import Call

# cuBLAS asks for it where torch is told to be deterministic, once, at its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

NAMES = ("out", "query", "key", "value", "sinks")
LAYOUT = PackedLayout.from_lengths([[61, 1, 67], [2, 3, 5, 7, 11], [97]], seq_len=133)
FEATURES = {
    "plain": {},
    "window": {"sliding_window": 20, "keep_anchor": False},
    "kept_anchor": {"sliding_window": 20},
    "softcap": {"softcap": 0.5},
    "sinks": {"sinks": True},
    "window+sinks": {"sliding_window": 20, "keep_anchor": False, "sinks": True},
}

FLEX_FEATURES = ("plain", "softcap", "window+sinks")  # the rest is in test_flex.py

both_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
# torch 2.13's compiler trips over torch's own deprecations when it is imported.
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def cases(patterns, features):
    """Every (device, route, pattern, features) that a route has; flex, which compiles for each, with the anchor only.

    What a machine lacks is skipped when the test runs. Flex on the CPU has no gradients, and is slow to compile.
    """
    for device, route, pattern, name in itertools.product(("cpu", "cuda"), ROUTES, patterns, features):
        if route.engine == "flex" and (pattern != "anchor" or name not in FLEX_FEATURES):
            continue
        settings = FEATURES[name]
        call = Call(
            torch.device(device), torch.bfloat16, 64, has_backward(route, device), pattern,
            window=settings.get("sliding_window"),
            keeps_anchor_outside=pattern == "anchor" and name == "kept_anchor",
            softcap=settings.get("softcap"),
            has_sinks="sinks" in settings,
        )  # fmt: skip
        if refusal(route, call) is not None or (device == "cpu" and absence(route, call) is not None):
            continue
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if route.engine == "flex":
            marks += [compiles, *([pytest.mark.slow] if device == "cpu" else [])]
        yield pytest.param(device, route, pattern, name, id=f"{device}-{route.name}-{pattern}-{name}", marks=marks)


def has_backward(route, device):
    return not (route.engine == "flex" and device in FORWARD_ONLY)


def every_case(patterns=("anchor",), features=("plain",)):
    return pytest.mark.parametrize(("device", "route", "pattern", "features"), list(cases(patterns, features)))


def on(device, layout=LAYOUT):
    """The layout on a device, or a skip where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return layout.to(device)


def states_on(device, layout, dtype=torch.bfloat16, heads=(4, 2), head_dim=64, sinks=False):
    """query, key, value, and sinks or None, the same for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(layout.batch_size, count, layout.seq_len, head_dim) for count in (heads[0], heads[1], heads[1])]
    states = [torch.randn(shape, generator=generator) for shape in shapes]
    learned = torch.randn(heads[0], generator=generator)
    return [part.to(device, dtype) for part in states] + [learned.to(device, dtype) if sinks else None]


def skip_if_absent(route, layout):
    """Skip with the kernel's own reason where it cannot be called here."""
    call = Call(layout.device, torch.bfloat16, 64, has_backward(route, layout.device.type), "anchor")
    if (reason := absence(route, call)) is not None:
        pytest.skip(f"{route.name} {reason}")


def attend_by(route, layout, pattern, **settings):
    """`anchor_attention` by a route, as a function of query, key, value and sinks."""

    def attend(query, key, value, sinks):
        return anchor_attention(query, key, value, layout, pattern, route.name, sinks=sinks, **settings)

    return attend


def results_of(attend, states, with_gradients):
    """The output, and gradients where the route has a backward."""
    if not with_gradients:
        with torch.no_grad():
            return (attend(*states),)
    weights = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(1)).to(states[0].device)
    return out_and_gradients(attend, states, weights)


@contextlib.contextmanager
def without_syncs(device):
    """On CUDA, every wait of the host for the device is an error."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def deterministic():
    """torch's deterministic mode, which is handed on to the flash kernels."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# --- routes ----------------------------------------------------------------------------------------------------------


@every_case(PATTERNS, FEATURES)
def test_every_route_is_within_the_budget_in_bfloat16(device, route, pattern, features):
    layout, settings = on(device), dict(FEATURES[features])
    skip_if_absent(route, layout)
    states = states_on(device, layout, sinks=settings.pop("sinks", False))
    with_gradients = has_backward(route, device)
    mask = dense_mask(layout, pattern, settings.get("sliding_window"), settings.get("keep_anchor", True))
    textbook = plain(layout, mask, softcap=settings.get("softcap"))
    in_float64 = [None if part is None else part.double() for part in states]

    ours = results_of(attend_by(route, layout, pattern, **settings), states, with_gradients)
    eager, oracle = (results_of(textbook, given, with_gradients) for given in (states, in_float64))
    for name, *results in zip(NAMES, ours, eager, oracle, strict=False):
        assert_within_budget(*results, factor=2 if name == "out" else 3, what=name)
    padding = layout.document_ids == -1
    for name, tensor in zip(NAMES[:4], ours, strict=False):
        assert not tensor.transpose(1, 2)[padding].any(), f"{name} is not exactly zero at padding"


@every_case()
def test_a_step_with_new_documents_does_not_wait_for_the_device(device, route, pattern, features):
    """The first call compiles, and may wait; each later one meets a layout of its own."""
    lengths = [[[61, 1, 67], [130]], [[40, 90], [3, 5, 7]], [[129], [1, 1, 1]]]
    layouts = [on(device, PackedLayout.from_lengths(rows, seq_len=133)) for rows in lengths]
    skip_if_absent(route, layouts[0])
    states = states_on(device, layouts[0])
    with_gradients = has_backward(route, device)
    leaves = [part.requires_grad_(with_gradients) for part in states[:3]]
    for number, layout in enumerate(layouts):
        with without_syncs(device) if number else contextlib.nullcontext():
            out = anchor_attention(*leaves, layout, pattern, route.name, **FEATURES[features])
            if with_gradients:
                out.sum().backward()

    assert out.isfinite().all()
    assert not with_gradients or all(part.grad.isfinite().all() for part in leaves)


# --- equal bits ------------------------------------------------------------------------------------------------------


@every_case(features=("plain", "kept_anchor", "sinks"))
def test_two_calls_are_equal_bit_for_bit(device, route, pattern, features):
    """Outputs and gradients; torch's deterministic mode is on, without which flash kernels add in any order."""
    layout, settings = on(device), dict(FEATURES[features])
    skip_if_absent(route, layout)
    states = states_on(device, layout, sinks=settings.pop("sinks", False))
    attend, with_gradients = attend_by(route, layout, pattern, **settings), has_backward(route, device)
    with deterministic():
        one, two = (results_of(attend, states, with_gradients) for _ in range(2))

    assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["gather", "merge"])
def test_on_a_cpu_two_calls_are_equal_bit_for_bit_without_being_asked(form, dtype):
    layout = PackedLayout.from_lengths([[300, 129, 127, 1], [557]], anchor_tokens=2, seq_len=600)
    states = states_on("cpu", layout, dtype)

    def attend(query, key, value, sinks):
        return anchor_attention(query, key, value, layout, engine=f"varlen/sdpa/{form}")

    one, two = (results_of(attend, states, True) for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))


@both_devices
def test_the_gradient_of_an_anchor_before_five_hundred_documents_has_the_same_bits_twice(device):
    """index_select's own backward adds on CUDA in the order in which threads come."""
    layout = on(device, PackedLayout.from_lengths([[1] * 501, [3] * 167]))
    plan = create_kernel_plan(layout, "anchor")
    states = states_on(device, layout)[1].requires_grad_()
    keys = plan.pack_keys(states)
    weights = torch.randn(keys.shape, generator=torch.Generator().manual_seed(1)).to(keys)
    one, two = (torch.autograd.grad(keys, states, weights, retain_graph=True)[0] for _ in range(2))

    assert one[:, :, 0].abs().min() > 0
    assert torch.equal(one, two)


# --- a wrapped model -------------------------------------------------------------------------------------------------


@both_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrapped_llama_gives_packed_documents_what_it_gives_each_behind_the_anchor(device, dtype):
    layout = on(device, PackedLayout.from_lengths([[9, 14, 5], [28]]))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCAB_SIZE, layout.document_ids.shape, generator=generator).to(device)
    plain_model = tiny_model("llama", dtype).to(device)
    exact_model = tiny_model("llama", torch.float64).to(device)
    exact_model.load_state_dict(plain_model.state_dict())
    exact, eager = (one_at_a_time(model, tokens, layout) for model in (exact_model, plain_model))
    with torch.no_grad():
        packed = wrap(plain_model)(input_ids=tokens, position_ids=layout.position_ids("reset"), document_ids=layout)

    real = layout.document_ids > 0
    assert_within_budget(packed.logits[real], eager[real], exact[real], what="logits")


def one_at_a_time(model, tokens, layout):
    """Logits [B, S, vocabulary] of each document alone behind its row's anchor; zeros elsewhere."""
    logits = torch.zeros(*tokens.shape, VOCAB_SIZE, dtype=model.dtype, device=tokens.device)
    for row, ids in enumerate(layout.document_ids.tolist()):
        for document in sorted(set(ids) - {0, -1}):
            places = [place for place, found in enumerate(ids) if found == document]
            with torch.no_grad():
                logits[row, places] = model(input_ids=tokens[row, [0, *places]][None]).logits[0, 1:]
    return logits
