"""What spares a process the probes of Inductor's: six C++ files for each empty cache, and a process for each of these."""

from __future__ import annotations

from torch._inductor.cpu_vec_isa import VecISA


def believe_this_cpu() -> None:
    """Inductor takes what this CPU says it has, but for AMX on float16, which compilers may not know yet.

    ``TORCHINDUCTOR_VEC_ISA_OK`` alone leaves out the first probe of each instruction set.
    """
    VecISA.check_build = lambda _, code: "_tile_dpfp16ps" not in code  # type: ignore[method-assign]
