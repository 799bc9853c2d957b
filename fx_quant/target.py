"""The machine as data: detected on request, or named, so that every choice can be asked for anywhere."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from packaging.version import Version
from torch.utils._python_dispatch import _disable_current_modes

from fx_quant.errors import unknown_name

_X86 = frozenset({"avx2", "cpp_compiler"})
_X86_VNNI = _X86 | {"avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "exact_int_mm"}

# name -> (platform, arch, features)
_NAMED: Mapping[str, tuple[str, str, frozenset[str]]] = MappingProxyType(
    {
        "sm80": ("cuda", "sm80", frozenset()),
        "sm89": ("cuda", "sm89", frozenset({"float8"})),
        "sm90": ("cuda", "sm90", frozenset({"float8", "tma"})),
        "sm100": ("cuda", "sm100", frozenset({"float8", "tma"})),
        "sm120": ("cuda", "sm120", frozenset({"float8", "tma"})),
        "gfx942": ("rocm", "gfx942", frozenset({"float8_fnuz"})),
        "gfx950": ("rocm", "gfx950", frozenset({"float8"})),
        "x86_vnni": ("cpu", "x86_vnni", _X86_VNNI),
        "x86_amx": ("cpu", "x86_amx", _X86_VNNI | {"amx"}),
        "x86_avx_vnni": ("cpu", "x86_avx_vnni", _X86 | {"avx_vnni", "exact_int_mm"}),
        "x86_avx512": ("cpu", "x86_avx512", _X86 | {"avx512"}),
        "x86": ("cpu", "x86", _X86),
        "arm": ("cpu", "arm", frozenset({"cpp_compiler", "exact_int_mm"})),
    }
)

# Kernel libraries whose presence a requirement may ask for; found by metadata, never imported here.
_PACKAGES = ("torch", "triton", "vllm", "flashinfer-python", "amd-aiter")
# PyTorch's builds for other machines bring Triton under these names.
_ALIASES = MappingProxyType({"triton": ("pytorch-triton-rocm", "triton-rocm", "pytorch-triton")})
# What PyTorch brings along on every GPU, at least: the Triton of torch 2.11.
_BUNDLED_TRITON = "3.6.0"


@dataclass(frozen=True)
class Target:
    """What selection needs to know of a machine.

    Args:
        platform: ``cpu``, ``cuda`` or ``rocm``.
        arch: ``sm90``, ``gfx942``, ``x86_vnni``, ``x86``, ``arm64``, ...
        features: instruction sets and abilities, such as ``avx512_vnni``, ``float8`` or ``exact_int_mm`` (whether
            ``torch._int_mm`` on a CPU keeps every bit of its sums).
        packages: version of each kernel library that is installed there.
    """

    platform: str
    arch: str
    features: frozenset[str] = frozenset()
    packages: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __hash__(self) -> int:
        return hash(
            (
                self.platform,
                self.arch,
                self.features,
                tuple(sorted(self.packages.items())),
            )
        )

    @property
    def capability(self) -> int | None:
        """Compute capability of an NVIDIA GPU (``90`` for ``sm90``), else None."""
        return int(self.arch[2:]) if self.platform == "cuda" else None

    def version(self, package: str) -> Version | None:
        """Version of ``package`` on this machine, or None when it is not installed."""
        found = self.packages.get(package)
        return None if found is None else Version(found)

    def __str__(self) -> str:
        return self.arch


def installed_packages() -> Mapping[str, str]:
    """Versions of the kernel libraries installed here. Nothing is imported."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        for distribution in (name, *_ALIASES.get(name, ())):
            try:
                found[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    # The metadata of a wheel from PyPI says 2.11.0 of what torch itself, and a named target, calls 2.11.0+cu130.
    found["torch"] = torch.__version__
    return MappingProxyType(found)


def named_target(name: str, packages: Mapping[str, str] | None = None) -> Target:
    """The machine called ``name`` (``sm90``, ``x86_vnni``, ...), with the torch installed here unless told.

    A GPU has the Triton that every supported PyTorch brings along there.

    Raises:
        UnknownNameError: ``name`` is not a known target.
    """
    if name not in _NAMED:
        raise unknown_name("target", name, _NAMED)
    platform, arch, features = _NAMED[name]
    if packages is None:
        bundled = {} if platform == "cpu" else {"triton": _BUNDLED_TRITON}
        packages = MappingProxyType({"torch": torch.__version__, **bundled})
    return Target(platform, arch, features, packages)


def named_targets() -> tuple[str, ...]:
    """Names that ``named_target`` knows, in order."""
    return tuple(_NAMED)


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


# Instruction sets by the names of ``torch.cpu.get_capabilities``.
_INSTRUCTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "avx2": ("avx2", "fma3"),
        "avx_vnni": ("avx_vnni",),
        "avx512": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
        "avx512_vbmi": ("avx512_vbmi",),
        "avx512_vnni": ("avx512_vnni",),
        "avx512_bf16": ("avx512_bf16",),
        "amx": ("amx_tile", "amx_int8", "amx_bf16"),
    }
)
# Of the machine's own, what is left where ATEN_CPU_CAPABILITY holds PyTorch back; Inductor follows it.
_LEFT: Mapping[str, frozenset[str]] = MappingProxyType(
    {"AVX512": frozenset(_INSTRUCTIONS), "AVX2": frozenset({"avx2", "avx_vnni"})}
)


def cpu_features() -> frozenset[str]:
    """Instruction sets of this machine's CPU that PyTorch is let use, such as ``avx512_vnni``.

    Linux lets a process use the tiles of AMX when it asks, which is done here.
    """
    has = torch.cpu.get_capabilities()
    left = _LEFT.get(torch.backends.cpu.get_cpu_capability(), frozenset())
    found = {name for name, needed in _INSTRUCTIONS.items() if name in left and all(map(has.get, needed))}
    return frozenset(found if "amx" not in found or torch.cpu._init_amx() else found - {"amx"})


@functools.cache
def int_mm_is_exact() -> bool:
    """Whether ``torch._int_mm`` sums products of codes without saturating: oneDNN does not, before VNNI.

    It pairs products in 16 bits there. A probe also knows what ``ONEDNN_MAX_CPU_ISA`` says.
    """
    with _disable_current_modes():
        codes = torch.full((1, 64), 127, dtype=torch.int8)
        return bool((torch._int_mm(codes, codes.repeat(64, 1).t()) == 127 * 127 * 64).all())


def _x86_arch(features: frozenset[str]) -> str:
    if "amx" in features:
        return "x86_amx"
    names = (("avx512_vnni", "x86_vnni"), ("avx_vnni", "x86_avx_vnni"), ("avx512", "x86_avx512"))
    return next((name for feature, name in names if feature in features), "x86")


def resolve_target(target: Target | str | None, device: torch.device | str = "cpu") -> Target:
    """``target`` as a ``Target``: itself, looked up by name, or detected for ``device`` when None."""
    if target is None:
        return detect_target(device)
    return named_target(target) if isinstance(target, str) else target
