"""The portable form where there are no tensor descriptors: what is shipped for many rows, by cross-compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fx_quant.kernels.triton.architectures import architecture
from fx_quant.kernels.triton.operands import ScaledOperands, scaled_operands
from fx_quant.kernels.triton.tile import CONFIGURATIONS, plan_scaled_mm, unfit
from tests.cross_compile import compile_launch
from tests.triton_interpreter import compiler_is_real, every_variant, needs_triton

BF16, I8, I32 = torch.bfloat16, torch.int8, torch.int32
E4M3, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
M, N, K = 4096, 4096, 4096

SHIPPED = [
    (name, recipe_name, found)
    for name, recipes in CONFIGURATIONS.items()
    for recipe_name, configurations in recipes.items()
    for found in configurations
]
# Its int8 is that of sm80.
COMPILED = [asked for asked in SHIPPED if asked[:2] != ("sm89", "int8")]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def operands(name: str, recipe_name: str) -> ScaledOperands:
    """Operands of a recipe, with all that the epilogue may have to hold."""
    dtype = I8 if recipe_name == "int8" else FNUZ if name == "gfx942" else E4M3
    a, b, bias = meta(M, K, dtype=dtype), meta(N, K, dtype=dtype).t(), meta(N, dtype=BF16)
    if recipe_name in ("float8_block", "float8_group"):
        rows = 128 if recipe_name == "float8_block" else 1
        return scaled_operands(a, b, meta(32, M).t(), meta(N // rows, 32), bias, N, BF16, block=[rows, 128])
    sums = {"a_zero_point": meta(M, 1, dtype=I32), "b_sum": meta(N, dtype=I32)} if dtype is I8 else {}
    return scaled_operands(a, b, meta(M, 1), meta(N), bias, N, BF16, **sums)


@every_variant
@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize(("name", "recipe_name", "found"), COMPILED, ids=str)
def test_what_is_shipped_compiles_well(name, recipe_name, found):
    on, asked = architecture(name), operands(name, recipe_name)
    assert asked.recipe == recipe_name
    assert unfit(asked, found, on) is None
    binary = compile_launch(plan_scaled_mm(asked, found, on), on)
    assert not binary.spilled
    assert binary.shared <= on.shared_bytes
    kind = "i8" if recipe_name == "int8" else "float8"
    if on.platform == "cuda":
        assert binary.instructions["IMMA" if kind == "i8" else "QMMA"]
        assert not binary.instructions["HMMA"]
    else:
        endings = {"i8": "i8", "float8": "f8f6f4" if name == "gfx950" else "fp8_fp8"}
        used = {instruction for instruction in binary.instructions if "mfma" in instruction}
        assert used
        assert all(instruction.endswith(endings[kind]) for instruction in used), used


def test_float8_is_unfit_for_a_gpu_without_it():
    asked, found = operands("sm89", "float8"), CONFIGURATIONS["sm89"]["float8"][0]
    reason = "needs int8 on sm80, which has no float8, got torch.float8_e4m3fn"
    assert unfit(asked, found, architecture("sm80")) == reason
    assert unfit(asked, found, architecture("sm89")) is None


@pytest.mark.parametrize(("name", "recipe_name", "found"), SHIPPED, ids=str)
def test_its_operands_fit(name, recipe_name, found):
    assert unfit(operands(name, recipe_name), found, architecture(name)) is None
