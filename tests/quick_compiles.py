"""What makes the C++ of tests quick to compile: half of that time went to probes, headers and PyTorch's symbols."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

import torch._inductor.cpp_builder as cpp_builder
from torch._inductor.cpu_vec_isa import VecISA
from torch._inductor.runtime.cache_dir_utils import cache_dir

LIBRARIES = ("torch", "torch_cpu", "torch_python")
LINKED = "".join(f"-l{library} " for library in LIBRARIES)
# A source, how it is compiled and what becomes of it, as Inductor writes it.
COMPILED = re.compile(r"(\S+) (\S+\.cpp) (.* )-o (\S+\.so) .*")
INCLUDE = re.compile(r"^#include <.*>$", re.MULTILINE)


def compile_quickly() -> None:
    """Lets Inductor's compiles, and those of native code, link and include by ``_linked`` and ``_included``.

    Inductor takes what this CPU says it has, but for AMX on float16, which compilers may not know yet: that spares each
    process six C++ files, and a process for each of these. ``TORCHINDUCTOR_VEC_ISA_OK`` alone leaves out the first probe
    of each instruction set.
    """
    VecISA.check_build = lambda _, code: "_tile_dpfp16ps" not in code  # type: ignore[method-assign]
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
