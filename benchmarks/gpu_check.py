"""Everything that a GPU machine is asked, in one command without network access: tests, benchmark, report.

``make gpu-check [SECTIONS="linears chains"] [ARGS="--recipes row --rows 1 16"]`` runs the GPU tests with whatever
pytest is there, then each section of ``gpu.py`` in a process of its own, and writes all that was found to
``benchmarks/results/<device>/report.txt``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gpu

ROOT = Path(__file__).resolve().parent.parent
# Options of plugins that may not be there are not read, and an unknown one is no error.
PYTEST = ("-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-ra", "-p", "no:cacheprovider")


def gpu_tests() -> list[str]:
    """Files with tests for a GPU. The others are not even imported: they need packages that may not be there."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file) for file in files if "@pytest.mark.gpu\n" in file.read_text()]


def environment() -> dict[str, str]:
    """That of a process which finds the package in this checkout."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def said(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of a Python command, which is also printed as it comes."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Test, measure and report; 1 where a test failed or a result of ours was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="*", choices=gpu.SECTIONS, default=gpu.SECTIONS, metavar="NAME")
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    options, others = parser.parse_known_args(arguments)
    reason = gpu.missing_gpu()
    if reason is not None:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 1
    path = gpu.default_path()
    failed, parts = 0, []
    if not options.no_tests:
        status, output = said((*PYTEST, *gpu_tests()))
        failed |= status
        parts.append(f"tests, exit status {status}:\n" + "\n".join(output.splitlines()[-40:]))
    for section in options.sections:
        status, _ = said(
            [str(ROOT / "benchmarks" / "gpu.py"), "run", "--sections", section, "--json", str(path), *others]
        )
        failed |= status
    found = json.loads(path.read_text()) if path.exists() else {"machine": gpu.described(), "rows": []}
    parts.insert(0, gpu.report(found["rows"], found["machine"]))
    written = path.with_name("report.txt")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text("\n\n".join(parts) + "\n")
    print(f"\ngpu-check: {'FAILED' if failed else 'passed'}; report in {written}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
