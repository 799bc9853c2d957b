"""Where measurements are kept, and every way in which that folder or a file of it can be broken.

Whatever is there, the defaults hold, one warning says why, nothing raises and nothing waits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from fx_quant.backend import RewritePass
from fx_quant.config import Options
from fx_quant.errors import FxQuantError
from fx_quant.kernels.cpu import candidates
from fx_quant.kernels.cpu import plans as tuning
from fx_quant.kernels.cpu.plans import DEFAULT
from fx_quant.kernels.triton import measured
from fx_quant.kernels.triton.launch import Configuration
from fx_quant.kernels.triton.measured import Gpu
from fx_quant.target import named_target
from fx_quant.tuning import saved as measurements

GPU = Gpu("NVIDIA H100", 13000, "2.11.0", "3.6.0", "abc")
needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with FIFOs")


@pytest.fixture(autouse=True)
def _nothing_waits() -> Iterator[None]:
    """Opening a FIFO that nobody writes to waits for ever."""

    def late(*_: object) -> None:
        raise TimeoutError("something waits")

    tuning.PLANS.forget()
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 240)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    tuning.PLANS.forget()


def reads() -> tuple[list[object], list[str]]:
    """What is in force for plans and configurations, and the warnings that said so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [tuning.table("another"), tuning.table("another"), dict(measured.CONFIGURATIONS.load(GPU))]
    return found, [str(each.message) for each in caught]


# --- the folder ---------------------------------------------------------------------------------------------------


def fifo(at: Path) -> None:
    os.mkfifo(at)


def loop(at: Path) -> None:
    at.symlink_to(at)


def fifo_above(at: Path) -> None:
    os.mkfifo(at.parent / "above")
    at.symlink_to(at.parent / "above")


# How it is made at a path, and the reason that is given for what is there.
FOLDERS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda at: at.write_text(""), "{at} is no folder"),
    "a FIFO": (fifo, "{at} is no folder"),
    "a link to a FIFO": (fifo_above, "{at} is no folder"),
    "a socket": (lambda at: socket.socket(socket.AF_UNIX).bind(str(at)), "{at} is no folder"),
    "a dangling link": (lambda at: at.symlink_to(at.parent / "nothing"), "{at} is a link to nothing"),
    "a loop": (loop, "Too many levels of symbolic links"),
}
ABOVE = ("", "/below", "/far/below")


@needs_fifo
@pytest.mark.parametrize("below", ABOVE)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_none_means_the_defaults_and_one_warning(name, below, tmp_path, monkeypatch):
    make, why = FOLDERS[name]
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    at = tmp_path / "at"
    make(Path("at") if name == "a socket" else at)
    monkeypatch.setenv("FX_QUANT_CACHE_DIR", f"{at}{below}")
    found, said = reads()
    assert found == [DEFAULT, DEFAULT, {}]
    assert len(set(said)) == 1 and len(said) == 2  # one of plans and one of configurations, in the same words
    assert why.format(at=at) in said[0] and "set FX_QUANT_CACHE_DIR to a folder" in said[0] and "\n" not in said[0]
    for write in (tuning.PLANS.check_writable, lambda machine: tuning.PLANS.save({}, machine)):
        with pytest.raises(FxQuantError, match="plans must be written to .* set FX_QUANT_CACHE_DIR") as error:
            write(tuning.this_machine())
        assert "\n" not in str(error.value)
    assert RewritePass(Options(), named_target("x86_vnni")).uuid()


NAMES = {
    "nobody's home": "~no_such_user_of_this_machine/cache",
    "nobody's home alone": "~no_such_user_of_this_machine",
    "too long": "/" + "a" * 5000,
    "too long a part": "/tmp/" + "a" * 300,
}


@pytest.mark.parametrize("variable", ["FX_QUANT_CACHE_DIR", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_folder_means_the_defaults_and_one_warning(name, variable, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("FX_QUANT_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, NAMES[name])
    found, said = reads()
    assert found == [DEFAULT, DEFAULT, {}]
    assert len(set(said)) == 1 and "set FX_QUANT_CACHE_DIR to a folder" in said[0]
    assert len(said[0]) < 1000
    for write in (tuning.PLANS.check_writable, lambda machine: tuning.PLANS.save({}, machine), tuning.PLANS.reset):
        with pytest.raises(FxQuantError):
            write(tuning.this_machine())


def test_a_name_with_a_null_in_it_means_the_defaults_and_one_warning(monkeypatch):
    monkeypatch.setattr(measurements, "cache_folder", lambda: Path("/a\0b"))
    found, said = reads()
    assert found == [DEFAULT, DEFAULT, {}] and len(set(said)) == 1
    for write in (tuning.PLANS.check_writable, lambda machine: tuning.PLANS.save({}, machine), tuning.PLANS.reset):
        with pytest.raises(FxQuantError):
            write(tuning.this_machine())


@pytest.mark.parametrize("given", ["", "there/cache", "~/cache", "/dev/shm/fxq-no-such-folder"])
def test_a_folder_that_is_not_there_yet_is_no_reason_to_warn(given, tmp_path, monkeypatch):
    monkeypatch.setenv("FX_QUANT_CACHE_DIR", given)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert reads() == ([DEFAULT, DEFAULT, {}], [])
    tuning.PLANS.check_writable(tuning.this_machine())


def test_a_working_folder_that_is_gone_is_no_reason_to_warn(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("FX_QUANT_CACHE_DIR", "cache")
    assert reads() == ([DEFAULT, DEFAULT, {}], [])
    with pytest.raises(FxQuantError, match="plans must be written to cache, which failed: No such file or directory"):
        tuning.PLANS.save({}, tuning.this_machine())


# Another user's: after these imports, since this user may not be able to read any.
AS_NOBODY = """
import json, os, resource, sys, warnings
from pathlib import Path
os.environ["FX_QUANT_CACHE_DIR"] = f"{sys.argv[1]}/before"
import torch, fx_quant
from fx_quant.kernels.cpu import plans as tuning
from fx_quant.backend import RewritePass
from fx_quant.config import Options
from fx_quant.errors import FxQuantError
from fx_quant.kernels.machine import detect_target

base, uid = Path(sys.argv[1]), int(sys.argv[2])
class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(64, 64)
    def forward(self, x):
        return self.a(x).relu()
model = Two()
fx_quant.quantize_(model, "int8 per_token (dynamic) x int8 per_channel")
text = str(fx_quant.explain(model, torch.randn(4, 64)))  # imports what is imported late
RewritePass(Options(), detect_target()).uuid()
file = tuning.PLANS.path(tuning.this_machine()).name
tuning.PLANS.save({}, tuning.this_machine())
os.environ["FX_QUANT_CACHE_DIR"] = str(base / "unreadable file")
tuning.PLANS.save({}, tuning.this_machine())
tuning.PLANS.path(tuning.this_machine()).chmod(0)
for name, mode in (("unreadable", 0o000), ("not writable", 0o555), ("not searchable", 0o600)):
    (base / name).mkdir()
    (base / name).chmod(mode)
(base / "good").mkdir()
(base / "good").chmod(0o777)
if uid:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
for name in ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "FX_QUANT_CACHE_DIR"):
    os.environ.pop(name, None)
found = {}
for name in (None, "unreadable", "not writable", "not searchable", "unreadable file", "full", "good"):
    if name is not None:
        os.environ["FX_QUANT_CACHE_DIR"] = str(base / ("good" if name == "full" else name))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 if name == "full" else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    tuning.PLANS.forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = tuning.table("another")
        RewritePass(Options(), detect_target()).uuid()
        same = str(fx_quant.explain(model, torch.randn(4, 64))) == text
    try:
        saved = "saved to " + str(tuning.PLANS.save({}, tuning.this_machine()).parent.name)
    except FxQuantError as error:
        saved = str(error)
    found[str(name)] = [table == tuning.DEFAULT, same, [str(each.message) for each in caught], saved]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs a root user, to become another")
def test_a_user_without_a_home_or_rights_has_the_defaults_and_at_most_one_warning(printed):
    # Not below pytest's own folder, which is nobody else's.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        found = json.loads(printed(AS_NOBODY, folder, "54321"))
    assert all(is_default and is_same for is_default, is_same, _, _ in found.values())
    said = {name: row[2] for name, row in found.items()}
    saved = {name: row[3] for name, row in found.items()}
    assert all(len(each) <= 1 for each in said.values()), said
    assert "no home folder is known" in said["None"][0] and "set FX_QUANT_CACHE_DIR" in said["None"][0]
    assert "set FX_QUANT_CACHE_DIR" in saved["None"]
    for name in ("unreadable", "not searchable", "unreadable file"):
        assert "Permission denied" in said[name][0], name
    for name in ("unreadable", "not searchable", "not writable"):
        assert "plans must be written to" in saved[name], name
    # Nothing was to be read there, so nothing is lost by not being let write.
    assert said["not writable"] == said["full"] == said["good"] == []
    assert "File too large" in saved["full"] and saved["good"] == "saved to good"


# --- the file -----------------------------------------------------------------------------------------------------


def saved(**changes: object) -> str:
    machine = dataclasses.asdict(tuning.this_machine())
    return json.dumps({"format": 1, "machine": machine, "tables": {"another": DEFAULT.to_data()}, **changes})


def rows(**changes: object) -> str:
    return saved(tables={"another": [{**DEFAULT.to_data()[-1], **changes}]})


CONTENTS: Mapping[str, Callable[[], str]] = {
    "nothing": lambda: "",
    "null": lambda: "null",
    "NaN": lambda: "NaN",
    "a string": lambda: '"plans"',
    "a bomb of lists": lambda: '{"format": 1, "machine": {}, "tables": ' + "[" * 200_000,
    "a closed bomb of lists": lambda: "[" * 200_000 + "]" * 200_000,
    "a bomb of objects": lambda: '{"a":' * 100_000,
    "a number of many digits": lambda: saved(format="@").replace('"@"', "1" * 10_000),
    "no machine": lambda: saved(machine=None),
    "a machine of pairs": lambda: saved(machine=[["cpu"]]),
    "a machine of a number": lambda: saved(machine=7),
    "a machine of deep lists": lambda: saved(machine={"cpu": "@"}).replace('"@"', "[" * 500 + "]" * 500),
    "a long machine": lambda: saved(machine={"cpu": "x" * 100_000}),
    "a machine of lines": lambda: saved(machine={"cpu": "x\ny"}),
    "tables of a list": lambda: saved(tables=[1]),
    "tables of text": lambda: saved(tables="another"),
    "a table of text": lambda: saved(tables={"another": "rows"}),
    "a table of numbers": lambda: saved(tables={"another": [1]}),
    "a table of nothing": lambda: saved(tables={"another": []}),
    "rows of text": lambda: rows(rows="2"),
    "rows of true": lambda: rows(rows=True),
    "a float": lambda: rows(ahead=1.5),
    "infinity": lambda: rows(ahead=float("inf")),
    "below": lambda: rows(ahead=-1),
    "beyond": lambda: rows(chunk_k=2**70),
    "a number for a bool": lambda: rows(next_panel=1),
    "a list for a number": lambda: rows(alone=[1]),
    "another field": lambda: rows(evil=1),
    "a long name": lambda: saved(tables={"another": [{"x" * 100_000: 1, "rows": None}]}),
    "too much": lambda: " " * (8 << 20) + saved(),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_of_anything_means_the_defaults_and_one_warning(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FX_QUANT_CACHE_DIR", str(tmp_path))
    tuning.PLANS.path(tuning.this_machine()).write_text(CONTENTS[name]())
    found, said = reads()
    assert found == [DEFAULT, DEFAULT, {}]
    assert len(said) == 1 and "\n" not in said[0] and len(said[0]) < 1000
    assert "are ignored and the defaults used, because" in said[0]


FILES: Mapping[str, Callable[[Path], object]] = {
    "a folder": lambda at: at.mkdir(),
    "a FIFO": fifo,
    "a device": lambda at: at.symlink_to("/dev/zero"),
    "a terminal": lambda at: at.symlink_to("/dev/tty"),
    "a dangling link": lambda at: at.symlink_to(at.parent / "nothing"),
    "a loop": loop,
}


@needs_fifo
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_means_the_defaults_and_one_warning(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FX_QUANT_CACHE_DIR", str(tmp_path))
    FILES[name](tuning.PLANS.path(tuning.this_machine()))
    found, said = reads()
    assert found == [DEFAULT, DEFAULT, {}]
    assert len(said) == 1 and "the defaults used, because" in said[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"form": "magic"},
        {"form": None},
        {"block_m": "16"},
        {"block_m": 0},
        {"block_n": -64},
        {"block_k": 96},
        {"block_k": 2**40},
        {"warps": 3},
        {"warps": 64},
        {"stages": 0},
        {"stages": True},
        {"stages": 1e3},
        {"split_k": 0},
        {"split_k": 10**9},
        {"warp_specialized": 1},
        {"flattened": "no"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_configuration_that_no_kernel_can_take_is_ignored_with_one_warning(changes, tmp_path, monkeypatch):
    monkeypatch.setenv("FX_QUANT_CACHE_DIR", str(tmp_path))
    path = measured.CONFIGURATIONS.save({"int8": Configuration("swapped", 16, 64, 256, 4, 4, split_k=3)}, GPU)
    data = json.loads(path.read_text())
    data["tables"]["int8"] |= changes
    path.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="the configurations in .* are ignored") as caught:
        assert measured.CONFIGURATIONS.load(GPU) == {}
    assert len(caught) == 1


# --- the machine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError, UnicodeDecodeError, IsADirectoryError])
def test_a_machine_that_does_not_say_what_it_is_has_defaults(error, monkeypatch):
    def read_text(self: Path, *_: object, **__: object) -> str:
        raise error("utf-8", b"\xff", 0, 1, "odd") if error is UnicodeDecodeError else error("not for you")

    monkeypatch.setattr(Path, "read_text", read_text)
    tuning._cpu_model.cache_clear()
    try:
        assert tuning.this_machine().cpu
        assert candidates.cache_bytes() == 64 * 2**20
    finally:
        tuning._cpu_model.cache_clear()
