"""Our native micro-kernels: what each needs, its source, and how an eager call runs it.

The sources (``kernels/cpu/source``) are compiled on first use with Inductor's C++ toolchain and kept in its cache;
compiled graphs paste the same sources into their templates (``lowerings/cpu_template.py``).
"""

from __future__ import annotations

import ctypes
import functools
import string
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from fx_quant.kernels.cpu.plans import PlanTable, table
from fx_quant.target import cpu_features


def source(*names: str) -> str:
    """The text of files of ``kernels/cpu/source``, one after the other."""
    folder = resources.files("fx_quant.kernels.cpu") / "source"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


@dataclass(frozen=True)
class Dot:
    """One dtype that operands are multiplied in: how the native code calls it, and what the machine must have.

    Args:
        name: of the rendered kernel.
        struct: the C++ struct that the tile is instantiated with.
        source: the native code.
        acc_dtype: dtype of the accumulator.
        features: instruction sets, as a target has them.
        vector_bits: width of the registers, which the vectors of a fused epilogue must have at least; 0 for any.
        rows: of a tile at most.
        layout: of the weight, which is in panels; None where it is ``[n, k]`` as it is stored.
    """

    name: str
    struct: str
    source: str
    acc_dtype: torch.dtype
    features: frozenset[str]
    vector_bits: int
    rows: int = 6
    layout: str | None = "vnni"

    @property
    def packed(self) -> bool:
        """Whether the weight is in panels."""
        return self.layout is not None

    @property
    def kind(self) -> str:
        """What its plans are called in ``plans.py``."""
        return self.name.removeprefix("fxq_")

    def exists_here(self) -> bool:
        """Whether this machine has the instructions, and PyTorch is let use them."""
        return self.features <= _features_here()


@functools.cache
def _features_here() -> frozenset[str]:
    return cpu_features()


AVX512 = "avx512f,avx512bw,avx512dq,avx512vl"
TILE = ("share.h", "tile.h")


def for_target(instructions: str, *names: str) -> str:
    """Files of ``kernels/cpu/source``, compiled for ``instructions`` as compilers call them."""
    target = f'#define FXQ_TARGET __attribute__((target("{instructions}")))'
    return f"{target}\n#define FXQ_INLINE FXQ_TARGET __attribute__((always_inline)) inline\n{source(*names)}"


INT8_AMX = Dot(
    name="fxq_int8_amx",
    struct="FxqInt8Amx",
    source="#define FXQ_AMX\n" + for_target(f"{AVX512},amx-tile,amx-int8", "share.h", "amx.h", "int8_amx.h"),
    acc_dtype=torch.int32,
    features=frozenset({"avx512", "avx512_vnni", "amx"}),
    vector_bits=512,
    rows=32,
    layout="amx",
)
INT8_VNNI = Dot(
    name="fxq_int8_vnni",
    struct="FxqInt8",
    source=for_target(f"{AVX512},avx512vnni", "avx512.h", "int8_vnni.h", *TILE),
    acc_dtype=torch.int32,
    features=frozenset({"avx512", "avx512_vnni"}),
    vector_bits=512,
)
INT8_AVX512 = Dot(
    name="fxq_int8_avx512",
    struct="FxqInt8Avx512",
    source=for_target(AVX512, "avx512.h", "int8_avx512.h", *TILE),
    acc_dtype=torch.int32,
    features=frozenset({"avx512"}),
    vector_bits=512,
)
INT8_AVX_VNNI = Dot(
    name="fxq_int8_avx_vnni",
    struct="FxqInt8AvxVnni",
    source=for_target("avx2,fma,avxvnni", "int8_avx2.h", "int8_avx_vnni.h", *TILE),
    acc_dtype=torch.int32,
    features=frozenset({"avx2", "avx_vnni"}),
    vector_bits=256,
)
INT8_AVX2 = Dot(
    name="fxq_int8_avx2",
    struct="FxqInt8Avx2",
    source=for_target("avx2,fma", "int8_avx2.h", *TILE),
    acc_dtype=torch.int32,
    features=frozenset({"avx2"}),
    vector_bits=256,
)
INT8_PORTABLE = Dot(
    name="fxq_int8_portable",
    struct="FxqInt8Portable",
    source=source("share.h", "int8_portable.h"),
    acc_dtype=torch.int32,
    features=frozenset(),
    vector_bits=0,
    rows=4,
    layout=None,
)
BFLOAT16 = Dot(
    name="fxq_bf16",
    struct="FxqBf16",
    source=for_target(f"{AVX512},avx512bf16", "avx512.h", "bf16.h", *TILE),
    acc_dtype=torch.float32,
    features=frozenset({"avx512", "avx512_bf16"}),
    vector_bits=512,
    layout="bf16_pairs",
)
FLOAT32 = Dot(
    name="fxq_float32",
    struct="FxqFloat32",
    source=for_target(AVX512, "avx512.h", "float32.h", *TILE),
    acc_dtype=torch.float32,
    features=frozenset({"avx512"}),
    vector_bits=512,
    layout="columns",
)

# Goes before the source of every kernel.
PLAN = source("plan.h")

# What one thread does of a matmul by ``fxq_tile``, in eager calls and in compiled graphs (``lowerings``).
# ``$sums`` declares ``acc``, ``$panel`` says where a panel starts, and ``$store`` takes the tile ``acc`` of rows
# ``m_start`` to ``m_end`` to where it belongs.
TILE_LOOP = string.Template(r"""        [[maybe_unused]] $dot::State state;
        $sums
        const auto sums = acc;
        const FxqPasses passes(share.row_end - share.row_begin, K * sizeof($dot::A));
        for (int64_t pass = 0; pass < passes.count; pass++) {
            const int64_t first = share.row_begin + passes.start(pass);
            const int64_t rows = share.row_begin + passes.start(pass + 1) - first;
            // Blocks of nearly equal height: 7 rows are 4 + 3, not 6 + 1.
            const int64_t blocks = (rows + $rows - 1) / $rows;
            const FxqParts parts(plan, blocks, K);
            const FxqTileRows<$dot> activation(a + first * lda, lda, rows, blocks, K);
            for (int64_t panel = share.panel_begin; panel < share.panel_end; panel++) {
$panel
                for (int64_t i = 0; i < parts.count; i++) {
                    const FxqPart part = parts[i];
                    for (int64_t index = 0; index < blocks; index++) {
                        const int64_t row = rows * index / blocks, end = rows * (index + 1) / blocks;
                        const auto acc = parts.count == 1 ? sums : sums + row * FXQ_PANEL;
                        fxq_tile<$dot>(
                            state, plan, activation, {row, end - row, index, blocks},
                            std::min(FXQ_PANEL, N - panel * FXQ_PANEL), b + panel * panel_size, part, acc);
                        if (part.to < K) {
                            continue;
                        }
                        const int64_t m_start = first + row, m_end = first + end;
$store
                    }
                }
            }
        }
""")

_EAGER = string.Template(r"""
#include <omp.h>
$plan
$source
extern "C" __attribute__((visibility("default")))
void fxq_matmul(
    const void* a_, int64_t lda, const void* b_, int64_t M, int64_t N, int64_t K, void* out_,
    const FxqPlan* plans, int64_t threads)
{
    using Dot = $dot;
    const auto a = static_cast<const Dot::A*>(a_);
    const auto b = static_cast<const Dot::B*>(b_);
    const auto out = static_cast<Dot::Acc*>(out_);
    const int64_t panels = (N + FXQ_PANEL - 1) / FXQ_PANEL;
    const int64_t panel_size = (K + Dot::GROUP - 1) / Dot::GROUP * FXQ_PANEL * Dot::GROUP;
    const FxqPlan& plan = fxq_plan(plans, M);
    #pragma omp parallel num_threads(fxq_threads(plan, M, N, K, threads))
    {
        const FxqShare share = fxq_share(M, panels, omp_get_num_threads(), omp_get_thread_num(), Dot::ROWS);
$loop    }
}
""")
_EAGER_LOOP = TILE_LOOP.substitute(
    dot="Dot",
    rows="Dot::ROWS",
    sums="alignas(64) Dot::Acc acc[FXQ_CHUNK_ROWS * FXQ_PANEL];",
    panel="                const int64_t n_start = panel * FXQ_PANEL, width = std::min(FXQ_PANEL, N - n_start);",
    store="""                        for (int64_t r = m_start; r < m_end; r++) {
                            const auto row = acc + (r - m_start) * FXQ_PANEL;
                            std::memcpy(out + r * N + n_start, row, width * sizeof(Dot::Acc));
                        }""",
)


def load(name: str, code: str) -> Any | None:
    """``code`` compiled for this machine, as a ``ctypes`` library; None, with a warning, where that fails."""
    from fx_quant.compat import load_cpp

    try:
        return load_cpp(code)
    except Exception as error:  # noqa: BLE001  (a compiler may fail in any way)
        warnings.warn(
            f"fx_quant: {name} could not be compiled ({error!r}); eager calls unpack the weight each time, slowly. "
            "Install a C++ compiler (g++ or clang++) or set CXX.",
            stacklevel=3,
        )
        return None


@functools.cache
def compiled(dot: Dot) -> Callable[..., None] | None:
    """The eager entry point of ``dot``, compiled once; None, with a warning, where that fails."""
    library = load(dot.name, eager_source(dot))
    return None if library is None else entry_point(library)


def eager_source(dot: Dot) -> str:
    """The native code of ``dot`` with the entry point of eager calls."""
    return _EAGER.substitute(plan=PLAN, source=dot.source, dot=dot.struct, loop=_EAGER_LOOP)


def entry_point(library: Any) -> Callable[..., None]:
    """The function of a compiled ``eager_source``.

    ``(a, lda, b, m, n, k, out, plans, threads)``: addresses, and sizes in elements.
    """
    function = library.fxq_matmul
    size, address = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [address, size, address, size, size, size, address, address, size]
    function.restype = None
    return function


def matmul(dot: Dot, a: Tensor, b: Tensor, n: int, plans: PlanTable | None = None) -> Tensor | None:
    """``[m, n]`` accumulator of ``a [m, k]`` and ``b``; None where the native code cannot run.

    ``b`` is packed, or the weight as ``[k, n]`` where ``dot`` takes it so.
    ``plans`` are those in force for ``dot`` unless given.
    """
    if a.device.type != "cpu" or not dot.exists_here():
        return None
    function = compiled(dot)
    if function is None:
        return None
    a = a if a.stride(1) == 1 or a.shape[1] == 1 else a.contiguous()
    b = b if dot.packed else b.t().contiguous()
    m, k = a.shape
    out = a.new_empty((m, n), dtype=dot.acc_dtype)
    if m and n:
        plans = table(dot.kind) if plans is None else plans
        function(a.data_ptr(), a.stride(0), b.data_ptr(), m, n, k, out.data_ptr(), plans.array, torch.get_num_threads())
    return out
