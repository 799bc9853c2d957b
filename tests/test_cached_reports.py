"""What a cached artefact computes in a later process is right, and what it says is what the first one was told."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from fx_quant.reasons import Kind, Unmet
from fx_quant.report import BreakReport, MissReport, RecognisedReport, Report, SiteReport, UnseenReport

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(900)  # the first test waits for all four processes


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each process said: the first, two with its caches, one with its package of artefacts alone."""
    folder = tmp_path_factory.mktemp("first")
    jobs = {
        "first": ("caches", "save", "aot"),
        "aot": ("caches", "plain", "aot"),
        "noaot": ("caches", "plain", "noaot"),
        "another": ("other", "load", "aot"),
    }
    arguments = [f"{folder / caches},{mode},{folder / 'package'},{cache}" for caches, mode, cache in jobs.values()]
    out = subprocess.run(
        [sys.executable, "-m", "tests.cached_process", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert out.returncode == 0, out.stderr
    return dict(zip(jobs, map(json.loads, out.stdout.splitlines()), strict=True))


def test_the_first_process_compiles_all(said):
    assert said["first"]["hits"] == [0, 0]
    assert said["first"]["counters"] == {"rewritten": 3, "recognised": 0, "missed": 1}
    missed = "WARNING aten.mm left as it is at 0: the scale of b varies along k"
    assert sum(missed in each for each in said["first"]["lines"]) == 1
    assert "INFO graph 0/0: 1 of 2 quantized matmuls rewritten on " in said["first"]["lines"][0]


@pytest.mark.parametrize("cache", ["aot", "noaot"])
def test_a_cached_artefact_runs_in_a_second_process_and_says_what_the_first_said(said, cache):
    """From AOTAutograd's cache no pass runs at all; from Inductor's alone it does."""
    first, again = said["first"], said[cache]
    assert again["hits"][cache == "aot"] > 0
    assert (again["counters"], without_source(again)) == (first["counters"], without_source(first))
    assert sum("from a cache" in line for line in again["lines"]) == (3 if cache == "aot" else 0)


def without_source(process):
    """What a process logged, wherever its graphs came from."""
    return [line.replace(" from a cache", "") for line in process["lines"]]


def test_another_machine_with_the_package_of_artefacts_says_the_same(said):
    first, again = said["first"], said["another"]
    assert again["hits"][1] == 3
    assert (again["counters"], without_source(again)) == (first["counters"], without_source(first))


UNMET = {
    "cpu_int8_avx2": (Unmet(Kind.FEATURE, "needs cpp_compiler, which x86 has not", "cpp_compiler"),),
    "cpu_float8_decoded": (Unmet(Kind.CODES, "has no int8 x int8 matmul"), Unmet(Kind.MAX_K, "needs k <= 4, got k=8")),
    "pytorch_int_mm": (),
}
LOST = "cpu_int8_avx2"
REPORT = Report(
    "x86",
    (SiteReport("a.0", "f.py:1", "aten.mm", "s", "2..", 3, 4, "float32", "k", "none", "exact", "", UNMET, lost=LOST),),
    (MissReport("b", "", "aten.mm", "mm", "reason"), MissReport.of_graph("why")),
    (
        RecognisedReport("c", "", "op", "", "", None, None, "reason", UNMET),
        *(RecognisedReport("c", "", "op", "", "", None, None, "reason", {}),),
    ),
    graph_breaks=1,
    unseen=(UnseenReport("d", "Linear4bit", False),),
    breaks=(BreakReport("g.py:2", "why", 1),),
)


def test_a_report_survives_json():
    again = Report.from_json(REPORT.to_json())
    assert again == REPORT
    assert str(again) == str(REPORT)
    assert "not chosen:\n  cpu_int8_avx2: needs cpp_compiler, which x86 has not\n  pytorch_int_mm" in str(again)
    assert again.lost_to_compiler() == ["cpu_int8_avx2"]


def test_json_has_the_reasons_by_kind_and_in_words_once_for_all_rows():
    data = json.loads(REPORT.to_json())
    assert [row["verdicts"] for row in (*data["sites"], *data["recognised"])] == [0, 0, 1]
    assert data["verdicts"] == [
        {
            "cpu_int8_avx2": [
                {"kind": "feature", "text": "needs cpp_compiler, which x86 has not", "name": "cpp_compiler"}
            ],
            "cpu_float8_decoded": [
                {"kind": "codes", "text": "has no int8 x int8 matmul"},
                {"kind": "max_k", "text": "needs k <= 4, got k=8"},
            ],
            "pytorch_int_mm": [],
        },
        {},
    ]
