"""What is wrong with the rewriting of a program: other values, aliases or state, an exception, or silence."""

from __future__ import annotations

import itertools
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from fx_quant.compat import row_scales_on_cpu
from fx_quant.passes.canonical import CANONICAL
from fx_quant.passes.nodes import CASTS, VIEWS, dtype
from fx_quant.passes.pipeline import Rewriting, to_kernels
from fx_quant.passes.rulebook import is_matmul
from fx_quant.passes.sites import Site
from fx_quant.scheme import FLOAT8_DTYPES, Numerics
from tests.fuzz.contractions import quantized_contractions
from tests.fuzz.program import CALLS, Program, execute_line, fits, trace
from tests.graphs import (
    _FLOAT64_BODIES,
    _NAMED_FLOAT64_BODIES,
    Proven,
    _scaled_mm_in_float64,
    _unpacked,
    _weight_only_mm_in_float64,
    _wide_dtype,
    _widened,
    copy_of,
    prove,
    rewrite,
    roundings,
)
from tests.tolerances import assert_within


@dataclass
class Fault:
    """Something that must not be.

    Args:
        kind: wrong | alias | state | crash | silent | class | twice.
        where: which comparison found it.
        what: in words.
    """

    kind: str
    where: str
    what: str

    @property
    def key(self) -> tuple[str, str]:
        """What makes two faults the same to the shrinker."""
        return self.kind, self.where


@dataclass
class Outcome:
    """What became of one program: how many quantized matmuls, how they ended, and what is wrong."""

    sites: int = 0
    rewritten: int = 0
    recognised: int = 0
    missed: int = 0
    declined: bool = False
    faults: list[Fault] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


@dataclass
class Ran:
    """One call of a graph: what each node gave, what was returned, the inputs after it, what canonical ops were given."""

    values: dict[str, Any]
    outputs: list[Any]
    inputs: list[Tensor]
    graph: Graph
    given: dict[str, Any]


class Judge:
    """One program, its graph as the backend gets it, and what that gives natively and in float64."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.outcome = Outcome()
        self.module = trace(program)
        self.graph = self.module.graph
        self.source = self.call(self.graph, program.tensors())
        self.wide = self.call(self.graph, program.tensors(), wide=True)
        for ran in (self.source, self.wide):
            self.defined(ran)

    def defined(self, ran: Ran) -> None:
        """Raise unless each float that was cast to an integer dtype fits there: PyTorch leaves open what it gives else."""
        for node in self.graph.nodes:
            if node.target not in CASTS:
                continue
            before, after = ran.values[node.args[0].name], ran.values[node.name]
            if before.is_floating_point() and not after.is_floating_point() and not fits(before, after.dtype):
                raise ValueError(f"{node.name} casts what {after.dtype} does not hold")

    def outcome_now(self) -> Outcome:
        """What the passes make of the program, as they are now."""
        self.outcome = Outcome()
        self.guarded(self.proven)
        self.guarded(self.kernels)
        return self.outcome

    def fault(self, kind: str, where: str, what: str) -> None:
        """Note something that must not be."""
        self.outcome.faults.append(Fault(kind, where, what[:300]))

    def guarded(self, check: Callable[[], None]) -> None:
        """Run ``check``; an exception is a fault of where it was raised."""
        try:
            check()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            last = next((f for f in reversed(frames) if "/fx_quant/" in f.filename), frames[-1])
            self.fault("crash", f"{Path(last.filename).name}:{last.name}", f"{type(error).__name__}: {error}")

    def call(self, graph: Graph, inputs: Sequence[Tensor], *, wide: bool = False, nudge: Nudge | None = None) -> Ran:
        """``graph`` run op by op on ``inputs`` themselves; ``wide`` on copies in float64, rounded to codes only.

        ``nudge`` is called with each node and its value, and gives what is used instead.
        """
        inputs = [_widened(x) for x in inputs] if wide else inputs
        values: dict[Node, Any] = {}
        given: dict[str, Any] = {}
        waiting = iter(inputs)
        torch.default_generator.manual_seed(0)
        CALLS[0] = 0
        outputs: list[Any] = []
        with torch.no_grad(), row_scales_on_cpu():
            for node in graph.nodes:
                if node.op == "placeholder":
                    value = next(waiting)
                elif node.op == "get_attr":
                    value = getattr(self.module, str(node.target))
                    value = _widened(value) if wide else value
                elif node.op == "output":
                    outputs = list(map_arg(node.args[0], values.__getitem__))
                    break
                else:
                    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                    target = node.target
                    if not wide and target is torch.ops.aten._int_mm.default:
                        # PyTorch multiplies what lies at wrong addresses where an operand is expanded.
                        args = [x.clone(memory_format=torch.contiguous_format) for x in args]
                    if wide:
                        target = _NAMED_FLOAT64_BODIES.get(str(target)) or _FLOAT64_BODIES.get(target, target)
                        args, kwargs = tree_map(_wide_dtype, (args, kwargs))
                    if target in CANONICAL:
                        # What follows may write to its operands.
                        given[node.name] = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
                    value = target(*args, **kwargs)
                    if wide:
                        value = tree_map(_widened, value)
                    value = value if nudge is None else nudge(node, value)
                values[node] = value
        return Ran({node.name: value for node, value in values.items()}, outputs, list(inputs), graph, given)

    # --- what the algebra proves --------------------------------------------------------------------------------

    def proven(self) -> None:
        """What ``prove`` makes of the graph means the same, and it passes no quantized matmul over."""
        program, proven = self.program, prove(self.graph, self.program.static, self.program.numerics)
        found = proven.found
        ends = [one.gemm.name for of in (found.sites, found.misses, found.recognised) for one in of]
        for name in {name for name in ends if ends.count(name) > 1}:
            self.fault("twice", "found", f"{name} is counted twice")
        quantized = quantized_contractions(proven.before, program.static)
        for name, target in quantized.items():
            if name not in ends:
                self.fault("silent", target, f"{name} is neither rewritten, recognised nor missed")
        left = sum(map(is_matmul, proven.graph.nodes))
        if left > sum(map(is_matmul, proven.before.nodes)) - len(found.sites):
            self.fault("twice", "proven", "a rewritten matmul is computed twice")
        self.outcome.sites = len({*ends, *quantized})
        self.outcome.reasons += [miss.rule for miss in found.misses]
        for reason in self.outcome.reasons:
            raised = RAISED.search(reason)
            if raised is not None:
                self.fault("crash", raised.group(1), reason)
        mine = self.call(proven.graph, program.tensors(), wide=True)
        self.compare_meaning("proven", mine)
        native = self.call(proven.graph, program.tensors())
        self.compare_aliases("proven", native, proven.graph)
        if any(site.product is not None for site in found.sites):
            old = self.call(proven.before, program.tensors())
            for site in _first(found.sites, proven.before):
                self.check_class(proven, site, old, native)

    def check_class(self, proven: Proven, site: Site, old: Ran, new: Ran) -> None:
        """What stands for ``site`` rounds as its class allows, relative to the magnitudes that were summed."""
        product = site.product
        if product is None or self.graph.find_nodes(op="get_attr"):
            return
        if product.numerics > Numerics[self.program.numerics.upper()]:
            self.fault("class", "cap", f"{site.gemm.name} is {product.numerics}")
        torch.default_generator.manual_seed(0)
        CALLS[0] = 0
        off, allowed = roundings(site, proven, old.values, new.values, self.program.tensors())
        wrong = off > allowed
        if wrong.any():
            self.fault("class", "roundings", f"{site.gemm.name}: off by {off[wrong]}, allowed {allowed[wrong]}")

    # --- what the kernels compute -------------------------------------------------------------------------------

    def kernels(self) -> None:
        """What this machine's kernels compute is what the canonical ops do, and leaves all else as it was."""
        program, outcome = self.program, self.outcome
        state = rewrite(self.graph, program.static, numerics=program.numerics)
        outcome.rewritten = len(state.rows)
        outcome.recognised, outcome.missed = len(state.recognised), len(state.misses)
        if not state.rows:
            return
        canonical = copy_of(state.graph)
        self.compare_meaning("canonical", self.call(canonical, program.tensors(), wide=True))
        sites = {site: row.canonical for site, row in state.rows.items()}
        to_kernels(state)
        old, new = self.call(canonical, program.tensors()), self.call(state.graph, program.tensors())
        outcome.kernels += [row.selection.kernel.name for row in state.rows.values()]
        for site in _first(list(state.rows), state.before):
            selection = state.rows[site].selection
            expected, actual = old.values[sites[site]], new.values[state.rows[site].op.name]
            try:
                assert_within(actual, expected, selection.kernel.numerics, _terms(canonical, sites[site], old))
            except AssertionError as error:
                self.fault("wrong", f"kernel {selection.kernel.name}", str(error))
        self.compare_values("kernels", self.source, self.wide, new, state, program.tensors())
        self.compare_aliases("kernels", new, state.graph)
        self.second_call(state, new)
        if program.dynamic:
            self.other_sizes(state)

    def second_call(self, state: Rewriting, new: Ran) -> None:
        """The caller writes into what was returned and into inputs, then calls again."""
        source = self.call(self.graph, self.program.tensors())
        for ran in (source, new):
            for output in ran.outputs:
                if isinstance(output, Tensor) and not _overlaps(output):
                    output.zero_()
            names = {x.name: value for x, value in zip(self.program.inputs, ran.inputs, strict=True)}
            with torch.no_grad():
                for line in self.program.between:
                    execute_line(line, names)
        inputs = [x.clone() for x in source.inputs]
        wide = self.call(self.graph, [x.clone() for x in inputs], wide=True)
        again = self.call(self.graph, source.inputs)
        self.compare_values("second call", again, wide, self.call(state.graph, new.inputs), state, inputs)

    def other_sizes(self, state: Rewriting) -> None:
        """Calls with other numbers of rows, as far as the graph was traced for them: PyTorch takes symbols to be >= 2."""
        sizes = next(iter(self.graph.nodes)).meta["val"].shape
        symbols = {dim: x.node for dim, x in enumerate(sizes) if isinstance(x, torch.SymInt) and x.node.expr.is_symbol}
        if not symbols:
            return
        free = max(symbols)
        for rows in (self.program.tensors()[0].shape[free] + 1, 2, 7):
            inputs = self.program.tensors()
            inputs[0] = inputs[0].index_select(free, torch.arange(rows) % inputs[0].shape[free])
            known = {symbol.expr: inputs[0].shape[dim] for dim, symbol in symbols.items()}
            # Guards of what is no symbol any more hold as before.
            if any(guard.expr.subs(known) == False for guard in symbols[free].shape_env.guards):  # noqa: E712
                continue
            try:
                source = self.call(self.graph, [x.clone() for x in inputs])
                wide = self.call(self.graph, [x.clone() for x in inputs], wide=True)
                for ran in (source, wide):
                    self.defined(ran)
            except Exception:
                continue  # other inputs have the rows that the first had
            new = self.call(state.graph, [x.clone() for x in inputs])
            self.compare_values("other sizes", source, wide, new, state, inputs)

    # --- comparisons --------------------------------------------------------------------------------------------

    def compare_meaning(self, where: str, new: Ran) -> None:
        """Without rounding both are the same: what is returned, and what is left in the inputs."""
        for name, expected, actual in _pairs(self.wide, new):
            if not self.alike(where, name, expected, actual):
                continue
            was, now = expected.double(), actual.double()
            largest = _largest(was)
            close = torch.isclose(now, was, rtol=EXACTLY, atol=EXACTLY * largest, equal_nan=True)
            close |= ~(was.isfinite() & now.isfinite()) & self.odd_scales(new)
            if not close.all():
                close |= self.undecided(name, self.program.tensors(), 1e-13, EXACTLY * (was.abs() + largest))
            if not close.all():
                worst = (now - was)[~close].abs().max().item()
                text = f"{name}: {int((~close).sum())} of {close.numel()} differ, by up to {worst:g} of {largest:g}"
                self.fault(_kind(name), where, text)

    def compare_values(
        self, where: str, source: Ran, wide: Ran, new: Ran, state: Rewriting, inputs: Sequence[Tensor]
    ) -> None:
        """Natively, as far as rounding goes: the source's own distance from float64 is allowed too."""
        kinds = {dtype(node) for node in state.before.nodes} & set(COARSE)
        share = max((COARSE[kind] for kind in kinds), default=1e-3)
        reach = _reach(state, wide)
        for (name, expected, actual), exact in zip(_pairs(source, new), [*wide.outputs, *wide.inputs], strict=True):
            if not self.alike(where, name, expected, actual):
                continue
            was, now, ideal = expected.double(), actual.double(), exact.double()
            # Where both say inf or nan, so must this.
            infinite = self.odd_scales(new)
            odd = ~was.isfinite() & ~ideal.isfinite() & now.isfinite() & (not infinite)
            if expected.is_floating_point():
                # Near its end one rounding is the step to infinity.
                most = torch.finfo(expected.dtype).max
                now = torch.where(ideal.abs() > most / 2, now.clamp(-most, most), now)
                ideal = torch.where(ideal.isfinite(), ideal.clamp(-most, most), ideal)
            off = (was - ideal).abs()
            slack = off[off.isfinite()].max().item() if off.isfinite().any() else 0.0
            near = share * max(_largest(ideal), reach)
            # Below the least normal number few bits are left of any.
            allowed = near + 2 * slack + 2.0**-126
            # Where the source is far off itself, something before it overflowed.
            compared = ideal.isfinite() & (off <= near)
            if infinite or self.overflows(wide):
                # Infinities that the source adds to nan may stay infinities, and what follows take another way.
                compared &= now.isfinite()
            wrong = compared & ~((now - ideal).abs() <= allowed)
            if wrong.any() or odd.any():
                eps = max((torch.finfo(kind).eps for kind in kinds), default=2**-23)
                decided = ~self.undecided(name, inputs, eps, torch.full_like(ideal, allowed))
                wrong, odd = wrong & decided, odd & decided
            if wrong.any() or odd.any():
                worst = (now - ideal)[wrong].abs().max().item() if wrong.any() else float("nan")
                count = int((wrong | odd).sum())
                self.fault(
                    _kind(name), where, f"{name}: {count} of {wrong.numel()} off by {worst:g}, allowed {allowed:g}"
                )

    def undecided(self, name: str, inputs: Sequence[Tensor], epsilon: float, allowed: Tensor) -> Tensor:
        """Which elements of an output or input move by more than ``allowed`` when all is rounded a little otherwise.

        They follow a decision, as of ``floor`` or ``>``, that lies on its edge.
        """
        kind, position = name.split()

        def ran(nudge: Nudge | None) -> Tensor:
            found = self.call(self.graph, [x.clone() for x in inputs], wide=True, nudge=nudge)
            return (found.outputs if kind == "output" else found.inputs)[int(position)].double()

        first, moved = ran(None), torch.zeros_like(allowed, dtype=torch.bool)
        for seed in range(_NUDGES):
            other = ran(Nudge(seed, epsilon))
            moved |= ~(((other - first).abs() <= allowed) | (other == first) | (other.isnan() & first.isnan()))
        return moved

    def overflows(self, wide: Ran) -> bool:
        """Whether what the source computes in float16 is larger than that holds."""
        halves = [node.name for node in self.graph.nodes if dtype(node) is torch.float16]
        most = torch.finfo(torch.float16).max / 2
        return any(_largest(wide.values[name].double()) > most for name in halves)

    def odd_scales(self, new: Ran) -> bool:
        """Whether something infinite is given, or ``new`` scales by it: after the sum, where signs do not meet."""
        given = [x for x in self.program.tensors() if x.is_floating_point()]
        return any(not bool(x.float().isfinite().all()) for x in (*given, *_scales_after_sums(new)))

    def alike(self, where: str, name: str, expected: Any, actual: Any) -> bool:
        """Whether both are tensors of one shape and dtype, to be compared; what is neither equal nor that is a fault."""
        if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
            if expected is not actual and expected != actual:
                self.fault(_kind(name), where, f"{name} is {actual}, was {expected}")
            return False
        if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
            text = f"{name} is {actual.dtype}{list(actual.shape)}, was {expected.dtype}{list(expected.shape)}"
            self.fault(_kind(name), where, text)
            return False
        return True

    def compare_aliases(self, where: str, new: Ran, after: Graph) -> None:
        """Inputs, constants and outputs share memory with each other exactly where they did."""
        was, now = _shared(self.source, self.graph), _shared(new, after)
        for names in sorted(was ^ now):
            verb = "share memory" if names in now else "no longer share memory"
            self.fault("alias", where, f"{' and '.join(names)} {verb}")


class Nudge:
    """Moves what is computed with a matmul's result by ``epsilon`` of it at random, as other roundings would."""

    def __init__(self, seed: int, epsilon: float) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._epsilon = epsilon
        self._moved: set[Node] = set()

    def __call__(self, node: Node, value: Any) -> Any:
        if not is_matmul(node) and self._moved.isdisjoint(node.all_input_nodes):
            return value
        self._moved.add(node)
        # Views and writes are of memory that others have too.
        if node.target in VIEWS or not isinstance(value, Tensor) or not value.is_floating_point() or _writes(node):
            return value
        signs = torch.rand(value.shape, generator=self._generator, dtype=torch.float64) * 2 - 1
        largest = _largest(value.double()) if is_matmul(node) else 0.0
        return (value + signs * self._epsilon * (value.abs() + largest)).to(value.dtype)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def judge(program: Program) -> Outcome:
    """Rewrite ``program`` and compare what it means, in all that a caller can see."""
    try:
        judged = Judge(program)
    except Exception as error:
        # PyTorch itself does not run it.
        return Outcome(declined=True, reasons=[repr(error)[:200]])
    return judged.outcome_now()


def _terms(canonical: Graph, name: str, ran: Ran) -> Tensor:
    """For each element of a canonical matmul the sum of the magnitudes of what is rounded on the way to it."""
    node = next(node for node in canonical.nodes if node.name == name)
    args, kwargs = ran.given[name]
    a, b, *scales, bias, _ = args
    if node.target is torch.ops.fx_quant.weight_only_mm.default:
        one, without = torch.eye(a.shape[1]), {**kwargs, "b_offset": None}
        scaled = _weight_only_mm_in_float64(one, b, *scales, None, None, **without)
        offset = _weight_only_mm_in_float64(one, b, *scales, None, None, **kwargs) - scaled
        terms = a.double().abs() @ (scaled.abs() + offset.abs())
    elif b.dtype in FLOAT8_DTYPES or kwargs.get("block") is not None or b.shape[0] != a.shape[1]:
        scales = [None if x is None else x.abs() for x in scales]
        points = {name: kwargs.get(name) for name in ("a_zero_point", "b_zero_point")}
        a, b = a.double().abs(), _unpacked(b, a.shape[1]).abs()
        # What is taken off a code adds to what is summed.
        points = {name: None if x is None else -x.double().abs() for name, x in points.items()}
        terms = _scaled_mm_in_float64(a, b, *scales, None, torch.float64, **points, block=kwargs.get("block"))
    else:
        # Integers are summed exactly.
        terms = _scaled_mm_in_float64(a, b, *scales, None, **kwargs).double().abs()
    return terms if bias is None else terms + bias.double().abs()


def _scales_after_sums(ran: Ran) -> Iterator[Tensor]:
    """What the rewritten matmuls of a graph scaled by, in their ops or after them."""
    for node in ran.graph.nodes:
        if node.target is torch.ops.aten.reciprocal.default:
            yield ran.values[node.name]
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "fx_quant":
            continue
        given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False))
        for name, value in (given | node.kwargs).items():
            if name in ("a_scale", "b_scale", "b_offset") and isinstance(value, Node):
                yield ran.values[value.name]


def _first(sites: Sequence[Site], before: Graph) -> list[Site]:
    """Those of ``sites`` that do not compute with the result of another, which is rounded differently already."""
    gemms = {site.gemm.name for site in sites}
    # Which sites each node of the graph before computes with.
    below: dict[Node, set[str]] = {}
    for node in before.nodes:
        found = set().union(*(below[source] for source in node.all_input_nodes)) if node.all_input_nodes else set()
        if node.name in gemms and not found:
            found = {node.name}
        elif node.name in gemms:
            gemms.discard(node.name)
        below[node] = found
    return [site for site in sites if site.gemm.name in gemms]


# How near is the same without rounding: a zero point of an int32 that float32 does not hold is rounded on one side.
EXACTLY = 1e-7
# What a miss says whose cause is an exception in a step.
RAISED = re.compile(r"(.*) failed with \w+: ")
# In so many random directions an edge is crossed.
_NUDGES = 16
# Relative to the largest result, by the coarsest dtype of the graph: far from what rounding does, far below what any
# mistake does. How a site rounds is held to its class elsewhere.
COARSE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def _overlaps(x: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))


def _pairs(old: Ran, new: Ran) -> list[tuple[str, Any, Any]]:
    found = []
    for name, of_old, of_new in (("output", old.outputs, new.outputs), ("input", old.inputs, new.inputs)):
        found += [(f"{name} {i}", a, b) for i, (a, b) in enumerate(zip(of_old, of_new, strict=True))]
    return found


def _kind(name: str) -> str:
    return "state" if name.startswith("input") else "wrong"


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()] if x.is_floating_point() else x
    return finite.abs().max().item() if finite.numel() else 0.0


def _reach(state: Rewriting, wide: Ran) -> float:
    """The largest result of a rewritten matmul, of which what follows may be what cancellation left."""
    found = [wide.values.get(site.root.name) for site in state.rows]
    return max((_largest(value.double()) for value in found if isinstance(value, Tensor)), default=0.0)


def _shared(ran: Ran, graph: Graph) -> set[tuple[str, str]]:
    named = [(f"input {i}", x) for i, x in enumerate(ran.inputs)]
    named += [(f"output {i}", x) for i, x in enumerate(ran.outputs)]
    constants = {str(node.target): ran.values[node.name] for node in graph.nodes if node.op == "get_attr"}
    named += list(constants.items())
    kept = [(n, x.untyped_storage().data_ptr()) for n, x in named if isinstance(x, Tensor) and x.numel()]
    return {(a, b) for (a, of_a), (b, of_b) in itertools.combinations(kept, 2) if of_a == of_b}
