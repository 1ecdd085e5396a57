"""A table that is written as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Table(NamedTuple):
    """Names of the columns, and the cells of each row; the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table as Markdown: the first column flush left, the others flush right."""
        head = f"| {' | '.join(self.head).lstrip()} |"  # an empty corner takes one space
        rule = "| --- |" + " ---: |" * (len(self.head) - 1)
        return "\n".join([head, rule, *(f"| {' | '.join(row)} |" for row in self.rows)])

    def html(self) -> str:
        """Return the table as a card of a page."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.head)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
