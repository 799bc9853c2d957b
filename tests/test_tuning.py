"""Plans of the native kernels: the table, its file, and results that no plan changes."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import fx_quant.lowerings  # noqa: F401  (registers the lowerings)
from fx_quant.backend import RewritePass
from fx_quant.compat import load_cpp
from fx_quant.config import Options
from fx_quant.errors import FxQuantError
from fx_quant.kernels.cpu import decode, native
from fx_quant.kernels.cpu import plans as tuning
from fx_quant.kernels.cpu.plans import ANY_ROWS, DEFAULT, Plan, PlanTable
from fx_quant.kernels.layouts import pack_weight
from fx_quant.scheme import Numerics
from fx_quant.target import named_target
from fx_quant.tuning import saved as measurements
from tests.test_cpu_decoded import E4M3, INT4, INT8, OPS, assert_is_sum, both, factors, packed, weight
from tests.tolerances import assert_within

fxq = torch.ops.fx_quant

# Every field away from its default in some range, and a border between any two of the row counts below.
WILD = PlanTable(
    (
        (1, Plan(ahead=0, next_panel=False, chunk_k=64, alone=0)),
        (2, Plan(ahead=64, alone=2**40)),
        (6, Plan(ahead=16384, chunk_k=128)),
        (7, Plan(ahead=4, next_panel=False, chunk_k=192)),
        (40, Plan(ahead=2**20, chunk_k=4096, alone=0)),
        (ANY_ROWS, Plan(ahead=0, next_panel=False, chunk_k=320)),
    )
)
ROWS = (1, 2, 3, 6, 7, 8, 40, 41, 390)
needs_vnni = pytest.mark.skipif(not native.INT8_VNNI.exists_here(), reason="needs AVX512-VNNI")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder for plans."""
    monkeypatch.setenv("FX_QUANT_CACHE_DIR", str(tmp_path / "plans"))
    tuning.PLANS.forget()
    yield tmp_path / "plans"
    tuning.PLANS.forget()


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "at"), [(0, 0), (1, 0), (2, 1), (3, 2), (6, 2), (7, 3), (8, 4), (40, 4), (41, 5), (2**40, 5), (ANY_ROWS, 5)]
)
def test_a_range_holds_its_last_row_and_not_the_next(m, at):
    assert WILD.plan_for(m) is WILD.ranges[at][1]


def test_the_native_code_finds_the_same_plan():
    code = f"""{native.PLAN}
    static constexpr FxqPlan PLANS[] = {WILD.rendered()};
    extern "C" __attribute__((visibility("default")))
    void look_up(const FxqPlan* plans, int64_t m, FxqPlan* given, FxqPlan* pasted, int64_t* threads) {{
      *given = fxq_plan(plans, m);
      *pasted = fxq_plan(PLANS, m);
      *threads = fxq_threads(*given, m, 128, 128, 7);
    }}"""
    look_up = load_cpp(code).look_up
    for m in (0, *ROWS, 39, 2**40):
        given, pasted, threads = (ctypes.c_int64 * 5)(), (ctypes.c_int64 * 5)(), ctypes.c_int64()
        look_up(WILD.array, ctypes.c_int64(m), given, pasted, ctypes.byref(threads))
        plan = WILD.plan_for(m)
        assert list(given)[1:] == list(pasted)[1:] == list(map(int, dataclasses.astuple(plan)))
        assert threads.value == (1 if m * 128 * 128 <= plan.alone else 7)


def test_one_range_is_replaced():
    changed = DEFAULT.replaced(5, ahead=64)
    assert changed.plan_for(6).ahead == 64
    assert [plan for limit, plan in changed.ranges if limit != 6] == [plan for limit, plan in DEFAULT.ranges[1:]]


REFUSED = [
    {"ahead": -1},
    {"ahead": 1.0},
    {"ahead": 2**41},
    {"next_panel": 1},
    {"chunk_k": 0},
    {"chunk_k": 100},
    {"chunk_k": True},
    {"alone": -1},
    {"alone": "1"},
]


@pytest.mark.parametrize("values", REFUSED, ids=str)
def test_a_plan_that_the_native_code_cannot_take_is_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} must be"):
        Plan(**values)


@pytest.mark.parametrize("limits", [(), (4,), (4, 4, ANY_ROWS), (0, ANY_ROWS), (8, 4, ANY_ROWS), (4.0, ANY_ROWS)])
def test_ranges_rise_to_any_number_of_rows(limits):
    with pytest.raises(ValueError, match="must rise"):
        PlanTable(tuple((limit, Plan()) for limit in limits))


# --- the file -----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_in_force_for_its_kernel_only(folder):
    assert tuning.table("int8_vnni") is tuning.default_table("int8_vnni")
    path = tuning.PLANS.save({"int8_vnni": WILD}, tuning.this_machine())
    assert path.parent == folder
    assert [each.name for each in folder.iterdir()] == [path.name]
    assert tuning.table("int8_vnni") == WILD
    assert tuning.table("int8_vnni").plan_for(7) == WILD.ranges[3][1]
    assert tuning.table("bf16") is tuning.default_table("bf16")
    assert tuning.PLANS.load(dataclasses.replace(tuning.this_machine(), threads=1000)) == {}
    assert tuning.PLANS.reset(tuning.this_machine()) == path
    assert tuning.table("int8_vnni") is tuning.default_table("int8_vnni")
    assert tuning.PLANS.reset(tuning.this_machine()) is None


def saved(**changes):
    """The text of a file for this machine, with ``changes`` to what it says of the machine."""
    machine = dataclasses.asdict(tuning.this_machine()) | changes
    return json.dumps({"format": 1, "machine": machine, "tables": {"int8_vnni": WILD.to_data()}})


HOSTILE = {
    "empty": lambda: "",
    "cut off": lambda: saved()[:-40],
    "not text": lambda: b"\xff\xfe\x00",
    "a list": lambda: "[]",
    "a number": lambda: "1",
    "deep": lambda: "[" * 100_000,
    "another format": lambda: saved().replace('"format": 1', '"format": 2'),
    "without a field": lambda: saved().replace('"ahead"', '"behind"'),
    "without rows": lambda: saved().replace('"rows"', '"columns"'),
    "an endless loop": lambda: saved().replace('"chunk_k": 64,', '"chunk_k": 0,'),
    "no last range": lambda: saved().replace('"rows": null', '"rows": 1000'),
    "tables of nothing": lambda: saved().replace('"tables": {', '"tables": {"bf16": null, '),
    "stale": lambda: saved(sources="0" * 64),
    "foreign": lambda: saved(cpu="another"),
    "features of another": lambda: saved(features=None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_does_not_hold_is_ignored_with_one_warning(name, folder):
    folder.mkdir()
    content = HOSTILE[name]()
    path = tuning.PLANS.path(tuning.this_machine())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match=r"are ignored and the defaults used, because .*fx_quant tune") as caught:
        found = [tuning.table(kind) for kind in ("int8_vnni", "another")]
    assert found == [tuning.DEFAULTS["int8_vnni"], DEFAULT]
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    tuning.PLANS.save({"bf16": WILD}, tuning.this_machine())
    assert tuning.table("bf16") == WILD


def test_a_stale_file_says_so(folder):
    folder.mkdir()
    tuning.PLANS.path(tuning.this_machine()).write_text(saved(sources="0" * 64))
    with pytest.warns(UserWarning, match="measured with other native sources"):
        tuning.tuned_tables()


def test_the_file_of_this_machine_needs_no_warning(folder):
    folder.mkdir()
    tuning.PLANS.path(tuning.this_machine()).write_text(saved())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.table("int8_vnni") == WILD


def test_a_write_that_fails_leaves_what_was_there(folder, monkeypatch):
    path = tuning.PLANS.save({"bf16": WILD}, tuning.this_machine())
    before = path.read_bytes()

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(FxQuantError, match="the disk is full; set FX_QUANT_CACHE_DIR"):
        tuning.PLANS.save({"bf16": DEFAULT}, tuning.this_machine())
    assert [each.name for each in folder.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_folder_that_is_a_file_is_an_error_when_saved_and_none_when_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FX_QUANT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="file is no folder; set FX_QUANT_CACHE_DIR"):
        assert tuning.PLANS.load(tuning.this_machine()) == {}
    for write in (tuning.PLANS.check_writable, lambda machine: tuning.PLANS.save({}, machine)):
        with pytest.raises(FxQuantError, match="plans must be written to"):
            write(tuning.this_machine())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FX_QUANT_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/fx_quant"),
        ({"HOME": "/c"}, "/c/.cache/fx_quant"),
    ],
    ids=str,
)
def test_where_the_file_is(environment, expected, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("FX_QUANT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert measurements.cache_folder().as_posix() == expected


def test_the_key_of_compiled_graphs_knows_the_plans(folder):
    uuid = RewritePass(Options(), named_target("x86_vnni")).uuid
    before = uuid()
    tuning.PLANS.save({"int8_vnni": WILD}, tuning.this_machine())
    after = uuid()
    assert after != before
    tuning.PLANS.save({"int8_vnni": WILD.replaced(1, ahead=128)}, tuning.this_machine())
    assert uuid() not in (before, after)
    tuning.PLANS.reset(tuning.this_machine())
    assert uuid() == before


# --- results ------------------------------------------------------------------------------------------------------


@needs_vnni
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 130), (200, 515)])
def test_int8_sums_are_exact_under_every_plan(m, n, k):
    a, w = weight(m, k, INT8), weight(n, k, INT8)
    out = native.matmul(native.INT8_VNNI, a, pack_weight(w, "vnni"), n, WILD)
    assert torch.equal(out.long(), a.long() @ w.long().t())


@both
@pytest.mark.parametrize("dtype", [INT8, INT4, E4M3], ids=str)
@pytest.mark.parametrize("block", [None, (1, 32), (1, 1000), (16, 136)], ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_decoded_sums_are_within_their_class_under_every_plan(float_dtype, dtype, block, m):
    n, k = 130, 1300
    a, w, scale = torch.randn(m, k).to(float_dtype), weight(n, k, dtype), torch.rand(factors(n, k, block))
    zero_point = None if dtype is E4M3 else torch.randint(-8, 8, scale.shape, dtype=torch.int8)
    b = packed(w, dtype, float_dtype)
    how = decode.decode_of(a.dtype, b.dtype, decode.is_int4(b))
    arguments = (how, a, b, n, None, scale, zero_point, None, torch.float32, block)
    expected = decode.decoded_matmul(*arguments, DEFAULT)
    assert_within(decode.decoded_matmul(*arguments, WILD), expected, Numerics.REASSOCIATED)


@needs_vnni
@pytest.mark.usefixtures("uncached")
def test_one_graph_serves_every_range_of_rows(folder):
    n, k = 200, 258
    tuning.PLANS.save({"int8_vnni": WILD}, tuning.this_machine())
    w = weight(n, k, INT8)

    def run(a):
        b = fxq.prepack([w], ["vnni"])[0]
        return fxq.cpu_int8_vnni(a, b, None, None, None, n, torch.int32) * 3

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(run, backend=counter, dynamic=False)
    first = weight(13, k, INT8)
    torch._dynamo.mark_dynamic(first, 0)
    out, (code,) = run_and_get_code(compiled, first)
    assert WILD.rendered() in code
    assert "fxq_threads(plan, M, N, K" in code
    assert torch.equal(out.long(), first.long() @ w.long().t() * 3)
    for m in ROWS[1:]:
        a = weight(m, k, INT8)
        assert torch.equal(compiled(a).long(), a.long() @ w.long().t() * 3)
    assert counter.frame_count == 1


@both
@pytest.mark.usefixtures("uncached")
def test_one_graph_of_a_decoded_weight_serves_every_range_of_rows(float_dtype, folder):
    n, k, block = 200, 258, (1, 32)
    w, scale = weight(n, k, INT8), torch.rand(factors(n, k, block))
    b = packed(w, INT8, float_dtype)
    tuning.PLANS.save({decode.decode_of(float_dtype, INT8, False).kind: WILD}, tuning.this_machine())

    def run(a):
        return OPS[float_dtype](a, b, None, scale, None, n, torch.float32, block=list(block))

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(run, backend=counter, dynamic=False)
    for m in (13, *ROWS[1:]):
        a = torch.randn(m, k).to(float_dtype)
        torch._dynamo.mark_dynamic(a, 0)
        assert_is_sum(compiled(a), a, w, scale, None, block)
    assert counter.frame_count == 1
