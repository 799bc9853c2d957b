"""A C++ template around our micro-kernels: it yields the accumulator; the epilogue is fused by the scheduler.

``out[m, n] = sum_k a[m, k] * b[k, n]`` with ``b`` in packed panels of 64 columns, ``m`` dynamic, ``k`` and ``n`` static
and otherwise free. The native code (``kernels/cpu/source``) is pasted into the rendered source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any, TypeGuard
from unittest.mock import patch

import sympy
import torch
from torch._inductor import config, ir
from torch._inductor.codegen.cpp import get_export_declaration
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import cexpr_index
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.lowering import lowerings, to_dtype
from torch._inductor.ops_handler import WrapperHandler
from torch._inductor.utils import parallel_num_threads, sympy_index_symbol
from torch._inductor.virtualized import V, ops
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._ordered_set import OrderedSet
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from fx_quant.compat import templates_take_unbacked_sizes
from fx_quant.kernels.cpu.native import PLAN, TILE_LOOP, Dot
from fx_quant.kernels.cpu.plans import PlanTable, table

aten = torch.ops.aten


def can_render(dot: Dot, a: ir.TensorBox, n: int) -> bool:
    """Whether ``n`` and ``k`` are known and not 0, and ``dot`` exists, for which Inductor's vectors are wide enough.

    Any number of rows, but where this Inductor's templates take none that is read off values.
    """
    isa = pick_vec_isa()
    is_wide = (isa.bit_width() if isa else 0) >= dot.vector_bits
    sizes = (n, a.get_size()[1])
    if not templates_take_unbacked_sizes() and free_unbacked_symbols(a.get_size()[0]):
        return False
    return is_wide and dot.exists_here() and all(is_number(size) and size > 0 for size in sizes)


def is_number(size: object) -> TypeGuard[int | sympy.Integer]:
    """Whether ``size`` is known."""
    return isinstance(size, (int, sympy.Integer))


# How each kernel begins.
BEGIN = r"""
{{template.header().getvalue()}}
{{native}}
extern "C" {{export_declaration}}
{{kernel.def_kernel(inputs=inputs, outputs={"Y": Y}, aliases=aliases)}}
{
    {{kernel.maybe_codegen_profile()}}
    using namespace {{namespace}};
"""
# What a thread computes: its rows and panels.
SHARE = r"""    const FxqPlan& plan = fxq_plan(FXQ_PLANS, M);
{%- if num_threads > 1 %}
{%- set all_threads = "omp_get_max_threads()" if dynamic_threads else num_threads %}
    #pragma omp parallel num_threads(fxq_threads(plan, M, N, K, {{all_threads}}))
{%- endif %}
    {
{%- if num_threads > 1 %}
        const FxqShare share =
            fxq_share(M, panels, omp_get_num_threads(), omp_get_thread_num(), {{dot.struct}}::ROWS);
{%- else %}
        const FxqShare share = fxq_share(M, panels, 1, 0, {{dot.struct}}::ROWS);
{%- endif %}
"""
# The columns of a panel; the last one may be narrower.
N_START = r"""                const int64_t n_start = panel * FXQ_PANEL;
{%- if n % 64 and epilogue_nodes %}
                const int64_t n_end = std::min(N, n_start + FXQ_PANEL);
{%- endif %}
"""
# The tile ``acc`` of rows ``m_start`` to ``m_end``, through the epilogue to where it belongs.
STORE = r"""{%- if not epilogue_nodes %}
                    fxq_store(
                        acc, m_end - m_start, std::min(FXQ_PANEL, N - n_start), Y + m_start * N + n_start, N);
{%- else %}
{%- set acc = kernel.local_buffers["acc"] %}
{%- set n_end = "n_end" if n % 64 else "n_start + 64" %}
{%- set width = "n_end - n_start" if n % 64 else "64" %}
{%- set tile_acc = kernel.slice_nd(acc, [("0", "m_end - m_start"), ("0", width)]) %}
{%- set tile_Y = kernel.slice_nd(Y_2d, [("m_start", "m_end"), ("n_start", n_end)]) %}
                    {{kernel.store_output(
                        tile_Y, tile_acc, acc_node, epilogue_nodes,
                        offsets=("m_start", "n_start"), reindexers=reindexers
                    )|indent(20)}}
{%- endif %}
"""

_TEMPLATE = (
    BEGIN
    + r"""    const int64_t M = {{kernel.size(acc_node, 0)}};
    const int64_t N = {{size("n", n)}}, K = {{size("k", k)}}, lda = {{size("lda", A.get_stride()[0])}};
    const int64_t GROUP = {{dot.struct}}::GROUP, panels = (N + FXQ_PANEL - 1) / FXQ_PANEL;
    const int64_t panel_size = (K + GROUP - 1) / GROUP * GROUP * FXQ_PANEL;
    const auto a = reinterpret_cast<const {{dot.struct}}::A*>(&{{kernel.index(A, [0, 0])}});
    const auto b = reinterpret_cast<const {{dot.struct}}::B*>(&{{kernel.index(B, [0] * B.get_size()|length)}});
"""
    + SHARE
    + TILE_LOOP.substitute(
        dot="{{dot.struct}}",
        rows="{{dot.rows}}",
        sums="""{{kernel.define_stack_allocated_buffer("acc", [384, 64], dot.acc_dtype)}}
        static_assert({{dot.struct}}::ROWS == {{dot.rows}} && FXQ_CHUNK_ROWS == 384 && FXQ_PANEL == 64);""",
        panel=N_START
        + r"""                // Nothing else asks for what is read after the panel: it would be waited for.
                if (blocks == 1) {
                    fxq_expect(b + (panel + 1) * panel_size, plan.ahead);
{%- for name, size in template.columns(kernel, epilogue_nodes) %}
                    fxq_expect({{name}} + n_start, 64 * {{size}});
{%- endfor %}
                }""",
        store=STORE.rstrip("\n"),
    )
    + r"""    }
}
"""
)


@functools.cache
def _template(text: str) -> Any:
    return CppTemplate._template_from_string(text)


class EpilogueTemplate(CppTemplate):
    """Renders native code that yields ``[m, n]`` rows, together with the epilogue nodes that were fused into it.

    Args:
        name: of the kernel.
        inputs: by the names that ``text`` has for them.
        layout: of what the native code yields.
        n: columns of it.
    """

    text = ""

    def __init__(self, name: str, inputs: Mapping[str, ir.IRNode], layout: ir.Layout, n: int) -> None:
        super().__init__(name, list(inputs.values()), layout, parallel_num_threads())
        self.names, self.n = tuple(inputs), n

    def native(self) -> str:
        """The native code that ``text`` calls."""
        raise NotImplementedError  # each kind of kernel has its own

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What ``text`` reads beside the names that every template has."""
        return {}

    def render(  # pyrefly: ignore[bad-override]  (as Inductor's own templates do)
        self,
        kernel: CppTemplateKernel,
        template_buffer_node: ir.CppTemplateBuffer | None = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: list[ir.Buffer] | None = None,
        **kwargs,
    ) -> str:
        """The C++ source of the kernel; ``generate``, which would only time it, is told its arguments alone."""
        inputs = dict(zip(self.names, self.input_nodes, strict=True))
        if template_buffer_node is None:
            assert isinstance(self.output_node, ir.Buffer)
            kernel.def_kernel(inputs=inputs, outputs={"Y": self.output_node})
            return ""
        native, namespace = in_own_namespace(self.native())
        template_buffer: ir.Buffer = template_buffer_node
        # The accumulator of a tile is local; `acc_node` is the buffer whose reads it replaces in the epilogue.
        acc_node, Y, Y_2d = template_buffer, template_buffer, template_buffer
        nodes: list[ir.Buffer] = []
        reindexers: list = []
        aliases: OrderedSet[str] = OrderedSet()
        with contextlib.ExitStack() as stack:
            if epilogue_nodes:
                if flag_template_buffer_has_other_users:
                    # Others read the accumulator, so it is stored too, as a first epilogue.
                    acc_node = ir.Buffer(name=f"{template_buffer.get_name()}_acc", layout=template_buffer.layout)
                    stack.enter_context(patch.object(V.graph, "get_dtype", self._fake_get_dtype(acc_node)))
                    aliases.add(acc_node.get_name())
                    nodes.append(_copy(acc_node, template_buffer))
                    reindexers.append(None)
                else:
                    aliases.add(template_buffer.get_name())
                nodes.extend(epilogue_nodes)
                Y = epilogue_nodes[-1]
                Y_2d, reindexers = gen_2d_view_of_epilogue_buf(
                    Y, template_buffer, [*epilogue_nodes], reindexers, default_reindexers=[None] * len(epilogue_nodes)
                )
            return _template(self.text).render(
                template=self,
                kernel=kernel,
                inputs=inputs,
                Y=Y,
                Y_2d=Y_2d,
                acc_node=acc_node,
                aliases={alias: Y.get_name() for alias in aliases},
                size=functools.partial(self._size, kernel, lifted=not nodes),
                epilogue_nodes=[_reading_in_tile(node, template_buffer.get_size()[0], self.n) for node in nodes],
                reindexers=reindexers,
                n=self.n,
                num_threads=self.num_threads,
                dynamic_threads=_threads_are_dynamic(self.num_threads),
                native=native,
                namespace=namespace,
                export_declaration=get_export_declaration(),
                **inputs,
                **self.arguments(inputs),
            )

    @staticmethod
    def _size(kernel: CppTemplateKernel, name: str, size: int | sympy.Expr, *, lifted: bool) -> str:
        """``size`` in C++: where it is known and ``lifted`` the kernel's argument, as Inductor lifts offsets of seeds.

        A kernel that nothing was fused into is then one for all sizes, and compiled once.
        """
        if lifted and is_number(size):
            return kernel.args.seed_offset(f"size_{name}", int(size))
        return cexpr_index(kernel.rename_indexing(sympy.sympify(size)))

    def columns(self, kernel: CppTemplateKernel, nodes: list[ir.Buffer]) -> list[tuple[str, int]]:
        """Name in the kernel and bytes of an element of what the epilogue reads once for each column."""
        names = OrderedSet(name for node in nodes for name in node.get_read_names())
        vectors = [V.graph.try_get_buffer(name) for name in names]
        return [
            (kernel.args.input(buffer.get_name()), buffer.get_dtype().itemsize)
            for buffer in vectors
            if isinstance(buffer, (ir.Buffer, ir.TensorBox)) and _is_vector(buffer, self.n)
        ]


_TILE_ROWS = 6  # of share.h


class TileTemplate(EpilogueTemplate):
    """Renders one packed matmul."""

    text = _TEMPLATE

    def __init__(self, dot: Dot, inputs: Mapping[str, ir.IRNode], layout: ir.Layout, n: int, k: int) -> None:
        super().__init__(dot.name, inputs, layout, n)
        self.dot, self.k, self.source = dot, k, dot.source

    def plans(self) -> PlanTable:
        """What the native code does for each number of rows."""
        return table(self.dot.kind)

    def native(self) -> str:
        """The tiles, and their plans; only those for so few rows as there are at most."""
        m = self.input_nodes[0].get_size()[0]
        few = f"#define FXQ_ROWS_AT_MOST {m}\n" if is_number(m) and 0 < m < _TILE_ROWS else ""
        plans = f"static constexpr FxqPlan FXQ_PLANS[] = {self.plans().rendered()};"
        return f"{few}{PLAN}\n{plans}\n{self.source}"

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The matmul's dot and depth."""
        return {"dot": self.dot, "k": self.k}


def in_own_namespace(code: str) -> tuple[str, str]:
    """``(source, namespace)`` of native ``code`` that may stand in one file with itself and with other native code.

    Inductor's C++ wrapper puts all kernels of a graph into one file, and each brings its native code.
    """
    namespace = f"fxq_{hashlib.sha256(code.encode()).hexdigest()[:16]}"
    include, define = re.compile(r"^#include .*\n", re.MULTILINE), re.compile(r"^#define (\w+)", re.MULTILINE)
    guard = namespace.upper()
    lines = [
        *(line.strip() for line in dict.fromkeys(include.findall(code))),
        f"#ifndef {guard}",
        f"#define {guard}",
        f"namespace {namespace} {{",
        include.sub("", code),
        f"}} // namespace {namespace}",
        *(f"#undef {name}" for name in dict.fromkeys(define.findall(code))),
        "#endif",
    ]
    return "\n".join(lines), namespace


def _is_vector(x: ir.Buffer | ir.TensorBox, n: int) -> bool:
    """Whether ``x`` is ``n`` neighbours in memory."""
    sizes = x.get_size()
    return sizes[-1:] == [n] and all(size == 1 for size in sizes[:-1]) and x.get_stride()[-1] == 1


class _TileReads(WrapperHandler):
    """Simplifies the indices of reads by what a tile knows: its rows lie below ``m`` and its columns below ``n``.

    Inductor flattens the views of a 3-D model into ``row % m`` and ``column % n``. Left in, the first costs a division
    per row, a quarter of a small-k matmul, and the second keeps the epilogue from being vectorized.
    """

    def __init__(self, inner, bounds: Mapping[sympy.Symbol, sympy.Expr]) -> None:
        super().__init__(inner)
        self.bounds = bounds

    def load(self, name: str, index: sympy.Expr):
        """Read ``name`` at the simplified ``index``."""
        # The quotient and remainder of a flattened dim are joined first; only their sum is bounded by the tile.
        joined = V.graph.sizevars.simplify_with_ranges(index, {})
        simplified: Any = joined.replace(self._is_in_bounds, self._simplified)
        return self._inner.load(name, simplified)

    def _is_in_bounds(self, e: Any) -> bool:
        if not isinstance(e, (ModularIndexing, FloorDiv)) or (isinstance(e, ModularIndexing) and e.args[1] != 1):
            return False
        # base is an offset of the tile plus the position within it
        base: Any = e.args[0]
        bound = e.args[-1]
        return any(
            base.has(offset) and (base - offset).is_Symbol and bound == self.bounds[offset] for offset in self.bounds
        )

    @staticmethod
    def _simplified(e: Any) -> Any:
        return e.args[0] if isinstance(e, ModularIndexing) else sympy.S.Zero


def _reading_in_tile(node: ir.Buffer, m: sympy.Expr, n: int) -> ir.Buffer:
    """The epilogue node ``node`` with its reads simplified for a tile that starts at ``m_start``, ``n_start``."""
    loops = node.data if isinstance(node, ir.ComputedBuffer) else None
    if not isinstance(loops, ir.Pointwise):
        return node
    bounds = {sympy_index_symbol("m_start"): m, sympy_index_symbol("n_start"): sympy.Integer(n)}

    def inner_fn(index):
        with V.set_ops_handler(_TileReads(V.get_ops_handler(), bounds)):
            return loops.inner_fn(index)

    data = dataclasses.replace(loops, inner_fn=inner_fn)
    return ir.ComputedBuffer(name=node.get_name(), layout=node.get_layout(), data=data)


def _threads_are_dynamic(num_threads: int) -> bool:
    """Whether OpenMP picks the number of threads at run time, as in Inductor's own GEMM template."""
    return config.cpp.dynamic_threads or (config.cpp.threads < 1 and num_threads == os.cpu_count())


def _copy(source: ir.Buffer, target: ir.Buffer) -> ir.ComputedBuffer:
    load = source.make_loader()
    data = ir.Pointwise(
        device=target.get_device_or_error(),
        dtype=target.get_dtype(),
        inner_fn=lambda index: ops.to_dtype(load(index), target.get_dtype()),
        ranges=target.get_size(),
    )
    return ir.ComputedBuffer(name=target.get_name(), layout=target.layout, data=data)


def with_contiguous_rows(x: ir.TensorBox) -> ir.IRNode:
    """``x`` in memory; copied only where the elements of a row are not adjacent."""
    rows = ir.ExternKernel.realize_input(x)
    # A flexible layout is not decided yet, so its strides say nothing.
    fixed = isinstance(rows.get_layout(), ir.FixedLayout)
    if fixed and V.graph.sizevars.statically_known_equals(rows.get_stride()[-1], 1):
        return rows
    return ir.ExternKernel.require_contiguous(rows)


def in_memory(x: ir.TensorBox, dtype: torch.dtype | None = None) -> ir.IRNode:
    """``x`` in memory with strides that are known, in ``dtype`` where one is given; copied only where it must."""
    x = x if dtype is None else to_dtype(x, dtype)
    realized = ir.ExternKernel.realize_input(x)
    is_fixed = isinstance(realized.get_layout(), ir.FixedLayout)
    return realized if is_fixed else ir.ExternKernel.require_contiguous(realized)


def contiguous(x: ir.TensorBox) -> ir.IRNode:
    """``x`` in memory, contiguous."""
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))


def tile_matmul(dot: Dot, a: ir.TensorBox, b: ir.TensorBox, n: int) -> ir.TensorBox:
    """``[m, n]`` accumulator of ``a [m, k]`` and ``b``, packed or ``[k, n]`` as ``dot`` has it."""
    rows = with_contiguous_rows(a)
    panels = contiguous(b if dot.packed else lowerings[aten.permute.default](b, [1, 0]))
    m, k = rows.get_size()
    layout = ir.FixedLayout(rows.get_device_or_error(), dot.acc_dtype, [m, n])
    return TileTemplate(dot, {"A": rows, "B": panels}, layout, int(n), int(k)).generate().output_node()
