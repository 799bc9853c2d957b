"""vLLM's interface of today beside the one before it: orders of arguments, names, constants and registered classes."""

from __future__ import annotations

import enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_quant
import fx_quant.linear_kernels as lk
from fx_quant.errors import NoKernelError
from fx_quant.layers.quantize_weight import quantize_weight
from fx_quant.linear_kernels import classes
from fx_quant.linear_kernels.configs import operand_spec
from fx_quant.scheme import Granularity, OperandSpec

BF16, F32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
N, K = 48, 64
KEYS = lk.kFp8DynamicTokenSym, lk.kFp8StaticChannelSym


def made_as(*given: Any, **named: Any) -> Any:
    return lk.init_fp8_linear_kernel(*KEYS, *given, compute_capability="x86_vnni", **named)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((F32, BF16, (N, K)), {}),
        ((F32, BF16, (N, K), None, "up"), {}),
        ((), {"input_dtype": F32, "out_dtype": BF16, "weight_shape": (N, K), "module_name": "up"}),
        ((F32,), {"out_dtype": BF16, "weight_shape": (N, K)}),
    ],
)
def test_the_order_of_today(given, named):
    if len(given) == 1:
        named = {"input_dtype": given[0], **named}
        given = ()
    config = made_as(*given, **named).config
    assert (config.input_dtype, config.out_dtype, config.weight_shape) == (F32, BF16, (N, K))


@pytest.mark.parametrize(
    ("given", "named"),
    [((BF16,), {}), ((BF16, None, "up"), {}), ((), {"out_dtype": BF16}), ((BF16,), {"weight_shape": None})],
)
def test_the_order_before_it(given, named):
    config = made_as(*given, **named).config
    assert (config.input_dtype, config.out_dtype, config.weight_shape) == (None, BF16, None)


def test_an_argument_of_neither_order_is_an_error():
    with pytest.raises(TypeError, match="scale_dtype"):
        made_as(BF16, scale_dtype=F32)
    with pytest.raises(TypeError, match="out_dtype"):
        made_as(input_dtype=F32)


def test_fields_in_vllms_order_are_named():
    weight, activation = KEYS[1], KEYS[0]
    with pytest.raises(ValueError, match=r"out_dtype must be a dtype, got \(48, 64\); name the fields"):
        lk.FP8ScaledMMLinearLayerConfig(weight, activation, (N, K), F32, BF16)  # pyrefly: ignore [bad-argument-type]
    named = lk.FP8ScaledMMLinearLayerConfig(
        weight_quant_key=weight, activation_quant_key=activation, weight_shape=(N, K), input_dtype=F32, out_dtype=BF16
    )
    assert named.problem().out_dtype is BF16


def test_the_seeds_fp8_linear_op_is_called_by_name():
    x, weight = torch.randn(4, K), torch.randn(K, N).to(E4M3)
    for supported in (True, False):
        op = fx_quant.Fp8LinearOp(cutlass_fp8_supported=supported, use_per_token_if_dynamic=True, pad_output=False)
        assert op.cutlass_fp8_supported is supported
        out = op.apply(x, weight, torch.tensor(0.1))
        assert torch.equal(out, fx_quant.Fp8LinearOp(True, False).apply(x, weight, torch.tensor(0.1)))


# --- choosing -----------------------------------------------------------------------------------------------------


def test_a_forced_class_that_cannot_is_an_error_that_names_the_scheme():
    config = made_as(BF16).config
    possible, forced = lk.possible_kernels(lk.FP8ScaledMMLinearKernel), lk.CutlassFP8ScaledMMLinearKernel
    with pytest.raises(NoKernelError, match=r"forced kernel cannot run .* \(fp8_w8a8\) on x86_vnni"):
        lk.choose_scaled_mm_linear_kernel(config, possible, "x86_vnni", forced, quantization="fp8_w8a8")
    with pytest.raises(NoKernelError, match=r"no kernel can run .* \(fp8_w8a8\) on x86_vnni"):
        lk.choose_scaled_mm_linear_kernel(config, {}, "x86_vnni", quantization="fp8_w8a8")
    chosen = lk.choose_scaled_mm_linear_kernel(config, possible, "x86_vnni", quantization="fp8_w8a8")
    assert chosen.__name__ == "CPUFP8ScaledMMLinearKernel"


class Another(lk.MMLinearKernel):
    """A class of somebody else, which runs anything anywhere."""

    @classmethod
    def is_supported(cls, compute_capability: Any = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None: ...

    def _get_layer_params(self, layer: nn.Module, **kwargs: Any) -> Any: ...

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        return x


class PlatformEnum(enum.Enum):
    CPU = enum.auto()


@pytest.mark.parametrize("platform", ["cpu", PlatformEnum.CPU])
def test_a_registered_class_is_asked_last(platform, monkeypatch):
    monkeypatch.setattr(classes, "_REGISTERED", {})
    for _ in range(2):
        lk.register_linear_kernel(Another, platform, "fp8")
    possible = lk.possible_kernels(lk.FP8ScaledMMLinearKernel)
    assert possible["cpu"][-1] is Another and possible["cpu"].count(Another) == 1
    assert Another not in possible["cuda"]
    assert Another not in lk.possible_kernels(lk.MPLinearKernel)["cpu"]
    assert type(made_as(BF16)) is lk.CPUFP8ScaledMMLinearKernel
    monkeypatch.setenv("FX_QUANT_DISABLED_KERNELS", "cpu,pytorch")
    assert type(made_as(BF16)) is Another


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ((Another, "tpu"), "platform must be one of cpu, cuda, rocm, got 'tpu'"),
        ((Another, "cpu", "nvfp4"), "kernel_type must be one of fp8, int8, mp, got 'nvfp4'"),
        ((nn.Linear, "cpu"), "must be a subclass of MMLinearKernel, got <class 'torch.nn"),
    ],
)
def test_what_cannot_be_registered(given, error, monkeypatch):
    monkeypatch.setattr(classes, "_REGISTERED", {})
    with pytest.raises(ValueError, match=error):
        lk.register_linear_kernel(*given)
    assert not any(classes._REGISTERED.values())


# --- names --------------------------------------------------------------------------------------------------------


def test_each_key_is_a_spec_of_one_operand_at_least():
    for name, key in lk.keys.QUANT_KEYS.items():
        assert getattr(lk, name) is key and name in dir(lk)
        if isinstance(key, lk.ScaleDesc):
            continue
        is_static_row = key.scale.static and key.scale.group_shape == lk.GroupShape.PER_TOKEN
        weight = key.scale.static and not is_static_row
        assert operand_spec(key, weight=weight).dtype is key.dtype
    assert operand_spec(lk.kFp8DynamicTokenSym, weight=False) == OperandSpec(E4M3, Granularity.PER_TOKEN, dynamic=True)
    assert operand_spec(lk.kFp8StaticChannelSym, weight=True) == OperandSpec(E4M3, Granularity.PER_CHANNEL)


def test_shapes_of_groups_say_which_they_are():
    shapes = lk.GroupShape.PER_TENSOR, lk.GroupShape.PER_TOKEN, lk.GroupShape.PER_CHANNEL, lk.GroupShape(1, 128)
    said = [(s.is_per_tensor(), s.is_per_token(), s.is_per_channel(), s.is_per_group()) for s in shapes]
    assert said == [tuple(i == j for j in range(4)) for i in range(4)]
    assert not lk.GroupShape(128, 128).is_per_group()


def test_classes_for_blocks_have_vllms_names():
    assert lk.CutlassFp8BlockScaledMMKernel is lk.CutlassFP8BlockScaledMMLinearKernel
    for name, ours in classes.BLOCK_NAMES.items():
        assert getattr(lk, name) is getattr(lk, ours) and name in dir(lk)
    blocks = lk.kFp8Dynamic128Sym, lk.kFp8Static128BlockSym
    made = lk.init_fp8_linear_kernel(*blocks, BF16, BF16, (256, 256), compute_capability="x86_vnni")
    assert type(made) is lk.CPUFp8BlockScaledMMKernel


# --- tensors by other names ---------------------------------------------------------------------------------------


def test_a_layer_may_call_its_tensors_otherwise():
    found = quantize_weight(torch.randn(N, K), OperandSpec(E4M3, Granularity.PER_CHANNEL))
    names = ["qweight", "scales", "act_scale", "act_bound"]
    layers = nn.Module(), nn.Module()
    for layer, (weight, scale) in zip(layers, (names[:2], ["weight", "weight_scale"]), strict=True):
        layer.register_buffer(weight, found.codes)
        layer.register_buffer(scale, found.scale.double())
    config = made_as(F32, F32, (N, K)).config
    kernels = lk.CPUFP8ScaledMMLinearKernel(config, layer_param_names=names), lk.CPUFP8ScaledMMLinearKernel(config)
    assert kernels[0].layer_param_names == names
    assert kernels[1].layer_param_names == ["weight", "weight_scale", "input_scale", "input_scale_ub"]
    for made, layer in zip(kernels, layers, strict=True):
        made.process_weights_after_loading(layer)
    assert layers[0].scales.dtype is F32
    x = torch.randn(3, K)
    assert torch.equal(*(made.apply_weights(layer, x) for made, layer in zip(kernels, layers, strict=True)))
    assert lk.CPUFP8ScaledMMLinearKernel.PARAMS is lk.FP8Params


@pytest.mark.parametrize("names", [["weight"], ["a", "b", "c", "d", "e"], ["a", "b", "c", None]])
def test_there_is_one_name_for_each_tensor(names):
    with pytest.raises(ValueError, match="layer_param_names must be one name for each of weight, weight_scale"):
        lk.CPUFP8ScaledMMLinearKernel(made_as(BF16).config, names)
