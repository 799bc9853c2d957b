"""GPUs as data: what a kernel may use there, and how fast it can be at best."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from fx_quant.errors import unknown_name


@dataclass(frozen=True)
class Architecture:
    """A kind of GPU. Rates are what well-written kernels reach, not those of the data sheet.

    Args:
        name: ``sm90``, ``gfx942``, ...
        device: the GPU that processors and rates are of.
        platform: ``cuda`` or ``rocm``.
        processors: streaming multiprocessors, or compute units.
        shared_bytes: shared memory that one program may have.
        float8, int8, half: operations a second of products of these codes; 0 where tensor cores have none.
        bandwidth: bytes a second from the GPU's memory.
        tma: whether tiles can be loaded by tensor descriptors.
    """

    name: str
    device: str
    platform: str
    processors: int
    shared_bytes: int
    float8: float
    int8: float
    half: float
    bandwidth: float
    tma: bool = False

    @property
    def capability(self) -> int | None:
        """Compute capability of an NVIDIA GPU (``90`` for ``sm90``), else None."""
        return int(self.name[2:]) if self.platform == "cuda" else None

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return 64 if self.platform == "rocm" else 32

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of products of this dtype; that of half precision where it has to be widened."""
        if dtype in (torch.int8, torch.uint8):
            return self.int8 or self.half
        return (self.float8 or self.half) if dtype.itemsize == 1 else self.half


# 0.8 of the data sheet for products and 0.9 for bandwidth, except on sm90: there, float8 is what the best published
# matmuls reach (1,424 to 1,520 TFLOP/s, github.com/sgl-project/sglang/issues/34318), and the rest was measured.
_TERA = 1e12
_ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        found.name: found
        for found in (
            Architecture("sm80", "A100 SXM", "cuda", 108, 163 * 1024, 0.0, 499 * _TERA, 250 * _TERA, 1.83 * _TERA),
            Architecture("sm89", "L40S", "cuda", 142, 99 * 1024, 586 * _TERA, 586 * _TERA, 290 * _TERA, 0.78 * _TERA),
            Architecture(
                "sm90", "H100 SXM", "cuda", 132, 227 * 1024, 1500 * _TERA, 1500 * _TERA, 798 * _TERA, 3.0 * _TERA, True
            ),
            Architecture(
                "sm100", "B200", "cuda", 148, 227 * 1024, 3600 * _TERA, 3600 * _TERA, 1800 * _TERA, 7.2 * _TERA, True
            ),
            Architecture(
                "sm120", "RTX 5090", "cuda", 170, 99 * 1024, 335 * _TERA, 670 * _TERA, 167 * _TERA, 1.6 * _TERA, True
            ),
            Architecture(
                "gfx942", "MI300X", "rocm", 304, 64 * 1024, 2090 * _TERA, 2090 * _TERA, 1046 * _TERA, 4.8 * _TERA
            ),
            Architecture(
                "gfx950", "MI355X", "rocm", 256, 160 * 1024, 4000 * _TERA, 4000 * _TERA, 2000 * _TERA, 7.2 * _TERA
            ),
        )
    }
)


def architecture(name: str) -> Architecture:
    """The architecture called ``name``.

    Raises:
        UnknownNameError: no architecture has that name.
    """
    if name not in _ARCHITECTURES:
        raise unknown_name("GPU architecture", name, _ARCHITECTURES)
    return _ARCHITECTURES[name]


def architectures() -> tuple[Architecture, ...]:
    """All that are known."""
    return tuple(_ARCHITECTURES.values())


@functools.cache
def architecture_of(device: torch.device) -> Architecture:
    """That of a GPU of this machine, with its own number of processors; of the nearest older kind when it is unknown.

    A tensor on a CPU, which Triton's interpreter may run on, is treated as one of an H100.
    """
    if device.type != "cuda":
        return architecture("sm90")
    from dataclasses import replace

    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        found = architecture("gfx950" if properties.gcnArchName.startswith("gfx95") else "gfx942")
    else:
        capability = properties.major * 10 + properties.minor
        known = [found for found in architectures() if found.capability is not None and found.capability <= capability]
        found = max(known or [architecture("sm80")], key=lambda found: found.capability or 0)
    return replace(found, processors=properties.multi_processor_count)
