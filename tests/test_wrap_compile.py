"""Wrapped models under torch.compile: equal to eager, and new documents compile nothing."""

import copy
import re

import pytest
import torch
from families import VOCAB_SIZE, tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig

from anchor_attn import PackedLayout, unwrap, wrap
from anchor_attn.engines import flex
from anchor_attn.hf import is_wrapped

# Both come from torch itself, and only where warnings are errors: it asks tensors between two graphs for a gradient,
# and importing Inductor defines a ScriptModule.
compiles = [
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]
pytestmark = compiles


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


def batch(seed, seq_len=24, as_tensor=False):
    """Two rows of random documents, with random padding: inputs of a training step."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(2):
        left, row = seq_len - 1 - seed % 3, []
        while left:
            row.append(min(left, int(torch.randint(1, 9, (), generator=generator))))
            left -= row[-1]
        rows.append(row)
    layout = PackedLayout.from_lengths(rows, seq_len=seq_len)
    tokens = torch.randint(3, VOCAB_SIZE, layout.document_ids.shape, generator=generator)
    return {
        "input_ids": tokens,
        "labels": tokens.masked_fill(layout.document_ids < 1, -100),
        "position_ids": layout.position_ids("continuous"),
        "document_ids": layout.document_ids if as_tensor else layout,
    }


def step(model, inputs):
    """Logits and gradients of one training step, by name."""
    out = model(**inputs)
    out.loss.backward()
    results = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": out.logits.detach()} | {name.removeprefix("_orig_mod."): grad for name, grad in results.items()}


def assert_same(ours, theirs, relative=1e-5):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        atol = relative * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# --- training and inference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "engine", "as_tensor"),
    [
        ("llama", "varlen", False),
        pytest.param("gemma2", "reference", True, marks=pytest.mark.slow),
        pytest.param("llama", "reference", True, marks=pytest.mark.slow),
        pytest.param("gemma2", "varlen", False, marks=pytest.mark.slow),
        pytest.param("qwen3", "varlen", True, marks=pytest.mark.slow),
        pytest.param("gpt_oss", "varlen", True, marks=pytest.mark.slow),
        pytest.param("gpt_oss", "reference", False, marks=pytest.mark.slow),
    ],
)
def test_twenty_batches_of_documents_train_as_in_eager_and_compile_nothing_after_the_second(family, engine, as_tensor):
    model = wrap(tiny_model(family, torch.float32), engine=engine).train()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(20):
        inputs = batch(seed, as_tensor=as_tensor)
        with torch._dynamo.config.patch(error_on_recompile=seed > 1):
            ours = step(compiled, inputs)
        assert_same(ours, step(model, inputs))
    assert counters["stats"]["unique_graphs"] >= 2 * model.config.num_hidden_layers


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_rows_of_any_length_compile_nothing_after_the_second(dynamic):
    model = wrap(tiny_model("llama", torch.float32)).train()
    compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic)
    for seed, seq_len in enumerate((20, 33, 47, 18, 64, 101, 9)):
        inputs = batch(seed, seq_len)
        with torch._dynamo.config.patch(error_on_recompile=seed > (0 if dynamic else 1)):
            ours = step(compiled, inputs)
        assert_same(ours, step(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_twelve_layers_share_their_graphs(family):
    """Else a deep model would pass torch's limit of recompilations, and run eagerly from there on."""
    layer_types = {"layer_types": ["sliding_attention", "full_attention"] * 6} if family == "gpt_oss" else {}
    graphs = []
    for layers in (2, 12):
        torch._dynamo.reset()
        counters.clear()
        types = {name: kinds[:layers] for name, kinds in layer_types.items()}
        model = wrap(tiny_model(family, torch.float32, num_hidden_layers=layers, **types)).train()
        step(torch.compile(model, backend="aot_eager"), batch(0))
        graphs.append(counters["stats"]["unique_graphs"])

    assert graphs[0] == graphs[1]


def test_graphs_break_at_the_documents_and_nowhere_else():
    model = wrap(tiny_model("llama", torch.float32)).train()
    step(torch.compile(model, backend="aot_eager"), batch(0))

    reasons = [re.search(r"\(reason: (anchor_attn \w+)", reason) for reason in counters["graph_break"]]
    assert {reason and reason[1] for reason in reasons} == {"anchor_attn checks", "anchor_attn attends"}


def test_asking_for_one_graph_says_why_there_is_none():
    model = wrap(tiny_model("llama", torch.float32))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="anchor_attn checks document_ids on the host"):
        compiled(**batch(0))


@pytest.mark.slow
def test_inductor_trains_as_eager_does():
    model = wrap(tiny_model("llama", torch.float32)).train()
    compiled = torch.compile(model)
    for seed in range(3):
        with torch._dynamo.config.patch(error_on_recompile=seed > 1):
            ours = step(compiled, batch(seed))
        assert_same(ours, step(model, batch(seed)), relative=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma2"))]
)
def test_without_document_ids_a_wrapped_model_is_one_graph_like_the_plain_one(family):
    plain = tiny_model(family, torch.float32, num_hidden_layers=2 if family == "gemma2" else 1)
    tokens, captured = batch(0)["input_ids"], []
    left_padded = torch.ones_like(tokens).index_fill(1, torch.tensor([0, 1]), 0)
    for model in (plain, wrap(copy.deepcopy(plain))):
        counters.clear()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for inputs in ({}, {"attention_mask": left_padded}):
            assert torch.equal(compiled(tokens, **inputs).logits, plain(tokens, **inputs).logits)
        captured.append((counters["stats"]["unique_graphs"], counters["stats"]["calls_captured"]))

    assert captured[0] == captured[1]


@torch.no_grad()
@pytest.mark.slow
def test_without_document_ids_a_model_whose_experts_break_its_graphs_is_not_compiled_anew():
    plain = tiny_model("gpt_oss", torch.float32)
    compiled = torch.compile(wrap(copy.deepcopy(plain)), backend="aot_eager")
    for seed in range(5):
        tokens = batch(seed)["input_ids"]
        with torch._dynamo.config.patch(error_on_recompile=seed > 1):
            assert torch.equal(compiled(tokens).logits, plain(tokens).logits)


@torch.no_grad()
def test_a_compiled_generation_over_a_static_cache_equals_the_plain_one():
    plain = tiny_model("llama", torch.float32)
    compile_config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True  # transformers compiles by itself on accelerators only
    one, two = (
        model.generate(
            batch(0)["input_ids"], max_new_tokens=5, min_new_tokens=5, do_sample=False, cache_implementation="static",
            compile_config=compile_config,
        )
        for model in (plain, wrap(copy.deepcopy(plain)))
    )  # fmt: skip

    assert counters["stats"]["unique_graphs"] >= 2
    assert torch.equal(one, two)


# --- compiled before it was wrapped ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("in_place", "called"),
    [
        pytest.param(False, False, id="torch.compile, not called yet", marks=pytest.mark.slow),
        pytest.param(False, True, id="torch.compile, called before"),
        pytest.param(True, False, id="model.compile, not called yet"),
        pytest.param(True, True, id="model.compile, called before", marks=pytest.mark.slow),
    ],
)
def test_a_model_may_be_wrapped_after_it_was_compiled(in_place, called):
    plain = tiny_model("llama", torch.float32, num_hidden_layers=1)
    inputs = batch(0)
    tokens, expected = inputs["input_ids"], wrap(copy.deepcopy(plain))(**inputs).logits
    model = copy.deepcopy(plain)
    if in_place:
        model.compile(backend="aot_eager")
    compiled = model if in_place else torch.compile(model, backend="aot_eager")
    if called:
        compiled(tokens)
    frames = counters["frames"]["total"]
    wrap(model)
    assert counters["frames"]["total"] == frames, "the proof was compiled"

    torch.testing.assert_close(compiled(**inputs).logits, expected)
    with pytest.raises(ValueError, match=r"^document_ids must be given to a wrapped LlamaForCausalLM"):
        compiled(tokens, labels=tokens)
    unwrap(model)
    torch.testing.assert_close(compiled(tokens).logits, plain(tokens).logits)
    assert compiled(tokens, labels=tokens).loss.isfinite()


def test_the_module_of_torch_compile_is_not_the_decoder():
    compiled = torch.compile(tiny_model("llama", torch.float32))
    message = (
        "model must be a transformers PreTrainedModel, got OptimizedModule; wrap the decoder itself, before or aft"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        wrap(compiled)
    assert not is_wrapped(compiled)


# --- flex ------------------------------------------------------------------------------------------------------------


def test_wrapping_with_flex_compiles_nothing(monkeypatch):
    monkeypatch.setattr(flex, "attend", lambda *args: pytest.fail("the proof ran the engine"))
    model = wrap(tiny_model("llama", torch.float32), engine="flex")

    assert is_wrapped(model)
    assert not counters["frames"]


def test_training_with_flex_on_a_cpu_raises_its_one_line():
    model = wrap(tiny_model("llama", torch.float32), engine="flex").train()
    message = "engine='flex' must support the call, got inputs that require gradients on cpu; "
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}pass .*engine='varlen'.*\.$"):
        model(**batch(0))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_a_model_wrapped_with_flex_equals_one_with_varlen_and_compiles_its_kernel_inside_a_compiled_model(family):
    model = tiny_model(family, torch.float32)
    expected = [wrap(model, engine="varlen")(**batch(seed)).logits for seed in range(4)]
    wrap(model, engine="flex")
    # Uncompiled, flex_attention warns, and warnings are errors.
    for run in (model, torch.compile(model, backend="aot_eager")):
        for seed in range(4):
            with torch._dynamo.config.patch(error_on_recompile=seed > 1):
                logits = run(**batch(seed)).logits
            torch.testing.assert_close(logits, expected[seed], rtol=0, atol=1e-4 * float(expected[seed].abs().max()))
