"""What the backend says while it compiles: to TORCH_LOGS, to TORCH_TRACE, and to Dynamo's counters."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch._dynamo.utils import counters
from torch._logging._internal import _init_logs

from fx_quant.report import Report
from tests import models
from tests.test_explain import build_two_layers


@pytest.fixture
def torch_logs(monkeypatch):
    """PyTorch's logs as the variable ``TORCH_LOGS`` sets them."""

    trace = logging.getLogger("torch.__trace")
    before = list(trace.handlers), trace.level, trace.propagate

    def listen(asked):
        monkeypatch.setenv("TORCH_LOGS", asked)
        _init_logs()

    yield listen
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    _init_logs()
    # Which made graphs be written out for a trace that nobody reads, in every later test of the process.
    trace.handlers[:], level, trace.propagate = before
    trace.setLevel(level)


def compiled(model, *args):
    with torch.no_grad():
        return torch.compile(model, backend="fx_quant")(*args)


def test_torch_logs_has_a_line_for_each_graph(torch_logs, capfd, op_by_op):
    torch_logs("fx_quant")
    model, args = build_two_layers()
    compiled(model, *args)
    compiled(torch.nn.Linear(4, 4), torch.zeros(2, 4))
    lines = [line for line in capfd.readouterr().err.splitlines() if "] graph " in line]
    assert "graph 0/0: 1 of 2 quantized matmuls rewritten on " in lines[0]
    assert "no quantized matmul found" in lines[1] and len(lines) == 2


def test_torch_logs_with_a_plus_has_the_table(torch_logs, capfd, op_by_op):
    torch_logs("+fx_quant")
    model, args = build_two_layers()
    compiled(model, *args)
    said = capfd.readouterr().err
    assert "int8 per_token (dynamic) x int8 per_channel" in said and "missed:" in said


def test_torch_trace_has_the_report_for_tlparse(op_by_op):
    found = []

    class Keep(logging.Handler):
        def emit(self, record):
            if record.metadata.get("artifact", {}).get("name") == "fx_quant_report":
                found.append(record)

    handler, trace = Keep(), logging.getLogger("torch.__trace")
    level, trace.level = trace.level, logging.DEBUG
    trace.addHandler(handler)
    try:
        model, args = build_two_layers()
        compiled(model, *args)
    finally:
        trace.removeHandler(handler)
        trace.level = level
    (record,) = found
    assert record.metadata["artifact"]["encoding"] == "json"
    assert json.loads(record.payload)["summary"].startswith("1 of 2 quantized matmuls rewritten")
    assert len(Report.from_json(record.payload).misses) == 1


def test_counters_tell_graphs_and_kernels(op_by_op):
    compiled(models.POSITIVE["int8_int_mm"].build(torch.float32, True), models.inputs(torch.float32))
    assert sum(counters["fx_quant_graphs"].values()) == 1
    assert sum(counters["fx_quant_kernels"].values()) == 1 == counters["fx_quant"]["rewritten"]
