"""The int8 matmul of a CPU at every instruction set that this machine has, and that of AMX on emulated tiles."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fx_quant import compat
from fx_quant.kernels.cpu import native
from fx_quant.kernels.cpu.int8_kernels import LEVELS
from fx_quant.kernels.cpu.plans import default_table
from fx_quant.kernels.layouts import pack_weight
from fx_quant.kernels.registry import INT8_MAX_K

HERE = [level for level in LEVELS if level.dot.exists_here()]
every_level = pytest.mark.parametrize("dot", [pytest.param(level.dot, id=level.kernel) for level in HERE])

# Rows of each tile and more, columns of part of a panel and more, k of part of a lane, a register and a block.
SIZES = [
    (0, 64, 64),
    (1, 1, 1),
    (1, 64, 4),
    (1, 130, 257),
    (2, 63, 3),
    (3, 5, 2),
    (4, 66, 63),
    (5, 67, 5),
    (6, 200, 1031),
    (7, 65, 130),
    (7, 65, 515),
    (13, 130, 1031),
    (33, 70, 2049),
    (400, 129, 65),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def codes(rows: int, k: int) -> Tensor:
    return torch.randint(-128, 128, (rows, k), dtype=torch.int8)


def weight_of(dot: native.Dot, w: Tensor) -> Tensor:
    return w.t() if dot.layout is None else pack_weight(w, dot.layout)


def exact(a: Tensor, w: Tensor) -> Tensor:
    return (a.double() @ w.t().double()).to(torch.int64).to(torch.int32)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@every_level
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_the_sum_is_exact(dot, shape, strided, threads):
    m, n, k = shape
    a, w = codes(m, k), codes(n, k)
    given = torch.cat((a, a), 1)[:, :k] if strided else a
    out = native.matmul(dot, given, weight_of(dot, w), n)
    assert out is not None
    assert torch.equal(out, exact(a, w))


@every_level
@pytest.mark.parametrize("of_a", [-128, 127])
@pytest.mark.parametrize("of_w", [-128, 127])
def test_the_largest_products_do_not_saturate(dot, of_a, of_w):
    k = INT8_MAX_K
    a, w = torch.full((7, k), of_a, dtype=torch.int8), torch.full((9, k), of_w, dtype=torch.int8)
    assert torch.equal(native.matmul(dot, a, weight_of(dot, w), 9), exact(a, w))


def test_a_sum_that_is_too_deep_for_its_dtype_wraps_around():
    a, w = torch.full((1, 140000), -128, dtype=torch.int8), torch.full((5, 140000), -128, dtype=torch.int8)
    out = native.matmul(native.INT8_PORTABLE, a, w.t(), 5)
    assert (out == 140000 * 128 * 128 - 2**32).all()


@every_level
def test_strides_that_no_tile_reads_are_copied(dot):
    a, w = codes(70, 6).t(), codes(130, 65)
    given = w[:, ::2] if not dot.packed else w[:, ::2].contiguous()
    b = weight_of(dot, given)
    a = a[:, :33]
    assert torch.equal(native.matmul(dot, a, b, 130), exact(a, given))


def test_every_level_of_this_cpu_is_tested():
    features = native.cpu_features()
    assert [level.kernel for level in HERE] == [level.kernel for level in LEVELS if level.dot.features <= features]
    assert HERE[-1].kernel == "cpu_int8_portable"


# --- AMX, which few machines have ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated_amx():
    """The entry point of the AMX kernel over tiles of plain C++."""
    emulation = (Path(__file__).parent / "amx_emulation.h").read_text()
    return native.entry_point(compat.load_cpp(f"{emulation}\n{native.eager_source(native.INT8_AMX)}"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SIZES, (16, 64, 64), (17, 64, 65), (32, 70, 128), (50, 100, 191)], ids=str)
def test_amx_is_exact_on_emulated_tiles(emulated_amx, shape):
    m, n, k = shape
    w, wide = codes(n, k), codes(m, k + 5)
    b, a = pack_weight(w, "amx"), wide[:, :k]
    out = torch.empty(m, n, dtype=torch.int32)
    plans = default_table(native.INT8_AMX.kind).array
    emulated_amx(a.data_ptr(), a.stride(0), b.data_ptr(), m, n, k, out.data_ptr(), plans, 2)
    assert torch.equal(out, exact(a, w))


@pytest.mark.slow
@pytest.mark.skipif(native.cpu_features().isdisjoint({"avx2"}), reason="a compiler for x86")
def test_amx_compiles():
    assert isinstance(compat.load_cpp(native.eager_source(native.INT8_AMX)), ctypes.CDLL)


# --- compiled, at each width of Inductor's vectors ----------------------------------------------------------------

PORTABLE = "cpu_int8_portable"
OF_AVX2 = ("cpu_int8_avx_vnni", "cpu_int8_avx2", PORTABLE)

COMPILED = r"""
import json
import os
import re
import sys
import torch
import torch._inductor.compile_fx
from torch._inductor.utils import run_and_get_code
from fx_quant.kernels.cpu.int8_kernels import LEVELS
from fx_quant.kernels.layouts import pack_weight
from fx_quant.lowerings import cpu_template
from fx_quant.kernels.cpu.plans import DEFAULT
from tests.quick_compiles import compile_quickly

# A process for each, which has the imports and has asked nothing of this CPU.
for capability, *elsewhere in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        break
    assert os.waitpid(child, 0)[1] == 0, capability
else:
    sys.exit()
os.environ["ATEN_CPU_CAPABILITY"] = capability
# A header is compiled ahead in the time of nine kernels, and this is all that is compiled for the other capabilities.
torch._inductor.config.cpp_cache_precompile_headers = capability == "avx512"
compile_quickly()

# Two blocks of rows go over k in three parts.
cpu_template.table = lambda kind: DEFAULT.replaced(7, chunk_k=64)
torch.manual_seed(0)
levels = [level for level in LEVELS if level.dot.exists_here()]
w = torch.randint(-128, 128, (70, 131), dtype=torch.int8)
bias, scale = torch.randn(70), torch.rand(70)

found = {level.kernel: [] for level in levels}

# All levels in one graph, which takes less time to compile than one for each; each of another number of columns, so that no kernel
# has the epilogue of another. What is named is compiled for vectors of another width.
compiled = [level for level in levels if level.kernel not in elsewhere]
weights = {level.kernel: w[: 70 - i] for i, level in enumerate(compiled)}
operands = {
    level.kernel: pack_weight(weights[level.kernel], level.dot.layout) if level.dot.packed else weights[level.kernel].t()
    for level in compiled
}
bare = compiled[0].kernel

@torch.compile
def run(a, a_scale):
    outs = {}
    for name, b in operands.items():
        op, n = getattr(torch.ops.fx_quant, name), len(weights[name])
        y = op(a, b, a_scale, scale[:n], bias[:n], n, torch.float32)
        outs[name] = y, y.bfloat16().relu()
    n = len(weights[bare])
    return getattr(torch.ops.fx_quant, bare)(a, operands[bare], None, None, None, n, torch.int32), outs

for m in (7, 40):
    a, a_scale = torch.randint(-128, 128, (m, 131), dtype=torch.int8), torch.rand(m, 1)
    torch._dynamo.mark_dynamic(a, 0)
    torch._dynamo.mark_dynamic(a_scale, 0)
    if m == 7:
        (got_acc, outs), code = run_and_get_code(run, a, a_scale)
    else:
        got_acc, outs = run(a, a_scale)
    for name, (got_y, got_rounded) in outs.items():
        acc = (a.double() @ weights[name].t().double()).int()
        n = len(weights[name])
        y = acc.float() * a_scale * scale[:n] + bias[:n]
        found[name] += [torch.equal(got_y, y), torch.equal(got_rounded, y.bfloat16().relu())]
        if name == bare:
            found[name].append(torch.equal(got_acc, acc))
    if m == 7:
        # All are templates, those of the results with their epilogue inside.
        code = "".join(code)
        for level in compiled:
            calls = len(re.findall(rf"fxq_tile<{level.dot.struct}>\(\s*state", code))
            found[level.kernel].append(calls == 1 + (level.kernel == bare))
            found[level.kernel].append(code.count("async_compile.cpp_pybinding(") == len(compiled) + 1)
print(json.dumps([torch.backends.cpu.get_cpu_capability(), found]))
"""


def in_process(code: str, *arguments: str, **env: str) -> list[Any]:
    """The JSON of each line that a process prints."""
    command = [sys.executable, "-c", code, *arguments]
    env, root = {**os.environ, **env}, Path(__file__).parent.parent
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, cwd=root, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled():
    """What was found of each level, by the capability that PyTorch is held to."""
    jobs = [["avx512", *OF_AVX2], ["avx2"], ["default"]]
    # Inductor's own caches do not know of the capability.
    no_caches = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    found = in_process(COMPILED, json.dumps(jobs), **no_caches)
    return dict(zip((name for name, *_ in jobs), found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "left", "elsewhere"),
    [("avx512", {level.kernel for level in LEVELS}, OF_AVX2), ("avx2", set(OF_AVX2), ()), ("default", {PORTABLE}, ())],
)
def test_every_level_is_compiled_with_its_epilogue(compiled, capability, left, elsewhere):
    held, found = compiled[capability]
    assert held.lower() in (capability, "no avx")
    assert set(found) == left & {level.kernel for level in HERE}
    assert all(all(each) and bool(each) != (name in elsewhere) for name, each in found.items()), found


# --- torch._int_mm ------------------------------------------------------------------------------------------------

INT_MM = """
import json
import torch
from fx_quant.layers.linear import linear_problem
from fx_quant.scheme import Scheme
from fx_quant.kernels.select import select
from fx_quant.kernels.machine import detect_target

target = detect_target()
a, w = torch.full((16, 4096), 127, dtype=torch.int8), torch.full((64, 4096), 127, dtype=torch.int8)
scheme = Scheme.parse("int8 per_token (dynamic) x int8 per_channel")
problem = linear_problem(scheme, (64, 4096), torch.bfloat16, torch.bfloat16, None)
verdicts = {v.kernel: v.reasons for v in select(problem, target).verdicts}
print(json.dumps({
    "says": "exact_int_mm" in target.features,
    "is": bool((torch._int_mm(a, w.t()) == 127 * 127 * 4096).all()),
    "reasons": verdicts["pytorch_int_mm"],
}))
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_int_mm_is_chosen_only_where_it_does_not_saturate(isa):
    """oneDNN's int8 matmul adds pairs of products in 16 bits on CPUs without VNNI."""
    (found,) = in_process(INT_MM, ONEDNN_MAX_CPU_ISA=isa)
    assert found["says"] == found["is"]
    assert bool(found["reasons"]) != found["is"]
