"""What a kernel is: a registered custom op, what it requires, and how its weight is prepared. All of it data."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import itertools
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from packaging.version import Version

from fx_quant.errors import FxQuantError, unknown_name
from fx_quant.ops import MATMUL_TAGS, check_scaled_mm, dequantize, register
from fx_quant.problem import Problem, SizeRange
from fx_quant.reasons import Kind, Unmet
from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES, INT4_DTYPES, Granularity, Numerics, dtype_name
from fx_quant.target import Target

ENTRY_POINT_GROUP = "fx_quant.kernels"


@dataclass(frozen=True)
class Requires:
    """Everything that must hold for a kernel to run; ``unmet`` names each thing that does not.

    An empty set or None means no requirement.

    Args:
        platforms: platforms it runs on.
        min_capability, max_capability: bounds of the NVIDIA compute capability (``90``), checked on ``cuda`` only.
        features: target features that must all be present.
        packages: least version of each package that must be installed.
        codes: ``(activation dtype, weight dtype)`` pairs of codes.
        granularities: ``(activation, weight)`` granularity pairs.
        scale_dtypes: dtypes of the scales it reads; not empty.
        out_dtypes: dtypes it can return.
        out_as_activation: it returns the dtype of a float activation (weight-only kernels).
        bias: it can add a bias.
        bias_dtypes: dtypes of the bias it can add (a missing bias is always fine).
        bias_as_out: a bias must have the dtype of the result.
        align: ``n`` and ``k`` must be multiples; a violation is met by padding where ``paddable``.
        align_n: ``n`` must be a multiple of it too, and is not padded to it.
        whole_groups: ``k`` must be a multiple of the group that shares a scale.
        group_multiple: the group that shares a scale must be a multiple of it.
        max_k: largest ``k`` it accepts.
        rows: numbers of rows that it accepts, which are to hold all that a problem may have; None for any. A kernel
            that has one way for few rows and another for many is one op, which looks at the rows of each call
            (``by_rows``), and one layout: a graph of any m has both, and its weights once.
        asymmetric: operands (``"activation"``, ``"weight"``) that may have a zero point.
        offset: the weight may have an offset, a float that is added to its scaled codes.
        constant_weight: the weight must be a parameter or constant, because it is packed once.
    """

    platforms: frozenset[str] = frozenset()
    min_capability: int | None = None
    max_capability: int | None = None
    features: frozenset[str] = frozenset()
    packages: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    codes: frozenset[tuple[torch.dtype, torch.dtype]] = frozenset()
    granularities: frozenset[tuple[Granularity, Granularity]] = frozenset()
    scale_dtypes: frozenset[torch.dtype] = frozenset({torch.float32})
    out_dtypes: frozenset[torch.dtype] = frozenset()
    out_as_activation: bool = False
    bias: bool = True
    bias_dtypes: frozenset[torch.dtype] = frozenset()
    bias_as_out: bool = False
    align: int = 1
    align_n: int = 1
    paddable: bool = True
    whole_groups: bool = False
    group_multiple: int = 1
    max_k: int | None = None
    rows: SizeRange | None = None
    asymmetric: frozenset[str] = frozenset()
    offset: bool = False
    constant_weight: bool = False

    def unmet_by_target(self, target: Target) -> list[Unmet]:
        """Why ``target`` cannot run the kernel at all; empty when it can."""
        unmet = []
        if self.platforms and target.platform not in self.platforms:
            needed = f"needs platform {_one_of(self.platforms)}, target is {target.platform}"
            unmet.append(Unmet(Kind.PLATFORM, needed))
        capability, least, most = target.capability, self.min_capability, self.max_capability
        if capability is not None and least is not None and capability < least:
            unmet.append(Unmet(Kind.CAPABILITY, f"needs sm{least} or newer, target is {target.arch}"))
        if capability is not None and most is not None and capability > most:
            unmet.append(Unmet(Kind.CAPABILITY, f"needs sm{most} or older, target is {target.arch}"))
        if not self.features <= target.features:
            unmet += [
                Unmet(Kind.FEATURE, f"needs {feature}, which {target.arch} has not", feature)
                for feature in sorted(self.features - target.features)
            ]
        for package, needed in self.packages.items():
            version = target.version(package)
            if version is None:
                unmet.append(Unmet(Kind.PACKAGE, f"needs {package}>={needed}, which is not installed", package))
            elif version < Version(needed):
                unmet.append(Unmet(Kind.PACKAGE, f"needs {package}>={needed}, found {version}", package))
        return unmet

    def unmet_by_problem(self, problem: Problem) -> list[Unmet]:
        """Why the kernel cannot run ``problem`` on any target; empty when it can."""
        activation, weight = problem.scheme.activation, problem.scheme.weight
        unmet = []
        if self.codes and (activation.dtype, weight.dtype) not in self.codes:
            codes = f"{dtype_name(activation.dtype)} x {dtype_name(weight.dtype)}"
            unmet.append(Unmet(Kind.CODES, f"has no {codes} matmul"))
        pair = (activation.granularity, weight.granularity)
        if self.granularities and not any(
            mine_a.covers(pair[0]) and mine_b.covers(pair[1]) for mine_a, mine_b in self.granularities
        ):
            unmet.append(Unmet(Kind.GRANULARITY, f"has no {pair[0]} x {pair[1]} scales"))
        for operand in (activation, weight):
            if operand.scale_dtype not in self.scale_dtypes and operand.granularity != Granularity.UNSCALED:
                dtypes = _one_of(map(dtype_name, self.scale_dtypes))
                text = f"takes scales of {dtypes}, got {dtype_name(operand.scale_dtype)}"
                unmet.append(Unmet(Kind.SCALE_DTYPE, text))
        for name, operand in (("activation", activation), ("weight", weight)):
            if not operand.symmetric and name not in self.asymmetric:
                unmet.append(Unmet(Kind.ZERO_POINT, f"has no zero point of the {name}"))
        if weight.offset and not self.offset:
            unmet.append(Unmet(Kind.ZERO_POINT, "has no float offset of the weight"))
        out = problem.out_dtype
        if self.out_dtypes and out not in self.out_dtypes:
            text = f"returns {_one_of(map(dtype_name, self.out_dtypes))}, asked for {dtype_name(out)}"
            unmet.append(Unmet(Kind.OUT_DTYPE, text))
        if self.out_as_activation and out != activation.dtype:
            text = f"returns the activation's {dtype_name(activation.dtype)}, asked for {dtype_name(out)}"
            unmet.append(Unmet(Kind.OUT_DTYPE, text))
        unmet += self.unmet_by_bias(problem.bias, problem.out_dtype)
        if not self.paddable and (problem.n % self.align or problem.k % self.align):
            unmet.append(Unmet(Kind.ALIGNMENT, self.alignment_of(problem)))
        if problem.n % self.align_n:
            unmet.append(Unmet(Kind.ALIGNMENT, f"needs n in multiples of {self.align_n}, got n={problem.n}"))
        if self.whole_groups and weight.group is not None and problem.k % weight.group:
            unmet.append(Unmet(Kind.ALIGNMENT, f"needs k in whole groups of {weight.group}, got k={problem.k}"))
        if weight.group is not None and weight.group % self.group_multiple:
            multiple = f"needs groups in multiples of {self.group_multiple}, got {weight.group}"
            unmet.append(Unmet(Kind.GRANULARITY, multiple))
        if self.max_k is not None and problem.k > self.max_k:
            unmet.append(Unmet(Kind.MAX_K, f"needs k <= {self.max_k}, got k={problem.k}"))
        if self.rows is not None and not self.rows.covers(problem.m):
            unmet.append(Unmet(Kind.ROWS, f"runs {self.rows} rows, got m={problem.m}"))
        if self.constant_weight and not problem.constant_weight:
            constant = "packs its weight once, so the weight must be a parameter, buffer or constant"
            unmet.append(Unmet(Kind.CONSTANT_WEIGHT, constant))
        return unmet

    def alignment_of(self, problem: Problem) -> str:
        """In words what ``n`` and ``k`` must be and what they are, where they are not that."""
        return f"needs n and k in multiples of {self.align}, got n={problem.n} k={problem.k}"

    def unmet_by_bias(self, bias: torch.dtype | None, out_dtype: torch.dtype) -> list[Unmet]:
        """Why the kernel cannot add a ``bias`` of that dtype to a result of ``out_dtype``; empty if it can."""
        if bias is None:
            return []
        if not self.bias:
            return [Unmet(Kind.BIAS, "adds no bias")]
        if self.bias_dtypes and bias not in self.bias_dtypes:
            known = _one_of(map(dtype_name, self.bias_dtypes))
            return [Unmet(Kind.BIAS, f"adds a bias of {known}, got {dtype_name(bias)}")]
        if self.bias_as_out and bias != out_dtype:
            text = f"adds a bias of the result's dtype, got {dtype_name(bias)} for {dtype_name(out_dtype)}"
            return [Unmet(Kind.BIAS, text)]
        return []

    def unmet(self, problem: Problem, target: Target) -> list[Unmet]:
        """All unmet requirements, those of the target first."""
        return self.unmet_by_target(target) + self.unmet_by_problem(problem)


def _one_of(names) -> str:
    return " or ".join(sorted(names))


@dataclass(frozen=True)
class Kernel:
    """One provider's way to run one kind of quantized linear.

    Every kernel op has the same signature::

        op(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, Tensor? bias, int n, ScalarType out_dtype, *,
           Tensor? a_zero_point=None, Tensor? b_sum=None, Tensor? b_zero_point=None, int[]? block=None,
           Tensor? b_offset=None) -> Tensor

    ``a`` is ``[m, k]`` codes (cast to ``a_dtype`` first when that is set) or, for a weight-only kernel, the float
    activation; ``b`` the weight in ``layout``, or as ``[k, n]`` codes when ``layout`` is None. ``b_sum [n]`` is given
    with ``a_zero_point``: the sum of ``b``'s codes over k; with ``block`` or packed int4 it is in the layout of
    ``kernels.layouts.group_sums``. The rest is as in ``fx_quant::scaled_mm``, and in
    ``fx_quant::weight_only_mm`` where ``a`` is float.

    Args:
        name: unique; ``<provider>_<what>``.
        provider: where it comes from.
        op: the op's name in the ``fx_quant`` namespace.
        requires: what must hold.
        numerics: how its result relates to the canonical op's on the same codes.
        note: one line for the reader of a report.
        layout: name of the packed weight layout (``kernels/layouts.py``), or None.
        a_dtype: dtype that codes of ``a`` are widened to, exactly, before the call, or None.
        panel_factors: it also takes scales, zero points and offsets ``[n, groups]`` as
            ``[ceil(n / 64), groups, 64]``, and reads them faster.
        dequantizes: it decodes its operands and runs a float matmul, which a graph that does so itself is left with.
        least_rows: rows to which a plan may pad fewer, because that is faster; 0 for none.
        fixed_op: an op like ``op`` that computes each row in one order, however many rows stand beside it; ``""`` where
            there is none. A kernel that is ``EXACT`` needs none: what ``op`` computes does not depend on an order.
        linear_kernel: name of the class of ``fx_quant.linear_kernels`` that stands for it, that of vLLM where it has
            one; without it the class is called after the kernel.
    """

    name: str
    provider: str
    op: str
    requires: Requires
    numerics: Numerics
    note: str
    layout: str | None = None
    a_dtype: torch.dtype | None = None
    panel_factors: bool = False
    dequantizes: bool = False
    least_rows: int = 0
    fixed_op: str = ""
    linear_kernel: str = ""

    def class_name(self, weight_only: bool) -> str:
        """Name of its class for weight-only linears, or for linears of two quantized operands."""
        words = "".join(word.capitalize() for word in self.name.split("_"))
        return self.linear_kernel or f"{words}{'LinearKernel' if weight_only else 'ScaledMMLinearKernel'}"

    @property
    def class_names(self) -> frozenset[str]:
        """Names of its classes in ``fx_quant.linear_kernels``: ``my_int8`` -> ``MyInt8ScaledMMLinearKernel``."""
        weight_only = {activation in FLOAT_DTYPES for activation, _ in self.requires.codes} or {True, False}
        return frozenset(map(self.class_name, weight_only))

    @property
    def deterministic_op(self) -> str | None:
        """The op whose bits in a row do not depend on how many rows stand beside it; None where there is none."""
        return self.fixed_op or (self.op if self.numerics is Numerics.EXACT else None)

    def overload(self, deterministic: bool = False) -> torch._ops.OpOverload:
        """The registered op; ``deterministic`` asks for the one of that name."""
        name = self.deterministic_op if deterministic else self.op
        assert name is not None
        return getattr(torch.ops.fx_quant, name).default


KERNEL_SCHEMA = (
    "(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, Tensor? bias, int n, ScalarType out_dtype, *, "
    "Tensor? a_zero_point=None, Tensor? b_sum=None, Tensor? b_zero_point=None, SymInt[]? block=None, "
    "Tensor? b_offset=None) -> Tensor"
)

_KERNELS: dict[str, Kernel] = {}
_PRIORITY: dict[str, int] = {}


def register_kernel(kernel: Kernel, *, priority: int) -> Kernel:
    """Add ``kernel`` to the registry; among kernels that can run, the highest ``priority`` is chosen.

    Raises:
        FxQuantError: another kernel has the same name.
    """
    if _KERNELS.get(kernel.name, kernel) != kernel:
        raise FxQuantError(f"kernel name {kernel.name!r} must be unique, it is registered already; choose another")
    _KERNELS[kernel.name] = kernel
    _PRIORITY[kernel.name] = priority
    return kernel


def kernels() -> tuple[Kernel, ...]:
    """All kernels, best first: those of this folder and those of the entry points ``fx_quant.kernels``."""
    _load_providers()
    return tuple(map(_KERNELS.__getitem__, _in_order(tuple(_PRIORITY.items()))))


@functools.lru_cache(maxsize=1)
def _in_order(priorities: tuple[tuple[str, int], ...]) -> list[str]:
    """Names by priority; asked for anew in each selection."""
    return [name for name, _ in sorted(priorities, key=lambda each: (-each[1], each[0]))]


def kernel(name: str) -> Kernel:
    """The kernel called ``name``.

    Raises:
        UnknownNameError: no kernel has that name.
    """
    _load_providers()
    if name not in _KERNELS:
        raise unknown_name("kernel", name, _KERNELS)
    return _KERNELS[name]


def required_packages() -> frozenset[str]:
    """Names of all libraries that the kernels require."""
    return frozenset(package for kernel in kernels() for package in kernel.requires.packages)


@functools.cache
def _load_providers() -> None:
    """Import each provider beside this file, then the installed ones, once; an error is raised each time.

    A provider is a file, or a folder of which the files ``*_kernels.py`` register its kernels.
    """
    import fx_quant.kernels as package

    for module in pkgutil.iter_modules(package.__path__):
        provider = importlib.import_module(f"{package.__name__}.{module.name}")
        for part in pkgutil.iter_modules(provider.__path__) if module.ispkg else ():
            if part.name.endswith("_kernels"):
                importlib.import_module(f"{provider.__name__}.{part.name}")
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        entry_point.load()


CPU, CUDA, ROCM = frozenset({"cpu"}), frozenset({"cuda"}), frozenset({"rocm"})
# Operands that may have a zero point.
ACTIVATION, WEIGHT = frozenset({"activation"}), frozenset({"weight"})
INT8_PAIRS = frozenset({(torch.int8, torch.int8)})
INT4_PAIRS = frozenset((torch.int8, codes) for codes in INT4_DTYPES)
# The deepest sum of int8 products that an int32 holds: 128 * 128 * k is below 2**31.
INT8_MAX_K = 131071
FLOAT8_PAIRS = frozenset((a, b) for a in FLOAT8_DTYPES for b in FLOAT8_DTYPES)
E4M3_PAIRS = frozenset({(torch.float8_e4m3fn, torch.float8_e4m3fn)})
FNUZ_PAIRS = frozenset({(torch.float8_e4m3fnuz, torch.float8_e4m3fnuz)})
# The feature of an AMD GPU, the codes that it multiplies, and what ends the names of their kernels.
ROCM_FLOAT8 = (("float8", E4M3_PAIRS, ""), ("float8_fnuz", FNUZ_PAIRS, "_fnuz"))
TENSOR_SCALES = frozenset({(Granularity.PER_TENSOR, Granularity.PER_TENSOR)})
# Scales that leave the sum: one or one a row of the activation, one or one a column of the result.
_ROWS = (Granularity.PER_TENSOR, Granularity.PER_TOKEN)
ROW_SCALES = frozenset(itertools.product(_ROWS, (Granularity.PER_TENSOR, Granularity.PER_CHANNEL)))
_GROUPS = (Granularity.ANY_GROUP, Granularity.ANY_BLOCK)
ROWS_BY_GROUPS = frozenset(itertools.product(_ROWS, _GROUPS))
BLOCK_SCALES = frozenset(itertools.product((Granularity.ANY_GROUP,), _GROUPS))


def weight_scales(*weights: Granularity) -> frozenset[tuple[Granularity, Granularity]]:
    """The pairs of a weight-only kernel that takes these granularities of the weight: the activation has no scale."""
    return frozenset((Granularity.PER_TENSOR, weight) for weight in weights)


def register_op(name: str, body: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor] | None = None) -> None:
    """Register the op ``fx_quant::<name>`` of a kernel.

    A library may do anything with a matrix that has no elements, so ``body`` is not asked where a size is 0.

    Args:
        body: takes what ``Kernel`` says.
        fake: its fake function; ``fake_kernel(name)`` unless given.
    """
    register(f"{name}{KERNEL_SCHEMA}", _without_empty(body), fake or fake_kernel(name), MATMUL_TAGS)


def by_rows(most: int, few: Callable[..., torch.Tensor], many: Callable[..., torch.Tensor]) -> Callable:
    """The body of an op that is ``few`` for up to ``most`` rows and ``many`` for more, asked in each call.

    Its fake function is that of any kernel, so a graph of any m holds both and is compiled once.
    """

    def run(a, *rest, **more) -> torch.Tensor:
        return (few if a.shape[0] <= most else many)(a, *rest, **more)

    return run


def _without_empty(body: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(a, b, a_scale, b_scale, bias, n, out_dtype, **more) -> torch.Tensor:
        if n and a.numel():
            return body(a, b, a_scale, b_scale, bias, n, out_dtype, **more)
        return empty_product(a, n, bias, out_dtype)

    return run


def empty_product(a: torch.Tensor, n: int, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """``[m, n]`` of an activation ``a [m, k]`` where any of the sizes is 0: sums over nothing, and the bias."""
    sums = a.new_zeros((a.shape[0], n), dtype=torch.int32)
    return dequantize(sums, None, None, bias, out_dtype).contiguous()


def fake_kernel(name: str) -> Callable[..., torch.Tensor]:
    """The fake function of a kernel op: ``[m, n]`` of ``out_dtype``."""

    def fake(a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, block=None, **_):
        check_scaled_mm(
            a.shape[0],
            a.dtype,
            a.shape[1],
            n,
            a_scale,
            b_scale,
            bias,
            out_dtype,
            name,
            a_zero_point=a_zero_point,
            block=block,
        )
        return a.new_empty((a.shape[0], n), dtype=out_dtype)

    return fake
