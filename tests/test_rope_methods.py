"""Frequencies of every extension method: transformers' own to the bit, the papers' formulas in float64, relations."""

import math
import re

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from anchor_attn.rope import METHODS, method_frequencies
from anchor_attn.rope.frequencies import ntk_theta, yarn_attention_factor
from anchor_attn.rope.methods import Original, as_factors, frequencies_of

SIZE, THETA, LENGTH = 128, 10_000.0, 4096
RISING = [1.0 + 0.1 * pair for pair in range(SIZE // 2)]
OPTIONS = {"longrope": {"factors": RISING}}
FACTORS = (2.0, 4.0, 16.0, 32.0)

every_method = pytest.mark.parametrize("method", METHODS)
every_factor = pytest.mark.parametrize("factor", FACTORS)


def ours(method, factor=4.0, **options):
    """Frequencies in float64, and the attention factor, of a head of 128, a base of 1e4 and 4,096 tokens."""
    inv_freq, attention_factor = method_frequencies(
        method, THETA, SIZE, LENGTH, factor, **{**OPTIONS.get(method, {}), **options}
    )
    assert inv_freq.dtype == torch.float32
    return inv_freq.double(), attention_factor


# --- transformers' own, to the bit -----------------------------------------------------------------------------------

THEIRS = {
    "linear": {},
    "dynamic": {},
    "yarn": {"original_max_position_embeddings": LENGTH},
    "longrope": {"original_max_position_embeddings": LENGTH, "long_factor": RISING, "short_factor": [1.0] * 64},
    "llama3": {"original_max_position_embeddings": LENGTH, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@every_factor
@pytest.mark.parametrize("method", THEIRS)
def test_what_transformers_has_is_equal_to_the_bit(method, factor):
    longest = LENGTH if method == "dynamic" else int(LENGTH * factor)
    parameters = {"rope_type": method, "rope_theta": THETA, "factor": factor, **THEIRS[method]}
    config = LlamaConfig(head_dim=SIZE, max_position_embeddings=longest, rope_parameters=parameters)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[method](config, "cpu", seq_len=int(LENGTH * factor))

    given, given_factor = ours(method, factor)
    assert torch.equal(given.float(), inv_freq)
    assert given_factor == attention_factor


# --- the papers' formulas, in float64 --------------------------------------------------------------------------------


def closed_form(method, factor):
    """θ' [R/2] and the attention factor, from the formulas alone."""
    pair = torch.arange(SIZE // 2, dtype=torch.float64)
    theta = THETA ** (-2 * pair / SIZE)
    turns = LENGTH * theta / (2 * math.pi)
    exponent = SIZE / (SIZE - 2)
    if method == "default":
        return theta, 1.0
    if method == "linear":
        return theta / factor, 1.0
    if method == "ntk":
        return (THETA * factor**exponent) ** (-2 * pair / SIZE), 1.0
    if method == "dynamic":
        return (THETA * (factor * factor - (factor - 1)) ** exponent) ** (-2 * pair / SIZE), 1.0
    if method == "longrope":
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(LENGTH))
        return theta / torch.tensor(RISING, dtype=torch.float64), attention_factor
    if method == "yarn":
        ends = [SIZE * math.log(LENGTH / (2 * math.pi * turn)) / (2 * math.log(THETA)) for turn in (32, 1)]
        first, last = math.floor(ends[0]), math.ceil(ends[1])
        kept = 1 - ((pair - first) / (last - first)).clamp(0, 1)
    elif method == "llama3":
        kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
    else:
        kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
    attention_factor = 0.1 * math.log(factor) + 1 if method.startswith("yarn") else 1.0
    return (1 - kept) * theta / factor + kept * theta, attention_factor


@every_factor
@every_method
def test_frequencies_are_the_papers_formulas(method, factor):
    """To 1e-7, and each pair to some float32 roundings of its own size, those of transformers' functions included."""
    given, given_factor = ours(method, factor)
    expected, expected_factor = closed_form(method, factor)

    torch.testing.assert_close(given, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(given, expected, rtol=6e-7, atol=0)
    assert given_factor == pytest.approx(expected_factor, abs=1e-12)


def test_pair_30_at_factor_16_is_kept_to_64_percent_by_transformers_ramp_and_to_30_by_the_papers():
    theta = THETA ** (-60 / 128)

    assert ours("yarn", 16.0)[0][30] / theta == pytest.approx(0.6394, abs=5e-5)
    assert ours("yarn_paper", 16.0)[0][30] / theta == pytest.approx(0.2952, abs=5e-5)
    assert ours("ntk_by_parts", 16.0)[0][30] / theta == pytest.approx(0.2952, abs=5e-5)


def test_yarn_multiplies_cos_and_sin_by_1_2773_at_factor_16():
    assert ours("yarn", 16.0)[1] == ours("yarn_paper", 16.0)[1] == yarn_attention_factor(16.0)
    assert yarn_attention_factor(16.0) == pytest.approx(1.2773, abs=5e-5)


def test_the_ntk_base_at_factor_4_is_40_890():
    assert ntk_theta(THETA, 4.0, SIZE) == pytest.approx(40_890, abs=0.5)


# --- relations -------------------------------------------------------------------------------------------------------


@every_factor
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("default", "longrope")])
def test_no_pair_turns_faster_than_it_did_nor_slower_than_the_method_may(method, factor):
    original, _ = ours("default")
    given, _ = ours(method, factor)
    slowest = factor * factor if method == "dynamic" else factor

    assert (given <= original * (1 + 1e-6)).all()
    assert (given >= original / slowest * (1 - 1e-6)).all()
    assert (given.diff() < 0).all()


@every_factor
def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest_in_full(factor):
    ratio = ours("ntk", factor)[0] / ours("default")[0]

    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / factor, rel=1e-6)


@pytest.mark.parametrize("method", ["ntk_by_parts", "yarn", "yarn_paper", "llama3"])
def test_by_parts_keep_the_fastest_pair_and_interpolate_the_slowest_in_full(method):
    ratio = ours(method, 8.0)[0] / ours("default")[0]

    assert ratio[0] == pytest.approx(1, abs=1e-7)
    assert ratio[-1] == pytest.approx(1 / 8, rel=1e-6)


@pytest.mark.parametrize(("factors", "method"), [([1.0] * 64, "default"), ([4.0] * 64, "linear")])
def test_longrope_of_equal_factors_is_plain_or_interpolated(factors, method):
    assert torch.equal(ours("longrope", 4.0, factors=factors)[0], ours(method, 4.0)[0])


def test_dynamic_is_plain_up_to_the_original_length_and_then_follows_the_input():
    plain = ours("default")[0]
    lengths = [LENGTH // 2, LENGTH, LENGTH + 1, 2 * LENGTH, 4 * LENGTH]
    slowest = [float(ours("dynamic", seq_len=length)[0][-1]) for length in lengths]

    assert torch.equal(ours("dynamic", seq_len=LENGTH)[0], plain)
    assert slowest[0] == slowest[1] > slowest[2] > slowest[3] > slowest[4]


def test_longrope_takes_the_short_set_up_to_the_original_length_and_the_same_factors_without_one():
    short = [1.0 + pair / 100 for pair in range(64)]
    plain = ours("default")[0]
    chosen = [
        ours("longrope", short_factors=short, seq_len=length)[0] / plain for length in (LENGTH - 1, LENGTH, LENGTH + 1)
    ]

    for ratio, factors in zip(chosen, (short, short, RISING), strict=True):
        torch.testing.assert_close(1 / ratio, torch.tensor(factors, dtype=torch.float64), rtol=3e-7, atol=0)
    assert torch.equal(ours("longrope", seq_len=5)[0], ours("longrope")[0])


@every_factor
@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "llama3", "ntk_by_parts"])
def test_any_static_method_comes_back_from_a_list_of_factors(method, factor):
    original = Original({"rope_type": "default", "rope_theta": THETA}, LENGTH, SIZE)
    expected, attention_factor = method_frequencies(method, THETA, SIZE, LENGTH, factor)
    given, given_factor = frequencies_of(as_factors(original, factor, expected, attention_factor), original, 3)

    torch.testing.assert_close(given, expected, rtol=0, atol=6e-8)
    torch.testing.assert_close(given, expected, rtol=2e-7, atol=0)
    assert given_factor == attention_factor


def test_yarn_takes_deepseeks_mscales_and_the_ramp_without_whole_pairs():
    assert ours("yarn", 40.0, mscale=1.0, mscale_all_dim=1.0)[1] == 1.0
    assert ours("yarn", 40.0, mscale=2.0, mscale_all_dim=1.0)[1] == pytest.approx(
        (0.2 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    )
    assert not torch.equal(ours("yarn", 40.0, truncate=False)[0], ours("yarn", 40.0)[0])


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, lambda factors: np.array(factors, dtype=np.float32)])
def test_factors_may_be_a_tensor_or_an_array(kind):
    rising = [1.0 + pair / 4 for pair in range(64)]  # exact in float32
    given = ours("longrope", factors=kind(rising), short_factors=kind(rising), attention_factor=kind([1.5])[0])

    assert torch.equal(given[0], ours("longrope", factors=rising)[0])
    assert given[1] == 1.5


def test_a_list_from_elsewhere_may_speed_a_pair_up():
    ratio = ours("longrope", factors=[0.99] + [2.0] * 63)[0] / ours("default")[0]

    assert ratio[0] == pytest.approx(1 / 0.99)


def test_two_bases_and_two_sizes_in_one_process_differ():
    first, second, third = (
        method_frequencies("yarn", theta, size, LENGTH, 4.0)[0] for theta, size in ((1e4, 64), (5e5, 64), (1e4, 96))
    )
    assert not torch.equal(first, second)
    assert len(third) == 48


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "factor", "options", "message"),
    [
        ("yarnn", 4.0, {}, r"^method must be one of \('default', 'linear', .*'llama3'\), got 'yarnn'; pass one"),
        ("linear", 1.0, {}, r"^factor must be above 1 and finite, got 1.0; pass 8"),
        ("yarn", 0.5, {}, r"^factor must be above 1 and finite, got 0.5; "),
        ("ntk", -4.0, {}, r"^factor must be above 1 and finite, got -4.0; "),
        ("ntk", math.nan, {}, r"^factor must be above 1 and finite, got nan; "),
        ("ntk", math.inf, {}, r"^factor must be above 1 and finite, got inf; "),
        ("linear", 4.0, {"beta_fast": 32}, r"^options of method='linear' must be left out, got beta_fast; leave"),
        ("yarn", 4.0, {"bets_fast": 1}, r"^options of method='yarn' must be of \('beta_fast', .*\), got bets_fast; "),
        ("yarn", 4.0, {"beta_slow": 64}, r"^beta_slow must be below beta_fast, got 64.0 and 32.0; leave"),
        ("yarn_paper", 4.0, {"beta_fast": 1.0}, r"^beta_slow must be below beta_fast, got 1.0 and 1.0; "),
        ("ntk_by_parts", 4.0, {"beta_fast": math.nan}, r"^beta_fast must be above 0 and finite, got nan; "),
        ("yarn", 4.0, {"attention_factor": 0}, r"^attention_factor must be above 0 and finite, got 0; "),
        ("llama3", 4.0, {"low_freq_factor": 8}, r"^low_freq_factor must be below high_freq_factor, got 8.0 and 4.0; "),
        ("longrope", 4.0, {"factors": None}, r"^factors must be given for method='longrope', got none; search"),
        ("longrope", 4.0, {"factors": [2.0] * 63}, r"^factors must hold a factor for each of 64 pairs, got 63; "),
        ("longrope", 4.0, {"factors": [0.0] * 64}, r"^factors\[0\] must be above 0 and finite, got 0.0; "),
        ("longrope", 4.0, {"factors": [1.0] * 63 + [math.nan]}, r"^factors\[63\] must be above 0 and finite, got nan"),
        ("longrope", 4.0, {"factors": [1.0] * 62 + [3, 2]}, r"^factors must not fall .* got 3.0 before 2.0 at pair 63"),
        ("longrope", 4.0, {"short_factors": [1.0] * 3}, r"^short_factors must hold .* of 64 pairs, got 3; "),
        ("longrope", 4.0, {"n_hat": -1}, r"^n_hat must be 0 or more positions, got -1; "),
        ("longrope", 4.0, {"n_hat": 4097}, r"^n_hat must be at most the original length of 4096 tokens, got 4097; no"),
        ("dynamic", 4.0, {"seq_len": 0}, r"^seq_len must be at least one token, got 0; "),
        ("linear", 4.0, {"seq_len": -5}, r"^seq_len must be at least one token, got -5; "),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused_in_one_line(method, factor, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        ours(method, factor, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("method", "factor", "options", "message"),
    [
        ("yarn", "4", {}, r"^factor must be a number, got '4'; "),
        ("yarn", True, {}, r"^factor must be a number, got True; "),
        ("longrope", 4.0, {"factors": 4.0}, r"^factors must be a list of numbers, got 4.0; "),
        ("longrope", 4.0, {"factors": ["1.0"] * 64}, r"^factors\[0\] must be a number, got '1.0'; "),
        (
            "longrope",
            4.0,
            {"factors": [[1.0]] * 64},
            r"^factors\[0\] must be a number, got \[1.0\]; pass one above 0\.$",
        ),
        ("longrope", 4.0, {"factors": torch.ones(64, 2)}, r"^factors\[0\] must be a number, got \[1.0, 1.0\]; "),
        ("longrope", 4.0, {"factors": torch.tensor(4.0)}, r"^factors must be a list of numbers, got 4.0; "),
        ("longrope", 4.0, {"factors": torch.ones(64, dtype=torch.bool)}, r"^factors\[0\] must be a number, got True; "),
        ("longrope", 4.0, {"factors": {1.0: 2}}, r"^factors must be a list of numbers, got {1.0: 2}; "),
        ("longrope", 4.0, {"factors": "factors"}, r"^factors must be a list of numbers, got 'factors'; "),
        (
            "longrope",
            4.0,
            {"factors": [torch.ones(99)] * 64},
            r"^factors\[0\] must be .* got tensor\(.{73} …; pass one",
        ),
        ("longrope", 4.0, {"n_hat": 1.5}, r"^n_hat must be an integer, got 1.5; "),
        ("yarn", 4.0, {"truncate": "no"}, r"^truncate must be True or False, got 'no'; pass one of them"),
        ("yarn", 4.0, {"truncate": 0}, r"^truncate must be True or False, got 0; "),
        ("dynamic", 4.0, {"seq_len": 8192.0}, r"^seq_len must be an integer, got 8192.0; "),
    ],
)
def test_what_is_of_another_type_is_refused_in_one_line(method, factor, options, message):
    with pytest.raises(TypeError, match=message) as refused:
        ours(method, factor, **options)
    assert "\n" not in str(refused.value)


@every_method
@pytest.mark.parametrize(
    ("theta", "size", "length", "message"),
    [
        (THETA, 7, LENGTH, r"^rotary_dim must be even and at least 2, got 7; "),
        (math.inf, SIZE, LENGTH, r"^theta must be above 1 and finite, got inf; "),
        (math.nan, SIZE, LENGTH, r"^theta must be above 1 and finite, got nan; "),
        (1.0, SIZE, LENGTH, r"^theta must be above 1 and finite, got 1.0; "),
        (-1e4, SIZE, LENGTH, r"^theta must be above 1 and finite, got -10000.0; "),
        (10**400, SIZE, LENGTH, r"^theta must be above 1 and finite, got 1000"),
        (THETA, SIZE, 0, r"^original_len must be at least one token, got 0; "),
    ],
)
def test_rope_without_frequencies_is_refused_under_every_method(method, theta, size, length, message):
    with pytest.raises(ValueError, match=message):
        method_frequencies(method, theta, size, length, 4.0, **OPTIONS.get(method, {}))


@pytest.mark.parametrize("method", [["yarn"], None, np.array(["yarn", "ntk"]), torch.ones(2, 2)])
def test_a_method_that_is_no_name_is_refused_in_one_line(method):
    with pytest.raises(ValueError, match=r"^method must be one of \('default', .*\), got .*; pass one") as refused:
        method_frequencies(method, THETA, SIZE, LENGTH, 4.0)
    assert "\n" not in str(refused.value)


@every_method
@pytest.mark.parametrize("theta", ["1e4", None, True, [1e4]])
def test_a_base_that_is_no_number_is_refused_under_every_method(method, theta):
    with pytest.raises(TypeError, match=rf"^theta must be a number, got {re.escape(repr(theta))}; pass one above 1"):
        method_frequencies(method, theta, SIZE, LENGTH, 4.0, **OPTIONS.get(method, {}))


@pytest.mark.parametrize("method", ["ntk", "dynamic"])
def test_a_single_pair_has_no_base_that_changes_it(method):
    with pytest.raises(ValueError, match=r"^rotary_dim must be above 2 for NTK-aware scaling, got 2; pass method="):
        method_frequencies(method, THETA, 2, LENGTH, 4.0)
