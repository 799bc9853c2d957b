"""Operands as third-party matmuls take them: dense, in whole blocks, with scales of the shapes that they read."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.errors import FxQuantError
from fx_quant.scheme import Granularity

BLOCK = 128
# A group of the activation and a block of the weight, as every library that knows blocks has them.
BLOCK_SCALES = frozenset({(Granularity.per_group(BLOCK), Granularity.per_block(BLOCK, BLOCK))})


def vllm_op(namespace: str, name: str) -> torch._ops.OpOverload:
    """The op ``<namespace>::<name>`` of vLLM's compiled library, which is imported when it was not yet.

    Raises:
        FxQuantError: this build of vLLM has no such op.
    """
    ops = getattr(torch.ops, namespace)
    cause = None
    for module in ("vllm._custom_ops", f"vllm.{namespace}"):
        if hasattr(ops, name):
            break
        try:
            importlib.import_module(module)
        except ImportError as error:
            cause = error
    if not hasattr(ops, name):
        raise FxQuantError(
            f"vLLM's op library must have {namespace}::{name}, and the one of this environment has not: install a "
            "build of vLLM for this GPU, or disable this provider with FX_QUANT_DISABLED_KERNELS"
        ) from cause
    return getattr(ops, name).default


def scalar_type(bits: int, bias: int) -> int:
    """The id, to vLLM, of unsigned integers of ``bits`` that stand for ``code - bias`` (``csrc/core/scalar_type.hpp``).

    Fields from the lowest bit: 8 of exponent, 8 of mantissa, the sign, 32 of bias, "finite only", and 8 of how NaN is
    written, 1 where the type says nothing of it.
    """
    return bits << 8 | bias << 17 | 1 << 50


def dense(x: Tensor) -> Tensor:
    """``x [rows, columns]`` row by row without gaps, at an address that is a multiple of 16, copied only if it is not.

    The strides are ``(columns, 1)`` even where a dimension has one element, as kernels read them and do not ask.
    """
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    return x.as_strided(x.shape, (x.shape[1], 1))


def one_or_each(scale: Tensor | None, sizes: tuple[int, int], like: Tensor) -> Tensor:
    """A scale as contiguous float32, reshaped to ``sizes``; a missing scale is one element that is 1."""
    if scale is None:
        return like.new_ones((1, 1), dtype=torch.float32)
    return scale.float().reshape(sizes).contiguous()


def whole_blocks(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``a [m, k]`` and ``b [k, n]`` with zero codes up to the end of the last block along k."""
    missing = -a.shape[1] % BLOCK
    if not missing:
        return a, b
    return F.pad(a, (0, missing)), F.pad(b.t(), (0, missing)).t()


def add_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """``out [m, n] + bias [n]``, added in float32 after ``out`` was rounded and rounded once more."""
    return out if bias is None else (out.float() + bias).to(out.dtype)
