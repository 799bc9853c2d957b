"""Weights ``codes * scale + offset`` with a float offset for each group or channel: what is proven, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table

import fx_quant
from fx_quant.kernels.select import verdicts
from fx_quant.layers.quantize_weight import quantize_weight
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import Numerics, Scheme
from fx_quant.target import named_target
from tests.dialects.gguf import Q4K
from tests.graphs import assert_same_meaning, prove, trace
from tests.tolerances import assert_within

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
N, K, G = 8, 64, 16
Graph = Callable[..., Tensor]


def codes(dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, 256, (N, K), dtype=torch.uint8).view(dtype)


def floats(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def by_group(w: Tensor, factor: Tensor, op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return op(w.unflatten(1, (factor.shape[1], -1)), factor[..., None]).flatten(1)


def said(graph: Graph, *inputs: Tensor, static: range | None = None) -> str:
    """What is found of ``graph``, which must mean what it meant."""
    source = trace(graph, *inputs)
    proven = prove(source, static)
    assert_same_meaning(source, proven.graph, inputs)
    found = [f"{site.words} -> {site.numerics}" for site in proven.found.sites]
    return "; ".join([*found, *(f"miss: {miss.rule}" for miss in proven.found.misses)]) or "nothing"


def x() -> Tensor:
    return torch.randn(3, K)


GROUPS = "float32 x uint8 per_group(16) with offset -> reassociated"
CHANNELS = "float32 x uint8 per_channel with offset -> reassociated"

# Two factors, each of groups: what it is as a function of x, codes, scale and offset.
OF_GROUPS: dict[str, Graph] = {
    "added": lambda x, w, s, o: x @ by_group(by_group(w.float(), s, torch.mul), o, torch.add).t(),
    "subtracted": lambda x, w, s, o: x @ by_group(by_group(w.float(), s, torch.mul), o, torch.sub).t(),
    "zero before the scale": lambda x, w, s, o: x @ by_group(by_group(w.float(), o, torch.sub), s, torch.mul).t(),
    "added before the scale": lambda x, w, s, o: x @ by_group(by_group(w.float(), o, torch.add), s, torch.mul).t(),
    "beside an integer": lambda x, w, s, o: x @ (by_group(by_group(w.float() - 7, s, torch.mul), o, torch.add)).t(),
    "several": lambda x, w, s, o: (
        x @ (by_group((by_group(w.float(), o, torch.sub) + 0.5) * 2, s, torch.mul) - 0.25).t()
    ),
    "scaled after the sum": lambda x, w, s, o: (x @ by_group(w.float() * 0.1, o, torch.add).t()) * s[:, 0],
    "divided after the sum": lambda x, w, s, o: (x @ by_group(w.float() * 0.1, o, torch.add).t()) / s[:, 0],
    "with a bias": lambda x, w, s, o: F.linear(x, by_group(by_group(w.float(), s, torch.mul), o, torch.add), s[:, 0]),
    "scale of channels": lambda x, w, s, o: x @ by_group(w.float() * s[:, :1], o, torch.add).t(),
    "offset of channels": lambda x, w, s, o: x @ (by_group(w.float(), s, torch.mul) + o[:, :1]).t(),
    "offset of all": lambda x, w, s, o: x @ (by_group(w.float(), s, torch.mul) + o[0, 0]).t(),
    "by addcmul": lambda x, w, s, o: (
        x @ torch.addcmul(o[..., None], w.float().view(N, -1, G), s[..., None]).view(N, K).t()
    ),
    "as quanto has it": lambda x, w, s, o: x @ (s.view(-1, 1) * w.view(-1, G) - o.view(-1, 1)).reshape(N, K).t(),
    "as HQQ has it": lambda x, w, s, o: F.linear(
        x, ((w.view(-1, G).to(x.dtype) - o.view(-1, 1)) * s.view(-1, 1)).reshape(N, K)
    ),
    "as torchao has it": lambda x, w, s, o: F.linear(
        x, ((w.view(N, -1, G).float() - 8) * s[..., None] + o[..., None]).view(N, K)
    ),
    "by two factors": lambda x, w, s, o: x @ by_group(by_group(w.float(), s, torch.mul), s * o[:1], torch.sub).t(),
}


@pytest.mark.parametrize("graph", OF_GROUPS.values(), ids=OF_GROUPS)
def test_an_offset_of_groups_is_one_of_the_weight(graph):
    assert said(graph, x(), codes(), floats(N, K // G), floats(N, K // G)) == GROUPS


OF_CHANNELS: dict[str, Graph] = {
    "added": lambda x, w, s, o: x @ (w.float() * s + o).t(),
    "zero before the scale": lambda x, w, s, o: x @ ((w.float() - o) * s).t(),
    "only the offset": lambda x, w, s, o: x @ ((w.float() - o) * 0.5).t(),
    "unscaled": lambda x, w, s, o: x @ (w.float() - o).t(),
    "beside a zero point": lambda x, w, s, o: x @ ((w.float() - (o * 9).to(torch.int8)) * s + o).t(),
}


@pytest.mark.parametrize("graph", OF_CHANNELS.values(), ids=OF_CHANNELS)
def test_an_offset_of_channels_is_one_of_the_weight(graph):
    assert said(graph, x(), codes(), floats(N, 1), floats(N, 1)) == CHANNELS


def test_an_offset_of_blocks_is_one_of_the_weight():
    def graph(x, w, s, o):
        blocks = w.float().view(N // 2, 2, K // G, G) * s[:, None, :, None] - o[:, None, :, None]
        return x @ blocks.view(N, K).t()

    of_blocks = "float32 x uint8 per_block(2, 16) with offset -> reassociated"
    assert said(graph, x(), codes(), floats(N // 2, K // G), floats(N // 2, K // G)) == of_blocks


def test_codes_of_four_bits_are_packed_and_their_shift_is_part_of_the_offset():
    def graph(x, w, s, o):
        return x @ by_group(by_group((w & 15).float(), o, torch.sub), s, torch.mul).t()

    four_bits = "float32 x int4 per_group(16) with offset -> reassociated"
    assert said(graph, x(), codes(), floats(N, K // G), floats(N, K // G)) == four_bits


def test_float8_codes_have_offsets_too():
    def graph(x, w, s, o):
        return x @ (w.float() * s + o).t()

    found = said(graph, x(), torch.randn(N, K).to(torch.float8_e4m3fn), floats(N, 1), floats(N, 1))
    assert found == "float32 x float8_e4m3fn per_channel with offset -> reassociated"


LOST = "miss: the weight is decoded from stored codes, and no rule proves aten.add.Tensor"
NEAR_MISSES: dict[str, tuple[Graph, str]] = {
    "varies in a group": (
        lambda x, w, s, o: (
            x
            @ (by_group(w.float(), s, torch.mul).unflatten(1, (-1, G)) + o[:, :1, None] * torch.arange(G))
            .flatten(1)
            .t()
        ),
        "miss: the offset of b varies along k, so it cannot leave the sum",
    ),
    "varies along k": (
        lambda x, w, s, o: x @ (by_group(w.float(), s, torch.mul) + o[0, 0] * torch.arange(K)).t(),
        "miss: the offset of b varies along k, so it cannot leave the sum",
    ),
    "smaller groups": (
        lambda x, w, s, o: x @ by_group(by_group(w.float(), s[:, :2], torch.mul), o, torch.add).t(),
        "miss: scales and offsets of b have groups of different sizes along k",
    ),
    "of each code": (
        lambda x, w, s, o: x @ (w.float() * s[:, :1] + s[:, :1] * torch.arange(K)).t(),
        LOST,
    ),
    "of the other axis": (
        lambda x, w, s, o: x @ (by_group(w.float(), s, torch.mul).view(-1, N) + o.view(-1)[:N]).view(N, K).t(),
        "miss: the offset of b varies along k, so it cannot leave the sum",
    ),
    "that the call brings": (
        lambda x, w, s, o: x @ (by_group(w.float(), s, torch.mul) + x.sum()).t(),
        "miss: the offset of the weight changes from call to call",
    ),
    "scaled by what the call brings": (
        lambda x, w, s, o: x @ by_group(by_group(w.float(), o, torch.sub), s * x.sum(), torch.mul).t(),
        "miss: the offset of the weight changes from call to call",
    ),
    "twice": (
        lambda x, w, s, o: x @ torch.add(by_group(w.float(), s, torch.mul), o[:, :1], alpha=2).t(),
        "miss: no rule proves aten.add.Tensor of a dequantized tensor",
    ),
    "that the codes are taken from": (
        lambda x, w, s, o: x @ (o[:, :1] - by_group(w.float(), s, torch.mul)).t(),
        "miss: no rule proves aten.sub.Tensor of a dequantized tensor",
    ),
    "by addcmul of another value": (
        lambda x, w, s, o: x @ torch.addcmul(o[:, :1], w.float(), s[:, :1], value=2).t(),
        "miss: the weight is decoded from stored codes, and no rule proves aten.addcmul.default",
    ),
    "by addcmul of each code": (
        lambda x, w, s, o: x @ torch.addcmul(o.repeat(1, G), w.float(), s[:, :1]).t(),
        "miss: the weight is decoded from stored codes, and no rule proves aten.addcmul.default",
    ),
    "in integers": (
        lambda x, w, s, o: x @ ((w.to(torch.int32) + (o[:, :1] * 9).to(torch.int32)) * s[:, :1]).t(),
        "miss: something else than a zero point is added to the codes in torch.int32, which has no rule",
    ),
}


# Before 2.13 PyTorch takes addcmul apart, into a product and a sum like any other.
APART = torch.ops.aten.addcmul.default in select_decomp_table()


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        pytest.param(*of, id=name, marks=pytest.mark.skipif(APART and "addcmul" in name, reason="no addcmul is traced"))
        for name, of in NEAR_MISSES.items()
    ],
)
def test_what_is_no_offset_of_groups_is_a_miss_that_says_why(graph, found):
    assert said(graph, x(), codes(), floats(N, K // G), floats(N, K // G)) == found


# --- the op and the words -------------------------------------------------------------------------------------------

fxq = torch.ops.fx_quant
DECODED = (("[n]", None, (N,)), ("one", None, ()), ("groups", [1, 24], (N, 3)), ("blocks", [2, 16], (N // 2, 4)))


@pytest.mark.parametrize(("block", "shape"), [each[1:] for each in DECODED], ids=[each[0] for each in DECODED])
@pytest.mark.parametrize("offset_dtype", [F32, F16], ids=str)
def test_the_op_adds_the_offset_to_the_scaled_codes(block, shape, offset_dtype):
    a, w, scale, offset = x(), codes(), floats(*shape), (floats(*shape) - 1).to(offset_dtype)
    point = torch.randint(0, 9, shape)
    out = fxq.weight_only_mm(a, w.t(), scale, point, None, F32, block=block, b_offset=offset)

    def spread(factor: Tensor) -> Tensor:
        rows, columns = (1, 1) if block is None else block
        if block is None:
            return factor.double().reshape(-1, 1)
        return factor.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:, :K]

    decoded = (w.double() - spread(point)) * spread(scale) + spread(offset)
    torch.testing.assert_close(out.double(), a.double() @ decoded.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("offset", "got"), [(torch.ones(N + 1), r"float32 \[9\]"), (torch.ones(N, dtype=torch.int32), r"int32 \[8\]")]
)
def test_the_op_names_an_offset_that_does_not_fit(offset, got, device):
    given = [each.to(device) for each in (x(), codes().t(), torch.ones(N), offset)]
    with pytest.raises(RuntimeError, match=rf"b_offset must be floats of the shape of b_scale, \[8\], got {got}"):
        fxq.weight_only_mm(*given[:3], None, None, F32, b_offset=given[3])


def test_the_op_passes_opcheck():
    given = {"block": [1, 16], "b_offset": torch.rand(N, 4)}
    arguments = (x(), codes().t(), torch.rand(N, 4), None, torch.rand(N), BF16)
    torch.library.opcheck(fxq.weight_only_mm.default, arguments, given)


def test_a_scheme_says_that_there_is_an_offset_and_is_read_back():
    text = "bfloat16 x uint4 per_group(64) with offset"
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    assert scheme.weight.offset and scheme.weight.symmetric and not scheme.activation.offset
    assert not Scheme.parse("bfloat16 x uint4 per_group(64)").weight.offset


def test_a_kernel_without_offsets_says_so():
    problem = Problem(
        Scheme.parse("bfloat16 x int8 per_channel with offset"), SizeRange(1, 1), 64, 64, BF16, None, True
    )
    unmet = {verdict.kernel: verdict.reasons for verdict in verdicts(problem, named_target("sm90"))}
    assert unmet["triton_weight_only"] == ("has no float offset of the weight",)
    assert unmet["pytorch_weight_only"] == ()


def test_a_layer_of_ours_has_no_offset():
    scheme = Scheme.parse("bfloat16 x uint8 per_channel with offset")
    with pytest.raises(ValueError, match="a linear has zero points and no offsets, got bfloat16 x uint8"):
        fx_quant.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 64)), str(scheme))
    with pytest.raises(ValueError, match="without offsets, got uint8 per_channel with offset; say symmetric=False"):
        quantize_weight(torch.randn(8, 8), scheme.weight)


@pytest.mark.usefixtures("uncached")
def test_a_compiled_linear_of_records_follows_its_bytes():
    model = Q4K(F32, bias=True)
    compiled = torch.compile(model, backend="fx_quant")
    a = torch.randn(5, model.k)
    with torch.no_grad():
        for _ in range(2):
            assert_within(compiled(a), model(a), Numerics.REASSOCIATED)
            model.blocks[:, 16:] ^= 0x5A  # other codes in place
    report = fx_quant.explain(model, a, target="x86_vnni")
    assert [site.scheme for site in report.sites] == ["float32 x int4 per_group(32) with offset"]


# --- beside codes of the activation ---------------------------------------------------------------------------------


def rows() -> Tensor:
    return torch.randint(-128, 128, (3, K), dtype=torch.int8)


def beside(graph: Graph, offset: Tensor, *, a: Tensor | None = None) -> str:
    """As ``said``, of int8 codes of an activation, its scales and zero points, and a weight's codes, scale and offset."""
    a = rows() if a is None else a
    zero = torch.tensor([[-3], [100], [7]], dtype=torch.int32)
    inputs = a, floats(3, 1), zero, codes(), floats(N, 1), offset
    return said(graph, *inputs, static=range(3, 6))


PER_ROW = "int8 per_token (dynamic) x uint8 per_channel with offset -> reassociated"
POINT = torch.tensor(1.0)
OF_CODES: dict[str, tuple[Graph, str]] = {
    "a zero point of floats": (lambda a, r, z, w, s, o: (a * r) @ ((w.float() - o) * s).t(), PER_ROW),
    "added": (lambda a, r, z, w, s, o: (a * r) @ (w.float() * s + o).t(), PER_ROW),
    "scaled after the sum": (lambda a, r, z, w, s, o: (a.float() @ (w.float() - o).t()) * r * s.t(), PER_ROW),
    "scaled by both at once": (lambda a, r, z, w, s, o: (a.float() @ (w.float() - o).t()) * (r * s.t()), PER_ROW),
    "by an outer product": (lambda a, r, z, w, s, o: (a.float() @ (w.float() - o).t()) * (r @ s.t()), PER_ROW),
    "with a bias": (lambda a, r, z, w, s, o: F.linear(a * r, (w.float() - o) * s, s[:, 0]), PER_ROW),
    "beside an integer": (
        lambda a, r, z, w, s, o: (a * r) @ ((w.float() - 9) * s + o).t(),
        PER_ROW,
    ),
    "of four bits": (
        lambda a, r, z, w, s, o: (a * r) @ (((w & 15).float() - o) * s).t(),
        PER_ROW.replace("uint8", "int4"),
    ),
    "beside a zero point that may lie anywhere": (
        lambda a, r, z, w, s, o: ((a.float() - z) * r) @ ((w.float() - o) * s).t(),
        PER_ROW.replace("per_token", "per_token asymmetric"),
    ),
    "beside a zero point of a byte": (
        lambda a, r, z, w, s, o: ((a.float() - z.to(torch.int8)) * r) @ ((w.float() - o) * s).t(),
        PER_ROW.replace("per_token", "per_token asymmetric"),
    ),
}


@pytest.mark.parametrize(("graph", "found"), OF_CODES.values(), ids=OF_CODES)
@pytest.mark.parametrize("offset", [POINT, floats(N, 1) * 9], ids=["of all", "of channels"])
def test_an_offset_beside_codes_is_multiplied_with_their_sum(graph, found, offset):
    assert beside(graph, offset) == found


BESIDE_FLOATS: dict[str, Graph] = {
    "an offset of groups": lambda a, r, z, w, s, o: (a * r) @ by_group(w.float(), s.expand(N, 4) * o, torch.sub).t(),
    "a scale of groups": lambda a, r, z, w, s, o: (
        (a * r) @ by_group(w.float() - o, torch.cat([s, 2 * s, s, s], 1), torch.mul).t()
    ),
}


@pytest.mark.parametrize("graph", BESIDE_FLOATS.values(), ids=BESIDE_FLOATS)
def test_an_offset_beside_groups_is_multiplied_with_floats(graph):
    assert beside(graph, POINT).startswith("float32 (decoded from int8 per_token (dynamic)) x uint8 per_group(16)")


def test_an_offset_of_float8_codes_is_multiplied_with_floats():
    float8 = torch.randn(3, K).to(torch.float8_e4m3fn)

    def graph(a, r, z, w, s, o):
        return (a.float() * r) @ (w.view(torch.float8_e4m3fn).float() * s + o).t()

    assert said(
        graph,
        float8,
        floats(3, 1),
        POINT,
        torch.randn(N, K).to(torch.float8_e4m3fn).view(torch.uint8),
        floats(N, 1),
        POINT,
        static=range(3, 6),
    ).startswith("float32 (decoded from")
