"""The CPU benchmark: what it makes of its rows, which ways it takes, what each scheme's source computes."""

from __future__ import annotations

import ctypes
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import cpu
import cpu_cases
import cpu_ggml
import cpu_gguf
import cpu_llama_cpp
import cpu_model_table
import cpu_models
import cpu_table
import cpu_turns
import cpu_variants
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
    model = cpu_variants.by_hand(decoder(TINY), torch.bfloat16, "w8a8")
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
    assert cpu_model_table.compile_ratio(ours, [ours, plain]) == pytest.approx(1.5)
    assert cpu_model_table.compile_ratio(ours, [ours, {**plain, "threads": 2}]) is None
    assert cpu_model_table.compile_ratio(plain, [ours, plain]) is None


def ran(variant, decode=10.0, prefill=100.0, **facts):
    """A row of the models' table."""
    row = {"model": "decoder", "variant": variant, "threads": 1, "layers": 6, "prompt": 128, "status": "ok"}
    row |= {"prepare_s": 1234.5, "compile_s": 234.5, "peak_mib": 11111.0, "steady_mib": 900.0, "empty_mib": 300.0}
    row |= {"weights_mib": 400.0, "error": 0.042, "tokens_per_s": {"prefill": prefill, "decode": decode}}
    return row | facts


def test_a_variant_that_failed_says_why_in_the_table():
    failed = {"model": "decoder", "variant": "openvino int8", "threads": 1, "layers": 6, "status": "needs openvino"}
    for rows in ([failed], [failed, ran("inductor w8a8")]):
        assert "openvino int8" in cpu_model_table.table(rows) and "needs openvino" in cpu_model_table.table(rows)


@pytest.mark.parametrize("variant", cpu_variants.VARIANTS)
def test_every_line_of_the_table_fits(variant):
    rows = [
        ran(variant, 12345.6, 12345.6, status="wrong", error=12345.678, huge_pages=True),
        {**ran(variant), "variant": "dead", "status": "failed: " + "x" * 160} | {"huge_pages": True},
    ]
    del rows[1]["tokens_per_s"]
    assert max(map(len, cpu_model_table.table(rows).splitlines())) <= 120


def test_memory_and_seconds_stand_beside_the_rates():
    lines = cpu_model_table.table([ran("fx_quant w8a8"), ran("inductor w8a8", compile_s=117.25)]).splitlines()
    assert lines[1].split()[:2] == ["prompt", "128"]
    assert lines[3].split() == [
        "fx_quant",
        "w8a8",
        "100.0",
        "10.0",
        "1234.5",
        "234.5",
        "2.00",
        "11111",
        "900",
        "400",
        "0.042",
    ]
    assert "| fx_quant w8a8 | 100.0 | 10.0 | 1234.5 | 234.5 | 2.00 |" in cpu_model_table.table(
        [ran("fx_quant w8a8"), ran("inductor w8a8", compile_s=117.25)], markdown=True
    )


def test_results_without_the_newer_columns_are_still_read():
    for path in sorted((BENCHMARKS / "results").glob("*/*.json")):
        rows = [row for row in json.loads(path.read_text())["rows"] if "variant" in row]
        assert not rows or rows[0]["variant"] in cpu_model_table.table(rows)


def test_ours_stand_to_llama_cpp_of_as_many_bits():
    rows = [
        ran("fx_quant w8a8", 12.0, 300.0),
        ran("fx_quant w4a8", 30.0, 400.0),
        ran("inductor w8a8"),
        ran("llama.cpp Q8_0", 10.0, 100.0, steady_mib=500.0, empty_mib=20.0),
        ran("llama.cpp Q4_0", 20.0, 100.0, status="wrong"),
    ]
    _, lines = cpu_model_table.to_llama_cpp(rows)
    assert lines == [("fx_quant w8a8", "llama.cpp Q8_0", "3.00", "1.20", "200", "80")]
    assert cpu_model_table.to_llama_cpp(rows[:3]) is None


def test_peers_schemes_and_quick_choose_the_variants():
    chosen = cpu_variants.chosen
    assert chosen("decoder", ["all"], cpu_variants.SCHEMES) == list(cpu_variants.VARIANTS)
    assert not any(name.startswith("llama.cpp") for name in chosen("minilm", ["all"], cpu_variants.SCHEMES))
    assert chosen("decoder", ["llama.cpp"], ["w4a8"]) == ["fx_quant w4a8", "fx_quant w4a8 float32", "llama.cpp Q4_0"]
    quick = chosen("decoder", ["all"], cpu_variants.SCHEMES, quick=True)
    assert {cpu_variants.family(name) for name in quick} == {"fx_quant", "llama.cpp"}
    assert {scheme for name in quick for scheme in cpu_variants.VARIANTS[name].schemes} >= {"w8a8", "w4a8", "w4a16"}


def test_weights_are_counted_once_and_caches_are_not():
    model = decoder(TINY)
    linears = sum(weight.numel() for name, weight in model.named_parameters())
    turns = TINY.context * TINY.head * 2
    assert cpu_models.weight_bytes(model) == 4 * (linears + turns)
    model.head.weight = model.embedding.weight
    assert cpu_models.weight_bytes(model) == 4 * (linears - TINY.vocab * TINY.hidden + turns)
    model.head._packed_params = object()  # as quantize_dynamic's modules have them
    assert cpu_models.weight_bytes(model) is None


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def llama_cpp_is_here():
    try:
        cpu_llama_cpp.library()
    except ImportError:
        return False
    return True


needs_llama_cpp = pytest.mark.skipif(not llama_cpp_is_here(), reason=cpu_llama_cpp.ABSENT)


def test_llama_cpp_is_found_below_the_folder_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    folder = tmp_path / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"
    folder.mkdir(parents=True)
    (folder / "libllama.v9.9.9.so").touch()
    assert cpu_llama_cpp.library() == (folder / "libllama.v9.9.9.so").resolve()
    assert cpu_llama_cpp.version(cpu_llama_cpp.library()).startswith("llama.cpp v9.9.9")


def test_where_llama_cpp_is_absent_the_table_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu_llama_cpp, "places", list)
    asked = {"name": "llama.cpp Q4_0", "model": "decoder", "threads": 1, "layers": 1, "prompt": 8, "huge_pages": False}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    monkeypatch.setattr(sys, "argv", ["cpu_models.py", str(tmp_path / "asked.json")])
    cpu_models.main()
    row = json.loads(capsys.readouterr().out)
    assert row["status"] == "needs llama.cpp" and row["variant"] == "llama.cpp Q4_0"
    assert "npm install --prefix FOLDER @node-llama-cpp/linux-x64" in cpu_model_table.table([row])


def test_blocks_are_laid_out_as_ggml_reads_them():
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight[1, :32] = 0
    for kind, size in (("Q8_0", 34), ("Q4_0", 18)):
        blocks = cpu_gguf.quantized(weight, kind)
        stored = blocks.stored()
        assert stored.shape == (3, 2 * size) and stored.dtype is torch.uint8
        by_block = stored.unflatten(1, (2, size))
        scale, codes = by_block[..., :2].contiguous().view(torch.float16).float(), by_block[..., 2:]
        if kind == "Q8_0":
            codes = codes.contiguous().view(torch.int8).float()
        else:
            codes = torch.cat((codes & 15, codes >> 4), -1).float() - 8
        assert torch.equal((codes * scale).flatten(1), blocks.decoded())
        # Half a step; and of Q4_0 a whole one for what lies beyond code 7, since the largest magnitude has code -8.
        bound = scale.abs() * (0.5 if kind == "Q8_0" else 1) + 2e-3 * weight.abs().max()
        assert ((codes * scale).flatten(1) - weight).abs().unflatten(1, (2, 32)).le(bound).all()
        assert codes.amin() == (-127 if kind == "Q8_0" else -8) or kind == "Q8_0"


def read_gguf(path):
    """The facts and ``name: (dims, type, bytes)`` of a GGUF file."""
    data, at = path.read_bytes(), 24

    def take(form):
        nonlocal at
        found = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return found[0] if len(found) == 1 else found

    def text():
        return take(f"{take('Q')}s").decode()

    magic, version, count, facts = struct.unpack_from("<4sIQQ", data)
    assert (magic, version) == (b"GGUF", 3)
    read = {4: lambda: take("I"), 6: lambda: take("f"), 8: text}
    found = {text(): read[take("I")]() for _ in range(facts)}
    infos = [(text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(count)]
    start = -(-at // 32) * 32
    sizes = {0: (1, 4), 2: (32, 18), 8: (32, 34)}
    tensors = {}
    for name, dims, kind, offset in infos:
        block, size = sizes[kind]
        assert offset % 32 == 0
        length = math.prod(dims) // block * size
        assert start + offset + length <= len(data)
        tensors[name] = dims, kind, data[start + offset : start + offset + length]
    return found, tensors


@pytest.mark.parametrize("kind", cpu_gguf.TYPES)
def test_the_file_holds_the_decoders_weights_and_the_decoder_those_of_the_file(kind, tmp_path):
    size = Size(hidden=64, layers=2, ffn=96, heads=2, vocab=50, context=16)
    model = decoder(size)
    blocks = {name: cpu_gguf.quantized(weight, kind) for name, weight in model.named_parameters() if weight.dim() == 2}
    cpu_gguf.write_decoder(model, kind, tmp_path / "model.gguf")
    facts, tensors = read_gguf(tmp_path / "model.gguf")
    assert facts["llama.block_count"] == 2 and facts["llama.rope.dimension_count"] == 32
    assert len(tensors) == 3 + 9 * 2
    for name, found in blocks.items():
        assert torch.equal(model.get_parameter(name), found.decoded())
    assert tensors["blk.1.ffn_down.weight"] == (
        [96, 64],
        cpu_gguf.TYPES[kind],
        blocks["blocks.1.down.weight"].stored().numpy().tobytes(),
    )
    # Row 2 i + j of a head is what was row i of its half j.
    q = blocks["blocks.0.qkv.weight"].stored()[:64]
    rows = [head * 32 + half * 16 + i for head in range(2) for i in range(16) for half in range(2)]
    assert tensors["blk.0.attn_q.weight"][2] == q[rows].numpy().tobytes()
    assert tensors["output_norm.weight"] == ([64], 0, torch.ones(64).numpy().tobytes())


@needs_llama_cpp
@pytest.mark.parametrize("kind", cpu_gguf.TYPES)
def test_llama_cpp_gives_the_decoders_logits(kind, tmp_path):
    size = Size(hidden=64, layers=2, ffn=96, heads=2, vocab=50, context=16)
    model, path = decoder(size), tmp_path / "model.gguf"
    cpu_gguf.write_decoder(model, kind, path)
    session = cpu_llama_cpp.Session(cpu_llama_cpp.loaded(cpu_llama_cpp.library()), path, 1, 256)
    ids = list(range(3, 11))
    with torch.no_grad():
        expected = model(torch.tensor([ids]), torch.arange(8)), model(torch.tensor([[7]]), torch.tensor([8]))
    for given, after, right in ((ids, 0, expected[0]), ([7], 8, expected[1]), ([7], 8, expected[1])):
        got = session.feed((ctypes.c_int32 * len(given))(*given), len(given), after)[: size.vocab]
        assert cpu_llama_cpp.relative_error(got, right.flatten().tolist()) < 0.03


@needs_llama_cpp
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_ggml_multiplies_as_the_scheme_does(scheme):
    case = cpu_cases.Case(scheme, "float32", 128, 256, 1, (5,))
    layers = [cpu_cases.make_operands(cpu_cases.KINDS[scheme], "float32", 128, 256, seed) for seed in range(2)]
    x = cpu_cases.activation(5, 256, torch.float32)
    (way,) = (way for way in cpu_ggml.GGML_WAYS if way.runs(case))
    call = way.finish(case, way.prepare(case, layers), x)
    assert cpu_cases.relative_error(call(x), [cpu_cases.in_float64(each, x) for each in layers]) < 0.01
    with pytest.raises(ValueError, match="another"):
        call(x.clone())


def test_codes_of_int4_in_groups_of_32_are_those_of_q4_0():
    operands = cpu_cases.make_operands(cpu_cases.KINDS["w4a8-g32"], "float32", 8, 64, 0)
    error = cpu_ggml.blocks(operands, "Q4_0").decoded() - operands.weight
    assert error.norm() / operands.weight.norm() < 1e-3  # that of float16 scales


def test_an_error_of_logits_is_relative_to_their_norm():
    assert cpu_llama_cpp.relative_error([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)
    assert math.isnan(cpu_llama_cpp.relative_error([math.nan, 4.0], [3.0, 4.0]))


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
    # Each process of it compiles as these tests do.
    (tmp_path / "sitecustomize.py").write_text("import tests.quick_compiles as quick\nquick.compile_quickly()\n")
    paths = (str(tmp_path), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", ""))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert [each["m"] for each in found["rows"]] == [1, 64] and found["machine"]["versions"]["torch"]
    for each in found["rows"]:
        assert each["ways"]["fx_quant"]["status"] == each["ways"]["inductor"]["status"] == "ok"
        assert each["ceilings"]["read"] > 0
        assert cpu_table.ratio_to_best(each) > 0
    assert "to best" in done.stdout and "w8a8 to best peer, m <= 16" in done.stdout
