"""Who may import what: a lean package, and rooms that keep to their side of the house."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import pytest

import fx_quant

PACKAGE = Path(fx_quant.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ADAPTERS = [
    f"fx_quant.loading.adapters.{path.stem}"
    for path in sorted((PACKAGE / "loading" / "adapters").glob("*.py"))
    if path.stem not in ("__init__", "base")
]
LEAVES = ("config", "errors", "scheme", "target", "problem", "reasons", "tuning.saved", "kernels.cpu.plans")
# Private Inductor API changes with every release: these rooms hold all of it.
MAY_USE_INDUCTOR = ("fx_quant.lowerings", "fx_quant.backend", "fx_quant.compat")
SAYS_NOTHING = {"utils", "common", "helpers", "misc", "manager"}


@functools.cache
def imports(path):
    """The full names that a file imports anywhere, each ``from x import y`` as both ``x`` and ``x.y``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


REGISTERING = {f"fx_quant.kernels.registry.{name}" for name in ("register_kernel", "register_op", "KERNEL_SCHEMA")}


def within(name, *rooms):
    """Whether the dotted ``name`` is one of ``rooms`` or inside one."""
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def crossings(importer, *rooms):
    """``module imports name`` for every import by ``importer``'s modules that reaches into ``rooms``."""
    return sorted(
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if within(module, importer)
        for name in imports(path)
        if within(name, *rooms)
    )


@pytest.fixture
def loaded_by(printed):
    """The modules of ``rooms``, or of Inductor and Triton, that a fresh process holds after ``statement``."""

    def loaded(statement, *rooms):
        out = printed(f"import sys; {statement}; print(*sorted(m for m in sys.modules))")
        return {name for name in out.split() if within(name, *(rooms or ("torch._inductor", "triton")))}

    return loaded


def test_importing_fx_quant_loads_neither_inductor_nor_triton(loaded_by):
    # torch itself is the baseline: a build of torch that loads one of the two is not our doing.
    assert loaded_by("import fx_quant") - loaded_by("import torch") == set()


def test_every_public_name_is_there_and_lean_to_list(loaded_by):
    assert loaded_by("import fx_quant; dir(fx_quant)") - loaded_by("import torch") == set()
    assert all(hasattr(fx_quant, name) for name in fx_quant.__all__)


@pytest.mark.parametrize("first", ["explain", "prepare_"])
def test_whatever_is_used_first_finds_every_op(first, loaded_by):
    ask = f"import fx_quant; fx_quant.{first}" if first in fx_quant.__all__ else f"import fx_quant.{first}"
    assert loaded_by(ask, "fx_quant")


def room(name):
    """Where the module ``name`` stands: a folder of the package, or a module beside the folders."""
    return ".".join(name.split(".")[:2])


def arrows():
    """``(from, to)`` of every import between rooms."""
    found = set()
    for module, path in MODULES.items():
        found |= {(room(module), room(name)) for name in imports(path) if room(name) in set(map(room, MODULES))}
    return {(a, b) for a, b in found if a != b and "fx_quant" not in (a, b)}


def test_rooms_import_one_way():
    """No circle: rooms without arrows to others are taken away until none is left."""
    left, open_arrows = set(map(room, MODULES)) - {"fx_quant"}, arrows()
    while left:
        floor = {name for name in left if not any(a == name for a, _ in open_arrows)}
        assert floor, f"rooms that import each other: {sorted(left)}"
        left -= floor
        open_arrows = {(a, b) for a, b in open_arrows if a in left and b in left}


def test_the_package_has_few_rooms():
    assert len(set(map(room, MODULES)) - {"fx_quant"}) <= 22
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]) <= 16


def test_launch_plans_of_triton_ask_no_registry_and_no_other_provider():
    others = [f"fx_quant.kernels.{name}" for name in ("registry", "select", "cpu", "cutlass", "pytorch")]
    found = crossings("fx_quant.kernels.triton", "fx_quant.passes", "fx_quant.lowerings", *others)
    assert [line for line in found if "_kernels imports" not in line] == []


def test_passes_import_no_lowering():
    assert crossings("fx_quant.passes", "fx_quant.lowerings") == []


def test_passes_name_no_kernel_provider():
    providers = [module for module, path in MODULES.items() if imports(path) & REGISTERING]
    assert {"fx_quant.kernels.cpu.int8_kernels", "fx_quant.kernels.aiter"} <= set(providers)
    assert crossings("fx_quant.passes", *providers) == []


def test_kernels_import_no_pass_and_no_lowering():
    assert crossings("fx_quant.kernels", "fx_quant.passes", "fx_quant.lowerings") == []


def test_adapters_import_no_library_no_pass_no_lowering_and_no_kernel(loaded_by):
    libraries = ("compressed_tensors", "optimum", "transformers", "torchao")
    load_all = "import fx_quant.loading.prepare; from fx_quant.loading.adapters.base import adapters; "
    load_all += "assert len(adapters()) >= 3"
    assert len(ADAPTERS) >= 3 and loaded_by(load_all, *libraries) == set()
    rooms = ("fx_quant.passes", "fx_quant.lowerings", "fx_quant.kernels", "fx_quant.backend")
    assert crossings("fx_quant.loading.adapters", *rooms) == []


def test_only_the_registry_names_an_adapter():
    others = [m for m, path in MODULES.items() if any(within(name, *ADAPTERS) for name in imports(path))]
    assert others == []


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_leaves_and_torch_only(leaf):
    own = {name for name in imports(MODULES[f"fx_quant.{leaf}"]) if within(name, "fx_quant")}
    assert sorted(name for name in own if not within(name, *(f"fx_quant.{leaf}" for leaf in LEAVES))) == []
    third_party = {name.split(".")[0] for name in imports(MODULES[f"fx_quant.{leaf}"])}
    assert third_party - set(sys.stdlib_module_names) - {"fx_quant"} <= {"torch", "packaging"}


def test_private_inductor_api_stays_in_its_rooms():
    users = [m for m, path in MODULES.items() if any(within(name, "torch._inductor") for name in imports(path))]
    assert sorted(m for m in users if not within(m, *MAY_USE_INDUCTOR)) == []


def test_no_file_name_says_nothing():
    assert [str(path) for path in MODULES.values() if path.stem in SAYS_NOTHING] == []


def reaches_itself(module, graph):
    """Whether imports lead from ``module`` back to it."""
    seen, left = set(), [module]
    while left:
        for name in graph[left.pop()] - seen:
            seen.add(name)
            left.append(name)
    return module in seen


def test_no_module_imports_itself_through_others():
    """Anywhere in a file: an import inside a function is an arrow too."""
    graph = {module: imports(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    assert [module for module in MODULES if reaches_itself(module, graph)] == []


def test_a_module_of_the_tests_has_one_name():
    """Imported by two names it would run twice: PyTorch then frees the ops that its first run defined, while that run's
    functions still call them."""
    tests = Path(__file__).parent
    own = {path.stem for path in tests.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    scripts = [*tests.rglob("*.py"), *(tests.parent / "benchmarks").glob("*.py")]
    assert [(str(path), name) for path in scripts for name in imports(path) if name.split(".")[0] in own] == []
