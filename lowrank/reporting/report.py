"""The base of every report: one way to text, Markdown, JSON and HTML, and one set of files."""

from __future__ import annotations

import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from lowrank.errors import CheckpointError
from lowrank.io import parse_json
from lowrank.reporting import html
from lowrank.reporting.text import (
    Column,
    markdown_line,
    markdown_name,
    markdown_table,
    one_line,
    shown_name,
    stable_json,
    terminal_table,
    wrap,
    write_files,
)

__all__ = ["Report", "Table"]

NARROWEST = 60


@dataclass(frozen=True)
class Table:
    """Hold the cells of a table, as texts, for the terminal and for Markdown.

    Attributes:
        columns: headings.
        rows: a cell a column; where the table is ``named``, the first holds a layer's name, empty for the model itself.
        total: cells of the last line.
        title: stands above it; empty where the report is this table.
        named: whether the first column holds names of layers, which Markdown shows as code.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    total: Sequence[str] | None = None
    title: str = ""
    named: bool = True

    def to_text(self, width: int) -> str:
        """Draw the table for the terminal, no wider than ``width`` where that is possible."""
        rows = [[shown_name(row[0]), *row[1:]] for row in self.rows] if self.named else self.rows
        table = terminal_table(self.columns, rows, self.total, width=width)
        return f"{self.title}:\n{table}" if self.title else table

    def to_markdown(self) -> str:
        """Draw the table as Markdown, with full names and a bold last line."""
        rows = [[_markdown_cell(cell) for cell in row] for row in self.rows]
        if self.named:
            rows = [[markdown_name(row[0]), *cells[1:]] for row, cells in zip(self.rows, rows, strict=True)]
        if self.total is not None:
            rows.append([f"**{_markdown_cell(text)}**" if text else "" for text in self.total])
        table = markdown_table(self.columns, rows)
        return f"## {self.title}\n\n{table}" if self.title else table

    def to_html(self) -> str:
        """Draw the table as a sortable one of a page."""
        headings = [html.Heading(column.title, column.numeric) for column in self.columns]
        rows = [[shown_name(row[0]), *row[1:]] for row in self.rows] if self.named else self.rows
        return html.table(headings, [[html.Cell(text) for text in row] for row in rows], total=self.total)


class Report(ABC):
    """Render rows and totals; a kind of report says in a few methods what stands in it.

    Attributes:
        heading: title of the Markdown text and, with the source's name, of the page.
        stem: of the files that :meth:`save` writes.
        what: what the JSON is, for the message that refuses something else.
        rows_key: under which the JSON holds the list of rows.
        version: ``format_version`` of the JSON.
        usual_width: characters a line where there is no terminal; ``None`` for a table as wide as its content.
        most_width: characters a line of a terminal that has more.
        totals: what the rows sum to, and what is known of the run.
        notes: sentences for the reader.

    Example:
        >>> class Greeting(Report):
        ...     heading, stem, what = "Greeting", "greeting", "a greeting"
        ...     def summary(self):
        ...         return ["Two words."]
        ...     def _tables(self, full):
        ...         return [Table([Column("word")], [["hello"], ["a|b"]], named=False)]
        ...     def _content(self):
        ...         return {"rows": ["hello", "a|b"]}
        >>> print(Greeting().to_text(60))
        Two words.
        <BLANKLINE>
        word
        ------
        hello
        a|b
        <BLANKLINE>
        >>> sorted(Greeting().files())
        ['greeting.html', 'greeting.json', 'greeting.md']
    """

    heading: ClassVar[str]
    stem: ClassVar[str]
    what: ClassVar[str]
    rows_key: ClassVar[str] = "rows"
    version: ClassVar[int] = 1
    usual_width: ClassVar[int | None] = 120
    most_width: ClassVar[int] = 160

    totals: Mapping[str, Any] = MappingProxyType({})
    notes: Sequence[str] = ()

    @abstractmethod
    def summary(self) -> list[str]:
        """Say the report in plain sentences; none makes it a bare table, without a heading."""

    @abstractmethod
    def _tables(self, full: bool) -> list[Table]:
        """Give the tables; ``full`` where there is room for rows that the terminal only sums up."""

    def _content(self) -> dict[str, Any]:
        """Give what the JSON holds beside its version; a subclass adds its rows."""
        return {"totals": self.totals, "notes": self.notes}

    def _remarks(self, full: bool) -> list[str]:
        """Give the paragraphs under the tables; lines of one that belong together are told apart by line ends."""
        return []

    def _sections(self) -> list[str]:
        """Give the page's parts between its summary and its notes, as markup of :mod:`lowrank.reporting.html`."""
        return [html.section(table.title or self.heading, table.to_html()) for table in self._tables(full=True)]

    def _footer(self) -> list[str]:
        """Give what the page's last line lists: versions by name."""
        versions = self.totals.get("versions")
        return [f"{key} {value}" for key, value in sorted(versions.items())] if isinstance(versions, Mapping) else []

    def to_text(self, width: int | None = None) -> str:
        """Render for the terminal: summary, tables, remarks, notes; names are shortened from the left to fit.

        Args:
            width: characters a line; the terminal's, within reason, when ``None``.
        """
        if width is None:
            width = self._terminal_width()
        blocks = ["\n".join(wrap(line, width) for line in self.summary())]
        blocks += [table.to_text(width) for table in self._tables(full=False)]
        blocks += ["\n".join(wrap(line, width) for line in text.split("\n")) for text in self._remarks(full=False)]
        blocks.append("\n".join(wrap(f"note: {one_line(note)}", width) for note in self.notes))
        return "\n\n".join(block for block in blocks if block) + "\n"

    def to_markdown(self) -> str:
        """Render as Markdown: the same as :meth:`to_text` with full names and every row."""
        lines = self.summary()
        blocks = (
            ["\n".join([f"# {self.heading}", "", *(f"{markdown_line(line)}  " for line in lines)])] if lines else []
        )
        blocks += [table.to_markdown() for table in self._tables(full=True)]
        blocks += [markdown_line(text) for text in self._remarks(full=True)]
        blocks.append("\n".join(f"- {markdown_line(one_line(note))}" for note in self.notes))
        return "\n\n".join(block for block in blocks if block) + "\n"

    def to_json(self) -> str:
        """Render as JSON, the same for the same report: sorted keys, exact floats, NaN and infinities as null."""
        return stable_json({"format_version": self.version, **self._content()})

    def to_html(self) -> str:
        """Render as one self-contained page: the summary, the report's own sections, notes."""
        parts = self._sections()
        if self.notes:
            parts.append(html.section("Notes", html.notes_list(self.notes)))
        source = self.totals.get("source")
        title = f"{self.heading}: {one_line(str(source))}" if source else self.heading
        return html.page(title, self.summary(), parts, footer=", ".join(self._footer()))

    def files(self) -> dict[str, str]:
        """Render everything that :meth:`save` writes: texts by file name."""
        return {
            f"{self.stem}.json": self.to_json(),
            f"{self.stem}.md": self.to_markdown(),
            f"{self.stem}.html": self.to_html(),
        }

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write :meth:`files` into a directory, which is made where it is missing; files of these names are replaced.

        Raises:
            StorageError: the directory cannot be written.
        """
        return write_files(directory, self.files())

    @classmethod
    def _read(cls, text: str | bytes, source: str) -> dict[str, Any]:
        """Read what :meth:`to_json` wrote: a map of this version with rows, totals and, as texts, notes.

        Raises:
            CheckpointError: not such a text.
        """
        data = parse_json(text, source=source)
        if (
            not isinstance(data, dict)
            or not isinstance(data.get(cls.rows_key), list)
            or not isinstance(data.get("totals"), dict)
        ):
            raise CheckpointError(f"{source}: not {cls.what}; it must hold {cls.rows_key!r} and 'totals'")
        if data.get("format_version") != cls.version:
            raise CheckpointError(
                f"{source}: format_version {data.get('format_version')!r}, this lowrank reads {cls.version}; "
                "it may be written by a newer lowrank"
            )
        notes = data.get("notes", [])
        if not isinstance(notes, list):
            raise CheckpointError(f"{source}: 'notes' must be a list of texts")
        return data | {"notes": [str(note) for note in notes]}

    def _terminal_width(self) -> int:
        if self.usual_width is None:
            return sys.maxsize
        columns = shutil.get_terminal_size((self.usual_width, 24)).columns
        return min(max(columns, NARROWEST), self.most_width)


def _markdown_cell(text: str) -> str:
    """Escape what would start markup or end the cell."""
    return markdown_line(text).replace("|", "\\|")
