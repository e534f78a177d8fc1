"""Whatever kills a run, and whenever: nothing that was saved is lost, and losses are those of an undisturbed run."""

import errno
import json
import os
import random
import signal
import sys

import pytest
import torch
from train_runs import (
    STEPS,
    assert_nothing_is_lost,
    run_in_child,
    seconds_of,
    steps_of,
    tiny_settings,
    write_corpus,
    write_model_config,
)

from anchor_attn.results import CheckError
from anchor_attn.train.loop import checkpoints as room
from anchor_attn.train.loop import trainer as trainer_room
from anchor_attn.train.loop.checkpoints import MANIFEST, Checkpoints, Progress, check_checkpoint
from anchor_attn.train.loop.disk import locked
from anchor_attn.train.loop.losses import LOSSES, LossLog, read_losses
from anchor_attn.train.loop.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder)
    write_model_config(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    """The steps of an undisturbed run, and its folder."""
    train(tiny_settings(folder), folder / "reference", say=lambda _: None)
    return steps_of(folder / "reference")


class Killed(BaseException):
    """The end of a process, as a test can see it."""


def run_until(folder, out, step, monkeypatch, **changes):
    """A run that dies when a step's line is written; then what it would have said if it went on."""
    append = LossLog.append

    def die(log, record):
        append(log, record)
        if record["step"] == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LossLog, "append", die)
        with pytest.raises(Killed):
            train(tiny_settings(folder, **changes), out, say=lambda _: None)


def resume(folder, out, **changes):
    """Go on; what was said."""
    said = []
    outcome = train(tiny_settings(folder, **changes), out, resume=True, say=said.append)
    assert outcome.step == STEPS
    return said


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, STEPS])
def test_a_run_that_dies_at_a_step_goes_on_with_the_same_losses_to_the_last_bit(
    folder, reference, tmp_path, monkeypatch, step
):
    run_until(folder, tmp_path, step, monkeypatch)
    assert steps_of(tmp_path) == reference[:step]

    said = resume(folder, tmp_path)

    assert steps_of(tmp_path) == reference
    saved = (step - 1) // 3 * 3
    assert ("beginning at step 1" in said[0]) == (saved == 0)
    assert saved == 0 or any(f"going on after step {saved}" in line for line in said)


def test_the_weights_at_the_end_are_the_same_bits_too(folder, reference, tmp_path, monkeypatch):
    run_until(folder, tmp_path, 5, monkeypatch)
    resume(folder, tmp_path)
    ours, theirs = (path / f"checkpoint-{STEPS}" for path in (tmp_path, folder / "reference"))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    state, expected = (torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (ours, theirs))
    assert state.keys() == expected.keys()
    for key, moments in expected.items():
        assert all(torch.equal(state[key][name], value) for name, value in moments.items())


def campaign(folder, out, reference, kills, seconds, seed):
    """Kill runs at drawn moments, each going on where the one before died; how many came to their end."""
    draw = random.Random(seed)
    finished = 0
    for number in range(kills):
        target = out / f"run-{finished}"
        code = run_in_child(folder, target, draw.uniform(0, seconds))
        assert code in (0, -signal.SIGKILL), (number, code)
        if target.is_dir():
            assert_nothing_is_lost(target, reference)
        if code == 0:
            assert steps_of(target) == reference
            finished += 1
    target = out / f"run-{finished}"
    assert run_in_child(folder, target, None) == 0
    assert steps_of(target) == reference
    return finished + 1


def test_kill_9_at_drawn_moments_loses_nothing(folder, reference, tmp_path):
    seconds = seconds_of(folder, tmp_path / "timed")
    campaign(folder, tmp_path, reference, 3, min(seconds, 3), seed=0)


@pytest.mark.slow
def test_kill_9_at_200_drawn_moments_loses_nothing(folder, reference, tmp_path):
    for name in ("first", "timed"):  # the first waits for the server to import
        seconds = seconds_of(folder, tmp_path / name)
    finished = campaign(folder, tmp_path, reference, 200, seconds, seed=1)
    print(f"200 kills over {seconds:.1f} s, {finished} runs finished, all equal", file=sys.stderr)


@pytest.mark.slow
def test_sigterm_saves_and_ends_the_run_and_what_follows_is_the_same(folder, reference, tmp_path):
    out = tmp_path / "run"
    timed = seconds_of(folder, tmp_path / "timed")
    for share in (0.5, 0.7, 0.85):
        if run_in_child(folder, out, share * timed, signal.SIGTERM) != 0:
            continue  # it came before there was anybody to hear it
        steps = len(steps_of(out))
        assert Checkpoints(out).newest() == Progress(steps, steps_of(out)[-1][2] if steps else 0)
    assert run_in_child(folder, out, None) == 0
    assert steps_of(out) == reference


def test_sigterm_in_the_middle_of_a_step_saves_that_step(folder, reference, tmp_path, monkeypatch):
    take = trainer_room.StepMeter.take

    def take_and_be_told(meter, gather, asked):
        if len(steps_of(tmp_path)) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(meter, gather, asked)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_room.StepMeter, "take", take_and_be_told)
        outcome = train(tiny_settings(folder), tmp_path, say=lambda _: None)
    assert (outcome.stopped, outcome.checkpoint) == (True, tmp_path / f"checkpoint-{outcome.step}")
    assert outcome.step in (4, 5)  # in time for this step's log, or for the next one's
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "latest").resolve() == outcome.checkpoint.resolve()
    resume(folder, tmp_path)
    assert steps_of(tmp_path) == reference


def test_a_second_resume_and_one_of_a_finished_run_change_nothing(folder, reference, tmp_path, monkeypatch):
    run_until(folder, tmp_path, 5, monkeypatch)
    with monkeypatch.context() as patch:
        append = LossLog.append

        def die(log, record):
            append(log, record)
            if record["step"] == 8:
                raise Killed

        patch.setattr(LossLog, "append", die)
        with pytest.raises(Killed):
            resume(folder, tmp_path)
    resume(folder, tmp_path)
    assert steps_of(tmp_path) == reference

    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoint-*/*")}
    assert resume(folder, tmp_path)[-1].startswith("nothing left to do")
    assert steps_of(tmp_path) == reference
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoint-*/*")} == files


# --- damaged files ---------------------------------------------------------------------------------------------------


def cut_in_half(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.safetensors", cut_in_half, "model.safetensors has"),
        ("optimizer.pt", cut_in_half, "optimizer.pt has"),
        ("optimizer.pt", flip_a_bit, "optimizer.pt has other content than was written"),
        ("data_state_0.pt", os.unlink, "data_state_0.pt is missing"),
        (MANIFEST, cut_in_half, f"{MANIFEST} does not read"),
        (MANIFEST, os.unlink, f"{MANIFEST} is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line_and_the_one_before_is_used(
    folder, reference, tmp_path, monkeypatch, name, damage, reason
):
    run_until(folder, tmp_path, 8, monkeypatch)
    damage(tmp_path / "checkpoint-6" / name)

    said = resume(folder, tmp_path)

    (line,) = (line for line in said if "cannot be used" in line)
    assert "\n" not in line
    assert reason in line
    assert any("going on after step 3" in line for line in said)
    assert steps_of(tmp_path) == reference
    assert check_checkpoint(tmp_path / f"checkpoint-{STEPS}")[1] is None


def test_a_line_that_a_kill_cut_and_lines_of_steps_done_again_leave_no_trace(folder, reference, tmp_path, monkeypatch):
    run_until(folder, tmp_path, 5, monkeypatch)
    with (tmp_path / LOSSES).open("a") as file:
        file.write('{"step": 6, "loss": 1.2')
    resume(folder, tmp_path)
    assert steps_of(tmp_path) == reference


def test_lines_that_somebody_removed_are_named(folder, reference, tmp_path, monkeypatch):
    run_until(folder, tmp_path, 5, monkeypatch)
    lines = (tmp_path / LOSSES).read_text().splitlines(keepends=True)
    (tmp_path / LOSSES).write_text("".join(lines[2:]))
    assert any("no line for 2 steps, 1 the first" in line for line in resume(folder, tmp_path))
    assert steps_of(tmp_path) == reference[2:]


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["optimizer.pt", MANIFEST, "fsync", "rename"])
def test_a_full_disk_ends_the_run_in_one_line_and_loses_nothing(folder, reference, tmp_path, monkeypatch, where):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def at_step_6(real, named=lambda *_: True):
        def write(*args, **kwargs):
            if len(steps_of(tmp_path)) == 6 and named(*args):
                raise full
            return real(*args, **kwargs)

        return write

    with monkeypatch.context() as patch:
        if where == "optimizer.pt":
            patch.setattr(torch, "save", at_step_6(torch.save, lambda _, path, *__: where in str(path)))
        elif where == MANIFEST:
            path_of = type(tmp_path)
            patch.setattr(path_of, "write_text", at_step_6(path_of.write_text, lambda path, *_: path.name == MANIFEST))
        elif where == "fsync":
            patch.setattr(room, "sync", at_step_6(room.sync))
        else:
            path_of = type(tmp_path)
            patch.setattr(path_of, "rename", at_step_6(path_of.rename))
        with pytest.raises(
            CheckError, match=r"^checkpoint 6 must be written whole, got OSError: .*No space left"
        ) as seen:
            train(tiny_settings(folder), tmp_path, say=lambda _: None)
    assert "checkpoint-3 is as it was" in str(seen.value)
    assert_nothing_is_lost(tmp_path, reference)
    assert Checkpoints(tmp_path).steps() == [3]
    assert not (tmp_path / ".unfinished").exists()
    resume(folder, tmp_path)
    assert steps_of(tmp_path) == reference


def test_a_disk_that_takes_no_line_says_so_in_one_line(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    log = LossLog(tmp_path / LOSSES, {})
    (tmp_path / LOSSES).symlink_to("/dev/full")
    with pytest.raises(CheckError, match=r"^losses.jsonl must take a line a step, got 'No space left on device' at st"):
        log.append({"step": 1, "loss": 1.0})
    log.close()


def test_a_file_size_limit_ends_the_run_and_keeps_the_checkpoint_before(folder, reference, tmp_path):
    """A real refusal of the file system, which torch reports in its own words."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    optimizer_bytes = (folder / "reference" / f"checkpoint-{STEPS}" / "optimizer.pt").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (optimizer_bytes - 4096, hard))
        with pytest.raises(CheckError, match=r"^checkpoint 3 must be written whole, got \w+: .*there is none yet"):
            train(tiny_settings(folder), tmp_path, say=lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert Checkpoints(tmp_path).steps() == []
    resume(folder, tmp_path)
    assert steps_of(tmp_path) == reference


# --- the envelope by itself ------------------------------------------------------------------------------------------


def commit(checkpoints, step, content=b"weights"):
    staged = checkpoints.stage(step)
    (staged / "part").mkdir()
    (staged / "part" / "model").write_bytes(content)
    return checkpoints.commit(Progress(step, 10 * step))


def test_the_newest_k_are_kept_and_latest_names_the_last(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        commit(checkpoints, step)
    assert checkpoints.steps() == [15, 10]
    assert os.readlink(tmp_path / "latest") == "checkpoint-15"
    assert checkpoints.newest() == Progress(15, 150)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-15", "latest"]


def test_steps_are_numbers_not_names(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (9, 10, 100):
        commit(checkpoints, step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    assert checkpoints.steps() == [100, 10, 9]


@pytest.mark.parametrize("dies_at", ["write_text", "rename", "symlink_to", "replace"])
def test_a_death_at_any_point_of_a_commit_leaves_a_sound_latest(tmp_path, monkeypatch, dies_at):
    checkpoints = Checkpoints(tmp_path, keep=1)
    commit(checkpoints, 5)
    path_of = type(tmp_path)

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(path_of, dies_at, die)
        with pytest.raises(Killed):
            commit(checkpoints, 10)
    assert check_checkpoint(tmp_path / "latest")[1] is None
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step in (5, 10)
    checkpoints.clear_unfinished()
    commit(checkpoints, 15)
    assert checkpoints.steps() == [15]


def test_a_checkpoint_that_was_damaged_makes_way_for_the_same_step(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    commit(checkpoints, 5)
    flip_a_bit(tmp_path / "checkpoint-5" / "part" / "model")
    assert checkpoints.newest() is None
    commit(checkpoints, 5)
    assert checkpoints.newest() == Progress(5, 50)


def test_a_manifest_of_another_step_is_not_believed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    commit(checkpoints, 5).rename(tmp_path / "checkpoint-7")
    said = []
    assert checkpoints.newest(said.append) is None
    assert "its manifest names another step" in said[0]


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    alone = pytest.raises(ValueError, match=r"^out must be a folder that no other run writes to")
    with locked(tmp_path, print), alone, locked(tmp_path, print):
        pass
    with locked(tmp_path, print):
        pass


def test_numbers_that_json_lacks_become_null(tmp_path):
    log = LossLog(tmp_path / LOSSES, {"seeds": [0]})
    log.append({"step": 1, "loss": float("nan")})
    log.append({"step": 2, "loss": float("inf")})
    log.close()
    assert [line["loss"] for line in read_losses(tmp_path / LOSSES)] == [None, None]
    assert json.loads((tmp_path / f"{LOSSES}.meta.json").read_text()) == {"seeds": [0]}
