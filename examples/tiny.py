"""What the examples share: small models of ``transformers`` with random weights, and how far a result is from another.

Nothing is downloaded, so each example runs anywhere; the same lines take a model of any size from its own folder.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore", module="torchao")
for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

# Of a result in float32 beside that of the eager model: sums in another order, and codes that these tip.
CLOSE = 0.05


def llama(layers: int = 2, hidden: int = 64) -> Any:
    """A Llama with random weights, for ``generate()``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


class Encoder(nn.Module):
    """A sentence encoder with random weights: BERT, and the mean over the tokens.

    ``forward(input_ids[b, t], attention_mask[b, t]) -> [b, hidden]``, rows of length one.
    """

    def __init__(self, hidden: int = 64, layers: int = 2) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=256,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * hidden,
            max_position_embeddings=64,
        )
        self.bert: Any = BertModel(config, add_pooling_layer=False)
        self.eval().requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The embedding of each sentence; tokens where the mask is 0 do not count."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def int8_(model: nn.Module) -> nn.Module:
    """``model``, its linears in int8 by torchao: dynamic activations of each token, weights of each channel."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def distance(x: Tensor, reference: Tensor) -> float:
    """``|x - reference| / |reference|`` in float64."""
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()
