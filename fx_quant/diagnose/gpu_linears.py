"""What runs the linears of a model on a GPU, for each number of rows: the kernel, our configuration, and the floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from tabulate import tabulate

from fx_quant.errors import FxQuantError
from fx_quant.kernels.select import Selection, select
from fx_quant.kernels.triton.architectures import Architecture, architecture
from fx_quant.kernels.triton.choose import Case, ranked, rows_up_to
from fx_quant.kernels.triton.cost import Cost, Floor, Matmul, floor
from fx_quant.kernels.triton.operands import recipe_of
from fx_quant.problem import Problem, SizeRange
from fx_quant.reasons import in_words, is_candidate
from fx_quant.scheme import Scheme
from fx_quant.target import Target

# Linears (n, k) of models by name, projections of one input in one.
MODELS: Mapping[str, Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "llama3-8b": MappingProxyType(
            {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
        ),
        "llama3-70b": MappingProxyType(
            {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}
        ),
    }
)
ROWS = (1, 16, 64, 256, 4096)
_FLOAT8 = "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel"


@dataclass(frozen=True)
class Dispatched:
    """One linear with one number of rows.

    Args:
        linear: its name.
        m, n, k: sizes.
        selection: what runs it, and why nothing else.
        floor: the least time that it can take there.
        cost: what our Triton kernel would run it by, and take; None where it is no matmul of codes.
    """

    linear: str
    m: int
    n: int
    k: int
    selection: Selection
    floor: Floor
    cost: Cost | None

    def to_dict(self) -> dict[str, object]:
        """Everything as plain data, times in microseconds."""
        found: dict[str, object] = {
            "linear": self.linear,
            "m": self.m,
            "n": self.n,
            "k": self.k,
            "kernel": self.selection.kernel.name,
            "floor_us": round(self.floor.seconds * 1e6, 2),
            "bound": self.floor.bound,
        }
        if self.cost is not None:
            found |= {
                "configuration": dataclasses.asdict(self.cost.configuration),
                "estimate_us": round(self.cost.seconds * 1e6, 2),
                "programs": self.cost.programs,
                "waves": self.cost.waves,
                "limit": self.cost.limit,
            }
        return found


def default_scheme(target: Target) -> Scheme:
    """Float8 of tokens and channels where the target has it, else int8."""
    codes = "int8" if not target.features & {"float8", "float8_fnuz"} else "float8_e4m3fn"
    codes = "float8_e4m3fnuz" if "float8_fnuz" in target.features else codes
    return Scheme.parse(_FLOAT8.replace("float8_e4m3fn", codes))


def linears(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Linears by name of each of ``names``: a model of ``MODELS``, or a weight's sizes such as ``4096x11008``.

    Raises:
        FxQuantError: a name is neither.
    """
    found: dict[str, tuple[int, int]] = {}
    for name in names:
        n, cross, k = name.partition("x")
        if name in MODELS:
            found |= {f"{name} {linear}": sizes for linear, sizes in MODELS[name].items()}
        elif cross and n.isdecimal() and k.isdecimal() and int(n) and int(k):
            found[name] = (int(n), int(k))
        else:
            raise FxQuantError(f"a shape must be NxK or one of {', '.join(MODELS)}, got {name!r}")
    return found


def dispatch(
    target: Target, names: Sequence[str], rows: Sequence[int] = ROWS, scheme: Scheme | None = None
) -> list[Dispatched]:
    """What runs each linear of ``names`` with each of ``rows`` on ``target``, to bfloat16.

    Raises:
        FxQuantError: the target is no GPU whose rates are known; a name is no model and no size.
        NoKernelError: nothing runs the scheme there.
    """
    if target.platform == "cpu":
        raise FxQuantError(f"--shapes needs the target of a GPU, such as sm90, got {target}")
    on, scheme = architecture(target.arch), scheme or default_scheme(target)
    return [
        _dispatched(linear, SizeRange.exactly(m), n, k, scheme, target, on)
        for linear, (n, k) in linears(names).items()
        for m in rows
    ]


def _dispatched(
    linear: str, m: SizeRange, n: int, k: int, scheme: Scheme, target: Target, on: Architecture
) -> Dispatched:
    selection = select(Problem(scheme, m, n, k, torch.bfloat16, None, constant_weight=True), target)
    weight, a_dtype = scheme.weight, scheme.activation.dtype
    bits = 8 // weight.codes_per_element
    least = floor(Matmul(m.low, n, k, a_dtype, bits, torch.bfloat16, weight.group or 0), on)
    if scheme.weight_only:
        return Dispatched(linear, m.low, n, k, selection, least, None)
    recipe = recipe_of(a_dtype, weight.block)
    best = ranked(Case(recipe, a_dtype, torch.bfloat16, rows_up_to(m.low), n, k), on)[0]
    return Dispatched(linear, m.low, n, k, selection, least, best)


def table(found: Sequence[Dispatched], target: Target) -> str:
    """What ``dispatch`` found, with the reasons: what bounds each linear, and why other kernels do not run it."""
    on = architecture(target.arch)
    rows = [
        (
            each.linear,
            each.m,
            f"{each.floor.seconds * 1e6:.1f}",
            each.floor.bound,
            each.selection.kernel.name,
            each.cost and str(each.cost.configuration),
            each.cost and f"{each.cost.seconds * 1e6:.1f}",
            each.cost and f"{each.cost.programs} in {each.cost.waves}",
            each.cost and each.cost.limit,
        )
        for each in found
    ]
    headers = ("linear", "m", "floor us", "bound by", "runs", "our Triton kernel", "us", "programs, waves", "limit")
    scheme = found[0].selection.problem.scheme if found else ""
    lines = [
        f"{scheme} on {target} ({on.device}: {on.processors} processors, {on.bandwidth / 1e12:.1f} TB/s)",
        "floor: the least time by these rates. Times of our kernel are the cost model's, nothing was measured for it.",
        "",
        tabulate(rows, headers=headers, missingval="-", disable_numparse=True),
        "",
    ]
    by_choice: dict[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], list[int]] = {}
    for each in found:
        chosen = each.selection.kernel.name
        candidates = {
            verdict.kernel: verdict.unmet
            for verdict in each.selection.verdicts
            if verdict.kernel != chosen and is_candidate(verdict.unmet)
        }
        losers = tuple((name, tuple(reasons)) for name, reasons in in_words(candidates).items())
        by_choice.setdefault((chosen, losers), []).append(each.m)
    for (chosen, losers), of in by_choice.items():
        lines.append(f"{chosen} runs m = {', '.join(map(str, sorted(set(of))))}:")
        lines += [f"    not {name}: {'; '.join(reasons)}" for name, reasons in losers]
    return "\n".join(lines)
