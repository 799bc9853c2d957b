"""Every torch-version quirk, each with the version that ends it. Private torch API that passes need is reached here."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _Namespace
from torch.utils._python_dispatch import TorchDispatchMode

# Of a nightly too: 2.13.0.dev1 has what 2.13 has.
_TORCH = Version(torch.__version__).release


def mutates(node: Node) -> bool:
    """Whether ``node`` writes to memory that others may see, or changes a state of the process."""
    from torch._inductor.pattern_matcher import is_mutation_op

    return is_mutation_op(node)


def replace_contents(graph: Graph, replacement: Graph) -> dict[Node, Node]:
    """Make ``graph``, in place, a copy of ``replacement``; returns the new node of each node of ``replacement``.

    Later passes hold ``graph`` itself, so it cannot be swapped for another object.
    """
    for node in reversed(list(graph.nodes)):
        graph.erase_node(node)
    graph._graph_namespace = _Namespace()
    copied: dict[Node, Node] = {}
    for node in replacement.nodes:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    return copied


def copy_graph(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """A copy of ``graph`` with the same names, and the new node of each node."""
    copy = Graph(graph.owning_module)
    return copy, replace_contents(copy, graph)


def sym_max(a: int | torch.SymInt, b: int | torch.SymInt) -> int | torch.SymInt:
    """The larger of two sizes, without a guard on which it is.

    Before torch 2.13 Dynamo breaks the graph at ``torch.sym_max`` of two ints; ``max`` it traces as ``sym_max``.
    """
    return max(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_max(a, b)  # type: ignore[return-value]


def is_guarded(size: torch.SymInt) -> bool:
    """Whether Dynamo checks before each call what is found out of ``size`` while its graph is compiled."""
    context = torch._guards.TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    env = size.node.shape_env
    return mode is not None and mode.shape_env is env and not env.frozen


def is_marked_dynamic(size: torch.SymInt) -> bool:
    """Whether the user marked ``size`` as dynamic, so that making it static is an error."""
    return not _marked(size.node.shape_env).isdisjoint(size.node.expr.free_symbols)


def marked_dynamic() -> tuple[str, ...]:
    """The symbols of the sizes that the user marked as dynamic in the graph that is being compiled."""
    context = torch._guards.TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    return () if mode is None or mode.shape_env is None else tuple(sorted(map(str, _marked(mode.shape_env))))


def _marked(env: Any) -> set[Any]:
    from torch.fx.experimental.symbolic_shapes import RelaxedUnspecConstraint, StrictMinMaxConstraint

    found: set[Any] = set()
    for tracked in env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for of, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            strict = isinstance(constraint, (RelaxedUnspecConstraint, StrictMinMaxConstraint))
            if strict and not constraint.warn_only and isinstance(of, torch.SymInt):
                found |= of.node.expr.free_symbols
    return found


def static_input_indices(graph: Graph, kept: frozenset[int] | None = None) -> frozenset[int] | None:
    """Positions of the inputs of ``graph`` that are parameters or buffers; None where that is not known.

    Empty for the subgraph of a higher-order op, whose operands are whatever each call of it gives.

    Args:
        kept: positions of parameters and buffers in Dynamo's graph, which a joint graph of forward and backward is
            told by: AOTAutograd has not said yet what it knows of it.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None or (context.fw_metadata is None and kept is None):
        return None
    if is_subgraph(graph):
        return frozenset()
    if context.fw_metadata is not None:
        return frozenset(context.fw_metadata.static_input_indices or ())
    placeholders = graph.find_nodes(op="placeholder")
    return frozenset(i for i, node in enumerate(placeholders) if _dynamo_position(node) in kept)  # type: ignore[operator]


def _dynamo_position(placeholder: Node) -> int | None:
    """Which input of Dynamo's graph a placeholder of AOTAutograd's is, or is a part of."""
    described = placeholder.meta.get("desc")
    while (base := getattr(described, "base", None)) is not None:
        described = base
    return getattr(described, "idx", None) if type(described).__name__ == "PlainAOTInput" else None


def kept_inputs(gm: GraphModule) -> frozenset[int]:
    """Positions of the inputs of Dynamo's ``gm`` that are parameters or buffers, but for matrices that are trained."""
    return frozenset(i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if _is_kept(node))


def _is_kept(placeholder: Node) -> bool:
    value = placeholder.meta.get("example_value")
    trained = isinstance(value, Tensor) and value.requires_grad and value.dim() > 1
    return is_static_input(placeholder) and not trained


def source_of(placeholder: Node) -> str | None:
    """Dynamo's name of what a placeholder of its graph is: ``L['self']._modules['proj']._parameters['weight']``."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    return name() if callable(name) else name  # a method until it became a property


def is_static_input(placeholder: Node) -> bool:
    """Whether Dynamo says of an input of its graph that it is a parameter or a buffer."""
    return bool(placeholder.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def as_dynamo_graph(piece: GraphModule, whole: GraphModule, inputs: Mapping[str, Node]) -> None:
    """Put on ``piece`` what AOTAutograd reads off ``whole``, the graph of Dynamo's that it is part of.

    Args:
        inputs: those of ``whole``, by name.
    """
    piece.meta.update(whole.meta)
    sources = getattr(whole, "_param_name_to_source", None)
    if sources is not None:
        piece._param_name_to_source = sources  # type: ignore[assignment]
    for node in piece.graph.find_nodes(op="placeholder"):
        node._dynamo_source = getattr(inputs.get(node.name), "_dynamo_source", None)
        # It is of the input's first graph, and not for that of another piece.
        node.meta.pop("grapharg", None)


def specialize_floats(graph: Graph) -> None:
    """Make constants of the Python floats that Dynamo made inputs of its ``graph``, each guarded by its value.

    Inductor's pass over such floats takes one that is not in the graph at hand, which here is a piece, for lost, and
    has Dynamo start again.
    """
    from torch._dynamo.symbolic_convert import TensorifyState
    from torch.fx.experimental.symbolic_shapes import guard_scalar
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    for node in graph.find_nodes(op="call_method", target="item"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymFloat) and node.args[0].op == "placeholder":
            env = value.node.shape_env
            values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # until torch 2.12
            for symbol in values:
                if symbol_is_type(symbol, SymT.FLOAT):
                    TensorifyState.specialize(symbol.name)
            node.replace_all_uses_with(guard_scalar(value))
            graph.erase_node(node)
    for node in list(graph.nodes):
        # What follows of such numbers alone is one too; Dynamo itself leaves it as symbolic where it specialized them.
        symbolic = isinstance(node.meta.get("example_value"), (torch.SymFloat, torch.SymInt, torch.SymBool))
        if symbolic and node.op == "call_function" and not node.all_input_nodes:
            node.replace_all_uses_with(node.target(*node.args, **node.kwargs))  # type: ignore[operator]
            graph.erase_node(node)


def is_subgraph(graph: Graph) -> bool:
    """Whether ``graph`` belongs to a higher-order op of the graph that AOTAutograd compiles, not the latter itself.

    Inductor runs the passes on both, in one tracing context. Only the inputs of the whole graph are described in it.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fw_metadata is None:
        return False
    inputs = graph.find_nodes(op="placeholder")
    return bool(inputs) and not any("desc" in node.meta for node in inputs)


@contextlib.contextmanager
def second_compile() -> Iterator[None]:
    """Compile another graph within an AOT compile, without reporting its output strides as those of the first."""
    context = torch._guards.TracingContext.try_get()
    strides = None if context is None else context.output_strides
    if context is not None:
        context.output_strides = None
    try:
        yield
    finally:
        if context is not None:
            context.output_strides = strides


@contextlib.contextmanager
def carried_by_artefacts(text: Callable[[], str], found: list[str]) -> Iterator[None]:
    """Within, each compiled graph that this thread makes carries ``text()``, in every cache and copy of it.

    What graphs carry that are made, or loaded from a cache instead, is put into ``found``. Neither Inductor's nor
    AOTAutograd's cache has a place for it, so for the time being their class is given one.
    """
    from torch._dynamo.convert_frame import compile_lock
    from torch._inductor.output_code import CompiledFxGraph

    # Dynamo holds this lock already where it calls a backend; who calls one otherwise waits for it.
    with compile_lock:
        made, loaded, thread = CompiledFxGraph.__init__, CompiledFxGraph.post_compile, threading.get_ident()

        @functools.wraps(made)
        def make(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            if threading.get_ident() == thread:
                self._fx_quant = text()

        @functools.wraps(loaded)
        def load(self: Any, *args: Any, **kwargs: Any) -> None:
            if threading.get_ident() == thread and (carried := getattr(self, "_fx_quant", "")):
                found.append(carried)
            loaded(self, *args, **kwargs)

        CompiledFxGraph.__init__, CompiledFxGraph.post_compile = make, load
        try:
            yield
        finally:
            CompiledFxGraph.__init__, CompiledFxGraph.post_compile = made, loaded


_MATMULS = ("mm", "mv", "addmm", "bmm")


class _DecompositionsWithoutMatmul(dict):
    """Pickles by name: Inductor's FX-graph cache keys on the table, whose functions have no stable pickle."""

    def __reduce__(self):
        return decompositions_without_matmul, ()


def decompositions_without_matmul() -> dict:
    """Inductor's decompositions without those that turn a matmul into broadcast and sum (m = 1, k = 1, tiny sizes)."""
    from torch._inductor.decomposition import select_decomp_table

    table = _DecompositionsWithoutMatmul(select_decomp_table())
    for name in _MATMULS:
        table.pop(getattr(torch.ops.aten, name).default, None)
    return table


def restore_matmul_decompositions(graph: Graph) -> None:
    """Apply the decompositions that ``decompositions_without_matmul`` held back to the matmuls still in ``graph``.

    A matmul that we did not rewrite then compiles as it does without us.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    table = select_decomp_table()
    overloads = {getattr(torch.ops.aten, name).default for name in _MATMULS} & set(table)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in overloads:
            continue
        values = torch.fx.node.map_arg(node.args, lambda n: n.meta["val"])
        fake_mode = node.meta["val"].fake_mode
        with fake_mode, torch.no_grad():
            if table[node.target](*values, **node.kwargs) is NotImplemented:
                continue
            traced = make_fx(
                lambda *tensors, node=node: table[node.target](*tensors, **node.kwargs),
                decomposition_table=dict(table),
                tracing_mode="real",
            )(*values)
        _inline(graph, node, traced.graph)


def _inline(graph: Graph, node: Node, body: Graph) -> None:
    """Replace ``node`` by ``body``, whose placeholders are ``node``'s arguments."""
    copied: dict[Node, Any] = dict(zip(body.find_nodes(op="placeholder"), node.args, strict=True))
    result: Any = None
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                result = copied[inner.args[0]]
                continue
            copied[inner] = graph.node_copy(inner, lambda n: copied[n])
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def dump_graph(name: str, graph: Graph) -> None:
    """Show ``graph`` to whoever listens: ``TORCH_TRACE`` gets an artifact, depyf a file ``*.<name>.*.py``."""
    from torch._dynamo.utils import lazy_format_graph_code
    from torch._logging import trace_structured

    owner = graph.owning_module
    if owner is None:
        return

    @functools.cache
    def module() -> GraphModule:
        if owner.graph is not graph:
            return GraphModule(owner, graph)
        owner.recompile()
        return owner

    def text() -> str:
        return module().print_readable(print_output=False)

    trace_structured("artifact", metadata_fn=lambda: {"name": name.lower(), "encoding": "string"}, payload_fn=text)
    # depyf swaps the code of this function for one that writes the graph to its folder when called.
    if lazy_format_graph_code.__code__.co_name != "lazy_format_graph_code":
        lazy_format_graph_code(name, module())


def trace_json(name: str, text: Callable[[], str]) -> None:
    """Put the JSON ``text()`` into ``TORCH_TRACE``, where somebody listens; tlparse shows it beside the graph."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=text)


def compile_id() -> str:
    """The number of the graph that is compiled, ``0/0``, as PyTorch's own logs have it; ``-`` outside a compile."""
    from torch._guards import CompileContext

    return str(CompileContext.current_compile_id() or "-")


def templates_take_unbacked_sizes() -> bool:
    """Whether Inductor's C++ templates take sizes that are read off values; those of 2.11 ask what they may be."""
    return _TORCH >= (2, 13)  # 2.12 was not tried


def cuda_driver() -> int:
    """Version of the GPU's driver as CUDA numbers it (13000 is 13.0); 0 for a PyTorch without CUDA."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return 0 if version is None else version()


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would use, or None when it finds none."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def inductor_cache() -> str:
    """The folder that holds what Inductor compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def load_cpp(source: str) -> Any:
    """``source`` compiled as C++ for this machine, with OpenMP, as a ``ctypes`` library; kept in Inductor's cache."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)


def widened(narrow: Any, dtype: torch.dtype, device: str) -> Any:
    """``narrow``, of ``dtype``, in float32, within an Inductor loop; what narrowing rounded off stays off."""
    from torch._inductor.virtualized import ops

    if device == "cpu" and _TORCH < (2, 13):
        # Until torch 2.13 the C++ backend replaces this cast by the value that was narrowed, even one narrowed with
        # `use_compute_types=False` (pytorch#182882). It does not see through float64, in which every value is exact.
        narrow, dtype = ops.to_dtype(narrow, torch.float64, src_dtype=dtype), torch.float64
    return ops.to_dtype(narrow, torch.float32, src_dtype=dtype)


class _RowScalesOnCpu(TorchDispatchMode):
    supports_higher_order_operators = True  # they run as they are, and their graphs under the mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._scaled_mm.default and args[0].is_cpu:
            _, _, scale_a, scale_b, *_ = args
            if not scale_a.numel() == scale_b.numel() == 1:
                return _scaled_mm_by_rows(*args, **kwargs)
        return func(*args, **kwargs)


def _scaled_mm_by_rows(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    y = (a.float() @ b.float()) * scale_a * scale_b
    y = y if bias is None else y + bias
    return y.to(a.dtype if out_dtype is None else out_dtype)


def row_scales_on_cpu() -> contextlib.AbstractContextManager[object]:
    """Lets float8 matmuls with scales per row run op by op on a CPU, where torch 2.12 is the first that can."""
    return _RowScalesOnCpu() if _TORCH < (2, 12) else contextlib.nullcontext()


def not_compiled_alone(function: Callable[..., Any]) -> None:
    """``function`` runs as it is where Python calls it; where Dynamo traces a caller it traces it too."""
    # What torch._dynamo.eval_frame.skip_code calls, which would import all of Dynamo.
    dynamo = torch._C._dynamo.eval_frame
    alone = dynamo._FrameExecStrategy(dynamo._FrameAction.SKIP, dynamo._FrameAction.DEFAULT)
    dynamo.set_code_exec_strategy(function.__code__, alone)
