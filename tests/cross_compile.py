"""Compile a launch for a GPU that is not here, and read what the machine code needs and does."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.kernels.triton.launch import Launch

_POINTERS: Mapping[torch.dtype, str] = {
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.float8_e5m2fnuz: "fp8e5b16",
}


@dataclass(frozen=True)
class Compiled:
    """What one launch became.

    Args:
        registers: registers of a thread.
        spilled: bytes of a thread's stack, where what finds no register lies.
        shared: bytes of shared memory of a program.
        warps: warps of a program, those of warp specialization included.
        instructions: how often each machine instruction occurs, by its name without modifiers (``QGMMA``).
        assembly: PTX or AMD assembly.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    instructions: Mapping[str, int]
    assembly: str


def compile_launch(launch: Launch, architecture: Architecture) -> Compiled:
    """Compile ``launch`` as its arguments would be at run time, except that all pointers are aligned.

    Tensors may be on the ``meta`` device. The cubin is read by the tools that Triton's wheel brings along.
    """
    import triton  # pyrefly: ignore[missing-import]
    from triton.backends.compiler import GPUTarget  # pyrefly: ignore[missing-import]

    source = _source(launch)
    if architecture.capability is None:
        target = GPUTarget("hip", architecture.name, 64)
        return _read_amd(triton.compile(source, target=target, options=dict(launch.options)))
    target = GPUTarget("cuda", architecture.capability, 32)
    binary = triton.compile(source, target=target, options=dict(launch.options))
    return _read_nvidia(binary, Path(triton.__file__).parent / "backends" / "nvidia" / "bin")


def _source(launch: Launch) -> Any:
    from triton.compiler import ASTSource  # pyrefly: ignore[missing-import]
    from triton.tools.tensor_descriptor import TensorDescriptor  # pyrefly: ignore[missing-import]

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value, name = launch.arguments[parameter.name], parameter.name
        specialized = not parameter.do_not_specialize
        if isinstance(value, TensorDescriptor):
            shape = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_POINTERS[value.base.dtype]}[{shape}]>"
            continue
        if parameter.is_constexpr or value is None or (specialized and not isinstance(value, Tensor) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{_POINTERS[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (specialized and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)", re.MULTILINE)
_AMD = re.compile(r"^\s+([vs]_[a-z0-9_]+|ds_[a-z0-9_]+|global_[a-z0-9_]+|buffer_[a-z0-9_]+)", re.MULTILINE)


def _read_nvidia(binary: Any, tools: Path) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])

        def run(*command: str) -> str:
            return subprocess.run(
                [str(tools / command[0]), *command[1:], str(cubin)], capture_output=True, text=True, check=True
            ).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", run("cuobjdump", "-res-usage"))
        # Without an analysis of jumps, which takes a fifth of the time and adds comments only.
        sass = run("nvdisasm", "-c", "-ndf")
    if usage is None:
        raise RuntimeError("cuobjdump did not say how many registers the kernel has; its output has changed")
    counts = collections.Counter(_SASS.findall(sass))
    return Compiled(
        int(usage[1]), int(usage[2]), binary.metadata.shared, binary.metadata.num_warps, counts, binary.asm["ptx"]
    )


def _read_amd(binary: Any) -> Compiled:
    text = binary.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly does not say .{name}; its form has changed")
        return int(found[1])

    counts = collections.Counter(_AMD.findall(text))
    return Compiled(
        number("vgpr_count"),
        4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        binary.metadata.shared,
        binary.metadata.num_warps,
        counts,
        text,
    )
