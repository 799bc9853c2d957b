"""Processes that have imported torch and nothing else: what an import loads can be asked of them without waiting for torch."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# A process for each line, forked from one that has imported torch alone.
SERVER = """
import json, os, sys
import torch
for line in sys.stdin:
    child = os.fork()
    if not child:
        for descriptor, file in enumerate(sys.argv[1:], 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        code, *sys.argv[1:] = json.loads(line)
        exec(code, {"__name__": "__main__"})
        sys.exit()
    print(os.waitpid(child, 0)[1], flush=True)
"""


@contextlib.contextmanager
def torch_alone() -> Iterator[Callable[..., str]]:
    """What runs code, with arguments, in a process of its own and returns what it prints.

    Code that raises is an AssertionError.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "out", Path(folder) / "errors"
        command = [sys.executable, "-c", SERVER, str(out), str(errors)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin and server.stdout

            def printed(code: str, *arguments: str) -> str:
                server.stdin.write(json.dumps([code, *arguments]) + "\n")
                server.stdin.flush()
                status = server.stdout.readline()
                assert status == "0\n", errors.read_text()
                return out.read_text()

            yield printed
