"""Checkpoints that anybody may have written: one error of one line and an untouched model, or a loaded one; never more.

Every value of a valid config and index is mutated, regular expressions are compared with ``re``, files lie about what
they hold, and names and links lead out of the folder.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fx_quant.layers.linear import QuantizedLinear
from fx_quant.loading.checkpoint import CheckpointError, load_quantized_, scheme_of_group
from fx_quant.loading.checkpoint_patterns import Patterns
from tests.test_checkpoint import FP8, Tiny, args, compressed, group, save, shard, tiny_state

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

INDEX = "model.safetensors.index.json"
W8 = compressed(group(args()))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A checkpoint of three shards that loads."""
    folder = tmp_path_factory.mktemp("written")
    save(folder, tiny_state(), W8)
    shard(folder)
    load_quantized_(Tiny(), folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoint"))


def seen(model: nn.Module) -> dict[str, Any]:
    """What of a model must not change: which modules and tensors it has, and their values."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: x if x.is_meta else x.clone() for name, x in tensors.items()}
    return {"modules": dict(model.named_modules()), "tensors": tensors, "values": values}


def assert_untouched(model: nn.Module, before: Mapping[str, Any]) -> None:
    after = seen(model)
    assert after["modules"] == before["modules"]
    assert after["tensors"].keys() == before["tensors"].keys()
    assert all(x is before["tensors"][name] for name, x in after["tensors"].items())
    assert all(x.is_meta or torch.equal(x, before["values"][name]) for name, x in after["values"].items())


def loads(directory: Path, device: str = "cpu", strict: bool = True) -> str | None:
    """None where it loads, else the one line that says why not; the model is then untouched. At most seconds."""
    with torch.device(device):
        model = Tiny()
    before, start = seen(model), time.perf_counter()
    try:
        load_quantized_(model, directory, strict=strict)
    except CheckpointError as error:
        assert_untouched(model, before)
        found = str(error)
    else:
        found = None
        assert not strict or isinstance(model.first, QuantizedLinear)
    assert time.perf_counter() - start < 30
    assert found is None or (found.isprintable() and 10 < len(found) < 1100)
    return found


# --- JSON of any shape --------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, -2, 8.0, 128.5, float("nan"), float("inf"), 2**31, 2**63, -(2**63), 2**64, 10**400,
    "", "int", "Linear", "re:(", "re:(a+)+$", "re:" + "(a|a)" * 30 + "$", "\ud800", "a\nb\0", "x" * 5000,
    [], [[]], [None], ["Linear"], [1, 2, 3], {}, {"a": 1}, {"format": "dense"}, [{"targets": ["Linear"]}],
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where each value of JSON is."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple, by: Any) -> Any:
    if not path:
        return by
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], by)
    return value


FULL = {
    **compressed(
        group(args(strategy="group", group_size=16, block_structure=None, actorder=None, scale_dtype=None)),
        {**group(args(), args(strategy="token", dynamic=True)), "targets": ["re:.*second$", "second"]},
    ),
    "format": "mixed-precision",
    "ignore": ["lm_head", "re:.*norm.*"],
    "sparsity_config": {"format": "dense"},
    "transform_config": {"config_groups": {}},
    "kv_cache_scheme": None,
}
CONFIGS = {"compressed-tensors": FULL, "fp8": {**FP8, "modules_to_not_convert": ["lm_head", "re.*d"], "fmt": "e4m3"}}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_value_of_a_config_may_be_anything(name, folder):
    config = CONFIGS[name]
    found = []
    for path in places(config):
        for odd in ODD:
            hostile = replaced(config, path, odd)
            (folder / "config.json").write_text(json.dumps({"quantization_config": hostile}))
            found.append(loads(folder))
    assert len(found) > 300 and any(found)


JSON = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_several_values_of_a_config_and_an_index_may_be_anything(written, data):
    config, index = data.draw(st.sampled_from(list(CONFIGS.values()))), json.loads((written / INDEX).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        config = replaced(config, data.draw(st.sampled_from(list(places(config)))), data.draw(JSON))
        if data.draw(st.booleans()):
            index = replaced(index, data.draw(st.sampled_from(list(places(index)))), data.draw(JSON))
    originals = {name: (written / name).read_bytes() for name in ("config.json", INDEX)}
    try:
        (written / "config.json").write_text(json.dumps({"quantization_config": config}))
        (written / INDEX).write_text(json.dumps(index))
        loads(written, data.draw(st.sampled_from(["cpu", "meta"])), data.draw(st.booleans()))
    finally:
        for name, content in originals.items():
            (written / name).write_bytes(content)


@settings(deadline=None, max_examples=300)
@given(value=JSON)
def test_a_group_may_be_anything(value):
    for hostile in (value, {"weights": value}, {"weights": args(), "input_activations": value}, group(args(), value)):
        with contextlib.suppress(CheckpointError):
            scheme_of_group(hostile)


@pytest.mark.parametrize(
    "size", [0, -1, -128, 2**31, 2**63, 2**64, 10**400, True, 16.0, float("nan"), "16", [16], None]
)
def test_a_size_of_groups_that_is_none_is_refused(size):
    for config in (
        group(args(strategy="group", group_size=size)),
        group(args(kind="float", strategy="block", block_structure=[128, size])),
        group(args(), args(strategy="group", group_size=size, dynamic=True)),
    ):
        with pytest.raises(CheckpointError, match="positive group_size|block_structure must be"):
            scheme_of_group(config)


@pytest.mark.parametrize("value", ["false", 0, 1, [], {}])
def test_a_flag_that_is_no_bool_is_refused(value):
    with pytest.raises(CheckpointError, match="symmetric of weights must be true or false"):
        scheme_of_group(group(args(symmetric=value)))


@pytest.mark.parametrize("bits", [8.0, True, "8", [8], float("nan")])
def test_a_number_of_bits_that_is_none_is_refused(bits):
    with pytest.raises(CheckpointError, match="weights must be int8, int4 or symmetric float8, got "):
        scheme_of_group(group(args(bits)))


@pytest.mark.parametrize("targets", ["Linear", {"Linear": 1}, [1], [["Linear"]], 7])
def test_targets_that_are_no_list_of_names_are_refused(targets, folder):
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": compressed({**group(args()), "targets": targets})})
    )
    assert "targets of group_0 must be a list of names" in str(loads(folder))


CONTENTS: Mapping[str, bytes] = {
    "empty": b"",
    "not text": b"\xff\xfe{}",
    "cut": b'{"quantization_config": {',
    "deep lists": b'{"quantization_config": ' + b"[" * 100_000,
    "closed deep lists": b'{"quantization_config": ' + b"[" * 500 + b"]" * 500 + b"}",
    "deep objects": b'{"quantization_config":' + b'{"a":' * 400 + b"1" + b"}" * 401,
    "a long number": b'{"quantization_config": ' + b"1" * 10_000 + b"}",
    "a number": b"7",
}


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_of_json_may_be_anything(name, file, folder):
    (folder / file).write_bytes(CONTENTS[name])
    assert f"{file} must " in str(loads(folder))


def test_a_file_of_json_that_is_too_large_is_not_read(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "config.json must be JSON of at most" in str(loads(folder))


# --- regular expressions ------------------------------------------------------------------------------------------

CATASTROPHES = (
    r"(a+)+$", r"(a|a)*$", r"(a|aa)+$", r"(.*)*$", r"(.*a){20}b", r"((a*)*)*$", r"(((((a*)*)*)*)*)*$", r"(a?){50}a{50}b",
    r"([a-zA-Z]+)*1", r"(a+){10}(a+){10}$b", r"(x+x+)+y", r"(?=(a+)+$)b", "(a|a)" * 100 + "$b", ".*" * 200 + "b",
    "(" * 50 + "a*" + ")*" * 50 + "b", r"(a{0,1000}){0,1000}b", r"(a{1000}){1000}", r"(?:a{65535}){65535}",
    "(" * 900 + ")" * 900, "(?:" * 300 + "a|b" + ")*" * 300, "(?=" * 300 + "a" + ")" * 300,
)  # fmt: skip


@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_a_catastrophic_regular_expression_takes_no_time(pattern):
    names = ["a" * 200, "model.layers.0." + "a" * 60, "x" * 100, ""]
    start = time.perf_counter()
    for name in names:
        for tail in ("", r"(?:(?<=\.)|(?=\.|$))"):
            with contextlib.suppress(CheckpointError):
                Patterns([pattern], tail).first(name)
    assert time.perf_counter() - start < 20


def test_many_regular_expressions_take_seconds_and_then_are_refused():
    patterns = Patterns([f"(?:[a-z]+[0-9]*)*{i}x" for i in range(1000)])
    patterns._steps = 2_900_000
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="must be a simpler regular expression, got one that takes too long"):
        [patterns.first("abcdefghijklmnopqrstuvwxyz" * 4) for _ in range(1000)]
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "pattern",
    ["(", "[", "a{2,1}", "*", "(?P<a", r"\8", "(?<=a*)b", "(?z)", "(a)(?(2)b)", "x" * 2001, "[z-a]"],
)  # fmt: skip
def test_what_is_no_regular_expression_is_refused_in_one_line(pattern, folder):
    ignored = {**W8, "ignore": [f"re:{pattern}"]}
    skipped = {**FP8, "modules_to_not_convert": [pattern]}
    targeted = compressed({**group(args()), "targets": [f"re:{pattern}"]})
    for config in (ignored, targeted, skipped):
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
        assert "regular expression" in str(loads(folder))


@pytest.mark.parametrize("pattern", [r"(a)\1", r"(?P<x>a)(?P=x)", r"(a)?(?(1)b|c)"])
def test_what_cannot_be_followed_is_refused(pattern):
    with pytest.raises(CheckpointError, match="without back-references and atomic groups, got groupref"):
        Patterns([pattern]).first("aab")


SELECTING = (
    "re:.*", ".*lm_head", r"model\.layers\.\d+\.mlp\..*_proj$", r".*self_attn\.(q|k|v|o)_proj$", "^model.*(?<!gate)$",
    r"^(?!.*(lm_head|mlp\.gate)).*$", r"model\.layers\.(1[0-9]|2[0-3])\.", r".*\.experts\.[0-9]{1,3}\.w[123]$",
    "(?i).*LM_HEAD", r"\w+\.\w+\b", r"\A.*\Z", "", "$", "^$", "a|b|", r"[^.]+(?:\.[^.]+){2}$", ".*?proj", r"\D+\d\D+$",
)  # fmt: skip
NAMES = (
    "lm_head", "model.layers.0.mlp.up_proj", "model.layers.12.self_attn.q_proj", "model.layers.3.mlp.gate", "a", "b", "",
    "model.layers.7.experts.31.w2", "model.embed_tokens", "re:x", "model.layers.23.", "vision.proj\n", "modèle.ünit_1",
)  # fmt: skip


@pytest.mark.parametrize("pattern", SELECTING)
def test_a_regular_expression_means_what_it_means_to_re(pattern):
    for name in NAMES:
        assert (Patterns([pattern]).first(name) is not None) == (re.match(pattern, name) is not None), name


LETTERS = "ab.1_\n"
ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", "1", "[ab]", "[^a]", r"\d", r"\w", r"\W", r"\s", "^", "$", r"\b", r"\B", "[a-b1]", r"[\d_]",
     r"[^\w]", r"\Z", r"\A"]
)  # fmt: skip
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,3}", "{2,}", "*?", "+?", "??"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map(lambda body: f"(?={body})"),
        inner.map(lambda body: f"(?!{body})"),
        inner.map(lambda body: f"({body})"),
        st.sampled_from(["(?<=a)", "(?<!a)", r"(?<=\.[ab])", "(?<!b1)"]),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=600)
@given(
    pattern=REGEXES,
    flags=st.sampled_from(["", "", "(?i)", "(?s)", "(?m)"]),
    name=st.text(LETTERS + "AB", min_size=1, max_size=8),
)
def test_a_regular_expression_of_any_form_means_what_it_means_to_re(pattern, flags, name):
    pattern = flags + pattern
    assert (Patterns([pattern]).first(name) is not None) == (re.match(pattern, name) is not None)


# --- names and links ----------------------------------------------------------------------------------------------

OUTSIDE = ("../x", "..", ".", "", "/etc/passwd", "//x", "a/../../x", "a/./x", "a//x", "C:x", r"C:\x", r"..\x", r"\\host\x",
           "x\0y", "x\ny", "a/", "~/../x", "file:///x")  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_the_folder_is_refused(name, folder):
    index = json.loads((folder / INDEX).read_text())
    stolen = next(iter(index["weight_map"].values()))
    shutil.copy(folder / stolen, folder.parent / "x")
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    (folder / INDEX).write_text(json.dumps(index))
    message = str(loads(folder))
    assert "must be named by a path below its folder" in message


@pytest.mark.parametrize("maps", [None, [], {}, "x", 7, {"a": 1}, {"a": None}, {"a": ["b"]}, [["a", "b"]], True])
def test_a_weight_map_of_any_other_shape_is_refused(maps, folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": maps}))
    assert "must have a weight_map from names to files" in str(loads(folder))
    (folder / INDEX).write_text(json.dumps({}))
    assert "must have a weight_map from names to files, got None" in str(loads(folder))


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000 + "x", "\ud800", "model.safetensors/x", "config.json"])
def test_a_name_that_no_file_can_have_is_refused(name, folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / INDEX).write_text(json.dumps(index))
    assert loads(folder) is not None


FILES = ("config.json", INDEX, "model-00001-of-00003.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_a_link_out_of_the_folder_is_refused(file, folder):
    outside = folder.parent / "outside"
    (folder / file).rename(outside)
    for target in (outside, Path("..") / "outside", folder / "link" / "outside"):
        (folder / "link").unlink(missing_ok=True)
        (folder / "link").symlink_to(folder.parent)
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)
        assert f"{file} must be in the folder of the checkpoint, got a link to {outside}; put a copy" in str(
            loads(folder)
        )
    (folder / file).unlink()
    (folder / file).symlink_to(file)
    assert loads(folder) is not None
    for target in ("/dev/zero", "/proc/self/mem", "/dev/stdin"):
        (folder / file).unlink()
        (folder / file).symlink_to(target)
        assert "must be in the folder of the checkpoint, got a link to" in str(loads(folder))


@pytest.mark.parametrize("file", FILES)
def test_a_link_within_the_folder_is_followed(file, folder):
    (folder / "deep").mkdir()
    (folder / file).rename(folder / "deep" / "real")
    (folder / file).symlink_to(Path("deep") / "real")
    linked = folder.parent / "linked"
    linked.symlink_to(folder)
    assert loads(linked) is None


def hub(folder: Path, inner: str = "") -> Path:
    """The checkpoint as the Hugging Face cache holds it."""
    repository = folder.parent / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abc" / inner, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"hash{i}")
        (snapshot / file.name).symlink_to(Path(os.path.relpath(blobs / f"hash{i}", snapshot)))
    return snapshot


@pytest.mark.parametrize("inner", ["", "sub/folder"])
def test_the_links_of_the_hugging_face_cache_are_followed(inner, folder):
    snapshot = hub(folder, inner)
    assert loads(snapshot) is None
    through = folder.parent / "refs"
    through.symlink_to(snapshot.parent)
    assert loads(through / snapshot.name) is None


def test_other_links_of_such_a_cache_are_refused(folder):
    snapshot = hub(folder)
    outside = folder.parent / "outside"
    (snapshot / "config.json").resolve().rename(outside)
    for target in (outside, snapshot.parent / "other", snapshot.parent.parent / "blobs" / ".." / "refs"):
        if not target.exists():
            shutil.copy(outside, target)
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(target)
        assert "config.json must be in the folder of the checkpoint" in str(loads(snapshot))
    blobs = snapshot.parent.parent / "blobs"
    (blobs / "passwd").symlink_to(outside)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(blobs / "passwd")
    assert f"got a link to {outside}" in str(loads(snapshot))


# --- tensors ------------------------------------------------------------------------------------------------------


def test_a_name_in_two_files_is_that_of_the_index(folder):
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    files = sorted(set(index.values()))
    truth = {key: safetensors.load_file(folder / file)[key] for key, file in index.items()}
    for file in files:
        state = safetensors.load_file(folder / file)
        lies = {key: torch.zeros_like(x) for key, x in truth.items() if index[key] != file}
        safetensors.save_file({**lies, **state}, folder / file)
    model = Tiny()
    load_quantized_(model, folder)
    assert torch.equal(model.first.weight, truth["first.weight"])
    assert torch.equal(model.second.weight_scale, truth["second.weight_scale"])
    assert torch.equal(model.norm.weight, truth["norm.weight"])


def test_a_name_in_two_files_that_the_index_does_not_name_is_refused(folder):
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    for i, file in enumerate(files[:2]):
        safetensors.save_file(
            {**safetensors.load_file(folder / file), "extra": torch.full((2,), float(i))}, folder / file
        )
    assert "must say which file 'extra' is in, as several hold it" in str(loads(folder))


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "I8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES: Mapping[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "endless header": struct.pack("<Q", 2**63) + b"{}",
    "long header": header({"a": entry()}, b"12", 10_000),
    "no JSON": header(b"what"),
    "deep": header(b'{"a":' + b"[" * 50_000),
    "no object": header(b"[]"),
    "beyond the end": header({"a": entry(offsets=(0, 200))}, b"12"),
    "backwards": header({"a": entry(offsets=(2, 0))}, b"12"),
    "overlap": header({"a": entry(), "b": entry()}, b"12"),
    "hole": header({"a": entry(offsets=(2, 4))}, b"1234"),
    "other size": header({"a": entry(shape=(3,))}, b"12"),
    "overflow": header({"a": entry(shape=(2**63, 2))}, b"12"),
    "negative": header({"a": entry(shape=(-2,))}, b"12"),
    "float shape": header({"a": entry(shape=(2.0,))}, b"12"),
    "no dtype": header({"a": entry("I9")}, b"12"),
    "twice": header(b'{"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"I8","shape":[1],'
                    b'"data_offsets":[0,1]}}', b"12"),
    "metadata of numbers": header({"__metadata__": {"a": 1}, "a": entry()}, b"12"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_about_its_tensors_is_refused(name, tmp_path):
    save(tmp_path, tiny_state(), W8)
    (tmp_path / "model.safetensors").write_bytes(LIES[name])
    assert loads(tmp_path) is not None


@pytest.mark.parametrize("name", ["first.weight", "first.weight_scale", "first.weight_g_idx", "norm.weight", "more"])
@pytest.mark.parametrize("size", [1 << 33, 1 << 38])
def test_a_tensor_larger_than_memory_is_refused_before_it_is_read(name, size, tmp_path):
    save(tmp_path, {key: x for key, x in tiny_state().items() if key != name}, W8)
    path = tmp_path / "model-2.safetensors"
    path.write_bytes(header({name: entry(shape=(size // 64, 64), offsets=(0, size))}))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    keys = [key for key in tiny_state() if key != name]
    index = {**dict.fromkeys(keys, "model.safetensors"), name: path.name}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    assert name in str(loads(tmp_path)) or "must be a safetensors file" in str(loads(tmp_path))


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(kept, tmp_path):
    save(tmp_path, tiny_state(), W8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert "must be a safetensors file" in str(loads(tmp_path))


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_of_a_header_may_be_anything(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    save(folder, tiny_state(), W8)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.sampled_from(b'0129{}[]",:aFIU8\x00\xff'))
    path.write_bytes(content)
    loads(folder, strict=data.draw(st.booleans()))
    shutil.rmtree(folder)


STATIC = args(strategy="tensor", symmetric=False)
PARTS = ("weight", "weight_scale", "bias", "input_scale", "input_zero_point", "weight_shape", "weight_g_idx")
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32,
)  # fmt: skip
SHAPES = (
    (),
    (0,),
    (1,),
    (2,),
    (32,),
    (32, 1),
    (1, 32),
    (32, 64),
    (64, 32),
    (0, 64),
    (32, 0),
    (32, 64, 1),
    (32, 16),
    (64,),
)


TRIED = {*itertools.product(DTYPES, ((32, 1), (32, 64))), *itertools.product((torch.float32, torch.int8), SHAPES)}


@pytest.mark.parametrize("config", [W8, compressed(group(args(strategy="tensor"), STATIC))], ids=["w8", "static"])
@pytest.mark.parametrize("part", [*PARTS, "weight_packed", "weight_zero_point"])
def test_a_tensor_may_be_of_any_dtype_and_shape(part, config, tmp_path):
    accepted = set()
    for dtype, shape in sorted(TRIED, key=str):
        state = tiny_state()
        state[f"first.{part}"] = torch.ones(shape).to(dtype)
        if part == "weight_packed":
            del state["first.weight"]
        save(tmp_path, state, config)
        if loads(tmp_path) is None:
            accepted.add(dtype)
    real = {dtype for dtype in DTYPES if dtype.is_floating_point}
    if part in ("weight_scale", "bias", "input_scale"):
        assert accepted <= real | {torch.uint8}
    if part == "weight":
        assert accepted <= {torch.int8, torch.int32}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, -0.0, 1e39])
@pytest.mark.parametrize("part", ["weight_scale", "input_scale"])
def test_scales_that_are_none_are_refused(part, value, tmp_path):
    state = tiny_state() | {"first.input_scale": torch.ones(1), "second.input_scale": torch.ones(1)}
    state |= {"first.weight_scale": torch.ones(1, 1), "second.weight_scale": torch.ones(1, 1)}
    state[f"second.{part}"] = torch.full_like(state[f"second.{part}"], value, dtype=torch.float64)
    save(tmp_path, state, compressed(group(args(strategy="tensor"), args(strategy="tensor"))))
    assert f"second: {part} must be finite and positive" in str(loads(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5, 1e10, -(2.0**31) - 1])
def test_zero_points_that_are_no_whole_numbers_are_refused(value, tmp_path):
    state = tiny_state() | {
        f"{name}.weight_zero_point": torch.zeros(n, 1) for name, n in (("first", 32), ("second", 16))
    }
    save(tmp_path, state, compressed(group(args(symmetric=False))))
    assert loads(tmp_path) is None
    state["second.weight_zero_point"][3] = value
    save(tmp_path, state, compressed(group(args(symmetric=False))))
    assert "second: weight_zero_point must be whole numbers that int32 holds" in str(loads(tmp_path))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_is_untouched_where_its_last_tensor_is_at_fault(device, tmp_path):
    state: dict[str, Tensor] = tiny_state()
    state["second.weight_scale"][-1] = float("nan")
    save(tmp_path, state, W8)
    assert "second: weight_scale must be finite and positive, got nan (1 of 16" in str(loads(tmp_path, device))


def test_a_model_is_untouched_where_a_buffer_cannot_be_made(tmp_path):
    save(tmp_path, tiny_state(), W8)
    with torch.device("meta"):
        model = Tiny()
        model.second.register_buffer("made", torch.zeros(2), persistent=False)
        model.norm.register_buffer("table", torch.arange(4), persistent=False)
    model._init_weights = lambda module: None
    before = seen(model)
    with pytest.raises(CheckpointError, match="must be made by the model"):
        load_quantized_(model, tmp_path)
    assert_untouched(model, before)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.int64, torch.bool, torch.complex64], ids=str)
def test_a_buffer_loads_from_its_own_kind_only(kept, stored, tmp_path):
    model = Tiny()
    model.register_buffer("extra", torch.zeros(3, dtype=kept))
    before = seen(model)
    save(tmp_path, tiny_state() | {"extra": torch.ones(3).to(stored)}, W8)

    def kind(dtype: torch.dtype) -> str:
        if dtype.is_complex or dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            return f"nothing that loads: {dtype}"
        return "float" if dtype.is_floating_point else "bool" if dtype is torch.bool else "integer"

    if kind(kept) == kind(stored) and not kept.is_complex:
        load_quantized_(model, tmp_path)
        assert model.extra.dtype is kept and bool((model.extra == 1).all())
    else:
        with pytest.raises(CheckpointError, match="extra must be"):
            load_quantized_(model, tmp_path)
        assert_untouched(model, before)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="needs a root user, to become another")
def test_files_that_may_not_be_read_are_refused(written):
    # Not below pytest's own folder, which is nobody else's.
    with tempfile.TemporaryDirectory() as above:
        Path(above).chmod(0o755)
        folder, locked = Path(shutil.copytree(written, f"{above}/checkpoint")), Path(above, "locked")
        folder.chmod(0o755)
        for file in FILES:
            (folder / file).chmod(0)
        (locked / "inner").mkdir(parents=True)
        locked.chmod(0)
        os.seteuid(54321)
        try:
            found = [loads(each) for each in (folder, folder / "config.json" / "x", locked / "inner")]
        finally:
            os.seteuid(0)
    assert "config.json must be JSON, got " in str(found[0])
    assert all("directory must be a folder on this machine" in str(each) for each in found[1:])
