"""The HTML page of an analysis: weights with a slider for the time, figures, trajectories, strips of images."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from semantic_routing.analysis.figures import Drawn, to_svg
from semantic_routing.analysis.routers import TIMES, routes, routing_weights, row_names
from semantic_routing.analysis.statistics import center, effective_layers
from semantic_routing.analysis.table import Table
from semantic_routing.common.files import write_text
from semantic_routing.common.webpage import document
from semantic_routing.model.dit import Backbone

SCRIPT = Path(__file__).with_suffix(".js")


@dataclass(frozen=True)
class Strip:
    """Images along one sampling trajectory."""

    caption: str
    setting: str
    times: Sequence[float]
    images: Sequence[UInt8[np.ndarray, "H W 3"]]


def write_page(
    path: Path,
    name: str,
    model: Backbone,
    drawn: Sequence[Drawn],
    leads: Sequence[dict[str, Any]],
    strips: Sequence[Strip],
    disagreement: dict[str, Any] | None = None,
) -> Path:
    """Write the self-contained page; returns its path."""
    sections = [_weights(model)] if routes(model) else []
    sections.append(_figures(drawn))
    if disagreement is not None:
        sections.append(_disagreement(disagreement))
    if leads:
        sections.append(_leads(leads))
    if strips:
        sections.append(_strips(strips))
    title = f"Routing of {name}"
    head = f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(_about(model))}</p>\n'
    write_text(path, document(title, head + "\n".join(sections) + "\n", script=SCRIPT))
    return path


def _about(model: Backbone) -> str:
    cfg = model.cfg
    return f"Arm {cfg.arm}: {cfg.depth} blocks read {cfg.text_layers} language-model layers of width {cfg.text_width}."


def _weights(model: Backbone) -> str:
    """Return a canvas that the script fills with a heat map, its numbers, and a slider if routing depends on time."""
    weights = routing_weights(model, TIMES if model.depends_on_time else TIMES[:1])
    data = {
        "times": [float(t) for t in TIMES[: len(weights)]],
        "rows": list(model.cfg.rows),
        "names": row_names(model.cfg),
        "weights": np.round(weights.astype(float), 5).tolist(),
        "centers": np.round(center(weights), 4).tolist(),
        "effective": np.round(effective_layers(weights), 3).tolist(),
    }
    slider = (
        '<p><label>time t <input type="range" id="time" min="0" step="1" value="0" '
        f'max="{len(weights) - 1}" style="width:16rem;vertical-align:middle"> <output id="told"></output></label></p>'
        if len(weights) > 1
        else ""
    )
    return (
        "<h2>Weight of each layer in each block</h2>\n"
        f'<div class="card">{slider}<canvas id="map" style="width:100%;height:auto" role="img" '
        'aria-label="weights of layers by block"></canvas><p class="soft" id="reading">Point at a cell.</p></div>\n'
        f'<script type="application/json" id="weights">{json.dumps(data)}</script>'
    )


def _figures(drawn: Sequence[Drawn]) -> str:
    cards = [
        f'<div class="card plot"><h3>{escape(figure.title)}</h3><div>{to_svg(figure.figure, figure.title)}</div></div>'
        for figure in drawn
        if not figure.name.startswith("heatmap")  # the canvas shows those
    ]
    return f'<h2>Figures</h2>\n<div class="maps">{"".join(cards)}</div>'


def _leads(leads: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            f"{row['guidance']:g}", str(row["steps"]), str(row["images"]), f"{row['lead']:+.4f}",
            f"{row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}", f"{row['largest']:+.4f} at t = {row['at']:.2f}",
        )
        for row in leads
    ]  # fmt: skip
    head = ("guidance", "steps", "images", "mean lead", "95 % interval", "largest")
    return (
        "<h2>Lead of the effective time over the nominal one</h2>\n"
        '<p class="soft">The effective time of a step is the time at which the training forward process, built from '
        f"the final image, is as far from it as the sampling trajectory is.</p>\n{Table(head, rows).html()}"
    )


def _disagreement(found: dict[str, Any]) -> str:
    rows = [
        (
            f"{one['row']}, layer {one['layer']}", one["reading"], f"{100 * one['weight']:.1f} %",
            f"{one['need']:+.4g}", "{:+.4g} to {:+.4g}".format(*one["interval"]), f"{one['ranks_apart']:+.2f}",
        )
        for one in found["largest"]
    ]  # fmt: skip
    head = ("", "", "weight", "need", "95 % interval", "ranks apart")
    correlation = "none" if found["rank_correlation"] is None else f"{found['rank_correlation']:+.2f}"
    return (
        "<h2>Where weight and need disagree</h2>\n"
        '<p class="soft">Need is what the model loses if the block does without the layer. Rank correlation of weight '
        f"and need over all blocks and layers: {correlation}.</p>\n{Table(head, rows).html()}"
    )


def _strips(strips: Sequence[Strip]) -> str:
    cards = []
    for strip in strips:
        images = "".join(
            f'<figure><img alt="t = {t:.2f}" src="{_data_uri(image)}"><figcaption>t = {t:.2f}</figcaption></figure>'
            for t, image in zip(strip.times, strip.images, strict=True)
        )
        cards.append(
            f'<div class="card"><h3>{escape(strip.caption)}<span>{escape(strip.setting)}</span></h3>'
            f'<div style="display:grid;grid-template-columns:repeat({len(strip.images)},minmax(0,1fr));gap:.5rem">'
            f"{images}</div></div>"
        )
    return "<h2>The model's estimate of the image during sampling</h2>\n" + "\n".join(cards)


def _data_uri(image: UInt8[np.ndarray, "H W 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
