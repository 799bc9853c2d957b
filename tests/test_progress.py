"""Bars on the error stream, where that is a terminal and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from fx_quant.report.progress import counting, progress


class Stream(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


def shown(monkeypatch, is_terminal):
    stream = Stream(is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress([1, 2, 3], "loading", "linear")) == [1, 2, 3]
    with counting("explaining", "graph") as done:
        done()
    return stream.getvalue()


def test_a_terminal_shows_what_is_done_and_keeps_nothing(monkeypatch, capsys):
    text = shown(monkeypatch, is_terminal=True)
    assert "fx_quant: loading" in text and "fx_quant: explaining" in text
    assert not text.endswith("\n") and not capsys.readouterr().out


def test_elsewhere_nothing_is_written(monkeypatch):
    assert shown(monkeypatch, is_terminal=False) == ""


@pytest.mark.parametrize("stream", [None])
def test_without_an_error_stream_nothing_fails(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress([1, 2], "loading", "linear")) == [1, 2]
