"""The interface of a linear kernel, for kernels of the registry."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fx_quant.errors import FxQuantError, NoKernelError
from fx_quant.kernels.context import of_call
from fx_quant.kernels.machine import capability_target, detect_target
from fx_quant.kernels.operands import add_bias
from fx_quant.kernels.padding import plan_padding
from fx_quant.kernels.registry import Kernel, kernel
from fx_quant.kernels.select import Verdict, disabled_kernels, verdicts
from fx_quant.layers.linear import apply_linear
from fx_quant.layers.linear_operands import check_bias, check_operands, linear_problem
from fx_quant.linear_kernels.configs import (
    FP8ScaledMMLinearLayerConfig,
    Int8ScaledMMLinearLayerConfig,
    MPLinearLayerConfig,
    ScaledMMLinearLayerConfig,
)
from fx_quant.linear_kernels.interface import ASKED, Answer, ConfigT, MMLinearKernel, ParamsT
from fx_quant.linear_kernels.params import (
    FP8Params,
    Int8Params,
    LayerError,
    MPParams,
    Params,
    replace_parameter,
    set_buffer,
)
from fx_quant.problem import Problem
from fx_quant.reasons import DISABLED, Unmet
from fx_quant.scheme import Granularity, Scheme
from fx_quant.target import Target, named_target
from fx_quant.weights import azp_adjoint, convert_to_channelwise, merge_input_scales, requantize_with_max_scale

Capability = int | str | Target | None


@dataclass(frozen=True)
class Prepared:
    """What ``process_weights_after_loading`` found for a layer: its scheme, and the kernel that runs it."""

    scheme: Scheme
    kernel: str


class RegistryLinearKernel(MMLinearKernel[ConfigT, ParamsT]):
    """A face of kernels of the registry: ``KERNELS`` names them, ``PARAMS`` the tensors of a layer.

    Which of them runs a layer is what ``select`` says of them.

    ``target`` is the machine that an object was chosen for; None is this one.

    A subclass that overrides ``is_supported`` or ``can_implement`` is asked first, ``is_supported`` with the compute
    capability as a number, None off NVIDIA; what its kernels require must hold beside that. One without kernels answers
    both itself, and implements ``process_weights_after_loading`` and ``apply_weights``.
    """

    KERNELS: ClassVar[tuple[str, ...]] = ()
    PARAMS: ClassVar[type[Params]] = Params

    def __init__(self, config: ConfigT, layer_param_names: Sequence[str] | None = None) -> None:
        """A kernel for ``config``.

        Args:
            layer_param_names: what layers call the tensors of ``PARAMS``, in its order; its own names when None.
        """
        super().__init__(config)
        self.target: Target | None = None
        if layer_param_names is not None:
            self.PARAMS = self.PARAMS.called(layer_param_names)  # type: ignore[misc]

    @property
    def layer_param_names(self) -> list[str]:
        """What layers call their tensors, in the order of ``PARAMS``."""
        return [getattr(self.PARAMS, field.name.upper(), field.name) for field in dataclasses.fields(self.PARAMS)]

    @classmethod
    def kernels(cls) -> list[Kernel]:
        """The kernels that the class stands for, in the order of ``KERNELS``."""
        return [kernel(name) for name in cls.KERNELS]

    @classmethod
    def verdicts(cls, problem: Problem, target: Target) -> list[Verdict]:
        """What ``select`` says of the class's kernels, the best one first; each is off where the class is disabled."""
        mine = list(verdicts(problem, target, among=cls.KERNELS))
        if cls.__name__ in disabled_kernels():
            mine = [replace(verdict, unmet=tuple(dict.fromkeys((DISABLED, *verdict.unmet)))) for verdict in mine]
        return mine

    @classmethod
    def is_supported(cls, compute_capability: Capability = None) -> Answer:
        """Whether any of the kernels meets its requirements of the target; all reasons otherwise."""
        target = resolve_capability(compute_capability)
        return cls._answer({k.name: k.requires.unmet_by_target(target) for k in cls.kernels()})

    @classmethod
    def can_implement(cls, config: ConfigT) -> Answer:
        """Whether any of the kernels meets its requirements of the problem; all reasons otherwise."""
        return cls._implements(config)

    @classmethod
    def _implements(cls, config: ConfigT) -> Answer:
        problem = problem_of(config)
        if getattr(config, "has_g_idx", False):
            return False, "groups must be neighbours along k, got a g_idx; reorder the weight to act_order=False"
        return cls._answer({k.name: k.requires.unmet_by_problem(problem) for k in cls.kernels()})

    @classmethod
    def inherits(cls, method: str) -> bool:
        """Whether ``method`` is what this class reads off the requirements of kernels, rather than a subclass's own."""
        return getattr(getattr(cls, method), "__func__", None) is getattr(RegistryLinearKernel, method).__func__

    @classmethod
    def unmet(cls, config: ConfigT, target: Target) -> list[str]:
        """Why none of the kernels can run ``config`` on ``target``, disabled ones included; empty when one can.

        Empty too for a class without kernels that answers for itself.
        """
        if not cls.KERNELS and not any(map(cls.inherits, ASKED)):
            return []
        implements, why = cls._implements(config)
        if implements:
            implements, why = cls._answer(_unmet(cls.verdicts(problem_of(config), target)))
        return [] if implements else [str(why)]

    @classmethod
    def _answer(cls, unmet: Mapping[str, Sequence[Unmet]]) -> Answer:
        if not unmet:
            missing = " and ".join(filter(cls.inherits, ASKED)) or "process_weights_after_loading"
            return False, f"has no kernels; name them in KERNELS, or implement {missing}"
        if not all(unmet.values()):
            return True, None
        return False, "; ".join(f"{name}: {', '.join(map(str, lacking))}" for name, lacking in unmet.items())

    def _chosen(self, problem: Problem, target: Target) -> Kernel:
        mine = self.verdicts(problem, target)
        for verdict in mine:
            if verdict.can_run:
                return kernel(verdict.kernel)
        why = self._answer(_unmet(mine))[1]
        raise NoKernelError(f"{type(self).__name__} cannot run {problem} on {target}: {why}", tuple(mine))

    def get_output_padding(self) -> int | None:
        """Rows to which a call pads fewer here and now: 17 for ``torch._scaled_mm`` on CUDA; None where it pads none.

        ``fx_quant.mode`` says what is padded.
        """
        target, problem = self.target or resolve_capability(None), problem_of(self.config)
        able = (kernel(verdict.kernel) for verdict in self.verdicts(problem, target) if verdict.can_run)
        return next((plan_padding(problem, each, of_call(None)).rows for each in able), 0) or None

    def _get_layer_params(self, layer: nn.Module, **kwargs: Any) -> ParamsT:
        return typing.cast(ParamsT, self.PARAMS.from_layer(layer))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Merge the scales of fused shards (``layer.logical_widths``), check ``layer``'s tensors and pick the kernel.

        Raises:
            LayerError: a tensor is missing.
            ValueError: a tensor does not fit the configuration.
            NoKernelError: none of the kernels can run this layer here.
        """
        self._merge_shards(layer, self._get_layer_params(layer))
        for name in (self.PARAMS.WEIGHT_SCALE, self.PARAMS.INPUT_SCALE):
            scale = getattr(layer, name, None)
            if isinstance(scale, Tensor) and scale.is_floating_point() and scale.dtype is not torch.float32:
                replace_parameter(layer, name, scale.float())
        params = self._get_layer_params(layer)
        scheme = self._scheme(params)
        shape = self._check(scheme, params)
        out_dtype = problem_of(self.config).out_dtype
        problem = linear_problem(scheme, shape, problem_of(self.config).scheme.activation.dtype, out_dtype, None)
        chosen = self._chosen(problem, detect_target(params.weight.device))
        self._add_tensors(layer, params)
        layer.fx_quant_prepared = Prepared(scheme, chosen.name)  # type: ignore[assignment]

    def _merge_shards(self, layer: nn.Module, params: ParamsT) -> None:
        """Make one scale of what a fused layer has several of."""

    def _add_tensors(self, layer: nn.Module, params: ParamsT) -> None:
        """Set what the interface promises beside the tensors that were loaded."""

    def _scheme(self, params: ParamsT) -> Scheme:
        return problem_of(self.config).scheme

    def _check(self, scheme: Scheme, params: ParamsT) -> tuple[int, int]:
        """``(n, k)`` of a layer whose tensors fit ``scheme``."""
        check_operands(
            scheme,
            params.weight,
            params.weight_scale,
            weight_zero_point=getattr(params, "weight_zero_point", None),
            input_scale=params.input_scale,
            input_zero_point=getattr(params, "input_zero_point", None),
        )
        shape = (params.weight.shape[0], params.weight.shape[1] * scheme.weight.codes_per_element)
        wanted = self.config.shape()  # type: ignore[attr-defined]
        if wanted not in (None, shape):
            raise ValueError(f"weight must be [n, k] = {list(wanted)} as the configuration says, got {list(shape)}")
        return shape

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """``[..., k] -> [..., n]``, in the configuration's dtype.

        A bias that the kernel does not add is added to its rounded result, in float32, and rounded once more: the
        kernel was chosen before there was a bias to ask for.

        Raises:
            FxQuantError: ``process_weights_after_loading`` was not called.
            ValueError: ``x`` or ``bias`` does not fit the layer.
            NoKernelError: the kernel cannot run on this device.
        """
        prepared = getattr(layer, "fx_quant_prepared", None)
        if prepared is None:
            raise FxQuantError(
                f"{type(self).__name__}.process_weights_after_loading(layer) must be called before apply_weights"
            )
        params, out_dtype = self._get_layer_params(layer), problem_of(self.config).out_dtype
        check_bias(bias, params.weight.shape[0])
        # Traced, it is the canonical op, and the kernel is chosen anew, with the bias.
        apart = bias is not None and not torch.compiler.is_compiling() and not _adds(prepared.kernel, bias, out_dtype)
        out = apply_linear(
            x,
            prepared.scheme,
            params.weight,
            params.weight_scale,
            None if apart else bias,
            weight_zero_point=getattr(params, "weight_zero_point", None),
            input_scale=params.input_scale,
            input_zero_point=getattr(params, "input_zero_point", None),
            input_scale_ub=getattr(params, "input_scale_ub", None),
            out_dtype=out_dtype,
            force_kernel=prepared.kernel,
        )
        return add_bias(out, bias) if apart else out


class ScaledMMLinearKernel(RegistryLinearKernel[ConfigT, ParamsT]):
    """Activation and weight are quantized."""


class FP8ScaledMMLinearKernel(ScaledMMLinearKernel[FP8ScaledMMLinearLayerConfig, FP8Params]):
    """float8 x float8. Fused shards with a scale each become per_channel where the weight is so, else share the largest
    scale.
    """

    PARAMS = FP8Params

    def _merge_shards(self, layer: nn.Module, params: FP8Params) -> None:
        granularity = problem_of(self.config).scheme.weight.granularity
        if granularity == Granularity.PER_TENSOR and params.weight_scale.numel() > 1:
            scale, weight = requantize_with_max_scale(params.weight, params.weight_scale, _widths(layer))
            replace_parameter(layer, params.WEIGHT, weight)
            replace_parameter(layer, params.WEIGHT_SCALE, scale)
        elif granularity == Granularity.PER_CHANNEL and _has_scale_per_shard(layer, params):
            replace_parameter(layer, params.WEIGHT_SCALE, convert_to_channelwise(params.weight_scale, _widths(layer)))
        if params.input_scale is not None and params.input_scale.numel() > 1:
            replace_parameter(layer, params.INPUT_SCALE, merge_input_scales(params.input_scale)[0])


class Int8ScaledMMLinearKernel(ScaledMMLinearKernel[Int8ScaledMMLinearLayerConfig, Int8Params]):
    """int8 x int8. Fused shards with a scale each become per_channel, which changes no code."""

    PARAMS = Int8Params

    def _merge_shards(self, layer: nn.Module, params: Int8Params) -> None:
        fused = not self.config.is_channelwise and params.weight_scale.numel() > 1
        if fused or _has_scale_per_shard(layer, params):
            replace_parameter(layer, params.WEIGHT_SCALE, convert_to_channelwise(params.weight_scale, _widths(layer)))
        if params.input_scale is not None and params.input_scale.numel() > 1:
            scale, zero_point = merge_input_scales(params.input_scale, params.input_zero_point)
            replace_parameter(layer, params.INPUT_SCALE, scale)
            if zero_point is not None:
                replace_parameter(layer, params.INPUT_ZERO_POINT, zero_point)

    def _scheme(self, params: Int8Params) -> Scheme:
        scheme = super()._scheme(params)
        if params.weight_scale.numel() == 1:
            return scheme
        return replace(scheme, weight=replace(scheme.weight, granularity=Granularity.PER_CHANNEL))

    def _add_tensors(self, layer: nn.Module, params: Int8Params) -> None:
        if not self.config.input_symmetric:
            set_buffer(layer, params.AZP_ADJ, azp_adjoint(params.weight))


class MPLinearKernel(RegistryLinearKernel[MPLinearLayerConfig, MPParams]):
    """A float activation and a quantized weight ("mixed precision")."""

    PARAMS = MPParams


def _unmet(mine: Iterable[Verdict]) -> dict[str, tuple[Unmet, ...]]:
    return {verdict.kernel: verdict.unmet for verdict in mine}


def _adds(name: str, bias: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether the kernel called ``name`` adds this bias itself."""
    return not kernel(name).requires.unmet_by_bias(bias.dtype, out_dtype)


def _has_scale_per_shard(layer: nn.Module, params: Params) -> bool:
    widths, scales = getattr(layer, "logical_widths", None), params.weight_scale.numel()
    return widths is not None and scales == len(widths) and scales != params.weight.shape[0]


def _widths(layer: nn.Module) -> Sequence[int]:
    widths = getattr(layer, "logical_widths", None)
    if widths is None:
        raise LayerError(
            f"{type(layer).__name__} has several weight scales and must say the rows of each in 'logical_widths'"
        )
    return widths


def problem_of(config: object) -> Problem:
    """The GEMM that a configuration of ours is.

    Raises:
        FxQuantError: a configuration of somebody else.
    """
    if not isinstance(config, (ScaledMMLinearLayerConfig, MPLinearLayerConfig)):
        raise FxQuantError(
            "a kernel of ours needs an FP8ScaledMMLinearLayerConfig, Int8ScaledMMLinearLayerConfig or "
            f"MPLinearLayerConfig, got {type(config).__name__}"
        )
    return config.problem()


def resolve_capability(asked: Capability) -> Target:
    """The machine that a compute capability, a name or None (this machine) stands for."""
    if isinstance(asked, Target):
        return asked
    if isinstance(asked, str):
        return named_target(asked)
    if asked is not None:
        return capability_target(asked)
    return detect_target("cuda" if torch.cuda.is_available() else "cpu")
