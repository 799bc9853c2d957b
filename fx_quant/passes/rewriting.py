"""One graph on its way through the passes: the state that each of them takes, with a row for each site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from fx_quant.config import Options
from fx_quant.kernels.context import CompileContext
from fx_quant.kernels.select import Selection
from fx_quant.passes.emit import Emitter
from fx_quant.passes.memory import Memory
from fx_quant.passes.pads import AuthorsPad, PadName
from fx_quant.passes.quantizers import Quantizer
from fx_quant.passes.sites import Miss, Recognised, Site
from fx_quant.passes.turned import Turned
from fx_quant.target import Target


@dataclass
class Row:
    """One site that is rewritten.

    Args:
        site: what was found.
        selection: its kernel.
        quantizer: what was recognised of the quantize behind its activation, or why nothing was; None for floats.
        op: its op in the graph, canonical first and then its kernel's.
        canonical: the name of the canonical op.
        result: the node ``[m, n]`` that holds what its root held.
    """

    site: Site
    selection: Selection
    quantizer: Quantizer | str | None = None
    op: Node | None = None
    canonical: str = ""
    result: Node | None = None

    def written(self) -> tuple[Node, Node]:
        """``(op, result)`` of a site whose canonical op was written."""
        assert self.op is not None
        assert self.result is not None
        return self.op, self.result


@dataclass
class Rewriting:
    """One graph on its way through the passes.

    Args:
        source: the source graph, which is not touched.
        graph: the graph being rewritten.
        target: the machine to choose kernels for.
        options: what the user asked for.
        context: what kernels and plans are chosen for.
        static_indices: positions of the placeholders that are parameters or buffers; None where that is not known.
        left: sites to leave as they are: the reason, by the name of the matmul.
        kept_pads: pads of the author's to leave as they are: the reason, by pad.
        kept_spellings: linears that are spelled as something else, to be left so: the reason, by name.
        turned: those that are matmuls now, and why others are not.
        pads: what an author padded, as it was when the sites were found.
        before: the source as the sites were found in it: normalised, nothing rewritten.
        sites: those that were found.
        rows: each site that is rewritten.
        misses: what is left as it is, because a rule failed.
        recognised: what is left as it is, because nothing here runs it faster.
        memory: which nodes of ``graph`` share memory, as it was when the sites were found.
        emitter: writes the canonical ops.
        attended: calls of attention of one query that our kernel has.
    """

    source: Graph
    graph: Graph
    target: Target
    options: Options
    context: CompileContext
    static_indices: frozenset[int] | None = None
    left: Mapping[str, str] = field(default_factory=dict)
    kept_pads: Mapping[PadName, str] = field(default_factory=dict)
    kept_spellings: Mapping[str, str] = field(default_factory=dict)
    turned: Turned = field(default_factory=Turned)
    pads: list[AuthorsPad] = field(default_factory=list)
    before: Graph = field(default_factory=Graph)
    sites: list[Site] = field(default_factory=list)
    rows: dict[Site, Row] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)
    recognised: list[Recognised] = field(default_factory=list)
    memory: Memory | None = None
    emitter: Emitter | None = None
    attended: int = 0

    def miss(self, site: Site, reason: str) -> None:
        """Leave ``site`` as it is."""
        self.rows.pop(site, None)
        self.misses.append(Miss(site.gemm, site.gemm, reason))
