"""Which device to work on, and how much of it is free."""

from __future__ import annotations

import os
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
