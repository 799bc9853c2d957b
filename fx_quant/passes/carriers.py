"""Which ops carry codes on, and which end them: what the origins of nodes are followed through."""

from __future__ import annotations

import torch
from torch.fx import Node

from fx_quant.passes.contractions import LOW_BIT_DTYPES
from fx_quant.passes.nodes import CASTS, COPIES, VIEWS, aten, dtype, is_op
from fx_quant.scheme import INT8_DTYPES

WIDE_INTEGERS = frozenset({torch.int16, torch.int32, torch.int64})
NARROW_INTEGERS = INT8_DTYPES | {kind for kind in LOW_BIT_DTYPES if not kind.is_floating_point}
ROUNDS = frozenset({aten.round.default, aten.round.decimals})


def _overloads(*names: str) -> frozenset[torch._ops.OpOverload]:
    """All overloads of those ops of ATen that there are."""
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    return frozenset(getattr(packet, overload) for packet in packets for overload in packet.overloads())


# What takes a part of a byte out.
PARTS = _overloads("__and__", "__rshift__", "bitwise_and", "bitwise_right_shift")
UNPACKS = (
    PARTS
    | _overloads("__or__", "__xor__", "__lshift__", "bitwise_or", "bitwise_xor", "bitwise_not", "bitwise_left_shift")
    | {aten.remainder.Scalar, aten.remainder.Tensor, aten.floor_divide.default, aten.div.Tensor_mode}
    | {aten.div.Scalar_mode, aten.view.dtype}
)
LOOKUPS = frozenset(
    {
        *(aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.embedding.default),
        *(aten.take.default, aten._unsafe_index.Tensor),
    }
)
CHOICES = frozenset(
    {
        *(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.maximum.default, aten.minimum.default),
        *(aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor, aten.fmin.default, aten.fmax.default),
    }
)
CACHES = frozenset(
    {
        *(aten.index_put.default, aten.slice_scatter.default, aten.select_scatter.default, aten.copy.default),
        *(aten.index_copy.default, aten.scatter.src, aten._unsafe_index_put.default),
    }
)
# What goes on of a call's values when it has one operand.
CARRIERS = frozenset(
    {
        *(*VIEWS, *CASTS, *COPIES, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.neg.default),
        *(aten.split_with_sizes.default, aten.unbind.int, aten.constant_pad_nd.default, aten.repeat.default),
        *(
            aten.clamp.default,
            aten.clamp_min.default,
            aten.clamp_max.default,
            aten.reciprocal.default,
            aten.flip.default,
        ),
        *(aten.as_strided.default, aten.repeat_interleave.self_int, aten.im2col.default, aten.hardtanh.default),
        *(aten.floor.default, aten.ceil.default, aten.trunc.default, aten.view_as.default, aten.pixel_shuffle.default),
    }
)
# What ends it even for a weight: statistics, normalisations and random numbers are no decoded codes.
ENDS = _overloads(
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "aminmax",
    "prod",
    "var",
    "var_mean",
    "std",
    "norm",
    "linalg_vector_norm",
    "_softmax",
    "softmax",
    "_log_softmax",
    "native_layer_norm",
    "native_group_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_fused_rms_norm",
    "argmax",
    "argmin",
    "topk",
    "sort",
    "any",
    "all",
    "cumsum",
    "sym_size",
    "numel",
    "_local_scalar_dense",
    "bernoulli",
    "rand_like",
    "randn_like",
    "native_dropout",
    "ones_like",
    "zeros_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
)


def is_float_in_bytes(node: Node) -> bool:
    """Whether ``node`` reads stored bytes as the floats that they hold, as GGUF's blocks do their scales.

    Floats that are put together of parts of bytes are decoded codes, as of fp4.
    """
    kind = dtype(node)
    if not is_op(node, aten.view.dtype) or kind is None or kind in LOW_BIT_DTYPES or not kind.is_floating_point:
        return False
    seen, waiting = {node}, [node]
    while waiting:
        step = waiting.pop()
        if is_op(step, *PARTS):
            return False
        waiting += [source for source in step.all_input_nodes if source not in seen]
        seen.update(step.all_input_nodes)
    return True


def keeps_values(node: Node) -> bool:
    """Whether ``node`` only moves its operands, or casts them."""
    return is_op(node, *VIEWS, *CASTS, aten.slice.Tensor, aten.select.int, aten.cat.default, aten.stack.default)
