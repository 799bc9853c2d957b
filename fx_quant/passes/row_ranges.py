"""Numbers of rows that the user declared: a graph is planned for the range that it is compiled in, behind a guard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fx_quant.compat import is_guarded, is_marked_dynamic
from fx_quant.passes.nodes import shape
from fx_quant.passes.sites import Site
from fx_quant.problem import Size, SizeRange


def in_declared_range(site: Site, declared: Sequence[SizeRange]) -> Site:
    """``site`` for the rows of the first of ``declared`` that holds those it was traced with.

    A guard says so, so that rows of another range compile another graph. Where there is none, or nothing would check
    the guard, the site is for all the rows that its graph may have.
    """
    problem = site.problem
    proven = problem.m
    rows: Size = math.prod(shape(site.gemm)[:-1])
    if not declared or isinstance(rows, int) or not _may_guard(rows):
        return site
    for each in declared:
        low, high = max(proven.low, each.low), _least(proven.high, each.high)
        if high is not None and low >= high:
            continue  # one size alone, or none
        hint = rows.node.hint
        if hint is None or hint < low or (high is not None and hint > high):
            continue
        # Both hold for the rows at hand, so that these only add guards.
        if rows >= low and (high is None or rows <= high):
            within = SizeRange(low, high)
            others = tuple(replace(other, m=within) for other in site.others)
            return replace(site, problem=replace(problem, m=within), others=others)
    return site


def _may_guard(rows: torch.SymInt) -> bool:
    """Whether a guard on ``rows`` is checked, and breaks no promise of the user's."""
    return not free_unbacked_symbols(rows) and is_guarded(rows) and not is_marked_dynamic(rows)


def _least(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)
