"""Figure 4 and the effective time, from measured trajectories; the calibration that a gate can be told by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from semantic_routing.analyze.figures import Drawn
from semantic_routing.analyze.routing import plot_curves
from semantic_routing.analyze.trajectory import Trajectory, lead_interval, psnr
from semantic_routing.checkpoint import write_text
from semantic_routing.generate import SampleConfig

Runs = Sequence[tuple[SampleConfig, Trajectory]]
NOMINAL = "nominal time t (0 noise, 1 data)"


def trajectory_figures(runs: Runs) -> Iterator[Drawn]:
    """Mean squared error, PSNR and lead over nominal time for each number of steps, a line for each guidance."""
    for steps in sorted({cfg.steps for cfg, _ in runs}):
        same = [(cfg, path) for cfg, path in runs if cfg.steps == steps]
        reference = same[-1][1]
        for kind, label in (("mse", "latent MSE to the final image"), ("psnr", "latent PSNR (dB)")):
            measured = [(f"guidance {cfg.guidance:g}", _curve(path.error, path, kind), "-") for cfg, path in same]
            forward = [
                ("forward process", _curve(reference.forward, reference, kind), "--"),
                ("from fresh noise", _curve(reference.fresh, reference, kind), ":"),
            ]
            yield _drawn(f"trajectory-{kind}-{steps}", f"{label}, {steps} steps", reference, measured + forward, label)
        leads = [(f"guidance {cfg.guidance:g}", path.lead.mean(1), "-") for cfg, path in same]
        zero = [("nominal", np.zeros(steps), ":")]
        title = f"Effective time minus nominal time, {steps} steps"
        yield _drawn(f"lead-{steps}", title, reference, leads + zero, "lead of the effective time")


def _curve(error: Float[np.ndarray, "S B"], path: Trajectory, kind: str) -> Float[np.ndarray, " S"]:
    return (error if kind == "mse" else psnr(error, path.peak)).mean(1)


def _drawn(
    name: str, title: str, path: Trajectory, curves: Sequence[tuple[str, Float[np.ndarray, " S"], str]], label: str
) -> Drawn:
    return Drawn(
        name=name,
        title=title,
        figure=plot_curves(path.times, curves, NOMINAL, label),
        rows=[f"{t:.4f}" for t in path.times],
        columns=[name for name, _, _ in curves],
        values=np.stack([values for _, values, _ in curves], axis=1),
    )


def lead_table(runs: Runs) -> list[dict[str, Any]]:
    """The mean lead of each setting with its 95 % bootstrap interval over images, and where it is largest."""
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
                "images": path.error.shape[1],
                "lead": mean,
                "interval": [low, high],
                "largest": float(by_step.max()),
                "at": float(path.times[int(by_step.argmax())]),
            }
        )
    return rows


def write_calibration(path: Path, cfg: SampleConfig, measured: Trajectory) -> None:
    """The mean effective time of each step, as ``semroute sample --clock`` reads it."""
    curve = {
        "times": measured.times.tolist(),
        "effective": np.clip(measured.effective.mean(1), 0, 1).tolist(),
        "images": measured.error.shape[1],
        "sampler": asdict(cfg),
    }
    write_text(path, json.dumps(curve, indent=2) + "\n")
