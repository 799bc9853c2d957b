"""What a GPU's tuner found, kept for that GPU, its driver, PyTorch, Triton and the sources of the kernels."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fx_quant.compat import cuda_driver
from fx_quant.kernels.triton.launch import Configuration
from fx_quant.tuning.saved import Store

# Those that a case may have, as ``scaled_mm.py`` plans them.
_FORMS = ("persistent", "swapped", "tile")


@dataclass(frozen=True)
class Gpu:
    """What a measurement holds for.

    Args:
        device: name of the GPU.
        driver: version of its driver, as CUDA numbers it.
        torch, triton: versions.
        sources: hash of the kernels and of what plans their launches.
    """

    device: str
    driver: int
    torch: str
    triton: str
    sources: str


def this_gpu(device: torch.device) -> Gpu:
    """The GPU ``device`` of this machine."""
    return Gpu(
        torch.cuda.get_device_name(device),
        cuda_driver(),
        torch.__version__,
        importlib.metadata.version("triton"),
        _sources(),
    )


@functools.cache
def _sources() -> str:
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(package.glob("*.py")), *sorted(package.glob("source/*.py"))):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _configuration(values: Mapping[str, Any]) -> Configuration:
    """That of ``values``, where a kernel could be launched with it; that it fits an operand is asked of its form."""
    found = Configuration(**values)
    sizes = (found.block_m, found.block_n, found.block_k, found.warps, found.stages, found.split_k)
    powers = (*zip(sizes, (1024, 1024, 4096, 32), strict=False),)
    holds = (
        found.form in _FORMS
        and all(type(size) is int and 1 <= size <= 4096 for size in sizes)
        and all(size & (size - 1) == 0 and size <= most for size, most in powers)
        and all(type(flag) is bool for flag in (found.warp_specialized, found.flattened))
    )
    if not holds:
        raise ValueError(f"no kernel can take {found!r}")
    return found


CONFIGURATIONS = Store(
    "configurations",
    "sources of Triton kernels",
    "python -m fx_quant tune --device cuda",
    this_gpu,
    dataclasses.asdict,
    _configuration,
)


def measured(device: torch.device) -> Mapping[str, Configuration]:
    """What was found for ``device``, by case; nothing for a device that is no GPU. Read once per process."""
    return CONFIGURATIONS.in_force(device) if device.type == "cuda" else MappingProxyType({})
