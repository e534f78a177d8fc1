"""The config of a training run: every key known, every value of its type, read back as it was written."""

from dataclasses import replace

import pytest

from anchor_attn.train.loop.recipes import RECIPES, find_recipe
from anchor_attn.train.loop.settings import (
    REFUSED,
    Settings,
    describe_at,
    first_difference,
    settings_from,
    training_hints,
)
from anchor_attn.train.loop.settings_file import flat, merged, read_yaml, write_yaml


def read(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return settings_from(read_yaml(path))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_is_read_back_as_it_was_written(name, tmp_path):
    settings = settings_from(find_recipe(name))
    assert read(write_yaml(settings), tmp_path) == settings
    assert first_difference(settings, read(write_yaml(settings), tmp_path)) is None


@pytest.mark.parametrize("number", ["2e-5", "2.e-5", "0.00002", "2E-05", "+2e-5"])
def test_a_number_with_an_exponent_is_a_number(number, tmp_path):
    assert read(f"training: {{learning_rate: {number}}}", tmp_path).training["learning_rate"] == 2e-5


def test_an_empty_file_is_the_defaults(tmp_path):
    assert read("", tmp_path) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", r"^config file must be a mapping of names to values, got list"),
        ("model: [", r"^config file must be YAML"),
        ("pattern: full\npattern: anchor", r"^config file must be YAML, .*'pattern' twice"),
        ("paking: {}", r"^paking must be a known key, got one that is not; did you mean packing\?"),
        ("packing: {seqlen: 4}", r"^packing\.seqlen must be a known key, .* did you mean seq_len\?"),
        (
            "training: {learning_rat: 1}",
            r"^training\.learning_rat must be .* did you mean learning_rate\?",
        ),
        ("data: {sources: [{path: a, wieght: 2}]}", r"^data\.sources\[0\]\.wieght must be .* did you mean weight\?"),
        ("zzz: 1", r"^zzz must be a known key, got one that is not; known are model, scratch"),
        ("pattern: causal", r"^pattern must be one of \('full', 'intra_doc', 'anchor'\), got 'causal'"),
        ("positions: 1", r"^positions must be one of \('continuous', 'reset'\), got 1"),
        ("engine: flash", r"^engine must be"),
        ("rope: fp32", r"^rope must be one of"),
        ("dtype: float16", r"^dtype must be one of \('float32', 'bfloat16'\), got 'float16'"),
        ("parallel: rows", r"^parallel must be one of \('data', 'document', 'ulysses'\), got 'rows'"),
        ("parallel: document\npattern: full", r"^pattern must keep documents to themselves .* pass scheme='ulysses'"),
        ("ranks_a_row: 2", r"^ranks_a_row must be left out where parallel is 'data', got 2; set parallel: document"),
        ("parallel: ulysses\nranks_a_row: 1", r"^ranks_a_row must be at least 2, got 1"),
        ("data: {sources: []}", r"^data\.sources must name at least one"),
        ("extension: {factor: 2}", r"^extension must have a method, got \['factor'\]"),
        ("rows_per_step: 0", r"^rows_per_step must be at least 1"),
        ("rows_per_step: 8\ntraining: {gradient_accumulation_steps: 2}", r"^rows_per_step must stand alone"),
        ("training: {output_dir: x}", r"^training\.output_dir must be left out, got 'x'; pass --out"),
        ("training: {eval_strategy: steps}", r"^training\.eval_strategy must be left out"),
        ("training: {remove_unused_columns: true}", r"^training\.remove_unused_columns must be False, got True; leave"),
        ("training: {average_tokens_across_devices: false}", r"^training\.average_tokens_across_devices must be True"),
        ("training: {save_strategy: epoch}", r"^training\.save_strategy must be steps or no"),
        ("training: {gradient_accumulation_steps: 0}", r"^training\.gradient_accumulation_steps must be at least 1"),
        ("training: {per_device_train_batch_size: 0}", r"^training\.per_device_train_batch_size must be at least 1"),
        ("training: {save_steps: 0.1}", r"^training\.save_steps must be a whole number of steps, got 0\.1"),
    ],
)
def test_what_no_run_could_use_is_refused_by_its_key(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("packing: 4", r"^packing must be a mapping, got 4"),
        ("packing: {seq_len: long}", r"^packing\.seq_len must be int, got 'long'"),
        ("packing: {seq_len: true}", r"^packing\.seq_len must be int, got True"),
        ("data: {sources: {path: a}}", r"^data\.sources must be a list"),
        ("data: {sources: [{weight: heavy}]}", r"^data\.sources\[0\]\.weight must be float, got 'heavy'"),
        ("router_weight: a", r"^router_weight must be float or nothing, got 'a'"),
        ("scratch: 1", r"^scratch must be bool, got 1"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(text, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        read(text, tmp_path)


def test_every_argument_that_is_refused_or_free_is_one_of_trainers():
    from anchor_attn.train.loop.settings import FREE, SET_BY_US

    names = {*training_hints()}
    # local_rank, trackio_space_id and project came and went between releases.
    optional = {"local_rank", "trackio_space_id", "project", "enable_jit_checkpoint", "parallelism_config"}
    assert {*REFUSED, *SET_BY_US, *(name.removeprefix("training.") for name in FREE)} - names <= optional


def test_whole_numbers_are_taken_where_fractions_may_stand(tmp_path):
    settings = read("data: {sources: [{path: a, weight: 3}]}", tmp_path)
    assert settings.data.sources[0].weight == 3.0
    assert type(settings.data.sources[0].weight) is float


# --- merging, comparing ----------------------------------------------------------------------------------------------


def test_what_is_laid_over_a_config_changes_its_own_keys_alone():
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]}
    assert merged(base, {"a": {"c": {"d": 3}}, "e": [5]}) == {"a": {"b": 1, "c": {"d": 3}}, "e": [5]}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]}
    assert flat(base) == {"a.b": 1, "a.c.d": 2, "e[0]": 1, "e[1]": 2}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"pattern": "full"}, "pattern"),
        ({"packing": {"seq_len": 8}}, "packing.seq_len"),
        ({"data": {"sources": [{"path": "other"}]}}, "data.sources[0].path"),
        ({"data": {"sources": [{}, {}]}}, "data.sources[1].bad_records"),
        ({"training": {"learning_rate": 1.0}}, "training.learning_rate"),
        ({"training": {"max_steps": 7}}, "training.max_steps"),
        ({"extension": {"method": "default", "theta": 1e6}}, "extension.method"),
        ({"training": {"save_steps": 7, "logging_steps": 3, "save_total_limit": 9, "report_to": "none"}}, None),
    ],
)
def test_the_first_key_that_a_resumed_run_changes_is_named(changes, key):
    before = settings_from({})
    assert first_difference(settings_from(changes), before) == key
    assert first_difference(before, settings_from(changes)) == key


def test_a_run_is_made_longer_only_where_its_learning_rate_does_not_look_ahead():
    def settings(steps, schedule):
        return replace(Settings(), training={"max_steps": steps, "lr_scheduler_type": schedule})

    assert first_difference(settings(20, "constant"), settings(10, "constant")) is None
    assert first_difference(settings(20, "cosine"), settings(10, "cosine")) == "training.max_steps"
    assert describe_at(settings(20, "cosine"), "training.max_steps") == "20"
    assert describe_at(settings(20, "cosine"), "training.seed") == "its default"


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "theta"), [("16k", 1e6), ("64k", 5e6), ("128k", 1e7)])
def test_the_papers_recipes_are_the_papers(name, theta):
    settings = settings_from(find_recipe(f"llama-2-7b-{name}"))
    seq_len = 1024 * int(name.removesuffix("k"))
    assert settings.extension == {"method": "default", "theta": theta, "target_len": seq_len}
    assert settings.packing.seq_len == seq_len
    assert (settings.rows_per_step, settings.pattern, settings.positions) == (8, "anchor", "continuous")
    expected = {"max_steps": 2000, "learning_rate": 2e-5, "lr_scheduler_type": "constant", "weight_decay": 0.1}
    assert expected.items() <= settings.training.items()
    assert (settings.training["adam_beta1"], settings.training["adam_beta2"]) == (0.9, 0.95)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^preset must be one of laptop, llama-2-7b-16k, .*, got 'lap'"):
        find_recipe("lap")
