"""Tensor descriptors, by which TMA loads tiles of a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fx_quant.kernels.triton.architectures import Architecture

# What a descriptor's address and the distance between its rows must be multiples of.
_ALIGNED_BYTES = 16


def undescribed(matrices: Mapping[str, Tensor], architecture: Architecture) -> str | None:
    """Why no descriptors describe these matrices ``[rows, k]`` of bytes there, in a line, or None."""
    if not architecture.tma:
        return f"needs tensor descriptors (TMA), which {architecture.name} does not have; use the tile form"
    for name, codes in matrices.items():
        if not codes.shape[1]:
            return "needs k >= 1, got 0; use the tile form"
        if codes.stride(1) != 1 or codes.stride(0) <= 0 or codes.stride(0) % _ALIGNED_BYTES:
            return (
                f"needs {name} with k contiguous and rows a multiple of {_ALIGNED_BYTES} bytes apart, "
                f"got strides {list(codes.stride())}; pad k"
            )
        if codes.data_ptr() % _ALIGNED_BYTES:
            return f"needs {name} aligned to {_ALIGNED_BYTES} bytes, got {codes.data_ptr():#x}; copy it"
    return None


def described(matrix: Tensor, rows: int, columns: int) -> Any:
    """The descriptor of ``matrix`` for tiles of ``rows`` and ``columns``."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # pyrefly: ignore[missing-import]

    # A descriptor of no rows is an error, even where nothing is launched.
    sizes = [max(matrix.shape[0], 1), matrix.shape[1]]
    return TensorDescriptor(matrix, sizes, list(matrix.stride()), [rows, columns])
