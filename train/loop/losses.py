"""losses.jsonl: a line a step, without a gap or a repeat, however often the run was killed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anchor_attn.results import CheckError, finite, write_json
from anchor_attn.train.loop.disk import write_text

LOSSES = "losses.jsonl"


class LossLog:
    """The file of a run's steps.

        {"step": 1, "loss": 5.62, "tokens": 4095, …}

    A line is written when its step is done, and is on the disk before a checkpoint of that step is.

    Args:
        path: of the file; its folder exists.
        meta: written beside it, as `<name>.meta.json`.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any]) -> None:
        self.path = path
        write_json(path.with_name(path.name + ".meta.json"), meta)
        self._file: Any = None

    def go_on_after(self, step: int) -> list[int]:
        """Drop the lines behind a step, which is about to be done again.

        Returns:
            Steps up to this one that have no line: none, unless somebody else wrote to the file.
        """
        lines = {line["step"]: line for line in read_losses(self.path) if line["step"] <= step}
        text = "".join(json.dumps(lines[number]) + "\n" for number in sorted(lines))
        write_text(self.path, text)
        return [number for number in range(1, step + 1) if number not in lines]

    def append(self, record: Mapping[str, Any]) -> None:
        """Write the line of a step.

        Raises:
            CheckError: the disk does not take it.
        """
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)  # a kill loses no line that was written
            line = json.dumps(finite(record), allow_nan=False).encode() + b"\n"
            while line:  # a disk that fills up takes a part first, and raises then
                line = line[self._file.write(line) :]
        except OSError as error:
            raise CheckError(
                f"{self.path.name} must take a line a step, got {error.strerror!r} at step {record['step']}; "
                f"free space in {str(self.path.parent)!r}, and pass --resume."
            ) from error

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_losses(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a losses.jsonl, none where there is no file; a line cut by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
