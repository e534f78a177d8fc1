"""`anchor-attn train`: what is typed, what is written, how it ends; in processes of its own, several of them too."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from train_runs import steps_of, write_corpus, write_model_config

from anchor_attn.cli.main import main
from anchor_attn.train.loop.losses import LOSSES, read_losses

COMMAND = [sys.executable, "-m", "anchor_attn.cli", "train"]
# Several processes at once on the machine of the tests: one thread each.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder)
    write_model_config(folder)
    return folder


def write_config(folder, **training):
    """A config file of a run of a second."""
    plain = {"per_device_train_batch_size": 2, "learning_rate": 0.01, "max_steps": 4, "save_steps": 2}
    path = folder / "run.yaml"
    path.write_text(
        f"model: {folder / 'config.json'}\n"
        f"data: {{sources: [{{path: {folder / 'corpus.jsonl'}}}]}}\n"
        f"packing: {{seq_len: 64}}\ntraining: {json.dumps({**plain, **training})}\n"
    )
    return str(path)


@pytest.fixture
def typed(monkeypatch, capsys):
    """Run the command as it is typed: its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["anchor-attn", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


# --- what is typed ---------------------------------------------------------------------------------------------------


def test_options_are_laid_over_the_config_and_the_config_over_its_preset(folder, tmp_path, typed):
    config = write_config(folder)
    code, _, said = typed(config, "--preset", "laptop", "--steps", 3, "--seed", 5, "--out", tmp_path, "--device", "cpu")
    assert code == 0, said
    written = (tmp_path / "config.yaml").read_text()
    for line in ("max_steps: 3", "seed: 5", "save_steps: 2", "weight_decay: 0.1", "seq_len: 64"):
        assert line in written
    assert [line["step"] for line in read_losses(tmp_path / LOSSES)] == [1, 2, 3]


def test_json_is_the_meta_data_and_a_record_a_step(folder, tmp_path, typed):
    code, printed, _ = typed(write_config(folder), "--out", tmp_path, "--json", "--device", "cpu")
    assert code == 0
    result = json.loads(printed)
    assert result["records"] == read_losses(tmp_path / LOSSES)
    assert {"step", "loss", "tokens"} <= result["records"][0].keys()
    assert result["meta"]["device"] == "cpu"


def test_resume_needs_no_config_where_the_folder_has_one(folder, tmp_path, typed):
    config = write_config(folder, lr_scheduler_type="constant")
    assert typed(config, "--out", tmp_path / "a", "--device", "cpu", "--steps", 4)[0] == 0
    assert typed(config, "--out", tmp_path / "b", "--device", "cpu", "--steps", 2)[0] == 0
    code, _, said = typed("--out", tmp_path / "b", "--resume", "--device", "cpu", "--steps", 4)
    assert code == 0, said
    assert "going on after step 2" in said
    assert steps_of(tmp_path / "b") == steps_of(tmp_path / "a")
    code, _, said = typed("--out", tmp_path / "b", "--resume", "--device", "cpu")
    assert (code, "nothing left to do" in said) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "config file must be one that exists, got 'nowhere.yaml'"),
        (["--preset", "big"], "--preset must be one of laptop"),
        (["--steps", "0"], "training.max_steps must be at least 1, got 0"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, tmp_path, typed):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    code, _, error = typed(*arguments, *device, "--out", tmp_path)
    assert code == 2
    assert said in error
    assert error.count("\n") == 1


def test_a_full_disk_is_one_line_and_exit_code_1(folder, tmp_path, typed, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("anchor_attn.train.loop.checkpoints.sync", full)
    code, _, error = typed(write_config(folder), "--out", tmp_path, "--device", "cpu")
    assert code == 1
    assert error.splitlines()[-1].startswith("anchor-attn: checkpoint 2 must be written whole, got OSError")
    assert "Traceback" not in error


# --- signals ---------------------------------------------------------------------------------------------------------


def start(*arguments):
    """The command in a process of its own."""
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def wait_for_line(process, text):
    """What the process has said up to a line that holds a text."""
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return said
    raise AssertionError("".join(said))


@pytest.mark.slow
def test_sigterm_sigint_and_kill_9_end_a_real_command_as_they_should(folder, tmp_path):
    arguments = (write_config(folder, max_steps=400, save_steps=50), "--resume", "--device", "cpu", "--out")
    with start(*arguments, tmp_path / "run") as process:
        wait_for_line(process, "step 30/400")
        process.terminate()
        said = process.stderr.read()
    assert process.returncode == 0
    assert "--resume goes on" in said.splitlines()[-1]

    with start(*arguments, tmp_path / "run") as process:
        wait_for_line(process, "going on after step")
        wait_for_line(process, "step ")
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "anchor-attn: interrupted"
    assert "Traceback" not in said

    with start(*arguments, tmp_path / "run") as process:
        wait_for_line(process, "going on after step")
        wait_for_line(process, "step ")
        process.kill()
    for out in ("run", "undisturbed"):
        with start(*arguments, tmp_path / out) as process:
            said = process.stderr.read()
        assert process.returncode == 0, said
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "undisturbed")


# --- several processes -----------------------------------------------------------------------------------------------


def torchrun(processes, *arguments):
    """The command under torchrun; what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    done = subprocess.run(
        [*launcher, *COMMAND[1:], *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_two_processes_train_on_rows_of_their_own_and_go_on_as_they_stood(folder, tmp_path):
    config = write_config(folder, max_steps=6, save_steps=3, lr_scheduler_type="constant")
    code, said = torchrun(2, config, "--out", tmp_path / "whole", "--device", "cpu")
    assert code == 0, said
    assert "2 processes on cpu, DDP" in said
    assert {"data_state_0.pt", "data_state_1.pt"} <= {path.name for path in (tmp_path / "whole" / "latest").iterdir()}
    whole = read_losses(tmp_path / "whole" / LOSSES)
    assert [line["step"] for line in whole] == [1, 2, 3, 4, 5, 6]

    assert torchrun(2, config, "--out", tmp_path / "two", "--device", "cpu", "--steps", 3)[0] == 0
    code, said = torchrun(2, config, "--out", tmp_path / "two", "--device", "cpu", "--resume")
    assert code == 0, said
    assert steps_of(tmp_path / "two") == steps_of(tmp_path / "whole")

    code, said = torchrun(1, config, "--out", tmp_path / "two", "--device", "cpu", "--resume", "--steps", 9)
    assert code != 0
    assert "processes must be as many as the run began with, 2, got 1" in said


@pytest.mark.slow
def test_fsdp_on_cpus_is_refused_with_its_reason(folder, tmp_path):
    code, said = torchrun(2, write_config(folder, fsdp="full_shard"), "--out", tmp_path, "--device", "cpu")
    assert code != 0
    assert "training.fsdp must have accelerators, got cpu: Accelerate shards nothing there" in said
