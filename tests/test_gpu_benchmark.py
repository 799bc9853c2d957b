"""The GPU benchmark without a GPU: its cases, its references, what it makes of timings, and what it says here."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import gpu
import gpu_cases
import gpu_check
import gpu_compile
import gpu_measure
import gpu_table
import gpu_ways
import pytest
import torch
from gpu_cases import Case

from fx_quant.kernels.triton.architectures import architecture

CPU, SM90 = torch.device("cpu"), architecture("sm90")
N, K = 256, 384


def small(section: str, recipe: str, m: int = 5) -> gpu_cases.Operands:
    return gpu_cases.operands(Case(section, "small", recipe, m, N, K if section != "chains" else N), CPU, 0)


def row(ways: dict, section="linears", recipe="row", m=16, what="8B qkv", n=6144, k=4096, floor=8.0, **changes) -> dict:
    """``ways``: name to microseconds, or to a status."""
    found = {
        name: {
            "status": way if isinstance(way, str) else "ok",
            "error": 1e-3,
            "part": name.startswith("kernel"),
            "us": None if isinstance(way, str) else {"p20": way * 0.9, "p50": way, "p80": way * 1.1},
        }
        for name, way in ways.items()
    }
    case = dataclasses.asdict(Case(section, what, recipe, m, n, k))
    return case | {"floor_us": floor, "limit": "memory", "sets": 4, "ways": found} | changes


# --- cases --------------------------------------------------------------------------------------------------------


def test_every_section_has_cases_for_all_that_is_asked():
    counts = {
        section: len(gpu_cases.cases(section, recipes, ("8B",), (1, 64)))
        for section, recipes in (
            ("linears", gpu_cases.RECIPES),
            ("chains", gpu_cases.RECIPES),
            ("ceilings", gpu_cases.RECIPES),
        )
    }
    assert counts == {"linears": 7 * 4 * 2, "chains": 2 * 2, "ceilings": 0}
    everything = gpu_cases.cases("linears", tuple(gpu_cases.RECIPES), tuple(gpu_cases.MODELS), gpu_cases.ROWS)
    assert len(set(everything)) == 7 * 2 * 4 * 8
    assert {(case.n, case.k) for case in everything if case.what == "70B gate_up"} == {(57344, 8192)}


@pytest.mark.parametrize(
    ("recipe", "n", "k", "m", "us", "limit"),
    [
        # reference/gpu.md, section 2, but for a bfloat16 activation where codes were read there.
        ("row", 28672, 4096, 1, 39.2, "memory"),
        ("row", 6144, 4096, 4096, 137.4, "compute"),
        ("w4a16", 28672, 4096, 1, 20.8, "memory"),
        ("w4a16", 4096, 4096, 4096, 172.2, "compute"),
    ],
)
def test_floors_are_those_of_the_roofline(recipe, n, k, m, us, limit):
    found = gpu_cases.floor(Case("linears", "", recipe, m, n, k), SM90)
    assert found[0] == pytest.approx(us, rel=0.01) and found[1] == limit


def test_the_floor_of_a_chain_is_that_of_its_linears():
    parts = [
        gpu_cases.floor(Case("linears", "", "row", 64, n, k), SM90)[0] for n, k in ((2 * 14336, 4096), (4096, 14336))
    ]
    assert gpu_cases.floor(Case("chains", "", "row", 64, 14336, 4096), SM90)[0] == pytest.approx(sum(parts))


def test_weights_outgrow_the_cache_in_at_least_four_sets():
    assert gpu_cases.layers_needed(16 << 20, 50 << 20) == 13
    assert gpu_cases.layers_needed(1 << 30, 50 << 20) == 4
    assert gpu_cases.layers_needed(1 << 10, 50 << 20) == 16


# --- verification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", gpu_cases.RECIPES)
@pytest.mark.parametrize("m", [1, 150])
def test_our_linears_are_right(recipe, m):
    given = small("linears", recipe, m)
    ours = [way for way in gpu_ways.ways(given, ()) if way.family == "fx_quant"]
    assert ours[0].name == gpu_table.OURS
    states, calls = gpu_measure.prepared(given, ours)
    assert {state["status"] for state in states.values()} == {"ok"}, states
    assert len(given.layers) >= 4 and not torch.equal(calls["fx_quant"](0), calls["fx_quant"](1))


@pytest.mark.parametrize("recipe", gpu_cases.CHAIN_RECIPES)
def test_our_chains_are_right(recipe):
    given = small("chains", recipe)
    states, _ = gpu_measure.prepared(given, gpu_ways.ways(given, ()))
    assert states["fx_quant"]["status"] == "ok", states


def test_the_reference_is_not_the_unquantized_product():
    given = small("linears", "row", 64)
    dense = given.x.double() @ given.layers[0][0].dense.double().t()
    assert 1e-3 < gpu_measure.relative_error(given, dense) < gpu_ways._UNQUANTIZED


def test_what_is_wrong_fails_or_is_absent_is_not_timed():
    given = small("linears", "row")
    right = given.expected.to(torch.bfloat16)

    def fails(given):
        raise ValueError("no such\nluck")

    def way(name, prepare, needs=lambda: None):
        return gpu_measure.Way(name, "x", needs, prepare)

    ways = [
        way("right", lambda given: lambda i: right),
        way("wrong", lambda given: lambda i: right * 1.1),
        way("nan", lambda given: lambda i: right * torch.nan),
        way("fails", fails),
        way("absent", fails, lambda: "the package x is not installed"),
    ]
    found = gpu_measure.measure(given, ways, 0.0)
    assert {name: state["status"] for name, state in found.items()} == {
        "right": "ok",
        "wrong": "wrong",
        "nan": "wrong",
        "fails": "failed: ValueError: no such",
        "absent": "absent: the package x is not installed",
    }
    assert {name for name, state in found.items() if state["us"]} == {"right"}


def test_a_row_of_a_case_goes_to_json_and_back(tmp_path):
    case = Case("linears", "small", "int8", 5, N, K)
    peers = ("bf16", "torch", "kernels")
    found = gpu.measured(case, SM90, CPU, lambda given: gpu_ways.ways(given, peers), 0.0)
    gpu.write(tmp_path / "here" / "gpu.json", [found])
    (again,) = gpu.read(tmp_path / "here" / "gpu.json")
    assert again == json.loads(json.dumps(found)) and gpu.key(again) == dataclasses.astuple(case)
    statuses = {name: way["status"] for name, way in found["ways"].items()}
    assert statuses["fx_quant"] == statuses["bf16"] == statuses["eager quant + torch"] == "ok", statuses
    assert any(name.startswith("kernel ") for name in statuses)
    us = found["ways"]["fx_quant"]["us"]
    assert 0 < us["p20"] <= us["p50"] <= us["p80"]
    assert gpu_table.ratio(found, gpu_table.BF16) > 0 and gpu_table.cells(found)[6] != "none"


def test_percentiles_are_values_that_were_measured():
    assert gpu_measure.percentiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {"p20": 2.0, "p50": 3.0, "p80": 5.0}
    assert gpu_measure.percentiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}


def test_rounds_begin_with_another_way_each_time():
    order = []
    calls = {name: (lambda i, name=name: order.append((name, i))) for name in "abc"}
    gpu_measure.timed(calls, 4, 0.0, False)
    rounds = order[3 * gpu_measure.CALLS :]
    firsts = [rounds[i][0] for i in range(0, len(rounds), 3 * gpu_measure.CALLS)]
    assert len(firsts) == gpu_measure.LEAST_ROUNDS and firsts[:4] == ["a", "b", "c", "a"]
    assert [i for _, i in rounds[:5]] == [0, 1, 2, 3, 0]


# --- peers ----------------------------------------------------------------------------------------------------------


def test_absent_peers_say_what_is_missing(monkeypatch):
    monkeypatch.delenv("FX_QUANT_VLLM_LIBRARY", raising=False)
    gpu_ways.vllm.cache_clear()
    assert "FX_QUANT_VLLM_LIBRARY" in gpu_ways.vllm()
    assert gpu_ways.package("no_such_package")() == "the package no_such_package is not installed"
    monkeypatch.setenv("FX_QUANT_VLLM_LIBRARY", "/nowhere.so")
    gpu_ways.vllm.cache_clear()
    assert gpu_ways.vllm().startswith("/nowhere.so does not load")
    gpu_ways.vllm.cache_clear()


def test_families_choose_the_peers():
    given = small("linears", "block")
    names = [way.name for way in gpu_ways.ways(given, gpu_ways.FAMILIES)]
    assert {"deep_gemm", "flashinfer", "inductor", "inductor max-autotune", "bf16"} <= set(names)
    assert len(names) == len(set(names))
    assert {way.family for way in gpu_ways.ways(given, ("bf16",))} == {"fx_quant", "bf16"}


def test_deep_gemm_is_given_codes_and_scales_of_columns(monkeypatch):
    given, seen = small("linears", "block", 8), {}

    def fp8_gemm_nt(a, b, out, **options):
        seen["strides"] = a[1].stride()
        scale = a[1].repeat_interleave(128, 1)
        out.copy_((a[0].double() * scale) @ given.layers[0][0].decoded())

    monkeypatch.setitem(sys.modules, "deep_gemm", types.SimpleNamespace(fp8_gemm_nt=fp8_gemm_nt))
    assert gpu_measure.relative_error(given, gpu_ways._deep_gemm(given)(0)) < 1e-2
    assert seen["strides"] == (1, 8)


@pytest.mark.parametrize("recipe", ["int8", "int8 asym", "w8a16", "w4a16"])
def test_the_sources_compute_their_recipe(recipe):
    given = small("linears", recipe, 20)
    (weights,) = given.layers[0]
    import gpu_sources

    y = gpu_sources.linear(recipe)(given.x, weights.codes, weights.scale)
    assert gpu_measure.relative_error(given, y) < 2e-2


# --- what rows say ----------------------------------------------------------------------------------------------------


def test_a_part_or_a_failure_is_no_rival():
    found = row({"fx_quant": 10.0, "kernel a": 1.0, "inductor": 30.0, "vllm": "wrong", "bf16": 20.0})
    assert gpu_table.best_peer(found) == ("bf16", 20.0)
    assert gpu_table.ratio(found, "inductor", "inductor max-autotune") == pytest.approx(3.0)
    assert gpu_table.share(found) == pytest.approx(0.8)
    assert gpu_table.microseconds(found, "kernel") is None and gpu_table.best_peer(row({"fx_quant": 1.0})) is None
    assert gpu_table.cells(found)[4:] == ("10.0", "9.0..11.0", "bf16", "20.0", "2.00", "8.0 memory", "80%")


def test_tables_name_what_did_not_run():
    rows = [row({"fx_quant": "failed: OSError: gone", "vllm": "absent: no library"}), row({"fx_quant": 3.0}, m=64)]
    text = gpu_table.ways_table(rows)
    assert "absent" in text and "3.0" in text and "m=64" in text
    assert gpu_table.absent(rows)[1].startswith("vllm: absent: no library") and len(gpu_table.absent(rows)) == 2
    assert "failed: OSError: gone" in gpu_table.table(rows)


def test_goals_are_reached_missed_wished_for_or_not_measured():
    rows = [
        row(
            {"fx_quant": 10.0, "inductor": 13.0, "vllm": 12.6, "kernel triton_float8": 9.0, "kernel pytorch_x": 8.0},
            m=m,
        )
        for m in (1, 16, 4096)
    ]
    lines = gpu_table.goals(rows).splitlines()
    assert "G1   row-wise linear to the best of Inductor, m <= 16: asked 1.25 (1.6), got 1.30: reached" in lines
    assert "G1b  row-wise linear to vLLM, m <= 16: asked 1.05 (1.25), got 1.26: moonshot" in lines
    assert "G2b  own matmul to torch's, m >= 1024: asked 0.9 (0.97), got 0.89: missed" in lines
    assert "G9   least ratio to Inductor of all linears: asked 0.97 (1), got 1.30: moonshot" in lines
    assert "G3   blocks to DeepGEMM, m <= 64: not measured" in lines
    assert {line.split()[0].rstrip("bc") for line in lines} == {"G1", "G2", "G3", "G4", "G5", "G6", "G7", "G9"}


def test_a_layer_is_the_sum_of_its_linears():
    rows = [
        row({"fx_quant": 1.0 * i, "bf16": 2.0 * i}, what=f"8B {name}")
        for i, name in enumerate(gpu_cases.MODELS["8B"].linears(), 1)
    ]
    (line,) = [line for line in gpu_table.goals(rows).splitlines() if "layer to bf16, m <= 64" in line]
    assert line.endswith("got 2.00: moonshot")
    (line,) = [line for line in gpu_table.goals(rows[:3]).splitlines() if "layer to bf16, m <= 64" in line]
    assert line.endswith("not measured")


def test_the_zero_point_is_compared_with_the_same_linear_without():
    rows = [row({"fx_quant": 10.0}, recipe="int8"), row({"fx_quant": 10.2}, recipe="int8 asym")]
    assert gpu_table._asymmetric(rows) == pytest.approx(1 / 1.02)


def recorded() -> list[dict]:
    clock = {"clocks.sm": "1980", "power.draw": "600"}
    bound = {"section": "ceilings", "what": "copy", "unit": "TB/s", "assumed": 3.0, "value": 2.9, "status": "ok"}
    compiled = {"section": "compile", "what": "fx_quant", "status": "ok", "cold": 20.0, "warm": 2.0}
    return [bound | {"clock": clock}, compiled, row({"fx_quant": 10.0, "bf16": 20.0}), row({"fx_quant": 5.0}, m=1)]


def test_recorded_results_are_reported_without_a_gpu(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"machine": {"gpu": "NVIDIA H100", "driver_version": "580"}, "rows": recorded()}))
    assert gpu.main(["report", str(path)]) == 0
    said = capsys.readouterr().out
    for part in ("NVIDIA H100", "2.90 TB/s", "1980", "8B qkv", "20.0  2.0", "G7", "G8", "not measured"):
        assert part in said


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    gpu_table.plot([found for found in recorded() if "ways" in found], tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys):
    assert gpu.main(["run"]) == 1
    assert gpu_check.main(["--sections", "ceilings"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("gpu.py: a GPU is needed, and torch ") and lines[1].startswith("gpu-check: a GPU is")


def test_the_check_runs_the_files_with_gpu_tests():
    names = [path.rpartition("/")[2] for path in gpu_check.gpu_tests()]
    assert {"test_triton.py", "test_gpu_swapped.py"} <= set(names) and "test_gpu_benchmark.py" not in names


def test_a_run_takes_up_what_is_in_the_file_and_ends_in_time(tmp_path, monkeypatch, capsys):
    path, asked = tmp_path / "gpu.json", []
    monkeypatch.setattr(gpu, "missing_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu, "architecture_of", lambda device: SM90)

    def measured(case, *_):
        asked.append(case)
        return dataclasses.asdict(case) | row(
            {"fx_quant": 1.0}, case.section, case.recipe, case.m, case.what, case.n, case.k
        )

    monkeypatch.setattr(gpu, "measured", measured)
    run = ["run", "--sections", "linears", "--models", "8B", "--recipes", "row", "--json", str(path)]
    assert gpu.main([*run, "--rows", "1"]) == 0
    assert gpu.main([*run, "--rows", "1", "16"]) == 0
    assert [case.m for case in asked] == [1] * 4 + [16] * 4 and len(gpu.read(path)) == 8
    assert gpu.main([*run, "--rows", "64", "--minutes", "0"]) == 0
    assert len(asked) == 8 and "not measured in 0 minutes, run again for: 4 cases" in capsys.readouterr().out


def test_a_compile_variant_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(gpu_compile, "in_process", lambda variant, cache: 3.0 if variant == "inductor" else "failed: x")
    rows = gpu_compile.measured(float("inf"), [])
    assert [r["status"] for r in rows] == ["ok", "failed: x", "failed: x"] and rows[0]["warm"] == 3.0
    assert gpu_compile.measured(0.0, rows) == rows and "failed: x" in gpu_compile.table(rows)
