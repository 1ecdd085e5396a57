"""An evaluation as a web page: every image with its prompt, verdict and reason, with filters and sorting.

Style and script are in the page; images are relative links that load as they come into view.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from semantic_routing.common.webpage import document
from semantic_routing.evaluation.records import CORRECT, Record, scorer_name

HERE = Path(__file__)
STYLE = HERE.with_suffix(".css")
SCRIPT = HERE.with_suffix(".js")
RIGHT, WRONG, SCORED, NONE = "right", "wrong", "scored", "no score"
"""The page's names of outcomes."""


def page(title: str, table: str, records: Sequence[Record], facts: Mapping[str, Any]) -> str:
    """Return the page: ``table`` is the Markdown table, ``facts`` the manifest."""
    heading = f"{title}: {len(records):,} images"
    cards = "\n".join(map(_card, records))
    body = (
        f"<header>\n<h1>{escape(heading)}</h1>\n{_source(facts)}</header>\n"
        f"<section>\n{_table(table)}</section>\n{_filters(records)}"
        f'<section class="cards" id="cards">\n{cards}\n</section>\n{_provenance(facts)}'
    )
    return document(heading, body, styles=(STYLE,), script=SCRIPT)


def outcome(record: Record) -> str:
    """Return "right", "wrong", "scored" or "unscored"."""
    if record.gap:
        return NONE
    return SCORED if CORRECT not in record.scores else RIGHT if record.correct else WRONG


def _source(facts: Mapping[str, Any]) -> str:
    """Return a line that names the evaluated images."""
    sampler = facts.get("sampler") or {}
    known = {"steps", "guidance"} <= sampler.keys()
    parts = [
        f"Images of <code>{escape(str(facts.get('checkpoint') or facts.get('images', 'unknown')))}</code>",
        f"{sampler['steps']} steps, guidance {sampler['guidance']:g}" if known else "",
        "edited routing" if facts.get("routing") else "",
        f"scored by {escape(scorer_name(facts.get('scorer')))}",
    ]
    return f"<p>{', '.join(filter(None, parts))}.</p>\n"


def _table(markdown: str) -> str:
    """Convert a Markdown table and the lines of text around it to HTML."""
    lines = [line for line in markdown.splitlines() if line.strip()]
    cells = [[escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head = "".join(f'<th class="{"number" if i else ""}">{cell}</th>' for i, cell in enumerate(cells[0]))
    rows = "".join(
        f"<tr><th>{row[0]}</th>" + "".join(f'<td class="number">{cell}</td>' for cell in row[1:]) + "</tr>"
        for row in cells[2:]
    )
    notes = "".join(f'<p class="soft">{escape(line)}</p>\n' for line in lines if not line.startswith("|"))
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n{notes}'


def _filters(records: Sequence[Record]) -> str:
    """Return the filters: skill, outcome, words of the prompt, order."""
    tags = list(dict.fromkeys(tag for record in records for tag in record.tags))
    kinds = [kind for kind in (RIGHT, WRONG, SCORED, NONE) if any(outcome(record) == kind for record in records)]
    metrics = list(dict.fromkeys(metric for record in records for metric in record.scores))
    orders = ["as in the benchmark"]
    orders += [f"{metric}, {end} first" for metric in metrics if metric != CORRECT for end in ("lowest", "highest")]
    return (
        '<form class="filters" id="filters">\n'
        f"{_select('tag', 'Skill', ['', *tags])}{_select('verdict', 'Verdict', ['', *kinds])}"
        f"{_select('order', 'Order', orders) if len(orders) > 1 else ''}"
        '<label>Prompt <input name="words" type="search" placeholder="words of a prompt"></label>\n'
        '<output id="count"></output>\n</form>\n'
    )


def _select(name: str, label: str, values: Sequence[str]) -> str:
    options = "".join(f'<option value="{escape(value)}">{escape(_words(value) or "all")}</option>' for value in values)
    return f'<label>{label} <select name="{name}">{options}</select></label>\n'


def _card(record: Record) -> str:
    kind, caption = outcome(record), escape(record.caption)
    if record.file and record.gap != "missing":
        link = escape(quote(record.file))
        picture = f'<a href="{link}"><img src="{link}" alt="{caption}" loading="lazy" decoding="async"></a>'
    else:
        picture = '<div class="none">no image</div>'
    answer = f"<details><summary>answer</summary>{escape(record.answer)}</details>" if record.answer else ""
    data = escape(json.dumps({k: v for k, v in record.scores.items() if v is not None}))
    return (
        f'<figure data-tags="{escape("|".join(record.tags))}" data-verdict="{kind}" data-scores="{data}">{picture}'
        f"<figcaption><p>{_mark(record)} {caption}</p>{_several(record)}<small>{escape(record.reason)}</small>{answer}"
        f'<div class="chips"><span>{escape(record.id)}, image {record.image}</span>'
        + "".join(f"<span>{escape(_words(tag))}</span>" for tag in record.tags)
        + "</div></figcaption></figure>"
    )


def _mark(record: Record) -> str:
    """Return the verdict or the scores as a short mark."""
    if record.correct is not None:
        return '<span class="yes">✓</span>' if record.correct else '<span class="no">✗</span>'
    known = [score for score in record.scores.values() if score is not None]
    if not known:
        return '<span class="gap">?</span>'
    return f'<b class="score">{known[0]:.2f}</b>' if len(record.scores) == 1 else ""


def _several(record: Record) -> str:
    """Return the scores of several metrics on a separate line."""
    if len(record.scores) == 1:
        return ""
    known = (f"{escape(m)} <b>{score:.2f}</b>" for m, score in record.scores.items() if score is not None)
    return f'<p class="score">{" ".join(known)}</p>'


def _provenance(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(_words(name))}</th><td><code>{escape(_fact(value))}</code></td></tr>"
        for name, value in facts.items()
        if name != "table"
    )
    return (
        "<section>\n<h2>How this was made</h2>\n"
        f'<div class="card"><table><tbody>{rows}</tbody></table></div>\n</section>\n'
    )


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(item)}" for name, item in value.items())
    return str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")
