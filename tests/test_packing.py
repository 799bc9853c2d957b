"""Packed weights: every layout loses nothing, and each weight is packed once while it lives and stays as it is."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch
from torch import Tensor, nn

import fx_quant.lowerings  # noqa: F401  (registers the lowerings)
from fx_quant.errors import UnknownNameError
from fx_quant.kernels import huge_pages, packed_weights
from fx_quant.kernels import layouts as packing
from fx_quant.kernels.layouts import layouts, pack_weight, packed_layout
from fx_quant.kernels.registry import kernels
from fx_quant.ops import constants
from fx_quant.scheme import INT8_DTYPES

pytestmark = pytest.mark.usefixtures("uncached")

prepack = torch.ops.fx_quant.prepack.default
SHAPES = [(1, 1), (63, 3), (64, 4), (65, 5), (200, 129), (128, 64)]


def weight(n: int, k: int, dtype: torch.dtype = torch.int8) -> Tensor:
    if dtype in INT8_DTYPES:
        return torch.randint(0, 256, (n, k), dtype=torch.uint8).view(dtype)
    return torch.randn(n, k).to(dtype)


def fitting(name: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """A weight of at least ``n`` and ``k`` that the layout ``name`` takes."""
    align = packed_layout(name).align
    return weight(-(-n // align) * align, -(-k // align) * align, dtype)


def parameter(n: int = 70, k: int = 9) -> nn.Parameter:
    return nn.Parameter(weight(n, k), requires_grad=False)


# Of layouts that take any dtype.
ANY = {torch.float32, torch.bfloat16, torch.int32, torch.float8_e4m3fn}


def all_layouts():
    kernels()  # providers bring layouts of their own
    # Machete's is the order of an op of vLLM's, see test_machete.py.
    ours = [layout for layout in layouts() if not layout.name.startswith("machete_")]
    return [(layout.name, dtype) for layout in ours for dtype in sorted(layout.weights or ANY, key=str)]


@pytest.mark.parametrize(("name", "dtype"), [each for each in all_layouts() if packed_layout(each[0]).unpack])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_gives_the_weight_back(name, dtype, shape):
    n, k = shape
    w, layout = weight(n, k, dtype), packed_layout(name)
    packed = pack_weight(w, name)
    assert packed.shape == layout.shape(n, k)
    assert packed.dtype == (layout.dtype or dtype)
    assert packed.is_contiguous()
    torch.testing.assert_close(layout.unpack(packed, n, k).float(), w.float(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_of_the_rows(shape):
    w = weight(*shape)
    torch.testing.assert_close(pack_weight(w, "sums").long(), w.long().sum(1), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "dtype"), all_layouts())
def test_strides_do_not_matter(name, dtype):
    w = fitting(name, 70, 10, dtype)
    expected = pack_weight(w, name)
    sliced = torch.empty(w.shape[0], 2 * w.shape[1], dtype=dtype)[:, ::2]
    for other in (w.t().contiguous().t(), sliced.copy_(w)):
        torch.testing.assert_close(pack_weight(other, name).float(), expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "dtype"), all_layouts())
def test_a_packed_weight_never_aliases_its_weight(name, dtype):
    w = fitting(name, 64, 4, dtype)
    assert pack_weight(w, name).untyped_storage().data_ptr() != w.untyped_storage().data_ptr()


@pytest.mark.parametrize(("name", "dtype"), all_layouts())
def test_opcheck(name, dtype):
    # test_schema adds numbers to its arguments, which float8 cannot.
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += [] if dtype.is_floating_point else ["test_schema"]
    arguments = ([fitting(name, 65, 5, dtype), fitting(name, 7, 64, dtype).t()], [name, name])
    torch.library.opcheck(prepack, arguments, test_utils=checks)


def test_sizes_that_a_layout_cannot_pack_are_an_error():
    kernels()
    with pytest.raises(RuntimeError, match=r"'aten_int4' packs sizes in multiples of 16, got \[20, 16\]"):
        pack_weight(torch.zeros(20, 16, dtype=torch.uint8), "aten_int4")


def test_unknown_layout_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="bf16_pairs"):
        packed_layout("vnnni")


def test_a_repeated_call_hands_out_the_same_tensors():
    weights = [parameter(), parameter()]
    first, second = prepack(weights, ["vnni"] * 2), prepack(weights, ["vnni"] * 2)
    assert [a is b for a, b in zip(first, second, strict=True)] == [True, True]


def test_passing_views_of_one_weight_are_packed_once():
    w = parameter()
    first, second = (prepack([w.view(70, 9)], ["vnni"])[0] for _ in range(2))
    assert first is second


def test_an_update_in_place_is_seen():
    w = parameter()
    stale = prepack([w], ["vnni"])[0]
    with torch.no_grad():
        w.add_(1)
    fresh = prepack([w], ["vnni"])[0]
    assert fresh is not stale
    assert torch.equal(fresh, pack_weight(w, "vnni"))


def test_a_replaced_storage_is_seen():
    w = parameter()
    prepack([w], ["vnni"])
    w.data = weight(70, 9)
    assert torch.equal(prepack([w], ["vnni"])[0], pack_weight(w, "vnni"))


def test_a_weight_stored_transposed_is_packed_as_its_transpose():
    w = parameter(64, 48)
    packed = prepack([w], [f"vnni{packing.TRANSPOSED}"])[0]
    assert torch.equal(packed, pack_weight(w.t(), "vnni"))
    layout = packed_layout(f"vnni{packing.TRANSPOSED}")
    assert packed.shape == layout.shape(64, 48)
    assert torch.equal(layout.unpack(packed, 64, 48), w)


def test_another_view_at_the_same_address_is_another_weight():
    w = weight(64, 64)
    whole, part, transposed = (prepack([v], ["vnni"])[0] for v in (w, w[:32], w.t()))
    for packed, view in ((whole, w), (part, w[:32]), (transposed, w.t())):
        assert torch.equal(packed, pack_weight(view, "vnni"))


def test_tied_weights_are_packed_once():
    w = parameter()
    tied = nn.Parameter(w.data, requires_grad=False)
    a, b = prepack([w, tied], ["vnni", "vnni"])
    assert a is b


def test_an_inference_tensor_is_packed_once():
    with torch.inference_mode():
        w = weight(70, 9)
        first, second = (prepack([w], ["vnni"])[0] for _ in range(2))
    assert first is second


def test_dead_weights_are_dropped():
    kept, w = parameter(), parameter()
    prepack([kept, w], ["vnni", "vnni"])
    del w
    gc.collect()
    assert len(constants._groups) == 0
    assert len(packed_weights._packed) == 1


def test_a_compiled_graph_never_writes_over_a_packed_weight():
    # The last use of the packed weight is pointwise and of its size, which Inductor would do in place.
    w, a = weight(64, 64, torch.float8_e4m3fn), torch.randn(64, 64)

    def chain(a, w):
        return (prepack([w], ["float32"])[0] + a).relu() @ a

    expected, packed = chain(a, w), pack_weight(w, "float32")
    compiled = torch.compile(chain)
    for _ in range(2):
        torch.testing.assert_close(compiled(a, w), expected)
        assert torch.equal(prepack([w], ["float32"])[0], packed)


@pytest.mark.parametrize("layout", ["vnni", "pairs"])
@pytest.mark.parametrize("shape", [(2304, 4096), (320, 516)])
def test_a_packed_weight_is_the_same_without_huge_pages(layout, shape, monkeypatch):
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    packed = pack_weight(weight, layout)
    assert packed.is_contiguous()
    assert torch.equal(packed_layout(layout).unpack(packed, *weight.shape), weight)
    # A system that has no name for the advice, and one that refuses it.
    for advice in (None, -1):
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", advice, raising=False)
        monkeypatch.setattr(huge_pages, "_regions", [])
        assert torch.equal(pack_weight(weight, layout), packed)
