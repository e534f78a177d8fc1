"""`anchor-attn rope`: what a model's RoPE is, where it is rounded, and the search; one line for bad input."""

import csv
import json
import logging
import re
import sys

import pytest
import torch
from families import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig
from transformers.models.llama import modeling_llama

from anchor_attn.cli import main, rope_input
from anchor_attn.cli.options import by_options, errors_by_options
from anchor_attn.rope import METHODS, casts, draw, extend, inspection, method_frequencies
from anchor_attn.rope.casts import equal_policies, find_casts
from anchor_attn.rope.inspection import compare_methods, describe_rope, list_pairs, name_pairs
from anchor_attn.rope.methods import Original
from anchor_attn.rope.rotary import rotaries_of
from anchor_attn.rope.search import loop
from anchor_attn.rope.search.files import SearchResult
from anchor_attn.train.tokenizers import ByteTokenizer

FILES = ("rope.json", "rope.csv", "rope.png")
# The head of Llama 2 in a model that takes no time.
NARROW = {"hidden_size": 256, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
TINY_SEARCH = ("--population", "5", "--mutations", "2", "--crossovers", "1", "--rounds", "2", "--parents", "2")
SEARCH = ["search", "--model", "tiny", "--text", "t.txt"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the command line in a folder of its own; returns exit code, stdout, stderr. A picture takes a second."""
    monkeypatch.setattr(draw, "draw_methods_figure", unavailable)
    monkeypatch.setattr(casts, "WAYS", casts.WAYS[1:2])
    return caller(monkeypatch, capsys, tmp_path)


@pytest.fixture
def run_whole(monkeypatch, capsys, tmp_path):
    """The same, with the picture and all casts."""
    return caller(monkeypatch, capsys, tmp_path)


def unavailable(*_, **__):
    raise ImportError("a picture needs matplotlib")


def caller(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rope_input, "LLAMA_2", rope_input.LLAMA_2 | NARROW)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["anchor-attn", "rope", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def saved(tmp_path):
    """Write a config, and say where."""

    def save(config, name="config.json"):
        path = tmp_path / name
        path.write_text(json.dumps(config.to_dict()))
        return str(path)

    return save


def llama_2():
    return LlamaConfig(max_position_embeddings=4096, **NARROW)


def content(out):
    return json.loads((out / "rope.json").read_text())


# --- what is said ----------------------------------------------------------------------------------------------------


def test_with_no_argument_it_describes_llama_2(run_whole, tmp_path):
    code, out, _ = run_whole()
    folder = tmp_path / "runs" / "rope"

    assert code == 0
    assert out.startswith("RoPE: theta 10,000, 128 numbers of a head rotated, trained on 4,096 tokens, 4,096 now, def")
    assert "of 64 pairs 18 do not turn once in 4,096 tokens: 46–63" in out
    assert "θ'/θ by each method, 8 × 4,096 tokens" in out
    assert all((folder / name).stat().st_size for name in FILES)
    assert (folder / "rope.png").read_bytes().startswith(b"\x89PNG")


def test_the_files_hold_every_pair_once(run, tmp_path):
    run("--factor", "16")
    folder = tmp_path / "runs" / "rope"
    records = content(folder)["records"]
    rows = list(csv.DictReader((folder / "rope.csv").read_text().splitlines()))

    assert [record["pair"] for record in records] == [int(row["pair"]) for row in rows] == list(range(64))
    assert (folder / "rope.csv.meta.json").exists()
    assert round(records[30]["yarn"], 4) == 0.6394
    assert round(records[30]["yarn_paper"], 4) == 0.2952
    assert [record["turned_once"] for record in records] == [True] * 46 + [False] * 18


def test_as_json_it_prints_the_file_and_nothing_else(run, tmp_path):
    code, out, _ = run("--json", "--out", "here")

    assert (code, out) == (0, (tmp_path / "here" / "rope.json").read_text())


def test_a_target_length_is_a_factor(run, tmp_path):
    run("--target-len", "32768", "--out", "length")
    run("--factor", "8", "--out", "factor")

    assert content(tmp_path / "length")["records"] == content(tmp_path / "factor")["records"]


def test_two_runs_of_a_seed_are_equal(run):
    one, two = (run("--seed", "3", "--json")[1] for _ in range(2))

    assert one == two


def test_what_a_model_has_now_stands_beside_and_gives_the_factor(run, saved, tmp_path):
    config = extend(llama_2(), "yarn", 4)
    code, out, _ = run("--model", saved(config))
    found = content(tmp_path / "runs" / "rope")

    assert code == 0
    assert "trained on 4,096 tokens, 16,384 now, yarn × 4, cos and sin × 1.1386" in out
    assert found["meta"]["factor"] == 4
    assert [record["now"] for record in found["records"]] == [record["yarn"] for record in found["records"]]
    assert found["records"][63]["now"] == 0.25


def test_a_config_that_plain_transformers_refuses_is_described_with_its_first_positions(run, saved, tmp_path):
    config = extend(llama_2(), "longrope", 2, factors=[2.0] * 64, n_hat=4, attention_factor=1.0)
    code, out, _ = run("--model", saved(config))

    assert code == 0
    assert "8,192 now, longrope × 2, positions below 4 as before\n" in out
    assert {record["now"] for record in content(tmp_path / "runs" / "rope")["records"]} == {0.5}


def test_kinds_of_layers_are_told_apart_and_sliding_ones_are_not_extended(run, saved, tmp_path):
    code, out, _ = run("--model", saved(tiny_config("gemma3_text")))
    records = content(tmp_path / "runs" / "rope")["records"]
    full, sliding = (
        [record for record in records if record["layer_type"] == f"{kind}_attention"] for kind in ("full", "sliding")
    )

    assert code == 0
    assert "full_attention: theta" in out
    assert "sliding_attention: theta" in out
    assert {record["linear"] for record in full} == {0.125}
    assert {record["linear"] for record in sliding} == {None}
    assert len(records) == 2 * len(full) == 2 * len(sliding)


def test_no_number_is_cut_short_in_a_narrow_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    _, out, _ = run()

    assert "54,410.1 0.08 *  0.125" in out


def test_without_matplotlib_all_but_the_picture_is_written(run_whole, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = run_whole()

    assert code == 0
    assert "No picture: a picture needs matplotlib; pip install 'anchor-attn[plots]'." in out
    assert "Written: runs/rope/rope.json, runs/rope/rope.csv\n" in out
    assert not (tmp_path / "runs" / "rope" / "rope.png").exists()


# --- pairs and methods -----------------------------------------------------------------------------------------------


def test_all_methods_are_compared_and_longrope_only_with_factors():
    (now,) = describe_rope(llama_2())
    searched = {"factors": [2.0] * 64, "n_hat": 4, "attention_factor": 1.25}

    assert [*compare_methods(now.original, 8.0)[0]] == [method for method in METHODS if method != "longrope"]
    assert [*compare_methods(now.original, 8.0, searched)[0]] == [*METHODS]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_compared_is_what_the_method_gives_at_the_longer_length(method):
    (now,) = describe_rope(llama_2())
    searched = {"factors": [2.0] * 64, "n_hat": 4, "attention_factor": 1.25}
    options = searched if method == "longrope" else {}
    inv_freq, attention_factor = method_frequencies(method, 10_000.0, 128, 4096, 8.0, 32_768, **options)
    found = compare_methods(now.original, 8.0, searched)[0][method]

    torch.testing.assert_close(found.ratio * now.original.inv_freq, inv_freq.double(), rtol=1e-15, atol=0)
    assert (found.attention_factor, found.n_hat) == (attention_factor, options.get("n_hat", 0))


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("longrope", "dynamic")])
def test_ratios_are_those_of_an_extended_model(method):
    model = AutoModelForCausalLM.from_config(llama_2())
    (now,) = describe_rope(model.config)
    rope = compare_methods(now.original, 8.0)[0][method]
    (rotary,) = rotaries_of(extend(model, method, *((8.0,) if method != "default" else ())))

    inv_freq, attention_factor = rotary.frequencies()
    torch.testing.assert_close(inv_freq / now.original.inv_freq, rope.ratio.float(), rtol=2e-7, atol=0)
    assert attention_factor == rope.attention_factor


def test_a_pair_turns_once_in_its_wavelength():
    (now,) = describe_rope(llama_2())
    for record in list_pairs(now, {}):
        assert record["turns"] * record["wavelength_tokens"] == pytest.approx(4096, rel=1e-12)
    assert now.unturned_pairs == list(range(46, 64))


RISING = [1.0 + pair / 63 for pair in range(64)]


@pytest.mark.parametrize("asked", [(), ("--factor", "2"), ("--target-len", "8192")], ids=" ".join)
def test_searched_factors_stand_beside_the_methods_at_their_own_factor(run, tmp_path, asked):
    factors = RISING
    write_result(tmp_path / "factors.json", factors, n_hat=4, attention_factor=1.25)
    code, out, _ = run("--factors", "factors.json", *asked)
    found = content(tmp_path / "runs" / "rope")

    assert code == 0
    assert (found["meta"]["factor"], found["meta"]["factors"]) == (2, "factors.json")
    assert found["meta"]["methods"]["longrope"] == {"attention_factor": 1.25, "n_hat": 4}
    assert (
        "longrope: factors.json, 2 × 4,096 tokens: λ from 1.00 to 2.00 over 64 pairs, n̂ 4, cos and sin × 1.2500\n"
    ) in out
    for record, factor in zip(found["records"], factors, strict=True):
        assert record["longrope"] == pytest.approx(1 / factor, rel=1e-6)


def test_factors_of_another_factor_or_length_are_refused_and_nothing_is_written(run, tmp_path):
    write_result(tmp_path / "factors.json", RISING)
    folder = tmp_path / "runs" / "rope"
    for asked in (("--factor", "4"), ("--target-len", "8193"), ("--original-len", "2048")):
        code, out, err = run("--factors", "factors.json", *asked)

        assert (code, out, err.count("\n"), list(folder.iterdir())) == (2, "", 1, [])


def test_a_longer_context_by_length_and_its_search_by_length_are_the_same_factor(run, tmp_path):
    """6,001 tokens are 1.46508… times 4,096."""
    write_result(tmp_path / "factors.json", RISING, factor=6001 / 4096)

    assert run("--factors", "factors.json", "--target-len", "6001")[0] == 0


def test_the_factor_on_cos_and_sin_tells_methods_of_the_same_ratios_apart(run, tmp_path):
    _, out, _ = run("--factor", "16")
    found = content(tmp_path / "runs" / "rope")
    columns = next(line.split() for line in out.splitlines() if line.startswith("pair"))
    foot = next(line.split() for line in out.splitlines() if line.strip().startswith("cos, sin ×"))

    assert all(record["ntk_by_parts"] == record["yarn_paper"] for record in found["records"])
    assert found["meta"]["methods"]["ntk_by_parts"] == {"attention_factor": 1.0, "n_hat": 0}
    assert round(found["meta"]["methods"]["yarn_paper"]["attention_factor"], 4) == 1.2773
    shown = dict(zip(columns[3:], foot[3:], strict=True))
    assert shown == {
        "linear": "1.000", "ntk": "1.000", "dynamic": "1.000", "_parts": "1.000", "yarn": "1.277", "_paper": "1.277",
        "llama3": "1.000",
    }  # fmt: skip


def test_the_tables_of_a_plain_model_fit_80_columns(run):
    _, out, _ = run()
    table = out[out.index("θ'/θ by each") : out.index("Written")].splitlines()

    assert max(map(len, table)) <= 80


def test_what_has_no_meaning_for_a_model_is_left_out_with_its_reason():
    original = Original({"rope_type": "default", "rope_theta": 10_000.0}, 64, 2)
    under, left_out = compare_methods(original, 8.0)

    assert set(left_out) == {"ntk", "dynamic"}
    assert "rotary_dim must be above 2" in left_out["ntk"]
    assert "linear" in under


def test_pairs_are_named_by_stretches():
    assert name_pairs([]) == ""
    assert name_pairs([3, 4, 5, 9]) == "3–5, 9"


def test_the_picture_has_a_line_for_every_method_on_both_sides():
    from anchor_attn.rope.draw import draw_methods_figure

    (now,) = describe_rope(extend(llama_2(), "linear", 2))
    under, _ = compare_methods(now.original, 8.0, {"factors": [1.0] * 64, "attention_factor": 1.0})
    figure = draw_methods_figure(now, under, 8.0, "a title")
    slowed, reached = figure.axes
    drawn = {line.get_label(): line for line in reached.lines}
    scaled = {"yarn": "yarn (cos, sin × 1.208)", "yarn_paper": "yarn_paper (cos, sin × 1.208)"}

    labels = {scaled.get(method, method) for method in METHODS}
    assert labels <= {line.get_label() for line in slowed.lines}
    assert labels <= set(drawn)
    assert labels <= {text.get_text() for text in figure.legends[0].get_texts()}
    assert drawn["default"].get_ydata()[0] == pytest.approx(8 * 4096)
    assert drawn["linear"].get_ydata()[0] == pytest.approx(4096)
    assert "now: linear" in [text.get_text() for text in figure.legends[0].get_texts()]


# --- casts -----------------------------------------------------------------------------------------------------------


def policies(found):
    return equal_policies(found.table), equal_policies(found.rotation)


def test_llama_casts_where_transformers_is_known_to_cast():
    loaded, in_bfloat16, cast = (find_casts(llama_2(), dtype, way) for dtype, way in casts.WAYS)

    assert policies(loaded) == (["model", "float32"],) * 2
    assert policies(in_bfloat16) == policies(cast) == (["model", "bfloat16"],) * 2
    assert (loaded.frequencies, in_bfloat16.frequencies, cast.frequencies) == ("float32", "float32", "bfloat16")
    assert loaded.meaning == "float32 angles, cos and sin in float32, rotation in float32"
    assert in_bfloat16.meaning == "float32 angles, cos and sin in bfloat16, rotation in bfloat16"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("olmo2", "float32"),
        ("deepseek_v2", "float32"),
        ("gemma3_text", "model"),
        ("gpt_neox", "model"),
        ("phi", "model"),
    ],
)
def test_families_differ_in_where_they_cast(family, expected):
    found = find_casts(tiny_config(family), "bfloat16")

    assert found.unseen is None
    assert equal_policies(found.table)[0] == equal_policies(found.rotation)[0] == expected
    assert found.rotated_in == ("float32" if expected == "float32" else "bfloat16")


def test_a_model_that_reduces_its_angles_in_float64_is_seen(monkeypatch):
    def exact(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().float(), angles.sin().float()

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", exact)
    found = find_casts(llama_2(), "bfloat16")

    assert policies(found) == (["exact"], ["exact"])
    assert found.meaning == ("float64 angles, cos and sin in float32, rotation in float32, query and key cast after")


def test_a_rotation_of_its_own_is_seen_though_the_tables_are_known(monkeypatch):
    theirs = modeling_llama.apply_rotary_pos_emb

    def in_float32(q, k, cos, sin, *more, **options):
        rotated = theirs(q.float(), k.float(), cos.float(), sin.float(), *more, **options)
        return tuple(each.to(q.dtype) for each in rotated)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", in_float32)
    found = find_casts(llama_2(), "bfloat16")

    assert equal_policies(found.table) == ["model", "bfloat16"]
    assert found.rotated_in == "float32"
    assert found.meaning.endswith("cos and sin in bfloat16, rotation in float32, query and key cast after")


def test_a_norm_behind_the_rotation_leaves_its_dtype_unknown(monkeypatch):
    theirs = modeling_llama.apply_rotary_pos_emb

    def normed(*arguments, **options):
        return tuple(each / (1 + each.norm(dim=-1, keepdim=True)) for each in theirs(*arguments, **options))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", normed)

    assert find_casts(llama_2(), "bfloat16").rotated_in is None


def test_angles_in_bfloat16_are_as_no_policy(monkeypatch):
    def rough(self, x, position_ids):
        angles = position_ids[..., None].bfloat16() * self.inv_freq.bfloat16()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    theirs = modeling_llama.LlamaRotaryEmbedding.forward

    def small_positions_right(self, x, position_ids):
        """Where a form is recognised, the angles are exact in bfloat16 too."""
        return (theirs if position_ids.max() < 6 else rough)(self, x, position_ids)

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", small_positions_right)
    found = find_casts(llama_2(), "bfloat16")

    assert policies(found) == ([], [])
    assert found.meaning == "cos and sin as no policy has them, rotation in bfloat16"


def test_no_weight_is_made_that_is_not_needed():
    """The embeddings alone would take 256 GB."""
    config = LlamaConfig(**NARROW | {"hidden_size": 64, "vocab_size": 1_000_000_000, "num_hidden_layers": 3})
    before = config.to_dict()

    assert find_casts(config, "bfloat16").unseen is None
    assert config.to_dict() == before


def test_a_model_that_ignores_the_attention_interface_says_so_and_its_tables_are_still_seen(monkeypatch):
    monkeypatch.setattr(
        modeling_llama.LlamaAttention, "forward", lambda self, hidden_states, **_: (hidden_states, None)
    )
    found = find_casts(llama_2(), "bfloat16")

    assert equal_policies(found.table) == ["model", "bfloat16"]
    assert found.rotation == {}
    assert found.unseen == "TypeError: LlamaForCausalLM ignores transformers' AttentionInterface"
    assert found.meaning == "float32 angles, cos and sin in bfloat16, rotation not known"


def test_a_look_ends_where_it_would_cost_too_much_memory(monkeypatch):
    monkeypatch.setattr(casts, "MOST_BYTES", 100_000)

    assert find_casts(llama_2(), "bfloat16").unseen == (
        "MemoryError: more than 100,000 bytes of weights before the first attention"
    )


def test_the_numbers_of_the_documentation_are_those_of_today():
    table = find_casts(llama_2(), "bfloat16").table
    assert "    ".join(f"{policy} {apart:.1e}" if apart else f"{policy} 0" for policy, apart in table.items()) in str(
        casts.__doc__
    )

    (now,) = describe_rope(llama_2())
    under, _ = compare_methods(now.original, 8.0)
    records = list_pairs(now, under)
    rows = [line.split() for line in str(inspection.__doc__).splitlines() if re.match(r" +\d+ +[\d,.]+ ", line)]
    assert len(rows) == 3
    for pair, wavelength, turns, *shown in rows:
        record = records[int(pair)]
        assert (wavelength, turns) == (f"{record['wavelength_tokens']:,.1f}", f"{record['turns']:.1f}")
        assert shown == [f"{record[method]:.3f}" for method in ("linear", "ntk", "yarn")]


# --- the search ------------------------------------------------------------------------------------------------------


def write_result(path, factors, factor=2.0, length=4096, n_hat=0, attention_factor=1.0):
    SearchResult(
        factors=tuple(factors), n_hat=n_hat, attention_factor=attention_factor, factor=factor,
        original_max_position_embeddings=length, fitness=1.0, fitness_of={},
    ).write(path)  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number}: {number * 7919 % 1000}\n" for number in range(400)))
    return str(path)


def search_arguments(text, *more):
    return "search", "--model", "tiny", "--text", text, "--factor", "2", "--sequences", "2", *TINY_SEARCH, *more


def test_a_search_writes_what_extend_takes_and_is_no_worse_than_its_starts(run, text, tmp_path):
    code, out, err = run(*search_arguments(text, "--short"))
    path = tmp_path / "runs" / "rope-search" / "factors.json"
    found = SearchResult.read(path)
    model = extend(tiny_model("llama", torch.float32, hidden_size=64), "longrope", factors=path)

    assert code == 0
    assert err == f"tiny on 2 sequences of 512 tokens from documents of {text} (bytes)\n"
    assert set(found.fitness_of) == {"linear", "ntk", "yarn"}
    assert found.fitness <= min(found.fitness_of.values())
    assert found.short_factors is not None
    assert model.config.rope_parameters["long_factor"] == list(found.factors)
    for name in ("searched", *found.fitness_of):
        assert f"\n{name} " in out


def test_a_killed_search_resumes_to_the_same_result(run, text, tmp_path, monkeypatch):
    run(*search_arguments(text, "--out", "whole"))
    right, calls = loop.perplexity, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(loop, "perplexity", killed)
    assert run(*search_arguments(text, "--out", "parts"))[0] == 130
    assert not (tmp_path / "parts" / "factors.json").exists()
    monkeypatch.setattr(loop, "perplexity", right)
    code, _, _ = run(*search_arguments(text, "--out", "parts", "--resume"))

    assert code == 0
    whole, parts = (SearchResult.read(tmp_path / name / "factors.json") for name in ("whole", "parts"))
    assert (whole.factors, whole.n_hat, whole.fitness) == (parts.factors, parts.n_hat, parts.fitness)


def test_a_search_that_was_begun_is_not_gone_on_with_unasked(run, text):
    run(*search_arguments(text))
    code, _, err = run(*search_arguments(text))

    assert code == 2
    assert err.startswith(
        "anchor-attn: --out must be without a search that was begun, got 'runs/rope-search/search.json'"
    )


def test_a_search_that_has_nothing_to_resume_says_that_it_begins(run, text):
    code, _, err = run(*search_arguments(text, "--resume"))

    assert code == 0
    assert err.startswith("Nothing to resume in runs/rope-search: the search begins.\n")


def test_a_search_as_json_prints_the_factors_and_nothing_else(run, text, tmp_path):
    code, out, _ = run(*search_arguments(text, "--json", "--no-n-hat"))

    assert (code, out) == (0, (tmp_path / "runs" / "rope-search" / "factors.json").read_text())
    assert json.loads(out)["n_hat"] == 0


def test_a_checkpoint_is_searched_with_the_tokenizer_that_is_named(run, text, tmp_path):
    model = tiny_model("llama", torch.float32, vocab_size=257, max_position_embeddings=64)
    model.save_pretrained(tmp_path / "model")
    arguments = search_arguments(text, "--tokenizer", "bytes")
    code, _, err = run(*(str(tmp_path / "model") if word == "tiny" else word for word in arguments))

    assert code == 0
    assert "2 sequences of 128 tokens" in err


def read_sequences(path, length, count, seed=0):
    return rope_input.read_sequences(str(path), "text", ByteTokenizer(), None, length, count, seed)


def write_documents(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def test_sequences_are_stretches_of_single_documents_where_there_are_enough(tmp_path):
    write_documents(tmp_path / "few.jsonl", ["a" * 25, "b" * 9, "c" * 11])
    found = read_sequences(tmp_path / "few.jsonl", 10, 3)

    assert found.tokens.shape == (3, 10)
    assert [bytes(row).decode() for row in found.tokens.tolist()] == ["a" * 10, "a" * 10, "c" * 10]
    assert "from documents of" in found.described


def test_documents_are_joined_behind_an_anchor_token_where_they_are_too_short(tmp_path):
    write_documents(tmp_path / "short.jsonl", ["ab", "cd", "ef", "gh"])
    found = read_sequences(tmp_path / "short.jsonl", 6, 2)

    assert found.tokens.tolist() == [[256, 97, 98, 256, 99, 100], [256, 101, 102, 256, 103, 104]]
    assert "from joined documents of" in found.described


def test_a_seed_draws_other_sequences(tmp_path):
    write_documents(tmp_path / "long.jsonl", [bytes(range(97, 123)).decode() * 20])
    one, same, two = (read_sequences(tmp_path / "long.jsonl", 15, 3, seed).tokens for seed in (0, 0, 1))

    assert torch.equal(one, same)
    assert not torch.equal(one, two)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "no/such/folder"], r"--model must be llama-2, one of tiny, laptop, small, a config file"),
        (["--model", "broken.json"], r"--model must be llama-2, one of tiny, laptop, small, a config file"),
        (["--model", "gpt2.json"], r"--model must have rotary positions"),
        (["--model", "linear.json"], r"--original-len must be given"),
        (["--factor", "1"], r"--factor must be above 1 and finite, got 1"),
        (["--factor", "nan"], r"--factor must be above 1 and finite, got nan"),
        (["--factor", "inf"], r"--factor must be above 1 and finite, got inf"),
        (["--factor", "many"], r"Invalid value for '--factor'"),
        (["--factor", "2", "--target-len", "8192"], r"--factor or --target-len must be given, got both"),
        (["--target-len", "4096"], r"--target-len must be above the original length of 4096 tokens, got 4096"),
        (["--original-len", "0"], r"--original-len must be"),
        (
            ["--factors", "missing.json"],
            r"--factors must be the factors.json of a search, got 'missing.json' \(No such file",
        ),
        (
            ["--factors", "gpt2.json"],
            r"--factors must be the factors.json of a search, got 'gpt2.json' \(another file\); run anchor",
        ),
        (
            ["--factors", "whole.json", "--factor", "4"],
            r"--factor must be the 2 that the factors were searched for, got 4; leave it out, or run anchor-attn rope "
            r"search --factor 4\.$",
        ),
        (
            ["--factors", "whole.json", "--target-len", "16384"],
            r"--target-len must be the 8,192 tokens that the factors were searched for, got 16,384; leave it out, or",
        ),
        (
            ["--factors", "whole.json", "--original-len", "2048"],
            r"--original-len must be the 4,096 tokens that the factors were searched from, got 2,048; pass --original",
        ),
        (
            ["--factors", "huge.json"],
            r"--factors must be the factors.json of a search, got 'huge.json' \(another",
        ),
        (["--factors", "short.json"], r"--factors must hold a factor for each of 64 pairs, got 3"),
        (["--device", "tpu"], r"--device must be cpu or cuda, got 'tpu'"),
        (["--seed", "-1"], r"--seed must lie between 0 and"),
        (["--out", "gpt2.json"], r"--out must be a folder that can be written"),
        (["nonsense"], r"No such command 'nonsense'"),
        (
            ["--factor", "4", "search"],
            r"--factor must stand behind 'search', got it before; write rope search --factor",
        ),
        (["search"], r"Missing option '--model'"),
        (["search", "--model", "tiny"], r"Missing option '--text'"),
        (SEARCH, r"--factor or --target-len must be given, got none"),
        (
            ["search", "--model", "no/such/folder", "--text", "t.txt", "--factor", "2"],
            r"--model must be one of tiny, laptop",
        ),
        (["search", "--model", "tiny", "--text", "no.txt", "--factor", "2"], r"--text must be 'stdlib'"),
        (
            [*SEARCH, "--factor", "2"],
            r"--text must hold 5 sequences of 512 tokens",
        ),
        ([*SEARCH, "--factor", "1"], r"--factor must be above 1"),
        (
            [*SEARCH, "--factor", "2", "--sequences", "0"],
            r"--sequences must be at",
        ),
        (
            [*SEARCH, "--factor", "2", "--fitness", "bleu"],
            r"--fitness must be perp",
        ),
        ([*SEARCH, "--factor", "2", "--dtype", "int8"], r"--dtype must be one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(run, saved, tmp_path, arguments, said):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "t.txt").write_text("a short text of a few words\n" * 9)
    saved(tiny_config("gpt2"), "gpt2.json")
    saved(
        LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, **NARROW), "linear.json"
    )
    write_result(tmp_path / "short.json", [1.0, 1.5, 2.0])
    write_result(tmp_path / "whole.json", RISING)
    write_result(tmp_path / "huge.json", RISING, factor=0.5)
    code, out, err = run(*arguments)

    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert re.match(f"anchor-attn: {said}", line), line


OPTIONS = ("factor", "factors", "target_len", "original_len", "model", "text")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("factor must be above 1, got 0; pass 8.", "--factor must be above 1, got 0; pass 8."),
        ("factor or target_len must be given; pass factor=8, say.", "--factor or --target-len must be given; pass "
         "--factor 8, say."),
        ("factors[3] must be above 0, got -1; pass more.", "--factors[3] must be above 0, got -1; pass more."),
        ("factors must hold a factor a pair of the model, got text.", "--factors must hold a factor a pair of the "
         "model, got text."),
        ("target_len must be longer; say original_len.", "--target-len must be longer; say --original-len."),
        ("config must be another; pass one.", "--model must be another; pass one."),
        ("every factor must be a number.", "every factor must be a number."),
        ("--factor must stand behind it; write rope search --factor.", "--factor must stand behind it; write rope "
         "search --factor."),
        ("a model without that word", "a model without that word"),
    ],
)  # fmt: skip
def test_an_error_names_options_and_leaves_words_alone(message, said):
    assert by_options(message, [*OPTIONS, "config"]) == said
    assert by_options(said, [*OPTIONS, "config"]) == said


def test_a_command_keeps_the_kind_of_its_errors_and_those_that_name_no_option():
    unread = json.JSONDecodeError("no json", "{", 0)

    @errors_by_options
    def command(error: Exception, seed: int = 0) -> None:
        raise error

    for error, expected in (
        (TypeError("seed must be a number."), TypeError("--seed must be a number.")),
        (ValueError("seed must be above 0."), ValueError("--seed must be above 0.")),
        (FileNotFoundError("seed must be there."), OSError("--seed must be there.")),
        (RuntimeError("seed must be there."), RuntimeError("seed must be there.")),
        (unread, unread),
    ):
        with pytest.raises(type(expected)) as raised:
            command(error)
        assert (type(raised.value), str(raised.value)) == (type(expected), str(expected))


# What huggingface_hub says where there is no network.
ATTEMPTS = (
    "'[Errno -2] Name or service not known' thrown while requesting HEAD https://huggingface.co/a/b/config.json",
    "Retrying in 1s [Retry 1/5].",
)


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers nobody, and the lines that its client has said."""
    logger, lines = logging.getLogger("huggingface_hub.utils._http"), []

    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    def unreachable(*_, **__):
        for line in (*ATTEMPTS, "a warning of the hub"):
            logger.warning(line)
        raise OSError("We couldn't connect")

    handler = Lines()
    logger.addHandler(handler)
    for loader in (AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig):
        name = "get_config_dict" if loader is PreTrainedConfig else "from_pretrained"
        monkeypatch.setattr(loader, name, unreachable)
    yield unreachable, lines
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "some/model"),
        ("search", "--model", "some/model", "--text", "t.txt", "--factor", "2"),
        ("search", "--model", "tiny", "--text", "t.txt", "--factor", "2", "--tokenizer", "some/model"),
    ],
    ids=("config", "model", "tokenizer"),
)
def test_attempts_to_reach_the_hub_are_not_said_but_its_warnings_are(run, hub, tmp_path, arguments):
    unreachable, lines = hub
    (tmp_path / "t.txt").write_text("a short text")
    code, _, err = run(*arguments)

    assert code == 2
    assert "must be" in err.splitlines()[-1]
    assert set(lines) == {"a warning of the hub"}

    lines.clear()  # and outside of the command all is as it was
    with pytest.raises(OSError, match="connect"):
        unreachable()
    assert lines == [*ATTEMPTS, "a warning of the hub"]
