"""Every family: a wrapped model in a packed row computes what the plain model computes on each document by itself.

"By itself" is the unwrapped model on [anchor + document], with the same position ids and an attention_mask of ones
(without one, transformers takes a jump in position ids for packing).

Every family passes the first relation, and shows that its features would be missed; all relations are for the core, and
for the others in `make test-all` and `make support`.
"""

import copy
from functools import cache

import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, tiny_model
from support_matrix import FEATURES

from anchor_attn import PackedLayout, unwrap, wrap
from anchor_attn.attention import anchor_attention
from anchor_attn.hf import forward

LAYOUT = PackedLayout.from_lengths([[9, 6, 1, 11], [3, 17, 2]], seq_len=30)

# One of each kind: windows, softcaps, sinks, experts, latent attention, biases, and none of these.
CORE = (
    "cohere2", "deepseek_v3", "gemma2", "gemma3_text", "gpt_neox", "gpt_oss", "llama", "mistral", "olmo2", "phi3",
    "qwen2", "qwen3_moe",
)  # fmt: skip


def core_first(families=tuple(FAMILIES)):
    """All of these families, those beyond the core as slow tests."""
    slow = {name: () if name in CORE else pytest.mark.slow for name in families}
    return pytest.mark.parametrize("family", [pytest.param(name, marks=mark) for name, mark in slow.items()])


every_family = pytest.mark.parametrize("family", FAMILIES)


def tolerance(family):
    """How far apart two ways of computing the same logits may be, relative to the largest."""
    return 2e-6 if FAMILIES[family].float32 else 1e-10


def random_tokens(layout=LAYOUT):
    """Tokens [B, S]; the anchor is token 1 in every row."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCAB_SIZE, (layout.batch_size, layout.seq_len), generator=generator)
    return tokens.masked_fill(layout.document_ids == 0, 1)


@cache
def weights_of_logits():
    """One fixed number a logit, 0 at padding: what the logits are summed with before backward."""
    weights = torch.randn(*LAYOUT.document_ids.shape, VOCAB_SIZE, generator=torch.Generator().manual_seed(4))
    return weights.double().masked_fill((LAYOUT.document_ids == -1)[..., None], 0)


def parts_by_themselves(pattern):
    """Per part that may attend to itself only: its row, its slots, and the slots whose logits it stands for."""
    for row, (ids, lengths) in enumerate(zip(LAYOUT.document_ids, LAYOUT.document_lengths, strict=True)):
        if pattern == "full":
            yield row, ids >= 0, ids >= 0
            continue
        yield row, ids == 0, ids == 0
        for document_id in range(1, len(lengths) + 1):
            own = ids == document_id
            yield row, (own | (ids == 0) if pattern == "anchor" else own), own


@cache
def alone(family, pattern, policy):
    """Logits of the plain model, a part at a time and put together as in the packed row, and parameter gradients."""
    model = tiny_model(family)
    tokens, positions = random_tokens(), LAYOUT.position_ids(policy)
    logits = torch.zeros(*tokens.shape, VOCAB_SIZE, dtype=torch.float64)
    for row, slots, stands_for in parts_by_themselves(pattern):
        out = model(
            input_ids=tokens[row, slots][None],
            position_ids=positions[row, slots][None],
            attention_mask=torch.ones(1, int(slots.sum()), dtype=torch.long),
        ).logits[0, stands_for[slots]]
        (out * weights_of_logits()[row, stands_for]).sum().backward()
        logits[row, stands_for] = out.detach().double()
    return logits, gradients_of(model)


def gradients_of(model):
    """Parameter gradients by name; experts that no token chose have none."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def packed(model, policy="continuous", **arguments):
    """Logits of a wrapped model on the packed batch."""
    return model(
        input_ids=random_tokens(), position_ids=LAYOUT.position_ids(policy), document_ids=LAYOUT, **arguments
    ).logits


def enable_checkpointing(model):
    """`gradient_checkpointing_enable`, by the name that this transformers does not warn about."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def assert_same_gradients(ours, theirs, relative):
    """All gradients, measured by the largest of each tensor."""
    assert theirs
    for name in ours.keys() | theirs.keys():
        one, two = (grads.get(name, torch.zeros(())) for grads in (ours, theirs))
        largest = two.abs().max()
        torch.testing.assert_close(
            one, two.expand_as(one), rtol=0, atol=float(relative * largest) + 1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_packed_equals_alone(family, pattern, engine, policy):
    """Logits and all parameter gradients of a packed batch, against each document by itself."""
    model = wrap(tiny_model(family), pattern, engine)
    logits = packed(model, policy)
    (logits * weights_of_logits()).sum().backward()
    expected, expected_gradients = alone(family, pattern, policy)
    real = LAYOUT.document_ids >= 0

    torch.testing.assert_close(
        logits[real], expected[real], rtol=0, atol=tolerance(family) * float(expected.abs().max())
    )
    # Norms that go through float32 round each document's gradient before the sum.
    assert_same_gradients(gradients_of(model), expected_gradients, 2e-5 if FAMILIES[family].float32 else 1e-6)


@pytest.mark.supports("packed = alone")
@every_family
def test_a_packed_row_equals_each_document_by_itself(family):
    assert_packed_equals_alone(family, "anchor", "varlen", "continuous")


@core_first()
@pytest.mark.parametrize(
    ("pattern", "engine", "policy"),
    [
        ("anchor", "reference", "continuous"),
        ("anchor", "reference", "reset"),
        ("anchor", "varlen", "reset"),
        ("intra_doc", "varlen", "reset"),
        ("full", "varlen", "continuous"),
    ],
)
def test_so_it_does_under_other_patterns_engines_and_positions(family, pattern, engine, policy):
    assert_packed_equals_alone(family, pattern, engine, policy)


@pytest.mark.parametrize(
    ("family", "feature"),
    [
        pytest.param(name, feature, marks=pytest.mark.supports(FEATURES[feature]) if feature in FEATURES else ())
        for name, family in FAMILIES.items()
        for feature in family.bites
    ],
)
def test_the_family_test_would_see_a_lost_feature(monkeypatch, family, feature):
    """The same model and rows as above: without the feature the logits are far outside the tolerance."""
    model = wrap(tiny_model(family), "anchor", "reference")
    given = []

    def without(*args, **kwargs):
        given.append(kwargs.pop(feature))
        return anchor_attention(*args, **kwargs)

    monkeypatch.setattr(forward, "anchor_attention", without)
    expected, _ = alone(family, "anchor", "continuous")
    real = LAYOUT.document_ids >= 0
    moved = (packed(model)[real] - expected[real]).abs().max()

    assert any(value is not None for value in given)
    assert moved > 1e-2 * expected.abs().max() > 1000 * tolerance(family) * expected.abs().max()


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if "sliding_window" in family.bites])
def test_the_family_test_would_see_an_anchor_kept_outside_the_window(monkeypatch, family):
    model = wrap(tiny_model(family), "anchor", "reference")
    monkeypatch.setattr(forward, "anchor_attention", lambda *a, **k: anchor_attention(*a, **{**k, "keep_anchor": True}))
    expected, _ = alone(family, "anchor", "continuous")
    real = LAYOUT.document_ids >= 0

    assert (packed(model)[real] - expected[real]).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.supports("unequal heads")
@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.unequal_heads])
def test_values_of_another_size_than_queries_reach_the_engine_as_they_are(monkeypatch, family):
    """With the first relation: packed equals alone, on heads of these sizes."""
    model = wrap(tiny_model(family), "anchor", "varlen")
    sizes = set()

    def noting(query, key, value, *args, **kwargs):
        sizes.add((query.shape[-1], value.shape[-1]))
        return anchor_attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(forward, "anchor_attention", noting)
    packed(model)

    assert any(of_query != of_value for of_query, of_value in sizes)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.without])
@torch.no_grad()
def test_what_the_model_itself_does_to_positions_and_scores_bites_too(family):
    """The same weights with the option off: the packed logits would be far outside the tolerance."""
    expected, _ = alone(family, "anchor", "continuous")
    real = LAYOUT.document_ids >= 0
    moved = packed(wrap(tiny_model(family, **FAMILIES[family].without)))[real] - expected[real]

    assert moved.abs().max() > 1e-2 * expected.abs().max()


@core_first()
def test_the_families_lose_their_equality_under_another_pattern(family):
    """Nothing of the above is vacuous: anchors and other documents bite in every family."""
    expected, _ = alone(family, "anchor", "continuous")
    real = LAYOUT.document_ids >= 0
    for pattern in ("full", "intra_doc"):
        logits = packed(wrap(tiny_model(family), pattern))
        assert (logits[real] - expected[real]).abs().max() > 1e-2 * expected.abs().max()


# --- without document_ids --------------------------------------------------------------------------------------------


@core_first()
@torch.no_grad()
def test_without_document_ids_outputs_equal_the_plain_model_bit_for_bit(family):
    plain = tiny_model(family, torch.float32)
    wrapped = wrap(copy.deepcopy(plain))
    tokens = random_tokens()
    left_padded = torch.ones_like(tokens)
    left_padded[1, :5] = 0
    for inputs in ({}, {"attention_mask": left_padded}, {"attention_mask": left_padded.flip(1)}, {"use_cache": False}):
        one, two = (model(input_ids=tokens, **inputs).logits for model in (plain, wrapped))
        # Left padding makes rows of NaN in some families, wrapped or not.
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.supports("generate")
@core_first()
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_generation_equals_the_plain_models(family, cache_implementation):
    plain = tiny_model(family, torch.float32)
    wrapped = wrap(copy.deepcopy(plain))
    tokens = random_tokens()[:, :9]
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    one, two = (
        model.generate(
            tokens, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False,
            cache_implementation=cache_implementation, output_logits=True, return_dict_in_generate=True,
        )
        for model in (plain, wrapped)
    )  # fmt: skip

    assert one.sequences.shape == (2, 15)
    assert torch.equal(one.sequences, two.sequences)
    torch.testing.assert_close(one.logits, two.logits, rtol=0, atol=0, equal_nan=True)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.supports("checkpointing")
@core_first([name for name, family in FAMILIES.items() if family.checkpoints])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(family):
    results = []
    for checkpointing in (False, True):
        model = wrap(tiny_model(family)).train()
        if checkpointing:
            enable_checkpointing(model)
        loss = (packed(model, use_cache=False) * weights_of_logits()).sum()
        loss.backward()
        results.append((loss.detach(), gradients_of(model)))
    (one, gradients), (two, checkpointed) = results

    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    assert_same_gradients(checkpointed, gradients, 1e-10)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.checkpoints])
def test_families_without_a_checkpointing_test_have_no_checkpointing_of_their_own(family):
    with pytest.raises(ValueError, match="does not support"):
        enable_checkpointing(tiny_model(family))


@core_first()
def test_unwrapping_restores_outputs_and_implementation(family):
    plain = tiny_model(family)
    model = unwrap(wrap(copy.deepcopy(plain)))
    tokens = random_tokens()

    assert model.config._attn_implementation == plain.config._attn_implementation
    assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
