"""What a report says, as paragraphs, tables and lists, which write themselves for a terminal, an issue or a page."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

# A column is not made narrower than this.
_LEAST = 12
_SHORTENED = "..."


@dataclass(frozen=True)
class Paragraph:
    """Some sentences."""

    text: str

    def to_text(self, width: int | None) -> str:
        """The text, wrapped to ``width`` columns; None is as wide as it is."""
        return self.text if width is None else textwrap.fill(self.text, width, break_on_hyphens=False)

    def to_markdown(self) -> str:
        """The text, which means nothing but itself."""
        return _escaped(self.text)

    def to_html(self) -> str:
        """The text as a paragraph."""
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Table:
    """Rows under headers. The first column holds names, whose ends tell more than their beginnings."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_text(self, width: int | None) -> str:
        """The table within ``width`` columns: names are shortened at the left, other cells wrapped.

        Where even that does not fit, each row is written as a line of its own.
        """
        widths = self._widths(width)
        if width is not None and _total(widths) > width:
            return Entries("", tuple(map(self._line, self.rows))).to_text(width)
        rows = [(_shortened(name, widths[0]), *cells) for name, *cells in self.rows]
        # As rows, since tabulate makes columns wider for headers.
        lines = [self.headers, ["-" * each for each in widths], *rows]
        return tabulate(lines, tablefmt="plain", disable_numparse=True, maxcolwidths=[None, *widths[1:]])

    def _line(self, row: tuple[str, ...]) -> str:
        named = zip(self.headers[1:], row[1:], strict=True)
        return f"{row[0]}: {', '.join(f'{header} {cell}' for header, cell in named if cell)}"

    def shortens(self, width: int | None) -> bool:
        """Whether a name has to be shortened for ``width`` columns."""
        widths = self._widths(width)
        fits = width is None or _total(widths) <= width
        return fits and any(len(name) > widths[0] for name, *_ in self.rows)

    def _widths(self, width: int | None) -> list[int]:
        widths = [max(map(len, column)) for column in zip(self.headers, *self.rows, strict=True)]
        while width is not None and _total(widths) > width and max(widths) > _LEAST:
            widths[widths.index(max(widths))] -= 1
        return widths

    def to_markdown(self) -> str:
        """The table as GitHub has them."""
        rows = [(f"`{name}`" if name else "", *map(_escaped, cells)) for name, *cells in self.rows]
        return tabulate(rows, headers=self.headers, tablefmt="github", disable_numparse=True)

    def to_html(self) -> str:
        """The table."""
        return str(tabulate(self.rows, headers=self.headers, tablefmt="html", disable_numparse=True))


@dataclass(frozen=True)
class Entries:
    """A list under a title.

    Args:
        title: what is listed.
        items: a line each, or more where it is long.
        folded: whether a page shows them only when asked.
    """

    title: str
    items: tuple[str, ...]
    folded: bool = False

    def to_text(self, width: int | None) -> str:
        """The title, and each item indented below it."""
        wrapped = [
            f"  {item}"
            if width is None
            else textwrap.fill(item, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
            for item in self.items
        ]
        return "\n".join([Paragraph(f"{self.title}:").to_text(width), *wrapped] if self.title else wrapped)

    def to_markdown(self) -> str:
        """A list; folded away where it is to be."""
        lines = "\n".join(f"- {_escaped(item)}" for item in self.items)
        if self.folded:
            return f"<details><summary>{html.escape(self.title)}</summary>\n\n{lines}\n\n</details>"
        return f"**{_escaped(self.title)}**\n\n{lines}"

    def to_html(self) -> str:
        """A list; folded away where it is to be."""
        items = "".join(f"<li>{html.escape(item)}</li>" for item in self.items)
        title, tag = html.escape(self.title), "details" if self.folded else "section"
        head = f"<summary>{title}</summary>" if self.folded else f"<h4>{title}</h4>"
        return f"<{tag}>{head}<ul>{items}</ul></{tag}>"


Block = Paragraph | Table | Entries


def to_text(blocks: Sequence[Block], width: int | None) -> str:
    """``blocks`` for a terminal of ``width`` columns; None is as wide as they are."""
    return "\n\n".join(block.to_text(width) for block in blocks)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"{_SHORTENED}{name[len(_SHORTENED) - width :]}"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_|<>])", r"\\\1", text)
