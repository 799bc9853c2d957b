"""What is kept of a weight never outlives it: ways to write x how the weight is stored x how the model is called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torchao.quantization as torchao
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.fx import GraphModule, Interpreter

import fx_quant
from fx_quant.kernels import layouts, packed_weights
from fx_quant.ops import constants, fingerprint
from fx_quant.ops.fingerprint import CALLS
from fx_quant.passes.pipeline import to_kernels
from fx_quant.scheme import Numerics
from tests.graphs import calls, rewrite, trace
from tests.tolerances import assert_within

pytestmark = pytest.mark.usefixtures("uncached")

ROOT = Path(__file__).parent.parent
ops = torch.ops.fx_quant
K = 96  # of square weights too, where a transpose is not seen in the shape
INT8, E4M3 = torch.int8, torch.float8_e4m3fn


def codes(seed: int, dtype: torch.dtype = INT8, shape: tuple[int, ...] = (K, K)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is INT8:
        return torch.randint(-127, 128, shape, dtype=dtype, generator=generator)
    if dtype is torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


# --- ways to write: each makes ``module.w`` hold ``new`` --------------------------------------------------------------


def assigned(module: nn.Module, new: Tensor) -> None:
    module.load_state_dict({**module.state_dict(), "w": new.clone()}, assign=True)


def loaded(module: nn.Module, new: Tensor) -> None:
    module.load_state_dict({**module.state_dict(), "w": new})


def swapped_by_loading(module: nn.Module, new: Tensor) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        loaded(module, new)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def swapped(module: nn.Module, new: Tensor) -> None:
    like = copy.deepcopy(module.w)
    like.data = new.clone()
    torch.utils.swap_tensors(module.w, like)


def through_data_setter(module: nn.Module, new: Tensor) -> None:
    module.w.data = like_strides(new, module.w)


def through_data_twice(module: nn.Module, new: Tensor) -> None:
    """As an exponential moving average is swapped in and out."""
    average = like_strides(new, module.w)
    module.w.data, average.data = average.data, module.w.data


def like_strides(new: Tensor, old: Tensor) -> Tensor:
    return torch.empty_strided(old.shape, old.stride(), dtype=old.dtype).copy_(new)


def through_numpy(module: nn.Module, new: Tensor) -> None:
    module.w.data.view(torch.uint8).numpy()[...] = new.view(torch.uint8).numpy()


def through_storage(module: nn.Module, new: Tensor) -> None:
    module.w.untyped_storage().copy_(like_strides(new, module.w).untyped_storage())


def in_inference_mode(module: nn.Module, new: Tensor) -> None:
    with torch.inference_mode():
        module.w.copy_(new)


def uncounted(module: nn.Module, new: Tensor) -> None:
    """As FSDP2 gathers a parameter."""
    with torch.no_grad(), _unsafe_preserve_version_counter(module.w):
        module.w.copy_(new)


def through_a_view(module: nn.Module, new: Tensor) -> None:
    module.earlier_view.copy_(new.t())


WRITES: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "copy_": lambda module, new: module.w.copy_(new),
    "load_state_dict": loaded,
    "load_state_dict(assign=True)": assigned,
    "load_state_dict that swaps": swapped_by_loading,
    "swap_tensors": swapped,
    "data.copy_": lambda module, new: module.w.data.copy_(new),
    "detach().copy_": lambda module, new: module.w.detach().copy_(new),
    "data = other": through_data_setter,
    "data swapped": through_data_twice,
    "numpy": through_numpy,
    "storage.copy_": through_storage,
    "inference_mode": in_inference_mode,
    "preserved version": uncounted,
    "an earlier view": through_a_view,
}

# --- how the weight is stored, and what multiplies by it -----------------------------------------------------------------


class Linear(nn.Module):
    """A matmul by ``w``, quantized and stored as its subclass says."""

    dtype = INT8

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.hold(codes(seed, self.dtype))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, K) / 100)
        self.earlier_view = self.w.data.t()

    def hold(self, w: Tensor) -> None:
        self.register_buffer("w", w)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.w, self.scale)

    @staticmethod
    def compute(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        raise NotImplementedError  # of each subclass


def int8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
    return (x / scale).round().clamp(-127, 127).to(INT8), scale


class RowMajor(Linear):
    """``[n, k]``, as most libraries have it."""

    @staticmethod
    def compute(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        q, of_row = int8_codes(x)
        return torch._int_mm(q, w.t()).float() * of_row * scale


class Transposed(Linear):
    """``[k, n]``, which the graph multiplies by as it is."""

    @staticmethod
    def compute(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        q, of_row = int8_codes(x)
        return torch._int_mm(q, w).float() * of_row * scale


class ColumnMajor(Transposed):
    """``Parameter(weight.t())``, as vLLM has it."""

    def hold(self, w: Tensor) -> None:
        self.w = nn.Parameter(w.t(), requires_grad=False)


class Float8(Linear):
    """float8 ``[k, n]``, multiplied after a cast."""

    dtype = E4M3

    @staticmethod
    def compute(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        of_row = x.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 448
        a = (x / of_row).clamp(-448, 448).to(E4M3)
        return (a.float() @ w.float()) * of_row * scale


class WeightOnly(Linear):
    """int8 ``[n, k]``, dequantized."""

    @staticmethod
    def compute(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return nn.functional.linear(x, w.to(x.dtype) * scale[:, None])


class Int4(Linear):
    """Two codes to a byte ``[n, k / 2]``, which the graph unpacks."""

    dtype = torch.uint8

    def hold(self, w: Tensor) -> None:
        self.register_buffer("w", w[:, : K // 2].contiguous())

    @staticmethod
    def compute(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        unpacked = torch.stack([w & 15, w >> 4], -1).view(K, K)
        return nn.functional.linear(x, (unpacked.to(x.dtype) - 8) * scale[:, None])


KINDS = (RowMajor, Transposed, ColumnMajor, Float8, WeightOnly, Int4)


def x_of(seed: int = 1) -> Tensor:
    return torch.randn(4, K, generator=torch.Generator().manual_seed(seed))


def new_codes(module: Linear, seed: int) -> Tensor:
    return codes(seed, module.dtype, tuple(module.w.shape))


# --- how the model is called ------------------------------------------------------------------------------------------


def graph_of(module: Linear) -> Callable[[Tensor], Tensor]:
    """The rewritten graph of ``module``, run op by op on the very tensors that the module holds."""
    state = rewrite(trace(module.compute, x_of(), module.w.detach(), module.scale.detach()))
    assert state.rows, state.misses
    to_kernels(state)
    assert calls(state.graph, ops.prepack.default) or calls(state.graph, ops.fold.default)
    interpreter = Interpreter(GraphModule(nn.Module(), state.graph))
    return lambda x: interpreter.run(x, module.w, module.scale)


def compiled(module: nn.Module, **options: object) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(module, backend="fx_quant", options=options)


def from_cache(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The compiled model from the artefact that a compile of before left in Inductor's cache."""
    caches = (
        torch._inductor.config.patch(fx_graph_cache=True),
        torch._functorch.config.patch(enable_autograd_cache=True),
    )
    with caches[0], caches[1]:
        compiled(module)(x_of())
        torch._dynamo.reset()
        hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        again = compiled(module)
        again(x_of())
        assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > hits
    return again


FACES: dict[str, Callable[[Linear], Callable[[Tensor], Tensor]]] = {
    "compiled": compiled,
    "C++ wrapper": lambda module: compiled(module, cpp_wrapper=True),
    "cached artefact": from_cache,
}


def assert_fresh(call: Callable[[Tensor], Tensor], module: nn.Module) -> None:
    x = x_of()
    assert_within(call(x), module(x), Numerics.REASSOCIATED)


def assert_every_write_is_seen(call: Callable[[Tensor], Tensor], module: Linear, writes: Collection[str]) -> None:
    with torch.no_grad():
        assert_fresh(call, module)
        for seed, name in enumerate(writes, start=10):
            new = new_codes(module, seed)
            WRITES[name](module, new)
            assert torch.equal(module.w.view(torch.uint8), new.view(torch.uint8)), name
            assert_fresh(call, module)
            module.earlier_view = module.w.data.t()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rewritten_graph_sees_every_write(kind, write):
    module = kind()
    assert_every_write_is_seen(graph_of(module), module, [write])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("face", "kind"),
    [("compiled", WeightOnly), ("C++ wrapper", Transposed), ("cached artefact", Transposed)],
)
def test_a_compiled_model_sees_every_write(face, kind):
    module = kind()
    assert_every_write_is_seen(FACES[face](module), module, WRITES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_of_a_model_sees_every_write(kind, op_by_op):
    module = kind()
    assert_every_write_is_seen(compiled(module), module, WRITES)


# --- modules and subclasses -------------------------------------------------------------------------------------------


class Quantized(nn.Module):
    """One ``QuantizedLinear``, whose weight is ``w``."""

    def __init__(self, scheme: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = fx_quant.QuantizedLinear.from_float(nn.Linear(K, K), scheme)
        self.dtype = self.linear.weight.dtype
        self.earlier_view = self.w.data.t()

    @property
    def w(self) -> Tensor:
        return self.linear.weight

    def load_state_dict(self, state_dict, *arguments, **named):
        given = {f"linear.{name}" if name == "w" else name: value for name, value in state_dict.items()}
        given["linear.weight"] = given.pop("linear.w")
        return super().load_state_dict(given, *arguments, **named)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


SCHEMES = (
    "int8 per_token (dynamic) x int8 per_channel",
    "int8 per_token asymmetric (dynamic) x int8 per_channel",
    "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel",
    "float32 x int4 per_group(32)",
)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_eager_layer_sees_every_write(scheme, write):
    module = Quantized(scheme)
    with torch.no_grad():
        module(x_of())
        if write == "swap_tensors":
            module.linear.unpack()  # which refuses to be swapped while it is packed
        WRITES[write](module, codes(10, module.dtype, tuple(module.w.shape)))
        seen = module(x_of())
        fx_quant.clear_packed_weights()
        assert torch.equal(seen, module(x_of()))


def test_a_square_weight_that_is_transposed_in_place_is_seen():
    module = Quantized(SCHEMES[0])
    module(x_of())
    module.w.data = module.w.data.t()
    seen = module(x_of())
    fx_quant.clear_packed_weights()
    assert torch.equal(seen, module(x_of()))


@pytest.mark.parametrize("writes_in_inference_mode", [False, True])
def test_weights_made_in_inference_mode_are_no_constants(writes_in_inference_mode):
    with torch.inference_mode():
        module = RowMajor()
    call = graph_of(module)
    with torch.inference_mode():
        assert_fresh(call, module)
        with torch.inference_mode(writes_in_inference_mode):
            module.w.data.copy_(codes(5))
        assert_fresh(call, module)


def test_a_weight_in_a_file_is_read_again(tmp_path):
    path = tmp_path / "weight"
    path.write_bytes(codes(0).numpy().tobytes())
    module = RowMajor()
    module.w = torch.from_numpy(np.memmap(path, dtype=np.int8, mode="r+", shape=(K, K)))
    call = graph_of(module)
    assert_fresh(call, module)
    np.memmap(path, dtype=np.int8, mode="r+", shape=(K, K))[...] = codes(7).numpy()
    assert_fresh(call, module)


CONFIGS = {
    "weight-only int8": torchao.Int8WeightOnlyConfig,
    "dynamic int8": torchao.Int8DynamicActivationInt8WeightConfig,
    "weight-only float8": torchao.Float8WeightOnlyConfig,
}


def quantized_by_torchao(config: str, seed: int) -> nn.Module:
    """Two linears of int8 codes that are packed together, or one."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(K, K) for _ in range(1 + (config == "dynamic int8")))).eval()
    torchao.quantize_(model, CONFIGS[config]())
    return model


@pytest.mark.parametrize("config", CONFIGS)
def test_load_state_dict_of_a_torchao_model_is_seen_by_its_versions_alone(config, monkeypatch, op_by_op):
    # As on a GPU, where no bytes are looked at.
    monkeypatch.setattr(constants, "fingerprint", lambda _: None)
    model, others = quantized_by_torchao(config, 0), [quantized_by_torchao(config, seed) for seed in (1, 2)]
    with torch.no_grad():
        few, many = compiled(model), x_of()
        rows = torch.cat([many] * 5)
        few(many)
        few(rows)
        for other in others:
            model.load_state_dict(other.state_dict())
            # Both graphs: the weight was packed by one and is handed out to the other.
            assert_within(few(rows), other(rows), Numerics.APPROXIMATE)
            assert_within(few(many), other(many), Numerics.APPROXIMATE)


@pytest.mark.slow
def test_a_write_to_a_dtensor_is_seen_by_its_version_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "fingerprint", lambda _: None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))

        def everywhere(x: Tensor) -> Tensor:
            return distribute_tensor(x, mesh, [Replicate()])

        class Sharded(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(everywhere(codes(0)), requires_grad=False)
                self.scale = nn.Parameter(everywhere(torch.linspace(0.5, 1.5, K) / 100), requires_grad=False)

            def forward(self, x: Tensor) -> Tensor:
                return WeightOnly.compute(DTensor.from_local(x, mesh, [Replicate()]), self.w, self.scale).to_local()

        module = Sharded()
        with torch.no_grad():
            call = compiled(module)
            assert_fresh(call, module)
            assert counters["fx_quant"]["rewritten"] == 1
            for seed in (3, 4):
                module.w.copy_(everywhere(codes(seed)))
                assert module.w._local_tensor._version == 0
                assert_fresh(call, module)
    finally:
        torch.distributed.destroy_process_group()


RECEIVES_A_BROADCAST = """
import os, sys, torch, fx_quant
from tests.quick_compiles import compile_quickly
compile_quickly()
rank, store = int(os.fork() == 0), sys.argv[1]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(rank)
layer = fx_quant.QuantizedLinear.from_float(torch.nn.Linear(96, 96), "int8 per_token (dynamic) x int8 per_channel")
x = torch.linspace(-1, 1, 4 * 96).reshape(4, 96)
with torch.no_grad():
    before = layer(x)
    for value in layer.state_dict().values():
        torch.distributed.broadcast(value, 0)
    # In one piece, as both processes write to one pipe.
    os.write(1, f"{rank} {before.sum().item()} {layer(x).sum().item()}\\n".encode())
torch.distributed.destroy_process_group()
if rank == 0:
    sys.exit(os.wait()[1])
"""


@pytest.mark.slow
def test_a_broadcast_is_seen(tmp_path, printed):
    said = printed(RECEIVES_A_BROADCAST, str(tmp_path / "store"))
    (_, before, sent), (_, other, received) = sorted(line.split() for line in said.splitlines())
    assert before == sent == received != other


# --- parts of a weight --------------------------------------------------------------------------------------------------


def calls_until_seen(module: Linear, change: Callable[[], None], limit: int) -> int:
    call = graph_of(module)
    call(x_of())
    before = call(x_of())
    change()
    for count in range(1, limit + 1):
        if not torch.equal(call(x_of()), before):
            assert_fresh(call, module)
            return count
    raise AssertionError(f"the write was not seen in {limit} calls")


@pytest.mark.parametrize("row", [0, K - 1])
@pytest.mark.parametrize("kind", [RowMajor, WeightOnly, Int4])
def test_a_rewritten_row_is_seen_within_the_calls_that_the_documents_say(kind, row):
    module = kind()

    def change() -> None:
        module.w.data[row] = new_codes(module, 3)[row]

    assert f"within {CALLS} calls" in " ".join((ROOT / "docs" / "libraries.md").read_text().split())
    calls_until_seen(module, change, CALLS)


def test_a_single_byte_is_seen_within_the_calls_of_its_row_times_its_lines():
    module = RowMajor()

    def change() -> None:
        module.w.data[41, 70] ^= 0x55

    calls_until_seen(module, change, CALLS * -(-K // 64))


def test_memory_that_is_freed_and_gathered_again_leaves_nothing_behind():
    # As FSDP does with the storage of a parameter.
    w = codes(0)
    held = []
    for seed in range(4):
        size = w.untyped_storage().size() or w.numel()
        w.untyped_storage().resize_(0)
        held.append(torch.empty(size, dtype=torch.uint8))
        w.untyped_storage().resize_(size)
        w.copy_(codes(seed))
        assert torch.equal(ops.prepack([w], ["vnni"])[0], layouts.pack_weight(w, "vnni"))
    assert len(constants._groups) == len(constants._keys) == len(packed_weights._packed) == 1
    del w
    assert not constants._groups and not constants._keys and not packed_weights._packed


@pytest.mark.parametrize("op", [ops.prepack.default, ops.fold.default])
def test_a_replayed_cuda_graph_looks_too(op):
    # Inductor keeps ops with this tag out of what it replays.
    assert torch.Tag.cudagraph_unsafe in op.tags


# --- what is no weight --------------------------------------------------------------------------------------------------


class Frame(nn.Module):
    """A frame in a buffer that somebody else fills, quantized in each call."""

    def __init__(self, memory: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("frame", torch.from_numpy(memory))
        self.register_buffer("w", codes(0))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, K) / 100)

    def forward(self, x: Tensor) -> Tensor:
        return x + RowMajor.compute(self.frame, self.w, self.scale)


def test_an_activation_in_a_buffer_is_no_constant(op_by_op):
    memory = np.zeros((4, K), np.float32)
    module, x = Frame(memory), x_of()
    call = compiled(module)
    for seed in range(3):
        memory[...] = x_of(seed).numpy()
        memory[0] = seed  # alone within the calls in which a row would be seen
        assert_within(call(x), module(x), Numerics.REASSOCIATED)
        memory[2, 5] += 1
        assert_within(call(x), module(x), Numerics.REASSOCIATED)


def test_nothing_of_the_activation_is_folded():
    def of_two_constants(unused: Tensor, frame: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return Float8.compute(frame, w, scale)

    state = rewrite(trace(of_two_constants, x_of(), x_of(), codes(0, E4M3), torch.ones(K)))
    to_kernels(state)
    assert not calls(state.graph, ops.fold.default)
    (call,) = calls(state.graph, ops.prepack.default)
    assert [node.op for node in call.args[0]] == ["placeholder"]


def test_a_cache_of_codes_that_grows_is_packed_in_every_call(op_by_op):
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.zeros(K, K, dtype=INT8))

        def forward(self, x: Tensor) -> Tensor:
            return Transposed.compute(x, self.w, torch.ones(K))

    module = Cache()
    call = compiled(module)
    for step in range(4):
        with torch.no_grad():
            module.w[:, step] = codes(step)[:, 0]
        assert_within(call(x_of()), module(x_of()), Numerics.REASSOCIATED)


# --- the fingerprint ----------------------------------------------------------------------------------------------------

SHAPES = {
    "dense": lambda: codes(0),
    "transposed": lambda: codes(0).t(),
    "rows with gaps": lambda: codes(0, shape=(K, 3 * K))[:, :K],
    "every other column": lambda: codes(0, shape=(K, 2 * K))[:, ::2],
    "three dims": lambda: codes(0, shape=(3, 40, 70)).transpose(0, 1),
    "expanded": lambda: codes(0, shape=(1, 5000)).expand(4, 5000),
    "a vector": lambda: torch.randn(5000),
    "float8": lambda: codes(0, E4M3),
    "one element": lambda: torch.ones(()),
    "an odd end": lambda: codes(0, shape=(129, 67)),
}


@pytest.fixture(params=["native", "python"])
def digests(request, monkeypatch):
    """The native code, and what stands for it without a compiler."""
    if request.param == "python":
        monkeypatch.setattr(fingerprint, "_library", lambda: None)
    for cached in (fingerprint._digest, fingerprint._changed):
        cached.cache_clear()
    yield
    for cached in (fingerprint._digest, fingerprint._changed):
        cached.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
def test_any_byte_is_seen_once_all_shares_had_their_turn(shape, digests):
    tensor = SHAPES[shape]()
    found = fingerprint.fingerprint(tensor)
    watches = fingerprint.Watches([(tensor.data_ptr(), found)])
    lines = -(-found.geometry[1] // 64)
    assert len(found.digests) - 1 >= lines
    assert not any(watches.changed() for _ in range(2 * CALLS * lines))
    elements = tensor.as_strided((tensor.untyped_storage().size() // tensor.element_size(),), (1,)).view(torch.uint8)
    offsets = {int(i) for i in torch.randint(tensor.numel(), (12,))} | {0, tensor.numel() - 1}
    for offset in offsets:
        index = tuple(int(i) for i in np.unravel_index(offset, tensor.shape))
        at = sum(i * stride for i, stride in zip(index, tensor.stride(), strict=True)) * tensor.element_size()
        elements[at] ^= 1
        assert any(watches.changed() for _ in range(CALLS * lines)), index
        assert not fingerprint.fingerprint(tensor).same_bytes(found)
        elements[at] ^= 1
        assert fingerprint.fingerprint(tensor).same_bytes(found)


@pytest.mark.parametrize("rows", [1, 3, 63, 384, 513, 1537, 2049, 4095, 4097])
def test_a_row_is_seen_within_the_calls_whenever_it_changes(rows, digests):
    tensor = codes(0, shape=(rows, 150))
    found = fingerprint.fingerprint(tensor)
    others = [(tensor.data_ptr(), found)] * 2  # which are looked at in other calls
    generator = torch.Generator().manual_seed(rows)
    for _ in range(6):
        watches = fingerprint.Watches([*others, (tensor.data_ptr(), found)])
        before, row = (int(torch.randint(size, (), generator=generator)) for size in (3 * CALLS, rows))
        assert not any(watches.changed() for _ in range(before))
        tensor[row] ^= 0x55
        assert any(watches.changed() for _ in range(CALLS))
        tensor[row] ^= 0x55


def test_what_is_replaced_is_seen_in_the_next_call(digests):
    tensor = codes(0, shape=(1000, 150))
    watches = fingerprint.Watches([(tensor.data_ptr(), fingerprint.fingerprint(tensor))])
    assert not any(watches.changed() for _ in range(100))
    tensor.copy_(codes(1, shape=(1000, 150)))
    assert watches.changed()


def test_a_small_dense_tensor_is_looked_at_whole(digests):
    tensor = torch.ones(16, 4, 4)
    watches = fingerprint.Watches([(tensor.data_ptr(), fingerprint.fingerprint(tensor))])
    for i in range(tensor.numel()):
        tensor.view(-1)[i] = 2
        assert watches.changed()
        tensor.view(-1)[i] = 1
        assert not watches.changed()


def test_rows_that_change_places_are_seen(digests):
    tensor = codes(0)
    found = fingerprint.fingerprint(tensor)
    tensor[[3, 4]] = tensor[[4, 3]]
    assert not fingerprint.fingerprint(tensor).same_bytes(found)


def test_a_tensor_without_bytes_has_no_fingerprint():
    assert fingerprint.fingerprint(torch.empty(0, 4)) is None
    assert fingerprint.fingerprint(torch.empty(4, 4, device="meta")) is None
