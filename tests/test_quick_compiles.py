"""How C++ is compiled here: graphs quickly, and what is compiled once for all callers as users get it."""

from __future__ import annotations

import torch._inductor.cpp_builder as cpp_builder
from torch._inductor.codecache import CppCodeCache

from fx_quant import compat


def level() -> str:
    flags, _ = cpp_builder._get_optimization_cflags(cpp_builder.get_cpp_compiler())
    (found,) = (flag for flag in flags if flag in ("O0", "Og", "O1", "O2", "O3"))
    return found


def test_a_graph_is_hardly_optimised():
    assert level() == "Og"


def test_a_graph_is_optimised_where_that_is_the_claim(as_shipped):
    assert level() == "O3"


def test_native_kernels_of_eager_calls_are_always_optimised(monkeypatch):
    monkeypatch.setattr(CppCodeCache, "load", lambda _: level())
    assert compat.load_cpp("") == "O3"
