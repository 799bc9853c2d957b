"""Eager layers: linears that hold codes, with the kernel that ``select`` chooses for the device they are on.

Compiled, they trace to the canonical ops, which ``backend="fx_quant"`` gives the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fx_quant.activation import Quantized, quantize_activation
from fx_quant.eager import eager_selection, run_kernel, target_of
from fx_quant.problem import Problem, SizeRange
from fx_quant.quantize_weight import quantize_weight
from fx_quant.scheme import (
    CODE_DTYPES,
    FLOAT8_DTYPES,
    FLOAT_DTYPES,
    INT4_DTYPES,
    Granularity,
    OperandSpec,
    Scheme,
    dtype_name,
)
from fx_quant.selection import Selection
from fx_quant.weights import pack_int4

_ANY_ROWS = SizeRange(0, None)


def weight_block(scheme: Scheme) -> tuple[int, int] | None:
    """``(rows, columns)`` of the weight that share one scale where scales vary along k; else None."""
    granularity = scheme.weight.granularity
    if granularity.kind == "per_group":
        return 1, granularity.size[0]
    return (granularity.size[0], granularity.size[1]) if granularity.kind == "per_block" else None


def scale_shape(spec: OperandSpec, n: int, k: int) -> tuple[int, ...]:
    """Shape of the scales of a weight ``[n, k]``."""
    granularity = spec.granularity
    if granularity == Granularity.PER_CHANNEL:
        return (n, 1)
    if granularity.size:
        rows, columns = (1, *granularity.size) if granularity.kind == "per_group" else granularity.size
        return -(-n // rows), -(-k // columns)
    return ()


class QuantizedLinear(nn.Module):
    """``out[..., n] = x[..., k] @ weight[n, k].T + bias`` with a quantized weight, and usually a quantized ``x``.

    Buffers have the names that checkpoints give them: ``weight`` (codes; int4 packed two to a byte along k),
    ``weight_scale``, ``weight_zero_point``, ``input_scale``, ``input_zero_point``. The result has ``x``'s dtype. Any
    number of leading dims, zero rows included.

    Args:
        scheme: how weight and activation are quantized.
        weight: codes ``[n, k]``; for ``int4`` uint8 ``[n, k / 2]``, see ``fx_quant.weights.pack_int4``.
        weight_scale: float32: one element per_tensor, ``[n, 1]`` or ``[n]`` per_channel, ``[n, ceil(k / g)]``
            per_group(g), ``[ceil(n / r), ceil(k / c)]`` per_block(r, c).
        weight_zero_point: integers of the shape of ``weight_scale``, for an asymmetric weight.
        bias: ``[n]``, float.
        input_scale: one element, for a static scheme.
        input_zero_point: one integer, for a static asymmetric scheme.
        force_kernel: the kernel to run, or raise.

    Raises:
        ValueError: shapes, dtypes or values that do not fit together.

    The forward pass raises ``NoKernelError`` with every reason where no kernel on ``x``'s device can run the scheme.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

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
    ) -> None:
        super().__init__()
        packed = 2 if scheme.weight.dtype in INT4_DTYPES else 1
        self.scheme = scheme
        self.force_kernel = force_kernel
        self.out_features, self.in_features = weight.shape[0], weight.shape[-1] * packed
        self.block = weight_block(scheme)
        _check_operands(scheme, weight, weight_scale, weight_zero_point, bias, input_scale, input_zero_point)
        shape = scale_shape(scheme.weight, self.out_features, self.in_features)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale.float().reshape(shape))
        self.register_buffer(
            "weight_zero_point", None if weight_zero_point is None else weight_zero_point.int().reshape(shape)
        )
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("input_scale", None if input_scale is None else input_scale.float().reshape(()))
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
        found = quantize_weight(linear.weight, scheme.weight)
        codes = pack_int4(found.codes) if scheme.weight.dtype in INT4_DTYPES else found.codes
        return cls(
            scheme,
            codes,
            found.scale,
            weight_zero_point=found.zero_point,
            bias=linear.bias,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            force_kernel=force_kernel,
        )

    def problem(self, dtype: torch.dtype) -> Problem:
        """The GEMM for activations of ``dtype``, any number of rows."""
        scheme = self.scheme
        if scheme.weight_only:
            scheme = replace(scheme, activation=OperandSpec(dtype))
        bias = None if self.bias is None else self.bias.dtype
        return Problem(scheme, _ANY_ROWS, self.out_features, self.in_features, dtype, bias, constant_weight=True)

    def selection(self, x: Tensor) -> Selection:
        """The kernel for activations like ``x``, with the verdict of every other.

        Raises:
            NoKernelError: no kernel can run it, or the forced one cannot.
        """
        return eager_selection(self.problem(x.dtype), target_of(x.device), self.force_kernel)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k] -> [..., n]`` in ``x``'s dtype."""
        if x.shape[-1] != self.in_features or x.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"x must be [..., {self.in_features}] of float32, bfloat16 or float16, "
                f"got {dtype_name(x.dtype)} {list(x.shape)}"
            )
        rows = x.reshape(-1, self.in_features)
        out = self._weight_only(rows) if self.scheme.weight_only else self._quantized(rows)
        return out.reshape(*x.shape[:-1], self.out_features)

    def _operand_scale(self) -> Tensor:
        return self.weight_scale if self.block is not None else self.weight_scale.flatten()

    def _zero_point(self) -> Tensor | None:
        zero_point = self.weight_zero_point
        if zero_point is None:
            return None
        # Packed codes are read as int4, 8 less than the uint4 that they are.
        zero_point = zero_point - 8 if self.scheme.weight.dtype in INT4_DTYPES else zero_point
        return zero_point if self.block is not None else zero_point.flatten()

    def _weight_only(self, x: Tensor) -> Tensor:
        scale, zero_point = self._operand_scale(), self._zero_point()
        if torch.compiler.is_compiling():
            return torch.ops.fx_quant.weight_only_mm(
                x, self.weight.t(), scale, zero_point, self.bias, x.dtype, block=self.block
            )
        return run_kernel(
            self.selection(x), x, self.weight, None, scale, self.bias, b_zero_point=zero_point, block=self.block
        )

    def _quantized(self, x: Tensor) -> Tensor:
        codes, a_scale, a_zero_point = quantize_activation(
            x, self.scheme.activation, self.input_scale, self.input_zero_point
        )
        scale = self._operand_scale()
        if torch.compiler.is_compiling():
            return torch.ops.fx_quant.scaled_mm(
                codes,
                self.weight.t(),
                a_scale,
                scale,
                self.bias,
                x.dtype,
                a_zero_point=a_zero_point,
                block=self.block,
            )
        return run_kernel(
            self.selection(x),
            codes,
            self.weight,
            a_scale,
            scale,
            self.bias,
            a_zero_point=a_zero_point,
            block=self.block,
        )

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}"
        )


def quantize_(
    model: nn.Module, scheme: Scheme | str, filter: Callable[[str, nn.Linear], bool] | None = None
) -> list[str]:
    """Replace the ``nn.Linear`` modules of ``model``, in place, by ``QuantizedLinear``.

    Args:
        scheme: dynamic or weight-only, as for ``QuantizedLinear.from_float``.
        filter: ``(name, linear) -> bool``; None takes every linear.

    Returns:
        The names that were replaced, in order.

    Raises:
        ValueError: a static scheme; ``model`` itself is a linear, which cannot be replaced in place.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if not scheme.weight_only and not scheme.activation.dynamic:
        raise ValueError(
            f"quantize_ has no input scales for the static scheme {scheme}; "
            "use QuantizedLinear.from_float(linear, scheme, input_scale=...) for each linear"
        )
    if isinstance(model, nn.Linear):
        raise ValueError("quantize_ replaces the linears inside a model, got a linear; use QuantizedLinear.from_float")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (filter is None or filter(name, module))
    ]
    for name, linear in found:
        model.set_submodule(name, QuantizedLinear.from_float(linear, scheme))
    return [name for name, _ in found]


class Fp8LinearOp:
    """A float8 linear as a function of its tensors, with the interface of vLLM's ``Fp8LinearOp``.

    The kernel is chosen by ``select``; rows are padded as its plan says: to 17 for ``torch._scaled_mm`` on CUDA in
    eager calls, not in compiled ones.

    Args:
        use_per_token_if_dynamic: one scale a row rather than one in all, where no ``input_scale`` is given.
        pad_output: pad rows (True) or not (False) whatever the mode; None decides by the mode of each call.
        force_kernel: the kernel to run, or raise.
    """

    def __init__(
        self,
        use_per_token_if_dynamic: bool = False,
        pad_output: bool | None = None,
        force_kernel: str | None = None,
    ) -> None:
        self.use_per_token_if_dynamic = use_per_token_if_dynamic
        self.pad_output = pad_output
        self.force_kernel = force_kernel

    def apply(
        self,
        input: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        out_dtype: torch.dtype | None = None,
        input_scale: Tensor | None = None,
        input_scale_ub: Tensor | None = None,
        bias: Tensor | None = None,
        use_per_token_if_dynamic: bool | None = None,
    ) -> Tensor:
        """``[..., k] -> [..., n]``.

        Args:
            input: float, or float8 codes with their ``input_scale``.
            weight: float8 codes ``[k, n]``.
            weight_scale: one element, or one for each column: ``[n]``, ``[n, 1]`` or ``[1, n]``.
            out_dtype: dtype of the result; ``input``'s by default, which codes have none of.
            input_scale: static: one element; for codes also one for each row, ``[m, 1]``. None is dynamic.
            input_scale_ub: bound of a dynamic per-token scale's amax.
            bias: ``[n]``.

        Raises:
            ValueError: operands that do not fit together.
            NoKernelError: no kernel can run it, or the forced one cannot.
        """
        _check_fp8(input, weight, weight_scale, out_dtype, input_scale)
        x = input.reshape(-1, input.shape[-1])
        per_token = self.use_per_token_if_dynamic if use_per_token_if_dynamic is None else use_per_token_if_dynamic
        codes, a_scale = self._codes(x, weight.dtype, input_scale, input_scale_ub, per_token)
        b_scale = weight_scale.float().flatten()
        out_dtype = out_dtype or input.dtype
        if torch.compiler.is_compiling():
            out = torch.ops.fx_quant.scaled_mm(codes, weight, a_scale, b_scale, bias, out_dtype)
        else:
            selection = self._selection(codes, a_scale, weight, b_scale, bias, out_dtype, input_scale is None)
            out = run_kernel(selection, codes, weight.t(), a_scale, b_scale, bias)
        return out.reshape(*input.shape[:-1], weight.shape[1])

    def _codes(
        self, x: Tensor, dtype: torch.dtype, scale: Tensor | None, scale_ub: Tensor | None, per_token: bool
    ) -> tuple[Tensor, Tensor]:
        if x.dtype in FLOAT8_DTYPES:
            assert scale is not None
            return x, scale.float() if scale.numel() > 1 else scale.float().reshape(())
        granularity = Granularity.PER_TOKEN if per_token and scale is None else Granularity.PER_TENSOR
        spec = OperandSpec(dtype, granularity, dynamic=scale is None)
        quantized: Quantized = quantize_activation(x, spec, scale, scale_ub=scale_ub)
        return quantized[0], quantized[1]

    def _selection(self, codes, a_scale, weight, b_scale, bias, out_dtype, dynamic: bool) -> Selection:
        activation = Granularity.PER_TENSOR if a_scale.dim() == 0 else Granularity.PER_TOKEN
        channels = Granularity.PER_TENSOR if b_scale.numel() == 1 else Granularity.PER_CHANNEL
        scheme = Scheme(OperandSpec(codes.dtype, activation, dynamic=dynamic), OperandSpec(weight.dtype, channels))
        k, n = weight.shape
        bias_dtype = None if bias is None else bias.dtype
        problem = Problem(scheme, _ANY_ROWS, n, k, out_dtype, bias_dtype, constant_weight=True)
        selection = eager_selection(problem, target_of(codes.device), self.force_kernel)
        if self.pad_output is False:
            selection = replace(selection, padding=replace(selection.padding, rows=0))
        return selection


# --- what must hold -----------------------------------------------------------------------------------------------


def _require(holds: bool, message: Callable[[], str]) -> None:
    if not holds:
        raise ValueError(message())


def _positive(scale: Tensor, name: str) -> None:
    if scale.device.type == "meta" or torch.compiler.is_compiling():
        return
    wrong = ~(scale.isfinite() & (scale > 0))
    _require(
        not wrong.any(),
        lambda: (
            f"{name} must be finite and positive, got {scale.flatten()[wrong.flatten()][0].item()} "
            f"({int(wrong.sum())} of {scale.numel()} elements are not)"
        ),
    )


def _check_operands(
    scheme: Scheme,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
) -> None:
    activation, spec = scheme.activation, scheme.weight
    storage = torch.uint8 if spec.dtype in INT4_DTYPES else spec.dtype
    _require(
        spec.dtype in CODE_DTYPES | INT4_DTYPES,
        lambda: f"the weight of a scheme must be quantized, got {scheme}; use nn.Linear for float weights",
    )
    _require(
        weight.dim() == 2 and weight.dtype == storage,
        lambda: f"weight must be [n, k] of {dtype_name(storage)}, got {dtype_name(weight.dtype)} {list(weight.shape)}",
    )
    n, k = weight.shape[0], weight.shape[1] * (2 if spec.dtype in INT4_DTYPES else 1)
    shape = scale_shape(spec, n, k)
    _require(
        weight_scale.is_floating_point() and _is_shape(weight_scale, shape),
        lambda: (
            f"weight_scale of {spec} must be float of shape {list(shape)}, "
            f"got {dtype_name(weight_scale.dtype)} {list(weight_scale.shape)}"
        ),
    )
    _positive(weight_scale, "weight_scale")
    _require(
        spec.symmetric == (weight_zero_point is None),
        lambda: f"weight of {spec} {'takes no' if spec.symmetric else 'needs a'} weight_zero_point",
    )
    _require(
        weight_zero_point is None
        or (not weight_zero_point.is_floating_point() and _is_shape(weight_zero_point, shape)),
        lambda: f"weight_zero_point must be integers of shape {list(shape)}, got {weight_zero_point}",
    )
    _require(
        bias is None or (bias.dtype in FLOAT_DTYPES and bias.shape == (n,)),
        lambda: f"bias must be float of shape [{n}], got {bias.dtype} {list(bias.shape)}",  # pyrefly: ignore
    )
    _require(
        spec.granularity.kind != "per_block"
        or scheme.weight_only
        or activation.granularity == Granularity.per_group(spec.granularity.size[1]),
        lambda: f"a weight of {spec} goes with an activation per_group({spec.granularity.size[1]}), got {activation}",
    )
    static = not scheme.weight_only and not activation.dynamic
    for name, value, needed in (
        ("input_scale", input_scale, static),
        ("input_zero_point", input_zero_point, static and not activation.symmetric),
    ):
        _require(
            (value is not None) == needed and (value is None or value.numel() == 1),
            lambda name=name, value=value, needed=needed: (
                f"{scheme} {'needs' if needed else 'takes no'} {name}{' of one element' if needed else ''}, "
                f"got {'none' if value is None else f'shape {list(value.shape)}'}"
            ),
        )
    if input_scale is not None:
        _positive(input_scale, "input_scale")


def _is_shape(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``x`` has ``shape``, or one that differs in dims of one only."""
    return [size for size in x.shape if size != 1] == [size for size in shape if size != 1]


def _check_fp8(input: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: Any, input_scale: Tensor | None) -> None:
    _require(
        weight.dim() == 2 and weight.dtype in FLOAT8_DTYPES,
        lambda: f"weight must be float8 [k, n], got {dtype_name(weight.dtype)} {list(weight.shape)}",
    )
    k, n = weight.shape
    _require(
        input.shape[-1] == k,
        lambda: f"input must end in k = {k}, the rows of weight {list(weight.shape)}, got {list(input.shape)}",
    )
    _require(
        weight_scale.numel() in (1, n),
        lambda: f"weight_scale must have 1 or n = {n} elements, got {list(weight_scale.shape)}",
    )
    if input.dtype in FLOAT8_DTYPES:
        m = input.numel() // max(k, 1)
        _require(
            input_scale is not None and (input_scale.numel() == 1 or list(input_scale.shape) == [m, 1]),
            lambda: f"float8 input needs its input_scale, one element or [m, 1] = [{m}, 1]",
        )
        _require(out_dtype is not None, lambda: "float8 input needs an out_dtype: float32, bfloat16 or float16")
    else:
        _require(
            input.dtype in FLOAT_DTYPES,
            lambda: f"input must be float32, bfloat16, float16 or float8, got {dtype_name(input.dtype)}",
        )
