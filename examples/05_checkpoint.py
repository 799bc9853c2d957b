"""A compressed-tensors checkpoint, as llm-compressor and vLLM use them, into a float model: codes as they are.

``python examples/05_checkpoint.py``. The checkpoint is written here, by compressed-tensors; of a published one only the
path differs. Exits with 1 where a linear was missed or the logits are not those of the library's own model.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from tiny import distance, llama
from torch import Tensor, nn

import fx_quant

# Codes of an activation differ by one where its scale is amax / 127 here and amax / 127.5 there.
CLOSE_CODES = 0.1


def write_checkpoint(directory: str, hidden: int) -> nn.Module:
    """A W8A8 checkpoint in ``directory``; returns the model that compressed-tensors itself runs."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    model = llama(hidden=hidden)
    scheme = preset_name_to_scheme("W8A8", targets=["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(model, config, show_progress=False)
    for linear in model.model.modules():
        if isinstance(linear, nn.Linear):
            linear.get_parameter("weight_scale").copy_(linear.weight.abs().amax(1, keepdim=True) / 127.5)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    return model


@torch.no_grad()
def main(hidden: int = 64) -> int:
    """Write, load, explain, compile, compare; returns the exit status."""
    from transformers import AutoConfig, AutoModelForCausalLM

    prompt = torch.randint(2, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as directory:
        expected: Tensor = write_checkpoint(directory, hidden)(prompt).logits
        with torch.device("meta"):  # no float weights are ever made
            config = AutoConfig.from_pretrained(directory)
            delattr(config, "quantization_config")  # the modules are plain ones until the codes are here
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        print(fx_quant.load_quantized_(model, directory))
    report = fx_quant.explain(model, prompt, use_cache=False)
    print(report.summary())
    compiled = torch.compile(model, backend="fx_quant")
    logits = compiled(prompt, use_cache=False).logits
    to_library, to_eager = distance(logits, expected), distance(logits, model(prompt).logits)
    print(f"logits: {to_library:.3f} from compressed-tensors' own, {to_eager:.6f} from the loaded model run eagerly")
    return int(bool(report.misses) or to_library > CLOSE_CODES or to_eager > CLOSE_CODES)


if __name__ == "__main__":
    sys.exit(main())
