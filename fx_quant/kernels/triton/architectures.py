"""GPUs as data: what a kernel may use there, and how fast it can be at best."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
        shared_bandwidth, cache_bandwidth: the same of all shared memories, and of the second-level cache.
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
    shared_bandwidth: float
    cache_bandwidth: float
    tma: bool = False

    @property
    def capability(self) -> int | None:
        """Compute capability of an NVIDIA GPU (``90`` for ``sm90``), else None."""
        return int(self.name[2:]) if self.platform == "cuda" else None

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of products of this dtype; that of half precision where it has to be widened."""
        if dtype in (torch.int8, torch.uint8):
            return self.int8 or self.half
        return (self.float8 or self.half) if dtype.itemsize == 1 else self.half


# 0.8 of the data sheet for products and 0.9 for bandwidth, except on sm90: float8 is what the best published matmuls
# reach (1,424 to 1,520 TFLOP/s, github.com/sgl-project/sglang/issues/34318), and int8 is taken to be as fast; half and
# bandwidth were measured. Caches:
# what a published matmul of 128 x 256 tiles reads on sm90 (1,214 TFLOP/s of 4096 x 4096 x 4096,
# github.com/meta-pytorch/tritonbench/issues/1149), and on the others as much a processor and cycle.
def _architecture(
    name: str,
    device: str,
    processors: int,
    shared: int,
    clock: float,
    tera: tuple[float, float, float],
    bandwidth: float,
    *,
    tma: bool = False,
) -> Architecture:
    """Shared memory in KiB, the clock in GHz, rates of float8, int8 and half in TFLOP/s, bandwidth in TB/s."""
    cycles = processors * clock * 1e9
    return Architecture(
        name=name,
        device=device,
        platform="cuda" if name.startswith("sm") else "rocm",
        processors=processors,
        shared_bytes=shared * 1024,
        float8=tera[0] * 1e12,
        int8=tera[1] * 1e12,
        half=tera[2] * 1e12,
        bandwidth=bandwidth * 1e12,
        shared_bandwidth=128 * cycles,
        cache_bandwidth=33 * cycles,
        tma=tma,
    )


_ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            _architecture("sm80", "A100 SXM", 108, 163, 1.41, (0, 499, 250), 1.83),
            _architecture("sm89", "L40S", 142, 99, 2.5, (586, 586, 290), 0.78),
            _architecture("sm90", "H100 SXM", 132, 227, 1.755, (1500, 1500, 798), 3.0, tma=True),
            _architecture("sm100", "B200", 148, 227, 1.85, (3600, 3600, 1800), 7.2, tma=True),
            _architecture("sm120", "RTX 5090", 170, 99, 2.4, (335, 670, 167), 1.6, tma=True),
            _architecture("gfx942", "MI300X", 304, 64, 2.1, (2090, 2090, 1046), 4.8),
            _architecture("gfx950", "MI355X", 256, 160, 2.4, (4000, 4000, 2000), 7.2),
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
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        gpu = architecture("gfx950" if properties.gcnArchName.startswith("gfx95") else "gfx942")
    else:
        capability = properties.major * 10 + properties.minor
        known = [gpu for gpu in architectures() if gpu.capability is not None and gpu.capability <= capability]
        gpu = max(known or [architecture("sm80")], key=lambda gpu: gpu.capability or 0)
    return replace(gpu, processors=properties.multi_processor_count)
