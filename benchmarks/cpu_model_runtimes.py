"""Whole models in ONNX Runtime and OpenVINO: exported as float, their weights made int8."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from cpu_decoder import Decoder, PastDecoder
from cpu_runtimes import openvino_request, session
from torch import Tensor, nn

Phases = Mapping[str, tuple[Tensor, ...]]
Runs = Mapping[str, Callable[[], Tensor]]


def export(model: nn.Module, phases: Phases, folder: Path) -> Path:
    """``model`` as ONNX in float32, with sizes that may change; a decoder without its state.

    Raises:
        ImportError: onnx is not installed.
    """
    import onnx  # noqa: F401  # pyrefly: ignore[missing-import]

    path = folder / "model.onnx"
    if isinstance(model, Decoder):
        size = model.size
        past = torch.zeros(size.layers, 2, 1, size.heads, 8, size.head)
        ids = torch.zeros(1, 4, dtype=torch.long)
        axes = {"ids": {1: "t"}, "past": {4: "p"}, "new": {4: "t"}}
        model, inputs, names, outputs = PastDecoder(model), (ids, past), ["ids", "past"], ["out", "new"]
    else:
        inputs, names, outputs = next(iter(phases.values())), ["ids", "mask"], ["out"]
        axes = {name: {0: "b", 1: "t"} for name in names} | {"out": {0: "b"}}
    torch.onnx.export(
        model,
        inputs,
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=names,
        output_names=outputs,
        dynamic_axes=axes,
    )
    return path


def _runs(model: nn.Module, phases: Phases, infer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Runs:
    """A call for each phase; ``infer`` maps named arrays to named arrays, which live until its next call."""
    if not isinstance(model, Decoder):
        names = ("ids", "mask")

        def encode(inputs: tuple[Tensor, ...]) -> Tensor:
            return torch.from_numpy(infer({name: x.numpy() for name, x in zip(names, inputs, strict=True)})["out"])

        return {phase: lambda inputs=inputs: encode(inputs) for phase, inputs in phases.items()}

    size = model.size
    past = torch.zeros(size.layers, 2, 1, size.heads, 0, size.head).numpy()
    held = {"past": past}

    def prefill() -> Tensor:
        found = infer({"ids": phases["prefill"][0].numpy(), "past": past})
        held["past"] = found["new"].copy()
        return torch.from_numpy(found["out"])

    def decode() -> Tensor:
        return torch.from_numpy(infer({"ids": phases["decode"][0].numpy(), "past": held["past"]})["out"])

    return {"prefill": prefill, "decode": decode}


def onnxruntime_start(model: nn.Module, phases: Phases, threads: int, *, int8: bool) -> Runs:
    """ONNX Runtime, float32 or ``quantize_dynamic``."""
    with tempfile.TemporaryDirectory() as folder:
        path = export(model, phases, Path(folder))
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic  # pyrefly: ignore[missing-import]

            quantized = Path(folder) / "int8.onnx"
            ops = ["MatMul", "Gemm"]
            quantize_dynamic(path, quantized, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=ops)
            path = quantized
        opened = session(str(path), threads)
    names = [output.name for output in opened.get_outputs()]
    return _runs(model, phases, lambda inputs: dict(zip(names, opened.run(None, inputs), strict=True)))


def int8_weights(model: Any) -> int:
    """Make the constant weights of an OpenVINO model's matmuls int8 by output channel, ``[n, k]``, in place.

    It is the graph that OpenVINO's own weight compression makes, which its kernels look for.

    Returns:
        The largest number that divides every k: the group of a dynamic quantization that all of them can have.
    """
    import numpy as np
    import openvino.opset13 as ops  # pyrefly: ignore[missing-import]

    group = 0
    for node in [each for each in model.get_ops() if each.get_type_name() == "MatMul"]:
        weight, attributes = node.input_value(1).get_node(), node.get_attributes()
        if weight.get_type_name() != "Constant" or len(weight.data.shape) != 2:
            continue
        values = weight.data if attributes["transpose_b"] else weight.data.T
        scale = np.maximum(np.abs(values).max(1, keepdims=True), 1e-12).astype(np.float32) / 127
        codes = np.ascontiguousarray(np.round(values / scale).clip(-127, 127).astype(np.int8))
        decoded = ops.multiply(ops.convert(ops.constant(codes), np.float32), ops.constant(scale))
        node.output(0).replace(ops.matmul(node.input_value(0), decoded, attributes["transpose_a"], True).output(0))
        group = math.gcd(group, codes.shape[1])
    return group


def openvino_start(model: nn.Module, phases: Phases, threads: int, *, int8: bool, precision: str = "f32") -> Runs:
    """OpenVINO, float or with int8 weights and activations that are quantized dynamically, by group."""
    import openvino  # pyrefly: ignore[missing-import]

    with tempfile.TemporaryDirectory() as folder:
        path = export(model, phases, Path(folder))
        converted = openvino.convert_model(str(path))
        group = int8_weights(converted) if int8 else 0
        request = openvino_request(
            converted, threads, DYNAMIC_QUANTIZATION_GROUP_SIZE=str(group), INFERENCE_PRECISION_HINT=precision
        )
    names = [output.get_any_name() for output in converted.outputs]

    def infer(inputs: dict[str, Any]) -> dict[str, Any]:
        request.infer(inputs, share_inputs=True, share_outputs=True)
        return {name: request.get_tensor(name).data for name in names}

    return _runs(model, phases, infer)
