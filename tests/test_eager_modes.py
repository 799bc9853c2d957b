"""``fx_quant.mode``: eager layers pad as the call's mode says, wherever they were built; compiled ones as their compile."""

from __future__ import annotations

import asyncio
import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import fx_quant
from fx_quant.config import PaddingPolicy
from fx_quant.errors import FxQuantError, NoKernelError, UnknownNameError
from fx_quant.kernels.context import EAGER, GRAPH, CompileContext, Mode, of_call
from fx_quant.kernels.eager import eager_selection
from fx_quant.linear_kernels import init_fp8_linear_kernel
from fx_quant.linear_kernels.fp8_linear import Fp8LinearOp
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import Scheme
from fx_quant.target import named_target
from tests.graphs import capture

INT8 = Scheme.parse("int8 per_token (dynamic) x int8 per_channel")
FP8 = Problem(
    Scheme.parse("float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel"),
    SizeRange(0, None),
    32,
    64,
    torch.bfloat16,
    None,
    constant_weight=True,
)


def layer() -> fx_quant.QuantizedLinear:
    return fx_quant.QuantizedLinear.from_float(nn.Linear(64, 30), INT8)


X = torch.randn(3, 64)


def rows(context: CompileContext | None = None) -> int:
    """What an eager call pads fewer rows to, of ``torch._scaled_mm`` on an H100."""
    return eager_selection(FP8, named_target("sm90"), "pytorch_scaled_mm_rowwise", context).padding.rows


def test_a_call_is_eager_and_auto_where_nothing_says_otherwise():
    assert of_call(None) == EAGER
    assert layer().selection(X).context == EAGER
    assert rows() == 17


@pytest.mark.parametrize(
    ("mode", "policy", "planned"),
    [
        ("eager", "auto", 17),
        ("graph", "auto", 0),
        ("piecewise", "auto", 0),
        ("eager", "vllm", 17),
        ("graph", "vllm", 17),
        ("piecewise", "vllm", 0),
        ("piecewise", "always", 17),
        ("eager", "never", 0),
    ],
)
def test_a_call_in_a_block_pads_as_the_block_says(mode, policy, planned):
    built_outside = layer()
    with fx_quant.mode(mode, padding=policy) as context:
        assert context == CompileContext(Mode(mode), PaddingPolicy(policy))
        assert rows() == planned
        assert built_outside.selection(X).context == layer().selection(X).context == context
    assert rows() == 17


def test_a_block_changes_what_it_names_and_ends_with_itself():
    with fx_quant.mode("piecewise", deterministic=True):
        with fx_quant.mode(padding="vllm"), fx_quant.mode(deterministic=False) as inner:
            assert of_call(None) == inner == CompileContext("piecewise", "vllm")
        assert of_call(None) == CompileContext("piecewise", deterministic=True)
        with pytest.raises(ZeroDivisionError), fx_quant.mode("graph"):
            raise ZeroDivisionError
        assert of_call(None).mode is Mode.PIECEWISE
    assert of_call(None) == EAGER


def test_a_block_may_be_entered_within_itself():
    block = fx_quant.mode("piecewise")
    with block, fx_quant.mode("graph"), block:
        assert of_call(None).mode is Mode.PIECEWISE
    assert of_call(None) == EAGER


@pytest.mark.parametrize("wrong", [{"mode": "piecewize"}, {"padding": "alway"}])
def test_an_unknown_name_is_refused_before_the_block(wrong):
    with pytest.raises(UnknownNameError, match="Did you mean"):
        fx_quant.mode(**wrong)


def test_a_block_that_ends_within_another_ends_alone():
    def generator():
        with fx_quant.mode("piecewise"):
            yield

    suspended = generator()
    next(suspended)
    with fx_quant.mode("graph"):
        suspended.close()
        assert of_call(None) == replace(EAGER, mode=Mode.GRAPH)
    assert of_call(None) == EAGER
    fx_quant.mode("graph").__exit__(None, None, None)  # never entered
    assert of_call(None) == EAGER


@pytest.mark.parametrize("wrong", ["no", 1, 0])
def test_deterministic_is_a_bool(wrong):
    with pytest.raises(FxQuantError, match="'deterministic' must be True or False, got"):
        fx_quant.mode(deterministic=wrong)


def test_other_threads_and_tasks_do_not_see_a_block():
    block, seen = fx_quant.mode("piecewise"), {}
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait(10)
        seen["other"] = of_call(None)
        with block:
            seen["in its own"] = of_call(None).mode
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with block:
        inside.set()
        assert done.wait(10)
        assert of_call(None).mode is Mode.PIECEWISE
    thread.join()
    assert seen == {"other": EAGER, "in its own": Mode.PIECEWISE}


def test_each_task_has_its_own_block():
    async def task(name):
        with fx_quant.mode(name):
            await asyncio.sleep(0)
            return of_call(None).mode

    async def both():
        return await asyncio.gather(task("piecewise"), task("graph"))

    assert asyncio.run(both()) == [Mode.PIECEWISE, Mode.GRAPH]


# --- layers with a context of their own -------------------------------------------------------------------------------


def test_a_layer_keeps_its_policy_and_takes_the_mode_of_the_call():
    own = layer()
    before = own(X)
    own.context = CompileContext(Mode.GRAPH, "never")
    assert own.selection(X).context == replace(EAGER, padding=PaddingPolicy.NEVER)
    with fx_quant.mode("piecewise", padding="always", deterministic=True):
        assert own.selection(X).context == CompileContext(Mode.PIECEWISE, "never")
        assert torch.equal(own(X), before)
    assert rows(CompileContext(padding="always")) == 17
    assert copy.deepcopy(own).context == own.context


def test_vllms_layers_pad_as_the_block_says(monkeypatch):
    monkeypatch.setattr(fx_quant.linear_kernels.fp8_linear, "target_of", lambda device: named_target("sm90"))
    codes, weight = torch.zeros(5, 48).to(torch.float8_e4m3fn), torch.zeros(48, 32).to(torch.float8_e4m3fn)
    given = (codes, torch.ones(5, 1), weight, torch.ones(32), None, torch.bfloat16)

    def planned(pad_output=None):
        return Fp8LinearOp(pad_output=pad_output).selection(*given).padding.rows

    scheme = FP8.scheme
    kernel = init_fp8_linear_kernel(
        scheme.activation, scheme.weight, torch.bfloat16, weight_shape=(32, 64), compute_capability="sm90"
    )
    with fx_quant.mode("piecewise", padding="vllm"):
        # What the seed's layer was told when it was built.
        assert (planned(), planned(pad_output=True)) == (0, 17)
        assert kernel.get_output_padding() is None
    assert (planned(), planned(pad_output=False)) == (17, 0)
    assert kernel.get_output_padding() == 17


def test_a_block_that_no_kernel_can_obey_says_why():
    with fx_quant.mode(padding="never"), pytest.raises(NoKernelError, match="padding='never' pads none"):
        eager_selection(replace(FP8, n=30), named_target("sm90"), "pytorch_scaled_mm_rowwise")


# --- compiled ---------------------------------------------------------------------------------------------------------


def test_a_compile_has_its_own_context_and_no_block_compiles_it_anew():
    model, graphs = layer(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        before = compiled(X)
        for name in Mode:
            with fx_quant.mode(name, padding="always", deterministic=True):
                assert torch.equal(compiled(X), before)
    assert len(graphs) == 1


@pytest.mark.parametrize("policy", ["never", "vllm"])
def test_a_graph_captured_in_a_block_is_planned_by_its_options(policy):
    with fx_quant.mode("eager", padding="always", deterministic=True):
        (captured,) = capture(layer(), X, options={"padding": policy})
    assert captured.state.context == replace(GRAPH, padding=PaddingPolicy(policy))
    assert [row.selection.context for row in captured.state.rows.values()] == [captured.state.context]


def test_what_a_graph_break_leaves_to_python_is_still_in_its_block():
    model, contexts = layer(), []

    @torch._dynamo.disable
    def note():
        contexts.append(of_call(None))

    def call(x):
        with fx_quant.mode("piecewise", padding="never", deterministic=True):
            x = model(x)
            note()
            x = x + 1
        note()
        return x

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(X), call(X))
    assert contexts == [CompileContext("piecewise", "never", deterministic=True), EAGER] * 2


def test_a_block_inside_of_compiled_code_is_traced_away():
    model, graphs = layer(), []

    def call(x):
        with fx_quant.mode("piecewise", padding="never"):
            return model(x) + 1

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(X), call(X))
        with fx_quant.mode("graph"):
            compiled(X)
    assert len(graphs) == 1
    assert of_call(None) == EAGER
