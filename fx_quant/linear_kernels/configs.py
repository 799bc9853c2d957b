"""What a kernel must implement, as vLLM spells it, and the problem that it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fx_quant.linear_operands import linear_problem
from fx_quant.problem import Problem
from fx_quant.scheme import Granularity, OperandSpec, Scheme

# What stands for a weight whose shape is not known when a kernel is chosen: every alignment holds.
_ALIGNED_SHAPE = (4096, 4096)


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
        weight_quant_key, activation_quant_key: how each operand is quantized.
        out_dtype: dtype of the result.
        weight_shape: ``(n, k)``; None when it is not known yet, and alignment is asked of the layer later.
    """

    weight_quant_key: OperandSpec
    activation_quant_key: OperandSpec
    out_dtype: torch.dtype
    weight_shape: tuple[int, int] | None = None

    def problem(self) -> Problem:
        """The GEMM as data."""
        scheme = Scheme(self.activation_quant_key, self.weight_quant_key)
        return linear_problem(scheme, self.weight_shape or _ALIGNED_SHAPE, self.out_dtype, self.out_dtype, None)

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
