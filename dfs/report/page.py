"""A self-contained HTML page: text, tables and pictures, nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
p.note { color: #555; margin-top: .2rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e5e5e5; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #bbb; }
img { max-width: 100%; height: auto; }
details { margin: .6rem 0; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


class Page:
    """A page, written from top to bottom. Every text is escaped."""

    def __init__(self, title: str, note: str = "") -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if note:
            self.note(note)

    def heading(self, text: str) -> None:
        """Of a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def note(self, text: str) -> None:
        """A paragraph in the background."""
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, its first column to the left."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
        )
        self._parts.append(f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>')

    def values(self, values: Mapping[str, object]) -> None:
        """Names and values."""
        self.table(("", ""), [(name, str(value)) for name, value in values.items()])

    def picture(self, path: Path, description: str) -> None:
        """A PNG, carried in the page itself."""
        data = base64.b64encode(path.read_bytes()).decode()
        self._parts.append(
            f'<p><img alt="{escape(description)}" src="data:image/png;base64,{data}"></p>'
        )

    def folded(self, summary: str, text: str) -> None:
        """Text as it is, shown when asked for."""
        self._parts.append(
            f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
        )

    def html(self) -> str:
        """The whole document."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body>\n</html>\n"
        )
