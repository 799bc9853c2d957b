"""torchao's catalogue beside ``torchao_flows``: each configuration in its granularities, mappings, bits and packings.

``tests/test_dialects.py`` holds that no configuration and no packing format of the torchao that is installed is left out.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.dialects.registry import flow
from tests.dialects.torchao_flows import NEEDS, linear, quantized

_NAMESPACES = (
    "torchao.prototype.quantization.quant_api",
    "torchao.prototype.quantization.int4.inference_workflow",
    "torchao.prototype.quantization.gguf.api",
    "torchao.prototype.quantization.codebook_groupwise.api",
    "torchao.prototype.quantization.codebook.codebook_quantized_tensor",
    "torchao.prototype.float8_opaque_tensor.inference_workflow",
    "torchao.prototype.quantized_training.bitnet",
    "torchao.prototype.quantized_training.int8",
    "torchao.prototype.parq.quant.config_torchao",
    "torchao.sparsity.sparse_api",
    "torchao.quantization.quantize_.workflows",
    "torchao.quantization.quantize_.common",
    "torchao.quantization.granularity",
    "torchao.quantization.qat",
    "torchao.quantization",
)

# What a row is, is what is evaluated: each is an expression of torchao's own names.
REWRITTEN = {
    "i8wo_g32": "Int8WeightOnlyConfig(granularity=PerGroup(32))",
    "i8wo_g128": "Int8WeightOnlyConfig(granularity=PerGroup(128))",
    "i8da_i8w_row_pt": "Int8DynamicActivationInt8WeightConfig(granularity=[PerRow(), PerTensor()])",
    "i8da_i8w_pt_row": "Int8DynamicActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()])",
    "i8da_i8w_asym": "Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYMMETRIC)",
    "i8da_i8w_pt_asym": "Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYMMETRIC, granularity=PerTensor())",
    "i8da_i8w_row_pt_asym": "Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYMMETRIC, granularity=[PerRow(), PerTensor()])",
    "i8da_i8w_pt_row_asym": "Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYMMETRIC, granularity=[PerTensor(), PerRow()])",
    "i8da_i8w_7bit": "Int8DynamicActivationInt8WeightConfig(reduce_range=True)",
    "f8wo_g32": "Float8WeightOnlyConfig(granularity=PerGroup(32))",
    "f8wo_e5m2": "Float8WeightOnlyConfig(weight_dtype=float8_e5m2)",
    "f8da_e5m2_pt": "Float8DynamicActivationFloat8WeightConfig(activation_dtype=float8_e5m2)",
    "f8da_f8w_e5m2_pt": "Float8DynamicActivationFloat8WeightConfig(weight_dtype=float8_e5m2)",
    "f8da_pad": "Float8DynamicActivationFloat8WeightConfig(mm_config=Float8MMConfig(pad_inner_dim=True))",
    "f8da_slow_accum": "Float8DynamicActivationFloat8WeightConfig(kernel_preference=KernelPreference.TORCH, mm_config=Float8MMConfig(use_fast_accum=False))",
    **{
        f"intxwo{bits}_g32": f"IntxWeightOnlyConfig(weight_dtype=int{bits}, granularity=PerGroup(32))"
        for bits in (1, 2, 3, 5, 6, 7, 8)
    },
    "intxwo4_row": "IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerAxis(0))",
    "intxwo4_asym": "IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(64), mapping_type=ASYMMETRIC)",
    "intxwo4_row_asym": "IntxWeightOnlyConfig(weight_dtype=int4, mapping_type=ASYMMETRIC)",
    "intxwo4_no_clip": "IntxWeightOnlyConfig(weight_dtype=int4, mapping_type=SYMMETRIC_NO_CLIPPING_ERR)",
    "intxwo4_hqq": "IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32), intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY)",
    "intxwo4_scale_bf16": "IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32), scale_dtype=torch.bfloat16)",
    **{
        f"i8da_intx{bits}": f"Int8DynamicActivationIntxWeightConfig(weight_dtype=int{bits}, weight_granularity=PerGroup(32))"
        for bits in (1, 2, 3, 5, 6, 7, 8)
    },
    "i8da_intx4_row": "Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=PerAxis(0))",
    "i8da_intx8_row": "Int8DynamicActivationIntxWeightConfig(weight_granularity=PerAxis(0))",
    "i8da_intx4_asym": "Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_mapping_type=ASYMMETRIC)",
    "i8da_intx4_no_clip": "Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_mapping_type=SYMMETRIC_NO_CLIPPING_ERR)",
    "i8da_intx4_hqq": "Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY)",
    "i8da_intx4_scale_bf16": "Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_scale_dtype=torch.bfloat16)",
    "i8da_stretched2": "StretchedIntxWeightConfig(b=2, quant_min=-2, quant_max=1)",
    "stretched3_g32": "StretchedIntxWeightConfig(b=3, quant_min=-4, quant_max=3, granularity=PerGroup(32), activation_quantization=None)",
    "bitnet_training": "BitNetTrainingConfig()",
    "i8_training": "Int8WeightOnlyQuantizedTrainingConfig()",
}
BF16_ROWS = {
    "f8da_row_bounds": "Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), activation_value_lb=0.1, activation_value_ub=2.0)",
    "f8da_row_e5m2": "Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), activation_dtype=float8_e5m2, weight_dtype=float8_e5m2)",
}
# A static scale has the activation's rank.
STATIC = {
    "i8sa_i8w_asym": "Int8StaticActivationInt8WeightConfig(act_quant_scale=full((1, 1, 1), 0.03), act_quant_zero_point=full((1, 1, 1), 3, dtype=int8), granularity=[PerTensor(), PerRow()], act_mapping_type=ASYMMETRIC)",
    "i8sa_i8w_pt": "Int8StaticActivationInt8WeightConfig(act_quant_scale=full((1, 1, 1), 0.03), granularity=PerTensor())",
    "f8sa_f8w_out": "Float8StaticActivationFloat8WeightConfig(act_quant_scale=full((1, 1, 1), 0.01), granularity=PerTensor(), quantize_and_dequantize_output=True, output_act_quant_scale=full((1, 1, 1), 0.02))",
}
_MSLK = "the weight is packed by mslk or fbgemm, which a CPU does not have"
_EXTENSION = "an op of torchao's C++ extension, which its wheels do not have"
_TABLE = "codes index a table of values"
UNSUPPORTED = {
    "f8da_sparse_2d": (
        "Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), packing_format=Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA)",
        "a GPU's 2:4 sparsity",
    ),
    "f8da_sparse_1d": (
        "Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor(), packing_format=Float8PackingFormat.SPARSE_1D_DATA_1D_METADATA)",
        "a GPU's 2:4 sparsity",
    ),
    "i4wo_preshuffled": ("Int4WeightOnlyConfig(int4_packing_format=Int4PackingFormat.PRESHUFFLED)", _MSLK),
    "i4wo_int32": (
        "Int4WeightOnlyConfig(int4_packing_format=Int4PackingFormat.PLAIN_INT32)",
        "the weight is packed on an XPU or NPU only",
    ),
    "i4wo_tile_hqq": (
        "Int4WeightOnlyConfig(int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D, int4_choose_qparams_algorithm=Int4ChooseQParamsAlgorithm.HQQ)",
        "the weight is packed by a CUDA kernel",
    ),
    "f8da_i4w": ("Float8DynamicActivationInt4WeightConfig()", _MSLK),
    "i8da_intx4_aten": (
        "Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, intx_packing_format=IntxPackingFormat.OPAQUE_ATEN_KLEIDIAI)",
        "an op for Arm only",
    ),
    **{
        f"i8da_intx4_{packing}": (
            f"Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, intx_packing_format=IntxPackingFormat.OPAQUE_TORCHAO_{packing.upper()})",
            _EXTENSION,
        )
        for packing in ("auto", "kleidiai", "lowbit")
    },
    "i4wo_cpu_hqq": (
        "PrototypeInt4WeightOnlyConfig(group_size=64, int4_choose_qparams_algorithm=Int4ChooseQParamsAlgorithm.HQQ)",
        "aten._weight_int4pack_mm_for_cpu is a kernel of its own",
    ),
    "uintxwo4": ("UIntxWeightOnlyConfig()", "gemlite's Triton kernels over its own layout"),
    "i8da_uintx4": ("Int8DynamicActivationUIntxWeightConfig()", "gemlite's Triton kernels over its own layout"),
    "f8_opaque": ("Float8DynamicActivationFloat8WeightOpaqueTensorConfig(granularity=PerRow())", _EXTENSION),
    "lut_groups": ("GroupwiseLutWeightConfig()", _TABLE),
    "codebook": ("CodebookWeightOnlyConfig()", _TABLE),
    "block_sparse": ("BlockSparseWeightConfig()", "a sparse float weight, no codes"),
    "semi_sparse": ("SemiSparseWeightConfig()", "a GPU's 2:4 sparsity"),
}


def _configuration(expression: str) -> Any:
    """``expression`` in torchao's names, those of PyTorch and the ways to map values to codes."""
    names: dict[str, Any] = {}
    for module in (*_NAMESPACES, "torch"):
        names |= vars(importlib.import_module(module))
    return eval(expression, names | names["MappingType"].__members__)


def _build(expression: str, dtype: torch.dtype, bias: bool) -> nn.Module:
    return quantized(nn.Sequential(linear(dtype, bias)).eval(), _configuration(expression))


def _row(name: str, expression: str, **fields: Any) -> None:
    flow(f"torchao_{name}", what=expression, **{"needs": NEEDS, **fields})(partial(_build, expression))


for _name, _expression in REWRITTEN.items():
    _row(_name, _expression)
for _name, _expression in BF16_ROWS.items():
    _row(_name, _expression, dtypes=(torch.bfloat16,))
for _name, _expression in STATIC.items():
    _row(_name, _expression, only=lambda variant: variant.ndim == 3)
for _name, (_expression, _why) in UNSUPPORTED.items():
    _row(_name, _expression, expected="unsupported", why=_why)
# It keeps floats that no step rounds, and is no quantization.
_row("gguf", "GGUFWeightOnlyConfig()", matmuls=0)


def _of_qat(expression: str, step: str, dtype: torch.dtype, bias: bool) -> nn.Module:
    """A linear prepared for training with fake quantization, and where ``step`` is ``convert`` quantized after it."""
    from torchao.quantization.qat import QATConfig

    model = quantized(nn.Sequential(linear(dtype, bias)), QATConfig(_configuration(expression), step="prepare")).eval()
    return model if step == "prepare" else quantized(model, QATConfig(_configuration(expression), step="convert"))


_FAKE = "fake quantization before it is converted: its codes are floating point"
QAT = {
    "i8da_intx4": "Int8DynamicActivationIntxWeightConfig(weight_dtype=int4)",
    "intxwo4": "IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32))",
    "i4wo": "Int4WeightOnlyConfig(group_size=32)",
    "f8da_i4w": "Float8DynamicActivationInt4WeightConfig()",
}
for _name, _expression in QAT.items():
    _build_qat = partial(_of_qat, _expression, "prepare")
    _what = f"QATConfig({_expression}, step='prepare') in eval mode"
    flow(f"torchao_qat_{_name}", needs=NEEDS, expected="unsupported", why=_FAKE, what=_what)(_build_qat)
for _name, _expression, _step in (
    ("f8da", "Float8DynamicActivationFloat8WeightConfig()", "prepare"),
    ("i8da_intx4_converted", QAT["i8da_intx4"], "convert"),
    ("intxwo4_converted", QAT["intxwo4"], "convert"),
):
    _what = f"QATConfig({_expression}, step={_step!r}) in eval mode"
    flow(f"torchao_qat_{_name}", needs=NEEDS, what=_what)(partial(_of_qat, _expression, _step))


@flow("torchao_i8da_i4w_quantizer", needs=NEEDS)
def int8_dynamic_int4_quantizer(dtype: torch.dtype, bias: bool) -> nn.Module:
    """Int8DynActInt4WeightQuantizer, groups of 32 (a module of its own)"""
    from torchao.quantization import Int8DynActInt4WeightQuantizer

    return (
        Int8DynActInt4WeightQuantizer(groupsize=32, precision=dtype).quantize(nn.Sequential(linear(dtype, bias))).eval()
    )
