"""ggml's matmuls, those of llama.cpp, as ways to run a quantized linear: a graph of one ``mul_mat`` for each layer.

The weight is in Q8_0 or Q4_0 blocks, in the layout that llama.cpp would choose on this CPU; the activation is float32,
which ggml quantizes itself, by blocks of 32.

With AMX, ggml configures the tiles of a thread once and for all, while PyTorch's and our kernels configure them as they
need them and release them: in a thread that both share, ggml's next tile instruction is an illegal one. So what may use
tiles is called in a thread of its own, which costs a call some tens of microseconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_bool, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import cpu_llama_cpp
import torch
from cpu_cases import Case, Operands
from cpu_gguf import BLOCK, F32, TYPES, Blocks, quantized
from cpu_peers import Call, Way
from torch import Tensor


class _Init(ctypes.Structure):
    """What a ggml context is made of: room for the descriptions of tensors and graphs, or for their data too."""

    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


_ROOM = 4 << 20  # bytes that describe a graph and the tensors of any case
_ROWS = 512  # of the activation for which llama.cpp asks whether a layout is supported

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_add_inplace": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_graph_compute": (c_int32, [c_void_p, c_void_p]),
    "ggml_backend_tensor_alloc": (c_int32, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_init": (c_void_p, [_Init]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_new_tensor_1d": (c_void_p, [c_void_p, c_int32, c_int64]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int32, c_int64, c_int64]),
}


@dataclass(frozen=True)
class _Cpu:
    lib: Any
    device: int
    backend: int
    layouts: tuple[int, ...]

    def context(self) -> int:
        """Where tensors are described, and their data is not."""
        return self.lib.ggml_init(_Init(_ROOM, None, True))


@cache
def _cpu(threads: int) -> _Cpu:
    """Ggml on this CPU, with ``threads``, and its layouts of weights, preferred ones first.

    Raises:
        ImportError: there is no llama.cpp.
    """
    lib = cpu_llama_cpp.loaded(cpu_llama_cpp.library())
    cpu_llama_cpp.declare(lib, _SIGNATURES)
    device = lib.ggml_backend_dev_by_type(0)
    backend = lib.ggml_backend_dev_init(device, None)
    set_threads = cpu_llama_cpp.of_cpu(lib, "ggml_backend_set_n_threads", None, c_void_p, c_int32)
    set_pool = cpu_llama_cpp.of_cpu(lib, "ggml_backend_cpu_set_threadpool", None, c_void_p, c_void_p)
    pool = cpu_llama_cpp.threadpool(lib, threads, patient=True)
    assert set_threads is not None
    set_threads(backend, threads)
    if set_pool is not None and pool:
        set_pool(backend, pool)
    extra = cpu_llama_cpp.of_cpu(lib, "ggml_backend_dev_get_extra_bufts", POINTER(c_void_p), c_void_p)
    layouts = []
    if extra is not None:
        for layout in extra(device):  # a list that ends with a null
            if not layout:
                break
            layouts.append(layout)
    return _Cpu(lib, device, backend, (*layouts, lib.ggml_backend_dev_buffer_type(device)))


def blocks(each: Operands, kind: str) -> Blocks:
    """The weight in blocks: its own codes where Q4_0 can hold them, and quantized anew where not."""
    if kind == "Q4_0" and each.zero_point is None and each.block == (1, BLOCK):
        codes = torch.stack((each.codes & 0xF, each.codes >> 4), -1).flatten(1).to(torch.int8) - 8
        return Blocks(kind, codes.unflatten(1, (-1, BLOCK)), each.scale.half())
    return quantized(each.weight, kind)


@dataclass(frozen=True)
class _Weight:
    """A tensor, whether its layout is for AMX, and the bias."""

    tensor: int
    tiles: bool
    bias: Tensor | None


def _weight(cpu: _Cpu, each: Operands, kind: str) -> _Weight:
    """The weight, in the first layout that multiplies it."""
    lib, (n, k) = cpu.lib, each.weight.shape
    stored = blocks(each, kind).stored().contiguous()
    for layout in cpu.layouts:
        context, scratch = cpu.context(), cpu.context()
        weight = lib.ggml_new_tensor_2d(context, TYPES[kind], k, n)
        buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, layout)
        x = lib.ggml_new_tensor_2d(scratch, F32, k, _ROWS)
        if lib.ggml_backend_dev_supports_op(cpu.device, lib.ggml_mul_mat(scratch, weight, x)):
            lib.ggml_backend_tensor_set(weight, stored.data_ptr(), 0, stored.nbytes)
            return _Weight(weight, lib.ggml_backend_buft_name(layout) == b"AMX", each.bias)
        lib.ggml_backend_buffer_free(buffer)
    raise RuntimeError(f"ggml has no matmul of {kind} with n = {n}, k = {k} here")


def _prepare(case: Case, layers: Sequence[Operands], *, kind: str) -> list[_Weight]:
    cpu = _cpu(case.threads)
    return [_weight(cpu, each, kind) for each in layers]


def _placed(cpu: _Cpu, tensor: int, data: Tensor) -> None:
    """Let ggml's ``tensor`` be the memory of ``data``, which must outlive it."""
    buffer = cpu.lib.ggml_backend_cpu_buffer_from_ptr(data.data_ptr(), data.nbytes)
    cpu.lib.ggml_backend_tensor_alloc(buffer, tensor, data.data_ptr())


@cache
def _apart() -> ThreadPoolExecutor:
    """The thread whose tiles are ggml's."""
    return ThreadPoolExecutor(1)


def _finish(case: Case, state: list[_Weight], x: Tensor) -> Call:
    cpu = _cpu(case.threads)
    lib, context, m = cpu.lib, cpu.context(), x.shape[0]
    graph, a = lib.ggml_new_graph(context), lib.ggml_new_tensor_2d(context, F32, case.k, m)
    _placed(cpu, a, x)
    outputs = [torch.empty(m, case.n) for _ in state]
    for weight, out in zip(state, outputs, strict=True):
        y = lib.ggml_mul_mat(context, weight.tensor, a)
        _placed(cpu, y, out)
        if weight.bias is not None:
            b = lib.ggml_new_tensor_1d(context, F32, case.n)
            _placed(cpu, b, weight.bias)
            y = lib.ggml_add_inplace(context, y, b)
        lib.ggml_build_forward_expand(graph, y)
    tiles = m > 1 and any(weight.tiles for weight in state)  # a single row is multiplied without

    def call(given: Tensor) -> list[Tensor]:
        if given.data_ptr() != x.data_ptr():
            raise ValueError("the graph is of one activation's memory; finish another for another")
        if tiles:
            status = _apart().submit(lib.ggml_backend_graph_compute, cpu.backend, graph).result()
        else:
            status = lib.ggml_backend_graph_compute(cpu.backend, graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute gave {status}")
        return outputs

    return call


def _way(kind: str, *schemes: str) -> Way:
    prepare = partial(_prepare, kind=kind)
    name = f"llama.cpp {kind}"
    return Way(name, "llama.cpp", prepare, _finish, schemes, exact=False, per_m=True, dtypes=("float32",))


GGML_WAYS: tuple[Way, ...] = (_way("Q8_0", "w8a8"), _way("Q4_0", "w4a8-g32"))
