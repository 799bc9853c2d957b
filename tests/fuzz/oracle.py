"""What is wrong with the rewriting of a program: other values, aliases or state, an exception, or silence."""

from __future__ import annotations

import itertools
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from fx_quant.compat import row_scales_on_cpu
from fx_quant.passes.nodes import CASTS, dtype
from fx_quant.passes.pipeline import Rewriting, to_kernels
from fx_quant.passes.rulebook import is_matmul
from fx_quant.passes.sites import Site
from fx_quant.scheme import Numerics
from tests.fuzz.contractions import quantized_contractions
from tests.fuzz.program import CALLS, Program, execute_line, fits, trace
from tests.graphs import (
    _FLOAT64_BODIES,
    _NAMED_FLOAT64_BODIES,
    Proven,
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
    """One call of a graph: what each node gave, what was returned, and the inputs after it."""

    values: dict[str, Any]
    outputs: list[Any]
    inputs: list[Tensor]


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

    def call(self, graph: Graph, inputs: Sequence[Tensor], *, wide: bool = False) -> Ran:
        """``graph`` run op by op on ``inputs`` themselves; ``wide`` on copies in float64, rounded to codes only."""
        inputs = [_widened(x) for x in inputs] if wide else inputs
        values: dict[Node, Any] = {}
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
                    if wide:
                        target = _NAMED_FLOAT64_BODIES.get(str(target)) or _FLOAT64_BODIES.get(target, target)
                        args, kwargs = tree_map(_wide_dtype, (args, kwargs))
                    value = target(*args, **kwargs)
                    if wide:
                        value = tree_map(_widened, value)
                values[node] = value
        return Ran({node.name: value for node, value in values.items()}, outputs, list(inputs))

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
        outcome.rewritten = len(state.selections)
        outcome.recognised, outcome.missed = len(state.recognised), len(state.misses)
        if not state.selections:
            return
        canonical = copy_of(state.graph)
        self.compare_meaning("canonical", self.call(canonical, program.tensors(), wide=True))
        sites = {site: node.name for site, node in state.canonical.items()}
        to_kernels(state)
        old, new = self.call(canonical, program.tensors()), self.call(state.graph, program.tensors())
        outcome.kernels += [selection.kernel.name for selection in state.selections.values()]
        for site in _first(list(state.selections), state.before):
            selection = state.selections[site]
            expected, actual = old.values[sites[site]], new.values[state.canonical[site].name]
            finite = expected[expected.isfinite()]
            terms = finite.abs().max().item() if finite.numel() else 0.0
            try:
                assert_within(actual, expected, selection.kernel.numerics, terms)
            except AssertionError as error:
                self.fault("wrong", f"kernel {selection.kernel.name}", str(error))
        self.compare_values("kernels", self.source, self.wide, new, state)
        self.compare_aliases("kernels", new, state.graph)
        self.second_call(state, new)

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
        wide = self.call(self.graph, [x.clone() for x in source.inputs], wide=True)
        again = self.call(self.graph, source.inputs)
        self.compare_values("second call", again, wide, self.call(state.graph, new.inputs), state)

    # --- comparisons --------------------------------------------------------------------------------------------

    def compare_meaning(self, where: str, new: Ran) -> None:
        """Without rounding both are the same: what is returned, and what is left in the inputs."""
        for name, expected, actual in _pairs(self.wide, new):
            if not self.alike(where, name, expected, actual):
                continue
            was, now = expected.double(), actual.double()
            largest = _largest(was)
            close = torch.isclose(now, was, rtol=1e-9, atol=1e-9 * largest, equal_nan=True)
            if not close.all():
                worst = (now - was)[~close].abs().max().item()
                text = f"{name}: {int((~close).sum())} of {close.numel()} differ, by up to {worst:g} of {largest:g}"
                self.fault(_kind(name), where, text)

    def compare_values(self, where: str, source: Ran, wide: Ran, new: Ran, state: Rewriting) -> None:
        """Natively, as far as rounding goes: the source's own distance from float64 is allowed too."""
        kinds = {dtype(node) for node in state.before.nodes} & set(COARSE)
        share = max((COARSE[kind] for kind in kinds), default=1e-3)
        reach = _reach(state, wide)
        for (name, expected, actual), exact in zip(_pairs(source, new), [*wide.outputs, *wide.inputs], strict=True):
            if not self.alike(where, name, expected, actual):
                continue
            was, now, ideal = expected.double(), actual.double(), exact.double()
            off = (was - ideal).abs()
            slack = off[off.isfinite()].max().item() if off.isfinite().any() else 0.0
            allowed = share * max(_largest(ideal), reach) + 2 * slack
            compared = was.isfinite() & ideal.isfinite()
            wrong = compared & ~((now - ideal).abs() <= allowed)
            # Where both say inf or nan, so must this.
            odd = ~was.isfinite() & ~ideal.isfinite() & now.isfinite()
            if wrong.any() or odd.any():
                worst = (now - ideal)[wrong].abs().max().item() if wrong.any() else float("nan")
                count = int((wrong | odd).sum())
                self.fault(
                    _kind(name), where, f"{name}: {count} of {wrong.numel()} off by {worst:g}, allowed {allowed:g}"
                )

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


def judge(program: Program) -> Outcome:
    """Rewrite ``program`` and compare what it means, in all that a caller can see."""
    try:
        judged = Judge(program)
    except Exception as error:
        # PyTorch itself does not run it.
        return Outcome(declined=True, reasons=[repr(error)[:200]])
    return judged.outcome_now()


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


# What a miss says whose cause is an exception in a step.
RAISED = re.compile(r"(.*) failed with \w+: ")
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
    found = [wide.values.get(site.root.name) for site in state.selections]
    return max((_largest(value.double()) for value in found if isinstance(value, Tensor)), default=0.0)


def _shared(ran: Ran, graph: Graph) -> set[tuple[str, str]]:
    named = [(f"input {i}", x) for i, x in enumerate(ran.inputs)]
    named += [(f"output {i}", x) for i, x in enumerate(ran.outputs)]
    constants = {str(node.target): ran.values[node.name] for node in graph.nodes if node.op == "get_attr"}
    named += list(constants.items())
    kept = [(n, x.untyped_storage().data_ptr()) for n, x in named if isinstance(x, Tensor) and x.numel()]
    return {(a, b) for (a, of_a), (b, of_b) in itertools.combinations(kept, 2) if of_a == of_b}
