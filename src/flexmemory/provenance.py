"""Where a number comes from: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from flexmemory import __version__


def provenance() -> dict[str, str]:
    """Hardware and versions, and the commit where the package runs from its repository (`+` marks changes)."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "flexmemory": __version__,
        "commit": _commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "gpu": ", ".join(gpus) or "none",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    repository = Path(__file__).parents[2]
    if not (repository / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is missing, or refuses the folder
        return "unknown"
