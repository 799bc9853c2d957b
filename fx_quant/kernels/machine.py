"""This machine as a target: its CPU or GPU, and the libraries of registered kernels that are installed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from types import MappingProxyType

import torch

from fx_quant.kernels.registry import required_packages
from fx_quant.target import Target, cpu_features, int_mm_is_exact, named_target

# PyTorch's builds for other machines bring Triton under these names.
_ALIASES = MappingProxyType({"triton": ("pytorch-triton-rocm", "triton-rocm", "pytorch-triton")})


def detect_target(device: torch.device | str = "cpu") -> Target:
    """The machine that tensors on ``device`` run on, as it is now."""
    device = torch.device(device)
    packages = installed_packages()
    if device.type == "cuda":
        if torch.version.hip:
            arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
            return Target("rocm", arch, _rocm_features(arch), packages)
        major, minor = torch.cuda.get_device_capability(device)
        return capability_target(major * 10 + minor)
    return Target("cpu", *_cpu_arch(), packages)


def resolve_target(target: Target | str | None, device: torch.device | str = "cpu") -> Target:
    """``target`` as a ``Target``: itself, looked up by name, or detected for ``device`` when None."""
    if target is None:
        return detect_target(device)
    return named_target(target) if isinstance(target, str) else target


def capability_target(capability: int) -> Target:
    """The NVIDIA GPU of compute capability ``capability`` (``90`` is sm90), with the packages installed here.

    Raises:
        ValueError: no GPU has such a capability.
    """
    if capability < 10:
        raise ValueError(f"a compute capability must be major * 10 + minor, such as 90 for sm90, got {capability}")
    features = {"float8"} if capability >= 89 else set()
    features |= {"tma"} if capability >= 90 else set()
    return Target("cuda", f"sm{capability}", frozenset(features), installed_packages())


def installed_packages() -> Mapping[str, str]:
    """Versions of ``torch`` and of each installed library that a registered kernel requires; none is imported."""
    installed: dict[str, str] = {}
    for name in sorted(required_packages()):
        for distribution in (name, *_ALIASES.get(name, ())):
            try:
                installed[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    # The metadata of a wheel from PyPI says 2.11.0 of what torch itself, and a named target, calls 2.11.0+cu130.
    installed["torch"] = torch.__version__
    return MappingProxyType(installed)


def _rocm_features(arch: str) -> frozenset[str]:
    """gfx940 to gfx942 have float8 codes without a negative zero, gfx950 and gfx12 those of OCP, older ones none."""
    if arch.startswith("gfx94"):
        return frozenset({"float8_fnuz"})
    return frozenset({"float8"}) if arch.startswith(("gfx95", "gfx12")) else frozenset()


def _cpu_arch() -> tuple[str, frozenset[str]]:
    import platform

    machine = platform.machine().lower()
    compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl")
    always = frozenset({"cpp_compiler"} if any(map(shutil.which, filter(None, compilers))) else ())
    always |= {"exact_int_mm"} if int_mm_is_exact() else set()
    if machine not in ("x86_64", "amd64"):
        return ("arm" if machine in ("aarch64", "arm64") else machine), always
    features = cpu_features()
    return _x86_arch(features), features | always


def _x86_arch(features: frozenset[str]) -> str:
    if "amx" in features:
        return "x86_amx"
    names = (("avx512_vnni", "x86_vnni"), ("avx_vnni", "x86_avx_vnni"), ("avx512", "x86_avx512"))
    return next((name for feature, name in names if feature in features), "x86")
