"""What makes the C++ of tests quick to compile: most of that time went to probes, headers, PyTorch's symbols and -O3."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch._inductor.cpp_builder as cpp_builder
from torch._inductor.cpu_vec_isa import VecISA
from torch._inductor.runtime.cache_dir_utils import cache_dir

from fx_quant import compat

LIBRARIES = ("torch", "torch_cpu", "torch_python")
LINKED = "".join(f"-l{library} " for library in LIBRARIES)
# A source, how it is compiled and what becomes of it, as Inductor writes it.
COMPILED = re.compile(r"(\S+) (\S+\.cpp) (.* )-o (\S+\.so) .*")
INCLUDE = re.compile(r"^#include <.*>$", re.MULTILINE)
# What takes the compiler least time of all levels: without it intrinsics are calls, and above it passes take twice as long.
QUICK = {"O3": "Og", "g1": None}

_shipped = contextvars.ContextVar("_shipped", default=False)


@contextlib.contextmanager
def compile_as_shipped() -> Iterator[None]:
    """What is compiled meanwhile is optimised as it is for users."""
    token = _shipped.set(True)
    try:
        yield
    finally:
        _shipped.reset(token)


def compile_quickly() -> None:
    """Lets Inductor's compiles, and those of native code, link and include by ``_linked`` and ``_included``.

    What Inductor makes of a graph is hardly optimised, but ``compile_as_shipped``: no value depends on that, as both levels keep to
    what the source says of floats. The native kernels of eager calls, the same sources, are compiled as they are shipped.

    Inductor takes what this CPU says it has, but for AMX on float16, which compilers may not know yet: that spares each
    process six C++ files, and a process for each of these. ``TORCHINDUCTOR_VEC_ISA_OK`` alone leaves out the first probe
    of each instruction set.
    """
    VecISA.check_build = lambda _, code: "_tile_dpfp16ps" not in code  # type: ignore[method-assign]
    flags, load = cpp_builder._get_optimization_cflags, compat.load_cpp

    def quick_flags(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        compiler, linker = flags(*args, **kwargs)
        if not _shipped.get():
            compiler = [quick for flag in compiler if (quick := QUICK.get(flag, flag))]
        return compiler, linker

    cpp_builder._get_optimization_cflags = quick_flags
    compat.load_cpp = compile_as_shipped()(load)
    run = cpp_builder.run_compile_cmd
    cpp_builder.run_compile_cmd = lambda command, cwd: run(_included(_linked(command)), cwd)


def _linked(command: str) -> str:
    """A library that names PyTorch's, which the process has loaded, and that finds their symbols when it is loaded."""
    if LINKED not in command:
        return command
    return command.replace(LINKED, f"-L{_empty_libraries()} -Wl,--no-as-needed {LINKED}")


def _empty_libraries() -> Path:
    """A folder with a library of no symbols for each of PyTorch's, under its name."""
    folder = Path(cache_dir(), "empty_libraries")
    for library in LIBRARIES:
        name = f"lib{library}.so"
        _made(folder / name, f"{cpp_builder.get_cpp_compiler()} -shared -x c++ /dev/null -Wl,-soname,{name}")
    return folder


def _included(command: str) -> str:
    """What a source of ours includes is compiled once for all sources that include the same, as Inductor's own header is."""
    compiled = COMPILED.fullmatch(command.strip())
    if compiled is None or "-include" in command:
        return command
    compiler, source, flags, _ = compiled.groups()
    lines = sorted(set(INCLUDE.findall(Path(source).read_text())))
    if "#include <immintrin.h>" not in lines or any("<torch/" in line for line in lines):
        return command
    header = _header("\n".join(lines), f"{compiler} -x c++-header {{}} {flags}")
    return command.replace(flags, f"{flags}-include {header} ")


def _header(text: str, command: str) -> Path:
    """A file of ``text`` that is compiled ahead: the compiler takes the text where it cannot take that."""
    folder = Path(cache_dir(), "headers", hashlib.sha256(f"{command}\n{text}".encode()).hexdigest()[:16])
    folder.mkdir(parents=True, exist_ok=True)
    header = folder / "included.h"
    if not header.exists():
        header.write_text(f"{text}\n")
    _made(folder / "included.h.gch", command.format(header))
    return header


def _made(file: Path, command: str) -> None:
    """``file`` as ``command`` writes it, unless it is there; another process may make it too."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder, file.name)
            subprocess.run([*command.split(), "-o", str(made)], check=True, capture_output=True)
            made.replace(file)
