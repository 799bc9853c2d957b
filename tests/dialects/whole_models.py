"""Small transformers with every linear but the head quantized: a one-layer Llama and a one-layer ViT."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.dialects import hand, hand_float8, pt2e, torchao_flows, vllm
from tests.dialects.compressed_tensors_flows import SCHEMES, calibrate, configuration
from tests.dialects.hand import NOT_FASTER
from tests.dialects.registry import flow
from tests.dialects.variants import Variant, marked
from tests.dialects.weights import HandLinear

# q, k, v, o, gate, up and down.
LLAMA_MATMULS = 7
# q, k, v, o, the two of the MLP, and the classifier.
VIT_MATMULS = 7


def llama(dtype: torch.dtype) -> nn.Module:
    """A one-layer Llama of width 256, in eval mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def vit() -> nn.Module:
    """A one-layer ViT of width 256 for 32x32 images, in eval mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config).eval()


def token_ids(variant: Variant) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``((), {"input_ids": [2, 16]})``, without a cache."""
    ids = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    return (), {"input_ids": marked(ids, variant, 2), "use_cache": False}


def image(variant: Variant) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two images ``[2, 3, 32, 32]``."""
    return (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),), {}


def is_quantized(module: nn.Module, name: str) -> bool:
    """Every linear but the head."""
    return isinstance(module, nn.Linear) and "lm_head" not in name


def hand_llama(linear: type[HandLinear], dtype: torch.dtype, bias: bool) -> nn.Module:
    """The Llama with its linears replaced by ``linear`` of the same weights."""
    model = llama(dtype)
    for name, module in list(model.named_modules()):
        if is_quantized(module, name):
            model.set_submodule(name, linear(dtype, False, module.weight.data.float()))
    return model.eval()


def torchao_llama(make_config: Any, dtype: torch.dtype, bias: bool) -> nn.Module:
    """The Llama quantized by torchao."""
    return torchao_flows.quantized(llama(dtype), make_config(), is_quantized)


_LLAMA: dict[str, Any] = {
    "group": "developers",
    "needs": ("transformers",),
    "matmuls": LLAMA_MATMULS,
    "inputs": token_ids,
    "whole_model": True,
    "dtypes": (torch.bfloat16,),
}
for _name, _linear, _expected in (
    ("hand_i8_intmm_tok", hand.PerToken, {}),
    ("hand_fp8_row_F", hand_float8.PerTokenFunctional, {}),
    ("vllm_torch_channelwise", vllm.Channelwise, {}),
    ("gptfast_w8a16", hand.WeightOnlyScaledAfter, {"expected": "recognised", "why": NOT_FASTER}),
):
    flow(f"{_name}_llama", what=f"every linear of a Llama as {_name}", **_LLAMA, **_expected)(
        partial(hand_llama, _linear)
    )
for _name, _config in (("i8da_i8w", torchao_flows.int8_dynamic), ("f8da_row", torchao_flows.float8_dynamic_per_row)):
    flow(
        f"torchao_{_name}_llama",
        what=f"every linear of a Llama as torchao_{_name}",
        **(_LLAMA | {"needs": ("transformers", "torchao")}),
    )(partial(torchao_llama, _config))


class Logits(nn.Module):
    """A Hugging Face classifier that returns its logits.

    Args:
        model: returns a tuple or a model output, the logits first.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """``[images, classes]``."""
        return self.model(x)[0]


@flow(
    "pt2e_x86_vit",
    group="developers",
    needs=("transformers", "torchao"),
    matmuls=VIT_MATMULS,
    others=1,  # the convolution that embeds patches
    inputs=image,
    whole_model=True,
    dtypes=(torch.float32,),
    only=lambda variant: not variant.dynamic,
)
def pt2e_vit(dtype: torch.dtype, bias: bool) -> nn.Module:
    """a ViT, PT2E with X86InductorQuantizer, static"""
    ((x,), _) = image(Variant(dtype, 3, dynamic=False, bias=bias))
    return pt2e.converted(Logits(vit()).eval(), x, pt2e.x86(), dynamic_rows=False)


@flow(
    "ct_w8a8_int_dyn_llama",
    **(_LLAMA | {"needs": ("transformers", "compressed-tensors")}),
    expected="prepare",
    why="the hooks around each linear break the graph: the modules must be converted first",
)
def compressed_tensors_llama(dtype: torch.dtype, bias: bool) -> nn.Module:
    """a Llama, compressed-tensors W8A8 checkpoint, saved and loaded by Hugging Face, after a first forward"""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import apply_quantization_config
    from transformers import AutoModelForCausalLM

    model = llama(dtype)
    apply_quantization_config(model, configuration(SCHEMES["w8a8_int_dyn"]()), show_progress=False)
    calibrate(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        compressor.update_config(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        # The first forward decompresses the weights.
        args, kwargs = token_ids(Variant(dtype, 3, dynamic=False, bias=bias))
        with torch.no_grad():
            loaded(*args, **kwargs)
    return loaded


@flow(
    "quanto_int8_llama",
    **(_LLAMA | {"needs": ("transformers", "optimum-quanto")}),
    expected="recognised",
    why=NOT_FASTER,
)
def quanto_llama(dtype: torch.dtype, bias: bool) -> nn.Module:
    """a Llama, optimum-quanto weights=qint8, frozen"""
    import optimum.quanto as quanto

    model = llama(dtype)
    quanto.quantize(model, weights=quanto.qint8, exclude=["lm_head"])
    quanto.freeze(model)
    return model
