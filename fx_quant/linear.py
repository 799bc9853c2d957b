"""Eager layers: linears that hold codes, with the kernel that ``select`` chooses for the device they are on.

Compiled, they trace to the canonical ops, which ``backend="fx_quant"`` gives the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fx_quant.activation import quantize_activation
from fx_quant.eager import eager_selection, run_kernel, target_of
from fx_quant.problem import Problem, SizeRange
from fx_quant.quantize_weight import quantize_weight
from fx_quant.scheme import (
    CODE_DTYPES,
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


def linear_problem(
    scheme: Scheme, shape: tuple[int, int], x_dtype: torch.dtype, out_dtype: torch.dtype, bias: Tensor | None
) -> Problem:
    """The GEMM of a linear with a weight of ``shape`` ``(n, k)`` for any number of rows of ``x_dtype``."""
    if scheme.weight_only:
        scheme = replace(scheme, activation=OperandSpec(x_dtype))
    bias_dtype = None if bias is None else bias.dtype
    return Problem(scheme, _ANY_ROWS, *shape, out_dtype, bias_dtype, constant_weight=True)


def apply_linear(
    x: Tensor,
    scheme: Scheme,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    weight_zero_point: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_scale_ub: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    force_kernel: str | None = None,
) -> Tensor:
    """``[..., k] -> [..., n]`` of the linear whose tensors are given, as ``QuantizedLinear`` holds them.

    Eagerly it quantizes ``x`` and runs the selected kernel; traced by a compiler it is the canonical ops.

    Raises:
        ValueError: ``x`` does not fit the weight.
        NoKernelError: no kernel can run it, or the forced one cannot.
    """
    int4 = scheme.weight.dtype in INT4_DTYPES
    n, k = weight.shape[0], weight.shape[1] * (2 if int4 else 1)
    if x.shape[-1] != k or x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"x must be [..., {k}] of float32, bfloat16 or float16, got {dtype_name(x.dtype)} {list(x.shape)}"
        )
    out_dtype = out_dtype or x.dtype
    block = weight_block(scheme)
    if block is None:
        weight_scale = weight_scale.flatten()
        weight_zero_point = None if weight_zero_point is None else weight_zero_point.flatten()
    if weight_zero_point is not None and int4:
        # Packed codes are read as int4, 8 less than the uint4 that they are.
        weight_zero_point = weight_zero_point - 8
    a, a_scale, a_zero_point = x.reshape(-1, k), None, None
    if not scheme.weight_only:
        a, a_scale, a_zero_point = quantize_activation(
            a, scheme.activation, input_scale, input_zero_point, scale_ub=input_scale_ub
        )
    if not torch.compiler.is_compiling():
        problem = linear_problem(scheme, (n, k), x.dtype, out_dtype, bias)
        out = run_kernel(
            eager_selection(problem, target_of(x.device), force_kernel),
            a,
            weight,
            a_scale,
            weight_scale,
            bias,
            a_zero_point=a_zero_point,
            b_zero_point=weight_zero_point,
            block=block,
        )
    elif scheme.weight_only:
        out = torch.ops.fx_quant.weight_only_mm(
            a, weight.t(), weight_scale, weight_zero_point, bias, out_dtype, block=block
        )
    else:
        out = torch.ops.fx_quant.scaled_mm(
            a, weight.t(), a_scale, weight_scale, bias, out_dtype, a_zero_point=a_zero_point, block=block
        )
    return out.reshape(*x.shape[:-1], n)


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

    def selection(self, x: Tensor) -> Selection:
        """The kernel for activations like ``x``, with the verdict of every other.

        Raises:
            NoKernelError: no kernel can run it, or the forced one cannot.
        """
        shape = (self.out_features, self.in_features)
        problem = linear_problem(self.scheme, shape, x.dtype, x.dtype, self.bias)
        return eager_selection(problem, target_of(x.device), self.force_kernel)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k] -> [..., n]`` in ``x``'s dtype."""
        return apply_linear(
            x,
            self.scheme,
            self.weight,
            self.weight_scale,
            self.bias,
            weight_zero_point=self.weight_zero_point,
            input_scale=self.input_scale,
            input_zero_point=self.input_zero_point,
            force_kernel=self.force_kernel,
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


# --- what must hold -----------------------------------------------------------------------------------------------


def must(holds: bool, message: Callable[[], str]) -> None:
    """Raise ``ValueError`` with ``message()`` unless it ``holds``."""
    if not holds:
        raise ValueError(message())


def _positive(scale: Tensor, name: str) -> None:
    if scale.device.type == "meta" or torch.compiler.is_compiling():
        return
    wrong = ~(scale.isfinite() & (scale > 0))
    must(
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
    must(
        spec.dtype in CODE_DTYPES | INT4_DTYPES,
        lambda: f"the weight of a scheme must be quantized, got {scheme}; use nn.Linear for float weights",
    )
    must(
        weight.dim() == 2 and weight.dtype == storage,
        lambda: f"weight must be [n, k] of {dtype_name(storage)}, got {dtype_name(weight.dtype)} {list(weight.shape)}",
    )
    n, k = weight.shape[0], weight.shape[1] * (2 if spec.dtype in INT4_DTYPES else 1)
    shape = scale_shape(spec, n, k)
    must(
        weight_scale.is_floating_point() and _is_shape(weight_scale, shape),
        lambda: (
            f"weight_scale of {spec} must be float of shape {list(shape)}, "
            f"got {dtype_name(weight_scale.dtype)} {list(weight_scale.shape)}"
        ),
    )
    _positive(weight_scale, "weight_scale")
    must(
        spec.symmetric == (weight_zero_point is None),
        lambda: f"weight of {spec} {'takes no' if spec.symmetric else 'needs a'} weight_zero_point",
    )
    must(
        weight_zero_point is None
        or (not weight_zero_point.is_floating_point() and _is_shape(weight_zero_point, shape)),
        lambda: f"weight_zero_point must be integers of shape {list(shape)}, got {weight_zero_point}",
    )
    must(
        bias is None or (bias.dtype in FLOAT_DTYPES and bias.shape == (n,)),
        lambda: f"bias must be float of shape [{n}], got {bias.dtype} {list(bias.shape)}",  # pyrefly: ignore
    )
    must(
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
        must(
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
