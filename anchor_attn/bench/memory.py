"""What memory a device has left, and what a call takes at its peak."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Peak:
    """The most bytes of tensors that were held at once besides those held before; None where it was not measured."""

    tensor_bytes: int | None = None


@contextmanager
def measure_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of what runs inside; not for what is timed.

    On CUDA it is the allocator's own. On the CPU it is the running sum of what torch's allocator reports to the
    profiler, buffers inside kernels included; what a kernel allocates past it is not seen.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.tensor_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    # The profiler's library reads this once, and writes lines of its own to stderr without it.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profiled:
        yield peak
    held = most = 0
    recorded: Any = profiled.kineto_results
    for event in sorted((e for e in recorded.events() if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    peak.tensor_bytes = most


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the machine does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def release(device: torch.device) -> None:
    """Give the device's cached memory back, so that one rival's leavings are not the next one's fragments."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
