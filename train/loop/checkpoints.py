"""Checkpoints that are whole or not there, the last of them under the name `latest`.

    DIR/.unfinished/checkpoint-20     written, listed in its manifest, flushed to the disk
    DIR/checkpoint-20                 by one rename
    DIR/latest -> checkpoint-20       by another

Whatever kills the process, and whenever: what is under a visible name was complete when it got it. What a disk or a
copy does to it later the manifest tells, by size and checksum of every file (CRC-32, at about the speed of a disk).
"""

import json
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from anchor_attn.train.loop.disk import sync

MANIFEST = "anchor_attn.json"
UNFINISHED = ".unfinished"
LATEST = "latest"
FORMAT = "anchor_attn checkpoint 1"
CHUNK_BYTES = 2**22

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Progress:
    """How far a run is, as a checkpoint's manifest says it.

    Attributes:
        step: optimizer steps.
        tokens: document tokens of all ranks so far.
        world_size: processes.
    """

    step: int
    tokens: int = 0
    world_size: int = 1


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run.
        keep: how many of the newest stay; all when None.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"save_total_limit must be at least 1, got {keep}; leave it out to keep all.")
        self.folder = folder
        self.keep = keep
        self.unfinished = folder / UNFINISHED

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, newest first; whether it is sound is another question."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"checkpoint-{step}"

    def clear_unfinished(self) -> None:
        """Remove what a killed process left half-written, or half-deleted."""
        if self.unfinished.exists():
            shutil.rmtree(self.unfinished)

    def stage(self, step: int) -> Path:
        """An empty hidden folder to write the checkpoint of a step into."""
        self.clear_unfinished()
        staged = self.unfinished / self.path(step).name
        staged.mkdir(parents=True)
        return staged

    def commit(self, progress: Progress) -> Path:
        """Make the staged checkpoint of a step a visible one, the latest, and let go of the oldest.

        Raises:
            OSError: the disk does not take it; what was visible stays as it was.
        """
        staged, final = self.unfinished / self.path(progress.step).name, self.path(progress.step)
        files = {name: describe_file(staged / name) for name in _files(staged)}
        manifest = {"format": FORMAT, **asdict(progress), "files": files}
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync_tree(staged)
        if final.exists():  # not sound, or the run would have gone on from it
            final.rename(self.unfinished / f"replaced-{final.name}")
        staged.rename(final)
        sync(self.folder)
        self._point_latest(final)
        for step in self.steps()[self.keep :] if self.keep is not None else []:
            if step < progress.step:
                # By way of the hidden folder: a half-deleted checkpoint is not a visible one.
                self.path(step).rename(self.unfinished / f"old-{step}")
        self.clear_unfinished()
        return final

    def _point_latest(self, target: Path) -> None:
        link = self.folder / f".{LATEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.folder / LATEST)
        sync(self.folder)

    def newest(self, say: Callable[[str], None] = lambda _: None) -> Progress | None:
        """How far the newest sound checkpoint is; None where there is none. What is wrong with newer ones is said."""
        for step in self.steps():
            progress, fault = check_checkpoint(self.path(step))
            if progress is not None and progress.step == step:
                return progress
            reason = fault or "its manifest names another step"
            say(f"{self.path(step)} cannot be used: {reason}; taking the one before")
        return None


def check_checkpoint(path: Path) -> tuple[Progress | None, str | None]:
    """What a checkpoint's manifest says, or what is wrong with it: "optimizer.pt has 10 of 4,096 bytes"."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return None, f"{MANIFEST} is of the format {manifest['format']!r}"
        progress = Progress(**{name: int(manifest[name]) for name in ("step", "tokens", "world_size")})
        files: Mapping[str, Mapping[str, int]] = manifest["files"]
    except FileNotFoundError:
        return None, f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{MANIFEST} does not read ({type(error).__name__})"
    for name, expected in files.items():
        try:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return None, f"{name} has {size:,} of {expected['bytes']:,} bytes"
            if describe_file(path / name)["crc32"] != expected["crc32"]:
                return None, f"{name} has other content than was written"
        except FileNotFoundError:
            return None, f"{name} is missing"
        except OSError as error:
            return None, f"{name} does not read ({error.strerror})"
    return progress, None


def describe_file(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            crc, size = zlib.crc32(data, crc), size + len(data)
    return {"bytes": size, "crc32": crc}


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)
