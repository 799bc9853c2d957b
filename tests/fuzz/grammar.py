"""Programs drawn from a seed: quantized matmuls in many spellings, with whatever may stand between their steps.

Sizes are small and mostly square, so that a factor along the wrong axis fits all the same. Every line is run as it is
drawn, and one that PyTorch refuses is dropped, so what is drawn later can be chosen by the shapes that are there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.program import CALLS, Input, Program, Step, evaluate, execute_line, fits

NAMES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "e4m3",
    torch.bool: "torch.bool",
}
CAST = re.compile(r"(\w+)\.to\(\w+\)|prims.convert_element_type.default\((\w+), \w+\)")


class Draft:
    """A program that is being drawn, and what its lines gave so far."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        # Of its own, so that the programs are those of before with other numbers.
        self.far = random.Random(-seed - 1)
        self.pads = random.Random(-seed - 2)
        self.offsets = random.Random(-seed - 3)
        self.parts = random.Random(-seed - 4)
        self.inputs: list[Input] = []
        self.steps: list[Step] = []
        self.values: dict[str, Any] = {}
        self.matmuls: list[str] = []

    # --- chance -------------------------------------------------------------------------------------------------

    def chance(self, share: float) -> bool:
        """True in ``share`` of all draws."""
        return self.rng.random() < share

    def pick(self, *options: Any) -> Any:
        """One of ``options``."""
        return self.rng.choice(options)

    # --- lines --------------------------------------------------------------------------------------------------

    def make(self, text: str, *, static: bool = True) -> str:
        """A new input."""
        name = f"{'p' if static else 'x'}{len(self.inputs)}"
        self.values[name] = evaluate(text, {})
        self.inputs.append(Input(name, text, static))
        return name

    def seed(self) -> int:
        """For the numbers of one input."""
        return self.rng.randrange(1000)

    def do(self, text: str) -> str | None:
        """A new line; None, and no line, where PyTorch refuses it or a cast has no defined result."""
        try:
            with torch.no_grad():
                value = evaluate(text, self.values)
        except Exception:
            return None
        if not isinstance(value, Tensor) or value.numel() > 1 << 18:
            return None
        cast = CAST.fullmatch(text)
        if (
            cast is not None
            and not value.is_floating_point()
            and not fits(self.values[cast.group(1) or cast.group(2)], value.dtype)
        ):
            return None
        name = f"v{len(self.steps)}"
        self.values[name] = value
        self.steps.append(Step(text, name))
        return name

    def mutate(self, text: str) -> None:
        """A line that writes to what is there already."""
        try:
            with torch.no_grad():
                execute_line(text, self.values)
        except Exception:
            return
        self.steps.append(Step(text))

    def first(self, *texts: str) -> str:
        """The first of ``texts`` that PyTorch runs."""
        for text in texts:
            name = self.do(text)
            if name is not None:
                return name
        raise Dropped

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def kind(self, name: str) -> str:
        return NAMES[self.values[name].dtype]

    def is_float(self, name: str) -> bool:
        return self.values[name].is_floating_point()


class Dropped(Exception):
    """Nothing sensible can follow what was drawn."""


# --- what changes nothing, or little ----------------------------------------------------------------------------


def same(d: Draft, name: str, share: float = 0.15) -> str:
    """``name`` after some steps that keep its shape and values, in a share of all draws."""
    while d.chance(share):
        name = d.do(_same_text(d, name)) or name
    return name


def _same_text(d: Draft, v: str) -> str:
    shape, rank = d.shape(v), len(d.shape(v))
    sizes = ", ".join(map(str, shape))
    dim = d.rng.randrange(rank) if rank else 0
    options = [
        f"{v}.reshape({list(shape)})",
        f"{v}.reshape(-1).view({list(shape)})",
        f"{v}.contiguous()",
        f"{v}.clone()",
        f"{v}.detach()",
        f"{v}.to({d.kind(v)})",
        f"{v}.unsqueeze(0).squeeze(0)",
        f"{v}.unsqueeze(-1).squeeze(-1)",
        f"{v}[None][0]",
        f"{v}[...]",
        f"aten.alias.default({v})",
        f"aten.expand.default({v}, {list(shape)})",
    ]
    if rank:
        options += [
            f"{v}[:]",
            f"{v}.expand({sizes})",
            f"{v}.flatten().unflatten(0, {shape})",
            f"{v}.narrow({dim}, 0, {shape[dim]})",
            f"torch.cat([{v}[:1], {v}[1:]])",
            f"torch.cat({v}.chunk(2, {dim}), {dim})",
            f"{v}.flip({dim}).flip({dim})",
            f"aten.slice.Tensor({v}, {dim}, 0, 9223372036854775807, 1)",
            f"{v}.movedim({dim}, 0).movedim(0, {dim})",
        ]
    if rank > 1:
        options += [
            f"{v}.mT.contiguous().mT",
            f"{v}.transpose(0, -1).transpose(0, -1)",
            f"{v}.flatten(0, 1).unflatten(0, {shape[:2]})",
            f"{v}.T.T" if rank == 2 else f"{v}.mT.mT",
        ]
    if d.is_float(v) and d.kind(v) != "e4m3":
        options += [
            f"{v} * 1",
            f"1.0 * {v}",
            f"{v} + 0",
            f"{v} - 0.0",
            f"{v} + -0.0",
            f"{v} / 1",
            f"torch.add({v}, 0, alpha=2)",
            f"torch.sub({v}, 0, alpha=3)",
            f"torch.clamp({v}, -inf, inf)",
            f"torch.clamp({v}, min=-inf)",
            f"{v}.to(f64).to({d.kind(v)})",
            f"{v}.float().to({d.kind(v)})",
            f"torch.where({v} == {v}, {v}, 0.0)",
            f"{v} * True",
        ]
    elif d.kind(v) != "e4m3":
        options += [f"{v} + 0", f"{v} * 1", f"{v}.to(i32).to({d.kind(v)})", f"{v}.float().to({d.kind(v)})", f"{v} | 0"]
    return d.rng.choice(options)


def changed(d: Draft, v: str) -> str:
    """``v`` moved, cut or broadcast in a way that its shape may not show."""
    shape, rank = d.shape(v), len(d.shape(v))
    if not rank:
        return v
    dim = d.rng.randrange(rank)
    options = [
        f"{v}.flip({dim})",
        f"{v}.roll(1, {dim})",
        f"{v}.narrow({dim}, 0, 1).expand({list(shape)})",
        f"{v}.select({dim}, 0).unsqueeze({dim}).expand({list(shape)})",
        f"{v}.flatten()[: {v}.numel() // 2].repeat(2)",
    ]
    if rank > 1:
        other = d.rng.randrange(rank)
        options += [
            f"{v}.transpose({dim}, {other})",
            f"{v}.transpose({dim}, {other}).contiguous().view({list(shape)})",
            f"{v}.transpose({dim}, {other}).reshape({list(shape)})",
            f"{v}.mT",
            f"{v}[..., ::2].repeat_interleave(2, -1)",
            f"{v}.reshape(2, -1, {shape[-1]}).transpose(0, 1).reshape({list(shape)})",
            f"{v}.reshape(-1, 2).t().reshape({list(shape)})",
        ]
    found = d.do(d.rng.choice(options))
    return v if found is None or d.shape(found) != shape else found


# --- scales and zero points -------------------------------------------------------------------------------------


def factor(d: Draft, make: Callable[..., str], rows: int, k: int, group: int, along: str) -> tuple[str, str]:
    """``(name, how it is applied)`` of a scale or zero point of codes ``[rows, k]``, made by ``make(*sizes)``."""
    groups = max(k // group, 1)
    if along == "tensor":
        return make(*d.pick((), (1,), (1, 1))), "plain"
    if along == "rows":
        sizes = d.pick((rows, 1), (rows, 1), (rows, 1), (rows,), (1, rows))
        return make(*sizes), "plain" if sizes == (rows, 1) or d.chance(0.1) else "column"
    if along == "along_k":
        return make(*d.pick((k,), (1, k))), "plain"
    if along == "full":
        return make(rows, k), "plain"
    if along == "block":
        return make(max(rows // 2, 1), groups), "block"
    return make(rows, groups), "group"


def spread(d: Draft, name: str, how: str, rows: int, k: int, group: int) -> str:
    """A factor as something that broadcasts to ``[rows, k]``."""
    if how == "plain":
        return same(d, name, 0.1)
    if how == "column":
        return d.first(d.pick(f"{name}.reshape(-1, 1)", f"{name}.view({rows}, 1)", f"{name}.flatten()[:, None]"))
    if how == "block":
        return d.first(f"{name}.repeat_interleave({group}, 1).repeat_interleave(2, 0)", name)
    text = d.pick(
        f"{name}.repeat_interleave({group}, 1)",
        f"{name}.repeat_interleave({group}, 1)",
        f"{name}.unsqueeze(-1).expand({rows}, {k // group}, {group}).reshape({rows}, {k})",
        f"{name}[:, :, None].expand(-1, -1, {group}).flatten(1)",
        f"{name}.repeat(1, {group})",
        f"torch.tile({name}, (1, {group}))",
        f"{name}[:, None, :].expand(-1, {group}, -1).reshape({rows}, {k})",
        f"{name}[:, None, :].expand(-1, {group}, -1).flatten(1)",
    )
    return d.first(text)


def scale_maker(d: Draft, kind: str = "f32") -> Callable[..., str]:
    """Makes a parameter of positive numbers, or finds one that is there."""

    def make(*sizes: int) -> str:
        known = [n for n, v in d.values.items() if n[0] == "p" and tuple(v.shape) == sizes and v.is_floating_point()]
        if known and d.chance(0.25):
            return d.rng.choice(known)
        text = ", ".join(map(str, (d.seed(), *sizes)))
        made = f"scales({text}, dtype={kind})"
        if d.far.random() < 0.12:
            # Codes of small or large weights, of rows that are all zero, and what no scale should be.
            ordinary, rare = ("* 1e-4", "* 1e-6", "* 1e4"), (".round(decimals=1)", "* 1e-40", "* inf", "* nan")
            few = d.far.choice(ordinary * 3 + rare)
            made = f"({made} {few})" if few[0] == "*" else f"{made}{few}"
        return d.make(made, static=d.chance(0.95))

    return make


# Where zero points lie: among the codes mostly, at the ends of their dtypes, and anywhere.
AROUND = (0, 0, 3, 8, -8, 128, 127, -128, 255, -129, 300, 1000, 40000, 300000, 2**24 + 1, 2**31 - 6, -(2**31) + 5)


def point_maker(d: Draft) -> Callable[..., str]:
    kind = d.pick("i32", "i32", "i32", "i8", "u8", "i64", "i16", "f32")
    around = d.pick(*AROUND[:10])
    if d.chance(0.4):
        kind, around = d.pick("i32", "i32", "i64"), d.pick(*AROUND[10:])

    def make(*sizes: int) -> str:
        text = ", ".join(map(str, (d.seed(), kind, around, *sizes)))
        return d.make(f"points({text})", static=d.chance(0.95))

    return make


def in_groups(d: Draft, op: str, y: str, name: str, group: int) -> str | None:
    """``y [rows, k] op name [rows, k / group]`` with the codes viewed as groups, of neighbours or of every so many."""
    if len(d.shape(y)) != 2:
        return None  # broadcast by what it met before
    rows, k = d.shape(y)
    neighbours = d.chance(0.75)
    inner = (k // group, group) if neighbours else (group, k // group)
    parts = d.do(
        d.pick(
            f"{y}.view({rows}, {inner[0]}, {inner[1]})",
            f"{y}.reshape({rows}, -1, {inner[1]})",
            f"{y}.unflatten(-1, {inner})",
        )
    )
    if parts is None:
        return None
    found = applied(d, op, parts, d.first(f"{name}.unsqueeze({-1 if neighbours else 1})"))
    return (
        None
        if found is None
        else d.do(d.pick(f"{found}.view({rows}, {k})", f"{found}.flatten(1)", f"{found}.reshape({rows}, {k})"))
    )


def offset(d: Draft, y: str, group: int) -> str:
    """``y [rows, k]`` and, in a fifth of all draws, floats that channels or groups share, or that vary along k."""
    draws = d.offsets
    if draws.random() > 0.2 or len(d.shape(y)) != 2 or not d.is_float(y):
        return y
    rows, k = d.shape(y)
    whole = k >= group and k % group == 0
    sizes = draws.choice(((), (rows, 1), (rows, 1), (1, k)) + ((rows, k // group),) * 6 * whole)
    text = ", ".join(map(str, (draws.randrange(1000), *sizes)))
    made = d.make(f"(scales({text}) * 40 - 2)", static=draws.random() < 0.9)
    op = draws.choice("+-")
    if sizes != (rows, k // group):
        return d.do(f"{y} {op} {made}") or y
    texts = (
        f"({y}.unflatten(-1, (-1, {group})) {op} {made}[..., None]).flatten(1)",
        f"({y}.view({rows}, -1, {group}) {op} {made}.unsqueeze(-1)).view({rows}, {k})",
        f"{y} {op} {made}.repeat_interleave({group}, 1)",
        f"({y}.view({rows}, {group}, -1) {op} {made}[:, None]).reshape({rows}, {k})",
    )
    return d.do(draws.choice(texts)) or y


def applied(d: Draft, op: str, v: str, factor_name: str) -> str | None:
    """``v op factor`` in one of its spellings."""
    texts = {
        "*": (
            f"{v} * {factor_name}",
            f"{factor_name} * {v}",
            f"torch.mul({v}, {factor_name})",
            f"aten.mul.Tensor({v}, {factor_name})",
        ),
        "/": (
            f"{v} / {factor_name}",
            f"torch.div({v}, {factor_name})",
            f"torch.div({v}, {factor_name}, rounding_mode=None)",
        ),
        "-": (
            f"{v} - {factor_name}",
            f"{v} - {factor_name}",
            f"torch.sub({v}, {factor_name})",
            f"torch.sub({v}, {factor_name}, alpha={d.pick(1, 2, -1)})",
            f"torch.sub({v}, {factor_name}, alpha={d.pick(1, 2, 0)})",
            f"{v} + -{factor_name}",
            f"torch.add({v}, {factor_name}, alpha=-1)",
            f"torch.rsub({factor_name}, {v})",
            f"torch.rsub({factor_name}, {v}, alpha={d.pick(1, 2)})",
        ),
    }[op]
    return d.do(d.rng.choice(texts))


# --- operands ---------------------------------------------------------------------------------------------------


class Sizes:
    """Sizes of one program."""

    def __init__(self, d: Draft) -> None:
        self.group = d.pick(2, 2, 4)
        kind = d.pick(*["cube"] * 4, *["grid"] * 3, *["free"] * 3, "large")
        if kind == "cube":
            self.m = self.k = self.n = d.pick(2, 4, 4, 4, 8)
        elif kind == "grid":
            # As many groups as rows.
            self.m = self.n = d.pick(2, 4, 4)
            self.k = self.n * self.group
        elif kind == "large":
            self.m, self.k, self.n, self.group = d.pick(1, 4), d.pick(64, 128), d.pick(16, 64), 32
        else:
            self.m, self.k, self.n = d.pick(1, 2, 3, 4, 6), d.pick(2, 4, 8, 16), d.pick(1, 2, 4, 4, 5, 8)
        self.lead = d.pick(None, None, None, 1, 2, 2, 3, (2, 1), (2, 2))
        if d.chance(0.02):
            setattr(self, d.pick("m", "m", "n"), 0)


def activation(d: Draft, z: Sizes, kind: str, *, static: bool = False) -> str:
    """The float activation ``[..., k]``."""
    lead = () if z.lead is None else (z.lead,) if isinstance(z.lead, int) else z.lead
    text = ", ".join(map(str, (d.seed(), *lead, z.m, z.k)))
    # Large enough for sums that float16 does not hold, or so small that its products vanish.
    far = f" * {d.far.choice((300, 300, 1e-3))}" if d.far.random() < (0.3 if kind == "f16" else 0.04) else ""
    return d.make(f"normal({text}, dtype={kind}){far}", static=static)


def quantized(d: Draft, x: str) -> tuple[str, str | None, str | None]:
    """Codes of ``x`` with what they were divided and shifted by."""
    form = d.pick("token", "token", "token", "tensor", "given", "asymmetric", "float8", "column", "number")
    lo, hi = d.pick((-128, 127), (-128, 127), (-127, 127), (-8, 7), (0, 127))
    x = same(d, x)
    if d.chance(0.08):
        sizes = d.shape(x)
        codes = d.make(
            f"codes({d.seed()}, {d.pick('i8', 'i8', 'u8')}, {', '.join(map(str, sizes))})", static=d.chance(0.2)
        )
        text = ", ".join(map(str, (d.seed(), *sizes[:-1], 1)))
        return same(d, codes, 0.1), d.make(f"scales({text})", static=False), None
    y = d.first(f"{x}.float()") if d.kind(x) != "f32" and d.chance(0.6) else x
    if form == "token":
        amax = d.first(
            d.pick(
                f"{y}.abs().amax(-1, keepdim=True)",
                f"{y}.abs().amax(dim=-1, keepdim=True)",
                f"torch.amax({y}.abs(), (-1,), True)",
                f"{y}.abs().max(-1, keepdim=True)[0]",
                f"{y}.abs().amax(0, keepdim=True)",
            )
        )
    elif form == "column":
        amax = d.first(f"{y}[..., :1].abs() + 0.5")
    elif form == "given":
        s = scale_maker(d)(*d.pick((), (1,)))
        amax = d.first(f"{s} * 100")
    elif form == "number":
        amax = None
    else:
        amax = d.first(d.pick(f"{y}.abs().amax()", f"{y}.abs().max()"))
    if form == "float8":
        scale = d.first(f"{amax}.float() / 448")
        if d.chance(0.5):
            scale = d.first(f"{scale}.clamp(min=1e-6)")
        z = d.first(f"({y}.float() / {scale}).clamp(-448, 448)")
        return same(d, d.first(f"{z}.to(e4m3)"), 0.1), scale, None
    if amax is None:
        scale = "0.04"
    else:
        amax = d.first(f"{amax}.clamp(min=1e-5)") if d.chance(0.5) else amax
        scale = d.first(d.pick(f"{amax} / {max(hi, 1)}", f"{amax} / {float(hi)}", f"torch.div({amax}, {hi})"))
        scale = d.first(f"{scale}.clamp(min=1e-6)") if d.chance(0.7) else scale
        scale = d.first(f"{scale}.float()") if d.chance(0.5) else scale
        scale = same(d, scale, 0.1)
    y = d.first(
        d.pick(
            f"{y} / {scale}",
            f"{y} / {scale}",
            f"{y} * (1.0 / {scale})",
            f"torch.div({y}, {scale}, rounding_mode={d.pick('None', chr(39) + 'floor' + chr(39))})",
        )
    )
    y = same(d, y, 0.1)
    zero = None
    if form == "asymmetric" or d.chance(0.1):
        zero = d.first(
            d.pick(f"torch.round({x}.float().mean() * 5 + 3)", f"({x}.float().amin(-1, keepdim=True) * 9).round()")
        )
        y = d.first(d.pick(f"{y}.round() + {zero}", f"torch.round({y}) + {zero}"))
    else:
        y = d.first(
            d.pick(f"{y}.round()", f"torch.round({y})", f"torch.round({y}, decimals=0)", f"{y}.floor()", f"{y}")
        )
    u8 = d.chance(0.2)
    lo, hi = d.pick((0, 255), (0, 255), (0, 127)) if u8 else (lo, hi)
    y = d.first(
        d.pick(
            f"{y}.clamp({lo}, {hi})",
            f"torch.clamp({y}, {lo}, {hi})",
            f"torch.clamp({y}, min={lo}, max={hi})",
            f"{y}.clamp(min={lo}).clamp(max={hi})",
            f"torch.minimum(torch.maximum({y}, torch.tensor({float(lo)})), torch.tensor({float(hi)}))",
            f"torch.clamp({y}, {float(lo)}, {float(hi)})",
        )
    )
    if bool(torch.isnan(d.values[y].double()).any()):
        raise Dropped
    codes = d.first(f"{y}.to({'u8' if u8 else 'i8'})")
    if zero is not None:
        zero = d.first(d.pick(f"{zero}.to(i32)", f"{zero}", f"{zero}.to(i64)"))
    return same(d, codes, 0.1), None if scale == "0.04" and d.chance(0.5) else scale, zero


class Weight:
    """A weight's codes: their name, and whether they are stored ``[k, n]``."""

    def __init__(self, d: Draft, z: Sizes, kind: str | None = None) -> None:
        self.kind = kind or d.pick("i8", "i8", "i8", "i8", "u8", "e4m3", "nibbles")
        self.by_k = d.chance(0.3)
        static = d.chance(0.93)
        seed = d.seed()
        n, k = z.n, z.k
        if self.kind == "nibbles":
            self.by_k = False
            packed = d.make(f"codes({seed}, u8, {n}, {max(k // 2, 1)})", static=static)
            low, high = d.first(f"{packed} & 15"), d.first(d.pick(f"{packed} >> 4", f"({packed} >> 4) & 15"))
            self.name = d.first(
                d.pick(
                    f"torch.stack([{low}, {high}], -1).flatten(1)",
                    f"torch.cat([{low}, {high}], 1)",
                    f"torch.stack(({low}, {high}), dim=2).reshape({n}, -1)",
                )
            )
        else:
            sizes = f"{k}, {n}" if self.by_k else f"{n}, {k}"
            low = d.pick("", "", "", ", low=-8, high=7", ", low=-127", ", low=64") if self.kind == "i8" else ""
            suffix = d.pick("", "", "", ".t().contiguous().t()")
            self.name = d.make(f"codes({seed}, {self.kind}, {sizes}{low}){suffix}", static=static)
        self.name = same(d, self.name, 0.1)
        if d.chance(0.05) and self.kind in ("i8", "u8", "nibbles"):
            name = self.name
            moved = d.pick(
                f"{name} + 1",
                f"{name}.to(i8)",
                f"({name}.to(i16) - 128).to(i8)",
                f"{name} ^ 1",
                f"-{name}",
                f"({name} - 8).to(i8)",
                f"{name}.to(torch.bool).to({d.kind(name)})",
                f"{name} // 2",
            )
            self.name = d.do(moved) or name
            self.kind = d.kind(self.name)
        if d.chance(0.06):
            self.name = changed(d, self.name)

    def rows(self, d: Draft) -> str:
        """As ``[n, k]``."""
        return d.first(f"{self.name}.t()", f"{self.name}.mT") if self.by_k else self.name

    def columns(self, d: Draft) -> str:
        """As ``[k, n]``."""
        return self.name if self.by_k else d.first(f"{self.name}.t()", f"{self.name}.mT")


def decoded(
    d: Draft,
    name: str,
    rows: int,
    k: int,
    group: int,
    kind: str,
    shift: str | None,
    scale: str | None,
    plain: bool = False,
) -> str:
    """Codes ``[rows, k]`` as floats: less a zero point, times a scale. Either may be given; None draws it."""
    order = d.pick("usual", "usual", "usual", "usual", "scale first", "twice")
    plain = plain or d.chance(0.4)
    if plain:
        order = "usual"
    y = name if plain else same(d, name, 0.1)
    if d.kind(y) == "e4m3":
        shift = ""
    in_kind = d.pick("f32", "f32", "i32", "i32", kind, "i16", "") if d.kind(y) != "e4m3" else d.pick("f32", kind)
    in_kind = d.pick("f32", "i32", "i64") if plain and d.kind(y) != "e4m3" else in_kind
    if in_kind:
        y = d.first(d.pick(f"{y}.to({in_kind})", f"prims.convert_element_type.default({y}, {in_kind})"))
    if shift is None and d.chance(0.5 if plain else 0.35):
        along = d.pick("tensor", "rows") if plain else d.pick("tensor", "rows", "rows", "group", "number", "along_k")
        if along == "number":
            shift = str(d.pick(0, 8, 128, -3, 2**15, 127.0, True, 300000))
        elif along == "group" and (k % group or k < group):
            shift = None
        else:
            point, how = factor(d, point_maker(d), rows, k, group, along)
            shift = spread(d, point, how, rows, k, group)
    if shift and order != "scale first":
        y = applied(d, "-", y, shift) or y
        y = same(d, y, 0.1)
    if d.kind(y) != kind:
        y = d.first(f"{y}.to({kind})")
    for _ in range(2 if order == "twice" else 1):
        given, scale = scale, None
        if given is None:
            along = d.pick(*["rows"] * 4, "tensor", *["group"] * 4, "block", "along_k", "full", "number", "none")
            along = d.pick("rows", "rows", "tensor", "group") if plain else along
            if along == "none":
                continue
            if along == "number":
                given = str(d.pick(0.5, 2, 0.03, 1, True))
            elif along in ("group", "block") and (k % group or k < group):
                given = "0.25"
            else:
                made, how = factor(d, scale_maker(d, d.pick("f32", "f32", kind)), rows, k, group, along)
                if how == "group" and d.chance(0.5) and d.is_float(y):
                    y = in_groups(d, d.pick("*", "*", "/"), y, made, group) or y
                    continue
                given = spread(d, made, how, rows, k, group)
        y = applied(d, d.pick("*", "*", "*", "/"), y, given) or y
        y = same(d, y, 0.1)
    if shift and order == "scale first":
        y = applied(d, "-", y, shift) or y
    y = offset(d, y, group)
    if d.kind(y) != kind or d.chance(0.1):
        y = d.first(f"{y}.to({kind})")
    if d.chance(0.05):
        y = changed(d, y)
    return y


# --- matmuls ----------------------------------------------------------------------------------------------------


def float_matmul(d: Draft, a: str, w: str, bias: Callable[[], str]) -> str:
    """``a [..., k]`` times ``w [n, k]``, in one of its forms."""
    rank = len(d.shape(a))
    k = d.shape(a)[-1]
    if d.parts.random() < 0.06:
        return d.first(d.parts.choice(_in_parts(d, a, w)), f"{a} @ {w}.t()")
    texts = [
        f"{a} @ {w}.t()",
        f"{a} @ {w}.mT",
        f"F.linear({a}, {w})",
        f"F.linear({a}, {w}, {bias()})",
        f"torch.matmul({a}, {w}.transpose(0, 1))",
        f"torch.einsum('...k,nk->...n', {a}, {w})",
        f"{a}.reshape(-1, {k}) @ {w}.t()",
        f"({w} @ {a}.mT).mT",
        f"torch.addmm({bias()}, {a}.reshape(-1, {k}), {w}.t())",
        f"torch.addmm({bias()}, {a}.reshape(-1, {k}), {w}.t(), beta={d.pick(0, 1, 2)}, alpha={d.pick(1, 1, 2)})",
    ]
    if rank == 3:
        texts += [
            f"torch.bmm({a}, {w}.t().expand({d.shape(a)[0]}, -1, -1))",
            f"torch.baddbmm({bias()}, {a}, {w}.t().expand({d.shape(a)[0]}, -1, -1))",
            f"F.conv1d({a}.mT, {w}[:, :, None]).mT",
            f"torch.einsum('bmk,nk->bmn', {a}, {w})",
            f"torch.einsum('bmk,nk->bnm', {a}, {w}).mT",
        ]
    if rank == 2:
        texts += [
            f"torch.mm({a}, {w}.t())",
            f"torch.einsum('mk,nk->mn', {a}, {w})",
            f"torch.stack([torch.mv({w}, {a}[0]), torch.mv({w}, {a}[-1])])",
            f"F.conv2d({a}[:, :, None, None], {w}[:, :, None, None])[:, :, 0, 0]",
            f"({a}[:, None, :] * {w}).sum(-1)",
        ]
    if d.chance(0.25) and d.shape(w)[0] == d.shape(w)[1]:
        texts.append(f"{a} @ {w}")
    return d.first(texts[d.rng.randrange(len(texts))] if d.chance(0.4) else d.rng.choice(texts[:5]), texts[0])


def _in_parts(d: Draft, a: str, w: str) -> list[str]:
    """Matmuls of ``a`` and parts of the weight ``w [n, k]``."""
    n, k = d.shape(w)
    row, column = d.parts.randrange(n), d.parts.choice((k // 2, d.parts.randrange(1, k + 1)))
    views = f"{w}.view(2, -1, {k})", f"{w}.view(-1, 2, {k})"
    return [
        f"torch.cat([{a} @ {w}.chunk(2)[0].t(), {a} @ {w}.chunk(2)[1].t()], -1)",
        f"torch.cat([{a} @ {w}.split({row + 1})[0].mT, {a} @ {w}.split({row + 1})[-1].mT], -1)",
        f"torch.stack([{a} @ {views[0]}.unbind()[1].t(), {a} @ {views[0]}.unbind()[0].t()], -1)",
        f"{a} @ {views[1]}.unbind(1)[1].t() - {a} @ {views[1]}[:, 0].t()",
        f"F.linear({a}, {w}[{row}:])",
        f"F.linear({a}, {w}[{row}])",
        f"F.linear({a}[..., :{column}], {w}[:, :{column}])",
        f"F.linear({a}[..., ::2], {w}[:, ::2])",
        f"F.linear({a}, {w}[{row}::2])",
    ]


def integer_matmul(d: Draft, q: str, w: Weight) -> str:
    """``q [..., k]`` times the codes, summed as integers or in float."""
    k = d.shape(q)[-1]
    flat = d.first(f"{q}.reshape(-1, {k})") if len(d.shape(q)) != 2 or d.chance(0.2) else q
    right = w.columns(d)
    if d.chance(0.03) and d.shape(q)[-2:] == d.shape(right)[-2:]:
        right = d.first(f"{flat}.t()", right)
    kind = d.pick("int_mm", "int_mm", "int_mm", "int_mm", "i32", "f32", "f32", "bf16")
    whole = d.values[flat].dtype in (torch.int8, torch.uint8) and d.values[right].dtype == torch.int8
    if kind == "int_mm" and whole and k > 1:
        texts = [f"torch._int_mm({flat}, {right})", f"aten._int_mm.default({flat}, {right})"]
    elif kind == "i32" and d.kind(flat) != "e4m3" and w.kind != "e4m3":
        texts = [f"{flat}.to(i32) @ {right}.to(i32)", f"torch.matmul({flat}.int(), {right}.int())"]
    else:
        to = kind if kind in ("f32", "bf16") else "f32"
        texts = [f"{flat}.to({to}) @ {right}.to({to})", f"F.linear({flat}.to({to}), {right}.to({to}).t())"]
    return d.first(d.rng.choice(texts))


def shifted_matmul(d: Draft, q: str, w: Weight) -> str | None:
    """Codes moved to bytes before the matmul, and what that added taken off after it, or nearly."""
    k = d.shape(q)[-1]
    if d.kind(q) != "i8" or w.kind != "i8" or k < 2:
        return None
    added, taken = d.pick(128, 128, 127, 3), d.pick(128, 128, 128, 127, 3)
    flat = d.first(f"({q}.reshape(-1, {k}).to(i32) + {added}).to(u8)")
    acc = d.do(f"torch._int_mm({flat}, {w.columns(d)})")
    if acc is None:
        return None
    dim = 0 if w.by_k else 1
    sums = d.first(
        d.pick(
            f"{w.name}.sum({dim}, dtype=i32)",
            f"{w.name}.to(i32).sum({dim})",
            f"{w.name}.sum({dim}, keepdim=True, dtype=i32).reshape(1, -1)",
        )
    )
    if d.chance(0.1):
        sums = changed(d, sums)
    return d.do(
        d.pick(
            f"{acc} - {sums} * {taken}",
            f"{acc} - {taken} * {sums}",
            f"{acc} + {sums} * -{taken}",
            f"torch.sub({acc}, {sums}, alpha={taken})",
            f"{acc} - ({sums} * {taken}).unsqueeze({d.pick(0, 0, -1)})",
        )
    )


def batched_matmul(d: Draft, x: str, z: Sizes, kind: str) -> str | None:
    """``x [b, m, k]`` times a weight for each of the batch, or codes that are an activation too, as in attention."""
    if len(d.shape(x)) != 3:
        return None
    b = d.shape(x)[0]
    codes_of = d.pick("i8", "i8", "e4m3")
    w = d.make(f"codes({d.seed()}, {codes_of}, {b}, {z.k}, {z.n})", static=d.chance(0.7))
    scale = scale_maker(d)(*d.pick((b, 1, z.n), (b, 1, 1), (z.n,), (1, 1, z.n), ()))
    y = d.first(f"{w}.to({kind})")
    y = d.do(f"{y} * {scale}") or y
    y = d.first(f"{y}.to({kind})")
    if d.chance(0.3):
        y = changed(d, y)
    return d.do(d.pick(f"torch.bmm({x}, {y})", f"{x} @ {y}", f"torch.einsum('bmk,bkn->bmn', {x}, {y})"))


def float8_matmul(d: Draft, q: str, w: Weight, scale: str) -> str | None:
    k, n = d.shape(q)[-1], d.shape(w.name)[1 if w.by_k else 0]
    flat = d.first(f"{q}.reshape(-1, {k})")
    out = d.pick("f32", "bf16", "bf16")
    rows = d.shape(flat)[0]
    right = w.columns(d)
    if d.values[scale].numel() == 1:
        one = scale_maker(d)(*d.pick((), (1,)))
        scales = f"scale_a={scale}.reshape({d.pick('()', '1')}), scale_b={one}"
    elif d.values[scale].numel() == rows:
        column = scale_maker(d)(1, n)
        scales = f"scale_a={scale}.reshape(-1, 1), scale_b={column}"
    else:
        return None
    bias = f", bias={d.make(f'normal({d.seed()}, {n}, dtype=bf16)')}" if out == "bf16" and d.chance(0.3) else ""
    return d.do(f"torch._scaled_mm({flat}, {right}, {scales}, out_dtype={out}{bias})")


def correction(d: Draft, acc: str, q: str, w: Weight, zero: str | None) -> str:
    """An int32 sum less what the activation's zero point, or a shift of its codes, put into it."""
    right = w.name
    dim = 0 if w.by_k else 1
    dim = 1 - dim if d.chance(0.05) else dim
    sums = d.first(
        d.pick(
            f"{right}.sum({dim}, dtype=i32)",
            f"{right}.sum(dim={dim}, dtype=i64)",
            f"torch.sum({right}, {dim}, False, dtype=i32)",
            f"torch.sum({right}, ({dim},), keepdim=True, dtype=i32).reshape(-1)",
            f"{right}.sum({dim})",
            f"{right}.to(i32).sum({dim})",
        )
    )
    rows = d.shape(acc)[0]
    if zero is None:
        zero = (
            d.pick("3", "128", "-128", "40000")
            if d.chance(0.5)
            else point_maker(d)(*d.pick((), (1,), (rows, 1), (rows,)))
        )
    elif d.values[zero].numel() > 1:
        zero = d.first(f"{zero}.reshape(-1, 1)")
    term = d.do(d.pick(f"{sums} * {zero}", f"{zero} * {sums}", f"{sums}[None] * {zero}", f"{sums} * -{zero}"))
    if term is None:
        return acc
    return (
        d.do(
            d.pick(
                f"{acc} - {term}",
                f"{acc} - {term}",
                f"torch.sub({acc}, {term}, alpha={d.pick(1, 2)})",
                f"{acc} + {term}",
            )
        )
        or acc
    )


# --- what follows -----------------------------------------------------------------------------------------------


def vector(d: Draft, y: str) -> str:
    """A tensor that broadcasts to ``y``, by any of its axes."""
    shape = d.shape(y)
    if not shape:
        raise Dropped
    n, m = shape[-1], shape[-2] if len(shape) > 1 else 1
    sizes = d.pick((n,), (n,), (1, n), (m, 1), (m, 1), (1,), (), (m,), (m, n), (1, 1), shape, (*shape[:-1], 1))
    known = [name for name, v in d.values.items() if tuple(v.shape) == sizes and v.is_floating_point() and name != y]
    known = [name for name in known if d.kind(name) != "e4m3"]
    if known and d.chance(0.4):
        return d.rng.choice(known)
    text = ", ".join(map(str, (d.seed(), *sizes)))
    return d.make(
        f"{d.pick('scales', 'normal')}({text}, dtype={d.pick('f32', 'f32', 'f32', 'bf16', 'f16')})",
        static=d.chance(0.9),
    )


def epilogue(d: Draft, y: str) -> str:
    """One more step after a matmul."""
    shape = d.shape(y)
    n = shape[-1] if shape else 1
    v = vector(d, y)
    common = [
        *[f"{y} * {v}"] * 5,
        f"{v} * {y}",
        *[f"{y} + {v}"] * 4,
        f"{v} + {y}",
        f"torch.add({y}, {v}, alpha={d.pick(1, 2, 0, -1)})",
        f"{y} * {d.pick(0.5, 2)}",
        f"{y}.to({d.pick('f32', 'bf16')})",
        *[f"{y}.mT", f"{y}.transpose(0, -1)"] * 2,
        f"{y}.reshape(-1, {n})",
        f"{y}[:]",
    ]
    options = [
        f"{y} - {v}",
        f"{v} - {y}",
        f"{y} / {v}",
        f"torch.sub({y}, {v}, alpha={d.pick(1, 2)})",
        f"torch.rsub({y}, {v})",
        f"torch.div({y}, {v}, rounding_mode={d.pick('None', chr(39) + 'trunc' + chr(39))})",
        f"torch.addcmul({y}, {v}, {v}, value={d.pick(1, 0.5)})",
        f"{y} * {d.pick(0.5, 2, 1, -1, True, 1.0, 0.0)}",
        f"{y} + {d.pick(0.25, 1, 0, -0.0, True)}",
        f"{y} - {d.pick(0.25, 1, 0)}",
        f"{y} / {d.pick(2, 3, 0.5)}",
        *[f"{y}.to({d.pick('f32', 'f32', 'bf16', 'f16')})"] * 3,
        f"{y}.relu()",
        f"F.gelu({y}.float())",
        f"torch.sigmoid({y}.float())",
        f"torch.clamp({y}, {d.pick('-inf', '0.0', '0', 'None', '-1')}, {d.pick('inf', '1.0', '6')})",
        f"torch.clamp({y}, min={d.pick(0, 0.0, '-inf')})",
        f"{y} * {y}",
        f"{y} + {y}",
        f"{y} * {d.inputs[0].name}.shape[0]",
        f"{y} + {d.inputs[0].name}.shape[-1]",
        f"{y}[: {d.inputs[0].name}.shape[0]]",
        f"torch.where({y} > 0, {y}, {v})",
        f"{y} * torch.tensor(0.5)",
        f"torch.addmm({v}, {y}, {y}.t())",
        f"torch.ops.aten.div.Tensor_mode({y}, {v}, rounding_mode=None)",
        f"{y}.view(-1, {n}).t().reshape({list(shape)})",
        f"{y} * {d.pick('inf', 'nan')}",
        f"fuzz.twice({y})",
        f"fuzz.noise({y}) + fuzz.noise({y})",
        f"fuzz.count({y}) * fuzz.count({y})",
        f"{y} + torch.rand({n})",
        f"F.dropout({y}.float(), 0.5, True)",
        f"{y}.sum(-1, keepdim=True)",
        f"{y}.mean(-1)" if shape and y else y,
        f"F.softmax({y}.float(), -1)",
        f"F.layer_norm({y}.float(), ({n},))",
        f"torch.add({y}, 3, alpha=2)",
        f"aten.sub.Scalar({y}, 3, 2)",
        f"aten.sub.Tensor({y}, {v}, alpha=2)",
        f"torch.cat([{y}, {y}], -1)",
        f"{y}[..., :1]",
        f"{y}[:1]",
    ]
    found = d.do(d.rng.choice(common if d.chance(0.55) else options))
    if found is None:
        return y
    return changed(d, found) if d.chance(0.15) else same(d, found, 0.15)


def plain_epilogue(d: Draft, y: str) -> str:
    """One step that most matmuls are followed by: whatever may be taken into one with it."""
    shape = d.shape(y)
    n, m = shape[-1], shape[-2] if len(shape) > 1 else 1
    v = d.make(
        f"{d.pick('scales', 'normal')}({', '.join(map(str, (d.seed(), *d.pick((n,), (n,), (1, n), (m, 1), (1,), ()))))})"
    )
    text = d.pick(
        *[f"{y} * {v}"] * 4,
        *[f"{y} + {v}"] * 4,
        f"{y} / {v}",
        f"{y} - {v}",
        f"torch.add({y}, {v}, alpha={d.pick(2, -1, 3)})",
        f"{y}.transpose(-2, -1)",
        f"{y}.mT",
        f"{y}.transpose(-2, -1).reshape({list(shape)})",
        f"{y}.float()",
    )
    return d.do(text) or y


def mutation(d: Draft) -> None:
    """A write to an input, a parameter or what was computed."""
    name = d.rng.choice(list(d.values))
    value = d.values[name]
    if d.kind(name) == "e4m3":
        return
    one = "1" if not value.is_floating_point() else d.pick("1", "0.5")
    options = [
        f"{name}.add_({one})",
        f"{name}.mul_(2)",
        f"{name}.zero_()",
        f"{name}.fill_(1)",
        f"{name}.copy_({name}.flip(0))",
        f"{name}[:1].zero_()",
        f"{name}[..., 0] = 1",
        f"{name}.view(-1)[:2].fill_(1)",
        f"{name}.neg_()",
        f"{name}.transpose(0, -1)[0].add_({one})",
    ]
    d.mutate(d.rng.choice(options))


def outputs(d: Draft, results: Sequence[str]) -> list[str]:
    """What is returned: results, what led to them, and identities and views of anything that is there."""
    returned = list(results)
    while d.chance(0.45):
        name = d.rng.choice(list(d.values))
        if d.chance(0.3) and d.matmuls:
            name = d.rng.choice(d.matmuls)
        if d.chance(0.5):
            shape = list(d.shape(name))
            found = d.do(
                d.pick(
                    f"{name} * 1",
                    f"{name} + 0",
                    f"{name} * 1.0",
                    f"{name} - 0",
                    f"{name}.view({shape})",
                    f"{name}.reshape({shape})",
                    f"{name}.view(-1)",
                    f"{name}.expand({shape})",
                    f"{name}.to({d.kind(name)})",
                    f"{name}.detach()",
                    f"{name}.clone()",
                    f"{name}.contiguous()",
                    f"{name}[:1]",
                    f"{name}.mT",
                    f"{name}[...]",
                )
            )
            name = found or name
        returned.append(name)
    if d.chance(0.1):
        returned.append(d.rng.choice(returned))
    d.rng.shuffle(returned)
    return returned


# --- pads -------------------------------------------------------------------------------------------------------


def padded(d: Draft, z: Sizes, x: str) -> tuple[str, str]:
    """``x`` padded as for eager calls, ``z`` with it, and what drops the padding of a result ``{y}`` again."""
    shape, more = d.shape(x), d.pads.choice((1, 2, 7))
    if len(shape) < 2 or 0 in shape:
        return x, "{y}"
    m, dim = shape[-2], len(shape) - 2
    filled = d.pads.choice((0.0, 0.0, 0.0, 1.0))
    sizes = [*shape[:-2], more, shape[-1]]
    text = d.pads.choice(
        (
            f"aten.constant_pad_nd.default({x}, [0, 0, 0, {more}], {filled})",
            f"aten.constant_pad_nd.default({x}, [0, 0, 0, {more}], {filled})",
            f"torch.cat([{x}, {x}.new_full({sizes}, {filled})], {dim})",
            f"aten.constant_pad_nd.default({x}, [0, 0, {more}, 0], {filled})",
        )
    )
    name = d.do(text)
    if name is None:
        return x, "{y}"
    z.m += more
    kept = d.pads.choice((m, m, m, m, m, m + 1, 1))
    start = d.pads.choice((0, 0, 0, 0, 0, 1)) if kept < m + more else 0
    return name, f"{{y}}.narrow({{y}}.dim() - 2, {start}, {kept})"


# --- whole programs ---------------------------------------------------------------------------------------------


def site(d: Draft, z: Sizes, x: str, shared: dict[str, Any]) -> str:
    """One quantized matmul of ``x``, which may share codes, scales or weights with those before it."""
    kind = d.kind(x)
    reuse = bool(shared) and d.chance(0.6)
    form = d.pick(*["weight only"] * 3, *["both decoded"] * 3, *["codes"] * 4)

    def bias() -> str:
        sizes = d.pick((z.n,), (z.n,), (z.n,), (1,), (1, z.n), (z.m, 1), (z.m, z.n), ())
        text = ", ".join(map(str, (d.seed(), *sizes)))
        return d.make(f"normal({text}, dtype={kind})")

    if d.chance(0.12):
        y = batched_matmul(d, x, z, kind)
        if y is not None:
            return y
    weight = shared["weight"] if reuse and "weight" in shared and d.chance(0.3) else Weight(d, z)
    shared["weight"] = weight
    if form == "weight only":
        old = shared.get("decoded")
        if reuse and old is not None and d.kind(old) == kind and d.shape(old) == (z.n, z.k):
            w = old
        else:
            w = decoded(d, weight.rows(d), z.n, z.k, z.group, kind, None, None)
            shared["decoded"] = w
        return float_matmul(d, x, w, bias)
    codes, scale, zero = shared["quantized"] if reuse and "quantized" in shared else quantized(d, x)
    shared["quantized"] = codes, scale, zero
    if d.kind(codes) == "e4m3" and weight.kind != "e4m3" and d.chance(0.9):
        weight = shared["weight"] = Weight(d, z, "e4m3")
    if d.kind(codes) != "e4m3" and weight.kind == "e4m3" and d.chance(0.9):
        weight = shared["weight"] = Weight(d, z, "i8")
    if form == "both decoded" and len(d.shape(codes)) > 1:
        far = d.chance(0.3) and d.kind(codes) != "e4m3"
        if far:
            sizes = d.pick("", ", 1", f", {d.shape(codes)[-2]}, 1")
            zero = d.make(f"points({d.seed()}, {d.pick('i32', 'i64')}, {d.pick(*AROUND[10:])}{sizes})")
        rows = d.shape(codes)[-2]
        a = decoded(d, codes, rows, z.k, z.group, kind, zero or d.pick(None, None, ""), scale, plain=far)
        w = decoded(d, weight.rows(d), z.n, z.k, z.group, kind, d.pick("", None) if far else None, None, plain=far)
        return float_matmul(d, a, w, bias)
    if d.kind(codes) == "e4m3" and scale is not None:
        found = float8_matmul(d, codes, weight, scale)
        if found is not None:
            return found
    if d.kind(codes) == "u8" and weight.kind == "i8" and d.chance(0.1):
        weight = shared["weight"] = Weight(d, z, "i8")
    acc = (shifted_matmul(d, codes, weight) if zero is None and d.chance(0.4) else None) or integer_matmul(
        d, codes, weight
    )
    if d.kind(acc) in ("i32",) and (zero is not None or d.chance(0.4)):
        acc = correction(d, acc, codes, weight, zero)
    acc = same(d, acc, 0.1)
    y = d.first(f"{acc}.to({d.pick('f32', 'f32', kind)})") if not d.is_float(acc) and d.chance(0.8) else acc
    if scale is not None and scale in d.values and d.chance(0.8):
        flat = scale
        if d.values[scale].numel() > 1 and len(d.shape(scale)) != len(d.shape(y)):
            flat = d.do(f"{scale}.reshape(-1, 1)") or scale
        y = d.do(d.pick(f"{y} * {flat}", f"{flat} * {y}")) or y
    if d.chance(0.7):
        column = scale_maker(d)(*d.pick((z.n,), (z.n,), (1, z.n), (z.n, 1)))
        y = d.do(d.pick(f"{y} * {column}", f"{y} * {column}.reshape(-1)", f"{y} * {column}.view(1, -1)")) or y
    if len(d.shape(x)) > 2 and d.chance(0.7):
        y = d.do(f"{y}.reshape({[*d.shape(x)[:-1], z.n]})") or y
    return y


def draw(seed: int) -> Program:
    """The program of ``seed``."""
    CALLS[0] = 0
    torch.default_generator.manual_seed(0)
    attempt = 0
    while True:
        try:
            return _draw(seed * 1000 + attempt)
        except Dropped:
            attempt += 1


def _draw(seed: int) -> Program:
    d = Draft(seed)
    z = Sizes(d)
    mutating = d.chance(0.15)
    x = activation(d, z, d.pick("f32", "f32", "f32", "bf16", "f16"), static=d.chance(0.06))
    if d.chance(0.1):
        x = d.do(d.pick(f"{x}.relu()", f"{x} * 0.5", f"{x}.float()", f"{x} + {x}", f"fuzz.noise({x})")) or x
    drop = "{y}"
    if d.pads.random() < 0.12:
        x, drop = padded(d, z, x)
    results, shared = [], {}
    for _ in range(d.pick(1, 1, 1, 2, 2, 3)):
        if mutating and d.chance(0.3):
            mutation(d)
        y = site(d, z, x, shared)
        d.matmuls.append(y)
        if d.chance(0.45):
            for _ in range(d.pick(1, 2, 3, 4)):
                y = plain_epilogue(d, y)
        early = drop != "{y}" and d.pads.random() < 0.7
        if early:
            y = d.do(drop.format(y=y)) or y
        for _ in range(d.pick(0, 0, 1, 2, 3, 4)):
            if mutating and d.chance(0.2):
                mutation(d)
            y = epilogue(d, y)
        if drop != "{y}" and not early:
            y = d.do(drop.format(y=y)) or y
        results.append(y)
        if d.chance(0.15) and d.shape(y)[-1:] == (z.k,) and d.is_float(y) and d.kind(y) != "f64":
            x = y
            shared.pop("quantized", None)
    if mutating and d.chance(0.5):
        mutation(d)
    returned = outputs(d, results)
    between = []
    while d.chance(0.4):
        chosen = d.rng.choice(d.inputs)
        value = d.values[chosen.name]
        if d.kind(chosen.name) != "e4m3":
            text = d.pick(
                f"{chosen.name}.mul_(2)", f"{chosen.name}.copy_({chosen.name}.flip(0))", f"{chosen.name}.neg_()"
            )
            between.append(text if value.dim() else f"{chosen.name}.mul_(2)")
    first = d.inputs[0]
    dynamic = d.chance(0.12) and not first.static and 0 not in d.shape(first.name)
    numerics = d.pick(*["reassociated"] * 6, "approximate", "same_accum", "exact")
    return Program(tuple(d.inputs), tuple(d.steps), tuple(returned), dynamic, numerics, tuple(between))
