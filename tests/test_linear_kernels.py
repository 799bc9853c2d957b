"""vLLM's linear-kernel interface: parameters, configurations, selection and the life of a layer."""

from __future__ import annotations

import gc
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Optional

import pytest
import torch
from torch import Tensor, nn

import fx_quant.linear_kernels as lk
from fx_quant.errors import FxQuantError, NoKernelError, UnknownNameError
from fx_quant.kernels import registry
from fx_quant.kernels.registry import Kernel, kernel, kernels
from fx_quant.kernels.select import select
from fx_quant.layers.activation import quantize_activation
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.layers.quantize_weight import quantize_weight
from fx_quant.linear_kernels.classes import FAMILIES, derived_classes, families
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme
from fx_quant.target import Target, named_target, named_targets
from fx_quant.weights import INT4, UINT4, pack_int4
from tests.tolerances import assert_within

if TYPE_CHECKING:
    from decimal import Decimal

E4M3, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
N, K = 48, 64
TOKEN = OperandSpec(E4M3, Granularity.PER_TOKEN, dynamic=True)
DYNAMIC = OperandSpec(E4M3, Granularity.PER_TENSOR, dynamic=True)
STATIC = OperandSpec(E4M3, Granularity.PER_TENSOR)
CHANNEL = OperandSpec(E4M3, Granularity.PER_CHANNEL)
INT8_CHANNEL = OperandSpec(torch.int8, Granularity.PER_CHANNEL)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def layer_of(**tensors: Any) -> nn.Module:
    """A module with parameters (``weight``) and buffers; what is None is a plain attribute."""
    layer = nn.Module()
    for name, value in tensors.items():
        if name == "weight":
            layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
        elif isinstance(value, Tensor):
            layer.register_buffer(name, value)
        else:
            setattr(layer, name, value)
    return layer


def register(added: Kernel, monkeypatch) -> None:
    """Make ``added`` the best kernel until the test ends."""
    monkeypatch.setitem(registry._KERNELS, added.name, added)
    monkeypatch.setitem(registry._PRIORITY, added.name, 99)


def fp8(weight=CHANNEL, activation=TOKEN, out=torch.float32, shape=None) -> lk.FP8ScaledMMLinearLayerConfig:
    return lk.FP8ScaledMMLinearLayerConfig(weight, activation, out, shape)


def int8(channelwise=True, static=False, symmetric=True, **kwargs) -> lk.Int8ScaledMMLinearLayerConfig:
    return lk.Int8ScaledMMLinearLayerConfig(channelwise, static, symmetric, **{"out_dtype": torch.float32, **kwargs})


def mp(weight_type=torch.int8, group=-1, zero_points=False, **kwargs) -> lk.MPLinearLayerConfig:
    return lk.MPLinearLayerConfig((K, N), (K, N), weight_type, torch.float32, group, zero_points, **kwargs)


# --- parameters ---------------------------------------------------------------------------------------------------

WEIGHT, SCALE = torch.zeros(N, K, dtype=torch.int8), torch.ones(N, 1)


def test_parameters_are_read_by_name_and_optional_ones_may_be_missing():
    params = lk.Int8Params.from_layer(layer_of(weight=WEIGHT, weight_scale=SCALE))
    assert params.weight.shape == (N, K) and params.weight_scale is not None
    assert (params.input_scale, params.input_zero_point, params.azp_adj) == (None, None, None)
    ub = torch.tensor(2.0)
    assert lk.FP8Params.from_layer(layer_of(weight=WEIGHT, weight_scale=SCALE, input_scale_ub=ub)).input_scale_ub is ub


@pytest.mark.parametrize("value", ["missing", None])
def test_a_missing_attribute_is_named_with_what_there_is(value):
    layer = layer_of(weight=WEIGHT, bias=torch.zeros(N), **({} if value else {"weight_scale": None}))
    with pytest.raises(lk.LayerError) as error:
        lk.FP8Params.from_layer(layer)
    assert str(error.value) == (
        "Module must have 'weight_scale', which FP8Params reads; it has weight, bias. Set it, or name another "
        "attribute with FP8Params.WEIGHT_SCALE"
    )
    assert isinstance(error.value, AttributeError)
    with pytest.raises(lk.LayerError, match="it has no tensors"):
        lk.Params.from_layer(nn.Module())


@dataclass
class OwnParams(lk.FP8Params):
    custom_scale: Tensor
    extra: Optional[Tensor]  # noqa: UP045
    price: Decimal | None
    groups: int = 4

    WEIGHT: ClassVar[str] = "qweight"
    CUSTOM_SCALE: ClassVar[str] = "my_scale"


def test_a_subclass_adds_fields_and_names():
    layer = layer_of(qweight=WEIGHT, weight_scale=SCALE, my_scale=torch.tensor(3.0))
    params = OwnParams.from_layer(layer)
    assert params.weight is layer.qweight and params.custom_scale == 3
    assert params.extra is None and params.price is None and params.groups == 4
    layer.groups = 8
    assert OwnParams.from_layer(layer).groups == 8
    del layer.my_scale
    with pytest.raises(lk.LayerError, match=r"'my_scale', which OwnParams reads.*OwnParams\.CUSTOM_SCALE"):
        OwnParams.from_layer(layer)


def test_replace_parameter_keeps_what_loaders_left():
    layer = layer_of(weight=WEIGHT, weight_scale=SCALE)
    loader = object()
    layer.weight.weight_loader = loader
    layer.weight_scale.note = "kept"
    new = torch.ones(K, N)
    lk.replace_parameter(layer, "weight", new)
    lk.replace_parameter(layer, "weight_scale", torch.zeros(3))
    assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad
    assert layer.weight.weight_loader is loader and torch.equal(layer.weight, new)
    assert "weight_scale" in dict(layer.named_buffers()) and layer.weight_scale.note == "kept"
    assert set(layer.state_dict()) == {"weight", "weight_scale"}


def test_replace_parameter_keeps_a_buffer_as_persistent_as_it_was():
    layer = nn.Module()
    layer.register_buffer("scale", torch.ones(2), persistent=False)
    lk.replace_parameter(layer, "scale", torch.zeros(2))
    assert not layer.state_dict() and not layer.scale.any()


def test_replace_parameter_takes_plain_attributes_and_refuses_what_is_no_tensor():
    layer = nn.Module()
    layer.scale = torch.ones(2)
    lk.replace_parameter(layer, "scale", torch.zeros(2))
    assert isinstance(layer.scale, nn.Parameter) and not layer.scale.any()
    layer.name = "x"
    for name in ("name", "nothing"):
        with pytest.raises(lk.LayerError, match=f"Module must have a parameter '{name}' to replace"):
            lk.replace_parameter(layer, name, torch.zeros(2))


# --- configurations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (fp8(), "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel, m=0.. n=4096 k=4096 -> float32"),
        (
            fp8(activation=STATIC, out=torch.bfloat16, shape=(N, K)),
            "float8_e4m3fn per_tensor (static) x float8_e4m3fn per_channel, m=0.. n=48 k=64 -> bfloat16",
        ),
        (int8(), "int8 per_token (dynamic) x int8 per_channel, m=0.. n=4096 k=4096 -> float32"),
        (
            int8(False, True, False, weight_shape=(N, K)),
            "int8 per_tensor asymmetric (static) x int8 per_tensor, m=0.. n=48 k=64 -> float32",
        ),
        (mp(), "float32 x int8 per_channel, m=0.. n=48 k=64 -> float32"),
        (
            mp(UINT4, 32, True, out_type=torch.bfloat16),
            "float32 x uint4 per_group(32) asymmetric, m=0.. n=48 k=64 -> bfloat16",
        ),
    ],
)
def test_a_configuration_is_a_problem(config, text):
    assert str(config.problem()) == text


def test_configurations_that_are_none():
    with pytest.raises(ValueError, match="group_size must be positive, or -1 for one scale a channel, got 0"):
        mp(group=0).problem()
    with pytest.raises(NotImplementedError):
        lk.ScaledMMLinearLayerConfig().problem()
    with pytest.raises(FxQuantError, match="a kernel of ours needs an FP8ScaledMMLinearLayerConfig.* got MMLinear"):
        lk.CPUInt8ScaledMMLinearKernel.can_implement(lk.MMLinearLayerConfig())


# --- what a class answers -----------------------------------------------------------------------------------------

CLASSES = list(derived_classes().values())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_class_names_kernels_of_its_family(cls):
    (family,) = (f for f in FAMILIES if issubclass(cls, f))
    for name in cls.KERNELS:
        assert families(kernel(name)) == [family], name
    assert getattr(lk, cls.__name__) is cls and cls.__name__ in dir(lk)


def test_every_kernel_here_says_its_class():
    assert [k.name for k in kernels() if not k.linear_kernel] == []
    assert {k.linear_kernel for k in kernels()} == {cls.__name__ for cls in CLASSES}


def test_a_class_that_no_kernel_has_is_an_error_that_lists_them():
    with pytest.raises(AttributeError, match="no attribute 'CutlasLinearKernel'; it has .*CutlassFP8ScaledMMLinearKer"):
        lk.CutlasLinearKernel  # noqa: B018
    assert not hasattr(lk, "_private")


@pytest.mark.parametrize("name", named_targets())
@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_is_supported_is_read_off_the_requirements(cls, name):
    target = named_target(name)
    unmet = [kernel(each).requires.unmet_by_target(target) for each in cls.KERNELS]
    ok, reason = cls.is_supported(name)
    assert (ok, reason) == cls.is_supported(target)
    assert ok == any(not each for each in unmet)
    assert (reason is None) == ok
    if not ok:
        assert all(text in reason for each in unmet for text in map(str, each))


def test_is_supported_takes_a_capability_or_this_machine():
    assert lk.PerTensorTorchFP8ScaledMMLinearKernel.is_supported(90) == (True, None)
    ok, reason = lk.PerTensorTorchFP8ScaledMMLinearKernel.is_supported(80)
    assert not ok and "pytorch_scaled_mm: needs sm89 or newer, target is sm80" in reason
    with pytest.raises(ValueError, match="major \\* 10 \\+ minor"):
        lk.PerTensorTorchFP8ScaledMMLinearKernel.is_supported(9)
    with pytest.raises(UnknownNameError, match="unknown target 'sm9'"):
        lk.PerTensorTorchFP8ScaledMMLinearKernel.is_supported("sm9")
    if not torch.cuda.is_available():
        assert lk.TorchInt8ScaledMMLinearKernel.is_supported() == (True, None)


@pytest.mark.parametrize(
    ("cls", "config", "reason"),
    [
        (lk.CPUInt8ScaledMMLinearKernel, int8(), None),
        (lk.CPUInt8ScaledMMLinearKernel, int8(symmetric=False, static=True), None),
        (lk.CPUInt8ScaledMMLinearKernel, fp8(), "cpu_int8_vnni: has no float8_e4m3fn x float8_e4m3fn matmul"),
        (lk.PerTensorTorchFP8ScaledMMLinearKernel, fp8(), "pytorch_scaled_mm: has no per_token x per_channel scales"),
        (lk.RowWiseTorchFP8ScaledMMLinearKernel, fp8(), "returns bfloat16, asked for float32"),
        (lk.RowWiseTorchFP8ScaledMMLinearKernel, fp8(out=torch.bfloat16), None),
        (lk.AiterInt8ScaledMMLinearKernel, int8(symmetric=False), "aiter_int8: has no zero point of the activation"),
        (lk.CPUWeightOnlyLinearKernel, mp(E4M3), None),
        (lk.TorchMPLinearKernel, mp(UINT4, 32, True), None),
        (lk.TorchMPLinearKernel, mp(has_g_idx=True), "groups must be neighbours along k, got a g_idx"),
    ],
)
def test_can_implement_is_read_off_the_requirements(cls, config, reason):
    ok, found = cls.can_implement(config)
    assert ok == (reason is None)
    assert (found is None) if ok else (reason in found)


# --- choosing -----------------------------------------------------------------------------------------------------


def made(name: str, supported: bool = True, can: bool = True) -> type[lk.MMLinearKernel]:
    """A kernel of somebody else; abstract methods are filled in."""
    body = {
        "is_supported": classmethod(lambda cls, cc=None: (supported, None if supported else f"not on {cc}")),
        "can_implement": classmethod(lambda cls, config: (can, None if can else "not that")),
        "process_weights_after_loading": lambda self, layer: None,
        "_get_layer_params": lambda self, layer, **kwargs: None,
        "apply_weights": lambda self, layer, x, bias=None, **kwargs: x,
    }
    return type(name, (lk.MMLinearKernel,), body)


A, B, C = made("KernelA", supported=False), made("KernelB", can=False), made("KernelC")
D = made("KernelD")
CONFIG = lk.MMLinearLayerConfig()


def test_the_first_that_can_is_chosen():
    assert lk.choose_scaled_mm_linear_kernel(CONFIG, {"cuda": [A, B, C, D], "cpu": [D]}, 90) is C
    assert lk.choose_scaled_mm_linear_kernel(CONFIG, {"cuda": [A, B, C, D], "cpu": [D]}, "x86") is D
    assert lk.is_supported_and_can_implement_kernel(C, CONFIG, 90) == (True, "")


def test_the_error_holds_every_reason():
    with pytest.raises(ValueError, match="Reasons") as error:
        lk.choose_scaled_mm_linear_kernel(CONFIG, {"cuda": [A, B]}, 90)
    assert isinstance(error.value, NoKernelError)
    assert str(error.value) == (
        "no kernel can run MMLinearLayerConfig() on sm90. Reasons:\nKernelA: not on 90\nKernelB: not that"
    )
    with pytest.raises(NoKernelError, match="no kernel is listed for rocm"):
        lk.choose_scaled_mm_linear_kernel(CONFIG, {"cuda": [C]}, "gfx942")


def test_a_forced_class_runs_or_raises():
    assert lk.choose_scaled_mm_linear_kernel(CONFIG, {"cuda": [C]}, 90, force_kernel=D) is D
    with pytest.raises(NoKernelError, match=r"forced kernel cannot run .* on sm90: KernelB: not that"):
        lk.choose_scaled_mm_linear_kernel(CONFIG, {"cuda": [C]}, 90, force_kernel=B)


@pytest.mark.parametrize("off", ["KernelC", "KernelC, KernelA"])
def test_a_class_is_disabled_by_its_name(off, monkeypatch):
    monkeypatch.setenv("FX_QUANT_DISABLED_KERNELS", off)
    assert lk.choose_scaled_mm_linear_kernel(CONFIG, {"cuda": [C, D]}, 90) is D
    ok, reason = lk.is_supported_and_can_implement_kernel(C, CONFIG, 90)
    assert not ok and reason == "KernelC: is disabled by environment variable"
    with pytest.raises(NoKernelError, match="is disabled by environment variable"):
        lk.choose_scaled_mm_linear_kernel(CONFIG, {"cuda": [D]}, 90, force_kernel=C)


EVERY_LEVEL = "cpu_int8_vnni, cpu_int8_avx512, cpu_int8_avx2, cpu_int8_portable"


@pytest.mark.parametrize("off", [EVERY_LEVEL, "cpu", "CPUInt8ScaledMMLinearKernel"])
def test_a_class_of_ours_is_disabled_by_kernel_provider_or_class(off, monkeypatch):
    assert type(lk.init_int8_linear_kernel(True, False, True, compute_capability="x86_vnni")) is (
        lk.CPUInt8ScaledMMLinearKernel
    )
    monkeypatch.setenv("FX_QUANT_DISABLED_KERNELS", off)
    assert type(lk.init_int8_linear_kernel(True, False, True, compute_capability="x86_vnni")) is (
        lk.TorchInt8ScaledMMLinearKernel
    )


def test_one_kernel_of_a_class_may_be_disabled(monkeypatch):
    monkeypatch.setenv("FX_QUANT_DISABLED_KERNELS", "pytorch_scaled_mm")
    config = fp8(OperandSpec(E4M3, Granularity.PER_TENSOR), DYNAMIC, torch.bfloat16)
    ok, reason = lk.is_supported_and_can_implement_kernel(lk.PerTensorTorchFP8ScaledMMLinearKernel, config, 90)
    assert not ok and "pytorch_scaled_mm: is disabled" in reason
    assert lk.is_supported_and_can_implement_kernel(lk.PerTensorTorchFP8ScaledMMLinearKernel, config, "gfx950")[0]
    monkeypatch.setenv("FX_QUANT_DISABLED_KERNELS", "nonsense")
    with pytest.raises(UnknownNameError, match="unknown kernel or provider 'nonsense'"):
        lk.is_supported_and_can_implement_kernel(C, CONFIG, 90)


DISABLED = """
import json, os, sys
from dataclasses import replace
from fx_quant.kernels.registry import kernel, register_kernel
their = replace(kernel("pytorch_int_mm"), name="their_int8", provider="their", linear_kernel="")
register_kernel(their, priority=0)

def says(name):
    os.environ["FX_QUANT_DISABLED_KERNELS"] = name
    from fx_quant.kernels.select import disabled_kernels
    try:
        return " ".join(disabled_kernels())
    except Exception as error:
        return str(error)

def says_in_a_process(name):
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, says(name).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        return answer.read()

names = sys.argv[1:]
found = {"": {name: says_in_a_process(name) for name in names}}
assert "fx_quant.linear_kernels" not in sys.modules
import fx_quant.linear_kernels
found["import fx_quant.linear_kernels"] = {name: says_in_a_process(name) for name in names}
print(json.dumps(found))
"""


def test_class_names_are_known_whatever_was_imported(printed):
    names = ("CPUInt8ScaledMMLinearKernel", "TheirInt8ScaledMMLinearKernel", "nonsense")
    found = json.loads(printed(DISABLED, *names))
    assert len(found) == 2
    for imported, said in found.items():
        assert {name: said[name] for name in names[:2]} == {name: name for name in names[:2]}, imported
        assert "unknown kernel or provider 'nonsense'" in said["nonsense"], imported
        assert "CPUInt8ScaledMMLinearKernel" in said["nonsense"], imported


def test_lists_are_in_the_order_of_selection():
    order = [k.name for k in kernels()]
    for family in FAMILIES:
        for platform, classes in lk.possible_kernels(family).items():
            best = [min(order.index(name) for name in c.KERNELS) for c in classes]
            assert best == sorted(best)
            assert all(any(platform in k.requires.platforms for k in c.kernels()) for c in classes)
    assert lk.possible_kernels(lk.Int8ScaledMMLinearKernel)["cpu"] == [
        lk.CPUInt8ScaledMMLinearKernel,
        lk.TorchInt8ScaledMMLinearKernel,
    ]


def test_a_kernel_of_an_installed_provider_gets_a_class(monkeypatch):
    register(replace(kernel("pytorch_int_mm"), name="their_int8", provider="their", linear_kernel=""), monkeypatch)
    first = lk.possible_kernels(lk.Int8ScaledMMLinearKernel)["cpu"][0]
    assert first.__name__ == "TheirInt8ScaledMMLinearKernel" and first.KERNELS == ("their_int8",)
    assert lk.possible_kernels(lk.Int8ScaledMMLinearKernel)["cpu"][0] is first
    assert first not in lk.possible_kernels(lk.FP8ScaledMMLinearKernel)["cpu"]
    assert type(lk.init_int8_linear_kernel(True, False, True)) is first


def test_a_kernel_joins_the_class_that_it_says(monkeypatch):
    before = lk.TorchInt8ScaledMMLinearKernel
    register(replace(kernel("pytorch_int_mm"), name="pytorch_new_mm"), monkeypatch)
    assert lk.TorchInt8ScaledMMLinearKernel is before
    assert before.KERNELS[:3] == ("pytorch_new_mm", "pytorch_int_mm", "pytorch_int_mm_cuda")
    assert lk.possible_kernels(lk.Int8ScaledMMLinearKernel)["cpu"][0] is before
    register(replace(kernel("pytorch_int_mm"), name="their_int8", linear_kernel="NewLinearKernel"), monkeypatch)
    assert lk.NewLinearKernel.KERNELS == ("their_int8",) and "their_int8" not in before.KERNELS


# --- one chooser --------------------------------------------------------------------------------------------------

LIBRARIES = {"triton": "3.6", "vllm": "0.33", "flashinfer-python": "0.7", "amd-aiter": "0.1.20"}
BF16, F16 = torch.bfloat16, torch.float16
BLOCKS = OperandSpec(E4M3, Granularity.per_block(128, 128)), OperandSpec(E4M3, Granularity.per_group(128), dynamic=True)
RAGGED = 36, 72
SCHEMES = [
    *itertools.starmap(int8, itertools.product((True, False), (True, False), (True, False))),
    int8(out_dtype=BF16, weight_shape=RAGGED),
    *(
        fp8(OperandSpec(dtype, weight), OperandSpec(dtype, *activation), out)
        for dtype, weight, activation, out in itertools.product(
            (E4M3, FNUZ, torch.float8_e5m2),
            (Granularity.PER_TENSOR, Granularity.PER_CHANNEL),
            ((Granularity.PER_TENSOR,), (Granularity.PER_TENSOR, True), (Granularity.PER_TOKEN, True)),
            (BF16, torch.float32),
        )
    ),
    *(fp8(out=out, shape=RAGGED) for out in (BF16, F16, torch.float32)),
    *(fp8(*BLOCKS, out, shape) for out in (BF16, F16) for shape in (None, (576, 1100))),
    *(
        lk.MPLinearLayerConfig((4096, 4096), shape, dtype, act, group, points)
        for dtype, (group, shape), points, act in itertools.product(
            (torch.int8, torch.uint8, INT4, UINT4, E4M3, FNUZ),
            ((-1, (4096, 4096)), (128, (4096, 4096)), (16, (72, 36))),
            (False, True),
            (BF16, torch.float32),
        )
    ),
]


def faces(config: Any, target: Target, possible: dict[Any, Any]) -> tuple[str | None, str | None]:
    """The kernel that ``select`` chooses, and the one that runs a layer of the class that is chosen of ``possible``."""
    family = next(f for f in FAMILIES if type(config) in f.__orig_bases__[0].__args__)
    try:
        selected = select(config.problem(), target).kernel.name
    except NoKernelError:
        selected = None
    try:
        cls = lk.choose_scaled_mm_linear_kernel(config, possible[family], target)
        return selected, cls(config)._chosen(config.problem(), target).name
    except NoKernelError:
        return selected, None


@pytest.mark.parametrize("libraries", [{}, LIBRARIES], ids=["alone", "libraries"])
@pytest.mark.parametrize("name", named_targets())
def test_both_faces_choose_the_same_kernel_for_every_scheme(name, libraries):
    target = named_target(name, packages={"torch": torch.__version__, **libraries})
    possible = {family: lk.possible_kernels(family) for family in FAMILIES}
    chosen = {config: faces(config, target, possible) for config in SCHEMES}
    assert {config: each for config, each in chosen.items() if each[0] != each[1]} == {}
    assert any(selected for selected, _ in chosen.values())


@pytest.mark.parametrize("off", ["TorchInt8ScaledMMLinearKernel", "pytorch", "cpu_int8_portable,pytorch_int_mm"])
def test_both_faces_leave_out_what_is_disabled(off, monkeypatch):
    monkeypatch.setenv("FX_QUANT_DISABLED_KERNELS", off)
    possible = {family: lk.possible_kernels(family) for family in FAMILIES}
    for name in ("arm", "x86", "x86_vnni", "sm80"):
        selected, of_class = faces(int8(), named_target(name), possible)
        assert selected == of_class != "pytorch_int_mm"


def test_classes_in_an_order_of_one_s_own_are_asked_in_that_order():
    """``arm`` has a better kernel than any of the class that stands first."""
    ours = [lk.CPUInt8ScaledMMLinearKernel, lk.TorchInt8ScaledMMLinearKernel]
    assert lk.choose_scaled_mm_linear_kernel(int8(), {"cpu": ours}, "arm") is ours[1]
    assert lk.choose_scaled_mm_linear_kernel(int8(), {"cpu": [D, *ours]}, "arm") is D
    assert lk.choose_scaled_mm_linear_kernel(int8(), {"cpu": [ours[0], C, ours[1]]}, "arm") is ours[1]
    assert lk.choose_scaled_mm_linear_kernel(int8(), {"cpu": ours[:1]}, "arm") is ours[0]
    assert lk.choose_scaled_mm_linear_kernel(int8(), {"cpu": ours[::-1]}, "x86_vnni") is ours[1]
    assert lk.choose_scaled_mm_linear_kernel(CONFIG, {"cpu": [D, *ours]}, "arm") is D


def test_mixed_precision():
    assert lk.choose_mp_linear_kernel(mp(E4M3), "x86") is lk.TorchMPLinearKernel
    with pytest.raises(NoKernelError, match="got a g_idx; reorder the weight"):
        lk.choose_mp_linear_kernel(mp(has_g_idx=True), "x86")


@pytest.mark.parametrize(
    ("target", "cls", "rows"),
    [
        (90, "PerTensorTorchFP8ScaledMMLinearKernel", 17),
        ("gfx942", "PerTensorTorchFP8ScaledMMLinearKernel", None),
        ("gfx950", "PerTensorTorchFP8ScaledMMLinearKernel", None),
        ("x86_vnni", "CPUFP8ScaledMMLinearKernel", None),
    ],
)
def test_init_fp8_chooses_per_target_and_pads_where_torch_gains(target, cls, rows, monkeypatch):
    monkeypatch.setattr("fx_quant.kernels.machine.installed_packages", lambda: {"torch": torch.__version__})
    dtype = FNUZ if target == "gfx942" else E4M3
    specs = OperandSpec(dtype, Granularity.PER_TENSOR, dynamic=True), OperandSpec(dtype, Granularity.PER_TENSOR)
    made = lk.init_fp8_linear_kernel(*specs, torch.bfloat16, compute_capability=target)
    assert type(made).__name__ == cls
    assert made.get_output_padding() == rows
    assert made.config == fp8(specs[1], specs[0], torch.bfloat16)


def test_rocm_with_vllm_gets_its_skinny_kernel_for_any_number_of_rows():
    target = named_target("gfx950", packages={"vllm": "0.33"})
    made = lk.init_fp8_linear_kernel(DYNAMIC, STATIC, torch.bfloat16, compute_capability=target)
    assert type(made) is lk.ROCmFP8ScaledMMLinearKernel


def test_init_names_the_module_in_its_error(monkeypatch):
    monkeypatch.setenv("FX_QUANT_DISABLED_KERNELS", "cpu,pytorch")
    with pytest.raises(NoKernelError, match=r"^model\.layers\.0\.qkv: no kernel can run FP8.*on x86"):
        lk.init_fp8_linear_kernel(TOKEN, CHANNEL, torch.bfloat16, None, "model.layers.0.qkv", compute_capability="x86")
    with pytest.raises(NoKernelError, match=r"^down: no kernel can run Int8.*on x86"):
        lk.init_int8_linear_kernel(True, True, True, "down", compute_capability="x86")
    forced = lk.PerTensorTorchFP8ScaledMMLinearKernel
    with pytest.raises(NoKernelError, match="^up: forced kernel cannot run"):
        lk.init_fp8_linear_kernel(TOKEN, CHANNEL, torch.bfloat16, forced, "up", compute_capability=90)
    with pytest.raises(ValueError, match="out_dtype must be float32, bfloat16 or float16, got int8"):
        lk.init_fp8_linear_kernel(TOKEN, CHANNEL, torch.int8)


# --- what a class of somebody else answers ------------------------------------------------------------------------


def derived(base: type, name: str = "Theirs", **body: Any) -> type:
    """A subclass of one of our families; functions become class methods. With kernels it is listed while it lives."""
    return type(name, (base,), {k: classmethod(v) if inspect.isfunction(v) else v for k, v in body.items()})


@pytest.fixture(scope="module", autouse=True)
def _no_class_stays():
    yield
    gc.collect()


YES = lambda cls, asked=None: (True, None)  # noqa: E731
# What an answer may be, and the reason that is read off it; None is a yes.
ANSWERS: Mapping[str, tuple[Any, str | None]] = {
    "yes": (lambda cls, asked=None: (True, None), None),
    "yes with a word": (lambda cls, asked=None: (True, "gladly"), None),
    "bare yes": (lambda cls, asked=None: True, None),
    "no": (lambda cls, asked=None: (False, "not on a Sunday"), "not on a Sunday"),
    "no reason": (lambda cls, asked=None: (False, None), "{} gave no reason"),
    "empty reason": (lambda cls, asked=None: (False, " "), "{} gave no reason"),
    "a number as reason": (lambda cls, asked=None: (False, 7), "7"),
    "bare no": (lambda cls, asked=None: False, "{} gave no reason"),
    "nothing": (lambda cls, asked=None: None, "{} must return (bool, reason), got None"),
    "text": (lambda cls, asked=None: "yes", "{} must return (bool, reason), got 'yes'"),
    "text for a bool": (lambda cls, asked=None: ("no", None), "{} must return (bool, reason), got ('no', None)"),
    "three": (lambda cls, asked=None: (True, None, 1), "{} must return (bool, reason), got (True, None, 1)"),
    "raises": (lambda cls, asked=None: 1 // 0, "{} raised ZeroDivisionError: "),
    "static yes": (staticmethod(lambda asked=None: (True, None)), None),
    "static no": (staticmethod(lambda asked=None: (False, "not on a Sunday")), "not on a Sunday"),
    "raises nothing to say": (lambda cls, asked=None: next(iter(())), "{} raised StopIteration"),
}
OURS = {"x86_vnni": lk.CPUInt8ScaledMMLinearKernel, "sm90": lk.CutlassInt8ScaledMMLinearKernel}
SM90 = named_target("sm90", packages={"torch": torch.__version__, "vllm": "0.33", "triton": "3.5"})


@pytest.mark.parametrize("method", ["is_supported", "can_implement"])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("base", ["with kernels", "without kernels", "interface"])
def test_a_class_is_asked_first_and_never_refused_without_a_reason(base, answer, method):
    other = {"is_supported": "can_implement", "can_implement": "is_supported"}[method]
    given, reason = ANSWERS[answer]
    reason = None if reason is None else f"Theirs: {reason.format(method)}"
    body = {method: given, other: YES}
    if base == "with kernels":
        theirs = derived(lk.TorchInt8ScaledMMLinearKernel, **body)
    elif base == "without kernels":
        theirs = derived(lk.Int8ScaledMMLinearKernel, **body)
    else:
        theirs = derived(made("Their"), **body)
    ok, found = lk.is_supported_and_can_implement_kernel(theirs, int8(), "x86_vnni")
    assert ok == (reason is None)
    assert found == "" if ok else found.startswith(reason)
    lists = {"cpu": [theirs, D]}
    assert lk.choose_scaled_mm_linear_kernel(int8(), lists, "x86_vnni") is (theirs if ok else D)
    if ok:
        forced = lk.choose_scaled_mm_linear_kernel(int8(), {}, "x86_vnni", force_kernel=theirs)
        assert forced is theirs
    else:
        with pytest.raises(NoKernelError, match=re.escape(reason)) as error:
            lk.choose_scaled_mm_linear_kernel(int8(), {}, "x86_vnni", force_kernel=theirs)
        assert "\n" not in str(error.value)
        with pytest.raises(NoKernelError, match=re.escape(reason)):
            lk.choose_scaled_mm_linear_kernel(int8(), {"cpu": [theirs]}, "x86_vnni")


@pytest.mark.parametrize("method", ["is_supported", "can_implement"])
def test_every_chooser_asks_a_class_that_is_listed_by_its_kernels(method, monkeypatch):
    config = mp(E4M3)
    for family, like, choose, machine in (
        (
            lk.Int8ScaledMMLinearKernel,
            "pytorch_int_mm",
            lambda: type(lk.init_int8_linear_kernel(True, False, True, compute_capability="x86_vnni")),
            "cpu",
        ),
        (
            lk.FP8ScaledMMLinearKernel,
            "cpu_float8_float32",
            lambda: type(lk.init_fp8_linear_kernel(TOKEN, CHANNEL, torch.float32, compute_capability="x86_vnni")),
            "cpu",
        ),
        (lk.MPLinearKernel, "pytorch_weight_only", lambda: lk.choose_mp_linear_kernel(config, "x86"), "cpu"),
    ):
        name = f"their_{like}"
        register(replace(kernel(like), name=name, provider="their", linear_kernel=""), monkeypatch)
        theirs = derived(family, KERNELS=(name,), **{method: lambda cls, asked=None: (False, "not here")})
        assert theirs in lk.possible_kernels(family)[machine]
        assert choose() is not theirs
        setattr(theirs, method, classmethod(YES))
        assert choose() is theirs
        del theirs
        gc.collect()


def test_a_class_is_asked_for_the_machine_and_the_configuration_that_were_asked():
    seen: list[Any] = []
    body = {
        "is_supported": lambda cls, compute_capability=None: (seen.append(compute_capability), (True, None))[1],
        "can_implement": lambda cls, config: (seen.append(config), (True, None))[1],
    }
    theirs = derived(lk.Int8ScaledMMLinearKernel, **body)
    for asked, number in ((90, 90), ("sm100", 100), (SM90, 90), ("x86_vnni", None), ("gfx942", None)):
        assert lk.is_supported_and_can_implement_kernel(theirs, int8(), asked) == (True, "")
        assert seen == [number, int8()]
        seen.clear()


def test_what_a_class_adds_to_the_requirements_of_its_kernels_is_no_substitute_for_them():
    theirs = derived(lk.CPUInt8ScaledMMLinearKernel, is_supported=YES, can_implement=YES)
    assert lk.is_supported_and_can_implement_kernel(theirs, int8(), "x86_vnni") == (True, "")
    ok, reason = lk.is_supported_and_can_implement_kernel(theirs, fp8(), "x86_vnni")
    assert not ok and "cpu_int8_vnni: has no float8_e4m3fn x float8_e4m3fn matmul" in reason
    stricter = derived(
        lk.CPUInt8ScaledMMLinearKernel,
        can_implement=lambda cls, config: (
            super(cls, cls).can_implement(config) if config.input_symmetric else (False, "wants no zero point")
        ),
    )
    assert lk.is_supported_and_can_implement_kernel(stricter, int8(), "x86_vnni")[0]
    ok, reason = lk.is_supported_and_can_implement_kernel(stricter, int8(symmetric=False), "x86_vnni")
    assert not ok and reason == "Theirs: wants no zero point"


@pytest.mark.parametrize(
    ("body", "missing"),
    [
        ({}, "is_supported and can_implement"),
        ({"is_supported": YES}, "can_implement"),
        ({"can_implement": YES}, "is_supported"),
    ],
)
def test_a_class_without_kernels_says_what_it_lacks(body, missing):
    theirs = derived(lk.Int8ScaledMMLinearKernel, **body)
    expected = f"has no kernels; name them in KERNELS, or implement {missing}"
    assert lk.is_supported_and_can_implement_kernel(theirs, int8(), 90) == (False, f"Theirs: {expected}")
    with pytest.raises(NoKernelError, match=re.escape(expected)):
        lk.choose_scaled_mm_linear_kernel(int8(), {"cuda": [theirs]}, 90)
    for method, argument in (("is_supported", 90), ("can_implement", int8())):
        if method not in body:
            ok, reason = getattr(theirs, method)(argument)
            assert not ok and "has no kernels" in reason
    layer = layer_of(weight=WEIGHT, weight_scale=SCALE)
    with pytest.raises(NoKernelError, match="Theirs cannot run .*has no kernels; name them in KERNELS"):
        theirs(int8()).process_weights_after_loading(layer)


def test_a_class_without_kernels_that_answers_itself_runs_a_layer():
    class Theirs(lk.Int8ScaledMMLinearKernel):
        is_supported = can_implement = classmethod(YES)

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            layer.ready = True

        def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
            return x * 2

    chosen = lk.choose_scaled_mm_linear_kernel(int8(), {"cpu": [Theirs]}, "x86")
    theirs, layer = chosen(int8()), nn.Module()
    theirs.process_weights_after_loading(layer)
    assert chosen is Theirs and layer.ready and torch.equal(theirs.apply_weights(layer, X), X * 2)
    assert theirs.get_output_padding() is None


def test_a_class_that_lacks_part_of_the_interface_is_refused_by_name():
    class Half(lk.MMLinearKernel):
        is_supported = can_implement = classmethod(YES)

    expected = "Half: does not implement _get_layer_params, apply_weights, process_weights_after_loading"
    assert lk.is_supported_and_can_implement_kernel(Half, CONFIG, 90) == (False, expected)
    for wrong in ("KernelC", None, 3):
        ok, reason = lk.is_supported_and_can_implement_kernel(wrong, CONFIG, 90)
        assert not ok and reason.startswith(f"{wrong!r}: is_supported raised AttributeError")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm"])
def test_no_class_of_ours_is_refused_without_a_reason(platform):
    configs = [fp8(), int8(), mp(), mp(UINT4, 32, True), mp(has_g_idx=True)]
    machines = [name for name in named_targets() if named_target(name).platform == platform]
    for cls, config, machine in itertools.product(CLASSES, configs, machines):
        ok, reason = lk.is_supported_and_can_implement_kernel(cls, config, machine)
        assert ok == (reason == "")
        assert ok or re.fullmatch(rf"{cls.__name__}: .*\w.*", reason)


# --- the life of a layer ------------------------------------------------------------------------------------------


def same_as_module(made: lk.MMLinearKernel, layer: nn.Module, module: QuantizedLinear, x: Tensor) -> None:
    bias = torch.randn(N)
    made.process_weights_after_loading(layer)
    module.bias = nn.Parameter(bias, requires_grad=False)
    for shape in ((5, K), (2, 3, K), (K,), (0, K)):
        part = x[: torch.Size(shape).numel() // K].reshape(shape) if shape != (K,) else x[0]
        assert torch.equal(made.apply_weights(layer, part, bias), module(part))
    assert layer.fx_quant_prepared.kernel == module.selection(x).kernel.name
    module.bias = None
    assert torch.equal(made.apply_weights(layer, x), module(x))


X = torch.randn(6, K, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weight", [CHANNEL, OperandSpec(E4M3, Granularity.PER_TENSOR)], ids=str)
@pytest.mark.parametrize("activation", [TOKEN, DYNAMIC, STATIC], ids=str)
def test_a_float8_layer(activation, weight):
    found = quantize_weight(torch.randn(N, K), weight)
    scale = None if activation.dynamic else torch.tensor([0.01])
    layer = layer_of(weight=found.codes, weight_scale=found.scale, input_scale=scale)
    made = lk.init_fp8_linear_kernel(activation, weight, torch.float32, weight_shape=(N, K))
    module = QuantizedLinear(Scheme(activation, weight), found.codes, found.scale, input_scale=scale)
    same_as_module(made, layer, module, X)


def test_a_float8_layer_in_blocks_and_with_a_bounded_scale():
    weight = OperandSpec(E4M3, Granularity.per_block(16, 16))
    activation = OperandSpec(E4M3, Granularity.per_group(16), dynamic=True)
    found = quantize_weight(torch.randn(N, K), weight)
    made = lk.init_fp8_linear_kernel(activation, weight, torch.float32)
    module = QuantizedLinear(Scheme(activation, weight), found.codes, found.scale)
    same_as_module(made, layer_of(weight=found.codes, weight_scale=found.scale), module, X)
    found = quantize_weight(torch.randn(N, K), CHANNEL)
    layer = layer_of(weight=found.codes, weight_scale=found.scale, input_scale_ub=torch.tensor(0.1))
    made = lk.init_fp8_linear_kernel(TOKEN, CHANNEL, torch.float32)
    made.process_weights_after_loading(layer)
    bounded = made.apply_weights(layer, X)
    layer.input_scale_ub = None
    assert bounded.abs().max() < made.apply_weights(layer, X).abs().max()


@pytest.mark.parametrize("channelwise", [True, False])
@pytest.mark.parametrize(("static", "symmetric"), [(False, True), (False, False), (True, True), (True, False)])
def test_an_int8_layer(static, symmetric, channelwise):
    spec = OperandSpec(torch.int8, Granularity.PER_CHANNEL if channelwise else Granularity.PER_TENSOR)
    found = quantize_weight(torch.randn(N, K), spec)
    scale = torch.tensor([0.02]) if static else None
    shift = torch.tensor([7], dtype=torch.int8) if static and not symmetric else None
    layer = layer_of(
        weight=found.codes, weight_scale=found.scale, input_scale=scale, input_zero_point=shift, azp_adj=None
    )
    made = lk.init_int8_linear_kernel(channelwise, static, symmetric, "qkv", out_dtype=torch.float32)
    scheme = Scheme(made.config.problem().scheme.activation, spec)
    module = QuantizedLinear(scheme, found.codes, found.scale, input_scale=scale, input_zero_point=shift)
    same_as_module(made, layer, module, X)
    if symmetric:
        assert layer.azp_adj is None
    else:
        assert layer.azp_adj.shape == (1, N) and layer.azp_adj.dtype is torch.int32
        assert torch.equal(layer.azp_adj[0].long(), found.codes.long().sum(1))
        assert "azp_adj" not in layer.state_dict()


@pytest.mark.parametrize(
    ("dtype", "group", "zero_points"),
    [(torch.int8, -1, False), (INT4, 16, False), (UINT4, 16, True), (E4M3, -1, False)],
)
def test_a_weight_only_layer(dtype, group, zero_points):
    config = mp(dtype, group, zero_points)
    spec = config.problem().scheme.weight
    found = quantize_weight(torch.randn(N, K), spec)
    codes = pack_int4(found.codes) if dtype in (INT4, UINT4) else found.codes
    layer = layer_of(weight=codes, weight_scale=found.scale, weight_zero_point=found.zero_point)
    made = lk.choose_mp_linear_kernel(config)(config)
    scheme = Scheme(OperandSpec(torch.float32), spec)
    module = QuantizedLinear(scheme, codes, found.scale, weight_zero_point=found.zero_point)
    same_as_module(made, layer, module, X)


WIDTHS = [16, 24, 8]


def shards(spec: OperandSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of three fused shards of different magnitude, and the float weight that they decode to."""
    parts = [quantize_weight(torch.randn(w, K) * s, spec) for w, s in zip(WIDTHS, (1, 0.1, 5), strict=True)]
    return (
        torch.cat([p.codes for p in parts]),
        torch.stack([p.scale for p in parts]),
        torch.cat([p.dequantize() for p in parts]),
    )


@pytest.mark.parametrize("channelwise", [True, False])
def test_fused_int8_shards_become_channels(channelwise):
    codes, scales, decoded = shards(OperandSpec(torch.int8, Granularity.PER_TENSOR))
    layer = layer_of(weight=codes, weight_scale=scales, logical_widths=WIDTHS)
    made = lk.init_int8_linear_kernel(channelwise, False, True, out_dtype=torch.float32)
    expected = QuantizedLinear(
        Scheme(made.config.problem().scheme.activation, INT8_CHANNEL),
        codes,
        scales.repeat_interleave(torch.tensor(WIDTHS)),
    )
    same_as_module(made, layer, expected, X)
    assert torch.equal(layer.weight_scale * layer.weight.float(), decoded), "no code changes"


def test_fused_float8_shards_share_the_largest_scale_or_become_channels():
    spec = OperandSpec(E4M3, Granularity.PER_TENSOR)
    codes, scales, decoded = shards(spec)
    layer = layer_of(weight=codes, weight_scale=scales, logical_widths=WIDTHS)
    made = lk.init_fp8_linear_kernel(DYNAMIC, spec, torch.float32)
    made.process_weights_after_loading(layer)
    assert layer.weight_scale.numel() == 1 and layer.weight_scale == scales.max()
    # Half a unit of three bits of significand, or half the least code.
    error = (layer.weight.float() * layer.weight_scale - decoded).abs()
    assert (error <= decoded.abs() / 16 + scales.max() * 2**-10).all()
    assert isinstance(layer.weight, nn.Parameter)

    channels = layer_of(weight=codes, weight_scale=scales, logical_widths=WIDTHS)
    lk.init_fp8_linear_kernel(TOKEN, CHANNEL, torch.float32).process_weights_after_loading(channels)
    assert torch.equal(channels.weight_scale * channels.weight.float(), decoded)


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_input_scales_of_shards_are_merged(symmetric):
    codes, _, _ = shards(OperandSpec(torch.int8, Granularity.PER_TENSOR))
    scales, azps = torch.tensor([0.01, 0.02, 0.015]), torch.tensor([3, -20, 40], dtype=torch.int32)
    layer = layer_of(
        weight=codes,
        weight_scale=torch.rand(N, 1) + 0.1,
        input_scale=scales,
        input_zero_point=None if symmetric else azps,
        logical_widths=WIDTHS,
    )
    made = lk.init_int8_linear_kernel(True, True, symmetric, out_dtype=torch.float32)
    made.process_weights_after_loading(layer)
    if symmetric:
        assert layer.input_scale == scales.max()
    else:
        high = (scales.double() * (127 - azps)).max()
        low = (scales.double() * (-128 - azps)).min()
        torch.testing.assert_close(layer.input_scale.double(), (high - low) / 255, rtol=1e-7, atol=0)
        assert layer.input_zero_point == (-128 - low * 255 / (high - low)).round()
    assert made.apply_weights(layer, X).isfinite().all()


def test_scales_of_half_precision_become_float32():
    found = quantize_weight(torch.randn(N, K), INT8_CHANNEL)
    layer = layer_of(weight=found.codes, weight_scale=found.scale.bfloat16())
    made = lk.init_int8_linear_kernel(True, False, True, out_dtype=torch.float32)
    made.process_weights_after_loading(layer)
    assert layer.weight_scale.dtype is torch.float32
    wide = QuantizedLinear(made.config.problem().scheme, found.codes, found.scale.bfloat16())
    assert torch.equal(made.apply_weights(layer, X), wide(X))


def test_the_result_has_the_dtype_of_the_configuration():
    found = quantize_weight(torch.randn(N, K), INT8_CHANNEL)
    layer = layer_of(weight=found.codes, weight_scale=found.scale)
    made = lk.init_int8_linear_kernel(True, False, True)
    made.process_weights_after_loading(layer)
    assert made.apply_weights(layer, X).dtype is torch.bfloat16


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "limit",
    [{"bias": False}, {"bias_dtypes": frozenset({torch.float16})}, {"bias_as_out": True}],
    ids=lambda limit: next(iter(limit)),
)
def test_a_bias_that_the_kernel_does_not_add_is_added_after_it(limit, bias_dtype, out, monkeypatch):
    requires = replace(kernel("pytorch_int_mm").requires, **limit)
    register(replace(kernel("pytorch_int_mm"), name="their_int8", provider="their", requires=requires), monkeypatch)
    found, bias = quantize_weight(torch.randn(N, K), INT8_CHANNEL), torch.randn(N).to(bias_dtype)
    layer = layer_of(weight=found.codes, weight_scale=found.scale)
    made = lk.init_int8_linear_kernel(True, False, True, out_dtype=out)
    made.process_weights_after_loading(layer)
    assert layer.fx_quant_prepared.kernel == "their_int8"
    a, a_scale, _ = quantize_activation(X, made.config.problem().scheme.activation)
    exact = (a.double() @ found.codes.double().t()) * a_scale.double() * found.scale.double().t()
    assert_within(made.apply_weights(layer, X), exact.to(out), Numerics.SAME_ACCUM)
    biased = made.apply_weights(layer, X, bias)
    assert_within(biased, (exact + bias.double()).to(out), Numerics.REASSOCIATED, exact.abs().max().item())
    assert made.apply_weights(layer, X.reshape(2, 3, K), bias).shape == (2, 3, N)
    assert torch.equal(made.apply_weights(layer, X.reshape(2, 3, K), bias).reshape(6, N), biased)
    compiled = torch.compile(lambda x: made.apply_weights(layer, x, bias), backend="eager", fullgraph=True)
    assert_within(compiled(X), (exact + bias.double()).to(out), Numerics.SAME_ACCUM, exact.abs().max().item())


@pytest.mark.parametrize(
    "bias",
    [torch.randn(1), torch.randn(N, 1), torch.zeros(N, dtype=torch.int32)],
    ids=lambda bias: f"{bias.dtype}{list(bias.shape)}",
)
@pytest.mark.parametrize("adds", [True, False])
def test_a_bias_that_does_not_fit_is_an_error(adds, bias, monkeypatch):
    requires = replace(kernel("pytorch_int_mm").requires, bias=adds)
    register(replace(kernel("pytorch_int_mm"), name="their_int8", provider="their", requires=requires), monkeypatch)
    found = quantize_weight(torch.randn(N, K), INT8_CHANNEL)
    layer = layer_of(weight=found.codes, weight_scale=found.scale)
    made = lk.init_int8_linear_kernel(True, False, True)
    made.process_weights_after_loading(layer)
    with pytest.raises(ValueError, match=r"bias must be float32, bfloat16 or float16 of shape \[48\], got"):
        made.apply_weights(layer, X, bias)


def test_a_layer_compiles():
    found = quantize_weight(torch.randn(N, K), INT8_CHANNEL)
    layer = layer_of(weight=found.codes, weight_scale=found.scale)
    made = lk.init_int8_linear_kernel(True, False, False, out_dtype=torch.float32)
    made.process_weights_after_loading(layer)
    layer.forward = lambda x: made.apply_weights(layer, x)
    compiled = torch.compile(layer, backend="fx_quant", options={"strict": True}, fullgraph=True)
    assert_within(compiled(X), layer.forward(X), Numerics.EXACT)


def test_apply_before_processing_is_an_error():
    made = lk.init_int8_linear_kernel(True, False, True)
    with pytest.raises(FxQuantError, match=r"process_weights_after_loading\(layer\) must be called before apply_weig"):
        made.apply_weights(layer_of(weight=WEIGHT, weight_scale=SCALE), X)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"weight": WEIGHT.float()}, int8(), r"weight must be int8 \[n, k\].* got float32"),
        ({"weight_scale": torch.ones(7)}, int8(), r"weight_scale of int8 per_channel must be .*\[48, 1\].*\[7\]"),
        ({"weight_scale": -SCALE}, int8(), "weight_scale must be finite and positive, got -1.0"),
        ({"weight_scale": SCALE * float("nan")}, int8(), "weight_scale must be finite and positive, got nan"),
        ({"weight_scale": None}, int8(), "must have 'weight_scale'"),
        ({}, int8(static=True), "needs input_scale of one element, got none"),
        ({"input_scale": torch.tensor(0.0)}, int8(static=True), "input_scale must be finite and positive, got 0.0"),
        ({"input_scale": torch.tensor(1.0)}, int8(), "takes no input_scale"),
        ({"input_scale": torch.tensor(1.0)}, int8(static=True, symmetric=False), "needs input_zero_point"),
        (
            {},
            int8(weight_shape=(N, 32)),
            r"weight must be \[n, k\] = \[48, 32\] as the configuration says, got \[48, 64\]",
        ),
        ({"weight_scale": torch.ones(3)}, int8(False), "must say the rows of each in 'logical_widths'"),
        (
            {"weight_scale": torch.ones(3), "logical_widths": [1, 2]},
            int8(False),
            "one for each of the 2 logical_widths",
        ),
    ],
)
def test_a_layer_that_does_not_fit_is_one_clear_error(tensors, config, message):
    layer = layer_of(**{"weight": WEIGHT, "weight_scale": SCALE, **tensors})
    made = lk.TorchInt8ScaledMMLinearKernel(config)
    with pytest.raises((ValueError, lk.LayerError), match=message):
        made.process_weights_after_loading(layer)


def test_an_input_of_another_k_is_an_error():
    made, layer = lk.TorchInt8ScaledMMLinearKernel(int8()), layer_of(weight=WEIGHT, weight_scale=SCALE)
    made.process_weights_after_loading(layer)
    with pytest.raises(ValueError, match=r"x must be \[..., 64\].* got float32 \[2, 63\]"):
        made.apply_weights(layer, torch.randn(2, 63))


def test_a_class_that_cannot_run_here_says_why():
    found = quantize_weight(torch.randn(N, K), CHANNEL)
    layer = layer_of(weight=found.codes, weight_scale=found.scale)
    with pytest.raises(
        NoKernelError, match=r"RowWiseTorch.* cannot run .* on .*: pytorch_scaled_mm_rowwise: needs plat"
    ):
        lk.RowWiseTorchFP8ScaledMMLinearKernel(fp8()).process_weights_after_loading(layer)


def test_the_interface_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        lk.MMLinearKernel(CONFIG)  # type: ignore[abstract]
    assert C(CONFIG).get_output_padding() is None


def test_the_worked_example_runs(capsys):
    example = importlib.import_module("02_own_kernel")
    assert example.main() == 0
    assert "on an A100: no kernel can run MyKernelConfig" in capsys.readouterr().out
