"""What explain and check leave behind: Dynamo, the model and its compiled code are as they were."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._dynamo.utils import counters

import fx_quant
from fx_quant.diagnose.capture import run_eagerly
from tests import models


def int8_linear():
    return models.POSITIVE["int8_int_mm"].build(torch.float32, True)


class Broken(torch.nn.Module):
    """Two layers with a graph break between them: Dynamo compiles frames of several code objects."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(int8_linear()) for _ in range(2)])
        self.narrow = torch.nn.Linear(models.N, models.K)

    def forward(self, x):
        for layer in self.layers:
            x = self.narrow(layer(x))
            torch._dynamo.graph_break()
        return x


class Counting:
    """A backend that counts the graphs that it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, gm, example_inputs):
        self.graphs += 1
        return gm.forward


def compiled_afterwards(model, x, **options):
    backend = Counting()
    torch.compile(model, backend=backend, **options)(x)
    return backend.graphs


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def few_recompiles():
    """Three graphs of a frame at most, so that few calls would use them up."""
    with torch._dynamo.config.patch(recompile_limit=3):
        yield


@pytest.mark.parametrize("build", [int8_linear, Broken])
def test_many_explains_leave_the_users_own_compile_as_it_was(build, few_recompiles):
    model, x = build(), models.inputs(torch.float32)
    expected = compiled_afterwards(model, x)
    torch._dynamo.reset()
    first = fx_quant.explain(model, x)
    assert first.sites
    for _ in range(4):
        assert fx_quant.explain(model, x) == first
    assert compiled_afterwards(model, x) == expected


@pytest.fixture
def op_by_op(monkeypatch):
    """``check`` runs its graphs op by op: what Dynamo does is the same, and no C++ is compiled."""
    monkeypatch.setattr("fx_quant.diagnose.check.compile_graph", run_eagerly)


def test_many_checks_leave_the_users_own_compile_as_it_was(op_by_op, few_recompiles):
    model, x = int8_linear(), models.inputs(torch.float32)
    for _ in range(5):
        assert len(fx_quant.check(model, x).sites) == 1
    assert compiled_afterwards(model, x, fullgraph=True) == 1


@pytest.mark.parametrize("build", [int8_linear, Broken])
def test_a_model_compiled_before_does_not_recompile(build, few_recompiles):
    model, backend = build(), Counting()
    x = models.inputs(torch.float32)
    run = torch.compile(model, backend=backend, dynamic=False)
    expected = run(x)
    before = backend.graphs
    for _ in range(5):
        assert fx_quant.explain(model, x).sites
    torch.testing.assert_close(run(x), expected)
    assert backend.graphs == before
    # Nor is anything of it used up: as many shapes as ever get code of their own.
    for rows in range(1, torch._dynamo.config.recompile_limit):
        run(models.inputs(torch.float32, 2, rows))
    assert backend.graphs == before * torch._dynamo.config.recompile_limit


def test_a_model_compiled_before_is_explained_in_a_process_that_froze_its_objects():
    model, x = int8_linear(), models.inputs(torch.float32)
    torch.compile(model, backend=Counting())(x)
    gc.freeze()
    assert len(fx_quant.explain(model, x).sites) == 1
    assert gc.get_freeze_count() > 0


def test_a_model_whose_recompile_limit_is_used_up_is_explained(few_recompiles):
    model, backend = int8_linear(), Counting()
    run = torch.compile(model, backend=backend, dynamic=False)
    for rows in range(1, torch._dynamo.config.recompile_limit + 3):
        run(models.inputs(torch.float32, 2, rows))
    assert backend.graphs == torch._dynamo.config.recompile_limit
    assert len(fx_quant.explain(model, models.inputs(torch.float32)).sites) == 1


def test_shapes_that_explain_saw_do_not_make_the_users_compile_dynamic():
    model, sizes = int8_linear(), []

    def backend(gm, example_inputs):
        sizes.append([value for value in example_inputs if not isinstance(value, torch.Tensor)])
        return gm.forward

    for rows in (3, 5, 7):
        (site,) = fx_quant.explain(model, models.inputs(torch.float32, 2, rows)).sites
        assert site.m == str(rows)
    torch.compile(model, backend=backend)(models.inputs(torch.float32, 2, 9))
    assert sizes == [[]]


def test_counters_and_random_numbers_are_as_before(op_by_op):
    model, x = int8_linear(), models.inputs(torch.float32)
    torch.compile(model, backend="eager")(x)
    before = {name: dict(counts) for name, counts in counters.items()}
    frames = torch._dynamo.convert_frame.FRAME_COUNTER
    state = torch.get_rng_state()
    noisy = torch.nn.Sequential(torch.nn.Dropout(0.5), model).train()
    fx_quant.explain(noisy, x)
    fx_quant.check(noisy, x)
    assert {name: dict(counts) for name, counts in counters.items()} == before
    assert frames == torch._dynamo.convert_frame.FRAME_COUNTER
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_left_behind_when_explain_raises(few_recompiles):
    model, x = int8_linear(), models.inputs(torch.float32)

    class Fails(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = model

        def forward(self, x):
            y = self.linear(x)
            torch._dynamo.graph_break()
            raise KeyError(y.shape)

    for _ in range(5):
        with pytest.raises(KeyError):
            fx_quant.explain(Fails(), x)
    assert compiled_afterwards(model, x, fullgraph=True) == 1


def test_nn_module_compile_is_seen_through_and_kept(op_by_op):
    model, x, backend = int8_linear(), models.inputs(torch.float32), Counting()
    model.compile(backend=backend)
    outer = torch.nn.Sequential(model)
    assert len(fx_quant.explain(model, x).sites) == len(fx_quant.explain(outer, x).sites) == 1
    assert len(fx_quant.check(model, x).sites) == 1
    assert backend.graphs == 0
    model(x)
    assert backend.graphs == 1


def test_compiled_parts_of_a_model_are_seen_through():
    x, backend = models.inputs(torch.float32), Counting()
    part = int8_linear()
    model = torch.nn.Sequential(torch.compile(part, backend=backend))
    assert [site.module for site in fx_quant.explain(model, x).sites] == ["0._orig_mod"]
    part.forward = torch.compile(part.forward, backend=backend)
    assert len(fx_quant.explain(torch.nn.Sequential(part), x).sites) == 1
    assert backend.graphs == 0
    part(x)
    assert backend.graphs == 1


# --- nothing captured is never "unchanged" ------------------------------------------------------------------


def explained(model, *args):
    report = fx_quant.explain(model, *args)
    assert report.graphs == 0
    text = " ".join(str(report).split())
    assert "unchanged" not in text
    return text


def test_dynamo_switched_off_is_said():
    with torch._dynamo.config.patch(disable=True):
        text = explained(int8_linear(), models.inputs(torch.float32))
    assert "TORCH_COMPILE_DISABLE" in text


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_stance_is_said(stance):
    with torch.compiler.set_stance(stance):
        text = explained(int8_linear(), models.inputs(torch.float32))
    assert f"torch.compiler.set_stance('{stance}')" in text


def test_a_disabled_forward_is_said():
    class Disabled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = int8_linear()

        @torch.compiler.disable
        def forward(self, x):
            return self.linear(x)

    text = explained(Disabled(), models.inputs(torch.float32))
    assert "torch.compiler.disable" in text
    assert "Disabled.forward" in text


def test_a_dispatch_mode_is_said():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        text = explained(int8_linear(), models.inputs(torch.float32))
    assert "Mode" in text


def test_check_says_that_nothing_was_compiled():
    with torch.compiler.set_stance("force_eager"):
        text = " ".join(str(fx_quant.check(int8_linear(), models.inputs(torch.float32))).split())
    assert "nothing was compiled, so nothing was compared: torch.compiler.set_stance('force_eager')" in text


def broken_pass(*_):
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("name", ["explain", "check"])
def test_a_pass_that_fails_is_a_miss_that_names_the_exception(name, monkeypatch, op_by_op):
    monkeypatch.setattr(f"fx_quant.diagnose.{name}.run_passes", broken_pass)
    model, x = int8_linear(), models.inputs(torch.float32)
    with pytest.warns(UserWarning, match="a pass failed with RuntimeError"):
        report = fx_quant.explain(model, x) if name == "explain" else fx_quant.check(model, x)
    assert not report.sites
    assert [miss.reason for miss in report.misses] == ["a pass failed with RuntimeError('broken on purpose')"]


def test_a_model_without_tensor_ops_says_so():
    assert "no op on a tensor" in explained(lambda x: x, torch.ones(2))
