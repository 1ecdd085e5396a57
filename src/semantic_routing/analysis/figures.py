"""The common look of all figures, and their files: images with their numbers beside them.

Figures are made through matplotlib's objects, never through the global state of pyplot.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from semantic_routing.common.files import written_whole

Curve = tuple[str, Float[np.ndarray, " S"], str]
"""Name, values and line style."""
INK = "#20242c"
"""Colour of text and axes only: ``to_svg`` replaces it by the page's text colour."""


def new_axes(width: float, height: float, title: str = "") -> tuple[Figure, Axes]:
    """Make a figure of ``width`` x ``height`` inches with one plot, open at the top and the right."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, color=INK)
    axes.tick_params(labelsize=9.5, which="both", color=INK, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    return figure, axes


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Name both axes."""
    axes.set_xlabel(x, fontsize=10.5, color=INK)
    axes.set_ylabel(y, fontsize=10.5, color=INK)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure and the numbers that it shows."""

    name: str
    """File name without its ending."""
    title: str
    """Heading on a page."""
    figure: Figure
    rows: Sequence[str]
    """Names of the rows of ``values``."""
    columns: Sequence[str]
    """Names of the columns of ``values``."""
    values: Float[np.ndarray, "R C"]

    def save(self, folder: Path) -> Path:
        """Write the figure as .png and .pdf and its numbers as .csv and .npz; returns the path of the .png."""
        save_figure(self.figure, folder / self.name, self.rows, self.columns, self.values)
        return folder / f"{self.name}.png"


def save_figure(
    figure: Figure, stem: Path, rows: Sequence[str], columns: Sequence[str], values: Float[np.ndarray, "R C"]
) -> None:
    """Write the figure to ``stem``.png and .pdf, and its numbers with their names to .csv and .npz."""
    for kind in ("png", "pdf"):
        with written_whole(stem.with_name(f"{stem.name}.{kind}")) as scratch:
            figure.savefig(scratch, format=kind, dpi=150)
        figure.set_layout_engine("none")  # one layout serves both files
    with written_whole(stem.with_name(f"{stem.name}.csv")) as scratch, scratch.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["", *columns])
        table.writerows([name, *map(float, row)] for name, row in zip(rows, values, strict=True))
    with written_whole(stem.with_name(f"{stem.name}.npz")) as scratch, scratch.open("wb") as file:
        np.savez(file, values=values, rows=np.array(rows), columns=np.array(columns))


def to_svg(figure: Figure, description: str) -> str:
    """Return the figure as an ``<svg>`` element: transparent, with text in the page's colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    return drawing.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)


def ticks(first: int, last: int, most: int = 12) -> range:
    """Return at most ``most`` evenly spaced integers from first to last, so that labels do not overlap."""
    return range(first, last + 1, -(-(last - first + 1) // most))


def plot_curves(
    x: Float[np.ndarray, " S"],
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    *,
    bottom: float | None = None,
) -> Figure:
    """Draw curves over ``x``; each solid line has its own colour."""
    figure, axes = new_axes(5.6, 3.4)
    solid = [style for _, _, style in curves].count("-")
    colors = iter(matplotlib.colormaps["viridis"](np.linspace(0, 0.8, max(solid, 1))))
    for name, values, style in curves:
        color = next(colors) if style == "-" else INK
        axes.plot(x, values, style, color=color, linewidth=1.5 if style == "-" else 1, label=name)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    label_axes(axes, x_label, y_label)
    axes.legend(fontsize=9, frameon=False, labelcolor=INK)
    return figure
