"""Sizes that are symbolic: those read off values need no guard, those of weights get one, rows stay free."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fx_quant.config import Options
from fx_quant.passes.emit import Emitter
from fx_quant.passes.pipeline import rewrite_graph
from fx_quant.report import Report
from fx_quant.target import named_target
from tests.graphs import calls, capture, run, trace

K, N = 64, 32
X86 = named_target("x86_vnni")


def weight(n: int = N, k: int = K, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    return codes, torch.rand(n, generator=generator) * 0.1


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-5)
    return torch.round(x / scale).clamp(-128, 127).to(torch.int8), scale


def per_token(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    codes, scale = quantized(x)
    y = torch._int_mm(codes.reshape(-1, K), w.t()).float() * scale.reshape(-1, 1) * s
    return y.reshape(*x.shape[:-1], N)


def given_scale(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    codes = torch.round(x / 0.02).clamp(-128, 127).to(torch.int8)
    return (torch._int_mm(codes.reshape(-1, K), w.t()).float() * s).reshape(*x.shape[:-1], N)


def asymmetric(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    low = x.amin(-1, keepdim=True)
    scale = (x.amax(-1, keepdim=True) - low) / 255
    point = torch.round(-low / scale).to(torch.int32)
    codes = (torch.round(x / scale) + point).clamp(0, 255).to(torch.uint8)
    return ((codes.float() - point) * scale) @ (w.float() * s[:, None]).t()


def weight_only(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return x @ (w.to(x.dtype) * s[:, None]).t()


def by_groups(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    groups = w.view(N, K // 32, 32).to(x.dtype) * s.view(N, 1, 1)
    return nn.functional.linear(x, groups.view(N, K)) + s


def shifted_weight(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    codes, scale = quantized(x)
    return (codes.float() * scale) @ ((w.float() - 3) * s[:, None]).t()


LINEARS = [per_token, given_scale, asymmetric, weight_only, by_groups, shifted_weight]


class Linear(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        for name, buffer in zip("ws", weight(), strict=True):
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.s)


def symbolic(x: Tensor, *dims: int) -> Tensor:
    for dim in dims:
        mark_unbacked(x, dim)
    return x


@pytest.mark.parametrize("function", LINEARS)
@pytest.mark.parametrize(
    ("shape", "dims"), [((24, K), [0]), ((4, 24, K), [0]), ((4, 24, K), [0, 1]), ((2, 3, 24, K), [0, 2])]
)
def test_rows_that_are_read_off_values_are_rewritten_without_a_guard(function, shape, dims):
    x = symbolic(sample(*shape), *dims)
    (captured,) = capture(Linear(function).eval(), x)
    assert captured.state.misses == []
    assert len(captured.state.rows) + len(captured.state.recognised) == 1
    for new, old in zip(
        run(captured.state.graph, *captured.inputs)[0], run(captured.source, *captured.inputs)[0], strict=True
    ):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_any_number_of_rows_runs_without_another_compile(rows):
    model = Linear(per_token).eval()
    counter = CompileCounterWithBackend("fx_quant")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(symbolic(sample(4, 24, K), 0))
        x = symbolic(sample(rows, 24, K), 0)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-3)
    assert counter.frame_count == 1


def test_a_size_beside_one_that_may_be_zero_is_named():
    """``-1`` is ambiguous where the other sizes may multiply to zero."""
    x = symbolic(sample(4, 24, K), 0, 1)
    (captured,) = capture(Linear(weight_only).eval(), x)
    views = [node.args[1] for node in calls(captured.state.graph, torch.ops.aten.reshape.default)]
    assert not any(-1 in sizes and sum(not isinstance(size, int) for size in sizes) for sizes in views)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0, 3)])
def test_a_size_of_zero_is_written_down(sizes):
    assert Emitter(trace(lambda x: x + 1, sample(2, 3))).size_args(sizes, None, like=None) == list(sizes)


# --- weights ----------------------------------------------------------------------------------------------------


def linear(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    codes, scale = quantized(x)
    return torch._int_mm(codes, w.t()).float() * scale * s


class Plain(nn.Module):
    """Its weight is no buffer, so that Dynamo takes it for an input."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.w, self.s = weight(n, k)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.w, self.s)


class Watched:
    """A backend that rewrites, reports, and runs op by op."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def __call__(self, gm, inputs):
        from torch._dynamo.backends.common import aot_autograd

        from fx_quant.compat import decompositions_without_matmul, static_input_indices

        def compiler(gm, _):
            static = static_input_indices(gm.graph)
            self.reports.append(rewrite_graph(gm.graph, X86, Options(), static))
            gm.recompile()
            return gm

        return aot_autograd(fw_compiler=compiler, decompositions=decompositions_without_matmul())(gm, inputs)


def check(compiled, function, n, k, m):
    x, (w, s) = sample(m, k), weight(n, k, seed=n + k)
    torch.testing.assert_close(compiled(x, w, s), function(x, w, s), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dynamic", [True, None])
def test_weights_of_two_sizes_in_turn_are_rewritten_and_right(dynamic):
    watched = Watched()
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend=watched, dynamic=dynamic)
    with torch.no_grad():
        for n, k, m in [(64, 32, 24), (48, 32, 24), (64, 32, 20), (48, 64, 24), (64, 32, 30), (48, 32, 33)]:
            check(compiled, linear, n, k, m)
    assert all(not report.misses and len(report.sites) == 1 for report in watched.reports)
    if dynamic:
        assert [(r.sites[0].n, r.sites[0].k) for r in watched.reports] == [(64, 32), (48, 32), (48, 64)]
        assert {r.sites[0].m for r in watched.reports} == {"2.."}


def test_a_weight_that_is_a_plain_attribute_is_rewritten_and_may_change_its_size():
    watched, model = Watched(), Plain(64, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=watched, dynamic=True)
    with torch.no_grad():
        for n, k in [(64, 32), (48, 64), (64, 32)]:
            model.w, model.s = weight(n, k)
            for m in (24, 25):
                torch.testing.assert_close(compiled(sample(m, k)), model(sample(m, k)), rtol=1e-4, atol=1e-3)
    assert [len(report.sites) for report in watched.reports] == [1, 1]


def test_a_cached_artefact_is_not_taken_for_a_weight_of_another_size():
    for _ in range(2):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("fx_quant")
        compiled = torch.compile(linear, backend=counter, dynamic=True)
        with torch.no_grad():
            for n, m in [(64, 24), (48, 24), (64, 30)]:
                check(compiled, linear, n, 32, m)
        assert counter.frame_count == 2


def test_a_square_weight_beside_as_many_rows_frees_the_rows_again():
    watched = Watched()
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend=watched, dynamic=True)
    with torch.no_grad():
        for m in (64, 65, 66, 67):
            check(compiled, linear, 64, 64, m)
    assert len(watched.reports) == 2
    assert all(len(report.sites) == 1 for report in watched.reports)


def _marked(mark) -> Report:
    watched = Watched()
    torch._dynamo.reset()
    x, (w, s) = sample(24, 32), weight(64, 32)
    for t in (w, s):
        mark(t, 0)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(linear, backend=watched)(x, w, s), linear(x, w, s), rtol=1e-4, atol=1e-3
        )
    (report,) = watched.reports
    return report


def test_a_weight_s_size_that_was_marked_as_dynamic_is_a_miss_and_no_error():
    (miss,) = _marked(torch._dynamo.mark_dynamic).misses
    assert miss.reason.endswith("was marked as dynamic")
    assert "n and k must be static" in miss.reason


def test_a_weight_s_size_that_may_be_dynamic_is_made_static():
    assert len(_marked(torch._dynamo.maybe_mark_dynamic).sites) == 1


def test_a_weight_s_size_that_is_read_off_values_is_a_miss_that_says_so():
    (miss,) = _marked(mark_unbacked).misses
    assert "is read off values" in miss.reason


def test_nothing_is_guarded_where_nobody_checks():
    """A graph traced without Dynamo: another size would run what was made for this one."""
    graph = trace(lambda w, x, s: linear(x, w, s), *reversed_inputs(), dynamic=True)
    env = shape_env(graph)
    before = len(env.guards)
    report = rewrite_graph(graph, X86, Options(), frozenset({0, 2}))
    assert len(env.guards) == before
    (miss,) = report.misses
    assert "nothing would check a guard" in miss.reason


def reversed_inputs() -> tuple[Tensor, Tensor, Tensor]:
    w, s = weight(64, 32)
    return w, sample(24, 32), s[:1]


def shape_env(graph: Graph) -> ShapeEnv:
    return graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode.shape_env


def test_rows_of_codes_that_are_an_input_stay_free():
    """An activation that comes as codes is no weight."""
    watched = Watched()
    torch._dynamo.reset()

    def function(codes, w, s):
        return torch._int_mm(codes, w.t()).float() * s

    compiled = torch.compile(function, backend=watched, dynamic=True)
    with torch.no_grad():
        for m in (24, 25, 26):
            codes = weight(m, 32)[0]
            w, s = weight(64, 32)
            torch.testing.assert_close(compiled(codes, w, s), function(codes, w, s), rtol=1e-4, atol=1e-3)
    (report,) = watched.reports
    assert [site.m for site in report.sites] == ["2.."]
