"""The ways of ONNX Runtime and OpenVINO to run a quantized linear on a CPU: our codes, in graphs built by hand.

Both take float32 activations. Their packages are optional: a way whose package is absent raises ImportError, which the
table shows as what it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from cpu_cases import KINDS, STATIC_LIMIT, Case, Operands
from cpu_peers import Call, Way
from torch import Tensor

from fx_quant.scheme import INT4_DTYPES

MOST_BLOCK = 128  # of MatMulNBits: a longer run of codes that share a scale is given it once for each 128


def _as_is(case: Case, state: Call, x: Tensor) -> Call:
    return state


def _nibble_zero_points(each: Operands) -> Tensor:
    """``[n, groups]``, in 0..15: our zero points are those of codes read as int4."""
    assert each.zero_point is not None
    return (each.zero_point.int() + 8).to(torch.uint8)


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def session(model: Any, threads: int) -> Any:
    """An ONNX model, or the path of one, on ``threads`` threads of the CPU."""
    import onnxruntime  # pyrefly: ignore[missing-import]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class _Graph:
    """An ONNX graph in the making: ``x [m, k]`` in, one output for each layer."""

    def __init__(self) -> None:
        import onnx  # pyrefly: ignore[missing-import]

        self.onnx: Any = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.outputs: list[str] = []

    def constant(self, value: Tensor) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    def node(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> tuple[str, ...]:
        names = tuple(f"value_{len(self.nodes)}_{i}" for i in range(outputs))
        self.nodes.append(self.onnx.helper.make_node(op, inputs, names, domain=domain, **attributes))
        return names

    def call(self, case: Case) -> Call:
        helper, kind = self.onnx.helper, self.onnx.TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info("x", kind, ["m", case.k])]
        outputs = [helper.make_tensor_value_info(name, kind, ["m", case.n]) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "linears", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        runs = session(helper.make_model(graph, opset_imports=opsets, ir_version=10), case.threads).run
        return lambda x: [torch.from_numpy(y) for y in runs(None, {"x": x.numpy()})]


def _onnx_integer(case: Case, layers: Sequence[Operands], *, static: bool) -> Call:
    """uint8 activation by one scale, ``MatMulInteger``, scales, bias."""
    graph = _Graph()
    if static:
        scale = graph.constant(torch.tensor(STATIC_LIMIT / 127))
        zero = graph.constant(torch.tensor(128, dtype=torch.uint8))
        (codes,) = graph.node("QuantizeLinear", "x", scale, zero)
    else:
        codes, scale, zero = graph.node("DynamicQuantizeLinear", "x", outputs=3)
    for each in layers:
        (acc,) = graph.node("MatMulInteger", codes, graph.constant(each.codes.t()), zero)
        (acc,) = graph.node("Cast", acc, to=graph.onnx.TensorProto.FLOAT)
        (scales,) = graph.node("Mul", scale, graph.constant(each.scale))
        (y,) = graph.node("Mul", acc, scales)
        if each.bias is not None:
            (y,) = graph.node("Add", y, graph.constant(each.bias))
        graph.outputs.append(y)
    return graph.call(case)


def _onnx_float(case: Case, layers: Sequence[Operands]) -> Call:
    graph = _Graph()
    for each in layers:
        bias = () if each.bias is None else (graph.constant(each.bias),)
        graph.outputs += graph.node("Gemm", "x", graph.constant(each.weight), *bias, transB=1)
    return graph.call(case)


def _onnx_nbits(case: Case, layers: Sequence[Operands], *, accuracy: int) -> Call:
    """``MatMulNBits``; ``accuracy`` 4 quantizes the activation to int8 on the way, 0 leaves it."""
    graph = _Graph()
    for each in layers:
        n, k = each.weight.shape
        block = MOST_BLOCK if each.block is None else each.block[1]
        if k % block:
            raise ValueError(f"k must be a multiple of {block}, got {k}")
        groups = k // block
        if each.scheme.weight.dtype in INT4_DTYPES:
            bits, codes = 4, each.codes.view(n, groups, block // 2)
            zero = _nibble_zero_points(each)
            zero = torch.cat((zero, zero.new_zeros(n, groups % 2)), 1).view(n, -1, 2)
            zeros: tuple[str, ...] = (graph.constant(zero[..., 0] | zero[..., 1] << 4),)
        else:
            bits, codes, zeros = 8, (each.codes.int() + 128).to(torch.uint8).view(n, groups, block), ()
        scale = each.scale.reshape(n, -1).expand(n, groups)
        operands = ("x", graph.constant(codes), graph.constant(scale), *zeros)
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": accuracy}
        graph.outputs += graph.node("MatMulNBits", *operands, domain="com.microsoft", **attributes)
    return graph.call(case)


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


def openvino_request(model: Any, threads: int, **properties: str) -> Any:
    """An inference request of an OpenVINO model on ``threads`` threads of the CPU."""
    import openvino  # pyrefly: ignore[missing-import]

    common = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    return openvino.Core().compile_model(model, "CPU", {**common, **properties}).create_infer_request()


def _openvino_weight(each: Operands, ops: Any, *, quantized: bool) -> Any:
    """The node of the weight ``[n, k]``: codes that are converted and scaled, which OpenVINO keeps compressed."""
    import numpy as np
    import openvino  # pyrefly: ignore[missing-import]

    n, k = each.weight.shape
    if not quantized:
        return ops.constant(each.weight.numpy())
    scale = each.scale.reshape(n, -1, 1).numpy()
    shape = [n, scale.shape[1], k // scale.shape[1]]
    if each.scheme.weight.dtype in INT4_DTYPES:
        packed = openvino.Tensor(np.ascontiguousarray(each.codes.numpy()), shape, openvino.Type.u4)
        zero = _nibble_zero_points(each).numpy()[..., None].astype(np.float32)
        codes = ops.subtract(ops.convert(ops.constant(packed), np.float32), ops.constant(zero))
        weight = ops.multiply(codes, ops.constant(scale))
    elif each.block is None:
        return ops.multiply(ops.convert(ops.constant(each.codes.numpy()), np.float32), ops.constant(scale[:, 0]))
    else:
        codes = ops.constant(each.codes.view(shape).numpy())
        weight = ops.multiply(ops.convert(codes, np.float32), ops.constant(scale))
    return ops.reshape(weight, ops.constant(np.array([n, k], np.int64)), False)


def _openvino(
    case: Case, layers: Sequence[Operands], *, group: int | None, static: bool = False, quantized: bool = True
) -> Call:
    """A linear of OpenVINO.

    Args:
        group: codes of the activation that share a dynamic scale; 0 leaves it float, None is all of k.
        static: the activation is quantized in the graph, by one scale.
        quantized: the weight is.
    """
    import numpy as np
    import openvino  # pyrefly: ignore[missing-import]
    import openvino.opset13 as ops  # pyrefly: ignore[missing-import]

    x = ops.parameter([-1, case.k], np.float32, name="x")
    a = x
    if static:
        low, high = (ops.constant(np.float32(limit)) for limit in (-STATIC_LIMIT * 128 / 127, STATIC_LIMIT))
        a = ops.fake_quantize(x, low, high, low, high, 256)
    results = []
    for each in layers:
        y = ops.matmul(a, _openvino_weight(each, ops, quantized=quantized), False, True)
        results.append(y if each.bias is None else ops.add(y, ops.constant(each.bias.numpy()[None])))
    size = str(case.k if group is None else group)
    request = openvino_request(
        openvino.Model(results, [x], "linears"),
        case.threads,
        DYNAMIC_QUANTIZATION_GROUP_SIZE=size,
        INFERENCE_PRECISION_HINT="f32",
    )

    def call(x: Tensor) -> list[Tensor]:
        request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return [torch.from_numpy(request.get_output_tensor(i).data) for i in range(len(layers))]

    return call


# --- the table --------------------------------------------------------------------------------------------------------


def _way(name: str, prepare: Any, schemes: tuple[str, ...], *, exact: bool = False, quick: bool = True) -> Way:
    another = " int8" in name
    return Way(name, name.split(maxsplit=1)[0], prepare, _as_is, schemes, exact, False, quick, another, ("float32",))


_DYNAMIC, _STATIC = ("w8a8",), ("w8a8-static",)
_WEIGHT_ONLY = ("w8a16", "w8a16-g128", "w4a16-g128", "w4a16-g32")
RUNTIME_WAYS: tuple[Way, ...] = (
    _way("onnxruntime dynamic", partial(_onnx_integer, static=False), _DYNAMIC),
    _way("onnxruntime static", partial(_onnx_integer, static=True), _STATIC),
    _way("onnxruntime nbits", partial(_onnx_nbits, accuracy=0), _WEIGHT_ONLY, exact=True),
    _way("onnxruntime nbits int8", partial(_onnx_nbits, accuracy=4), _WEIGHT_ONLY),
    _way("onnxruntime float", _onnx_float, tuple(KINDS), quick=False),
    _way("openvino dynamic g128", partial(_openvino, group=128), _DYNAMIC),
    _way("openvino dynamic per token", partial(_openvino, group=None), _DYNAMIC),
    _way("openvino static", partial(_openvino, group=0, static=True), _STATIC),
    _way("openvino weight-only", partial(_openvino, group=0), _WEIGHT_ONLY, exact=True),
    _way("openvino int8 g128", partial(_openvino, group=128), _WEIGHT_ONLY, quick=False),
    _way("openvino float", partial(_openvino, group=0, quantized=False), tuple(KINDS), quick=False),
)
