"""One launch of a Triton kernel as data: planned anywhere, run on a GPU or compiled for one that is not here."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tiles that share their operands through the L2 cache, counted along m.
TILES_M = 8


@dataclass(frozen=True)
class Configuration:
    """Which kernel computes a matmul, in tiles of which size, with which resources.

    Args:
        form: the kernel: ``tile`` (portable, any strides), ``persistent`` (tiles loaded by TMA, one program a
            processor), ``swapped`` (the weight's rows are the rows of the tensor cores, for few rows of ``a``) or
            ``weight_only`` (a packed weight, decoded in registers).
        block_m: rows of ``a`` in a tile.
        block_n: columns of ``b`` in a tile.
        block_k: products that are summed in one step.
        warps: warps of a program, before those that warp specialization adds.
        stages: depth of the software pipeline.
        split_k: programs that share one tile's sum along k.
        warp_specialized: loads and products have warps of their own.
        flattened: the epilogue of one tile overlaps the loads of the next.
    """

    form: str
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1
    warp_specialized: bool = False
    flattened: bool = False

    def tiles(self, m: int, n: int) -> int:
        """Tiles of a result ``[m, n]``."""
        return -(-m // self.block_m) * -(-n // self.block_n)

    @property
    def blocks(self) -> dict[str, int]:
        """The sizes of a tile as every kernel takes them."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler."""
        # Fused, the epilogue's product and sum would be rounded once, where the canonical op rounds twice.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}

    def __str__(self) -> str:
        """Such as ``persistent 128x256x128 w4 s3 WS``."""
        words = [f"{self.form} {self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages}"]
        words += [f"split {self.split_k}"] if self.split_k > 1 else []
        words += ["WS"] if self.warp_specialized else []
        words += ["flat"] if self.flattened else []
        return " ".join(words)


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, as data: so that it can also be compiled for a GPU that is not here.

    Args:
        kernel: the ``@triton.jit`` function.
        arguments: its arguments by name, constants and tensor descriptors included.
        options: options of the compiler (``num_warps``, ``num_stages``, ...).
        programs: size of the grid.
        out: the result, which is also among the arguments.
        configuration: what it was planned from, or None.
        scratch: the kernel makes tensor descriptors itself, in memory that Triton asks for.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    programs: int
    out: Tensor
    configuration: Configuration | None = None
    scratch: bool = False

    def run(self) -> Tensor:
        """Launch on the result's device; nothing is launched for an empty result."""
        if self.programs and self.scratch:
            # Whoever calls us keeps the allocator that they gave Triton.
            contextvars.copy_context().run(self._launch_with_scratch)
        elif self.programs:
            self._launch()
        return self.out

    def _launch_with_scratch(self) -> None:
        from triton import set_allocator  # pyrefly: ignore[missing-import]

        set_allocator(lambda size, alignment, stream: self.out.new_empty(size, dtype=torch.int8))
        self._launch()

    def _launch(self) -> None:
        # Triton launches on the current device, whatever the tensors' own is.
        with torch.cuda.device_of(self.out):
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def interprets() -> bool:
    """Whether Triton is replaced by its interpreter, which runs kernels on tensors of a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs(x: Tensor) -> bool:
    """Whether Triton can run on this tensor's device."""
    return x.is_cuda or interprets()
