"""Files that are on the disk when a call returns, and a folder that one process alone writes to."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all, on the disk when this returns."""
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a run's folder for one process: two that write to it would ruin each other's checkpoints.

    Raises:
        ValueError: another process holds it.
    """
    import fcntl

    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out must be a folder that no other run writes to, got {str(folder)!r}, in which one runs; "
                "wait for it, or name another."
            ) from None
        except OSError as error:  # some network file systems have no locks
            say(f"{folder} cannot be locked ({error.strerror}): see that no other run writes to it")
        yield
