"""What a cached artefact computes in a later process is right, and what it says is what the first one was told."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fx_quant.reasons import Kind, Unmet
from fx_quant.report import BreakReport, MissReport, RecognisedReport, Report, SiteReport, UnseenReport

SCRIPT = pathlib.Path(__file__).with_name("cached_process.py")


def process(directory, *arguments):
    out = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(directory)},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(out.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """``(directory, package of artefacts, what the process said)`` of a process that found empty caches."""
    directory = tmp_path_factory.mktemp("first")
    said = process(directory / "caches", "save", directory / "package", "aot")
    assert said["hits"] == [0, 0]
    assert said["counters"] == {"rewritten": 3, "recognised": 0, "missed": 1}
    assert (
        sum("WARNING aten.mm left as it is at 0: the scale of b varies along k" in each for each in said["lines"]) == 1
    )
    return directory, said


@pytest.mark.parametrize("cache", ["aot", "noaot"])
def test_a_cached_artefact_runs_in_a_second_process_and_says_what_the_first_said(first, cache):
    """From AOTAutograd's cache no pass runs at all; from Inductor's alone it does."""
    directory, said = first
    again = process(directory / "caches", "plain", directory / "package", cache)
    assert again["hits"][cache == "aot"] > 0
    assert (again["counters"], again["lines"]) == (said["counters"], said["lines"])


def test_another_machine_with_the_package_of_artefacts_says_the_same(first, tmp_path):
    directory, said = first
    again = process(tmp_path, "load", directory / "package", "aot")
    assert again["hits"][1] == 3
    assert (again["counters"], again["lines"]) == (said["counters"], said["lines"])


UNMET = {
    "cpu_int8_avx2": (Unmet(Kind.FEATURE, "needs cpp_compiler, which x86 has not", "cpp_compiler"),),
    "cpu_float8_decoded": (Unmet(Kind.CODES, "has no int8 x int8 matmul"), Unmet(Kind.MAX_K, "needs k <= 4, got k=8")),
    "pytorch_int_mm": (),
}
REPORT = Report(
    "x86",
    (SiteReport("a.0", "f.py:1", "aten.mm", "s", "2..", 3, 4, "float32", "k", "none", "exact", "", UNMET),),
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


def test_json_has_the_reasons_as_texts_and_their_kinds_beside_them():
    (site,) = json.loads(REPORT.to_json())["sites"]
    assert site["losers"] == {
        "cpu_int8_avx2": ["needs cpp_compiler, which x86 has not"],
        "cpu_float8_decoded": ["has no int8 x int8 matmul", "needs k <= 4, got k=8"],
        "pytorch_int_mm": ["can run, lower priority"],
    }
    assert site["unmet"] == {
        "cpu_int8_avx2": [{"kind": "feature", "name": "cpp_compiler"}],
        "cpu_float8_decoded": [{"kind": "codes"}, {"kind": "max_k"}],
        "pytorch_int_mm": [],
    }


def test_a_report_that_was_saved_without_kinds_is_read_with_its_texts():
    data = json.loads(REPORT.to_json())
    for row in (*data["sites"], *data["recognised"]):
        del row["unmet"]
    report = Report.from_json(json.dumps(data))
    assert [site.losers for site in report.sites] == [site.losers for site in REPORT.sites]
    assert {unmet.kind for site in report.sites for each in site.unmet.values() for unmet in each} == {Kind.UNKNOWN}
    assert report.lost_to_compiler() == []
    assert "cpu_float8_decoded: has no int8 x int8 matmul" in str(report)
    assert (report.misses, report.unseen, report.breaks) == (REPORT.misses, REPORT.unseen, REPORT.breaks)
