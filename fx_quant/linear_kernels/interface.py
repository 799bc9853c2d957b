"""The interface of a linear kernel, and its form for kernels of the registry."""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from fx_quant.errors import FxQuantError, NoKernelError
from fx_quant.kernels.base import Kernel, kernel, name_class
from fx_quant.linear import apply_linear, linear_problem
from fx_quant.linear_kernels.configs import (
    FP8ScaledMMLinearLayerConfig,
    Int8ScaledMMLinearLayerConfig,
    MMLinearLayerConfig,
    MPLinearLayerConfig,
    ScaledMMLinearLayerConfig,
)
from fx_quant.linear_kernels.params import FP8Params, Int8Params, LayerError, MPParams, Params, replace_parameter
from fx_quant.problem import Problem
from fx_quant.scheme import Granularity
from fx_quant.selection import disabled_kernels
from fx_quant.target import Target, capability_target, detect_target, named_target
from fx_quant.weights import azp_adjoint, convert_to_channelwise, merge_input_scales, requantize_with_max_scale

Capability = int | str | Target | None

ConfigT = TypeVar("ConfigT", bound=MMLinearLayerConfig)
ParamsT = TypeVar("ParamsT", bound=Params)
Verdict = tuple[bool, str | None]


class MMLinearKernel(ABC, Generic[ConfigT, ParamsT]):
    """One way to run a quantized linear layer, to be subclassed with a configuration and parameters of one's own.

    Lifecycle: ``is_supported`` and ``can_implement`` are asked first; ``__init__`` takes the configuration;
    ``process_weights_after_loading`` prepares a layer once; ``apply_weights`` runs it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name_class(cls.__name__)

    @classmethod
    @abstractmethod
    def is_supported(cls, compute_capability: Any = None) -> Verdict:
        """Whether the hardware can run it, and why not.

        Args:
            compute_capability: ``90`` for an H100; for our kernels also a ``Target`` or its name. None asks for the
                machine that this runs on.
        """

    @classmethod
    @abstractmethod
    def can_implement(cls, config: ConfigT) -> Verdict:
        """Whether it can run ``config`` on hardware that supports it, and why not."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Prepare ``layer``'s tensors, once, with ``replace_parameter``."""

    @abstractmethod
    def _get_layer_params(self, layer: nn.Module, **kwargs: Any) -> ParamsT:
        """The typed parameters of ``layer``."""

    def get_output_padding(self) -> int | None:
        """Rows to which an eager call pads fewer, or None."""
        return None

    @abstractmethod
    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """``[..., k] -> [..., n]``."""


class RegistryLinearKernel(MMLinearKernel[ConfigT, ParamsT]):
    """A face of kernels of the registry, best first: ``KERNELS`` names them."""

    KERNELS: ClassVar[tuple[str, ...]] = ()
    PARAMS: ClassVar[type[Params]] = Params

    @classmethod
    def is_supported(cls, compute_capability: Capability = None) -> Verdict:
        """Whether any of the kernels meets its requirements of the target; all reasons otherwise."""
        target = resolve_capability(compute_capability)
        return _verdict({k.name: k.requires.unmet_by_target(target) for k in cls._kernels()})

    @classmethod
    def can_implement(cls, config: ConfigT) -> Verdict:
        """Whether any of the kernels meets its requirements of the problem; all reasons otherwise."""
        if getattr(config, "has_g_idx", False):
            return False, "groups must be neighbours along k, got a g_idx; reorder the weight to act_order=False"
        problem = _problem(config)
        return _verdict({k.name: k.requires.unmet_by_problem(problem) for k in cls._kernels()})

    @classmethod
    def unmet(cls, config: ConfigT, target: Target) -> list[str]:
        """Why none of the kernels can run ``config`` on ``target``; empty when one can."""
        if not cls.can_implement(config)[0]:
            return [str(cls.can_implement(config)[1])]
        reasons = {k.name: k.requires.unmet(_problem(config), target) for k in cls._kernels()}
        ok, why = _verdict(reasons)
        return [] if ok else [str(why)]

    @classmethod
    def _kernels(cls) -> list[Kernel]:
        return [kernel(name) for name in cls.KERNELS]

    def _get_layer_params(self, layer: nn.Module, **kwargs: Any) -> ParamsT:
        return typing.cast(ParamsT, self.PARAMS.from_layer(layer))

    def _chosen(self, problem: Problem, device: torch.device) -> Kernel:
        target = detect_target(device)
        for candidate in self._kernels():
            if not candidate.requires.unmet(problem, target) and candidate.name not in disabled_kernels():
                return candidate
        reasons = "; ".join(f"{k.name}: {', '.join(k.requires.unmet(problem, target))}" for k in self._kernels())
        raise NoKernelError(f"{type(self).__name__} cannot run {problem} on {target}: {reasons}")

    def get_output_padding(self) -> int | None:
        """Rows to which an eager call pads fewer: 17 for ``torch._scaled_mm`` on CUDA."""
        return max((k.eager_rows for k in self._kernels()), default=0) or None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check ``layer``'s tensors, merge the scales of fused shards (``layer.logical_widths``) and pick the kernel.

        Raises:
            LayerError: a tensor is missing.
            ValueError: a tensor does not fit the scheme.
            NoKernelError: none of the kernels can run this layer here.
        """
        params = self._get_layer_params(layer)
        self._merge_shards(layer, params)
        params = self._get_layer_params(layer)
        problem = _problem(self.config)
        int4 = params.weight.dtype is torch.uint8 and problem.scheme.weight.dtype is not torch.uint8
        shape = (params.weight.shape[0], params.weight.shape[1] * (2 if int4 else 1))
        problem = linear_problem(problem.scheme, shape, problem.out_dtype, problem.out_dtype, None)
        chosen = self._chosen(problem, params.weight.device)
        layer.fx_quant_kernel = chosen.name  # type: ignore[assignment]

    def _merge_shards(self, layer: nn.Module, params: ParamsT) -> None:
        """Make one scale of what a fused layer has several of."""

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """``[..., k] -> [..., n]``, in the configuration's dtype.

        Raises:
            FxQuantError: ``process_weights_after_loading`` was not called.
        """
        name = getattr(layer, "fx_quant_kernel", None)
        if name is None:
            raise FxQuantError(
                f"{type(self).__name__}.process_weights_after_loading(layer) must be called before apply_weights"
            )
        params = self._get_layer_params(layer)
        problem = _problem(self.config)
        return apply_linear(
            x,
            problem.scheme,
            params.weight,
            params.weight_scale,
            bias,
            weight_zero_point=getattr(params, "weight_zero_point", None),
            input_scale=params.input_scale,
            input_zero_point=getattr(params, "input_zero_point", None),
            input_scale_ub=getattr(params, "input_scale_ub", None),
            out_dtype=problem.out_dtype,
            force_kernel=name,
        )


class ScaledMMLinearKernel(RegistryLinearKernel[ConfigT, ParamsT]):
    """Activation and weight are quantized."""


class FP8ScaledMMLinearKernel(ScaledMMLinearKernel[FP8ScaledMMLinearLayerConfig, FP8Params]):
    """float8 x float8."""

    PARAMS = FP8Params

    def _merge_shards(self, layer: nn.Module, params: FP8Params) -> None:
        widths = getattr(layer, "logical_widths", None)
        per_tensor = self.config.weight_quant_key.granularity == Granularity.PER_TENSOR
        if per_tensor and params.weight_scale.numel() > 1:
            scale, weight = requantize_with_max_scale(params.weight, params.weight_scale, _widths(layer, widths))
            replace_parameter(layer, params.WEIGHT, weight)
            replace_parameter(layer, params.WEIGHT_SCALE, scale)
        if params.input_scale is not None and params.input_scale.numel() > 1:
            replace_parameter(layer, params.INPUT_SCALE, merge_input_scales(params.input_scale)[0])


class Int8ScaledMMLinearKernel(ScaledMMLinearKernel[Int8ScaledMMLinearLayerConfig, Int8Params]):
    """int8 x int8."""

    PARAMS = Int8Params

    def _merge_shards(self, layer: nn.Module, params: Int8Params) -> None:
        widths = getattr(layer, "logical_widths", None)
        if self.config.is_channelwise and widths is not None and params.weight_scale.numel() == len(widths):
            replace_parameter(layer, params.WEIGHT_SCALE, convert_to_channelwise(params.weight_scale, widths))
        if params.input_scale is not None and params.input_scale.numel() > 1:
            scale, zero_point = merge_input_scales(params.input_scale, params.input_zero_point)
            replace_parameter(layer, params.INPUT_SCALE, scale)
            if zero_point is not None:
                replace_parameter(layer, params.INPUT_ZERO_POINT, zero_point)
        if not self.config.input_symmetric and params.azp_adj is None:
            layer.register_buffer(params.AZP_ADJ, azp_adjoint(params.weight), persistent=False)


class MPLinearKernel(RegistryLinearKernel[MPLinearLayerConfig, MPParams]):
    """A float activation and a quantized weight ("mixed precision")."""

    PARAMS = MPParams


def _widths(layer: nn.Module, widths: Sequence[int] | None) -> Sequence[int]:
    if widths is None:
        raise LayerError(
            f"{type(layer).__name__} has several weight scales and must say the rows of each in 'logical_widths'"
        )
    return widths


def _problem(config: MMLinearLayerConfig) -> Problem:
    if not isinstance(config, (ScaledMMLinearLayerConfig, MPLinearLayerConfig)):
        raise FxQuantError(
            "a kernel of ours needs an FP8ScaledMMLinearLayerConfig, Int8ScaledMMLinearLayerConfig or "
            f"MPLinearLayerConfig, got {type(config).__name__}"
        )
    return config.problem()


def _verdict(reasons: Mapping[str, list[str]]) -> Verdict:
    if any(not each for each in reasons.values()):
        return True, None
    return False, "; ".join(f"{name}: {', '.join(each)}" for name, each in reasons.items())


def resolve_capability(asked: Capability) -> Target:
    """The machine that a compute capability, a name or None (this machine) stands for."""
    if isinstance(asked, Target):
        return asked
    if isinstance(asked, str):
        return named_target(asked)
    if asked is not None:
        return capability_target(asked)
    return detect_target("cuda" if torch.cuda.is_available() else "cpu")
