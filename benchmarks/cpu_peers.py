"""Every way in which PyTorch runs a quantized linear on a CPU, ours first; those of other runtimes are in cpu_runtimes.

A way is prepared once for a list of layers, then finished: compiled, where it is compiled. What freezes weights or
tunes templates is compiled for one number of rows; the rest once, with rows of a symbolic number.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from cpu_cases import KINDS, Case, Operands, Uint8Dynamic, for_fx_quant, source
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from fx_quant.scheme import INT4_DTYPES

Call = Callable[[Tensor], Sequence[Tensor]]

FROZEN: Mapping[str, Any] = {"freezing": True}
TUNED: Mapping[str, Any] = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}

# Largest relative error. Of the scheme's own result: rounding of what is float, and a code now and then.
EXACT: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 1e-2}
# Of the float product with the decoded weight: eight bits of the activation, over a range that the peer chooses (seven
# bits of it in fbgemm), and three bits of a float8.
QUANTIZED = 5e-2


@dataclass(frozen=True)
class Way:
    """One way to run a case.

    Args:
        family: what ``--peers`` selects it by.
        prepare: ``(case, layers) -> state``, such as a quantized module; ImportError says which package it needs.
        finish: ``(case, state, x) -> call``; the call gives one result for each layer.
        schemes: names of ``cpu_cases.KINDS``.
        exact: it must give the scheme's result; otherwise the float product, up to the activation's quantization.
        per_m: finish it for each number of rows, which stays static.
        quick: belongs to the short benchmark.
        another: it quantizes an activation that the scheme leaves float, so it is shown, but is no rival.
        dtypes: of the activation.
    """

    name: str
    family: str
    prepare: Callable[[Case, Sequence[Operands]], Any]
    finish: Callable[[Case, Any, Tensor], Call]
    schemes: tuple[str, ...]
    exact: bool = True
    per_m: bool = False
    quick: bool = True
    another: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def runs(self, case: Case) -> bool:
        """Whether the way knows the case's scheme and dtype."""
        return case.scheme in self.schemes and case.dtype in self.dtypes

    def tolerance(self, case: Case) -> float:
        """The largest relative error that the way's own rounding explains."""
        return EXACT[case.dtype] if self.exact else QUANTIZED


class Stack(nn.Module):
    """Linears that share an input: ``forward(x) -> [linear(x) for each]``."""

    def __init__(self, linears: Iterable[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> list[Tensor]:
        """One result for each linear."""
        return [linear(x) for linear in self.linears]


def stack(linears: Iterable[nn.Module]) -> Stack:
    """A ``Stack`` whose forward has a code object of its own.

    Dynamo keeps what it compiled by code object: a call would first try the guards of every other way.
    """
    own = types.FunctionType(Stack.forward.__code__.replace(), globals(), "forward")
    return type("Stack", (Stack,), {"forward": own})(linears).eval()


def compiled(module: nn.Module, x: Tensor, *, backend: str = "inductor", **config: Any) -> Call:
    """``module`` compiled; with ``config`` of Inductor, which freezing reads while Dynamo traces, for ``x`` only."""
    if not config:
        return torch.compile(module, backend=backend)
    # One for each x, for the same reason as ``stack``; and what freezing does to an exported module outlives a compile.
    module = stack(module.linears) if isinstance(module, Stack) else copy.deepcopy(module)
    call = torch.compile(module, backend=backend, dynamic=False, options=config)
    with inductor_config.patch(**config):
        call(x)
    return call


def _compile(case: Case, state: nn.Module, x: Tensor, **arguments: Any) -> Call:
    return compiled(state, x, **arguments)


def _as_is(case: Case, state: Call, x: Tensor) -> Call:
    return state


# --- what is prepared -------------------------------------------------------------------------------------------------


def _sources(case: Case, layers: Sequence[Operands]) -> nn.Module:
    return stack([source(case.scheme)(each) for each in layers])


def _ours(case: Case, layers: Sequence[Operands]) -> nn.Module:
    return stack([for_fx_quant(case, each) for each in layers])


def _unsigned(case: Case, layers: Sequence[Operands]) -> nn.Module:
    inductor_quantizer()
    return stack([Uint8Dynamic(each) for each in layers])


def _floats(case: Case, layers: Sequence[Operands], dtype: torch.dtype | None = None) -> nn.Module:
    """``nn.Linear`` of the decoded weights, in sequences of one, since module swaps need a parent."""
    linears = []
    for each in layers:
        n, k = each.weight.shape
        linear = nn.Linear(k, n, bias=each.bias is not None, device="meta")
        linear.weight = nn.Parameter(each.weight, requires_grad=False)
        if each.bias is not None:
            linear.bias = nn.Parameter(each.bias, requires_grad=False)
        linears.append(nn.Sequential(linear.to(dtype or case.torch_dtype)))
    return stack(linears)


def inductor_quantizer() -> Any:
    """The module of torchao's quantizer for x86, whose import registers its Inductor passes for good."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86

    return x86


def _torchao(config: str, *, passes: bool) -> Callable[[Case, Sequence[Operands]], nn.Module]:
    def prepare(case: Case, layers: Sequence[Operands]) -> nn.Module:
        import torchao.quantization as torchao

        if passes:
            inductor_quantizer()
        model = _floats(case, layers)
        torchao.quantize_(model, getattr(torchao, config)())
        return model

    return prepare


def _pt2e(case: Case, layers: Sequence[Operands], *, dynamic: bool) -> nn.Module:
    x86 = inductor_quantizer()
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    x = torch.randn(16, case.k, generator=torch.Generator().manual_seed(1))
    rows = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(_floats(case, layers, torch.float32), (x,), dynamic_shapes=rows).module()
    config = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    # An export within drops whatever was compiled so far, and the other ways would compile again while they are timed.
    with mock.patch.object(torch._dynamo, "reset"):
        prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
        prepared(x)
        return move_exported_model_to_eval(convert_pt2e(prepared))


def _pt2e_finish(case: Case, state: nn.Module, x: Tensor, **config: Any) -> Call:
    """The converted module takes float32; bfloat16 is its mixed mode, under autocast."""

    def mixed() -> contextlib.AbstractContextManager[Any]:
        low = case.dtype == "bfloat16"
        return torch.autocast("cpu", dtype=torch.bfloat16) if low else contextlib.nullcontext()

    with mixed():
        call = compiled(state, x.float(), **config)

    def run(x: Tensor) -> Sequence[Tensor]:
        with mixed():
            return call(x.float())

    return run


def _quantize_dynamic(case: Case, layers: Sequence[Operands], *, engine: str) -> Call:
    from torch.ao.quantization import quantize_dynamic

    torch.backends.quantized.engine = engine
    model = quantize_dynamic(_floats(case, layers, torch.float32), {nn.Linear}, dtype=torch.qint8)
    if case.dtype == "float32":
        return model
    return lambda x: [y.to(x.dtype) for y in model(x.float())]


def _int8pack(case: Case, layers: Sequence[Operands]) -> Call:
    pairs = [(each.codes, each.scale.to(case.torch_dtype)) for each in layers]
    return lambda x: [torch.ops.aten._weight_int8pack_mm(x, codes, scale) for codes, scale in pairs]


def _int4pack(case: Case, layers: Sequence[Operands]) -> Call:
    pairs = []
    for each in layers:
        assert each.block is not None and each.zero_point is not None
        assert each.scheme.weight.dtype in INT4_DTYPES
        nibbles = torch.stack((each.codes & 0xF, each.codes >> 4), -1).flatten(1).to(torch.int32)
        offset = -each.scale * each.zero_point
        scales = torch.stack((each.scale.t(), offset.t()), -1).contiguous().to(case.torch_dtype)
        pairs.append((torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 2), each.block[1], scales))
    return lambda x: [
        torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scales) for codes, group, scales in pairs
    ]


def _eager_float(case: Case, layers: Sequence[Operands]) -> Call:
    pairs = [
        (each.weight.to(case.torch_dtype), None if each.bias is None else each.bias.to(case.torch_dtype))
        for each in layers
    ]
    return lambda x: [F.linear(x, weight, bias) for weight, bias in pairs]


# --- the table --------------------------------------------------------------------------------------------------------

ALL = tuple(KINDS)
_INT8 = ("w8a8", "w8a8-static")
_DYNAMIC = ("w8a8",)
_W4 = ("w4a16-g128", "w4a16-g32")
_W8 = ("w8a16",)
_WEIGHT_ONLY = tuple(name for name in KINDS if KINDS[name].parse("float32").weight_only)
_QUANTIZED = tuple(name for name in KINDS if name not in _WEIGHT_ONLY)
_tuned, _frozen = partial(_compile, **TUNED), partial(_compile, **FROZEN)

# What does not want torchao's Inductor passes comes first: importing them changes every later compile.
TORCH_WAYS: tuple[Way, ...] = (
    Way("fx_quant", "fx_quant", _ours, partial(_compile, backend="fx_quant"), ALL),
    Way("inductor", "inductor", _sources, _compile, ALL),
    Way("fx_quant frozen", "fx_quant", _ours, partial(_compile, backend="fx_quant", **FROZEN), _INT8, per_m=True),
    Way("eager", "eager", _sources, lambda case, state, x: state, _QUANTIZED),
    Way("float eager", "float", _eager_float, _as_is, ALL, exact=False),
    Way("float frozen", "float", _floats, _frozen, ALL, exact=False, per_m=True),
    Way("float max-autotune", "float", _floats, _tuned, ALL, exact=False, per_m=True, quick=False),
    Way("inductor max-autotune", "inductor", _sources, _tuned, _INT8, per_m=True),
    Way("quantize_dynamic x86", "quantize_dynamic", partial(_quantize_dynamic, engine="x86"), _as_is, _DYNAMIC, False),
    Way(
        "quantize_dynamic onednn",
        "quantize_dynamic",
        partial(_quantize_dynamic, engine="onednn"),
        _as_is,
        _DYNAMIC,
        False,
    ),
    Way("_weight_int8pack_mm", "aten", _int8pack, _as_is, _W8),
    Way("_weight_int4pack_mm_for_cpu", "aten", _int4pack, _as_is, _W4),
    Way(
        "torchao",
        "torchao",
        _torchao("Int8DynamicActivationInt8WeightConfig", passes=False),
        _compile,
        _DYNAMIC,
        False,
        quick=False,
    ),
    *(
        Way("torchao max-autotune", "torchao", _torchao(config, passes=True), _tuned, schemes, exact=False, per_m=True)
        for config, schemes in (("Int8DynamicActivationInt8WeightConfig", _DYNAMIC), ("Int8WeightOnlyConfig", _W8))
    ),
    Way("inductor uint8 max-autotune", "inductor", _unsigned, _tuned, _DYNAMIC, per_m=True),
    *(
        Way(
            f"pt2e {'dynamic' if dynamic else 'static'} {tuning}",
            "pt2e",
            partial(_pt2e, dynamic=dynamic),
            partial(_pt2e_finish, **config),
            _DYNAMIC if dynamic else _INT8,
            exact=False,
            per_m=True,
            quick=config is FROZEN,
        )
        for dynamic in (True, False)
        for tuning, config in (("frozen", FROZEN), ("max-autotune", TUNED))
    ),
)
