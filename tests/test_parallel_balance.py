"""Whole documents to ranks: level in tokens and in pairs, as few shared as that takes, and the bytes of that."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from anchor_attn.lengths import draw_distribution
from anchor_attn.masks import PackedLayout, attended_pairs
from anchor_attn.parallel import SHARED, balance_documents, communication_bytes

rows = st.lists(st.integers(1, 60), max_size=12)
ranks_drawn = st.integers(1, 5)


# --- balance ---------------------------------------------------------------------------------------------------------


@quick
@given(rows, ranks_drawn, st.sampled_from(["intra_doc", "anchor"]), st.sampled_from([0.0, 0.1, 0.5, None]))
def test_ranks_together_compute_every_token_and_pair_once(lengths, ranks, pattern, tolerance):
    given_to = balance_documents(lengths, ranks, pattern=pattern, anchor_tokens=2, tolerance=tolerance)
    pairs = attended_pairs(PackedLayout.from_lengths([lengths], anchor_tokens=2), pattern)[0] - 3  # the anchors' own

    assert sum(given_to.tokens) == pytest.approx(sum(lengths))
    assert sum(given_to.pairs) == pytest.approx(pairs)
    assert len(given_to.rank_of) == len(lengths)
    assert set(given_to.rank_of) <= {SHARED, *range(ranks)}
    shared = sum(length for length, rank in zip(lengths, given_to.rank_of, strict=True) if rank == SHARED)
    assert given_to.shared_tokens == shared
    for rank in range(ranks):
        own = sum(length for length, owner in zip(lengths, given_to.rank_of, strict=True) if owner == rank)
        assert given_to.tokens[rank] == pytest.approx(own + shared / ranks)


@quick
@given(rows, ranks_drawn, st.sampled_from([0.0, 0.1, 0.5]))
def test_no_rank_is_further_above_the_mean_than_asked_whatever_a_token_costs(lengths, ranks, tolerance):
    given_to = balance_documents(lengths, ranks, tolerance=tolerance)

    assert given_to.token_imbalance <= tolerance + 1e-9
    assert given_to.pair_imbalance <= tolerance + 1e-9
    for token_cost in (0, 1, 30, 1e5):
        costs = given_to.costs(token_cost)
        assert max(costs) <= (1 + tolerance) * sum(costs) / ranks + 1e-6


@quick
@given(rows, ranks_drawn)
def test_only_the_longest_documents_are_shared_and_none_when_none_may_be(lengths, ranks):
    rank_of = balance_documents(lengths, ranks).rank_of
    shared = [length for length, rank in zip(lengths, rank_of, strict=True) if rank == SHARED]
    whole = [length for length, rank in zip(lengths, rank_of, strict=True) if rank != SHARED]
    assert min(shared, default=60) >= max(whole, default=0)
    assert SHARED not in balance_documents(lengths, ranks, tolerance=None).rank_of


def test_the_examples_of_the_docstrings():
    assert balance_documents([6, 2, 2, 1, 1], 2).rank_of == (SHARED, 0, 1, 0, 1)
    whole = balance_documents([6, 2, 2, 1, 1], 2, tolerance=None)
    assert whole.rank_of == (0, 1, 1, 1, 1)
    assert (whole.tokens, whole.pairs) == ((6, 6), (27, 14))


def test_documents_that_fit_stay_whole():
    assert SHARED not in balance_documents([100] * 8, 4).rank_of
    assert balance_documents([100] * 5, 4).rank_of.count(SHARED) == 1
    assert balance_documents([500, *[100] * 10], 4).rank_of == (SHARED, *balance_documents([100] * 10, 4).rank_of)


def test_web_text_rows_of_128k_are_level_within_a_tenth_on_four_ranks_and_mostly_whole():
    shares = []
    for seed in range(20):
        lengths = draw_distribution("web-text", 131_071, seed)
        given_to = balance_documents(lengths, 4)
        assert given_to.pair_imbalance <= 0.1
        assert given_to.token_imbalance <= 0.1
        shares.append(given_to.shared_tokens / sum(lengths))
        # Only documents that would fill a good part of a rank by their pairs are ever shared.
        owners = zip(lengths, given_to.rank_of, strict=True)
        assert all(length > 8192 for length, owner in owners if owner == SHARED)
    assert sum(share == 0 for share in shares) >= 5
    assert sum(shares) / len(shares) < 0.15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "full"}, r"^pattern must keep documents to themselves .* got 'full', .*scheme='ulysses'"),
        ({"pattern": "causal"}, r"^pattern must be one of .* got 'causal'"),
        ({"ranks": 0}, r"^ranks must be at least 1, got 0"),
        ({"tolerance": -0.1}, r"^tolerance must be at least 0, got -0\.1"),
        ({"tolerance": float("nan")}, r"^tolerance must be at least 0, got nan"),
        ({"lengths": [3, 0]}, r"^lengths must hold counts of at least 1, got 0"),
        ({"anchor_tokens": -1}, r"^anchor_tokens must be at least 0, got -1"),
    ],
)
def test_balance_refuses_what_has_no_meaning(changes, message):
    with pytest.raises(ValueError, match=message):
        balance_documents(**{"lengths": [3, 4], "ranks": 2, **changes})


# --- bytes -----------------------------------------------------------------------------------------------------------

SIZES = {"num_heads": 32, "head_dim": 128}


def test_bytes_of_two_equal_documents_on_two_ranks():
    layout = PackedLayout.from_lengths([[4095, 4096]])
    assert communication_bytes(layout, "all_gather", 2, **SIZES) == (67_108_864, 67_108_864)
    assert communication_bytes(layout, "ulysses", 2, **SIZES) == (67_108_864, 67_108_864)
    assert communication_bytes(layout, "document", 2, **SIZES) == (0, 0)


def test_documents_send_no_more_than_all_of_the_row_would():
    layout = PackedLayout.from_lengths([[5000, 3000, 100, 91], [4096, 2048, 2047]])
    for ranks in (1, 2, 4, 8):
        document = communication_bytes(layout, "document", ranks, **SIZES)
        assert document <= communication_bytes(layout, "ulysses", ranks, **SIZES)
        assert communication_bytes(layout, "document", ranks, tolerance=None, **SIZES) == (0, 0)
    assert communication_bytes(layout, "ulysses", 1, **SIZES) == (0, 0)


def test_key_heads_are_repeated_only_as_far_as_ranks_need_them():
    layout = PackedLayout.from_lengths([[8191]])
    sent = [communication_bytes(layout, "ulysses", 8, num_kv_heads=heads, **SIZES).forward for heads in (1, 2, 8, 16)]
    assert sent[0] == sent[1] == sent[2] < sent[3]


def test_bytes_refuse_an_unknown_scheme_and_heads_that_ranks_do_not_divide():
    layout = PackedLayout.from_lengths([[8, 7]])
    with pytest.raises(ValueError, match=r"^scheme must be one of .* got 'ring'"):
        communication_bytes(layout, "ring", 2, **SIZES)
    with pytest.raises(ValueError, match=r"^num_heads must be a multiple of the 3 ranks .* got 32; .*tolerance=None"):
        communication_bytes(layout, "ulysses", 3, **SIZES)
    with pytest.raises(ValueError, match=r"^ranks must be at least 1, got 0"):
        communication_bytes(layout, "all_gather", 0, **SIZES)
