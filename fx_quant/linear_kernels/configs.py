"""What a kernel must implement, as vLLM spells it, and the problem that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from fx_quant.errors import must
from fx_quant.layers.linear_operands import linear_problem
from fx_quant.problem import Problem
from fx_quant.scheme import WHOLE, Granularity, OperandSpec, Scheme, dtype_name

# What stands for a weight whose shape is not known when a kernel is chosen: every alignment holds.
_ALIGNED_SHAPE = (4096, 4096)


# --- how an operand is quantized ----------------------------------------------------------------------------------


class _Sizes(NamedTuple):
    row: int
    col: int


class GroupShape(_Sizes):
    """Rows and columns of an operand that share a scale; -1 is all of them.

    The operand is the activation ``[m, k]`` or the weight ``[n, k]``.
    """

    PER_TENSOR: ClassVar[GroupShape]
    PER_TOKEN: ClassVar[GroupShape]
    PER_CHANNEL: ClassVar[GroupShape]

    def is_per_tensor(self) -> bool:
        """All of it shares one."""
        return self == GroupShape.PER_TENSOR

    def is_per_token(self) -> bool:
        """Each row has one."""
        return self == GroupShape.PER_TOKEN

    def is_per_channel(self) -> bool:
        """Each column of ``[k, n]`` has one."""
        return self == GroupShape.PER_CHANNEL

    def is_per_group(self) -> bool:
        """Neighbours in a row share one."""
        return self.row == 1 and self.col >= 1


GroupShape.PER_TENSOR = GroupShape(WHOLE, WHOLE)
GroupShape.PER_TOKEN = GroupShape(1, WHOLE)
# Of a weight ``[k, n]``, as it is multiplied: a scale for each column.
GroupShape.PER_CHANNEL = GroupShape(WHOLE, 1)


@dataclass(frozen=True)
class ScaleDesc:
    """One scale of an operand.

    Args:
        dtype: of the scale.
        static: it is given, rather than computed from the operand.
        group_shape: what shares it.
    """

    dtype: torch.dtype
    static: bool
    group_shape: GroupShape


@dataclass(frozen=True)
class QuantKey:
    """How an operand is quantized, as vLLM says it; ``OperandSpec`` is how this package does.

    Args:
        dtype: of the codes.
        scale: their scale.
        scale2: a scale of the scales, which no kernel here takes.
        symmetric: the codes have no zero point.
    """

    dtype: torch.dtype
    scale: ScaleDesc
    scale2: ScaleDesc | None = None
    symmetric: bool = True


def operand_spec(key: Any, *, weight: bool) -> OperandSpec:
    """``key`` as an ``OperandSpec``: itself, or what a ``QuantKey`` says, ours or vLLM's own.

    Args:
        key: an ``OperandSpec`` or a ``QuantKey``.
        weight: it is a weight's, for which ``PER_TOKEN`` (a row of ``[n, k]``) and ``PER_CHANNEL`` are one scale for
            each output.

    Raises:
        ValueError: neither of the two, or scales that such an operand cannot have.
    """
    if isinstance(key, OperandSpec):
        return key
    operand, scale = ("weight" if weight else "activation"), getattr(key, "scale", None)
    must(
        isinstance(getattr(key, "dtype", None), torch.dtype) and hasattr(scale, "group_shape"),
        lambda: f"how the {operand} is quantized must be an OperandSpec or a QuantKey, got {key!r}; say QuantKey(...)",
    )
    assert scale is not None
    must(
        getattr(key, "scale2", None) is None,
        lambda: f"the {operand} must have one level of scales, got {key}; no kernel here takes two",
    )
    must(
        scale.dtype is torch.float32,
        lambda: f"scales of the {operand} must be float32, got {dtype_name(scale.dtype)}; widen them first",
    )
    must(
        scale.static or not weight,
        lambda: f"a weight is quantized once, got a dynamic scale in {key}; say static=True",
    )
    shape = tuple(scale.group_shape)
    # One for each column of [k, n] is one for each row of [n, k].
    shape = GroupShape.PER_TOKEN if weight and shape == GroupShape.PER_CHANNEL else shape
    granularity = Granularity.of_block(*shape, weight=weight)
    must(
        granularity.is_sized and (granularity.of_weight if weight else granularity.of_activation),
        lambda: (
            f"scales of the {operand} must be shared by all of it, by a row, "
            f"{'by a column or a block' if weight else 'or by neighbours in a row'}, got {tuple(scale.group_shape)}; "
            "say (rows, columns), -1 for all"
        ),
    )
    return OperandSpec(key.dtype, granularity, dynamic=not scale.static, symmetric=key.symmetric)


# --- what a kernel must implement ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class MMLinearLayerConfig:
    """What a kernel must implement. The base of one's own configurations."""


@dataclass(frozen=True)
class ScaledMMLinearLayerConfig(MMLinearLayerConfig):
    """Activation and weight are quantized."""

    def problem(self) -> Problem:
        """The GEMM as data."""
        raise NotImplementedError(f"{type(self).__name__} must say its problem")  # the base has no scheme

    def shape(self) -> tuple[int, int] | None:
        """``(n, k)`` of the weight; None where a kernel is chosen before it is known."""
        return None


@dataclass(frozen=True)
class FP8ScaledMMLinearLayerConfig(ScaledMMLinearLayerConfig):
    """float8 x float8.

    Args:
        weight_quant_key, activation_quant_key: how each operand is quantized: an ``OperandSpec``, or a ``QuantKey``.
        out_dtype: dtype of the result.
        weight_shape: ``(n, k)``; None when it is not known yet, and alignment is asked of the layer later.
        input_dtype: dtype of the activation before it is quantized; ``out_dtype`` when None.

    vLLM's own has ``weight_shape`` and ``input_dtype`` before ``out_dtype``: name the fields.

    Raises:
        ValueError: an ``out_dtype`` that is none, as where vLLM's order was meant.
    """

    weight_quant_key: OperandSpec | QuantKey
    activation_quant_key: OperandSpec | QuantKey
    out_dtype: torch.dtype
    weight_shape: tuple[int, int] | None = None
    input_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check what another order of fields would mix up."""
        must(
            isinstance(self.out_dtype, torch.dtype),
            lambda: (
                f"out_dtype must be a dtype, got {self.out_dtype!r}; name the fields, as vLLM has them in another order"
            ),
        )

    def problem(self) -> Problem:
        """The GEMM as data."""
        scheme = Scheme(
            operand_spec(self.activation_quant_key, weight=False), operand_spec(self.weight_quant_key, weight=True)
        )
        x_dtype = self.input_dtype or self.out_dtype
        return linear_problem(scheme, self.weight_shape or _ALIGNED_SHAPE, x_dtype, self.out_dtype, None)

    def shape(self) -> tuple[int, int] | None:
        """``weight_shape``."""
        return self.weight_shape


@dataclass(frozen=True)
class Int8ScaledMMLinearLayerConfig(ScaledMMLinearLayerConfig):
    """int8 x int8.

    Args:
        is_channelwise: one weight scale for each output, rather than one in all.
        is_static_input_scheme: the activation's scale is given, one in all; dynamic has one for each token.
        input_symmetric: the activation has no zero point.
        out_dtype, weight_shape: as for float8.

    vLLM's own has ``is_static_input_scheme`` first: name the fields.
    """

    is_channelwise: bool
    is_static_input_scheme: bool
    input_symmetric: bool
    out_dtype: torch.dtype = torch.bfloat16
    weight_shape: tuple[int, int] | None = None

    def problem(self) -> Problem:
        """The GEMM as data."""
        static = self.is_static_input_scheme
        activation = OperandSpec(
            torch.int8,
            Granularity.PER_TENSOR if static else Granularity.PER_TOKEN,
            dynamic=not static,
            symmetric=self.input_symmetric,
        )
        weight = OperandSpec(torch.int8, Granularity.PER_CHANNEL if self.is_channelwise else Granularity.PER_TENSOR)
        shape = self.weight_shape or _ALIGNED_SHAPE
        return linear_problem(Scheme(activation, weight), shape, self.out_dtype, self.out_dtype, None)

    def shape(self) -> tuple[int, int] | None:
        """``weight_shape``."""
        return self.weight_shape


@dataclass(frozen=True)
class MPLinearLayerConfig(MMLinearLayerConfig):
    """A float activation and a quantized weight.

    Args:
        full_weight_shape, partition_weight_shape: ``(k, n)`` of the whole weight and of this rank's part.
        weight_type: dtype of the codes: int8, uint8, a float8, ``torch.int4`` or ``torch.uint4``.
        act_type: dtype of the activation.
        group_size: codes along k that share a scale; -1 is one scale for each output.
        zero_points: the weight has zero points.
        has_g_idx: groups are a permutation of k, which no kernel of ours takes.
        out_type: dtype of the result; ``act_type`` when None.
    """

    full_weight_shape: tuple[int, int]
    partition_weight_shape: tuple[int, int]
    weight_type: torch.dtype
    act_type: torch.dtype
    group_size: int
    zero_points: bool
    has_g_idx: bool = False
    out_type: torch.dtype | None = None

    def problem(self) -> Problem:
        """The GEMM as data.

        Raises:
            ValueError: a group size that is neither positive nor -1.
        """
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be positive, or -1 for one scale a channel, got {self.group_size}")
        groups = Granularity.PER_CHANNEL if self.group_size == -1 else Granularity.per_group(self.group_size)
        scheme = Scheme(
            OperandSpec(self.act_type), OperandSpec(self.weight_type, groups, symmetric=not self.zero_points)
        )
        return linear_problem(scheme, self.shape(), self.act_type, self.out_type or self.act_type, None)

    def shape(self) -> tuple[int, int]:
        """``(n, k)`` of this rank's part."""
        k, n = self.partition_weight_shape
        return n, k
