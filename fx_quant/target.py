"""The machine as data, so that every choice can be asked for anywhere; and what this CPU has."""

from __future__ import annotations

import functools
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

# What machines are sold as.
_SOLD_AS: Mapping[str, str] = MappingProxyType(
    {
        "a100": "sm80",
        "l4": "sm89",
        "l40s": "sm89",
        "rtx4090": "sm89",
        "h100": "sm90",
        "h200": "sm90",
        "b200": "sm100",
        "rtx5090": "sm120",
        "mi300x": "gfx942",
        "mi350x": "gfx950",
        "mi355x": "gfx950",
        "icelake": "x86_vnni",
        "zen4": "x86_vnni",
        "zen5": "x86_vnni",
        "spr": "x86_amx",
        "gnr": "x86_amx",
        "zen3": "x86",
        "graviton": "arm",
    }
)

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


def named_target(name: str, packages: Mapping[str, str] | None = None) -> Target:
    """The machine called ``name`` (``sm90``, ``x86_vnni``, ``h100``, ...), with the torch installed here unless told.

    A GPU has the Triton that every supported PyTorch brings along there.

    Raises:
        UnknownNameError: ``name`` is not a known target.
    """
    known = _SOLD_AS.get(name.lower(), name)
    if known not in _NAMED:
        raise unknown_name("target", name, [*_NAMED, *_SOLD_AS])
    platform, arch, features = _NAMED[known]
    if packages is None:
        bundled = {} if platform == "cpu" else {"triton": _BUNDLED_TRITON}
        packages = MappingProxyType({"torch": torch.__version__, **bundled})
    return Target(platform, arch, features, packages)


def named_targets() -> tuple[str, ...]:
    """Names that ``named_target`` knows, in order."""
    return tuple(_NAMED)


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
