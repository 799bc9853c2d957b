"""The support matrix: for each scheme the kernel that a target gives it, and why not each other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fx_quant.errors import NoKernelError
from fx_quant.kernels.registry import kernels
from fx_quant.kernels.select import select
from fx_quant.problem import Problem, SizeRange
from fx_quant.reasons import Unmet, as_data, in_words, is_candidate
from fx_quant.scheme import Scheme
from fx_quant.target import Target

# Every kind of quantized linear, as schemes print.
SCHEMES = (
    "int8 per_token (dynamic) x int8 per_channel",
    "int8 per_tensor (dynamic) x int8 per_tensor",
    "int8 per_tensor (static) x int8 per_channel",
    "int8 per_token asymmetric (dynamic) x int8 per_channel",
    "int8 per_tensor asymmetric (static) x int8 per_channel",
    "int8 per_token (dynamic) x int4 per_group(32)",
    "int8 per_token asymmetric (dynamic) x int8 per_group(32)",
    "float8_e4m3fn per_tensor (dynamic) x float8_e4m3fn per_tensor",
    "float8_e4m3fn per_tensor (static) x float8_e4m3fn per_tensor",
    "float8_e4m3fn per_tensor (static) x float8_e4m3fn per_channel",
    "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel",
    "float8_e4m3fn per_group(128) (dynamic) x float8_e4m3fn per_block(128, 128)",
    "float8_e4m3fnuz per_tensor (dynamic) x float8_e4m3fnuz per_tensor",
    "float8_e4m3fnuz per_token (dynamic) x float8_e4m3fnuz per_channel",
    "float8_e4m3fnuz per_group(128) (dynamic) x float8_e4m3fnuz per_block(128, 128)",
    "float8_e5m2 per_tensor (dynamic) x float8_e4m3fn per_tensor",
    "bfloat16 x int8 per_channel",
    "bfloat16 x int8 per_group(128)",
    "bfloat16 x uint8 per_channel asymmetric",
    "bfloat16 x float8_e4m3fn per_channel",
    "bfloat16 x int4 per_group(128)",
    "bfloat16 x uint4 per_group(128) asymmetric",
    "bfloat16 x int4 per_group(64) with offset",
)


@dataclass(frozen=True)
class Support:
    """What a target gives one scheme.

    Args:
        scheme: how the operands are quantized.
        kernel: what runs it, or None.
        padding: the padding plan, or ``none``.
        numerics: class of the kernel.
        unmet: every other kernel with what it requires and is not met; nothing when it could have run.
    """

    scheme: str
    kernel: str | None
    padding: str
    numerics: str
    unmet: dict[str, tuple[Unmet, ...]]

    @property
    def losers(self) -> dict[str, list[str]]:
        """Every other kernel with its reasons in words."""
        return in_words(self.unmet, "lower priority")

    def to_dict(self) -> dict[str, object]:
        """Everything as plain data: ``losers``, texts, and ``unmet``, their kinds."""
        return dataclasses.asdict(self) | {"losers": self.losers, "unmet": as_data(self.unmet)}

    def __str__(self) -> str:
        """The choice, then each other kernel of the platform that has the codes."""
        not_chosen = [f"    not {name}: {'; '.join(reasons)}" for name, reasons in self.candidates().items()]
        return "\n".join([f"{self.scheme} -> {self.kernel or 'no kernel'}", *not_chosen])

    def candidates(self) -> dict[str, list[str]]:
        """Each other kernel of the platform that has the codes, with its reasons in words."""
        return {name: reasons for name, reasons in self.losers.items() if is_candidate(self.unmet[name])}


def support_matrix(
    target: Target,
    schemes: tuple[str, ...] = SCHEMES,
    *,
    n: int = 4096,
    k: int = 4096,
    out_dtype: torch.dtype = torch.bfloat16,
) -> list[Support]:
    """``Support`` of each of ``schemes`` on ``target``, for constant weights ``[n, k]`` and any number of rows."""
    return [_support(Scheme.parse(scheme), target, n, k, out_dtype) for scheme in schemes]


def _support(scheme: Scheme, target: Target, n: int, k: int, out_dtype: torch.dtype) -> Support:
    problem = Problem(scheme, SizeRange(0, None), n, k, out_dtype, None, constant_weight=True)
    try:
        selection = select(problem, target)
    except NoKernelError:
        unmet = {kernel.name: tuple(kernel.requires.unmet(problem, target)) for kernel in kernels()}
        return Support(str(scheme), None, "none", "", unmet)
    chosen = selection.kernel
    unmet = {verdict.kernel: verdict.unmet for verdict in selection.verdicts if verdict.kernel != chosen.name}
    return Support(str(scheme), chosen.name, selection.padding.describe(problem), str(chosen.numerics), unmet)
