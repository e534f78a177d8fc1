"""Result files: a `meta` object that says where numbers come from, and flat records."""

import csv
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("anchor-attn", "torch", "transformers", "datasets", "numpy")


def check_device(device: str) -> None:
    """Raise unless torch has `device` here.

    Raises:
        ValueError: it has not.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that torch has here, got {device!r}; pass --device cpu.") from error


def describe_environment(device: str) -> dict[str, Any]:
    """What a number depends on besides its inputs: versions, machine, threads and the commit of this code."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    _write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    """Write one record a line, and `<name>.meta.json` beside it."""
    _write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
    write_json(path.with_name(path.name + ".meta.json"), meta)


def write_csv(path: Path, records: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    """Write records of the same keys as CSV, and `<name>.meta.json` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    write_json(path.with_name(path.name + ".meta.json"), meta)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout this code runs from, None for an ordinary install."""
    here = Path(__file__).parent
    asked = subprocess.run(
        ["git", "rev-parse", "--show-toplevel", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    top, _, commit = asked.stdout.strip().partition("\n")
    return commit if asked.returncode == 0 and Path(top) == here.parent else None
