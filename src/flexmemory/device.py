"""Which device to work on, and how much of it is free."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from pathlib import Path

import torch


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the GPU where there is one.

    Raises:
        ValueError: it is neither a CPU nor a CUDA device of this machine.
    """
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    full = {"auto": known[:2][-1], "cuda": "cuda:0"}.get(name, name)
    if full not in known:
        raise ValueError(f"there is no device {name!r} here, only {', '.join(known)}")
    return torch.device(full)


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors on `device` may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux, or a very old one
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has had in use on `device` so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_rate(device: torch.device, *, bf16: bool) -> float:
    """Floating-point operations a second of a large matrix product, measured now: the ceiling that MFU refers to."""
    size, repeats = (8192, 8) if device.type == "cuda" else (1024, 3)
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds)
