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
TIMES = tuple(float(t) for t in np.linspace(0, 1, 21).round(2))
"""The 21 times of Figures 3, 8 and 9 (0 noise, 1 data) ..."""
CHOSEN_TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""... and those of Figures 2 and 7, unless others are chosen."""
TIME = "time t (0 noise, 1 data)"
"""The name of the axis."""
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


def routes(model: Backbone) -> bool:
    """Whether a model has routing weights that no text is needed for."""
    return model.cfg.strategy.has_weights


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


def plot_heatmap(
    weights: Float[np.ndarray, "K L"],
    title: str = "",
    top: float = 0.0,
    rows: Sequence[str] | None = None,
    label: str = "block",
) -> Figure:
    """A row for each of K blocks or times, the first on top: the darker, the more of the layer is read.

    ``top`` is the weight of the darkest colour, so that several maps can share one; by default the largest.
    ``rows`` are the names of the rows, by default their numbers.
    """
    count, layers = weights.shape
    figure, axes = new_axes(min(1.9 + 0.42 * layers, 7.5), min(1.4 + 0.34 * count, 5.5), title)
    # Twice the uniform weight is the darkest colour where nothing stands out more.
    top = 100 * max(top, float(weights.max()), 2 / layers)
    edges_x, edges_y = np.arange(layers + 1) + 0.5, np.arange(count + 1) - 0.5
    mesh = axes.pcolormesh(
        edges_x, edges_y, weights * 100, cmap="Blues", vmin=0, vmax=top, edgecolors="face", linewidth=0.2
    )
    axes.invert_yaxis()
    axes.set_xticks(_ticks(1, layers))
    ticks = _ticks(0, count - 1)
    axes.set_yticks(ticks, [str(tick) if rows is None else rows[tick] for tick in ticks])
    axes.spines[:].set_visible(False)
    label_axes(axes, "language-model layer", label)
    if weights.size <= MOST_NUMBERS:
        for (row, layer), weight in np.ndenumerate(weights * 100):
            color = "white" if weight > 0.6 * top else "#08306b"
            axes.text(layer + 1, row, f"{weight:.0f}", ha="center", va="center", fontsize=8.5, color=color)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.06)
    bar.set_label("weight (%)", fontsize=10, color=INK)
    bar.ax.tick_params(labelsize=9, color=INK, labelcolor=INK)
    bar.outline.set_visible(False)
    return figure


def plot_lines(weights: Float[np.ndarray, "K L"], labels: Sequence[str], title: str = "") -> Figure:
    """Weight by layer, a line for each of K blocks or times in their order."""
    figure, axes = new_axes(6.6, 3.4, title)
    layers = weights.shape[1]
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(labels)))
    for row, label, color in zip(weights, labels, colors, strict=True):
        axes.plot(np.arange(1, layers + 1), row, "o-", color=color, markersize=3, linewidth=1.5, label=label)
    axes.axhline(1 / layers, color=INK, linewidth=0.8, linestyle=":", label="uniform")
    axes.set_xticks(_ticks(1, layers))
    axes.set_ylim(bottom=0)
    label_axes(axes, "language-model layer", "weight")
    axes.legend(fontsize=9, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def heatmaps(
    model: Backbone, times: Sequence[float] = CHOSEN_TIMES
) -> Iterator[tuple[float | None, Float[np.ndarray, "D L"]]]:
    """The weights of all blocks at the times or, where time is ignored, once for None."""
    times = times if model.depends_on_time else times[:1]
    for time, weights in zip(times, routing_weights(model, times), strict=True):
        yield (time if model.depends_on_time else None), weights


def weight_figures(
    model: Backbone, times: Sequence[float] = CHOSEN_TIMES, blocks: Sequence[int] = ()
) -> Iterator[Drawn]:
    """Figures 1, 2, 6 and 7: heat maps of all blocks at the chosen times and of all times in the chosen blocks; lines.

    As far as the model's routing has the axis; by default of the first, the middle and the last block. ValueError for
    a block that the model lacks.
    """
    depth = model.cfg.depth
    if wrong := [block for block in blocks if not 0 <= block < depth]:
        raise ValueError(f"there is no block {wrong[0]}: this model's are 0 to {depth - 1}")
    chosen = list(blocks) or sorted({0, (depth - 1) // 2, depth - 1})
    # Over the axis that routing ignores all weights are alike, and one of it stands for all.
    if np.ptp(routing_weights(model, TIMES), axis=1).max() == 0:
        chosen = []
    columns = [f"layer {layer}" for layer in range(1, model.cfg.text_layers + 1)]
    for name, title, figure, rows, weights in [*_maps(model, times, chosen), *_lines(model, times, chosen)]:
        yield Drawn(name=name, title=title, figure=figure, rows=rows, columns=columns, values=weights)


Part = tuple[str, str, Figure, list[str], Float[np.ndarray, "K L"]]
"""Name and title of a figure, the figure, the names of the rows of numbers in it, and these."""


def _maps(model: Backbone, times: Sequence[float], blocks: Sequence[int]) -> Iterator[Part]:
    every = routing_weights(model, TIMES)
    top = float(every.max())
    rows = [f"block {block}" for block in range(model.cfg.depth)]
    for time, weights in heatmaps(model, times) if blocks or not model.depends_on_time else ():
        name, at = ("heatmap", "") if time is None else (f"heatmap-t{time:g}", f"t = {time:g}")
        title = f"Weight of each layer in each block{at and f', {at}'}"
        yield name, title, plot_heatmap(weights, at, top), rows, weights
    for block in (blocks or [0]) if model.depends_on_time else ():
        name, where = (f"heatmap-block{block}", f"block {block}") if blocks else ("heatmap-times", "")
        names, weights = [f"{t:g}" for t in TIMES], every[:, block]
        figure = plot_heatmap(weights, where, top, names, TIME)
        title = f"Weight of each layer at each time{where and f', {where}'}"
        yield name, title, figure, [f"t = {t}" for t in names], weights


def _lines(model: Backbone, times: Sequence[float], blocks: Sequence[int]) -> Iterator[Part]:
    weights = routing_weights(model, times)
    if not model.depends_on_time:
        rows = [f"block {block}" for block in blocks] or ["all blocks"]
        values = weights[0, list(blocks) or [0]]
        yield "lines", "Weight of each layer", plot_lines(values, rows), rows, values
        return
    rows = [f"t = {time:g}" for time in times]
    for block in blocks or [0]:
        name, where = (f"lines-block{block}", f"block {block}") if blocks else ("lines", "")
        title = f"Weight of each layer at chosen times{where and f', {where}'}"
        yield name, title, plot_lines(weights[:, block], rows, where), rows, weights[:, block]


def _ticks(first: int, last: int, most: int = 12) -> range:
    """Whole numbers from first to last, so few that their labels do not meet."""
    return range(first, last + 1, -(-(last - first + 1) // most))
