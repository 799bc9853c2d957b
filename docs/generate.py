"""What pages of the documentation take from the code and from measurements: tables and plots in ``docs/generated``.

A hook of mkdocs, which calls ``on_pre_build``; ``python docs/generate.py`` alone writes them too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ROOT / "docs" / "generated"
RESULTS = ROOT / "benchmarks" / "results" / "epyc-zen5"
# Targets whose columns the table of kernels has: what each stands for.
TARGETS = {
    "x86_amx": "AMX",
    "x86_vnni": "AVX-512 VNNI",
    "x86_avx_vnni": "AVX-VNNI",
    "sm80": "A100",
    "sm90": "H100",
    "gfx942": "MI300X",
}


def on_config(config: Any) -> Any:
    """List ``models.md`` where ``make models`` wrote it."""
    if (ROOT / "docs" / "models.md").exists():
        measured = next(entry["Measured"] for entry in config.nav if isinstance(entry, dict) and "Measured" in entry)
        measured.append("models.md")
    return config


def on_pre_build(**_: Any) -> None:
    """Write everything anew."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    GENERATED.mkdir(exist_ok=True)
    for name, text in (("kernels", kernels()), ("targets", targets())):
        _write(GENERATED / f"{name}.md", text)
    plots()


def _write(path: Path, text: str) -> None:
    # Untouched where nothing changed: `mkdocs serve` builds again when a file does.
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    from tabulate import tabulate

    cells = [tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True) + "\n"


def kernels() -> str:
    """Each kernel of the registry, in the order in which selection asks."""
    from fx_quant.kernels import registry

    rows = []
    for kernel in registry.kernels():
        needs = kernel.requires
        platforms = ", ".join(sorted(needs.platforms)) if needs.platforms else "any"
        packages = ", ".join(f"`{name}`" for name in sorted(needs.packages))
        rows.append((f"`{kernel.name}`", kernel.provider, platforms, packages, str(kernel.numerics), kernel.note))
    return _table(("kernel", "provider", "platforms", "packages", "numerics", "what it is"), rows)


def targets() -> str:
    """The kernel of each scheme on each of ``TARGETS``."""
    from fx_quant.diagnose.support import support_matrix
    from fx_quant.target import named_target, named_targets

    names = [name for name in TARGETS if name in named_targets()]
    columns = {name: {str(row.scheme): row for row in support_matrix(named_target(name))} for name in names}
    schemes = list(dict.fromkeys(scheme for column in columns.values() for scheme in column))
    rows = [(scheme, *(_kernel(column.get(scheme)) for column in columns.values())) for scheme in schemes]
    return _table(("scheme", *(f"{name} ({TARGETS[name]})" for name in names)), rows)


def _kernel(row: Any) -> str:
    return f"`{row.kernel}`" if row is not None and row.kernel else "none"


def plots() -> None:
    """Ratios and shares of W8A8, and speed and memory of whole models, as SVG of the stored results."""
    import cpu_table
    import matplotlib  # pyrefly: ignore[missing-import]

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fx_quant"
    linears = [row for name in ("w8a8_float32", "w8a8_float32_2_threads") for row in _rows(name)]
    cpu_table.plot(linears, GENERATED / "linears.svg")
    for name in ("decoder", "minilm"):
        _plot_model(_rows(name), GENERATED / f"{name}.svg")


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def _plot_model(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed of each way on the left, memory of the process on the right."""
    import matplotlib.pyplot as plt  # pyrefly: ignore[missing-import]

    names = [row["variant"] for row in rows][::-1]
    figure, axes = plt.subplots(1, 3, figsize=(13, 0.4 * len(names) + 1.2), sharey=True)
    for ax, (label, value) in zip(axes, _figures(rows), strict=True):
        colours = ["tab:blue" if name.startswith("fx_quant") else "tab:gray" for name in names]
        ax.barh(names, [value(row) for row in reversed(rows)], color=colours)
        ax.set_xlabel(label)
        ax.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _figures(rows: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    speeds = [(f"{key}: tokens/s", lambda row, key=key: row["tokens_per_s"][key]) for key in rows[0]["tokens_per_s"]]
    return [*speeds, ("resident MiB after the first calls", lambda row: row["steady_mib"])]


if __name__ == "__main__":
    on_pre_build()
