"""What a benchmark's figures depend on: the processor, the threads and the versions."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch


def machine(*packages: str) -> dict[str, Any]:
    """The machine as JSON holds it; ``packages`` are named beside torch and fx-quant where they are installed."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in ("torch", *packages, "fx-quant") if (version := _version(name))},
    }


def described(where: dict[str, Any]) -> str:
    """``machine()`` in two lines."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['cpu']}, {where['capability']}, {where['threads']} threads, Python {where['python']}\n{versions}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the option ``--threads``, which sets how many threads torch has."""
    parser.add_argument("--threads", type=_set_threads, help="threads of torch (default: torch's own choice)")


def _set_threads(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {count}")
    torch.set_num_threads(count)
    return count
