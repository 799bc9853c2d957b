"""The ways to quantize a whole model: the libraries' own calls, and checkpoints as ``transformers`` loads them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import fx_quant
from tests.dialects import compressed_tensors_flows, torchao_flows
from tests.model_matrix.registry import Model, Way

GROUP = 32


def in_groups(module: nn.Module, name: str) -> bool:
    """Whether ``module`` is a linear whose k is a multiple of the group."""
    return isinstance(module, nn.Linear) and module.in_features % GROUP == 0


def by_fx_quant(scheme: str, model: nn.Module) -> nn.Module:
    """``fx_quant.quantize_``."""
    grouped = "per_group" in scheme
    fx_quant.quantize_(model, scheme, lambda name, module: not grouped or _k(module) % GROUP == 0)
    return model


def _k(linear: nn.Module) -> int:
    """Of a linear, and of transformers' ``Conv1D``, whose weight is ``[k, n]``."""
    return linear.in_features if isinstance(linear, nn.Linear) else linear.get_parameter("weight").shape[0]


def as_loaded(name: str, model: nn.Module) -> nn.Module:
    """``model`` quantized, saved and loaded by ``transformers``: compressed-tensors' scheme ``name``."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import apply_quantization_config

    scheme = compressed_tensors_flows.SCHEMES[name]()
    if scheme.weights.group_size is not None:
        scheme.weights.group_size = GROUP
    config = compressed_tensors_flows.configuration(scheme)
    # A head that shares the embedding's weight cannot be saved compressed, and checkpoints leave every head as it is.
    head = model.get_output_embeddings()
    config.ignore = [
        path
        for path, each in model.named_modules()
        if isinstance(each, nn.Linear) and (each is head or not in_groups(each, path))
    ]
    dtype = next(model.parameters()).dtype
    apply_quantization_config(model, config, show_progress=False)
    compressed_tensors_flows.calibrate(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        compressor.update_config(folder)
        return type(model).from_pretrained(folder, dtype=dtype).eval()


def by_quanto(model: nn.Module) -> nn.Module:
    """optimum-quanto's weights in int8, frozen."""
    import optimum.quanto as quanto

    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def _torchao(
    config: Callable[[], object], filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> Callable[[nn.Module], nn.Module]:
    return lambda model: torchao_flows.quantized(model, config(), filter_fn)


def _of_transformers(model: Model) -> bool:
    return model.needs == ("transformers",)


_F32, _BF16 = torch.float32, torch.bfloat16
_CT = ("transformers", "compressed-tensors")
W8A8, W4A16 = "int8 per_token (dynamic) x int8 per_channel", f"bfloat16 x int4 per_group({GROUP})"

WAYS = (
    Way("torchao W8A8", _torchao(torchao_flows.int8_dynamic), _F32, ("torchao",)),
    Way("torchao int8 weights", _torchao(torchao_flows.int8_weight_only), _BF16, ("torchao",)),
    Way("torchao float8 rows", _torchao(torchao_flows.float8_dynamic_per_row), _BF16, ("torchao",)),
    Way("torchao 8da4w", _torchao(torchao_flows.int8_dynamic_int4_groups, in_groups), _F32, ("torchao",)),
    Way("quantize_ W8A8", partial(by_fx_quant, W8A8), _BF16),
    Way("quantize_ W4A16", partial(by_fx_quant, W4A16), _BF16),
    Way("compressed-tensors W8A8", partial(as_loaded, "w8a8_int_dyn"), _BF16, _CT, _of_transformers),
    Way("compressed-tensors W4A16", partial(as_loaded, "w4a16"), _BF16, _CT, _of_transformers),
    Way("quanto int8 weights", by_quanto, _F32, ("optimum-quanto",)),
)
