"""A quantized linear holds its weight once, in the layout of its kernel, and still has codes to read and to write."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.fx import GraphModule, Interpreter

import fx_quant
from fx_quant.errors import FxQuantError
from fx_quant.kernels import layouts
from fx_quant.kernels.layouts import Held, pack_weight, packed_layout, repacked
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.layers.packed_weight import PackedWeight
from fx_quant.scheme import Numerics, Scheme
from fx_quant.weights import pack_int4
from tests.graphs import calls, capture
from tests.test_linear import assert_right
from tests.tolerances import assert_within

pytestmark = pytest.mark.usefixtures("uncached")

ops = torch.ops.fx_quant
E4M3 = torch.float8_e4m3fn
N, K = 96, 160
W8A8 = "int8 per_token (dynamic) x int8 per_channel"
ASYMMETRIC = "int8 per_token asymmetric (dynamic) x int8 per_channel"
W4A8 = "int8 per_token (dynamic) x int4 per_group(32)"
W8A16, W4A16 = "bfloat16 x int8 per_channel", "bfloat16 x uint4 per_group(32) asymmetric"
BLOCKS = "float8_e4m3fn per_group(16) (dynamic) x float8_e4m3fn per_block(32, 16)"
SCHEMES = (W8A8, ASYMMETRIC, W4A8, W8A16, W4A16, BLOCKS)
# The layouts of machines with AMX, VNNI and bfloat16; others have fewer.
HELD_LAYOUTS = ("vnni", "amx", "pairs", "columns", "int4_words", "vnni_int4")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def build(text: str = W8A8, n: int = N, k: int = K, *, seed: int = 0) -> QuantizedLinear:
    torch.manual_seed(seed)
    return QuantizedLinear.from_float(nn.Linear(k, n), text)


def rows(layer: QuantizedLinear, count: int = 5, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    dtype = layer.scheme.activation.dtype if layer.scheme.weight_only else torch.float32
    return torch.randn(count, layer.in_features).to(dtype)


def is_packed(layer: PackedWeight) -> bool:
    return layer._buffers.get("weight") is None


def needs_packing(layer: QuantizedLinear) -> None:
    if not is_packed(layer):
        pytest.skip(f"no kernel of this machine reads a packed weight of {layer.scheme}")


def codes_of(layer: QuantizedLinear) -> Tensor:
    return layer.weight.clone()


def held_bytes() -> int:
    """Of all storages of tensors that are alive, once each."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    storages = [x.untyped_storage() for x in alive if x.device.type == "cpu" and x.layout is torch.strided]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


# --- one copy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SCHEMES)
def test_a_layer_holds_its_weight_once_however_it_is_called(text):
    before = held_bytes()
    layer = build(text, n=512, k=1024)
    needs_packing(layer)
    codes = layer.out_features * layer.in_features // layer.scheme.weight.codes_per_element
    x = rows(layer)
    for _ in range(3):
        layer(x)
    layer(x[:1])
    layer.state_dict()
    layer.weight.clone()
    assert is_packed(layer)
    # Scales in two forms, sums and the bias are small beside the weight.
    small = 8 * layer.weight_scale.numel() * 4 + 4 * layer.out_features * 4
    assert codes <= held_bytes() - before <= codes + small + x.nbytes


def test_a_compiled_graph_reads_the_packed_weight_of_the_layer():
    before = held_bytes()
    layer = build(n=512, k=1024)
    needs_packing(layer)
    x = rows(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="fx_quant")
    assert_within(compiled(x), layer(x), Numerics.SAME_ACCUM)
    assert 512 * 1024 <= held_bytes() - before <= 1.2 * 512 * 1024
    layer.weight.neg_()
    assert_within(compiled(x), layer(x), Numerics.SAME_ACCUM)
    assert 512 * 1024 <= held_bytes() - before <= 1.2 * 512 * 1024


@pytest.mark.parametrize("text", SCHEMES)
def test_codes_that_are_given_are_packed_once_nobody_else_holds_them(text):
    like = build(text)
    needs_packing(like)
    codes, x = codes_of(like), rows(like)
    layer = QuantizedLinear(
        like.scheme, codes, like.weight_scale, weight_zero_point=like.weight_zero_point, bias=like.bias
    )
    assert torch.equal(layer(x), like(x)) and layer.weight.data_ptr() == codes.data_ptr()
    codes.zero_()
    assert_right(layer, x, layer(x))
    codes.copy_(like.weight)
    del codes
    assert torch.equal(layer(x), like(x)) and is_packed(layer)
    assert torch.equal(layer.weight, like.weight)


@pytest.mark.parametrize(
    "foreign",
    [
        lambda codes: torch.from_numpy(codes.numpy().copy()),
        lambda codes: codes.share_memory_(),
        lambda codes: torch.frombuffer(bytearray(codes.numpy().tobytes()), dtype=torch.int8).view(codes.shape),
    ],
    ids=["numpy", "shared", "buffer"],
)
def test_memory_that_is_not_pytorchs_alone_is_left(foreign):
    like = build()
    layer = QuantizedLinear(like.scheme, foreign(codes_of(like)), like.weight_scale, bias=like.bias)
    x = rows(layer)
    assert torch.equal(layer(x), like(x)) and not is_packed(layer)


def test_tied_codes_stay_shared():
    first, x = build(), rows(build())
    second = build(seed=1)
    second.weight, second.weight_scale, second.bias = first.weight, first.weight_scale, first.bias
    before = held_bytes()
    assert torch.equal(first(x), second(x))
    assert not is_packed(first) and not is_packed(second)
    first.weight[3] = 7
    assert_right(second, x, second(x))
    assert torch.equal(first(x), second(x))
    needed = packed_layout("vnni").shape(N, K)
    assert held_bytes() - before <= np.prod(needed) + x.nbytes * 8  # packed once for both
    del second
    assert_right(first, x, first(x))


def test_quantize_holds_no_float_weight_for_longer_than_it_needs(monkeypatch):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    alive = [weakref.ref(linear.weight) for linear in model]
    counts, from_float = [], QuantizedLinear.from_float.__func__

    def counting(cls, linear, scheme):
        counts.append(sum(weight() is not None for weight in alive))
        return from_float(cls, linear, scheme)

    monkeypatch.setattr(QuantizedLinear, "from_float", classmethod(counting))
    gc.disable()
    try:
        fx_quant.quantize_(model, W8A8)
    finally:
        gc.enable()
    assert counts == [6, 5, 4, 3, 2, 1]


# --- every write is seen ------------------------------------------------------------------------------------------


def through_numpy(layer: QuantizedLinear, new: Tensor) -> None:
    layer.weight.view(torch.uint8).numpy()[...] = new.view(torch.uint8).numpy()


def swapped_in(layer: QuantizedLinear, new: Tensor) -> None:
    if is_packed(layer):
        with pytest.raises(RuntimeError, match="weakref"):
            torch.utils.swap_tensors(layer.weight, new)
        layer.unpack()
    torch.utils.swap_tensors(layer.weight, new)


def in_inference_mode(layer: QuantizedLinear, new: Tensor) -> None:
    with torch.inference_mode():
        layer.weight.copy_(new)


def uncounted(layer: QuantizedLinear, new: Tensor) -> None:
    weight = layer.unpack()
    with _unsafe_preserve_version_counter(weight):
        weight.copy_(new)


def into_the_state_dict(layer: QuantizedLinear, new: Tensor) -> None:
    layer.state_dict()["weight"].copy_(new)


def loaded(layer: QuantizedLinear, new: Tensor, **how: bool) -> None:
    layer.load_state_dict({**layer.state_dict(), "weight": new}, **how)


def through_storage(layer: QuantizedLinear, new: Tensor) -> None:
    layer.weight.untyped_storage().copy_(new.untyped_storage())


def assigned_in_data(layer: QuantizedLinear, new: Tensor) -> None:
    layer.weight.data = new


def registered(layer: QuantizedLinear, new: Tensor) -> None:
    layer.register_buffer("weight", new)


def row_by_row(layer: QuantizedLinear, new: Tensor) -> None:
    for row, values in zip(layer.weight, new, strict=True):
        row.copy_(values)


def by_index(layer: QuantizedLinear, new: Tensor) -> None:
    layer.weight[:] = new


def as_parameter(layer: QuantizedLinear, new: Tensor) -> None:
    layer.weight = nn.Parameter(new, requires_grad=False)


WRITES: dict[str, Callable[[QuantizedLinear, Tensor], None]] = {
    "copy_": lambda layer, new: layer.weight.copy_(new),
    "data.copy_": lambda layer, new: layer.weight.data.copy_(new),
    "detach().copy_": lambda layer, new: layer.weight.detach().copy_(new),
    "data = new": assigned_in_data,
    "weight = new": lambda layer, new: setattr(layer, "weight", new),
    "weight = another's": lambda layer, new: setattr(layer, "weight", layer_of(layer, new).weight),
    "parameter": as_parameter,
    "register_buffer": registered,
    "index": by_index,
    "a view": lambda layer, new: layer.weight.view(-1).copy_(new.view(-1)),
    "transposed": lambda layer, new: layer.weight.t().copy_(new.t()),
    "row by row": row_by_row,
    "out=": lambda layer, new: torch.add(new.view(torch.uint8), 0, out=layer.weight.view(torch.uint8)),
    "numpy": through_numpy,
    "dlpack": lambda layer, new: torch.from_dlpack(layer.weight.view(torch.uint8)).copy_(new.view(torch.uint8)),
    "storage": through_storage,
    "swap_tensors": swapped_in,
    "inference_mode": in_inference_mode,
    "preserved version": uncounted,
    "state_dict": into_the_state_dict,
    "state_dict(keep_vars)": lambda layer, new: layer.state_dict(keep_vars=True)["weight"].copy_(new),
    "load_state_dict": loaded,
    "load_state_dict(assign)": lambda layer, new: loaded(layer, new, assign=True),
    "_foreach_copy_": lambda layer, new: torch._foreach_copy_([layer.weight], [new]),
}


def layer_of(like: QuantizedLinear, codes: Tensor) -> QuantizedLinear:
    point = like.weight_zero_point
    return QuantizedLinear(like.scheme, codes, like.weight_scale, weight_zero_point=point, bias=like.bias)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("text", [W8A8, ASYMMETRIC, W4A16, BLOCKS])
def test_a_write_to_the_codes_is_seen(text, write):
    layer = build(text)
    x = rows(layer)
    layer(x)
    for seed in (1, 2):
        new = codes_of(build(text, seed=seed))
        WRITES[write](layer, new.clone())
        expected = layer_of(layer, new)(x)
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer.weight, new)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("write", [name for name in WRITES if name != "parameter"])
def test_a_compiled_layer_sees_a_write(write):
    layer = build()
    x = rows(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    for seed in (1, 2):
        compiled(x)
        new = codes_of(build(seed=seed))
        WRITES[write](layer, new.clone())
        torch.testing.assert_close(compiled(x), layer_of(layer, new)(x))
        torch.testing.assert_close(compiled(x), layer_of(layer, new)(x))


LEAVE_NOTHING = [
    name
    for name in WRITES
    if name not in ("parameter", "numpy", "dlpack", "preserved version", "storage", "state_dict(keep_vars)")
]


@pytest.mark.parametrize("write", LEAVE_NOTHING)
def test_after_a_write_the_weight_is_held_once_again(write):
    layer = build()
    needs_packing(layer)
    new = codes_of(build(seed=1))
    WRITES[write](layer, new)
    del new
    layer(rows(layer))
    assert is_packed(layer)


@pytest.mark.parametrize("write", ["copy_", "data.copy_", "detach().copy_", "index", "state_dict"])
def test_after_a_write_no_call_is_needed_to_pack_the_weight(write):
    layer = build()
    needs_packing(layer)
    new = codes_of(build(seed=1))
    WRITES[write](layer, new.clone())
    assert is_packed(layer) and torch.equal(layer.weight, new)


def test_codes_stay_while_a_view_of_them_is_held():
    layer, x = build(), rows(build())
    row = layer.weight[2]
    for value in (3, 4):
        row.fill_(value)
        assert_right(layer, x, layer(x))
        assert not is_packed(layer)
    del row
    assert torch.equal(layer.weight[2], torch.full((K,), 4, dtype=torch.int8))
    layer(x)
    needs_packing(layer)
    assert_right(layer, x, layer(x))


def test_a_held_state_dict_is_the_weight_until_it_is_gone():
    layer, x = build(), rows(build())
    needs_packing(layer)
    state = layer.state_dict()
    layer(x)
    state["weight"][1] = 5
    assert_right(layer, x, layer(x))
    assert torch.equal(layer.weight, state["weight"])
    del state
    assert is_packed(layer) and bool((layer.weight[1] == 5).all())


# --- what stands for the codes ------------------------------------------------------------------------------------


def test_what_is_asked_of_a_weight_in_a_forward_pass_costs_nothing(monkeypatch):
    layer = build()
    needs_packing(layer)
    monkeypatch.setattr(PackedWeight, "unpack", lambda _: pytest.fail("the codes were unpacked"))
    weight = layer.weight
    assert isinstance(weight, Tensor) and weight.dtype is torch.int8 and weight.device.type == "cpu"
    assert weight.shape == (N, K) and weight.size(1) == K and weight.numel() == N * K and len(weight) == N
    assert weight.dim() == weight.ndim == 2 and weight.stride() == (K, 1) and weight.is_contiguous()
    assert not weight.requires_grad and not weight.is_floating_point() and weight.nbytes == N * K
    assert hash(weight) == id(weight)


def _attribute(layer: QuantizedLinear, new: Tensor) -> Callable[[], None]:
    before = layer.weight
    layer.weight = new
    return lambda: setattr(layer, "weight", before)


def _data(layer: QuantizedLinear, new: Tensor) -> Callable[[], None]:
    before = layer.weight.data
    layer.weight.data = new
    return lambda: setattr(layer.weight, "data", before)


def _data_of_one(layer: QuantizedLinear, new: Tensor) -> Callable[[], None]:
    weight = layer.weight
    before, weight.data = weight.data, new
    return lambda: setattr(weight, "data", before)


def _buffer(layer: QuantizedLinear, new: Tensor) -> Callable[[], None]:
    before = layer.weight
    layer._buffers["weight"] = new
    return lambda: layer._buffers.update(weight=before)


def _assigned(layer: QuantizedLinear, new: Tensor) -> Callable[[], None]:
    before = layer.state_dict()
    layer.load_state_dict({**before, "weight": new}, assign=True)
    return lambda: layer.load_state_dict(before, assign=True) and None


@pytest.mark.parametrize("swapped", [_attribute, _data, _data_of_one, _buffer, _assigned])
@pytest.mark.parametrize("called", [True, False])
def test_a_weight_that_was_put_aside_comes_back(swapped, called):
    """As moving averages are swapped in and out: what was taken is not what the layer holds meanwhile."""
    layer, x = build(), rows(build())
    needs_packing(layer)
    expected, codes, new = layer(x), codes_of(layer).clone(), codes_of(build(seed=1)).clone()
    put_back = swapped(layer, new)
    if called:
        assert not torch.equal(layer(x), expected)
    put_back()
    assert torch.equal(layer.weight, codes)
    assert torch.equal(layer(x), expected)


def test_two_names_of_one_weight_see_each_others_writes():
    layer = build()
    first, second = layer.weight, layer.weight
    first.fill_(3)
    assert torch.equal(second, first) and int(second[0, 0]) == 3
    second[0, 0] = 5
    assert int(first[0, 0]) == int(layer.weight[0, 0]) == 5


def test_codes_are_read_as_what_they_are():
    layer = build()
    codes = layer.state_dict()["weight"].clone()
    weight = layer.weight
    assert torch.equal(weight, codes) and torch.equal(weight.float(), codes.float())
    assert torch.equal(weight @ codes.t().to(torch.int8), codes @ codes.t())
    assert torch.equal(torch.stack([weight, weight])[1], codes)
    assert np.array_equal(weight.numpy(), codes.numpy()) and weight.tolist() == codes.tolist()
    assert repr(weight) == repr(codes) and torch.equal(weight[3], codes[3])
    assert type(weight.clone()) is Tensor and type(copy.deepcopy(weight)) is Tensor
    assert pickle.loads(pickle.dumps(weight)).equal(codes)
    file = io.BytesIO()
    torch.save({"weight": layer.weight}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["weight"], codes)


def test_compiled_code_reads_the_codes_and_their_dtype():
    layer = build()

    def reads(x: Tensor) -> Tensor:
        return layer(x).to(torch.float64) + layer.weight.sum() + x.to(layer.weight.dtype).sum()

    x = rows(layer)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(reads, backend="eager", fullgraph=True)(x), reads(x))


@pytest.mark.parametrize("through", ["itself", "a view", "an item"])
def test_compiled_code_that_writes_to_a_packed_weight_is_refused(through):
    """It would write to codes that were unpacked for it, which nobody reads."""
    layer = QuantizedLinear.from_float(nn.Linear(64, 64), W8A8)
    assert layer.held_weight()[1] is not None

    def writes(x: Tensor) -> Tensor:
        if through == "itself":
            layer.weight.zero_()
        elif through == "a view":
            layer.weight.t()[1:].mul_(2)
        else:
            layer.weight[0] = 1
        return layer(x)

    with pytest.raises(Exception, match="outside of what is compiled"):
        torch.compile(writes, backend="fx_quant")(torch.randn(2, 64))
    layer.unpack()
    before = layer.weight.clone()
    torch._dynamo.reset()
    torch.compile(writes, backend="fx_quant")(torch.randn(2, 64))
    assert not torch.equal(layer.weight, before)


def test_code_that_takes_only_plain_tensors_says_so():
    layer = build()
    needs_packing(layer)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(FxQuantError, match=r"must be a plain tensor to aten"):
        layer.weight + 1
    assert is_packed(layer)


def test_an_error_of_a_function_of_the_codes_loses_nothing():
    layer = build()
    codes, x = codes_of(layer), rows(layer)
    with pytest.raises(RuntimeError, match="size"):
        layer.weight.copy_(torch.ones(3, 5))
    assert torch.equal(layer.weight, codes)
    assert_right(layer, x, layer(x))


# --- as a module --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SCHEMES)
def test_the_state_dict_has_codes_that_safetensors_saves(text, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer, other = build(text), build(text, seed=1)
    x, codes = rows(layer), codes_of(layer)
    assert "packed_weight" not in layer.state_dict()
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = safetensors.load_file(tmp_path / "layer.safetensors")
    assert type(state["weight"]) is Tensor and torch.equal(state["weight"], codes)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), layer(x))
    assert is_packed(other) == is_packed(layer)
    other = build(text, seed=1)
    other.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        other.load_state_dict({key: value for key, value in state.items() if key != "weight"})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        other.load_state_dict({**state, "weight": state["weight"][1:]})
    assert torch.equal(other(x), layer(x))


def pickled(layer: QuantizedLinear) -> QuantizedLinear:
    return pickle.loads(pickle.dumps(layer))


def saved(layer: QuantizedLinear) -> QuantizedLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("text", [W8A8, W4A8, W4A16])
def test_a_copy_has_a_weight_of_its_own(text, duplicate):
    layer = build(text)
    x, codes = rows(layer), codes_of(layer)
    twin = duplicate(layer)
    assert is_packed(twin) == is_packed(layer)
    expected = layer(x)
    assert torch.equal(twin(x), expected) and torch.equal(twin.weight, codes)
    twin.weight.zero_()
    assert torch.equal(layer(x), expected) and torch.equal(layer.weight, codes)
    assert not twin.weight.any()


def test_a_shallow_copy_shares_the_weight():
    layer = build()
    x, twin = rows(layer), copy.copy(layer)
    for written, other in ((layer, twin), (twin, layer)):
        written.weight.neg_()
        written.weight.view(-1)[7] = 1
        assert torch.equal(written.weight, other.weight)
        assert_right(other, x, other(x))


@pytest.mark.parametrize(("text", "layout"), [(W8A8, "columns"), (W8A16, "vnni"), (W4A16, "vnni_int4")])
def test_a_pickle_of_another_machine_is_repacked(text, layout):
    layer = build(text)
    x, codes, expected = rows(layer), codes_of(layer), layer(rows(layer))
    layer.unpack()
    assert layer._pack(layout)
    assert torch.equal(layer.weight, codes)
    came = pickled(layer)
    assert came._form.held.layout == layout
    assert torch.equal(came(x), expected) and torch.equal(came.weight, codes)
    assert came._form.held.layout != layout or not is_packed(came)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["pairs", "columns"])
def test_activations_of_another_dtype_than_the_weight_is_packed_for(layout, x_dtype):
    layer = build(W8A16)
    layer.unpack()
    assert layer._pack(layout, settled=True)
    x = rows(layer).to(x_dtype)
    for _ in range(2):
        assert_right(layer, x, layer(x))
    layer.weight.neg_()
    assert_right(layer, x, layer(x))


def test_a_move_to_another_device_takes_codes():
    layer = build(W4A16)
    codes, x, expected = codes_of(layer), rows(layer), layer(rows(layer))
    moved = copy.deepcopy(layer).to("meta")
    assert moved.weight.shape == codes.shape and moved.weight.device.type == "meta"
    assert {x.device.type for x in moved.state_dict().values()} == {"meta"}
    empty = moved.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), expected)
    assert torch.equal(layer.to("cpu").half().to(torch.bfloat16).weight, codes)


@pytest.mark.parametrize("how", ["fork", "share_memory"])
def test_another_process_reads_the_weight(how):
    layer = build()
    x, expected = rows(layer), layer(rows(layer))
    if how == "share_memory":
        layer.share_memory()
    queue = multiprocessing.get_context("fork").Queue()

    def run() -> None:
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        queue.put(layer(x).tolist())

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    got = torch.tensor(queue.get(timeout=60))
    child.join()
    assert torch.equal(got, expected) and torch.equal(layer(x), expected)


def test_buffers_are_what_is_held():
    layer = build()
    needs_packing(layer)
    held = dict(layer.named_buffers())
    assert set(held) == {"packed_weight", "weight_scale"}
    assert all(type(buffer) is Tensor for buffer in held.values())
    layer.unpack()
    assert set(dict(layer.named_buffers())) == {"weight", "weight_scale"}


def test_functional_call_takes_codes():
    layer, x = build(), rows(build())
    expected, new = layer(x), codes_of(build(seed=1))
    out = torch.func.functional_call(layer, {"weight": new}, (x,))
    assert torch.equal(out, layer_of(layer, new)(x))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("made", [True, False])
def test_inference_mode_changes_nothing(made):
    layer = None if made else build()
    with torch.inference_mode():
        layer = layer or build()
        x, expected = rows(layer), layer(rows(layer))
    assert torch.equal(layer(x), expected)
    layer.weight.neg_()
    assert_right(layer, x, layer(x))


def test_traced_with_fake_tensors_the_layer_stays_real():
    layer = build()
    codes, x = codes_of(layer), rows(layer)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x))
        layer.state_dict()
    assert torch.equal(layer.weight, codes)
    layer.unpack()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x))
    assert torch.equal(layer.weight, codes)
    assert_right(layer, x, layer(x))


# --- graphs -------------------------------------------------------------------------------------------------------


def ran(graph, inputs: list[Tensor]) -> Tensor:
    out = Interpreter(GraphModule(nn.Module(), graph)).run(*inputs)
    return out[0] if isinstance(out, (list, tuple)) else out


# A target whose kernel reads a layout of int8 codes, and that kernel.
READERS = {"vnni": ("x86_vnni", ops.cpu_int8_vnni.default), "amx": ("x86_amx", ops.cpu_int8_amx.default)}


def test_a_kernel_of_the_same_layout_is_given_the_packed_weight():
    layer = build()
    needs_packing(layer)
    target, op = READERS[layer.held_weight()[1].layout]
    (captured,) = capture(layer, rows(layer), target=target)
    (kernel,) = calls(captured.state.graph, op)
    assert kernel.args[1].op == "placeholder"
    assert not calls(captured.state.graph, ops.prepack.default) and not calls(captured.state.graph, ops.unpack.default)


def test_sums_are_computed_of_the_packed_weight_once():
    layer = build(ASYMMETRIC)
    needs_packing(layer)
    x, layout = rows(layer), layer.held_weight()[1].layout
    target, op = READERS[layout]
    (captured,) = capture(layer, x, target=target)
    (kernel,) = calls(captured.state.graph, op)
    assert kernel.args[1].op == "placeholder"
    (prepack,) = calls(captured.state.graph, ops.prepack.default)
    assert prepack.args == ([kernel.args[1]], [f"sums_of_{layout}_{N}x{K}"])
    assert not calls(captured.state.graph, ops.unpack.default)
    assert_within(ran(captured.state.graph, captured.inputs), layer(x), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("target", ["x86_vnni", "x86_avx512", "x86", "arm"])
@pytest.mark.parametrize("text", SCHEMES)
def test_a_graph_of_any_machine_computes_what_the_layer_does(text, target):
    layer = build(text)
    x = rows(layer)
    (captured,) = capture(layer, x, target=target)
    (site,) = captured.state.rows or (None,)
    if site is not None:
        assert site.problem.constant_weight
        assert_within(ran(captured.state.graph, captured.inputs), layer(x), Numerics.REASSOCIATED)
        # Nothing is unpacked in every call.
        assert not calls(captured.state.graph, ops.unpack.default)


def test_codes_that_a_graph_reads_beside_the_matmul_are_unpacked_once():
    layer = build()
    needs_packing(layer)

    def reads(x: Tensor) -> Tensor:
        return layer(x) * layer.weight.float().mean()

    x, layout = rows(layer), layer.held_weight()[1].layout
    (captured,) = capture(reads, x, target=READERS[layout][0])
    (prepack,) = calls(captured.state.graph, ops.prepack.default)
    assert prepack.args[1] == [f"codes_of_{layout}_{N}x{K}"]
    assert not calls(captured.state.graph, ops.unpack.default)
    torch.testing.assert_close(ran(captured.state.graph, captured.inputs), reads(x))


# --- the op -------------------------------------------------------------------------------------------------------


def weight_in(layout: str, n: int, k: int) -> Tensor:
    packing = packed_layout(layout)
    dtype = torch.int8 if torch.int8 in packing.weights else torch.uint8
    return torch.randint(0, 256, (n, k), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("sizes", [(1, 2), (64, 64), (70, 30)])
@pytest.mark.parametrize("layout", HELD_LAYOUTS)
def test_unpack_is_the_inverse_of_pack(layout, sizes):
    weight = weight_in(layout, *sizes)
    packed = pack_weight(weight, layout)
    codes = ops.unpack(packed, layout, *sizes)
    assert codes.dtype is weight.dtype and codes.is_contiguous()
    assert torch.equal(codes.view(torch.uint8), weight.view(torch.uint8))
    assert codes.untyped_storage().data_ptr() != packed.untyped_storage().data_ptr()
    torch.library.opcheck(ops.unpack.default, (packed, layout, *sizes))


@pytest.mark.parametrize("layout", HELD_LAYOUTS)
def test_what_is_computed_of_a_packed_weight_is_that_of_its_codes(layout):
    weight = weight_in(layout, 70, 32)
    packed, held = pack_weight(weight, layout), Held(layout, 70, 32)
    others = [name for name in HELD_LAYOUTS if weight.dtype in packed_layout(name).weights]
    names = [*others, "padded_80x32", *(["sums", "sums_16"] if weight.dtype is torch.int8 else [])]
    found = ops.prepack([packed] * (len(names) + 1), [repacked(name, held) for name in (*names, "codes")])
    for name, got in zip((*names, "codes"), found, strict=True):
        expected = weight if name == "codes" else pack_weight(weight, name)
        assert got.dtype is expected.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), name
    torch.library.opcheck(ops.prepack.default, ([packed], [repacked(others[0], held)]))


PANELS = [layout.name for layout in layouts.layouts() if layout.panels is not None]


@pytest.mark.parametrize("strides", ["given as it is", "a view", "transposed"])
@pytest.mark.parametrize("layout", [*PANELS, "sums_16", "nibble_sums_16"])
def test_a_weight_that_is_packed_in_parts_is_packed_as_in_one(layout, strides, monkeypatch):
    packing = packed_layout(layout)
    dtype = min(packing.weights, key=str, default=torch.float32)
    weight = torch.randint(0, 120, (330, 96), dtype=torch.uint8)
    weight = weight.to(dtype) if dtype.is_floating_point else weight.view(dtype)
    name = layout
    if strides == "a view":
        weight = weight[:, ::2][3:]
    elif strides == "transposed":
        weight, name = weight.t().contiguous(), f"{layout}.t"
    whole = pack_weight(weight, name)
    monkeypatch.setattr(layouts, "_PART", 1)
    parts, packs = [], packing.pack
    monkeypatch.setitem(
        layouts._LAYOUTS, layout, replace(packing, pack=lambda part: parts.append(part.shape) or packs(part))
    )
    packed = pack_weight(weight, name)
    assert packed.dtype is whole.dtype and torch.equal(packed.view(torch.uint8), whole.view(torch.uint8))
    if layout in PANELS:
        assert [n for n, _ in parts] == [64] * 5 + [10 if strides != "a view" else 7]


def test_a_wrong_packed_weight_is_refused():
    packed = pack_weight(weight_in("vnni", 70, 30), "vnni")
    with pytest.raises(RuntimeError, match=r"unpack: a weight \[70, 80\] in layout 'vnni' must be uint8"):
        ops.unpack(packed, "vnni", 70, 80)
    with pytest.raises(RuntimeError, match="unpack: layout 'sums' does not hold the weight"):
        ops.unpack(packed, "sums", 70, 30)


def test_layouts_that_grow_a_weight_are_not_held():
    for layout in layouts.layouts():
        for dtype in layout.weights if layout.name in HELD_LAYOUTS else ():
            assert layout.holds(dtype), layout.name
    for layout, dtype in (("bf16_pairs", E4M3), ("float32", E4M3), ("sums", torch.int8), ("aten_int4", torch.uint8)):
        assert not packed_layout(layout).holds(dtype)


def test_a_nibble_of_each_byte_comes_back():
    codes = torch.randint(-8, 8, (70, 60), dtype=torch.int8)
    layer = QuantizedLinear(Scheme.parse("bfloat16 x int4 per_channel"), pack_int4(codes), torch.rand(70, 1) + 1)
    x = rows(layer)
    assert_right(layer, x, layer(x))
    assert torch.equal(layer.weight, pack_int4(codes))
