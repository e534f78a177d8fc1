"""`generate` of a wrapped model: what the plain model generates, bit for bit."""

import copy

import pytest
import torch
from families import VOCAB_SIZE, tiny_model
from transformers import PreTrainedTokenizerFast, StaticCache, TextGenerationPipeline

from anchor_attn import PackedLayout, unwrap, wrap

FAMILIES = ["llama", "qwen3", "gemma2", "gpt_oss"]
PROMPTS = torch.randint(3, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
LEFT_PADDED = torch.ones_like(PROMPTS)
LEFT_PADDED[1, :3] = 0
ONE = {"inputs": PROMPTS[:1], "attention_mask": torch.ones_like(PROMPTS[:1])}  # speculation takes no batch

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "static cache and beams": {"do_sample": False, "num_beams": 2, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2, **ONE},
}


def generated(model, **how):
    """Tokens and logits of eight more tokens, from one seed."""
    torch.manual_seed(0)
    out = model.generate(
        **{"inputs": PROMPTS, "attention_mask": LEFT_PADDED, **how}, max_new_tokens=8, min_new_tokens=8,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def assert_same(ours, theirs):
    assert ours[0].shape[1] == PROMPTS.shape[1] + 8
    assert torch.equal(ours[0], theirs[0])
    # Left padding makes rows of NaN in some families, wrapped or not.
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapped_model_generates_what_the_plain_one_does(family, way):
    plain = tiny_model(family, torch.float32)

    assert_same(generated(wrap(copy.deepcopy(plain)), **WAYS[way]), generated(plain, **WAYS[way]))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_models_of_assisted_generation_may_be_wrapped(family):
    plain, assistant = tiny_model(family, torch.float32), tiny_model(family, torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 50)
    expected = generated(plain, **ONE, do_sample=False, assistant_model=assistant)
    for model, other in ((True, False), (False, True), (True, True)):
        models = [wrap(copy.deepcopy(m)) if wrapped else m for m, wrapped in ((plain, model), (assistant, other))]
        assert_same(generated(models[0], **ONE, do_sample=False, assistant_model=models[1]), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_given_to_the_model_itself_counts_on_without_moving_the_masks(family):
    """It counts its tokens in place, before a layer asks for the mask of the forward."""
    plain = tiny_model(family, torch.float32)
    answers = []
    for model in (plain, wrap(copy.deepcopy(plain))):
        cache = StaticCache(config=model.config, max_cache_len=12)
        answers.append([model(part, past_key_values=cache).logits for part in PROMPTS.split([4, 1, 4], dim=1)])

    for expected, ours in zip(*answers, strict=True):
        assert torch.equal(ours, expected)


def test_generation_stays_the_same_after_training_steps_and_after_unwrapping():
    """Caches, masks and settings of a packed forward leave nothing behind."""
    plain = tiny_model("gemma2", torch.float32)
    expected = generated(plain)
    model = wrap(copy.deepcopy(plain))
    layout = PackedLayout.from_lengths([[5, 3], [8]])
    model.train()(input_ids=PROMPTS, labels=PROMPTS, document_ids=layout).loss.backward()

    assert_same(generated(model.eval()), expected)
    assert_same(generated(unwrap(model)), expected)


def test_a_training_model_does_not_generate_without_documents():
    model = wrap(tiny_model("llama", torch.float32)).train()
    with pytest.raises(ValueError, match=r"^document_ids must be given to a wrapped LlamaForCausalLM that trains"):
        generated(model)


def test_a_text_generation_pipeline_answers_as_with_the_plain_model():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", padding_side="left")
    plain = tiny_model("llama", torch.float32)
    one, two = (
        TextGenerationPipeline(model=model, tokenizer=fast)(
            ["w5 w9 w30", "w7"], batch_size=2, do_sample=False, max_new_tokens=6, min_new_tokens=6
        )
        for model in (plain, wrap(copy.deepcopy(plain)))
    )

    assert one == two
    assert [answer[0]["generated_text"].count("w") for answer in one] == [3 + 6, 1 + 6]
