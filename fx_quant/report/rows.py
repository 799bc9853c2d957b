"""What became of one quantized matmul, of a module, a graph break or a piece: the rows of a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from fx_quant.reasons import Unmet, in_words

# Stands where a miss names its op; no op is called so.
_WHOLE_GRAPH = "graph"


@dataclass(frozen=True)
class PlanReport:
    """What the calls of one mode pad at a matmul.

    Args:
        padding: in words, or ``none``.
        fills: the operands that grow, each with what stands in its padding: ``a`` and ``b`` are the codes, ``b_sum``
            is the sum of ``b`` over k.
        cut: the dims of the result that are cut to their own size right behind the kernel.
    """

    padding: str
    fills: dict[str, int]
    cut: tuple[str, ...]


@dataclass(frozen=True)
class ExcerptReport:
    """The graph around one matmul, a line each step, in which values are numbered in order.

    Args:
        before: as the model states it.
        after: as it was rewritten; empty where it was not.
    """

    before: str
    after: str = ""


@dataclass(frozen=True)
class TimeReport:
    """What a matmul takes, with the steps that its rewrite replaces.

    Args:
        seconds: as fx_quant compiles it.
        inductor_seconds: as Inductor alone compiles the same steps on the same inputs.
        share: of the whole call as fx_quant compiles it that ``seconds`` are.
    """

    seconds: float
    inductor_seconds: float
    share: float


@dataclass(frozen=True)
class CallReport:
    """What a call of the whole model takes.

    Args:
        seconds: compiled by fx_quant.
        inductor_seconds: compiled by Inductor alone.
    """

    seconds: float
    inductor_seconds: float


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
        padding: the padding plan of this compile, or ``none``.
        numerics: class of the rewrite.
        quantize: the recognised quantize formula, or why it was left as it is.
        unmet: kernels that were not chosen, each with what it requires and is not met; nothing when it could have run.
        notes: what became of pads that the author wrote around it.
        plans: what each mode pads, by its name: ``eager``, ``graph`` and ``piecewise``.
        weight_bytes: that the codes of the weight take.
        lost: the kernel that it would have had with a C++ compiler, where the target has none.
        excerpt: the graph around it, where somebody looks.
        time: what it takes, where it was measured.
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
    plans: dict[str, PlanReport] = field(default_factory=dict)
    weight_bytes: int = 0
    lost: str = ""
    excerpt: ExcerptReport | None = None
    time: TimeReport | None = None

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
        excerpt: the graph around it, where somebody looks.
    """

    module: str
    source: str
    op: str
    node: str
    reason: str
    excerpt: ExcerptReport | None = None

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
        weight_bytes, lost, excerpt: as in ``SiteReport``.
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
    weight_bytes: int = 0
    lost: str = ""
    excerpt: ExcerptReport | None = None

    @property
    def losers(self) -> dict[str, list[str]]:
        """The kernels that were not chosen, each with its reasons in words."""
        return in_words(self.unmet)


@dataclass(frozen=True)
class UnseenReport:
    """One module that is quantized and of which no quantized matmul was found.

    Args:
        module: its name in ``named_modules()``.
        kind: its class.
        in_graph: whether a graph took its tensors, and what it does with them is no matmul that fx_quant knows;
            otherwise it runs outside all graphs.
        reason: where the graph broke in its code, and what is known of its library and to be done; empty where neither
            is known.
    """

    module: str
    kind: str
    in_graph: bool
    reason: str = ""


@dataclass(frozen=True)
class FloatReport:
    """One linear that is not quantized.

    Args:
        module: its name in ``named_modules()``.
        kind: its class.
        weight_bytes: that its weight takes.
    """

    module: str
    kind: str
    weight_bytes: int


@dataclass(frozen=True)
class BreakReport:
    """One place where Dynamo ended a graph.

    Args:
        source: ``file:line``, ``""`` when unknown.
        reason: in Dynamo's words, their first line.
        count: how many times.
        frames: ``file:line`` of all code that was being traced there.
    """

    source: str
    reason: str
    count: int
    frames: tuple[str, ...] = ()


@dataclass(frozen=True)
class PieceReport:
    """One artefact of a graph that was compiled in pieces.

    Args:
        first: the number of its piece, counted from 0 in the order of the calls; of the first, where several are alike.
        count: how many pieces it serves.
        sites: rewritten matmuls in each; None where it was not compiled.
        sizes: numbers of rows that it is compiled for by itself, beside all of them.
        unsized: why it is for none, where there were some to compile for.
        unpadded: why fewer rows are not padded to the next of ``sizes``; empty where they are.
    """

    first: int
    count: int
    sites: int | None
    sizes: tuple[int, ...] = ()
    unsized: str = ""
    unpadded: str = ""
