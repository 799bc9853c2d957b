"""A whole model that was prepared, in bfloat16: as far from float64 as the library's own, not farther."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fx_quant
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.loading.adapters.base import decoded_weight
from tests.dialects import compressed_tensors_flows

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


class InFloat64(nn.Module):
    """A linear of dynamic codes a token, every step in float64."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.weight, self.dtype = decoded_weight(linear).double(), linear.scheme.activation.dtype

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / (448 if self.dtype.is_floating_point else 127.5)
        codes = x / scale if self.dtype.is_floating_point else (x / scale).round()
        codes = (
            codes.clamp(-448, 448).float().to(self.dtype) if self.dtype.is_floating_point else codes.clamp(-128, 127)
        )
        return (codes.double() * scale) @ self.weight.t()


def quantized_llama(name: str) -> nn.Module:
    from compressed_tensors.quantization import apply_quantization_config

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=128, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    scheme = compressed_tensors_flows.SCHEMES[name]()
    apply_quantization_config(model, compressed_tensors_flows.configuration(scheme), show_progress=False)
    return compressed_tensors_flows.calibrate(model)


def rms(x: Tensor) -> float:
    return x.pow(2).mean().sqrt().item()


@pytest.mark.parametrize("name", ["fp8_dyn", "w8a8_int_dyn"])
def test_a_prepared_llama_is_as_close_to_float64_as_the_librarys_own(name):
    with torch.no_grad():
        model = quantized_llama(name)
        tokens = torch.randint(0, 128, (2, 16))
        library = model(tokens).logits.double()
        assert len(fx_quant.prepare_(model).swapped) == 14
        ours = model(tokens).logits.double()
        exact = copy.deepcopy(model)
        for path, module in list(exact.named_modules()):
            if isinstance(module, QuantizedLinear):
                exact.set_submodule(path, InFloat64(module))
        truth = exact.double()(tokens).logits
    between, theirs, mine = (rms(each) / rms(truth) for each in (ours - library, library - truth, ours - truth))
    assert mine <= 1.1 * theirs, (between, theirs, mine)
    assert between <= 1.5 * theirs, (between, theirs, mine)  # two roundings of one model are apart as either is
