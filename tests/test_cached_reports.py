"""What a cached artefact computes in a later process is right, and what it says is what the first one was told."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

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


def test_a_report_survives_json():
    report = Report(
        "x86",
        (
            SiteReport(
                "a.0", "f.py:1", "aten.mm", "s", "2..", 3, 4, "float32", "k", "none", "exact", "", {"l": ["r", "s"]}
            ),
        ),
        (MissReport("b", "", "aten.mm", "mm", "reason"),),
        (RecognisedReport("c", "", "op", "", "", None, None, "reason", {}),),
        graph_breaks=1,
        unseen=(UnseenReport("d", "Linear4bit", False),),
        breaks=(BreakReport("g.py:2", "why", 1),),
    )
    assert Report.from_json(report.to_json()) == report
