"""A kernel, and a provider with a library of its own, are one file each: every face shows them without another edit."""

from __future__ import annotations

import json

import pytest

# Beside the files of `fx_quant/kernels`, which are found by listing, and in an installed distribution.
KERNEL = """
import torch
from fx_quant.kernels.registry import ROW_SCALES, TENSOR_SCALES, INT8_PAIRS, Kernel, Requires, register_kernel, register_op
from fx_quant.scheme import Granularity, Numerics


def _matmul(a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, **_):
    return torch.ops.fx_quant.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, a_zero_point=a_zero_point)


register_op("{name}", _matmul)
register_kernel(
    Kernel(
        name="{name}",
        provider="{provider}",
        op="{name}",
        requires=Requires(codes=INT8_PAIRS, granularities={scales}, packages={packages}),
        numerics=Numerics.EXACT,
        note="as the canonical op",
        linear_kernel="{linear_kernel}",
    ),
    priority=99,
)
"""
PER_TOKEN = "frozenset({(Granularity.PER_TOKEN, Granularity.%s)})"
ADDED = {
    "pytorch_new_int8": {
        "provider": "pytorch",
        "scales": "TENSOR_SCALES",
        "packages": {},
        "linear_kernel": "TorchInt8ScaledMMLinearKernel",
    },
    "acme_int8": {
        "provider": "acme",
        "scales": PER_TOKEN % "PER_CHANNEL",
        "packages": {"acme-gemm": "1.2"},
        "linear_kernel": "",
    },
    "other_int8": {
        "provider": "other",
        "scales": PER_TOKEN % "PER_TENSOR",
        "packages": {"other-gemm": "2"},
        "linear_kernel": "",
    },
}
# Of each scheme that one of them is for: what each face says.
ASK = """
import dataclasses, json, sys
import torch
import fx_quant.kernels

fx_quant.kernels.__path__.append(sys.argv[1])
sys.path.insert(0, sys.argv[2])

import fx_quant
import fx_quant.linear_kernels as lk
from fx_quant.backend import RewritePass
from fx_quant.config import Options

target, said = fx_quant.detect_target(), {}
for scheme, config in {
    "int8 per_tensor (dynamic) x int8 per_tensor": (False, True, True),
    "int8 per_token (dynamic) x int8 per_channel": (True, False, True),
    "int8 per_token (dynamic) x int8 per_tensor": (False, False, True),
}.items():
    model, x = torch.nn.Sequential(torch.nn.Linear(16, 8)).eval(), torch.randn(3, 16)
    fx_quant.quantize_(model, scheme)
    made = lk.init_int8_linear_kernel(*config)
    problem = made.config.problem()
    selection = fx_quant.select(problem, target)
    bare = dataclasses.replace(target, packages={})
    without = next(v for v in fx_quant.select(problem, bare).verdicts if v.kernel == selection.kernel.name)
    (site,) = fx_quant.explain(model, x).sites
    layer = torch.nn.Module()
    layer.weight, layer.weight_scale = torch.ones(8, 16, dtype=torch.int8), torch.ones(8 if config[0] else 1)
    layer.input_scale = torch.ones(1) if config[1] else None
    made.process_weights_after_loading(layer)
    said[selection.kernel.name] = {
        "explain": site.kernel,
        "class": type(made).__name__,
        "layer": layer.fx_quant_prepared.kernel,
        "sum": made.apply_weights(layer, x).shape == (3, 8),
        "without": list(without.reasons),
    }
key = RewritePass(Options()).uuid()
print(json.dumps({"said": said, "key": repr(key)}))
"""


def install(site, distribution, version, entry_points=""):
    """An installed distribution: its metadata, as pip leaves it."""
    folder = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(entry_points)


@pytest.fixture(scope="module")
def answer(tmp_path_factory, printed):
    """What a fresh process says with the three files there."""
    listed, site = tmp_path_factory.mktemp("kernels"), tmp_path_factory.mktemp("site")
    for name, folder in (("pytorch_new_int8", listed), ("acme_int8", listed), ("other_int8", site)):
        (folder / f"{name}.py").write_text(KERNEL.format(name=name, **ADDED[name]))
    install(site, "acme-gemm", "1.2.3")
    install(site, "other-gemm", "2.0", "[fx_quant.kernels]\nother = other_int8\n")
    return json.loads(printed(ASK, str(listed), str(site)))


@pytest.mark.parametrize("name", ADDED)
def test_one_file_is_enough_for_every_face(answer, name):
    said = answer["said"][name]
    words = "".join(word.capitalize() for word in name.split("_"))
    assert (said["explain"], said["layer"], said["sum"]) == (name, name, True)
    assert said["class"] == (ADDED[name]["linear_kernel"] or f"{words}ScaledMMLinearKernel")
    assert f"'{name}'" in answer["key"]


def test_a_library_of_its_own_is_asked_for_and_keyed(answer):
    assert answer["said"]["pytorch_new_int8"]["without"] == []
    for name, library in (("acme_int8", "acme-gemm>=1.2"), ("other_int8", "other-gemm>=2")):
        assert answer["said"][name]["without"] == [f"needs {library}, which is not installed"]
    assert "('acme-gemm', '1.2.3')" in answer["key"] and "('other-gemm', '2.0')" in answer["key"]
