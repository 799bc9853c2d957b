"""When, where and of what a page was made that a command writes."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def made_with(*packages: str) -> str:
    """The date, this machine, and the versions of Python, PyTorch, ``packages`` that are installed, and fx_quant."""
    versions = [f"{name} {version}" for name in packages if (version := _version(name))]
    return ", ".join(
        [
            datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d"),
            _machine(),
            f"Python {platform.python_version()}",
            f"PyTorch {torch.__version__}",
            *versions,
            f"fx_quant {_version('fx-quant')} at {_commit()}",
        ]
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _machine() -> str:
    names = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name} with {os.cpu_count()} cores, {platform.system()}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return found.stdout.strip() or "no commit"
