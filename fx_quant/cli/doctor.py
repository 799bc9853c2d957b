"""``doctor``: what runs on this machine, what is missing, and how to get it; the verdict first."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from dataclasses import dataclass

import torch

import fx_quant
from fx_quant.cli.catalogue import catalogue
from fx_quant.compat import cpp_compiler, inductor_cache
from fx_quant.diagnose.support import Support, support_matrix
from fx_quant.kernels.machine import detect_target
from fx_quant.kernels.registry import kernels
from fx_quant.reasons import COMPILER, Kind
from fx_quant.report import Block, Entries, Reported, Table
from fx_quant.scheme import short_scheme
from fx_quant.target import Target

# Beside those that kernels ask for: what quantizes models, and what loads them.
_LIBRARIES = ("torchao", "transformers", "compressed-tensors", "optimum-quanto", "bitsandbytes", "safetensors")
# What multiplies in floating point what it decoded: all that there is where no kernel is.
_FALLBACK = "pytorch_dequantized"


@dataclass(frozen=True, repr=False)
class Doctor(Reported):
    """What a machine has.

    Args:
        target: the machine.
        support: what each scheme gets here.
        facts: by name, what this is and which versions there are.
        missing: what is not there, and how to get it.
        everything: whether to list every kernel.
    """

    target: Target
    support: tuple[Support, ...]
    facts: dict[str, str]
    missing: tuple[str, ...]
    everything: bool

    @property
    def fused(self) -> int:
        """How many schemes a fused kernel runs."""
        return sum(each.kernel is not None and not each.kernel.startswith(_FALLBACK) for each in self.support)

    @property
    def is_ready(self) -> bool:
        """Whether this machine is fit to run quantized models fast: a GPU, or a CPU with a C++ compiler."""
        return bool(self.fused) and (self.target.platform != "cpu" or COMPILER in self.target.features)

    def summary(self) -> str:
        """One line: whether this machine is fit, and for how much."""
        ready = "ready" if self.is_ready else "not ready"
        missing = len(self.missing)
        lacks = f", {missing} thing{'s' * (missing > 1)} could be better" if missing else ", nothing is missing"
        return f"{ready}: fused kernels run {self.fused} of {len(self.support)} schemes on {self.target}{lacks}"

    def blocks(self, *, wide: bool) -> list[Block]:
        """What is missing, then what is there."""
        blocks: list[Block] = [Entries("missing", self.missing)] if self.missing else []
        by_kernel: dict[str, list[str]] = {}
        for each in self.support:
            by_kernel.setdefault(each.kernel or "no kernel", []).append(short_scheme(each.scheme))
        rows = tuple((kernel, "; ".join(schemes)) for kernel, schemes in by_kernel.items())
        blocks += [Table(("kernel", "runs here"), rows), Table(("this machine", ""), tuple(self.facts.items()))]
        return [*blocks, catalogue(self.target)] if self.everything else blocks

    def to_dict(self) -> dict[str, object]:
        """Everything as plain data."""
        return {
            "summary": self.summary(),
            "target": str(self.target),
            "facts": self.facts,
            "missing": list(self.missing),
            "schemes": {each.scheme: each.kernel for each in self.support},
        }


def run(arguments: argparse.Namespace) -> int:
    """Print what this machine has; 1 where it is not fit to run quantized models fast."""
    target = detect_target("cuda" if torch.cuda.is_available() else "cpu")
    report = Doctor(target, tuple(support_matrix(target)), _facts(target), tuple(_missing(target)), arguments.all)
    print(report.to_json() if arguments.json else report.to_text(wide=arguments.wide))
    return 0 if report.is_ready else 1


def _facts(target: Target) -> dict[str, str]:
    device = torch.cuda.get_device_name() if target.platform != "cpu" else _processor()
    return {
        "machine": f"{device}, {target.platform}, {target.arch}",
        "features": ", ".join(sorted(target.features)) or "none",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "fx_quant": fx_quant.__version__,
        "python": platform.python_version(),
        **{name: version for name in (*sorted(target.packages), *_LIBRARIES) if (version := _version(name))},
        "C++ compiler": _compiler(),
        "compiled graphs": inductor_cache(),
        "measured plans": _plans(),
    }


def _version(name: str) -> str:
    if name == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _compiler() -> str:
    path = cpp_compiler()
    if path is None:
        return "none"
    try:
        said = subprocess.run([path, "--version"], check=False, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return f"{path}, which does not answer"
    return f"{path}: {(said.splitlines() or ['no version'])[0]}"


def _plans() -> str:
    from fx_quant.kernels.cpu import plans

    machine = plans.this_machine()
    return str(plans.PLANS.path(machine)) if plans.tuned_tables() else "none, the defaults are in force"


def _missing(target: Target) -> list[str]:
    """What is not there and would let more kernels run, each with how to get it."""
    packages: dict[str, list[str]] = {}
    for kernel in kernels():
        unmet = kernel.requires.unmet_by_target(target)
        if unmet and all(each.kind is Kind.PACKAGE for each in unmet):
            packages.setdefault(unmet[0].name, []).append(kernel.name)
    found = [f"{name}: pip install {name} (for {', '.join(names)})" for name, names in packages.items()]
    if cpp_compiler() is None:
        found.insert(0, "a C++ compiler: install g++ or clang++, or set CXX; without it no graph compiles on a CPU")
    if target.platform == "cpu" and not _version("torchao"):
        found.append("torchao: pip install torchao (to quantize models; compressed-tensors loads quantized ones)")
    return found
