"""The machine that a command is asked about."""

from __future__ import annotations

import argparse
import dataclasses
import re
from types import MappingProxyType

import torch
from packaging.version import InvalidVersion, Version

from fx_quant.errors import FxQuantError, unknown_name
from fx_quant.kernels.machine import resolve_target
from fx_quant.kernels.registry import required_packages
from fx_quant.target import Target

_PINNED = re.compile(r"(?P<name>[\w.-]+)==(?P<version>.+)")


def target_of(arguments: argparse.Namespace) -> Target:
    """The machine of ``--target``, or this one, with the libraries of ``--with``.

    Raises:
        FxQuantError: no such machine; a library that no kernel asks for, or that is not NAME==VERSION.
    """
    target = resolve_target(arguments.target, "cuda" if torch.cuda.is_available() else "cpu")
    return dataclasses.replace(target, packages=MappingProxyType({**target.packages, **_packages(arguments.packages)}))


def _packages(pins: list[str]) -> dict[str, str]:
    known, packages = {"torch", *required_packages()}, {}
    for pin in pins:
        match = _PINNED.fullmatch(pin)
        if match is None:
            raise FxQuantError(f"--with must be NAME==VERSION, such as vllm==0.33, got {pin!r}")
        if match["name"] not in known:
            raise unknown_name("library of a kernel", match["name"], known)
        try:
            packages[match["name"]] = str(Version(match["version"]))
        except InvalidVersion:
            raise FxQuantError(f"--with must have a version, such as vllm==0.33, got {pin!r}") from None
    return packages
