"""Figure 4 and the effective time, from measured trajectories, and the calibration file for ``--clock``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from semantic_routing.analysis.figures import INK, Drawn, label_axes, new_axes
from semantic_routing.analysis.profiles import plot_curves
from semantic_routing.analysis.trajectory import Trajectory, lead_interval, psnr
from semantic_routing.common.files import write_text
from semantic_routing.sampling.text_to_image import SampleConfig

Runs = Sequence[tuple[SampleConfig, Trajectory]]
NOMINAL = "nominal time t (0 noise, 1 data)"
Curve = Float[np.ndarray, " S"]
KINDS = {"": "-", ", forward process": "--", ", from fresh noise": ":"}
"""Line style of each curve of a setting, by the ending of its name."""


def trajectory_figures(runs: Runs) -> Iterator[Drawn]:
    """Draw mean squared error, PSNR, effective time and its lead over nominal time for each number of steps.

    Each guidance scale has its own colour, and a forward process that is built from its own final images.
    """
    for steps in sorted({cfg.steps for cfg, _ in runs}):
        same = [(f"guidance {cfg.guidance:g}", path) for cfg, path in runs if cfg.steps == steps]
        times = same[0][1].times
        for kind, label in (("mse", "latent MSE to the final image"), ("psnr", "latent PSNR (dB)")):
            curves = {
                name + what: (error if kind == "mse" else psnr(error, path.peak)).mean(1)
                for name, path in same
                for what, error in zip(KINDS, (path.error, path.forward, path.fresh), strict=True)
            }
            figure = _plot_kinds(times, [name for name, _ in same], curves, label)
            yield _drawn(f"trajectory-{kind}-{steps}", f"{label}, {steps} steps", times, curves, figure)
        effective = {name: path.effective.mean(1) for name, path in same} | {"nominal": times}
        leads = {name: path.lead.mean(1) for name, path in same} | {"nominal": np.zeros(steps)}
        for name, title, curves, label in (
            ("effective-time", "Effective time", effective, "effective time"),
            ("lead", "Effective time minus nominal time", leads, "lead of the effective time"),
        ):
            lines = [(key, values, ":" if key == "nominal" else "-") for key, values in curves.items()]
            figure = plot_curves(times, lines, NOMINAL, label)
            yield _drawn(f"{name}-{steps}", f"{title}, {steps} steps", times, curves, figure)


def _plot_kinds(times: Curve, names: Sequence[str], curves: Mapping[str, Curve], label: str) -> Figure:
    """Draw the curves with a colour for each name and a line style for each kind."""
    figure, axes = new_axes(5.6, 3.4)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, len(names)))
    for name, color in zip(names, colors, strict=True):
        for what, style in KINDS.items():
            axes.plot(times, curves[name + what], style, color=color, linewidth=1.5 if style == "-" else 1)
    label_axes(axes, NOMINAL, label)
    keys = [Line2D([], [], color=color) for color in colors]
    keys += [Line2D([], [], color=INK, linestyle=style) for style in KINDS.values()]
    words = [*names, "sampled", *(what.removeprefix(", ") for what in KINDS if what)]
    axes.legend(keys, words, fontsize=9, frameon=False, labelcolor=INK)
    return figure


def _drawn(name: str, title: str, times: Curve, curves: Mapping[str, Curve], figure: Figure) -> Drawn:
    return Drawn(
        name=name,
        title=title,
        figure=figure,
        rows=[f"{t:.4f}" for t in times],
        columns=list(curves),
        values=np.stack(list(curves.values()), axis=1),
    )


def lead_table(runs: Runs) -> list[dict[str, Any]]:
    """Return the mean lead of each setting, its 95 % bootstrap interval over images, and its maximum."""
    rows = []
    for cfg, path in runs:
        mean, low, high = lead_interval(path.lead)
        by_step = path.lead.mean(1)
        rows.append(
            {
                "guidance": cfg.guidance,
                "steps": cfg.steps,
                "sampler": cfg.sampler,
                "shift": cfg.shift,
                "clock": cfg.clock,
                "images": path.error.shape[1],
                "lead": mean,
                "interval": [low, high],
                "largest": float(by_step.max()),
                "at": float(path.times[int(by_step.argmax())]),
            }
        )
    return rows


def write_calibration(path: Path, cfg: SampleConfig, measured: Trajectory) -> None:
    """Write the mean effective time of each step in the format of ``semroute sample --clock``."""
    curve = {
        "times": measured.times.tolist(),
        "effective": np.clip(measured.effective.mean(1), 0, 1).tolist(),
        "images": measured.error.shape[1],
        "sampler": asdict(cfg),
    }
    write_text(path, json.dumps(curve, indent=2) + "\n")
