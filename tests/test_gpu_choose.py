"""Which configuration a scaled matmul gets, what a tuner keeps of it, and how the command line says both."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from fx_quant.__main__ import main
from fx_quant.diagnose.gpu_linears import default_scheme, dispatch, linears
from fx_quant.errors import FxQuantError
from fx_quant.kernels.triton.architectures import architecture
from fx_quant.kernels.triton.choose import Case, candidates, case_of, configurations, ranked, rows_up_to
from fx_quant.kernels.triton.launch import Configuration
from fx_quant.kernels.triton.measured import CONFIGURATIONS, Gpu, measured
from fx_quant.kernels.triton.operands import scaled_operands
from fx_quant.kernels.triton.scaled_mm import FORMS, plan_scaled_mm
from fx_quant.kernels.triton.tuner import (
    Asked,
    GpuReport,
    decide,
    is_right,
    random_operands,
    tune,
    weights_in_turn,
)
from fx_quant.target import named_target
from fx_quant.tuning.search import Budget, decide_all
from tests.triton_interpreter import needs_triton

E4M3, BF16, I8 = torch.float8_e4m3fn, torch.bfloat16, torch.int8
H100 = architecture("sm90")
meta = partial(torch.empty, device="meta")


def case(m: int, n: int = 4096, k: int = 4096, recipe: str = "float8") -> Case:
    return Case(recipe, E4M3, BF16, rows_up_to(m), n, k)


def operands(m: int, n: int, k: int, dtype: torch.dtype = I8):
    return scaled_operands(meta(m, k, dtype=dtype), meta(n, k, dtype=dtype).t(), None, None, None, n, BF16)


# --- the order ----------------------------------------------------------------------------------------------------


def test_the_published_winner_of_large_matmuls_is_first():
    """128 x 256 tiles for 4096 x 4096 x 4096 by row-wise scales (github.com/meta-pytorch/tritonbench/issues/1149).

    That was float8 whose sums stay in the tensor cores, which cost what those of int8 do.
    """
    for sizes in ((4096, 4096, 4096), (8192, 8192, 8192)):
        best = ranked(case(*sizes, recipe="int8"), H100)[0].configuration
        assert {best.block_m, best.block_n} == {128, 256}
        assert best.warp_specialized or best.flattened


@pytest.mark.parametrize("recipe", ["float8", "float8_block"])
@pytest.mark.parametrize("m", [1, 8, 16, 33, 64])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (57344, 8192)])
def test_few_rows_are_swapped(recipe, m, n, k):
    assert ranked(case(m, n, k, recipe), H100)[0].configuration.form == "swapped"


def test_a_sum_is_split_where_tiles_are_too_few():
    assert ranked(case(16, 4096, 4096), H100)[0].configuration.split_k > 1
    assert ranked(case(16, 57344, 8192), H100)[0].configuration.split_k == 1


def test_the_portable_form_is_last_and_always_there():
    for on in ("sm80", "sm90", "gfx942"):
        for m in (1, 300):
            assert ranked(case(m, recipe="int8"), architecture(on))[-1].configuration.form == "tile"


def test_the_portable_form_is_tuned_where_tiles_cannot_be_loaded_by_descriptors():
    assert {each.form for each in candidates(case(300, recipe="int8"), architecture("sm80"))} == {"tile"}
    assert {each.form for each in candidates(case(300), architecture("sm89"))} == {"tile"}
    assert {each.form for each in candidates(case(300), H100)} == {"persistent"}


def test_no_tile_has_twice_the_rows_that_there_are():
    assert max(each.block_m for each in candidates(case(100), H100)) == 128
    assert max(each.block_m for each in candidates(case(33), H100)) == 64


@pytest.mark.parametrize(("m", "rows"), [(0, 16), (1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (10**6, 8192)])
def test_rows_are_chosen_for_by_powers_of_two(m, rows):
    assert rows_up_to(m) == rows


@needs_triton
@pytest.mark.parametrize(
    ("m", "k", "form"), [(4096, 4096, "persistent"), (4096, 4095, "tile"), (16, 4096, "swapped"), (4096, 0, "tile")]
)
def test_operands_that_a_form_cannot_take_go_to_the_next(m, k, form):
    assert plan_scaled_mm(operands(m, 512, k), H100).configuration.form == form


@needs_triton
def test_what_was_measured_comes_first(monkeypatch):
    asked = operands(4096, 512, 4096)
    found = Configuration("persistent", 64, 128, 128, 4, 6)
    assert configurations(asked, H100)[0] != found
    monkeypatch.setattr("fx_quant.kernels.triton.choose.measured", lambda device: {str(case_of(asked)): found})
    assert configurations(asked, H100)[0] == found
    assert plan_scaled_mm(asked, H100).configuration == found
    other = operands(4096, 1024, 4096)
    assert plan_scaled_mm(other, H100).configuration != found


# --- what is kept -------------------------------------------------------------------------------------------------

GPU = Gpu("NVIDIA H100", 13000, "2.11.0", "3.6.0", "abc")
FOUND = {"int8": Configuration("swapped", 16, 64, 256, 4, 4, split_k=3), "x": Configuration("tile", 16, 64, 128, 4, 4)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FX_QUANT_CACHE_DIR", str(tmp_path))
    CONFIGURATIONS.forget()
    yield tmp_path
    CONFIGURATIONS.forget()


def test_what_is_saved_is_loaded_again(folder):
    assert CONFIGURATIONS.load(GPU) == {}
    path = CONFIGURATIONS.save(FOUND, GPU)
    assert path.parent == folder
    assert CONFIGURATIONS.load(GPU) == FOUND
    assert CONFIGURATIONS.reset(GPU) == path
    assert CONFIGURATIONS.load(GPU) == {} and CONFIGURATIONS.reset(GPU) is None


def test_other_drivers_have_files_of_their_own_and_other_sources_are_stale(folder):
    CONFIGURATIONS.save(FOUND, GPU)
    assert CONFIGURATIONS.load(replace(GPU, driver=13010)) == {}
    with pytest.warns(UserWarning, match="measured with other sources of Triton kernels"):
        assert CONFIGURATIONS.load(replace(GPU, sources="other")) == {}


def test_a_file_of_another_form_is_said_and_ignored(folder):
    path = CONFIGURATIONS.save(FOUND, GPU)
    path.write_text(json.dumps({**json.loads(path.read_text()), "tables": {"int8": {"form": "swapped"}}}))
    with pytest.warns(UserWarning, match=r"tune --device cuda --reset"):
        assert CONFIGURATIONS.load(GPU) == {}


# --- the tuner ----------------------------------------------------------------------------------------------------


def times(**seconds: float):
    """A clockwork ``measure``: so many microseconds by form and block, 10 for any other."""

    def measure(operands, found, architecture):
        return [seconds.get(f"m{each.block_m}n{each.block_n}", 10.0) * 1e-6 for each in found]

    return measure


@pytest.fixture
def always_right(monkeypatch):
    monkeypatch.setattr("fx_quant.kernels.triton.tuner.is_right", lambda *_: True)


@needs_triton
def test_the_fastest_is_chosen_where_it_wins_twice(always_right):
    decision = decide([operands(4096, 4096, 4096)], H100, times(m64n128=5.0))
    assert (decision.chosen.block_m, decision.chosen.block_n) == (64, 128)
    assert decision.default == ranked(case_of(operands(4096, 4096, 4096)), H100)[0].configuration
    assert decision.default_seconds / decision.chosen_seconds == pytest.approx(2)


@needs_triton
def test_a_gain_within_the_noise_changes_nothing(always_right):
    decision = decide([operands(4096, 4096, 4096)], H100, times(m64n128=9.9))
    assert decision.chosen == decision.default


@needs_triton
def test_a_gain_that_does_not_come_again_changes_nothing(always_right):
    rounds = iter([times(m64n128=5.0), times(m64n128=20.0)])
    decision = decide([operands(4096, 4096, 4096)], H100, lambda *given: next(rounds)(*given))  # noqa: PLW0108
    assert decision.chosen == decision.default


@needs_triton
def test_what_computes_something_else_is_never_chosen(monkeypatch):
    monkeypatch.setattr("fx_quant.kernels.triton.tuner.is_right", lambda operands, found, on: found.block_m != 64)
    decision = decide([operands(4096, 4096, 4096)], H100, times(m64n128=1.0))
    assert decision.chosen.block_m != 64
    assert {each.block_m for each in decision.wrong} == {64}
    assert "wrong, and never used" in str(GpuReport((decision,), (), 1.0, None))
    monkeypatch.setattr("fx_quant.kernels.triton.tuner.is_right", lambda *_: False)
    with pytest.raises(FxQuantError, match="no configuration computes what the canonical op does"):
        decide([operands(4096, 4096, 4096)], H100, times())


@needs_triton
def test_the_budget_ends_between_cases(always_right):
    asked = [Asked("int8", m, 512, 512) for m in (16, 64, 256)]
    clock = itertools.count(0.0, 1.0).__next__  # a second a look
    decided = lambda case: decide([operands(case.m, case.n, case.k)], H100, times())  # noqa: E731
    found = list(decide_all(asked, decided, Budget(5.0, clock)))
    assert len(found) == 2
    text = str(GpuReport(tuple(found), tuple(asked[2:]), 9.0, None))
    assert "2 cases in 9.0 s" in text and "not reached within the budget, so as before: 1 cases" in text


@pytest.mark.parametrize("recipe", ["float8", "int8", "float8_block"])
@pytest.mark.parametrize("on", ["sm90", "gfx942"])
def test_operands_to_tune_with_are_of_their_recipe(recipe, on):
    found = random_operands(Asked(recipe, 5, 256, 256), architecture(on), torch.device("cpu"))
    assert found.recipe == recipe
    assert (found.m, found.n, found.k) == (5, 256, 256)
    assert found.a.float().count_nonzero() > 1000


def test_weights_in_turn_exceed_the_cache():
    assert weights_in_turn(Asked("int8", 1, 4096, 4096)) * 4096 * 4096 >= 512 * 2**20
    assert weights_in_turn(Asked("int8", 1, 57344, 8192)) == 2


def test_right_is_exact_for_int8_and_close_for_float8(monkeypatch):
    for recipe, error, right in (("int8", 1e-6, False), ("float8", 1e-3, True), ("float8", 0.1, False)):
        asked = random_operands(Asked(recipe, 5, 256, 256), H100, torch.device("cpu"))
        asked = replace(asked, out_dtype=torch.float32)
        expected = torch.ops.fx_quant.scaled_mm(asked.a, asked.b, asked.a_scale, asked.b_scale, None, torch.float32)
        wrong = expected * (1 + error)
        monkeypatch.setattr("fx_quant.kernels.triton.tuner.plan_scaled_mm", lambda *_, out=wrong: _Planned(out))
        assert is_right(asked, Configuration("tile", 16, 64, 128, 4, 4), H100) is right


class _Planned:
    def __init__(self, out):
        self.run = lambda: out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tuning_without_a_gpu_is_a_clear_error(capsys):
    with pytest.raises(FxQuantError, match="needs a GPU"):
        tune()
    assert main(["tune", "--device", "cuda"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_tuner_on_the_gpu(folder):
    report = tune([(512, 512)], rows=[16, 256], recipes=["int8"], budget_seconds=60)
    assert len(report.decisions) == 2 and report.path is not None
    assert not any(each.wrong for each in report.decisions)
    device = torch.device("cuda", torch.cuda.current_device())
    assert set(measured(device)) == {each.case for each in report.decisions}


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_dispatch_of_a_model_names_kernel_configuration_and_floor(capsys):
    assert main(["kernels", "--target", "sm90", "--shapes", "llama3-8b"]) == 0
    text = capsys.readouterr().out
    for words in (
        "llama3-8b gate_up",
        "pytorch_scaled_mm_rowwise",
        "swapped 16x64x256",
        "39.2",
        "641.4",
        "not cutlass",
    ):
        assert words in text


def test_the_dispatch_as_data(capsys):
    assert main(["kernels", "--target", "sm90", "--shapes", "4096x14336", "--rows", "1", "4096", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["linears"]
    assert [each["m"] for each in found] == [1, 4096]
    assert found[0]["bound"] == "memory" and found[0]["floor_us"] == 19.58
    assert found[0]["configuration"]["form"] == "swapped"


@pytest.mark.parametrize("target", ["sm80", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950"])
def test_every_gpu_has_a_dispatch(target):
    scheme = default_scheme(named_target(target))
    assert (scheme.activation.dtype is I8) == (target == "sm80")
    for each in dispatch(named_target(target), ["llama3-8b"]):
        assert each.cost is not None and each.cost.seconds >= each.floor.seconds > 0
        assert FORMS[each.cost.configuration.form]


def test_a_weight_only_scheme_has_a_floor_and_no_matmul_of_codes(capsys):
    arguments = ["kernels", "--target", "sm90", "--shapes", "6144x4096", "--scheme", "bfloat16 x int4 per_group(128)"]
    assert main([*arguments, "--rows", "1"]) == 0
    assert "4.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "x86_vnni", "--shapes", "llama3-8b"], "needs the target of a GPU"),
        (["--target", "sm90", "--shapes", "llama4"], "must be NxK or one of llama3-8b, llama3-70b, got 'llama4'"),
    ],
)
def test_wrong_shapes_are_one_line(arguments, message, capsys):
    assert main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_linears_by_name_and_size():
    assert linears(["llama3-70b"])["llama3-70b down"] == (8192, 28672)
    assert linears(["16x32"]) == {"16x32": (16, 32)}


def test_nothing_of_triton_is_imported_to_print_a_dispatch(printed):
    printed(
        "import sys; from fx_quant.__main__ import main; import torch; before = 'triton' in sys.modules;"
        "main(['kernels', '--target', 'sm90', '--shapes', '16x16']); assert before or 'triton' not in sys.modules"
    )
