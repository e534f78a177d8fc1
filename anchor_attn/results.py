"""Result files: a `meta` object that says where numbers come from, and flat records."""

import csv
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("anchor-attn", "torch", "transformers", "datasets", "numpy")


class CheckError(RuntimeError):
    """A check of ours that did not hold: the command line ends with exit code 1."""


def check_device(device: str) -> None:
    """Raise unless `device` is "cpu", or "cuda" where there is one.

    Raises:
        ValueError: another name, or no CUDA device.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}; choose a GPU with CUDA_VISIBLE_DEVICES.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that torch has here, got 'cuda' without a CUDA device; pass --device cpu.")


def check_seed(seed: int) -> None:
    """Raise a ValueError unless numpy and torch both take the seed."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie between 0 and 2**32 - 1, got {seed}; pass 0, say.")


def check_folder(folder: Path) -> None:
    """Make a folder for results, before hours of work whose results could not be written.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder / "probe", "")
        (folder / "probe").unlink()
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be written, got {str(folder)!r} ({error.strerror}); name another."
        ) from error


def describe_environment(device: str) -> dict[str, Any]:
    """What a number depends on besides its inputs: versions, machine, threads and the commit of this code."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all; numbers that are not finite become null."""
    _write_text(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    """Write one record a line, and `<name>.meta.json` beside it."""
    _write_text(path, "".join(json.dumps(finite(record), allow_nan=False) + "\n" for record in records))
    write_json(path.with_name(path.name + ".meta.json"), meta)


def write_csv(path: Path, records: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    """Write records of the same keys as CSV, and `<name>.meta.json` beside it."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    _write_text(path, text.getvalue())
    write_json(path.with_name(path.name + ".meta.json"), meta)


def finite(content: Any) -> Any:
    """The same content, None for every float that JSON cannot write: a run that diverged is still a result."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _version(package: str) -> str | None:
    """None for a package that is not installed: what a benchmark does not need may be missing on its machine."""
    if package == "torch":
        return str(torch.__version__)  # with its build, 2.11.0+cu130, which not every wheel's metadata has
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout this code runs from, "-dirty" behind it if changed; None for an ordinary install."""
    here = Path(__file__).resolve().parent

    def ask(*question: str) -> str:
        return subprocess.run(["git", *question], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")) != here.parent:
            return None
        return ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
