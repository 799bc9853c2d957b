"""``prepare_``: modules that hide their matmuls from a compiler become ``QuantizedLinear`` with the same codes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_quant.errors import NoKernelError
from fx_quant.kernels.huge_pages import trim
from fx_quant.kernels.subclasses import inner_tensors
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.layers.quantize_model import disable_fast_paths
from fx_quant.loading.adapters.base import Adapter, adapter_of, adapters, difference
from fx_quant.loading.library_notes import hiding_modules, library_notes
from fx_quant.loading.release import Ledger, Memory
from fx_quant.report import Block, Entries, Paragraph, Reported, Table, alike_by_name, folded, mebibytes
from fx_quant.report.progress import counting
from fx_quant.scheme import short_scheme

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class SwappedModule:
    """One module that is a ``QuantizedLinear`` now.

    Args:
        module: its dotted path in the model.
        tied: its other paths, under which it is the same ``QuantizedLinear``.
        library: whose module it was, as pip knows it.
        from_class: the class that it had.
        scheme: how the operands are quantized.
        numerics: class of its results beside the old module's.
        note: what makes them differ; empty if only the order of float operations does.
        freed: bytes of the old module's tensors that nothing holds any more; memory that several shared counts for
            the first of them.
    """

    module: str
    tied: tuple[str, ...]
    library: str
    from_class: str
    scheme: str
    numerics: str
    note: str
    freed: int = 0


@dataclass(frozen=True)
class LeftModule:
    """One quantized module that is as it was.

    Args:
        module, tied, library, from_class: as in ``SwappedModule``.
        scheme: how it is quantized, as far as it is known.
        reason: why it was left: what must hold, what was found, what to do next.
    """

    module: str
    tied: tuple[str, ...]
    library: str
    from_class: str
    scheme: str
    reason: str


@dataclass(frozen=True, repr=False)
class PrepareReport(Reported):
    """What ``prepare_`` did; prints as a table.

    Args:
        swapped: modules that are ``QuantizedLinear`` now.
        left: modules of a known library that are not, each with its reason.
        already: how many ``QuantizedLinear`` the model held before.
        notes: what of the model could not be put right.
        released: modules that compile as they are were asked for too.
    """

    swapped: tuple[SwappedModule, ...] = ()
    left: tuple[LeftModule, ...] = ()
    already: int = 0
    notes: tuple[str, ...] = ()
    released: bool = False

    @property
    def freed(self) -> int:
        """Bytes of the old modules' tensors that nothing holds any more."""
        return sum(swapped.freed for swapped in self.swapped)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, with ``freed`` of all modules."""
        return {"summary": self.summary(), **dataclasses.asdict(self), "freed": self.freed}

    def summary(self) -> str:
        """One line: how many modules were swapped, and how many were left."""
        total = len(self.swapped) + len(self.left)
        if not total:
            held = f"the model holds {self.already} QuantizedLinear already" if self.already else self._nothing_known()
            return f"nothing to prepare: {held}"
        before = f"; {self.already} were QuantizedLinear already" if self.already else ""
        freed = f", {mebibytes(self.freed)} of their tensors freed" if self.released and self.swapped else ""
        count = f"{len(self.swapped)} of {total} quantized modules"
        return f"{count} swapped for QuantizedLinear, {len(self.left)} left{freed}{before}"

    def blocks(self, *, wide: bool) -> list[Block]:
        """What was swapped, a row for repeated layers, and what was left, a line."""
        alike = alike_by_name(self.swapped, lambda row: _facts(row, row.numerics))
        columns = {
            "module": [name for name, _ in alike],
            "modules": [str(len(rows)) for _, rows in alike],
            "library": [rows[0].library for _, rows in alike],
            "from": [rows[0].from_class for _, rows in alike],
            "scheme": [rows[0].scheme if wide else short_scheme(rows[0].scheme) for _, rows in alike],
            "numerics": [rows[0].numerics for _, rows in alike],
        }
        if self.released:
            columns["freed"] = [mebibytes(sum(row.freed for row in rows)) for _, rows in alike]
        said = [] if wide or not alike else folded(columns, ("library", "from", "scheme", "numerics"))
        notes = Counter(swapped.note for swapped in self.swapped if swapped.note)
        left = [
            f"{name}{f' x {len(rows)}' if len(rows) > 1 else ''}: {rows[0].library} {rows[0].from_class} "
            f"({rows[0].scheme}): {rows[0].reason}"
            for name, rows in alike_by_name(self.left, lambda row: _facts(row, row.reason))
        ]
        return [
            *([Paragraph(", ".join(said))] if said else []),
            *([Table(tuple(columns), tuple(zip(*columns.values(), strict=True)))] if alike else []),
            *(Paragraph(f"approximate in {count}: {note}") for note, count in notes.items()),
            *([Entries("left", tuple(left))] if left else []),
            *map(Paragraph, self.notes),
        ]

    def _nothing_known(self) -> str:
        names = [adapter.library for adapter in adapters(compiled=self.released)]
        return f"no quantized module of {', '.join(names[:-1])} or {names[-1]} found"


def _facts(row: SwappedModule | LeftModule, last: str) -> tuple[str, ...]:
    return row.library, row.from_class, row.scheme, last


def prepare_(
    model: nn.Module, *, filter: Callable[[str, nn.Module], bool] | None = None, release: bool = False
) -> PrepareReport:
    """Swap the quantized modules of ``model`` that a compiler cannot see into for ``QuantizedLinear``, in place.

    The modules of some libraries break the graph at each linear, so that no ``torch.compile`` backend gets to see a
    quantized matmul: compressed-tensors (as transformers loads it, compressed or frozen), torch.ao's dynamic linears,
    optimum-quanto. Each that can be expressed becomes a ``QuantizedLinear`` with its own codes and scales: what they
    decode to is compared with the weight that the module computes with, bit for bit, and a module that differs is left.
    A left module is as it was. Libraries that compile as they are (torchao) need none of this, but compiled their codes
    are there twice: theirs, and those that a kernel packed. Under ``release`` their linears are swapped too where a
    ``QuantizedLinear`` holds the weight packed and computes the same, for activations of the weight's dtype; the
    report says how much memory that freed. Compile the model afterwards.

    The swapped model works eagerly too, on inputs of any rank, for inference only. Activations are quantized by the
    library's own formula, to its codes and scales bit for bit, so that results are the old ones within the numerics
    class ``reassociated``; a module whose formula is not known is ``approximate``, with a note. NaN and infinities
    spoil the results that they spoil in the library, but for NaN under a given int8 scale, which counts as 0. Compiled,
    formulas in bfloat16 and float16 round where ``torch.compile`` rounds, which tips a code now and then; under
    ``torch._inductor.config.emulate_precision_casts`` they round as eagerly.

    A second call swaps nothing. ``state_dict()`` fits another prepared copy of the model, not the float model or the
    library's own modules: prepare a model to run it, and save it before.

    A module that has several names is swapped once and stays shared. Hooks, parametrizations and forward functions that
    are not the library's own are never dropped: their modules are left. Where modules of compressed-tensors were
    swapped, its offloading wrappers are removed from the whole model.

    Args:
        model: what holds the modules; not a quantized linear itself.
        filter: ``(name, module) -> bool`` for quantized modules, by their first name; None takes every one.
        release: swap modules that compile as they are too, so that each weight is held once.

    Raises:
        ValueError: ``model`` is no module, or is itself a quantized module, which cannot be replaced in place.

    Source: each file of ``fx_quant.adapters`` names its library's.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"prepare_ needs an nn.Module, got {type(model).__name__}")
    if (root := adapter_of(model, compiled=release)) is not None:
        raise ValueError(
            f"prepare_ swaps the modules inside a model, got a {type(model).__name__} of {root.library} itself; "
            "wrap it: nn.Sequential(module)"
        )
    already = sum(isinstance(module, QuantizedLinear) for module in model.modules())
    swapped: list[tuple[SwappedModule, Memory]] = []
    left: list[LeftModule] = []
    used: dict[str, Adapter] = {}
    kept, ledger = 0, Ledger()
    owners, found = _weight_owners(model), _found(model, release)
    # Asked before anything changes, as it may raise.
    unwanted = {module for module, (_, names) in found.items() if filter is not None and not filter(names[0], module)}
    with counting("preparing", "module", len(found)) as done:
        while found:
            module = next(iter(found))
            adapter, names = found.pop(module)
            done()
            where = (names[0], names[1:], adapter.library, type(module).__name__)
            if module in unwanted:
                left.append(LeftModule(*where, adapter.describe(module), "the filter left it out"))
                continue
            result = _swapped_for(module, adapter, owners)
            if isinstance(result, str):
                left.append(LeftModule(*where, adapter.describe(module), result))
                continue
            linear, numerics, note, dtype = result
            memory = ledger.memory_of(module)
            for name in names:
                model.set_submodule(name, linear)
            adapter.let_go(module)
            # Where nothing else holds the library's module.
            owners.pop(module, None)
            unwanted.discard(module)
            del module, result
            linear.pack_for(dtype)
            used[adapter.library] = adapter
            swapped.append((SwappedModule(*where, str(linear.scheme), numerics, note), memory))
            kept += memory.kept if adapter.compiles else 0
    if swapped:
        disable_fast_paths(model)
        trim()
    notes = [note for adapter in used.values() for note in adapter.finish(model)]
    if kept:
        notes.append(
            f"{mebibytes(kept)} of codes are not freed, as something outside the model refers to them; drop it, and "
            "the next call packs the weights"
        )
    rows = tuple(dataclasses.replace(row, freed=memory.freed) for row, memory in swapped)
    return PrepareReport(rows, tuple(left), already, tuple(notes), release)


def needs_prepare(model: object) -> str | None:
    """What ``prepare_`` would swap, in one line; None when it would change nothing.

    Looks at classes, schemes and hooks only: no weight is read, and no library imported. So a module whose values turn
    out not to fit its scheme is counted here, and left by ``prepare_``.
    """
    if not isinstance(model, nn.Module):
        return None
    counts = Counter(swappable(model).values())
    parts = [
        f"{count} {'module' if count == 1 else 'modules'} of {adapter.library} {adapter.effect}"
        for adapter, count in counts.items()
    ]
    swaps = "fx_quant.prepare_(model) swaps them for QuantizedLinear"
    return f"{', '.join(parts)}: {swaps}" if parts else None


def first_steps(model: nn.Module) -> str:
    """What to do with ``model`` before it is compiled, as far as its classes tell; empty where nothing is known."""
    needed = needs_prepare(model)
    notes = library_notes(model, swappable(model).keys())
    return " ".join([f"{needed}.", *notes] if needed and notes else [needed] if needed else notes)


def hidden(model: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """The quantized modules within ``model`` that a compiler cannot see into.

    Each with the package whose code it runs, empty where that is not told apart, and with what to do, or why nothing.
    """
    found = _found(model)
    owners = _weight_owners(model) if found else {}
    known = {
        module: ("", _objection(module, adapter, owners) or "fx_quant.prepare_(model) swaps it for QuantizedLinear")
        for module, (adapter, _) in found.items()
    }
    return hiding_modules(model) | known


def swappable(model: nn.Module, *, release: bool = False) -> dict[nn.Module, Adapter]:
    """The modules that ``prepare_`` would swap, as far as that is known without reading their weights."""
    found = _found(model, release)
    owners = _weight_owners(model) if found else {}
    return {module: adapter for module, (adapter, _) in found.items() if _objection(module, adapter, owners) is None}


def _found(model: nn.Module, release: bool = False) -> dict[nn.Module, tuple[Adapter, tuple[str, ...]]]:
    """The modules that an adapter recognizes, each with its adapter and all its names, in order."""
    found: dict[nn.Module, tuple[Adapter, tuple[str, ...]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        known = found.get(module)
        adapter = adapter_of(module, compiled=release) if known is None else known[0]
        if adapter is not None:
            found[module] = (adapter, (*(known[1] if known else ()), name))
    return found


def _swapped_for(
    module: nn.Module, adapter: Adapter, owners: Mapping[nn.Module, str]
) -> tuple[QuantizedLinear, str, str, torch.dtype] | str:
    """The ``QuantizedLinear`` of ``module``, its numerics class, note and dtype; or the reason why there is none."""
    reason = _objection(module, adapter, owners)
    if reason is not None:
        return reason
    try:
        with torch.no_grad():
            conversion = adapter.convert(module)
    except ValueError as error:
        return str(error)
    except ImportError as error:
        return f"{adapter.library} must be a version that fx_quant can read, got {error}; install another version"
    reason = difference(conversion)
    if reason is not None:
        return reason
    weight = conversion.weight
    linear = conversion.linear.to(weight.device).train(module.training)
    try:
        selection = linear.selection(weight.new_empty((0, linear.in_features)))
    except NoKernelError as error:
        return str(error)
    if adapter.compiles and not linear.can_pack(selection):
        return f"its kernel must hold the weight packed in as many bytes as its codes, {selection.kernel.name} does not"
    return linear, str(conversion.numerics), conversion.note, weight.dtype


def _objection(module: nn.Module, adapter: Adapter, owners: Mapping[nn.Module, str]) -> str | None:
    if module in owners:
        return f"its weight must be its own, but it is that of {owners[module]} too; untie them first"
    if parametrize.is_parametrized(module):
        return "it must have no parametrization, which a swap would lose; remove it, leave_parametrized=True"
    own = adapter.own_hooks(module)
    for kind in _HOOKS:
        if any(key not in own for key in getattr(module, kind, ())):
            return f"it must have no hooks, which a swap would lose, got {kind.strip('_')}; remove them first"
    try:
        adapter.check(module)
    except ValueError as error:
        return str(error)
    return None


def _weight_owners(model: nn.Module) -> dict[nn.Module, str]:
    """For each module that shares its ``weight`` with another module: a name of that other."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        # Under an offloading cache, looking at a parameter would copy it to the device.
        held = getattr(module._parameters, "offloaded_values", module._parameters)
        weight = held.get("weight")
        if is_traceable_wrapper_subclass(weight):
            for inner in inner_tensors(weight):
                holders.setdefault(inner.untyped_storage()._cdata, []).append((module, name))
        elif weight is not None:
            holders.setdefault(id(weight), []).append((module, name))
    return {
        module: next(name for other, name in shared if other is not module)
        for shared in holders.values()
        for module, _ in shared
        if any(other is not module for other, _ in shared)
    }
