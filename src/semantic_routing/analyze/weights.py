"""How much each block reads of each language-model layer, drawn as in Figures 1, 2, 6 and 7 of the paper.

The numbers come from the very ``router.weights(t)`` that training and sampling use.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import Tensor

from semantic_routing.analyze.figures import INK, Drawn, label_axes, new_axes
from semantic_routing.checkpoint import EMA, find_checkpoint, open_tensors, read_state, read_tensors
from semantic_routing.config import from_dict
from semantic_routing.dit import Backbone, DiT, DiTConfig
from semantic_routing.fusedit import make_model

PIPELINE = "model_index.json"
"""The file that makes a folder a pipeline of diffusers."""
HEATMAP_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Times of the heat maps (0 noise, 1 data) ..."""
LINE_TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""... and of the lines, as in Figure 2."""
MOST_NUMBERS = 120
"""Heat maps of at most so many cells show the numbers, too."""


def open_router(path: Path) -> Backbone:
    """The model of a run, checkpoint or exported pipeline, on the meta device but for its router's averaged weights.

    Nothing else is read, so this is quick and small for any backbone. ValueError for what is none of them.
    """
    sizes, tensors, source = _of_pipeline(path) if (path / PIPELINE).is_file() else _of_checkpoint(path)
    with torch.device("meta"):
        model = make_model(sizes)
    if not isinstance(model, DiT):
        return model
    found = tensors()
    wanted = {name: tensor.shape for name, tensor in model.router.state_dict().items()}
    if {name: tensor.shape for name, tensor in found.items()} != wanted:
        raise ValueError(f"{source} does not hold the router of its configuration, arm {sizes.arm!r}")
    model.router.load_state_dict(found, assign=True)
    return model


Opened = tuple[DiTConfig, Callable[[], dict[str, Tensor]], Path]
"""Sizes of a model, what reads its router's tensors, and where from."""


def _of_checkpoint(path: Path) -> Opened:
    folder = find_checkpoint(path)
    config = read_state(folder).get("config")
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{folder} was not written by semroute train: its state.json has no configuration")
    file = folder / EMA

    def tensors() -> dict[str, Tensor]:
        return {name.removeprefix("router."): tensor for name, tensor in read_tensors(file, "router.").items()}

    return from_dict(DiTConfig, config["model"], "model."), tensors, file


def _of_pipeline(path: Path) -> Opened:
    folder, prefix = path / "transformer", "backbone.router."
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = DiTConfig(**{field.name: config[field.name] for field in fields(DiTConfig)})
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no transformer of semroute export: its config.json lacks {error}") from error

    def tensors() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with open_tensors(file), safe_open(file, "pt") as content:
                names = [name for name in content.keys() if name.startswith(prefix)]  # noqa: SIM118
                found |= {name.removeprefix(prefix): content.get_tensor(name) for name in names}
        return found

    return sizes, tensors, folder


@torch.no_grad()
def routing_weights(model: Backbone, times: Sequence[float]) -> Float[np.ndarray, "T D L"]:
    """Weight of each of L layers in each of D blocks at the times (0 noise, 1 data); each row sums to 1.

    What a router ignores is repeated. ValueError for FuseDiT, which has none.
    """
    if not isinstance(model, DiT):
        raise ValueError(
            "FuseDiT has no router: each of its blocks reads one fixed layer of the language model, so there are "
            "no routing weights to show"
        )
    device = next((p.device for p in model.router.parameters()), None)
    t = torch.tensor(times, dtype=torch.float32, device=device)
    return model.router.weights(t).expand(len(times), model.cfg.depth, -1).numpy(force=True)


def plot_heatmap(weights: Float[np.ndarray, "D L"], title: str = "", top: float = 0.0) -> Figure:
    """Block by layer, first block on top: the darker, the more of the layer the block reads.

    ``top`` is the weight of the darkest colour, so that several maps can share one; by default the largest.
    """
    depth, layers = weights.shape
    figure, axes = new_axes(min(1.9 + 0.42 * layers, 7.5), min(1.4 + 0.34 * depth, 5.5), title)
    # Twice the uniform weight is the darkest colour where nothing stands out more.
    top = 100 * max(top, float(weights.max()), 2 / layers)
    edges_x, edges_y = np.arange(layers + 1) + 0.5, np.arange(depth + 1) - 0.5
    mesh = axes.pcolormesh(
        edges_x, edges_y, weights * 100, cmap="Blues", vmin=0, vmax=top, edgecolors="face", linewidth=0.2
    )
    axes.invert_yaxis()
    axes.set_xticks(_ticks(1, layers))
    axes.set_yticks(_ticks(0, depth - 1))
    axes.spines[:].set_visible(False)
    label_axes(axes, "language-model layer", "block")
    if weights.size <= MOST_NUMBERS:
        for (block, layer), weight in np.ndenumerate(weights * 100):
            color = "white" if weight > 0.6 * top else "#08306b"
            axes.text(layer + 1, block, f"{weight:.0f}", ha="center", va="center", fontsize=8.5, color=color)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.06)
    bar.set_label("weight (%)", fontsize=10, color=INK)
    bar.ax.tick_params(labelsize=9, color=INK, labelcolor=INK)
    bar.outline.set_visible(False)
    return figure


def plot_lines(weights: Float[np.ndarray, "K L"], labels: Sequence[str], title: str = "") -> Figure:
    """Weight by layer, a line for each of K blocks or times in their order."""
    figure, axes = new_axes(5.6, 3.4, title)
    layers = weights.shape[1]
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(labels)))
    for row, label, color in zip(weights, labels, colors, strict=True):
        axes.plot(np.arange(1, layers + 1), row, "o-", color=color, markersize=3, linewidth=1.5, label=label)
    axes.axhline(1 / layers, color=INK, linewidth=0.8, linestyle=":", label="uniform")
    axes.set_xticks(_ticks(1, layers))
    axes.set_ylim(bottom=0)
    label_axes(axes, "language-model layer", "weight")
    axes.legend(fontsize=9, frameon=False, labelcolor=INK)
    return figure


def heatmaps(model: Backbone) -> Iterator[tuple[float | None, Float[np.ndarray, "D L"]]]:
    """What there is to draw: the weights, at ``HEATMAP_TIMES`` or, where time is ignored, once for None."""
    times = HEATMAP_TIMES if model.depends_on_time else HEATMAP_TIMES[:1]
    for time, weights in zip(times, routing_weights(model, times), strict=True):
        yield (time if model.depends_on_time else None), weights


def weight_figures(model: Backbone) -> Iterator[Drawn]:
    """Figures 1, 2, 6 and 7: heat maps of all blocks, lines of the first, middle and last.

    Where the weights change with time there are maps at ``HEATMAP_TIMES`` and lines at ``LINE_TIMES``.
    """
    columns = [f"layer {layer}" for layer in range(1, model.cfg.text_layers + 1)]
    for name, title, figure, rows, weights in [*_heatmap_figures(model), *_line_figures(model)]:
        yield Drawn(name=name, title=title, figure=figure, rows=rows, columns=columns, values=weights)


Part = tuple[str, str, Figure, list[str], Float[np.ndarray, "K L"]]
"""Name and title of a figure, the figure, the names of the rows of numbers in it, and these."""


def _heatmap_figures(model: Backbone) -> Iterator[Part]:
    rows = [f"block {block}" for block in range(model.cfg.depth)]
    drawn = list(heatmaps(model))
    top = max(float(weights.max()) for _, weights in drawn)
    for time, weights in drawn:
        name, at = ("heatmap", "") if time is None else (f"heatmap-t{time:.2f}", f"t = {time:g}")
        title = f"Weight of each layer in each block{at and f', {at}'}"
        yield name, title, plot_heatmap(weights, at, top), rows, weights


def _line_figures(model: Backbone) -> Iterator[Part]:
    weights = routing_weights(model, LINE_TIMES)
    last = model.cfg.depth - 1
    blocks = sorted({0, last // 2, last}) if np.ptp(weights, axis=1).max() > 0 else [0]
    if not model.depends_on_time:
        rows = [f"block {block}" for block in blocks] if len(blocks) > 1 else ["all blocks"]
        yield "lines", "Weight of each layer", plot_lines(weights[0, blocks], rows), rows, weights[0, blocks]
        return
    rows = [f"t = {time:g}" for time in LINE_TIMES]
    for block in blocks:
        name, title = (f"lines-block{block}", f"block {block}") if len(blocks) > 1 else ("lines", "")
        about = f"Weight of each layer at six times{title and f', {title}'}"
        yield name, about, plot_lines(weights[:, block], rows, title), rows, weights[:, block]


def _ticks(first: int, last: int, most: int = 12) -> range:
    """Whole numbers from first to last, so few that their labels do not meet."""
    return range(first, last + 1, -(-(last - first + 1) // most))
