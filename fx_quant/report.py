"""What became of each quantized matmul: data first, then text."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from tabulate import tabulate

from fx_quant.kernels.registry import kernels
from fx_quant.reasons import Unmet, as_data, from_data, in_words, is_candidate, lacks_only_compiler, without_compiler

# Stands where a miss names its op; no op is called so.
_WHOLE_GRAPH = "graph"


@dataclass(frozen=True)
class SiteReport:
    """One quantized matmul that was rewritten.

    Args:
        module: dotted path of the module it came from, ``""`` when unknown.
        source: ``file:line`` of the user's code, ``""`` when unknown.
        op: the matmul in the source graph.
        scheme: how the operands are quantized.
        m: range of the rows, such as ``32`` or ``2..``.
        n, k: sizes of the weight.
        out_dtype: dtype of the result.
        kernel: the kernel that runs it.
        padding: the padding plan, or ``none``.
        numerics: class of the rewrite.
        quantize: the recognised quantize formula, or why it was left as it is.
        unmet: kernels that were not chosen, each with what it requires and is not met; nothing when it could have run.
        notes: what became of pads that the author wrote around it.
    """

    module: str
    source: str
    op: str
    scheme: str
    m: str
    n: int
    k: int
    out_dtype: str
    kernel: str
    padding: str
    numerics: str
    quantize: str
    unmet: dict[str, tuple[Unmet, ...]]
    notes: tuple[str, ...] = ()

    @property
    def losers(self) -> dict[str, list[str]]:
        """The kernels that were not chosen, each with its reasons in words."""
        return in_words(self.unmet)


@dataclass(frozen=True)
class MissReport:
    """One quantized matmul that was left as it was.

    Args:
        module, source, op: where it is, as in ``SiteReport``.
        node: the graph node at which the rule failed.
        reason: the rule, in words.
    """

    module: str
    source: str
    op: str
    node: str
    reason: str

    @classmethod
    def of_graph(cls, reason: str) -> MissReport:
        """That of a whole graph, which is left because a pass failed."""
        return cls("", "", _WHOLE_GRAPH, "", reason)

    @property
    def is_of_graph(self) -> bool:
        """Whether a whole graph is left."""
        return self.op == _WHOLE_GRAPH


@dataclass(frozen=True)
class RecognisedReport:
    """One quantized matmul that was understood and left as it was, because nothing on the target runs it faster.

    Args:
        module, source, op: where it is, as in ``SiteReport``.
        scheme, m, n, k: what it is; ``""`` and None where a library's own kernel hides it.
        reason: why it is left.
        unmet: kernels that cannot run it, each with what it requires and is not met.
    """

    module: str
    source: str
    op: str
    scheme: str
    m: str
    n: int | None
    k: int | None
    reason: str
    unmet: dict[str, tuple[Unmet, ...]]

    @property
    def losers(self) -> dict[str, list[str]]:
        """The kernels that were not chosen, each with its reasons in words."""
        return in_words(self.unmet)


@dataclass(frozen=True)
class UnseenReport:
    """One module that holds codes and of which no quantized matmul was found.

    Args:
        module: its name in ``named_modules()``.
        kind: its class.
        in_graph: whether a graph took its codes, and what it does with them is no matmul that fx_quant knows; otherwise
            it runs outside all graphs.
    """

    module: str
    kind: str
    in_graph: bool


@dataclass(frozen=True)
class BreakReport:
    """One place where Dynamo ended a graph.

    Args:
        source: ``file:line``, ``""`` when unknown.
        reason: in Dynamo's words, their first line.
        count: how many times.
    """

    source: str
    reason: str
    count: int


@dataclass(frozen=True)
class PieceReport:
    """One artefact of a graph that was compiled in pieces.

    Args:
        first: the number of its piece, counted from 0 in the order of the calls; of the first, where several are alike.
        count: how many pieces it serves.
        sites: rewritten matmuls in each.
    """

    first: int
    count: int
    sites: int


@dataclass(frozen=True)
class Report:
    """What became of each quantized matmul of a model on a target; prints as tables.

    Args:
        target: the machine.
        sites: rewritten.
        misses: left as they were, because a rule failed.
        recognised: left as they were, because nothing on the target runs them faster.
        graphs, graph_breaks: how the model was captured.
        note: what to do first, where the model hides its matmuls from every compiler.
        unseen: modules that hold codes and are in none of the above.
        breaks: where the graph broke.
        uncaptured: why there is no graph; empty where there is one.
        pieces: the artefacts of a graph that was compiled in pieces; its matmuls are reported for every piece.
        whole: why a graph that was to be compiled in pieces was not.
    """

    target: str
    sites: tuple[SiteReport, ...]
    misses: tuple[MissReport, ...]
    recognised: tuple[RecognisedReport, ...] = ()
    graphs: int = 1
    graph_breaks: int = 0
    note: str = ""
    unseen: tuple[UnseenReport, ...] = ()
    breaks: tuple[BreakReport, ...] = ()
    uncaptured: str = ""
    pieces: tuple[PieceReport, ...] = ()
    whole: str = ""

    def to_json(self) -> str:
        """The whole report as JSON: ``losers`` of a row are texts, and ``unmet`` the kinds of these."""
        data = dataclasses.asdict(self)
        for name in _JUDGED:
            for fields, row in zip(data[name], getattr(self, name), strict=True):
                fields |= {"losers": row.losers, "unmet": as_data(row.unmet)}
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report of which ``to_json`` made ``text``; the kinds of one that was saved without are unknown."""
        data = json.loads(text)
        for name in _JUDGED:
            for fields in data[name]:
                fields["unmet"] = from_data(fields.pop("losers"), fields.get("unmet"))
        for fields in data["sites"]:
            fields["notes"] = tuple(fields.get("notes", ()))
        for name, row in _ROWS.items():
            data[name] = tuple(row(**fields) for fields in data[name])
        return cls(**data)

    def merged(self, other: Report) -> Report:
        """The sites and misses of this report and of ``other``, in order."""
        return dataclasses.replace(
            self,
            sites=self.sites + other.sites,
            misses=self.misses + other.misses,
            recognised=self.recognised + other.recognised,
            graphs=self.graphs + other.graphs,
            graph_breaks=self.graph_breaks + other.graph_breaks,
            pieces=self.pieces + other.pieces,
            whole=self.whole or other.whole,
        )

    def renamed(self, name_of: Callable[[str], str]) -> Report:
        """The same with the name that ``name_of`` gives for that of each module."""

        def rows(named: tuple) -> tuple:
            return tuple(dataclasses.replace(row, module=name_of(row.module)) for row in named)

        return dataclasses.replace(
            self, sites=rows(self.sites), misses=rows(self.misses), recognised=rows(self.recognised)
        )

    def summary(self) -> str:
        """One line: how many were rewritten, recognised and missed, and what is in none of the graphs."""
        total = len(self.sites) + len(self.misses) + len(self.recognised)
        if not total and not self.graphs:
            return f"nothing was captured: {self.uncaptured or 'the reason is not known'}"
        if not total:
            nothing = f"no quantized matmul found ({self._graphs()})"
            if self.unseen:
                return f"{nothing}, though {_count(len(self.unseen), 'module holds', 'modules hold')} codes"
            return f"{nothing}; the model compiles unchanged"
        kept = f"{len(self.recognised)} recognised and left, " if self.recognised else ""
        counts = f"{len(self.sites)} of {total} quantized matmuls rewritten on {self.target}"
        outside = _count(len(self.unseen), "module that holds codes", "modules that hold codes") if self.unseen else ""
        return f"{counts}, {kept}{len(self.misses)} missed" + (f", {outside} not among them" if outside else "")

    def how_cut(self) -> str:
        """One line: how many pieces there are and how many were compiled, or why a graph was left whole."""
        if self.whole:
            return f"compiled whole, not in pieces: {self.whole}"
        if not self.pieces:
            return ""
        shared = [f"{row.count} are the same as piece {row.first}" for row in self.pieces if row.count > 1]
        total = sum(row.count for row in self.pieces)
        return ", ".join([f"{_count(total, 'piece', 'pieces')}, {len(self.pieces)} compiled", *shared])

    def lost_to_compiler(self) -> list[str]:
        """For each matmul the kernel that a C++ compiler would have given it, where the target has none."""
        order = [kernel.name for kernel in kernels()]
        lost: dict[str, None] = {}
        rows = [(site.unmet, site.kernel) for site in self.sites] + [(row.unmet, "") for row in self.recognised]
        for unmet, chosen in rows:
            better = order[: order.index(chosen)] if chosen in order else order
            lost.update(dict.fromkeys([n for n in better if lacks_only_compiler(unmet.get(n, ()))][:1]))
        return list(lost)

    def _graphs(self) -> str:
        breaks = f", {self.graph_breaks} graph breaks" if self.graph_breaks else ""
        return f"{self.graphs} graph{'s' if self.graphs != 1 else ''}{breaks}"

    def __str__(self) -> str:
        parts = [f"fx_quant: {self.summary()}"]
        if self.note:
            parts.append(textwrap.fill(self.note, 118))
        if how := self.how_cut():
            parts.append(textwrap.fill(how, 118))
        if lost := self.lost_to_compiler():
            parts.append(without_compiler(lost))
        if self.sites:
            parts.append(self._site_table())
            parts.append(self._losers())
        if self.recognised:
            parts.append(self._recognised_table())
        if self.misses:
            parts.append(self._miss_table())
        parts.append(self._unseen_table())
        parts.append(self._breaks_table())
        return "\n\n".join(part for part in parts if part)

    def _site_table(self) -> str:
        """One row a site; those of repeated layers share one, with ``*`` for the number of the layer."""
        alike: dict[tuple[object, ...], list[str]] = {}
        for s in self.sites:
            name = s.module or s.source or "?"
            facts = (s.scheme, s.m, s.n, s.k, s.kernel, "; ".join((s.padding, *s.notes)), s.numerics)
            alike.setdefault((without_numbers(name) if s.module else name, *facts), []).append(name)
        rows = [(names[0] if len(names) == 1 else name, len(names), *facts) for (name, *facts), names in alike.items()]
        headers = ("module", "sites", "scheme", "m", "n", "k", "kernel", "padding", "numerics")
        return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)

    def _losers(self) -> str:
        """Why each kernel of the target's platform that has the codes was not chosen, once per distinct reason."""
        seen: dict[str, list[str]] = {}
        for site in self.sites:
            for kernel, reasons in site.losers.items():
                if not is_candidate(site.unmet[kernel]):
                    continue
                text = "; ".join(reasons)
                seen.setdefault(kernel, [])
                if text not in seen[kernel]:
                    seen[kernel].append(text)
        if not seen:
            return ""
        lines = ["not chosen:"]
        for kernel, texts in seen.items():
            body = " | ".join(texts)
            lines.append(textwrap.fill(f"{kernel}: {body}", 118, initial_indent="  ", subsequent_indent="      "))
        return "\n".join(lines)

    def _recognised_table(self) -> str:
        """One line a matmul that is left; those of repeated layers share one."""
        alike: dict[tuple[str, ...], list[RecognisedReport]] = {}
        for row in self.recognised:
            shape = "" if row.n is None else f"m={row.m} n={row.n} k={row.k}"
            alike.setdefault((without_numbers(row.module), row.scheme, shape, row.op, row.reason), []).append(row)
        lines = ["recognised, and left as they are:"]
        for (module, scheme, shape, op, reason), rows in alike.items():
            where = (rows[0].module if len(rows) == 1 else module) or rows[0].source or op
            times = f" x {len(rows)}" if len(rows) > 1 else ""
            matmul = f"{op}, {scheme} {shape}" if scheme else op
            text = f"{where}{times}: {matmul}: {reason}"
            lines.append(textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="      "))
        return "\n".join(lines)

    def _miss_table(self) -> str:
        """One line a miss; those of repeated layers share one."""
        alike: dict[tuple[str, str, str, str], list[MissReport]] = {}
        for miss in self.misses:
            key = (without_numbers(miss.module), miss.source, miss.op, miss.reason)
            alike.setdefault(key, []).append(miss)
        lines = ["missed:"]
        for (module, source, op, reason), misses in alike.items():
            first = misses[0]
            where = (first.module if len(misses) == 1 else module) or source or op
            where += f" ({source})" if source and module else ""
            times = f" x {len(misses)}" if len(misses) > 1 else ""
            text = f"{where}{times}: {op} left as it is, at {first.node}: {reason}"
            lines.append(textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="      "))
        return "\n".join(lines)

    def _unseen_table(self) -> str:
        """One line for modules of the same class and, but for numbers, name; those outside the graphs first."""
        parts = []
        nameless = sum(not row.module for row in (*self.sites, *self.recognised, *self.misses))
        outside = "in no graph, not run on these inputs or run outside the graphs, so nothing is done there"
        if nameless:
            outside = (
                f"in no graph by name: not run, run outside the graphs, or among the {nameless} above without a name"
            )
        for in_graph, says in (
            (False, outside),
            (True, "in a graph, but in no quantized matmul that fx_quant knows"),
        ):
            alike: dict[tuple[str, str], list[str]] = {}
            for row in self.unseen:
                if row.in_graph is in_graph:
                    alike.setdefault((without_numbers(row.module), row.kind), []).append(
                        row.module or "the model itself"
                    )
            if not alike:
                continue
            count = sum(map(len, alike.values()))
            head = f"{_count(count, 'module that holds codes is', 'modules that hold codes are')} {says}:"
            lines = [textwrap.fill(head, 118)]
            for (module, kind), names in alike.items():
                where = names[0] if len(names) == 1 else f"{module} x {len(names)}"
                lines.append(textwrap.fill(f"{where} ({kind})", 118, initial_indent="  ", subsequent_indent="      "))
            parts.append("\n".join(lines))
        return "\n\n".join(parts)

    def _breaks_table(self) -> str:
        """Where the graph broke, the most frequent place first; only where something may be outside the graphs."""
        if not self.graph_breaks or not (self.sites or self.misses or self.recognised or self.unseen):
            return ""
        lines = [f"The model was captured in {self._graphs()}; matmuls outside the graphs are not seen."]
        for row in sorted(self.breaks, key=lambda row: -row.count)[:_BREAKS_SHOWN]:
            times = f" x {row.count}" if row.count > 1 else ""
            text = f"{'/'.join(row.source.split('/')[-2:]) or '?'}{times}: {row.reason}"
            lines.append(textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="      "))
        if len(self.breaks) > _BREAKS_SHOWN:
            lines.append(f"  and {len(self.breaks) - _BREAKS_SHOWN} more places; to_json() has them all")
        return "\n".join(lines)


_BREAKS_SHOWN = 5
_JUDGED = ("sites", "recognised")
_ROWS = {
    "sites": SiteReport,
    "misses": MissReport,
    "recognised": RecognisedReport,
    "unseen": UnseenReport,
    "breaks": BreakReport,
    "pieces": PieceReport,
}


def _count(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def without_numbers(module: str) -> str:
    """``encoder.layer.3.query`` -> ``encoder.layer.*.query``."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
