"""The command line: what it prints, its exit status, and that whoever is wrong is told so in a line."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import fx_quant
import fx_quant.cli.models
from fx_quant.__main__ import main
from fx_quant.cli import run
from fx_quant.diagnose.support import SCHEMES
from fx_quant.kernels.registry import kernels
from fx_quant.scheme import WORDS, Scheme, short_scheme
from tests import models
from tests.test_explain import TwoLayers, build_reordered_scales, build_two_layers

__all__ = ["TwoLayers", "build_reordered_scales", "build_two_layers"]


def build_named_inputs():
    return TwoLayers(), {"x": models.inputs(torch.bfloat16, 3)}


def build_float():
    return torch.nn.Linear(4, 5), torch.zeros(2, 4)


def build_wrong_shape():
    return torch.nn.Linear(4, 5), torch.zeros(2, 8)


def build_without_inputs():
    return torch.nn.Linear(4, 5), ()


def build_on_meta():
    return torch.nn.Linear(4, 5, device="meta"), torch.zeros(2, 4)


def build_a_string():
    return "llama", torch.zeros(2, 4)


def build_for_a_string():
    return torch.nn.Linear(4, 5), "hello"


def build_quantized_for_a_string():
    layer = torch.nn.Sequential(torch.nn.Linear(32, 32))
    fx_quant.quantize_(layer, "w8a8")
    return layer, "hello"


def build_from(path):
    return path


def build_ending():
    sys.exit("no GPU")


def build_raising():
    raise LookupError("no such weights")


@pytest.fixture(autouse=True)
def importable(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "here", sys.modules[__name__])
    (tmp_path / "no_python.py").write_text("def build(:\n")
    (tmp_path / "one_function.py").write_text("def build(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("builder", ["build_two_layers", "build_named_inputs"])
def test_explain_prints_the_table(builder, capsys):
    assert main(["explain", f"here:{builder}"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 quantized matmuls rewritten" in out
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out


def test_explain_writes_json_markdown_and_a_page_and_compares(tmp_path, capsys):
    page, saved = tmp_path / "report.html", tmp_path / "report.json"
    assert main(["explain", "here:build_two_layers", "--target", "h100", "--json", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["target"] == "sm90" and page.read_text().startswith("<!doctype html>")
    saved.write_text(out)
    assert main(["explain", "here:build_two_layers", "--compare", str(saved), "--markdown"]) == 0
    assert "1 of 2 quantized matmuls differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["explain", "here:build_two_layers", "--strict"], 1),
        (["explain", "here:build_two_layers", "--expect", "1"], 0),
        (["explain", "here:build_two_layers", "--expect", "2"], 1),
        (["explain", "here:build_float", "--strict"], 1),
        (["explain", "here:build_float", "--expect", "1"], 1),
        (["check", "here:build_float", "--strict"], 1),
        (["check", "here:build_float"], 0),
        (["explain", "here:build_two_layers", "--option", "freezing=true", "--option", "numerics=exact"], 0),
    ],
)
def test_expectations_decide_the_status(arguments, status, op_by_op):
    assert main(arguments) == status


def test_check_ends_with_one_when_a_site_is_worse(capsys):
    assert main(["check", "here:build_reordered_scales", "--min-sqnr-db", "1000"]) == 1
    assert "SQNR must be" in capsys.readouterr().err


WRONG = [
    (["explain", "here"], "must be given as module.path:callable"),
    (["explain", "no_such_module:build"], "cannot import 'no_such_module'"),
    (["explain", "one_function:bild"], "unknown function of one_function 'bild'. Did you mean 'build'"),
    (["explain", "./here.py:build_float"], "not by its file: here:build_float"),
    (["explain", "here:build_from"], "must be called with nothing"),
    (["explain", "here:build_ending"], "here:build_ending ended the process: no GPU"),
    (["explain", "no_python:build"], "cannot import 'no_python': invalid syntax"),
    *(
        ([command, f"here:{build}"], "the model fails on these inputs")
        for build in ("build_for_a_string", "build_quantized_for_a_string")
        for command in ("explain", "check")
    ),
    (["check", "here:build_float", "--max-rel-err", "nan"], "argument --max-rel-err: must be a number, got nan"),
    (["explain", "here:TwoLayers"], "must return (model, args) or (model, kwargs), got TwoLayers"),
    (["explain", "here:build_a_string"], "got a model that cannot be called: str"),
    (["explain", "here:build_without_inputs"], "missing a required argument: 'input'"),
    (["explain", "here:build_wrong_shape"], "the model fails on these inputs"),
    (["explain", "here:build_on_meta"], "weight (of 2) is on the meta device; load the weights"),
    (["kernels", "--target", "h1000"], "unknown target 'h1000'. Did you mean 'h100'"),
    (["kernels", "--with", "vllm"], "--with must be NAME==VERSION, such as vllm==0.33"),
    (["kernels", "--with", "vlm==0.33"], "Did you mean 'vllm'"),
    (["kernels", "--scheme", "w9a9"], "a scheme must read 'activation x weight', got 'w9a9'"),
    (["kernels", "--rows", "3"], "--rows needs --shapes"),
    (["kernels", "--tagret", "h100"], "unknown option of kernels '--tagret'. Did you mean '--target'"),
    (["explian", "here:build_float"], "unknown command 'explian'. Did you mean 'explain'"),
    (["explain"], "the following arguments are required: model"),
    ([], "the following arguments are required: command"),
    (["doctor", "please"], "doctor takes no 'please'"),
]
# What is wrong with these is said before the model is loaded.
EARLY = [
    (["--target", "sm9"], "unknown target 'sm9'"),
    (["--option", "strict"], "must be NAME=VALUE"),
    (["--option", "freezin=true"], "Did you mean 'freezing'"),
    (["--option", "strict=maybe"], "option 'strict' must be True or False"),
    (["--compare", "nowhere.json"], "--compare needs a file that `explain --json` wrote"),
    (["--html", "no/such/folder/x.html"], "--html needs a file in a folder that exists"),
    (["--html", "."], "--html needs a file in a folder that exists"),
    (["--html", ""], "--html needs a file in a folder that exists"),
    (["--expect", "-1"], "argument --expect: must be 0 or more, got -1"),
    (["--expect", "many"], "invalid int value: 'many'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_a_user_has_to_put_right_is_one_line_and_status_two(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1 and len(said.err) < 800 and not said.out


@pytest.mark.parametrize(("arguments", "message"), EARLY)
def test_options_are_checked_before_a_model_is_loaded(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(fx_quant.cli.models, "_load", lambda path: pytest.fail("it was loaded"))
    assert main(["explain", "here:build_float", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_callable_that_raises_shows_its_own_traceback_alone(capsys):
    assert main(["explain", "here:build_raising"]) == 2
    said = capsys.readouterr().err
    assert said.count('File "') == 1 and "test_cli.py" in said
    assert said.endswith("LookupError: no such weights\n")


def test_a_fault_of_ours_is_not_taken_for_the_users(monkeypatch):
    monkeypatch.setattr("fx_quant.diagnose.capture.ModuleNames", None)
    with pytest.raises(TypeError, match="NoneType"):
        main(["explain", "here:build_float"])


def test_interrupting_is_one_line(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "parsed", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "fx_quant: interrupted\n"


def test_nobody_reading_is_no_error(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w") as out:
        closed = Closed(out.fileno())
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["kernels", "--target", "sm90"]) == 141
        assert os.path.samestat(os.fstat(out.fileno()), Path(os.devnull).stat())


class Closed(io.TextIOBase):
    """A pipe that nobody reads."""

    def __init__(self, descriptor):
        self.descriptor = descriptor

    def write(self, text):
        raise BrokenPipeError

    def fileno(self):
        return self.descriptor


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fx_quant {fx_quant.__version__}\n"


def test_doctor_says_first_whether_this_machine_is_ready(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fx_quant: ready: fused kernels run ")
    assert f"torch{' ' * 15}{torch.__version__}"[:5] in out and "compiled graphs" in out
    assert max(map(len, out.splitlines())) <= 80
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["torch"] == torch.__version__


def test_doctor_without_a_compiler_says_what_to_install_and_ends_with_one(monkeypatch, capsys):
    monkeypatch.setattr("fx_quant.cli.doctor.cpp_compiler", lambda: None)
    monkeypatch.setattr("fx_quant.kernels.machine.shutil.which", lambda name: None)
    assert main(["doctor"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("fx_quant: not ready") and "a C++ compiler: install g++ or clang++, or set CXX" in out


@pytest.mark.parametrize("command", [["doctor", "--all"], ["kernels", "--all", "--target", "mi300x"]])
def test_the_catalogue_has_every_kernel(command, capsys):
    assert main([*command, "--wide"]) == 0
    out = capsys.readouterr().out
    assert all(kernel.name in out for kernel in kernels())


def test_kernels_answers_first_and_gives_reasons_of_one_scheme(capsys):
    assert main(["kernels", "--target", "sm90"]) == 0
    out = capsys.readouterr().out
    assert "fp8 token dyn x fp8 channel" in out and "lower priority" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert main(["kernels", "--target", "h100", "--scheme", "fp8", "--with", "vllm==0.33"]) == 0
    out = capsys.readouterr().out
    assert "cutlass_float8" in out and "pytorch_scaled_mm_rowwise: lower priority" in out


@pytest.mark.parametrize("text", SCHEMES)
def test_a_short_scheme_reads_as_what_it_stands_for(text):
    assert len(short_scheme(text)) <= len(text)
    assert str(Scheme.parse(short_scheme(text))) == text


@pytest.mark.parametrize("word", WORDS)
def test_words_that_people_use_are_schemes(word):
    assert str(Scheme.parse(word.upper())) == WORDS[word]


def test_dtypes_go_by_their_short_names_too():
    assert str(Scheme.parse("bf16 x fp8 per_channel")) == "bfloat16 x float8_e4m3fn per_channel"
