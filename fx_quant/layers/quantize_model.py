"""``quantize_``: the float linears of a model become ``QuantizedLinear``, and what is left is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fx_quant.kernels.huge_pages import trim
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.layers.linear_operands import check_scheme
from fx_quant.report import Block, Entries, Reported, alike_by_name, counted
from fx_quant.scheme import Scheme

# Tables that are looked up or added, and filters: their weights meet no matmul of rows.
_NO_MATMUL = (nn.Embedding, nn.EmbeddingBag, _ConvNd)
_TABLES = ("pos", "embed", "token", "bias")
_CONV1D = "transformers.pytorch_utils"


@dataclass(frozen=True)
class LeftWeight:
    """One module that holds a float matrix and is as it was.

    Args:
        module: its name in ``named_modules()``.
        kind: its class.
        reason: why it was left.
    """

    module: str
    kind: str
    reason: str


@dataclass(frozen=True, repr=False)
class QuantizeReport(Reported):
    """What ``quantize_`` did; prints as text.

    Args:
        scheme: how the quantized linears are quantized.
        quantized: names of the modules that are ``QuantizedLinear`` now, in order.
        left: the others that hold a float matrix, each with the reason.
    """

    scheme: str
    quantized: tuple[str, ...] = ()
    left: tuple[LeftWeight, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {"summary": self.summary(), **asdict(self)}

    def summary(self) -> str:
        """One line: how many linears were quantized, and how many were left."""
        kept = f"{len(self.left)} left in float" if self.left else "nothing left in float"
        return f"{counted(len(self.quantized), 'linear', 'linears')} quantized as {self.scheme}, {kept}"

    def blocks(self, *, wide: bool) -> list[Block]:
        """A line for each kind of module that is left; those of repeated layers share one."""
        items = [
            f"{name if len(rows) == 1 else f'{name} x {len(rows)}'} ({rows[0].kind}): {rows[0].reason}"
            for name, rows in alike_by_name(self.left, lambda row: (row.kind, row.reason))
        ]
        return [Entries("left in float", tuple(items))] if items else []


def quantize_(
    model: nn.Module, scheme: Scheme | str, filter: Callable[[str, nn.Module], bool] | None = None
) -> QuantizeReport:
    """Replace the linears of ``model``, in place, by ``QuantizedLinear``: ``nn.Linear`` and transformers' ``Conv1D``.

    A linear that has several names is quantized once and shared again. Subclasses with a forward pass of their own are
    left, as is the output projection of ``nn.MultiheadAttention``, which reads its weight without calling it, and every
    module that multiplies with a weight itself (experts in one parameter); the report names them. The fast path of an
    ``nn.TransformerEncoderLayer``, which reads weights without calling the linears, is switched off.

    Args:
        model: what holds the linears; not a linear itself.
        scheme: dynamic or weight-only, as for ``QuantizedLinear.from_float``.
        filter: ``(name, linear) -> bool``; None takes every linear.

    Raises:
        ValueError: a static scheme; ``model`` itself is a linear, which cannot be replaced in place; a linear that
            cannot be quantized so, named: those before it are replaced already.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    check_scheme(scheme)
    if not scheme.weight_only and not scheme.activation.dynamic:
        raise ValueError(
            f"quantize_ has no input scales for the static scheme {scheme}; "
            "use QuantizedLinear.from_float(linear, scheme, input_scale=...) for each linear"
        )
    if isinstance(model, nn.Linear) or _is_conv1d(model):
        raise ValueError("quantize_ replaces the linears inside a model, got a linear; use QuantizedLinear.from_float")
    reasons: list[tuple[str, str, str | None]] = []
    names: dict[nn.Module, list[str]] = {}
    # Asked before anything changes, as it may raise.
    for name, module in model.named_modules(remove_duplicate=False):
        reason = _objection(module)
        if reason is None and filter is not None and not filter(name, module):
            reason = "the filter left it out"
        reasons.append((name, type(module).__name__, reason))
        if reason is None:
            names.setdefault(module, []).append(name)
    while names:
        # One after the other, so that the float weights go while the codes come.
        module = next(iter(names))
        replaced = names.pop(module)
        try:
            quantized = QuantizedLinear.from_float(_as_linear(module), scheme)
        except ValueError as error:
            raise type(error)(f"{replaced[0]}: {error}") from None
        for name in replaced:
            model.set_submodule(name, quantized)
        del module
    disable_fast_paths(model)
    trim()
    return QuantizeReport(
        str(scheme),
        tuple(name for name, _, reason in reasons if reason is None),
        tuple(LeftWeight(name, kind, reason) for name, kind, reason in reasons if reason),
    )


def disable_fast_paths(model: nn.Module) -> None:
    """Make encoder layers call their linears where one of these is a ``QuantizedLinear``."""
    for module in model.modules():
        inside = any(isinstance(child, QuantizedLinear) for child in module.children())
        if isinstance(module, nn.TransformerEncoderLayer) and inside:
            # Its fast path reads the weights without calling the linears; this is what it asks before it takes it.
            module.activation_relu_or_gelu = 0


def _objection(module: nn.Module) -> str | None:
    """Why ``module`` is left; None for a linear that can be replaced, ``""`` for what holds no float matrix."""
    own = "forward" in vars(module)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its parent reads its weight without calling it"
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        if own or (isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward):
            of = "nn.Linear" if isinstance(module, nn.Linear) else "Conv1D"
            return (
                f"its forward pass is not that of {of}; if it computes the same, set it to QuantizedLinear.from_float"
            )
        return None
    if isinstance(module, (QuantizedLinear, *_NO_MATMUL)):
        return ""
    held = module.named_parameters(recurse=False)
    found = [f"{name} {list(value.shape)}" for name, value in held if _is_matrix(name, value)]
    return f"it is no linear, and multiplies with a weight itself: {', '.join(found)}" if found else ""


def _is_matrix(name: str, value: Tensor) -> bool:
    if not value.is_floating_point() or any(word in name for word in _TABLES):
        return False
    return value.dim() > 1 and value.dtype.itemsize > 1 and 1 not in value.shape


def _is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D`` itself: a linear whose weight is ``[k, n]``."""
    return (type(module).__module__, type(module).__name__) == (_CONV1D, "Conv1D")


def _as_linear(module: nn.Module) -> nn.Linear:
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.train(module.training)
