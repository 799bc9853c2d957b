"""What loading a checkpoint needs of memory: its packed weights and about one layer, from files that stay on disk."""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path

import pytest
import torch

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")

LAYERS, SIZE = 8, 2048
LAYER = SIZE * SIZE  # bytes of codes: 4 MiB
MIB = 1 << 20

CHILD = """
import json, sys, threading, time, torch
from torch import nn
import fx_quant

torch.set_num_threads(1)

def anonymous():
    resident, shared = map(int, open("/proc/self/statm").read().split()[1:3])
    return (resident - shared) * {page}

def model(layers):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear({size}, {size}, bias=False) for _ in range(layers)), nn.Embedding(1024, {size}))
    return model.bfloat16().requires_grad_(False)

def watch(most, done):
    while not done.is_set():
        most[0] = max(most[0], anonymous())
        time.sleep(0.0003)

def load(folder, layers):
    "MiB that were held at most while it was loaded, and that the model holds."
    loaded, before, most, done = model(layers), anonymous(), [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(most, done))
    watcher.start()
    fx_quant.load_quantized_(loaded, folder)
    done.set()
    watcher.join()
    assert all(layer.held_weight()[1] is not None for layer in loaded[:-1])
    held = sum(x.nbytes for x in (*loaded.parameters(), *loaded.buffers()))
    return (most[0] - before) / 2**20, held / 2**20

for kind in ("int8", "int4"):
    load(f"{folder}/{{kind}}_1", 1)  # what is loaded and asked of the machine once
    print(json.dumps(load(f"{folder}/{{kind}}_{layers}", {layers})))
"""


def write(folder: Path, layers: int, weights: dict) -> None:
    activations = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"all": group}, "ignore": []}
    # Codes of 4 bits are a byte each in such files.
    codes = torch.ones(SIZE, SIZE, dtype=torch.int8)
    scale = torch.ones(SIZE, SIZE // weights.get("group_size", SIZE))
    state = {f"{layers}.weight": torch.ones(1024, SIZE, dtype=torch.bfloat16)}
    for i in range(layers):
        state |= {f"{i}.weight": codes.clone(), f"{i}.weight_scale": scale.clone()}
    folder.mkdir()
    safetensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))


def test_loading_peaks_at_the_packed_weights_and_a_layer(tmp_path, printed):
    """Pages of the mapped files are not counted: the system may drop them. A float copy of a layer would be 8 MiB."""
    ints = {"type": "int", "symmetric": True, "dynamic": False}
    for layers in (1, LAYERS):
        write(tmp_path / f"int8_{layers}", layers, {"num_bits": 8, "strategy": "channel", **ints})
        write(tmp_path / f"int4_{layers}", layers, {"num_bits": 4, "strategy": "group", "group_size": 32, **ints})
    child = CHILD.format(page=mmap.PAGESIZE, size=SIZE, folder=tmp_path, layers=LAYERS)
    for (peak, held), bits in zip(map(json.loads, printed(child).splitlines()), (8, 4), strict=True):
        assert held >= LAYERS * LAYER * bits // 8 / MIB
        # Huge pages come whole.
        assert peak <= held + LAYER / MIB + 2, f"{bits} bits: {peak:.1f} MiB beside {held:.1f}"
