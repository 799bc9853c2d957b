"""The CPU benchmark: what it makes of its rows, which ways it takes, what each scheme's source computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cpu
import cpu_cases
import cpu_models
import cpu_table
import cpu_turns
import cpu_ways
import pytest
import torch
from cpu_decoder import PastDecoder, Size, decoder

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def row(m, ways, *, scheme="w8a8", read=20.0, peak=400.0, n=4096, k=4096):
    """``ways``: name to milliseconds, or to ``(status, milliseconds)``."""
    given = {name: way if isinstance(way, tuple) else ("ok", way) for name, way in ways.items()}
    return {
        "threads": 1,
        "scheme": scheme,
        "dtype": "float32",
        "n": n,
        "k": k,
        "m": m,
        "bytes": n * k,
        "ceilings": {"read": read, "peak": peak, "instruction": "vpdpbusd"},
        "ways": {name: {"status": status, "ms": ms, "error": 0.0} for name, (status, ms) in given.items()},
    }


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_wrong_or_failed_peer_is_never_the_best():
    some = row(
        1, {"fx_quant": 2.0, "inductor": 9.0, "fast": ("wrong", 0.1), "dead": ("failed: OSError", None), "b": 3.0}
    )
    assert cpu_table.best_peer(some) == ("b", 3.0)
    assert cpu_table.ratio_to_best(some) == pytest.approx(1.5)
    assert cpu_table.ratio_to_plain(some) == pytest.approx(4.5)


def test_what_computes_something_else_is_shown_but_no_rival():
    some = row(1, {"fx_quant": 2.0, "inductor": 9.0, "int8": 0.5}, scheme="w8a16")
    some["ways"]["int8"]["another"] = True
    assert cpu_table.best_peer(some) == ("inductor", 9.0)
    assert "0.500 (int8 activation)" in cpu_table.peers_table([some])


def test_without_a_right_time_of_ours_there_is_no_ratio():
    some = row(1, {"fx_quant": ("wrong", 1.0), "inductor": 9.0})
    assert cpu_table.ratio_to_best(some) is cpu_table.ratio_to_plain(some) is cpu_table.share_of_bandwidth(some) is None
    assert cpu_table.cells(some)[5] == "wrong"
    assert "wrong (0)" in cpu_table.peers_table([some])


def test_a_row_without_peers_has_no_best():
    assert cpu_table.best_peer(row(1, {"fx_quant": 1.0})) is None
    assert cpu_table.cells(row(1, {"fx_quant": 1.0}))[6] == "none"


def test_the_ceiling_is_the_nearer_of_both():
    # 4096 * 4096 bytes in 1 ms are 16.8 of 20 GB/s; 2 * 4096**2 operations are 33.6 of 400 Gop/s.
    assert cpu_table.ceiling(row(1, {"fx_quant": 1.0})) == "84% read"
    assert cpu_table.ceiling(row(16, {"fx_quant": 2.0})) == "67% vpdpbusd"
    without = row(16, {"fx_quant": 2.0}, peak=None)
    assert cpu_table.ceiling(without) == "42% read"


def test_geometric_mean_leaves_out_what_is_missing():
    assert cpu_table.geometric_mean([1.0, None, 4.0]) == pytest.approx(2.0)
    assert cpu_table.geometric_mean([None]) is None


def test_goals_are_reached_or_missed():
    rows = [row(1, {"fx_quant": 1.0, "inductor": 3.0, "p": 1.2}), row(16, {"fx_quant": 1.0, "inductor": 3.0, "p": 1.4})]
    lines = cpu_table.goals(rows)
    assert "w8a8 to best peer, m <= 16, mean: asked 1.25, got 1.30 (reached)" in lines
    assert "w8a8 to plain Inductor, m <= 16, mean: asked 2.00, got 3.00 (reached)" in lines
    assert not any("read bandwidth" in line for line in lines)  # the weight may have been in cache
    share = "w8a8 share of read bandwidth, m = 1, weight beyond the cache, mean: asked 0.85, got 0.84 (missed)"
    assert share in cpu_table.goals([{**each, "cache": 2**20} for each in rows])
    assert not any("fp8" in line or "64..1024" in line for line in lines)


def test_the_summary_names_the_worst_row():
    rows = [row(m, {"fx_quant": 1.0, "inductor": ratio}) for m, ratio in ((1, 2.0), (16, 0.5), (64, 3.0))]
    text = cpu_table.summary(rows)
    assert "0.50 at 4096 x 4096, m = 16" in text
    assert "m >= 64" in text and "3.00 at 4096 x 4096, m = 64" in text


def test_frozen_weights_are_ours_and_have_means_of_their_own():
    some = row(1, {"fx_quant": 2.0, "inductor": 9.0, "fx_quant frozen": 1.5, "b": 3.0})
    assert cpu_table.best_peer(some) == ("b", 3.0)
    assert cpu_table.ratio_to_best(*cpu_table.frozen([some])) == pytest.approx(2.0)
    text = cpu_table.summary([some])
    assert "fx_quant:\nw8a8 to best peer, m <= 16, mean: asked 1.25, got 1.50" in text
    assert "fx_quant frozen:\nw8a8 to best peer, m <= 16, mean: asked 1.25, got 2.00" in text
    assert "frozen" not in cpu_table.summary([row(1, {"fx_quant": 2.0, "b": 3.0})])


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "ratios.svg"
    cpu_table.plot([row(m, {"fx_quant": 1.0, "inductor": 2.0}) for m in (1, 16, 256)], path)
    assert "<svg" in path.read_text()


# --- command line -----------------------------------------------------------------------------------------------------


def test_a_shape_is_n_by_k():
    assert cpu.parser().parse_args(["linears", "--shapes", "11008x4096", "64x32"]).shapes == [(11008, 4096), (64, 32)]


@pytest.mark.parametrize("arguments", [["--shapes", "4096"], ["--shapes", "0x4"], ["--rows", "0"], ["--schemes", "w2"]])
def test_what_is_no_shape_row_or_scheme_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        cpu.parser().parse_args(["linears", *arguments])
    assert "error" in capsys.readouterr().err


def test_processor_time_is_for_one_thread(capsys):
    with pytest.raises(SystemExit):
        cpu.main(["linears", "--cpu-time", "--threads", "1", "2"])
    assert "--threads 1" in capsys.readouterr().err


def test_quick_is_one_shape_and_three_numbers_of_rows():
    quick = cpu.cases(cpu.parser().parse_args(["linears", "--quick", "--schemes", "w8a8"]))
    assert [(case.n, case.k, case.rows, case.threads) for case in quick] == [(4096, 4096, (1, 16, 256), 1)] * 2
    whole = cpu.cases(cpu.parser().parse_args(["linears", "--threads", "1"]))
    assert len(whole) == len(cpu_cases.KINDS) * 2 * len(cpu_cases.SHAPES)


# --- ways and cases ---------------------------------------------------------------------------------------------------


def names(scheme, dtype, peers, **arguments):
    case = cpu_cases.Case(scheme, dtype, 64, 64, 1, (1,))
    return [way.name for way in cpu_ways.chosen(case, peers, **arguments)]


def test_ours_and_plain_inductor_always_run_and_first():
    for scheme in cpu_cases.KINDS:
        assert names(scheme, "float32", ["pt2e"])[:2] == ["fx_quant", "inductor"]


def test_families_choose_the_peers():
    assert not any(name.startswith(("onnx", "openvino")) for name in names("w8a8", "float32", ["torch"]))
    assert "onnxruntime dynamic" in names("w8a8", "float32", ["all"])
    assert "onnxruntime dynamic" not in names("w8a8", "bfloat16", ["all"])
    assert "pt2e static max-autotune" not in names("w8a8", "float32", ["all"], quick=True)
    for scheme in cpu_cases.KINDS:
        assert len(set(names(scheme, "float32", ["all"]))) == len(names(scheme, "float32", ["all"]))


def test_layers_outgrow_the_cache_but_not_the_compiler():
    assert cpu_cases.layers_needed(16 << 20, 32 << 20) == 8
    assert cpu_cases.layers_needed(45 << 20, 32 << 20) == 3
    assert cpu_cases.layers_needed(1 << 10, 32 << 20) == cpu_cases.MOST_LAYERS
    assert cpu_cases.layers_needed(1 << 30, 32 << 20) == 1


@pytest.mark.parametrize("scheme", cpu_cases.KINDS)
def test_each_source_computes_its_scheme(scheme):
    case = cpu_cases.Case(scheme, "float32", 256, 384, 1, (5,))
    operands = cpu_cases.make_operands(cpu_cases.KINDS[scheme], "float32", 256, 384, 0)
    x = cpu_cases.activation(5, 384, torch.float32)
    expected = cpu_cases.exact(case, operands, x)
    for module in (cpu_cases.source(scheme)(operands), cpu_cases.for_fx_quant(case, operands)):
        assert cpu_cases.relative_error([module(x)], [expected]) < 1e-5
    # What peers are compared with differs by the quantized activation, and by no more than is allowed for it.
    error = cpu_cases.relative_error([expected], [cpu_cases.in_float64(operands, x)])
    assert error == 0 if operands.scheme.weight_only else 1e-3 < error < 5e-2


def test_a_result_that_is_not_finite_is_an_error_of_nan():
    good = torch.ones(2, 2, dtype=torch.float64)
    error = cpu_cases.relative_error([good, good * torch.nan], [good, good])
    assert error != error


# --- models -----------------------------------------------------------------------------------------------------------

TINY = Size(hidden=32, layers=2, ffn=48, heads=2, vocab=50, context=16)


def test_the_decoder_without_state_computes_the_same():
    model = decoder(TINY)
    ids = torch.randint(0, 50, (1, 5))
    stateless, past = PastDecoder(model), torch.zeros(2, 2, 1, 2, 0, 16)
    with torch.no_grad():
        logits, past = stateless(ids[:, :4], past)
        torch.testing.assert_close(logits, model(ids[:, :4], torch.arange(4)))
        torch.testing.assert_close(stateless(ids[:, 4:], past)[0], model(ids[:, 4:], torch.tensor([4])))


def test_only_what_is_no_linear_changes_its_dtype():
    model = cpu_models.by_hand(decoder(TINY), torch.bfloat16, "w8a8")
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes["codes"] is torch.int8 and dtypes["scale"] is torch.float32
    assert model.embedding.weight.dtype is torch.bfloat16 and not any(
        isinstance(module, torch.nn.Linear) for module in model.modules()
    )
    assert model(torch.zeros(1, 3, dtype=torch.long), torch.arange(3)).dtype is torch.bfloat16


def test_compile_time_is_compared_with_plain_inductor():
    common = {"model": "decoder", "threads": 1, "layers": 6, "status": "ok"}
    ours = {**common, "variant": "fx_quant w8a8", "compile_s": 30.0}
    plain = {**common, "variant": "inductor w8a8", "compile_s": 20.0}
    assert cpu_models.compile_ratio(ours, [ours, plain]) == pytest.approx(1.5)
    assert cpu_models.compile_ratio(ours, [ours, {**plain, "threads": 2}]) is None
    assert cpu_models.compile_ratio(plain, [ours, plain]) is None


def test_a_variant_that_failed_says_why_in_the_table():
    failed = {"model": "decoder", "variant": "openvino int8", "threads": 1, "layers": 6, "status": "needs openvino"}
    assert "needs openvino" in cpu_models.table([failed])


# --- turns ------------------------------------------------------------------------------------------------------------


VARIANT = """
import json, pathlib, sys
asked = json.loads(pathlib.Path(sys.argv[1]).read_text())
name = asked["name"]
if name == "dead":
    sys.exit("it could not start")
row = {"model": "m", "variant": name, "threads": 1, "layers": 2, "status": "needs it" if name == "absent" else "ok"}
print(json.dumps(row | {"tokens": {"decode": 3}}), flush=True)
for turn, _ in enumerate(sys.stdin):
    with open(asked["order"], "a") as order:
        order.write(name + "\\n")
    if name == "dies" and turn == 1:
        sys.exit("it died")
    print(json.dumps({"decode": [turn + 1.0, 6.0]}), flush=True)
"""


def test_variants_take_turns(tmp_path, monkeypatch, capfd):
    (tmp_path / "variant.py").write_text(VARIANT)
    monkeypatch.setattr(cpu_turns, "SCRIPT", tmp_path / "variant.py")
    given = {"model": "m", "threads": 1, "layers": 2, "order": str(tmp_path / "order")}
    names = ("a", "dead", "b", "absent", "dies")
    rows = cpu_turns.measured([{"name": name, **given} for name in names], rounds=3, timeout=60)
    assert [row["variant"] for row in rows] == list(names)
    assert (tmp_path / "order").read_text().split() == [*("a", "b", "dies"), *("b", "dies", "a"), *("a", "b")]
    for row in (rows[0], rows[2]):
        assert row["s"] == {"decode": 4.5}
        assert row["tokens_per_s"] == {"decode": pytest.approx(3 / 4.5)}
    assert rows[3]["status"] == "needs it"
    assert rows[1]["status"] == rows[4]["status"] == "failed: see the standard error"
    said = capfd.readouterr().err
    assert "it could not start" in said and "it died" in said


def test_a_variant_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    (tmp_path / "variant.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(cpu_turns, "SCRIPT", tmp_path / "variant.py")
    asked = {"name": "slow", "model": "m", "threads": 1, "layers": 2}
    (row,) = cpu_turns.measured([asked], rounds=1, timeout=0.2)
    assert row["status"] == "failed: see the standard error"


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_case_end_to_end(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "cpu.py"), "linears", "--schemes", "w8a8", "--shapes", "64x64"]
    command += ["--rows", "1", "64", "--dtypes", "float32", "--threads", "1", "--seconds", "0.1"]
    # One layer, instead of as many as outgrow the last-level cache.
    command += ["--peers", "eager", "--quick", "--cache", "1024", "--json", str(path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert [each["m"] for each in found["rows"]] == [1, 64] and found["machine"]["versions"]["torch"]
    for each in found["rows"]:
        assert each["ways"]["fx_quant"]["status"] == each["ways"]["inductor"]["status"] == "ok"
        assert each["ceilings"]["read"] > 0
        assert cpu_table.ratio_to_best(each) > 0
    assert "to best" in done.stdout and "w8a8 to best peer, m <= 16" in done.stdout
