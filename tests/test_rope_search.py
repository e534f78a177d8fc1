"""LongRoPE's search: never worse than its starts, the same after a kill, and what `extend` then makes of its result."""

import copy
import json
import math
from collections import Counter
from itertools import pairwise, product
from random import Random

import pytest
import torch
from families import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from anchor_attn import wrap
from anchor_attn.rope import extend
from anchor_attn.rope.search import loop, search_factors
from anchor_attn.rope.search.evolution import N_HATS, Evolution, Individual, Space, cross, mutate
from anchor_attn.rope.search.files import SearchResult
from anchor_attn.rope.search.fitness import TrialTables, on_trial, perplexity, plant_needles
from anchor_attn.rope.search.inputs import hash_model
from anchor_attn.rope.search.progressive import PROGRESSIVE, Leg
from anchor_attn.rope.search.setup import rotaries_to_extend

LENGTH, FACTOR, VOCAB = 32, 4, 40
SPACE = Space(largest=20.0, step=0.01, n_hats=N_HATS, attention_factors=(1.0, 1.2))
SMALL = {"population": 10, "mutations": 3, "crossovers": 3, "rounds": 3, "parents": 4}


def tiny_llama(**changes):
    """Weights large enough that positions matter: of a fresh model all perplexities agree to four digits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, initializer_range=0.3, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def sequences():
    return torch.randint(0, VOCAB, (2, LENGTH * FACTOR + 9), generator=torch.Generator().manual_seed(1))


def random_individual(random, pairs=8):
    return Individual(tuple(sorted(SPACE.at(random.randrange(1901)) for _ in range(pairs))), random.choice(N_HATS))


def perplexity_of(model, sequences, length):
    model = model.eval()
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss for row in sequences[:, :length]]
    return float(torch.stack(losses).double().mean().exp())


# --- children --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.05, 0.3, 1.0])
def test_mutants_never_fall_and_stay_on_the_grid_and_in_reach(probability):
    random = Random(0)
    for _ in range(300):
        child = mutate(random_individual(random), SPACE, probability, random)
        assert list(child.factors) == sorted(child.factors)
        assert child.factors[0] >= 1.0
        assert child.factors[-1] <= SPACE.largest
        assert all(value == round(value, 2) for value in child.factors)
        assert child.n_hat in SPACE.n_hats
        assert child.attention_factor in SPACE.attention_factors


def test_a_mutation_draws_a_gene_anew_with_its_probability():
    """Of 16 pairs far apart, so that a new draw is seldom the old one."""
    random, parent = Random(0), Individual(tuple(1.0 + i for i in range(16)), n_hat=0, attention_factor=1.0)
    changed = Counter()
    for _ in range(2_000):
        child = mutate(parent, SPACE, 0.3, random)
        changed["factors"] += sum(a != b for a, b in zip(parent.factors, child.factors, strict=True))
        changed["n_hat"] += child.n_hat != 0
        changed["attention_factor"] += child.attention_factor != 1.0

    assert changed["factors"] / (16 * 2_000) == pytest.approx(0.3, abs=0.01)
    assert changed["n_hat"] / 2_000 == pytest.approx(0.3 * 13 / 14, abs=0.03)
    assert changed["attention_factor"] / 2_000 == pytest.approx(0.3 / 2, abs=0.03)


def test_a_gene_that_is_drawn_anew_reaches_both_neighbours_and_the_ends_of_the_space():
    random = Random(0)
    parent, space = Individual((1.0, 1.02, 1.03)), Space(1.05, 0.01, (0,), (1.0,))
    children = [mutate(parent, space, 0.5, random).factors for _ in range(4_000)]
    only_the_middle = {child[1] for child in children if (child[0], child[2]) == (1.0, 1.03)}

    assert only_the_middle >= {1.0, 1.01, 1.02, 1.03}
    assert {child[2] for child in children} == {1.0, 1.01, 1.02, 1.03, 1.04, 1.05}


def test_mutants_of_a_start_off_the_grid_never_fall():
    random = Random(0)
    parent = Individual((1.0, 1.013, 1.0130001, 1.07 + 1e-9, 1.0700001, 4.0))
    for _ in range(2_000):
        factors = mutate(parent, Space(5.0, 0.01, (0,), (1.0,)), 0.4, random).factors
        assert list(factors) == sorted(factors)


def test_every_mixture_of_two_parents_that_does_not_fall_is_equally_likely():
    random = Random(0)
    one, two = Individual((1.0, 1.0, 3.0, 4.0)), Individual((2.0, 2.0, 2.5, 5.0))
    expected = [genes for genes in product(*zip(one.factors, two.factors, strict=True)) if sorted(genes) == [*genes]]
    drawn = Counter(cross(one, two, random).factors for _ in range(1_000 * len(expected)))

    assert set(drawn) == set(expected)
    assert all(count == pytest.approx(1_000, rel=0.15) for count in drawn.values())


def test_a_child_of_two_takes_each_other_gene_from_one_of_them():
    random = Random(0)
    one, two = Individual((1.0,), 4, 1.0), Individual((2.0,), 8, 1.2)
    children = {cross(one, two, random) for _ in range(200)}

    assert {(child.n_hat, child.attention_factor) for child in children} == {(4, 1.0), (4, 1.2), (8, 1.0), (8, 1.2)}


def test_parents_of_128_pairs_have_more_mixtures_than_a_float_counts_and_still_cross():
    random = Random(0)
    one, two = (Individual(tuple(float(i + shift) for i in range(128))) for shift in (1, 1.5))
    shares = [sum(gene in two.factors for gene in cross(one, two, random).factors) / 128 for _ in range(300)]

    assert sum(shares) / 300 == pytest.approx(0.5, abs=0.02)


def test_no_child_was_seen_before_and_a_small_space_ends():
    space, random = Space(1.01, 0.01, (0,), (1.0,)), Random(0)
    evolution = Evolution(population=10, mutations=4, crossovers=4, parents=4)
    population = evolution.first_population([Individual((1.0, 1.0))], space, random)

    assert sorted(one.factors for one in population) == [(1.0, 1.0), (1.0, 1.01), (1.01, 1.01)]
    assert evolution.next_generation(population, set(population), space, random) == []


# --- fitness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "cohere2", "gpt_oss", "deepseek_v2", "gemma3_text"])
@pytest.mark.parametrize("n_hat", [0, 3])
def test_an_individual_on_trial_is_what_extend_makes_of_it(family, n_hat):
    """Bit for bit but for complex tables, which are scaled in another order; layers of other kinds are left alone."""
    model = tiny_model(family, torch.float32).eval()
    if family == "gpt_oss":
        extend(model, "default")  # published with YaRN
    rotaries = rotaries_to_extend(model, ("full_attention",), 16)
    pairs = rotaries[0][1].rotary_dim // 2
    individual = Individual(tuple(1.0 + i / 3 for i in range(pairs)), n_hat, 1.1)
    tokens = torch.arange(1, 41)[None]
    before = model(input_ids=tokens).logits
    tables = TrialTables(rotaries, 4.0)
    tables.try_on(individual)
    with on_trial(model, tables):
        tried = model(input_ids=tokens).logits
    after = model(input_ids=tokens).logits
    extend(model, "longrope", 4.0, original_len=16, factors=individual.factors, n_hat=n_hat, attention_factor=1.1)

    tolerance = 1e-5 if family == "deepseek_v2" else 0.0
    torch.testing.assert_close(tried, model(input_ids=tokens).logits, rtol=tolerance, atol=tolerance)
    assert torch.equal(before, after)
    assert not torch.equal(before, tried)


def test_a_wrapped_models_packed_forwards_keep_their_precision_on_trial():
    """And its plain forwards compute as they did before, in bfloat16."""
    model = wrap(tiny_llama().to(torch.bfloat16), rope_precision="exact").eval()
    tables = TrialTables(rotaries_to_extend(model, ("full_attention",), None), 4.0)
    tables.try_on(Individual(tuple(1.0 + i for i in range(8)), 3))
    tokens, dtypes = torch.arange(40)[None], []
    with on_trial(model, tables):
        model.model.rotary_emb.register_forward_hook(lambda module, args, output: dtypes.append(output[0].dtype))
        model(input_ids=tokens)
        model(input_ids=tokens, document_ids=torch.tensor([[0] + [1] * 39]))

    assert dtypes == [torch.bfloat16, torch.float32]


def test_a_trial_leaves_modes_as_they_were_even_when_it_fails(model):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tables = TrialTables(rotaries_to_extend(model, ("full_attention",), None), 4.0)
    tried = []

    def fail():
        tried.extend([module.training for module in model.modules()] + [torch.is_grad_enabled()])
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"), on_trial(model, tables):
        fail()

    assert tried
    assert not any(tried)
    assert [module.training for module in model.modules()] == modes
    assert not model.model.rotary_emb._forward_hooks


@pytest.mark.parametrize("length", [2, 127, 1_025, 2_050])
def test_perplexity_is_that_of_the_models_own_loss(model, length):
    rows = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        assert perplexity(model.eval(), rows) == pytest.approx(perplexity_of(model, rows, length), rel=1e-5)


def test_perplexity_of_scored_tokens_is_theirs_alone_whatever_the_models_forward_takes(model, sequences):
    scored = [torch.arange(len(sequences[0])) % 7 == 3] * 2
    with torch.no_grad():
        model.eval()
        logits = model(input_ids=sequences).logits.double().log_softmax(-1)
        labels, asked = sequences[:, 1:], torch.stack(scored)[:, 1:]
        expected = float((-logits[:, :-1].gather(-1, labels[..., None])[..., 0])[asked].mean().exp())
        given = perplexity(model, sequences, scored)
        forward = model.forward
        model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
        without_choice = perplexity(model, sequences, scored)

    assert given == pytest.approx(expected, rel=1e-5)
    assert without_choice == pytest.approx(expected, rel=1e-5)


def test_a_perplexity_that_overflows_is_infinite(model, sequences):
    model.lm_head.weight.data *= 1e6
    with torch.no_grad():
        assert perplexity(model.eval(), sequences) == math.inf


def test_needles_are_found_again_at_the_end_and_only_their_values_are_scored(sequences):
    planted, scored = plant_needles(sequences, seed=0, needles=3, key_tokens=4, value_tokens=5)
    for tokens, mask, original in zip(planted, scored, sequences, strict=True):
        hay = len(tokens) - 27
        assert len(tokens) == len(original)
        assert int(mask.sum()) == 15
        assert not mask[:hay].any()
        text = tokens.tolist()
        depths = []
        for i in range(3):
            ask = hay + 9 * i
            assert mask[ask : ask + 9].tolist() == [False] * 4 + [True] * 5
            (place,) = [at for at in range(hay - 8) if text[at : at + 9] == text[ask : ask + 9]]
            depths.append(place * 3 // hay)
        assert sorted(depths) == [0, 1, 2]
        changed = {i for i in range(hay) if text[i] != int(original[i])}
        assert len(changed) <= 27


def test_needles_follow_their_seed(sequences):
    one, two, three = (torch.stack(plant_needles(sequences, seed)[0]) for seed in (0, 0, 1))

    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_needles_refuse_a_haystack_that_is_too_short_or_of_one_word():
    with pytest.raises(ValueError, match=r"sequences must have at least 96 tokens for 4 needles of 12, got 95"):
        plant_needles([torch.arange(95)], 0)
    with pytest.raises(ValueError, match="tokens enough for 4 keys of 4, got 1 different"):
        plant_needles([torch.zeros(96, dtype=torch.long)], 0)


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rounds", [0, 3])
def test_the_result_is_at_least_as_good_as_pi_ntk_and_yarn_through_extend(model, sequences, seed, rounds, tmp_path):
    """Each through its own `extend`, with its own attention factor, and the result through its file."""
    result = search_factors(model, sequences, FACTOR, seed=seed, **{**SMALL, "rounds": rounds})
    result.write(tmp_path / "factors.json")
    reached = {}
    for method in ("linear", "ntk", "yarn"):
        extended = extend(copy.deepcopy(model), method, FACTOR)
        reached[method] = perplexity_of(extended, sequences, LENGTH * FACTOR)
        assert result.fitness_of[method] == pytest.approx(reached[method], rel=1e-4)
    extended = extend(copy.deepcopy(model), "longrope", factors=tmp_path / "factors.json")
    ours = perplexity_of(extended, sequences, LENGTH * FACTOR)

    assert result.fitness == pytest.approx(ours, rel=1e-5)
    assert result.fitness <= min(result.fitness_of.values())
    assert ours <= min(reached.values()) * (1 + 1e-4)
    assert len(set(result.fitness_of.values())) == 3


def test_evolution_finds_better_ones_than_its_first_population(model, sequences):
    result = search_factors(model, sequences, FACTOR, **{**SMALL, "rounds": 8})
    best = [record["fitness"] for record in result.records]

    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]
    grown = [record["evaluated"] for record in result.records]
    assert grown[:3] == [10, 16, 22]  # later so few parents may have no new mixture left
    assert all(3 <= after - before <= 6 for before, after in pairwise(grown))


def test_the_start_of_every_method_is_that_method_to_a_float32_rounding(model, sequences):
    more = ("ntk_by_parts", "yarn_paper", "llama3")
    result = search_factors(model, sequences, FACTOR, extra_starts=more, **{**SMALL, "rounds": 0})
    assert set(result.fitness_of) == {"linear", "ntk", "yarn", *more}
    for method, fitness in result.fitness_of.items():
        extended = extend(copy.deepcopy(model), method, FACTOR)
        assert fitness == pytest.approx(perplexity_of(extended, sequences, LENGTH * FACTOR), rel=1e-4)
    starts = result.meta["long"]["starts"]
    assert starts["linear"]["factors"] == (4.0,) * 8
    assert starts["yarn"]["attention_factor"] == pytest.approx(0.1 * math.log(4) + 1)


def test_a_search_leaves_the_model_as_it_was_and_no_individual_is_evaluated_twice(model, sequences):
    model.train()
    config, weights = model.config.to_dict(), copy.deepcopy(model.state_dict())
    seen = []

    def fitness(model, sequences):
        seen.append(tuple(model.model.rotary_emb(torch.zeros(1), torch.arange(60)[None])[0].flatten().tolist()))
        return len(seen)

    search_factors(model, sequences, FACTOR, fitness=fitness, **SMALL)

    assert len(seen) == 10 + 3 * 6
    assert len(set(seen)) == len(seen)
    assert model.training
    assert model.config.to_dict() == config
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert not model.model.rotary_emb._forward_hooks


def test_two_searches_of_a_seed_are_equal_and_of_two_seeds_are_not(model, sequences):
    one, two, three = (search_factors(model, sequences, FACTOR, seed=seed, **SMALL) for seed in (0, 0, 1))

    assert one == two
    assert one.factors != three.factors


def test_a_fixed_attention_factor_and_no_n_hat_hold_for_all_individuals(model, sequences):
    tried = set()

    def fitness(model, sequences):
        (tables,) = model.model.rotary_emb._forward_hooks.values()
        tried.add((*tables._starts, *(factor for _, factor in tables._frequencies.values())))
        return 1.0

    search_factors(model, sequences, FACTOR, fitness=fitness, n_hats=(0,), attention_factor=1.05, **SMALL)

    assert tried == {(1.05,)}


def test_needle_fitness_is_the_perplexity_of_the_needles(model, sequences):
    rows = sequences[:, : LENGTH * FACTOR]
    result = search_factors(model, rows, FACTOR, fitness="needle", seed=3, **{**SMALL, "rounds": 1})
    planted, scored = plant_needles(rows, 3)
    extended = extend(copy.deepcopy(model), "ntk", FACTOR).eval()
    with torch.no_grad():
        assert result.fitness_of["ntk"] == pytest.approx(perplexity(extended, planted, scored), rel=1e-4)


def test_a_shorter_target_reads_only_so_many_tokens(model, sequences):
    lengths = []

    def fitness(model, sequences):
        lengths.extend(len(tokens) for tokens in sequences)
        return 1.0

    search_factors(model, sequences, FACTOR, target_len=70, fitness=fitness, **{**SMALL, "rounds": 0})

    assert set(lengths) == {70}


def test_a_model_that_is_extended_already_starts_from_its_present_factors_too(model, sequences):
    present = [1.0, 1.0, 1.2, 1.5, 1.7, 1.9, 2.0, 2.0]
    extend(model, "longrope", 2.0, factors=present, n_hat=2, attention_factor=1.1)
    now = perplexity_of(model, sequences, LENGTH * FACTOR)
    result = search_factors(model, sequences, FACTOR, **{**SMALL, "rounds": 0})
    starts = result.meta["long"]["starts"]

    assert result.fitness_of["present"] == pytest.approx(now, rel=1e-5)
    assert starts["present"]["n_hat"] == 2
    assert starts["interpolated"]["factors"] == pytest.approx([2 * value for value in present])
    assert result.original_max_position_embeddings == LENGTH


# --- short inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_hat", [0, 4])
def test_the_set_for_short_inputs_is_no_worse_than_none_and_than_the_long_one(model, sequences, n_hat, tmp_path):
    long = search_factors(model, sequences, FACTOR, n_hats=(n_hat,), **SMALL)
    both = search_factors(model, sequences, FACTOR, short_of=long, **SMALL)
    both.write(tmp_path / "factors.json")
    extended = extend(copy.deepcopy(model), "longrope", factors=tmp_path / "factors.json")

    assert both.short_fitness <= min(both.short_fitness_of.values())
    assert both.short_fitness == pytest.approx(perplexity_of(extended, sequences, LENGTH), rel=1e-5)
    assert both.fitness == pytest.approx(perplexity_of(extended, sequences, LENGTH * FACTOR), rel=1e-5)
    assert both.short_fitness_of["default"] == pytest.approx(
        perplexity_of(
            extend(
                copy.deepcopy(model), "longrope", FACTOR, factors=long.factors, short_factors=[1.0] * 8,
                n_hat=long.n_hat, attention_factor=long.attention_factor,
            ), sequences, LENGTH,
        ), rel=1e-5,
    )  # fmt: skip
    assert (both.factors, both.n_hat, both.attention_factor) == (long.factors, long.n_hat, long.attention_factor)
    assert [record["at"] for record in both.records] == ["long"] * 4 + ["short"] * 4


def test_short_factors_that_are_the_long_ones_have_their_n_hat_as_extend_has_it(model, sequences):
    long = search_factors(model, sequences, FACTOR, **{**SMALL, "rounds": 0})
    long = SearchResult(**{**vars(long), "n_hat": 8, "factors": (1.0, 1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0)})
    short = search_factors(model, sequences, FACTOR, short_of=long, **{**SMALL, "population": 2, "rounds": 0})
    extended = extend(model, "longrope", FACTOR, factors=long.factors, n_hat=8, attention_factor=long.attention_factor)

    assert short.short_fitness_of["long"] == pytest.approx(perplexity_of(extended, sequences, LENGTH), rel=1e-5)


# --- resuming --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a kill: nothing catches it."""


def killing(after):
    """The perplexity, and a kill at one evaluation."""
    calls = []

    def fitness(model, sequences):
        calls.append(1)
        if len(calls) == after:
            raise Killed
        return perplexity(model, sequences)

    return fitness, calls


@pytest.mark.parametrize("after", [1, 10, 11, 17, 28])
@pytest.mark.parametrize("save_every_s", [0.0, 1e9])
def test_a_search_goes_on_after_a_kill_to_the_same_result_and_the_same_state(
    model, sequences, after, save_every_s, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "SAVE_EVERY_S", save_every_s)
    options = {**SMALL, "checkpoint": tmp_path / "state.json"}
    whole, calls = killing(after=0)
    expected = search_factors(model, sequences, FACTOR, fitness=whole, **{**options, "checkpoint": tmp_path / "whole"})
    fitness, _ = killing(after)
    with pytest.raises(Killed):
        search_factors(model, sequences, FACTOR, fitness=fitness, **options)
    rest, more = killing(after=0)
    resumed = search_factors(model, sequences, FACTOR, fitness=rest, **options)

    assert resumed == expected
    assert (tmp_path / "state.json").read_bytes() == (tmp_path / "whole").read_bytes()
    if save_every_s == 0:
        assert len(more) == len(calls) - (after - 1)


def test_a_search_that_is_over_goes_on_with_more_rounds_to_the_same_result(model, sequences, tmp_path):
    options = {**SMALL, "checkpoint": tmp_path / "state.json"}
    search_factors(model, sequences, FACTOR, **{**options, "rounds": 1})
    resumed = search_factors(model, sequences, FACTOR, **options)

    assert resumed == search_factors(model, sequences, FACTOR, **SMALL)
    assert search_factors(model, sequences, FACTOR, **options) == resumed
    with pytest.raises(ValueError, match="rounds must be at least the 3 of the checkpoint, got 2"):
        search_factors(model, sequences, FACTOR, **{**options, "rounds": 2})


def test_an_infinite_fitness_survives_the_checkpoint(model, sequences, tmp_path):
    options = {**SMALL, "checkpoint": tmp_path / "state.json"}
    values = {}

    def fitness(model, sequences):
        values[len(values)] = value = perplexity(model, sequences)
        return math.nan if len(values) % 2 else value

    whole = search_factors(model, sequences, FACTOR, fitness=fitness, **options)
    again = search_factors(model, sequences, FACTOR, fitness=fitness, **options)

    assert again == whole
    assert math.isinf(whole.fitness_of["linear"])
    whole.write(tmp_path / "factors.json")
    assert SearchResult.read(tmp_path / "factors.json").fitness_of == whole.fitness_of


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 1}, "seed"),
        ({"population": 11}, "population"),
        ({"step": 0.02}, "space"),
        ({"fitness": "needle"}, "fitness"),
        ({"sequences": torch.zeros(1, 128, dtype=torch.long)}, "sequences"),
        ({"model": tiny_llama(attention_bias=True)}, "model"),
    ],
)
def test_the_checkpoint_of_another_search_is_refused(model, sequences, changes, what, tmp_path):
    options = {"model": model, "sequences": sequences, **SMALL, "rounds": 0, "checkpoint": tmp_path / "state.json"}
    search_factors(factor=FACTOR, **options)
    before = (tmp_path / "state.json").read_bytes()
    with pytest.raises(ValueError, match=rf"checkpoint must be of the same search, got .* with another {what};"):
        search_factors(factor=FACTOR, **{**options, **changes})

    assert (tmp_path / "state.json").read_bytes() == before


def edit_one_weight(model):
    model.model.layers[1].mlp.down_proj.weight[7, 5] += 1e-2


def edit_one_bit(model):
    model.model.embed_tokens.weight.view(torch.int8)[3, 31] ^= 1


def edit_a_buffer(model):
    model.model.norm.offset[2] = 1


def edit_a_rounded_buffer(model):
    for name in ("inv_freq", "original_inv_freq"):
        getattr(model.model.rotary_emb, name).copy_(model.model.rotary_emb.inv_freq.bfloat16())


@pytest.mark.parametrize("edit", [edit_one_weight, edit_one_bit, edit_a_buffer, edit_a_rounded_buffer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_which_one_number_was_edited_is_another_one(model, sequences, edit, dtype, tmp_path):
    model.model.norm.register_buffer("offset", torch.zeros(4, dtype=torch.int8))
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    options = {**SMALL, "rounds": 0, "checkpoint": tmp_path / "state.json"}
    search_factors(model, sequences, FACTOR, **options)
    with torch.no_grad():
        edit(model)
    with pytest.raises(ValueError, match="with another model;"):
        search_factors(model, sequences, FACTOR, **options)


@pytest.mark.parametrize("method", ["dynamic", "longrope"])
def test_a_model_that_has_read_other_lengths_is_the_same_one(model, method):
    """Its rotary module keeps the frequencies of the last length, as one tensor under two names at times."""
    short = {"factors": [2.0] * 8, "short_factors": [1.0] * 8} if method == "longrope" else {}
    extend(model, method, FACTOR, **short)
    hashes = [hash_model(model)]
    for length in (LENGTH * 3, LENGTH - 1, LENGTH * 2):
        model(input_ids=torch.zeros(1, length, dtype=torch.long))
        hashes.append(hash_model(model))

    assert len(set(hashes)) == 1
    extend(model, method, 2 * FACTOR, **short)
    assert hash_model(model) != hashes[0]


def test_weights_of_every_shape_and_order_are_hashed_as_they_are():
    model = tiny_llama()
    model.scalar, model.empty = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((), (0, 3)))
    before, weight = hash_model(model), model.lm_head.weight
    weight.data = weight.data.T.contiguous().T  # the same numbers in other strides
    assert hash_model(model) == before
    model.scalar.data.fill_(1.0)
    assert hash_model(model) != before


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        (
            ".",
            ValueError,
            r"^checkpoint must be the state of a search, got '.' \(IsADirectoryError\), which is",
        ),
        (3, TypeError, r"^checkpoint must be a path, got 3; name a file"),
        (["a"], TypeError, r"^checkpoint must be a path, got \['a'\]; "),
    ],
)
def test_a_checkpoint_that_is_no_file_is_refused_before_the_search(model, sequences, checkpoint, error, message):
    def fitness(model, sequences):
        raise AssertionError("evaluated")

    with pytest.raises(error, match=message):
        search_factors(model, sequences, FACTOR, fitness=fitness, checkpoint=checkpoint, **SMALL)


@pytest.mark.parametrize("layer_types", [None, "full_attention", [None]])
def test_kinds_of_layers_outside_of_a_list_are_refused(model, sequences, layer_types):
    with pytest.raises(TypeError, match=r"^layer_types must be a list of names, got "):
        search_factors(model, sequences, FACTOR, layer_types=layer_types, **SMALL)


@pytest.mark.parametrize(
    ("factors", "got"),
    [([0.9] + [2.0] * 7, "0.9 behind 1 at pair 0"), ([1.0, 3.0, 2.0] + [4.0] * 5, "2 behind 3 at pair 2")],
)
def test_a_model_whose_factors_are_none_of_the_search_is_no_start_of_it(sequences, factors, got):
    published = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": LENGTH,
        "long_factor": factors, "short_factor": factors,
    }  # fmt: skip
    model = tiny_llama(rope_parameters=published)
    with pytest.raises(ValueError, match=rf"^model must have factors .* to start from, got {got}; extend it by "):
        search_factors(model, sequences, FACTOR, **SMALL)
    result = search_factors(extend(model, "yarn", 2), sequences, FACTOR, **{**SMALL, "rounds": 0})
    assert result.meta["long"]["starts"]["present"]["factors"][-1] == 2.0


@pytest.mark.parametrize("content", ["", "{}", '{"random": 3}', "[1]", "\x00"])
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(model, sequences, content, tmp_path):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match="checkpoint must be the state of a search"):
        search_factors(model, sequences, FACTOR, checkpoint=tmp_path / "state.json", **SMALL)

    assert (tmp_path / "state.json").read_text() == content


# --- files, preset, bar ----------------------------------------------------------------------------------------------


def test_a_result_comes_back_from_its_file(model, sequences, tmp_path):
    result = search_factors(model, sequences, FACTOR, **{**SMALL, "rounds": 1})
    result.write(tmp_path / "factors.json")
    found = json.loads((tmp_path / "factors.json").read_text())
    read = SearchResult.read(tmp_path / "factors.json")

    assert (read.factors, read.fitness, read.fitness_of) == (result.factors, result.fitness, result.fitness_of)
    assert found["original_max_position_embeddings"] == LENGTH
    assert found["meta"]["long"]["seed"] == 0
    assert found["meta"]["long"]["versions"]["torch"] == torch.__version__
    assert set(found["fitness_of"]) == {"linear", "ntk", "yarn"}
    assert search_factors(model, sequences, FACTOR, short_of=read, **{**SMALL, "rounds": 0}).short_factors


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "factors.json").write_text('{"factors": [1.0]}')
    with pytest.raises(ValueError, match="path must be the result of a search"):
        SearchResult.read(tmp_path / "factors.json")


def test_the_progressive_recipe_is_the_papers():
    tuned = [(leg.length_tokens // 1024, leg.steps) for leg in PROGRESSIVE if leg.does == "fine_tune"]
    searched = [leg.search_options(4096)["factor"] for leg in PROGRESSIVE if leg.does == "search"]

    assert tuned == [(128, 400), (256, 600)]
    assert searched == [32, 64, 512]
    assert PROGRESSIVE[4].search_options(4096) == {"factor": 512, "population": 32, "mutations": 8, "crossovers": 8}
    with pytest.raises(ValueError, match="does must be 'search'"):
        PROGRESSIVE[2].search_options(4096)


def test_a_legs_options_are_those_of_the_search(model, sequences):
    leg = Leg("search", LENGTH * FACTOR, population=5, mutations=1, crossovers=1)
    result = search_factors(model, sequences, rounds=1, **leg.search_options(LENGTH))

    assert result.factor == FACTOR
    assert result.records[-1]["evaluated"] == 7


def test_the_published_numbers_are_the_defaults():
    assert Evolution() == Evolution(population=64, mutations=16, crossovers=16, probability=0.3, parents=32)
    defaults = search_factors.__kwdefaults__
    assert {name: defaults[name] for name in vars(Evolution())} == vars(Evolution())
    assert (defaults["rounds"], defaults["step"], defaults["reach"]) == (40, 0.01, 1.25)
    assert defaults["n_hats"] == (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)


def test_no_bar_is_written_where_there_is_no_terminal(model, sequences, capsys):
    search_factors(model, sequences, FACTOR, progress=True, **{**SMALL, "rounds": 0})

    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal_counts_individuals(model, sequences, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    search_factors(model, sequences, FACTOR, progress=True, **SMALL)

    assert "28/28" in capsys.readouterr().err


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 1}, "factor must be above 1 and finite, got 1"),
        ({"factor": math.inf}, "factor must be above 1 and finite, got inf"),
        (
            {"target_len": 32},
            "above the original 32 tokens and at most factor times it, 128, got 32",
        ),
        ({"target_len": 129}, "target_len must be above the original 32 tokens"),
        ({"sequences": torch.zeros(2, 127, dtype=torch.long)}, "at least the 128 tokens .* got 127 in sequence 0"),
        ({"sequences": []}, "sequences must be at least one, got none"),
        ({"sequences": torch.full((1, 128), VOCAB)}, "sequences must hold tokens of the model's 40, got 40"),
        ({"sequences": torch.full((1, 128), -1)}, "sequences must hold tokens of the model's 40, got -1"),
        ({"sequences": torch.zeros(1, 1, 128, dtype=torch.long)}, r"sequences must have shape \[S\] each, got"),
        ({"fitness": "loss"}, "fitness must be 'perplexity', 'needle' or a function, got 'loss'"),
        ({"population": 2}, "population must hold its 3 starts, got 2"),
        ({"mutations": -1}, "mutations must be at least 0, got -1; the paper has 16"),
        ({"parents": 1}, "parents must be at least 2 for crossovers, got 1"),
        ({"probability": 0.0}, "probability must be above 0 and at most 1, got 0.0"),
        ({"rounds": -1}, "rounds must be 0 or more, got -1"),
        ({"step": 0.0}, "step must be above 0 and reach at least 1, got 0.0 and 1.25"),
        ({"reach": 0.5}, "step must be above 0 and reach at least 1, got 0.01 and 0.5"),
        ({"n_hats": ()}, r"n_hats must be some numbers of positions, got \(\)"),
        ({"n_hats": (-1, 4)}, "n_hats must be some numbers of positions"),
        ({"n_hats": (64,)}, "n_hats must be below the original length of 32"),
        ({"attention_factor": 0.0}, "attention_factor must be above 0"),
        ({"extra_starts": ("dynamic",)}, "extra_starts must be some of .*, got 'dynamic'"),
        ({"fitness": lambda model, sequences: math.nan}, "fitness must be finite for some individual, got none among"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_the_model_is_as_before(model, sequences, changes, message):
    config = model.config.to_dict()
    options = {"sequences": sequences, "factor": FACTOR, **SMALL, **changes}
    with pytest.raises(ValueError, match=message) as refused:
        search_factors(model, **options)

    assert "\n" not in str(refused.value)
    assert model.config.to_dict() == config
    assert not model.model.rotary_emb._forward_hooks


def test_tokens_that_are_no_integers_are_refused(model):
    with pytest.raises(TypeError, match=r"sequences must hold integers, got torch\.float32"):
        search_factors(model, torch.zeros(1, 128), FACTOR)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 8}, r"short_of must be of the same factor, original length and pairs, \(8, 32, 8\), got \(4.0,"),
        ({"attention_factor": 1.0}, "attention_factor must be left out with short_of, got it"),
        ({"target_len": 64, "n_hats": (0,)}, "target_len, n_hats must be left out with short_of, got them"),
    ],
)
def test_a_short_set_of_another_search_or_with_options_of_its_own_is_refused(model, sequences, changes, message):
    long = search_factors(model, sequences, FACTOR, **{**SMALL, "rounds": 0})
    with pytest.raises(ValueError, match=message):
        search_factors(model, sequences, **{"factor": FACTOR, "short_of": long, **SMALL, **changes})


def test_a_module_that_is_no_model_of_transformers_is_refused(sequences):
    with pytest.raises(TypeError, match="model must be a causal model of transformers, got Linear"):
        search_factors(torch.nn.Linear(2, 2), sequences, FACTOR)


def test_a_model_without_rotary_positions_is_refused(sequences):
    with pytest.raises(
        ValueError, match="model must have one rotary module to be extended, got GPT2LMHeadModel with 0"
    ):
        search_factors(tiny_model("gpt2", torch.float32), sequences, FACTOR)


def test_a_model_whose_scores_are_scaled_by_its_method_is_refused(sequences):
    parameters = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0,
        "mscale_all_dim": 0.8,
    }  # fmt: skip
    model = tiny_model("deepseek_v3", torch.float32, rope_parameters=parameters)
    with pytest.raises(ValueError, match=r'with mscale_all_dim.*call extend\(model, "default"\) first'):
        search_factors(model, sequences, 8)


def test_a_config_that_holds_no_n_hat_is_refused_before_the_search():
    model = tiny_model("phi3", torch.float32)
    sequences = torch.randint(3, 60, (1, 256))
    with pytest.raises(
        ValueError, match=r"^n_hats must be \(0,\) for Phi3ForCausalLM, whose config holds no n̂, got \(0,"
    ):
        search_factors(model, sequences, 2, rounds=0)
