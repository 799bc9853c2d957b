"""What every report can do: fit a terminal, show itself in a notebook, an issue and a page, and be plain data."""

from __future__ import annotations

import abc
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fx_quant.report.blocks import Block, Paragraph, Table, to_text
from fx_quant.report.page import page

_NARROWEST = 40


class Reported(abc.ABC):
    """The one interface of reports: ``print`` it, evaluate it in a notebook, or write it down by one of the methods.

    A subclass says what it has as ``summary``, ``blocks`` and ``to_dict``.
    """

    @abc.abstractmethod
    def summary(self) -> str:
        """One line: what matters most."""

    @abc.abstractmethod
    def blocks(self, *, wide: bool) -> Sequence[Block]:
        """What follows the summary; ``wide`` with every column and every word in full."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""

    def to_text(self, *, width: int | None = None, wide: bool = False) -> str:
        """The report for a terminal.

        Args:
            width: columns to fit, at least 40; None is those of the terminal, 80 where there is none.
            wide: every column and every name in full, as wide as they are.
        """
        columns = max(shutil.get_terminal_size((80, 24)).columns if width is None else width, _NARROWEST)
        headline, blocks = Paragraph(f"fx_quant: {self.summary()}"), list(self.blocks(wide=wide))
        if not wide and any(isinstance(block, Table) and block.shortens(columns) for block in blocks):
            at = max(i for i, block in enumerate(blocks) if isinstance(block, Table))
            blocks.insert(at + 1, Paragraph("Names are shortened: to_text(wide=True), or --wide, has them in full."))
        return to_text([headline, *blocks], None if wide else columns)

    def to_json(self) -> str:
        """The whole report as JSON; what is no number there (``Infinity``, ``NaN``) is a text."""
        return json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """The report for an issue or a pull request, as GitHub shows it."""
        blocks = [block.to_markdown() for block in self.blocks(wide=False)]
        return "\n\n".join([f"**fx_quant:** {Paragraph(self.summary()).to_markdown()}", *blocks]) + "\n"

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one page that needs no network; written to ``path`` where that is given.

        Returns:
            The page.
        """
        text = self._page()
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _page(self) -> str:
        return page("plain.html", title=self.summary(), body=_html(self.blocks(wide=False)))

    def _repr_html_(self) -> str:
        return f"<p><b>fx_quant:</b> {Paragraph(self.summary()).to_html()[3:-4]}</p>{_html(self.blocks(wide=False))}"

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return self.to_text()


def _html(blocks: Sequence[Block]) -> str:
    return "\n".join(block.to_html() for block in blocks)


def _finite(value: Any) -> Any:
    """``value`` with a text for each number that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
