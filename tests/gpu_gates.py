"""What every shipped Triton kernel must compile to: matrix instructions, no spilled registers, memory that fits.

``python -m tests.gpu_gates`` compiles them for GPUs that need not be here, prints the table and compares it with its
goldens of this Triton (``tests/goldens/gpu``); ``--accept`` writes them. Ends with 1 when a gate does not hold.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from fx_quant.kernels.triton.architectures import Architecture, architecture
from fx_quant.kernels.triton.launch import Launch
from tests.cross_compile import Compiled, compile_launch
from tests.gpu_shipped import shipped

GOLDENS = Path(__file__).parent / "goldens" / "gpu"
TARGETS = ("sm80", "sm90", "sm100", "gfx942")

# (architecture, what is multiplied) -> the instruction that must occur, and what must not: the slow way to do it.
_MATRIX = {
    ("sm80", "int8"): (r"IMMA", r"none"),
    ("sm80", "half"): (r"HMMA", r"none"),
    ("sm89", "int8"): (r"IMMA", r"none"),
    ("sm89", "float8"): (r"QMMA", r"HMMA"),
    ("sm89", "half"): (r"HMMA", r"none"),
    ("sm90", "int8"): (r"IGMMA", r"IMMA|HMMA"),
    ("sm90", "float8"): (r"QGMMA", r"HMMA|HGMMA"),
    ("sm90", "half"): (r"HGMMA", r"none"),
    ("sm100", "int8"): (r"UTCIMMA|IMMA", r"HMMA"),
    ("sm100", "float8"): (r"UTCQMMA", r"HMMA"),
    ("sm100", "half"): (r"UTCHMMA", r"none"),
    ("gfx942", "int8"): (r"v_mfma_i32\w*_i8", r"none"),
    ("gfx942", "float8"): (r"v_mfma_f32\w*_(?:fp8|bf8)_(?:fp8|bf8)", r"none"),
    ("gfx942", "half"): (r"v_mfma_f32\w*_(?:f16|bf16)", r"none"),
}


@dataclass(frozen=True)
class Gated:
    """One shipped launch on one architecture, compiled.

    Args:
        name: kernel, recipe and configuration.
        on: name of the architecture.
        compiled: what it became, or None where the compiler failed.
        broken: gates that do not hold.
    """

    name: str
    on: str
    compiled: Compiled | None
    broken: tuple[str, ...]

    def row(self) -> tuple[object, ...]:
        """The table's row: everything that Triton decides, nothing that the machine does."""
        found = self.compiled
        if found is None:
            return (self.name, self.on, "failed", "", "", "", "")
        counts = ", ".join(f"{name} {found.instructions[name]}" for name in matrix_instructions(found))
        return (self.name, self.on, found.registers, found.spilled, found.shared, found.warps, counts)


def matrix_instructions(found: Compiled) -> list[str]:
    """The names of those that multiply matrices, load tiles or specialise warps."""
    wanted = r"(?:[A-Z]*[HQI]G?MMA|UTC\w+|UTMALDG|UTMASTG|USETMAXREG|v_mfma\w+)"
    return sorted(name for name in found.instructions if re.fullmatch(wanted, name))


def broken_gates(launch: Launch, products: str | None, on: Architecture, found: Compiled) -> Iterator[str]:
    """What a compiled launch does not hold, in words."""
    if found.spilled:
        yield f"spills {found.spilled} bytes"
    if found.shared > on.shared_bytes:
        yield f"needs {found.shared} bytes of shared memory, there are {on.shared_bytes}"
    if products is not None:
        wanted, unwanted = _MATRIX[on.name, products]
        names = matrix_instructions(found)
        if not any(re.fullmatch(wanted, name) for name in names):
            yield f"multiplies by {', '.join(names) or 'no matrix instruction'}, not {wanted}"
        slow = [name for name in names if re.fullmatch(unwanted, name)]
        if slow:
            yield f"multiplies by {', '.join(slow)}"
    specialized = launch.configuration is not None and launch.configuration.warp_specialized
    if specialized and on.name == "sm90" and not found.instructions.get("USETMAXREG"):
        yield "is not warp-specialised"


def gated(name: str, target: str) -> Gated:
    """Compile one shipped launch, by its name, for one architecture."""
    on = architecture(target)
    kernel = next(each for each in shipped(on) if each.name == name)
    launch = kernel.launch()
    try:
        found = compile_launch(launch, on)
    except Exception as error:  # noqa: BLE001  (a compiler raises whatever it likes)
        return Gated(name, target, None, (f"does not compile: {type(error).__name__}: {str(error).splitlines()[0]}",))
    return Gated(name, target, found, tuple(broken_gates(launch, kernel.products, on, found)))


def names(targets: Sequence[str]) -> list[tuple[str, str]]:
    """Every shipped launch with every architecture that it is for."""
    return [(each.name, target) for target in targets for each in shipped(architecture(target))]


def all_gated(targets: Sequence[str], jobs: int) -> list[Gated]:
    """Everything shipped for ``targets``, compiled by as many processes as ``jobs``."""
    asked = names(targets)
    if jobs == 1:
        return [gated(*each) for each in asked]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(gated, *zip(*asked, strict=True), chunksize=4))


def table(found: Sequence[Gated]) -> str:
    """Kernel by architecture: registers, spilled and shared bytes, warps, instructions."""
    headers = ("kernel", "on", "registers", "spilled", "shared", "warps", "instructions")
    return tabulate([each.row() for each in found], headers=headers, disable_numparse=True) + "\n"


@functools.cache
def triton_version() -> str:
    """Major and minor, which decide what is compiled."""
    return ".".join(importlib.metadata.version("triton").split(".")[:2])


def golden(target: str) -> Path:
    """The file of this Triton's table for one architecture."""
    return GOLDENS / f"triton-{triton_version()}" / f"{target}.txt"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_gates", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--accept", action="store_true", help="write the golden of this Triton")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    found = all_gated(options.targets, options.jobs)
    different = []
    for target in options.targets:
        text, path = table([each for each in found if each.on == target]), golden(target)
        print(text)
        if options.accept:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            different.append(str(path))
    broken = [f"{each.name} on {each.on}: {reason}" for each in found for reason in each.broken]
    print("\n".join(broken))
    print(
        f"triton {importlib.metadata.version('triton')}: {len(found)} compiled in {time.perf_counter() - start:.0f} s, "
        f"{len(broken)} gates do not hold"
    )
    if different:
        print(f"not as in {', '.join(different)}: read the difference, then --accept")
        return 1
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
