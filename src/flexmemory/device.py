"""Which device to work on."""

from __future__ import annotations

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
