"""Compiling with ``torch.compile`` so that afterwards Dynamo, and what was compiled before, are as they were.

Compiled code hangs off code objects, and Dynamo can neither remove an entry nor put one back. So for the time being the
functions whose code has entries run a copy of it, and code that had none is reset at the end.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, _debug_get_precompile_entries
from torch._dynamo import config, convert_frame, eval_frame, pgo
from torch._dynamo.utils import counters, graph_break_reasons, preserve_rng_state

from fx_quant.report import BreakReport

_CALLS_MODULES = (nn.Module.__call__.__code__.co_filename, eval_frame.__file__)


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Within, Dynamo starts as in a fresh process; afterwards it is as it was before, and so are random numbers.

    Caches, counters, what its limits count, the history of sizes and numbers of frames are meant. Not for use while
    another thread runs compiled code.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserve_rng_state())
        stack.enter_context(_counters_of_their_own())
        stack.enter_context(_attributes_of_their_own())
        stack.enter_context(config.patch(automatic_dynamic_local_pgo=False, automatic_dynamic_remote_pgo=False))
        stack.enter_context(_code_of_their_own())
        yield


@contextlib.contextmanager
def _counters_of_their_own() -> Iterator[None]:
    kept = {name: dict(counts) for name, counts in counters.items()}
    breaks = list(graph_break_reasons)
    for counts in counters.values():
        counts.clear()
    graph_break_reasons.clear()
    try:
        yield
    finally:
        for name in list(counters):
            # The objects stay, as others may hold them.
            counters[name].clear()
            counters[name].update(kept.get(name, {}))
            if name not in kept:
                del counters[name]
        graph_break_reasons[:] = breaks


@contextlib.contextmanager
def _attributes_of_their_own() -> Iterator[None]:
    backends = set(eval_frame.cached_backends)
    fresh = (
        (convert_frame, "FRAME_COUNTER", 0),
        (convert_frame, "FRAME_COMPILE_COUNTER", Counter()),
        (pgo, "_CODE_STATE", defaultdict(pgo.CodeState)),
        (pgo, "_INIT_CODE_STATE", None),
    )
    kept = [(module, name, getattr(module, name)) for module, name, _ in fresh]
    for module, name, value in fresh:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
        for key in set(eval_frame.cached_backends) - backends:
            del eval_frame.cached_backends[key]


@contextlib.contextmanager
def _code_of_their_own() -> Iterator[None]:
    known, mine = convert_frame.input_codes, convert_frame.Tracker()
    seen = [code for reference in known.seen if (code := reference()) is not None]
    # By identity, as code objects that read alike are equal.
    compiled = {id(code): code for code in seen if _has_entries(code)}
    swapped = [(function, function.__code__) for function in _functions_with(compiled)]
    convert_frame.input_codes = mine
    try:
        for function, code in swapped:
            function.__code__ = _copied(code)
        yield
    finally:
        for function, code in swapped:
            function.__code__ = code
        convert_frame.input_codes = known
        for reference in mine.seen:
            code = reference()
            if code is not None and id(code) not in compiled:
                eval_frame.reset_code(code)


def _has_entries(code: types.CodeType) -> bool:
    return bool(_debug_get_cache_entry_list(code) or _debug_get_precompile_entries(code))


def _functions_with(compiled: Mapping[int, types.CodeType]) -> list[types.FunctionType]:
    """All functions whose code, or that of a function made in it, is among ``compiled``."""
    if not compiled:
        return []
    # What is made in a function is of its file, so that of most functions nothing is read but its name.
    files = {code.co_filename for code in compiled.values()}
    return [function for function in _functions_of(files) if _holds(function.__code__, compiled)]


def _functions_of(files: Collection[str]) -> list[types.FunctionType]:
    """All functions of ``files``. The collector shows none that a server froze, so that is undone for the while."""
    frozen = gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()
    try:
        return [
            each for each in gc.get_objects() if type(each) is types.FunctionType and each.__code__.co_filename in files
        ]
    finally:
        if frozen:
            gc.freeze()


def _holds(code: types.CodeType, compiled: Collection[int]) -> bool:
    return id(code) in compiled or any(_holds(inner, compiled) for inner in _inner(code))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _copied(code: types.CodeType) -> types.CodeType:
    constants = tuple(
        _copied(constant) if isinstance(constant, types.CodeType) else constant for constant in code.co_consts
    )
    return code.replace(co_consts=constants)


def is_disabled(function: object) -> bool:
    """Whether ``torch.compiler.disable`` was applied to ``function``."""
    return getattr(function, "_torchdynamo_disable", False) is True


def innermost(model: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compile`` made ``model`` of; what is disabled stays so."""
    while isinstance(model, eval_frame.OptimizedModule):
        model = model._orig_mod
    return model if is_disabled(model) else eval_frame.innermost_fn(model)


@contextlib.contextmanager
def uncompiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, ``modules`` run as if neither they nor their forward functions had been compiled by anybody."""
    kept = []
    for module in modules:
        attributes = vars(module)
        if attributes.get("_compiled_call_impl") is not None:  # nn.Module.compile
            kept.append((attributes, "_compiled_call_impl", attributes["_compiled_call_impl"]))
            attributes["_compiled_call_impl"] = None
        forward = attributes.get("forward")
        source = forward if forward is None else innermost(forward)
        if source is not forward:  # module.forward = torch.compile(module.forward), and OptimizedModule
            kept.append((attributes, "forward", forward))
            attributes["forward"] = source
    try:
        yield
    finally:
        for attributes, name, value in kept:
            attributes[name] = value


def graph_breaks() -> tuple[BreakReport, ...]:
    """Where Dynamo ended a graph since isolation began."""
    counts: Counter[tuple[str, str]] = Counter()
    located: Counter[str] = Counter()
    traced: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for broken in graph_break_reasons:
        # Where PyTorch calls a module tells less than who called it.
        frames = broken.user_stack
        stack = [frame for frame in frames if not frame.filename.startswith(_CALLS_MODULES)] or frames
        at = stack[-1] if stack else None
        reason = str(broken.reason)
        place = (_line(at) if at else "", _first_line(reason))
        counts[place] += 1
        traced[place].update(dict.fromkeys(map(_line, frames)))
        located[reason] += 1
    for reason, count in counters["graph_break"].items():
        # A frame of which nothing could be traced has no place.
        counts["", _first_line(reason)] += max(0, count - located[reason])
    return tuple(
        BreakReport(source, reason, count, tuple(traced[source, reason]))
        for (source, reason), count in counts.items()
        if count
    )


def _first_line(reason: str) -> str:
    """What Dynamo says; behind it are values, which differ from call to call."""
    return (reason.strip().splitlines() or ["no reason given"])[0]


def _line(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno}"


def why_nothing_was_captured(model: Callable[..., Any]) -> str:
    """Why Dynamo made no graph of a call of ``model`` that has just ended: what was found, and what to do."""
    if config.disable:
        return "torch.compile is switched off by TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE or torch._dynamo.config"
    stance = eval_frame._stance.stance
    if stance != "default":
        return f"torch.compiler.set_stance({stance!r}) is in force, under which nothing new is compiled; use 'default'"
    function = model.forward if isinstance(model, nn.Module) else model
    if is_disabled(function):
        name = getattr(function, "__qualname__", type(function).__name__)
        return f"torch.compiler.disable was applied to {name}; remove it"
    if torch._C._len_torch_dispatch_stack():
        mode = type(torch.utils._python_dispatch._get_current_dispatch_mode()).__name__
        return f"the dispatch mode {mode} is active, under which Dynamo compiles nothing; leave it first"
    if breaks := graph_breaks():
        where = f" at {breaks[0].source}" if breaks[0].source else ""
        return f"the graph broke{where}: {breaks[0].reason}"
    return "Dynamo met no op on a tensor that it compiles"
