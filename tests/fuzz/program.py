"""A program: inputs, lines of PyTorch that name them and each other, and what is returned, all of it text."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fx_quant.compat import decompositions_without_matmul
from tests.fuzz.recorder import record

NAME = re.compile(r"\b[vxp]\d+\b")


@dataclass(frozen=True)
class Input:
    """A tensor that a program is called with.

    Args:
        name: ``x0`` for what changes from call to call, ``p1`` for a parameter.
        text: the expression that makes it.
        static: whether it is declared a parameter or buffer.
    """

    name: str
    text: str
    static: bool


@dataclass(frozen=True)
class Step:
    """One line: ``out = text``, or ``text`` alone where it mutates."""

    text: str
    out: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """Names that the line uses, in order."""
        return tuple(NAME.findall(self.text))

    def __str__(self) -> str:
        return self.text if self.out is None else f"{self.out} = {self.text}"


@dataclass(frozen=True)
class Program:
    """A whole graph as text.

    Args:
        dynamic: the leading sizes of input 0 are symbols.
        numerics: the class that rewrites are allowed.
        between: lines that the caller runs between two calls, on inputs by their names.
    """

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    returned: tuple[str, ...]
    dynamic: bool = False
    numerics: str = "reassociated"
    between: tuple[str, ...] = ()

    def __str__(self) -> str:
        made = [f"{x.name} = {x.text}{'' if x.static else '  # changes from call to call'}" for x in self.inputs]
        body = [f"    {step}" for step in self.steps]
        names = ", ".join(x.name for x in self.inputs)
        how = (
            f"# numerics={self.numerics}{', the leading sizes of the first input are symbols' if self.dynamic else ''}"
        )
        after = [f"# between two calls: {line}" for line in self.between]
        lines = [how, *made, f"def f({names}):", *body, f"    return ({', '.join(self.returned)},)", *after]
        return "\n".join(lines)

    @property
    def mutates(self) -> bool:
        """Whether any line writes to a tensor that is there already."""
        return any(step.out is None for step in self.steps)

    def function(self) -> Callable[..., tuple[Any, ...]]:
        """The program as a function of its inputs."""
        names = ", ".join(x.name for x in self.inputs)
        body = "".join(f"    {step}\n" for step in self.steps)
        scope: dict[str, Any] = dict(SCOPE)
        exec(f"def f({names}):\n{body}    return ({', '.join(self.returned)},)", scope)
        return scope["f"]

    def tensors(self) -> list[Tensor]:
        """New tensors to call it with; each time the same."""
        return [evaluate(x.text, {}) for x in self.inputs]

    @property
    def static(self) -> tuple[int, ...]:
        """Positions of the parameters."""
        return tuple(i for i, x in enumerate(self.inputs) if x.static)


@functools.lru_cache(maxsize=4096)
def _compiled(text: str, mode: str) -> CodeType:
    return compile(text, "<program>", mode)


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression of a program."""
    return eval(_compiled(text, "eval"), SCOPE, names)


def execute_line(text: str, names: Mapping[str, Any]) -> None:
    """Run a line that mutates."""
    exec(_compiled(text, "exec"), SCOPE, names)


def fits(x: Tensor, to: torch.dtype) -> bool:
    """Whether every element of ``x`` is within the range of the integer dtype ``to``, so that a cast is defined."""
    if not x.is_floating_point() or to is torch.bool or not x.numel():
        return True
    x, info = x.double(), torch.iinfo(to)
    return bool(x.isfinite().all()) and info.min - 1 < x.min().item() and x.max().item() < info.max + 1


# --- what the lines may name ------------------------------------------------------------------------------------


def normal(seed: int, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers around zero, rows of different magnitudes."""
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
    if len(sizes) > 1 and sizes[-2] > 1:
        x = x * torch.logspace(-1, 0, sizes[-2])[:, None]
    return x.to(dtype)


def codes(seed: int, dtype: torch.dtype, *sizes: int, low: int | None = None, high: int | None = None) -> Tensor:
    """Random codes that use the whole range of ``dtype``, or all integers of ``[low, high]``."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return (torch.randn(sizes, generator=generator) * 20).clamp(-240, 240).to(dtype)
    info = torch.iinfo(dtype)
    low, high = info.min if low is None else low, info.max if high is None else high
    return torch.randint(low, high + 1, sizes, generator=generator).to(dtype)


def scales(seed: int, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Positive numbers about 0.05, all different."""
    return (torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) * 0.09 + 0.01).to(dtype)


def points(seed: int, dtype: torch.dtype, around: int, *sizes: int) -> Tensor:
    """Integers near ``around``, within the range of ``dtype``."""
    spread = torch.randint(-5, 6, sizes, generator=torch.Generator().manual_seed(seed))
    if dtype.is_floating_point:
        return (spread + around).to(dtype)
    info = torch.iinfo(dtype)
    # In float64 every int32 is exact, and what leaves int64 is cut by its ends.
    return (spread + around).clamp(info.min, info.max).to(dtype)


_LIBRARY = torch.library.Library("fuzz", "DEF")
_LIBRARY.define("noise(Tensor x) -> Tensor")
_LIBRARY.define("count(Tensor x) -> Tensor")
_LIBRARY.define("twice(Tensor x) -> Tensor")
CALLS = [0]


def _noise(x: Tensor) -> Tensor:
    return x + torch.rand(x.shape).to(x.dtype)


def _count(x: Tensor) -> Tensor:
    CALLS[0] += 1
    return x + CALLS[0]


for _name, _body in {"noise": _noise, "count": _count, "twice": lambda x: x * 2}.items():
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fuzz::{_name}", torch.empty_like, lib=_LIBRARY)

SCOPE: dict[str, Any] = {
    "torch": torch,
    "F": F,
    "aten": torch.ops.aten,
    "prims": torch.ops.prims,
    "pt2e": torch.ops.quantized_decomposed,
    "fuzz": torch.ops.fuzz,
    "normal": normal,
    "codes": codes,
    "scales": scales,
    "points": points,
    "inf": math.inf,
    "nan": math.nan,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "e4m3": torch.float8_e4m3fn,
}


# --- as the backend gets it -------------------------------------------------------------------------------------


@functools.cache
def _decompositions() -> dict:
    return decompositions_without_matmul()


def trace(program: Program) -> GraphModule:
    """The graph of ``program`` as the backend gets it: decomposed, and mutations of inputs last."""
    function = program.function()
    if program.mutates:
        function = torch.func.functionalize(function)
    named = {f"{x.name}_1": tensor for x, tensor in zip(program.inputs, program.tensors(), strict=True)}
    if not program.dynamic:
        return record(function, named, _decompositions())
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for position, x in enumerate(named.values()):
        free = x.dim() - 1 if position == 0 else 0
        dims = [DimDynamic.DYNAMIC if dim < free else DimDynamic.STATIC for dim in range(x.dim())]
        fakes.append(mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims)))
    with mode, torch.no_grad(), enable_python_dispatcher():
        traced = make_fx(function, decomposition_table=_decompositions(), tracing_mode="real")(*fakes)
    traced.graph.eliminate_dead_code()
    return traced
