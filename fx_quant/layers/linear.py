"""Eager layers: linears that hold codes, with the kernel that ``select`` chooses for the device they are on.

Compiled, they trace to the canonical ops, which ``backend="fx_quant"`` gives the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fx_quant.kernels.context import CompileContext
from fx_quant.kernels.eager import eager_selection, expected_selection, run_kernel, target_of
from fx_quant.kernels.packed_weights import forget_storages
from fx_quant.kernels.select import Selection
from fx_quant.layers.activation import Quantizer, quantize_activation, quantize_by
from fx_quant.layers.inference_only import without_gradient
from fx_quant.layers.linear_operands import (
    check_operands,
    check_quantizer,
    check_scheme,
    describe,
    linear_problem,
    weight_scale_dtype,
    wrong_input_zero_point,
    zero_point_dtype,
)
from fx_quant.layers.packed_weight import PackedWeight
from fx_quant.layers.quantize_weight import quantize_weight
from fx_quant.layers.traced import OF_ITS_OWN, SAID, buffer_of, registered, traced_codes
from fx_quant.problem import Problem
from fx_quant.scheme import FLOAT_DTYPES, Scheme, scale_dtype_of
from fx_quant.weights import UINT4, pack_int4


def apply_linear(
    x: Tensor,
    scheme: Scheme,
    weight: Tensor | PackedWeight,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    weight_zero_point: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_scale_ub: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    force_kernel: str | None = None,
    quantizer: Quantizer | None = None,
    context: CompileContext | None = None,
) -> Tensor:
    """``[..., k] -> [..., n]`` of the linear whose tensors are given, as ``QuantizedLinear`` holds them.

    Eagerly it quantizes ``x`` and runs the selected kernel; traced by a compiler it is the canonical ops. Inference
    only: a backward pass that reaches an ``x`` that requires grad raises ``FxQuantError``.

    Args:
        weight: codes, or the module that holds them, which may pack them for the kernel.
        context: what an eager call may pad, and whether rows must stand alone, if not as ``fx_quant.mode`` says;
            traced, the backend's options say that.

    Raises:
        ValueError: ``x`` does not fit the weight; the quantizer returned what ``quantize_by`` does not take.
        NoKernelError: no kernel can run it, or the forced one cannot.
    """
    n, k = weight.codes_shape if isinstance(weight, PackedWeight) else weight.shape
    k *= scheme.weight.codes_per_element
    if x.dim() == 0 or x.shape[-1] != k or x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x must be [..., {k}] of float32, bfloat16 or float16, got {describe(x)}")
    out_dtype = out_dtype or x.dtype
    block = scheme.weight.block
    if block is None:
        weight_scale = weight_scale.flatten()
        weight_zero_point = None if weight_zero_point is None else weight_zero_point.flatten()
    constant = ["b", "b_scale", "b_zero_point"]
    if weight_zero_point is not None and scheme.weight.dtype is UINT4:
        # Packed codes are read as int4, 8 less than the uint4 that they are.
        weight_zero_point = weight_zero_point - 8
        constant.remove("b_zero_point")  # a new tensor in each call
    selection = None
    if torch.compiler.is_compiling():
        weight_scale = weight_scale.to(scale_dtype_of(weight_scale.dtype))
    else:
        problem = linear_problem(scheme, (n, k), x.dtype, out_dtype, bias)
        selection = eager_selection(problem, target_of(x.device), force_kernel, context)
    held = None
    if isinstance(weight, PackedWeight):
        weight, held = (weight.weight, None) if selection is None else weight.weight_for(selection)
    a, a_scale, a_zero_point = x.detach().reshape(-1, k), None, None
    if not scheme.weight_only:
        if quantizer is None:
            pad = 0 if selection is None else selection.padding.k - k
            a, a_scale, a_zero_point = quantize_activation(
                a, scheme.activation, input_scale, input_zero_point, scale_ub=input_scale_ub, pad=pad
            )
        else:
            a, a_scale, a_zero_point = quantize_by(
                quantizer, x.detach(), scheme.activation, input_scale, input_zero_point
            )
    if selection is not None:
        out = run_kernel(
            selection,
            a,
            weight,
            a_scale,
            weight_scale,
            bias,
            a_zero_point=a_zero_point,
            b_zero_point=weight_zero_point,
            constant=constant,
            held=held,
        )
    elif scheme.weight_only:
        out = torch.ops.fx_quant.weight_only_mm(
            a, weight.t(), weight_scale, weight_zero_point, bias, out_dtype, block=block
        )
    else:
        extras = {} if weight_zero_point is None else {"b_zero_point": weight_zero_point}
        out = torch.ops.fx_quant.scaled_mm(
            a, weight.t(), a_scale, weight_scale, bias, out_dtype, a_zero_point=a_zero_point, block=block, **extras
        )
    return without_gradient(out.reshape(*x.shape[:-1], n), x)


class QuantizedLinear(PackedWeight):
    """``out[..., n] = x[..., k] @ weight[n, k].T + bias`` with a quantized weight, and usually a quantized ``x``.

    Buffers have the names that checkpoints give them: ``weight`` (codes; int4 packed two to a byte along k),
    ``weight_scale``, ``weight_zero_point``, ``input_scale``, ``input_zero_point``. The result has ``x``'s dtype, which
    may be any of float32, bfloat16 and float16 whatever a weight-only scheme says. Any number of leading dims, zero
    rows included. ``.to(dtype)``, ``.half()`` and the like cast the bias only: codes and scales keep their dtypes.

    On a CPU the weight is held once: as codes or, where nothing else refers to these, in the layout of the kernel, as
    ``PackedWeight`` says. Codes that are given are packed in the first eager call when nobody else holds them.

    Inference only: the result of an ``x`` that requires grad requires it too, and raises ``FxQuantError`` when the
    gradient of ``x`` is asked for.

    Args:
        scheme: how weight and activation are quantized.
        weight: codes ``[n, k]``; for ``int4`` uint8 ``[n, k / 2]``, see ``fx_quant.weights.pack_int4``.
        weight_scale: one element per_tensor, ``[n, 1]`` or ``[n]`` per_channel, ``[n, ceil(k / g)]`` per_group(g),
            ``[ceil(n / r), ceil(k / c)]`` per_block(r, c); kept in the ``scale_dtype`` of the scheme, or where that is
            float32 and scales vary along k in the 16 bits that they are given in.
        weight_zero_point: integers of the shape of ``weight_scale``, for an asymmetric weight; kept in int32, those of
            4-bit codes in int8 where that holds them, those that int32 does not hold in int64.
        bias: ``[n]``, float.
        input_scale: one element, for a static scheme.
        input_zero_point: one integer from -128 to 127, for a static asymmetric scheme.
        force_kernel: the kernel to run, or raise.
        quantizer: the formula that quantizes ``x``, eagerly and traced: ``(x, input_scale, input_zero_point) -> (codes,
            scale, zero_point)``, as ``activation.quantize_by`` describes it. None is ``quantize_activation``.
            It is no part of the state dict; copies and pickles keep it.
        context: what eager calls may pad, and whether a row must come out the same whatever stands beside it; None is
            as ``fx_quant.mode`` says where the layer is called, which is always asked for the mode. Compiled, the
            backend's options say all of it. May be set on a layer that is there.

    Raises:
        ValueError: a scheme that no linear can have; shapes, dtypes or values that do not fit together.

    The forward pass raises ``NoKernelError`` with every reason where no kernel on ``x``'s device can run the scheme.
    """

    scheme: Scheme
    _traced_as: str
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    quantizer: Quantizer | None
    context: CompileContext | None = None

    def __init__(
        self,
        scheme: Scheme,
        weight: Tensor,
        weight_scale: Tensor,
        *,
        weight_zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        force_kernel: str | None = None,
        quantizer: Quantizer | None = None,
        context: CompileContext | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.force_kernel = force_kernel
        self.context = context
        check_quantizer(scheme, quantizer)
        self.quantizer = quantizer
        check_operands(
            scheme,
            weight,
            weight_scale,
            weight_zero_point=weight_zero_point,
            bias=bias,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
        )
        self.out_features, self.in_features = weight.shape[0], weight.shape[1] * scheme.weight.codes_per_element
        shape = scheme.weight.scale_shape(self.out_features, self.in_features)
        self.hold(weight.detach())
        weight_scale = weight_scale.detach().to(weight_scale_dtype(weight_scale, scheme.weight))
        self.register_buffer("weight_scale", weight_scale.reshape(shape))
        if weight_zero_point is not None:
            weight_zero_point = weight_zero_point.to(zero_point_dtype(weight_zero_point, scheme.weight)).reshape(shape)
        self.register_buffer("weight_zero_point", weight_zero_point)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("input_scale", None if input_scale is None else input_scale.detach().float().reshape(()))
        self.register_buffer(
            "input_zero_point", None if input_zero_point is None else input_zero_point.int().reshape(())
        )

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        scheme: Scheme | str,
        *,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        force_kernel: str | None = None,
    ) -> QuantizedLinear:
        """``linear`` with its weight quantized by round to nearest.

        Args:
            scheme: a ``Scheme`` or how it prints: ``"int8 per_token (dynamic) x int8 per_channel"``.
            input_scale, input_zero_point: of a static scheme, from calibration.

        Raises:
            ValueError: a scheme that does not parse, or needs what was not given.
        """
        scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
        check_scheme(scheme)
        quantized = quantize_weight(linear.weight, scheme.weight)
        codes = pack_int4(quantized.codes) if scheme.weight.packed else quantized.codes
        layer = cls(
            scheme,
            codes,
            quantized.scale,
            weight_zero_point=quantized.zero_point,
            bias=linear.bias,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            force_kernel=force_kernel,
        )
        del codes, quantized
        layer.pack_for(linear.weight.dtype)
        return layer.train(linear.training)

    def pack_for(self, x_dtype: torch.dtype, *, owned: bool = False) -> None:
        """Hold the weight as the kernel for activations of ``x_dtype`` reads it, as a call does where nothing else
        refers to the codes.

        Args:
            owned: whatever else refers to them will not write to them.
        """
        if self.held_weight()[0].device.type == "cpu":
            problem = self._problem(x_dtype)
            selection = expected_selection(problem, target_of(torch.device("cpu")), self.force_kernel, self.context)
            if selection is not None:
                self.pack(selection, owned=owned)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What .to(), .half(), .cuda() and the like go through: float8 codes are floating point too, to PyTorch.
        def keep_dtype(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if x is self.bias or moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any, **named: Any) -> None:
        # What is loaded is copied into the buffer, whose dtype must hold it.
        scale = state_dict.get(f"{prefix}weight_scale")
        if isinstance(scale, Tensor) and self.weight_scale is not None:
            self.weight_scale = self.weight_scale.to(weight_scale_dtype(scale, self.scheme.weight))
        given = state_dict.get(f"{prefix}weight_zero_point")
        if isinstance(given, Tensor) and self.weight_zero_point is not None:
            self.weight_zero_point = self.weight_zero_point.to(zero_point_dtype(given, self.scheme.weight))
        point = state_dict.get(f"{prefix}input_zero_point")
        wrong = wrong_input_zero_point(point) if isinstance(point, Tensor) and point.numel() == 1 else None
        if wrong is not None:
            # As load_state_dict reports what does not fit.
            arguments[-1].append(f"{prefix}{wrong}")
        super()._load_from_state_dict(state_dict, prefix, *arguments, **named)
        # Buffers made under inference_mode count no writes.
        forget_storages({buffer.untyped_storage()._cdata for buffer in self.buffers(recurse=False)})

    def selection(self, x: Tensor) -> Selection:
        """The kernel for activations like ``x``, with the verdict of every other.

        Raises:
            NoKernelError: no kernel can run it, or the forced one cannot.
        """
        return eager_selection(self._problem(x.dtype), target_of(x.device), self.force_kernel, self.context)

    def _problem(self, x_dtype: torch.dtype) -> Problem:
        return linear_problem(self.scheme, (self.out_features, self.in_features), x_dtype, x_dtype, self.bias)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("scheme", "quantizer"):
            super().__setattr__("_traced_as", registered(self.scheme, vars(self).get("quantizer")))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.scheme = self.scheme  # of another process

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k] -> [..., n]`` in ``x``'s dtype."""
        if torch.compiler.is_compiling():
            return _traced(self, x)
        return apply_linear(
            x,
            self.scheme,
            self,
            self.weight_scale,
            self.bias,
            weight_zero_point=self.weight_zero_point,
            input_scale=self.input_scale,
            input_zero_point=self.input_zero_point,
            force_kernel=self.force_kernel,
            quantizer=self.quantizer,
            context=self.context,
        )

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}"
        )


def _traced(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """``layer(x)`` for compiled code, which looks at no tensor that the scheme says is not there."""
    scheme, quantizer = SAID[layer._traced_as]
    static = not scheme.weight_only and not scheme.activation.dynamic
    shifted = static and not scheme.activation.symmetric
    return apply_linear(
        x,
        scheme,
        traced_codes(layer),
        buffer_of(layer, "weight_scale"),
        layer.bias,
        weight_zero_point=None if scheme.weight.symmetric else buffer_of(layer, "weight_zero_point"),
        input_scale=buffer_of(layer, "input_scale") if static else None,
        input_zero_point=buffer_of(layer, "input_zero_point") if shifted else None,
        quantizer=layer.quantizer if layer._traced_as.endswith(OF_ITS_OWN) else quantizer,
    )
