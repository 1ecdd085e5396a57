"""What the page shows, as HTML: pictures side by side, steps, the heat map, messages. Nothing is loaded from a host."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float

from semantic_routing.analysis.figures import plot_curves, to_svg
from semantic_routing.explorer.edits import as_mapping
from semantic_routing.explorer.models import Saved
from semantic_routing.explorer.picture import data_url, to_png
from semantic_routing.explorer.session import Pane, Session
from semantic_routing.explorer.state import State
from semantic_routing.model.override import RoutingOverride
from semantic_routing.toy.checker import Verdict

MOST_NUMBERED = 14
"""Most columns for which the heat map shows the percents."""


def panes_html(session: Session, state: State, panes: Sequence[Pane]) -> str:
    """Return the pictures of all panes, each with its verdict and a link that downloads it."""
    return f'<div class="panes">{"".join(_pane(session, state, pane, panes) for pane in panes)}</div>'


def _pane(session: Session, state: State, pane: Pane, panes: Sequence[Pane]) -> str:
    several = len({other.model.name for other in panes}) > 1
    title = f"{pane.model.name}, {pane.version.title}" if several else pane.version.title
    picture = pane.picture
    height, width = pane.model.pixels
    if picture is None or (picture.image is None and not picture.frames):
        return f'<figure><b>{escape(title)}</b><div class="blank" style="aspect-ratio:{width}/{height}"></div></figure>'
    if picture.image is None:
        frame = picture.frames[-1]
        note = f"step {frame.step + 1} of {pane.cfg.steps}, t = {frame.time:.2f}"
        shown, caption = data_url(to_png(frame.image, {}), "image/png"), f'<span class="note">{note}</span>'
    else:
        shown = data_url(to_png(picture.image, settings(state, pane)), "image/png")
        caption = _verdict(session, state, pane) + _download(shown, state, pane)
    alt = escape(f"{state.prompt} ({title})")
    return f'<figure><b>{escape(title)}</b><img src="{shown}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'


def settings(state: State, pane: Pane) -> dict[str, Any]:
    """Return everything that decides a pane's picture, for its PNG."""
    version = pane.version
    found: dict[str, Any] = {"model": pane.model.name, "prompt": state.prompt.strip(), "routing": version.title}
    found |= {name: getattr(pane.cfg, name) for name in ("seed", "steps", "guidance", "sampler", "shift")}
    edits = version.edits
    if edits.override is not None:
        found["edit"] = edits.override.to_json()
    if pane.model.adopted:
        found |= {"scale": edits.scale, "gains": {str(layer): gain for layer, gain in edits.gains}}
    return found


def _verdict(session: Session, state: State, pane: Pane) -> str:
    if pane.cfg.steps < state.steps:
        return f'<span class="note">{pane.cfg.steps} of {state.steps} steps while you drag</span>'
    if not pane.model.world:
        return ""
    verdict: Verdict | None = session.verdict(state.prompt, pane)
    if verdict is None:
        return '<span class="note">not judged: no sentence of the toy world</span>'
    mark, kind = ("✓", "right") if verdict.correct else ("✗", "wrong")
    return f'<span class="{kind}">{mark} {escape(verdict.reason)}</span>'


def _download(shown: str, state: State, pane: Pane) -> str:
    name = f"{pane.version.title}-seed{state.seed}.png".replace(" ", "-")
    return f'<a class="download" download="{name}" href="{shown}">download</a>'


def steps_html(panes: Sequence[Pane]) -> str:
    """Return each pane's estimates of the picture on its way from noise."""
    strips = []
    for pane in panes:
        if pane.picture is None or not pane.picture.frames:
            continue
        images = "".join(
            f'<figure><img src="{data_url(to_png(frame.image, {}), "image/png")}" alt="">'
            f"<figcaption>{frame.time:.2f}</figcaption></figure>"
            for frame in pane.picture.frames
        )
        strips.append(f'<b>{escape(pane.version.title)}</b><div class="strip">{images}</div>')
    note = '<p class="note">What the model expects the picture to be, at the time t below it (0 noise, 1 data).</p>'
    return "".join(strips) + note if strips else '<p class="note">Draw a picture first.</p>'


def trajectory_html(panes: Sequence[Pane]) -> str:
    """Return a figure of each finished picture's effective time against the nominal time."""
    curves = []
    for pane in panes:
        picture = pane.picture
        if picture is not None and picture.times is not None and picture.effective is not None:
            curves.append((pane, picture.times, picture.effective))
    if not curves or any(len(times) != len(curves[0][1]) for _, times, _ in curves):
        return '<p class="note">Draw a picture first.</p>'
    times = curves[0][1]
    lines = [(pane.version.title, effective, "-") for pane, _, effective in curves] + [("nominal", times, ":")]
    figure = plot_curves(times, lines, "time t of the step (0 noise, 1 data)", "effective time")
    note = (
        '<p class="note">Effective time: when noised data would be as far from the final picture as this trajectory '
        "is. Above the dotted line the picture is ahead of its nominal time.</p>"
    )
    return f'<div class="chart">{to_svg(figure, "effective time of the trajectory")}</div>{note}'


def heatmap_html(
    table: Float[np.ndarray, "K L"],
    rows: Sequence[str],
    columns: Sequence[str],
    edit: RoutingOverride | None,
    chosen: tuple[int, int],
    gains: Mapping[int, float] | None = None,
) -> str:
    """Return the heat map of the weights, whose cells the page's script makes clickable."""
    top = max(float(np.abs(table).max()), 2 / len(columns))
    edited, numbered = as_mapping(edit), len(columns) <= MOST_NUMBERED
    head = "".join(f'<th title="{escape(name)}">{_short(name)}</th>' for name in columns)
    lines = [f"<tr><td></td>{head}</tr>"]
    for row, name in enumerate(rows):
        mark = ' class="edited"' if name in edited else ""
        cells = "".join(
            _cell(row, layer, float(weight), top, numbered, chosen, f"{name}, {columns[layer]}")
            for layer, weight in enumerate(table[row])
        )
        lines.append(f"<tr{mark}><th>{escape(name)}</th>{cells}</tr>")
    if gains:
        cells = "".join(f"<td>{f'×{gains[i]:g}' if i in gains else ''}</td>" for i in range(len(columns)))
        lines.append(f'<tr class="gains"><th>gain</th>{cells}</tr>')
    return f'<div class="heat"><table>{"".join(lines)}</table></div>'


def _cell(row: int, layer: int, weight: float, top: float, numbered: bool, chosen: tuple[int, int], name: str) -> str:
    share, sign = min(abs(weight) / top, 1), "minus" if weight < 0 else "plus"
    mark = f"{sign} chosen" if (row, layer) == chosen else sign
    mark += " dark" if share > 0.6 else ""
    percent = round(100 * weight)
    text = str(percent) if numbered and percent else ""
    return (
        f'<td class="{mark}" data-row="{row}" data-layer="{layer}" style="--w:{share:.3f}" '
        f'title="{escape(name)}: {100 * weight:.1f} %">{text}</td>'
    )


def _short(name: str) -> str:
    return escape("orig." if name == "original" else name.removeprefix("layer "))


def saved_html(saved: Saved | None) -> str:
    """Return a link that saves the edited routing as a file, and the command that uses it."""
    if saved is None:
        return '<p class="note">An edited routing can be saved here.</p>'
    url = data_url(json.dumps(saved.content).encode(), "application/json")
    return (
        f'<p><a class="save" download="{saved.name}" href="{url}">Save {saved.name}</a></p>'
        f"<p class='note'>and use it: <code>{escape(saved.command)}</code></p>"
    )


def alert_html(message: str) -> str:
    """Return a message about a mistake; an empty one leaves the place empty."""
    return f'<p role="alert" class="alert">{escape(message)}</p>' if message else ""
