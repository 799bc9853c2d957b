"""llama.cpp by its shared libraries: where they are, and a GGUF decoder timed in a process that has no torch.

``python benchmarks/cpu_llama_cpp.py FILE`` reads what ``cpu_models.py`` wrote into FILE: the model, what its logits
must be, and what to time. It answers as that does, in turns. The structs of llama.cpp's interface, to which versions
add, are not spelled out here: one is a block of bytes that llama.cpp fills with its defaults and takes back.
"""

from __future__ import annotations

import array
import ctypes
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_uint8, c_uint32, c_uint64, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

from cpu_process import answer, huge_pages, locked, memory, seconds_of_calls

VARIABLE = "LLAMA_CPP"
ABSENT = (
    f"llama.cpp is looked for below the folder ${VARIABLE}, below node_modules here, and in the Python package "
    "llama_cpp.\nTo get it: npm install --prefix FOLDER @node-llama-cpp/linux-x64 (or linux-arm64), then "
    f"{VARIABLE}=FOLDER."
)


def places() -> list[Path]:
    """Folders in or below which the libraries may be, the user's first."""
    found = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    found += [
        above / "node_modules" / "@node-llama-cpp" for above in (Path.cwd(), Path(__file__).resolve().parent.parent)
    ]
    package = importlib.util.find_spec("llama_cpp")
    return found + [Path(each) / "lib" for each in (package.submodule_search_locations or () if package else ())]


def library() -> Path:
    """The file of ``libllama``.

    Raises:
        ImportError: it is not there; ``ABSENT`` says how to get it.
    """
    for place in places():
        for path in sorted(place.rglob("libllama.*")):
            if ".so" in path.suffixes or path.suffix == ".dylib":
                return path.resolve()
    raise ImportError("no llama.cpp", name="llama.cpp")


def version(path: Path) -> str:
    """Of the library, as its file's name or the npm package's build says it, and which of ggml's for a CPU is used."""
    built, maps = path.parent / "_nlcBuildMetadata.json", Path("/proc/self/maps")
    if built.exists():
        release = str(json.loads(built.read_text())["buildOptions"]["llamaCpp"]["release"])
    else:
        release = path.name.removeprefix("libllama.").removesuffix("so").strip(".")
    cpus = re.findall(r"libggml-cpu-(\w+)\.", maps.read_text()) if maps.exists() else []
    return " ".join(("llama.cpp", release, *dict.fromkeys(cpus))).strip()


class Opaque(ctypes.Structure):
    """A struct of llama.cpp's, larger than any of them, which is passed in memory whatever its size."""

    _fields_ = (("bytes", c_uint8 * 1024),)

    def at(self, kind: Any, offset: int) -> Any:
        """The field of the ctypes ``kind`` at ``offset``."""
        return kind.from_buffer(self, offset)


def _uint32(struct: Opaque, index: int, value: int) -> None:
    struct.at(c_uint32, 4 * index).value = value


_LOAD_MODE = 24  # offset of it in a model's parameters, where there are load modes
_READ = 0  # the load mode that reads the file into memory

# Results and arguments of what is called.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_dev_by_type": (c_void_p, [c_int32]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_load_all_from_path": (None, [c_char_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_threadpool_params_init": (None, [POINTER(Opaque), c_int32]),
    "llama_attach_threadpool": (None, [c_void_p, c_void_p, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_batch_get_one": (Opaque, [POINTER(c_int32), c_int32]),
    "llama_context_default_params": (Opaque, []),
    "llama_decode": (c_int32, [c_void_p, Opaque]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, Opaque]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_model_default_params": (Opaque, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Opaque]),
    "llama_model_size": (c_uint64, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_ubatch": (c_uint32, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
}


def declare(lib: ctypes.CDLL, signatures: Mapping[str, tuple[Any, list[Any]]]) -> None:
    """Give functions of ``lib`` their results and arguments.

    Raises:
        AttributeError: this version has no such function.
    """
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


def loaded(path: Path) -> ctypes.CDLL:
    """The library and those it needs, ggml's among them, with the one for this CPU registered."""
    found = ctypes.CDLL(str(path))
    declare(found, _SIGNATURES)
    found.ggml_backend_load_all_from_path(str(path.parent).encode())
    found.llama_backend_init()
    return found


_CPU = 0  # ggml's type of device


def of_cpu(lib: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any] | None:
    """A function that ggml's library for this CPU gives by ``name``; None where it does not."""
    cpu = lib.ggml_backend_dev_backend_reg(lib.ggml_backend_dev_by_type(_CPU))
    found = lib.ggml_backend_reg_get_proc_address(cpu, name.encode())
    return ctypes.CFUNCTYPE(result, *arguments)(found) if found else None


_POLL, _USUAL = 520, 50  # offset of how long a thread looks out for work, of 100, in what a pool is made of; its value


def threadpool(lib: ctypes.CDLL, threads: int, *, patient: bool = False) -> int | None:
    """Threads that stay, as llama.cpp's own programs make them; None in a build that cannot.

    Args:
        patient: between two graphs they sleep, and so leave the cores to others, instead of looking out for the next.
    """
    new, wanted = of_cpu(lib, "ggml_threadpool_new", c_void_p, POINTER(Opaque)), Opaque()
    lib.ggml_threadpool_params_init(ctypes.byref(wanted), threads)
    poll = wanted.at(c_uint32, _POLL)
    if patient and poll.value == _USUAL:
        poll.value = 0
    return None if new is None else new(ctypes.byref(wanted))


class Session:
    """A model of a GGUF file, and its cache.

    Args:
        context: tokens that the cache holds, and the most that are fed at once.
        mapped: leave the file mapped, as is the default; otherwise it is read, into pages that may be huge.

    Raises:
        RuntimeError: llama.cpp could not load it, or took the sizes as something else.
    """

    def __init__(self, lib: ctypes.CDLL, path: Path, threads: int, context: int, *, mapped: bool = True) -> None:
        self.lib = lib
        wanted = lib.llama_model_default_params()
        if not mapped:
            mode = wanted.at(c_int32, _LOAD_MODE)
            if not hasattr(lib, "llama_load_mode_from_str") or mode.value not in (-1, 1):
                raise RuntimeError("this llama.cpp has no load modes: use v0.5.0 or newer, or leave --huge-pages")
            mode.value = _READ
        self.model = lib.llama_model_load_from_file(str(path).encode(), wanted)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path.name}: see the standard error")
        wanted = lib.llama_context_default_params()
        for index in range(3):  # n_ctx, n_batch, n_ubatch
            _uint32(wanted, index, context)
        self.context = lib.llama_init_from_model(self.model, wanted)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context: see the standard error")
        sizes = [getattr(lib, f"llama_n_{name}")(self.context) for name in ("ctx", "batch", "ubatch")]
        if min(sizes) < context:
            raise RuntimeError(f"llama.cpp must take {context} tokens, got context, batch and micro-batch of {sizes}")
        lib.llama_set_n_threads(self.context, threads, threads)
        pool = threadpool(lib, threads)
        if pool:
            lib.llama_attach_threadpool(self.context, pool, None)
        self.memory = lib.llama_get_memory(self.context)

    def feed(self, ids: Any, count: int, after: int) -> Any:
        """The logits after ``count`` of the int32 ``ids``, which follow the first ``after`` tokens of the cache."""
        if after:
            self.lib.llama_memory_seq_rm(self.memory, 0, after, -1)
        else:
            self.lib.llama_memory_clear(self.memory, False)
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, count))
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        return self.lib.llama_get_logits_ith(self.context, -1)


def relative_error(got: Sequence[float], expected: Sequence[float]) -> float:
    """``norm(got - expected) / norm(expected)``; NaN where one of ``got`` is not finite."""
    squares = math.fsum((y - right) ** 2 for y, right in zip(got, expected, strict=True))
    return math.sqrt(squares / math.fsum(right**2 for right in expected))


def turns(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """First what became of the model, then for each turn the seconds of each phase's calls.

    ``asked`` is what ``cpu_models.hand_over`` writes.
    """
    found, lock = dict(asked["found"]), asked["lock"]
    runs: dict[str, Any] = {}
    try:
        path = Path(asked["library"])
        lib = loaded(path)
        found["runtime"] = version(path)
        found["empty_mib"] = memory("VmRSS")
        with locked(lock, alone=False):
            start = time.perf_counter()
            session = Session(
                lib, Path(asked["gguf"]), asked["threads"], asked["context"], mapped=not asked["huge_pages"]
            )
            found["prepare_s"] += time.perf_counter() - start
            found["weights_mib"] = lib.llama_model_size(session.model) / 2**20
        for phase, given in asked["phases"].items():
            ids = (c_int32 * len(given["ids"]))(*given["ids"])
            runs[phase] = partial(session.feed, ids, len(ids), given["after"])
        errors, own = [], []
        found["compile_s"] = 0.0
        for phase, run in runs.items():
            with locked(lock, alone=False):
                start = time.perf_counter()
                logits = run()
                found["compile_s"] += time.perf_counter() - start
            for kind, to in (("float", errors), ("decoded", own)):
                expected = array.array("f", Path(asked["phases"][phase][kind]).read_bytes())
                to.append(relative_error(logits[: len(expected)], expected))
        found["error"], found["own_error"] = max(errors), max(own)
        found["peak_mib"] = memory("VmHWM")
        found["steady_mib"], found["file_mib"] = memory("VmRSS"), memory("RssFile")
        found["huge_mib"] = huge_pages()
        right = found["own_error"] <= asked["tolerance"]
        found["status"] = "ok" if right else "wrong"
    except Exception as error:  # noqa: BLE001  (a peer may fail in any way; the table says how)
        found["status"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    yield found
    while found["status"] in ("ok", "wrong"):
        with locked(lock, alone=True):
            taken = {phase: seconds_of_calls(run, asked["seconds"]) for phase, run in runs.items()}
        yield taken


if __name__ == "__main__":
    answer(turns(json.loads(Path(sys.argv[1]).read_text())))
