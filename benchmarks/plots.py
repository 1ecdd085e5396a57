"""Plots of the results of the benchmarks beside their targets.

python benchmarks/plots.py docs/results/cpu docs/images/performance.png
python benchmarks/plots.py docs/results/gpu docs/images/performance-gpu.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from semantic_routing.analysis.figures import INK, label_axes, new_axes

Rows = list[tuple[str, float, float]]
"""Name, measured value and target; larger is better."""


def on_cpu(found: dict[str, Any]) -> Rows:
    """Return the speed-ups over the reference."""
    kept = found["mix"]["rows"]["depth"]["freed memory kept"]
    rows = [
        (f"mix {part}, S2", kept[f"naive {part}"] / kept[f"ours {part}"], 5.0)
        for part in ("forward", "forward and backward")
    ]
    rows.append(("guided sampling, S2", found["sampling"]["ratios"]["S2 reference / ours"], 3.0))
    first, *_, last = found["train_step"]["rows"].values()
    return [*rows, ("toy training step", first["time"] / last["time"], 3.0)]


def on_gpu(found: dict[str, Any]) -> Rows:
    """Return the shares of the hardware's speed, and the improvements over the reference."""
    mix, backbone, sampling = found["mix"], found["backbone"], found["sampling"]["ratios"]
    first, *_, last = found["train_step"]["rows"].values()
    return [
        *((f"mix {part}, share of a copy", share, mix["wanted"][part]) for part, share in mix["shares"].items()),
        *((f"{part}, share of a product", share, backbone["wanted"]) for part, share in backbone["shares"].items()),
        ("guided sampling, S2, times faster", sampling["S2 reference / ours"], 1.5),
        ("B1's time over S2's", 1 / sampling["S2 / B1"], 1 / 1.01),
        ("training step, times faster", first["time"] / last["time"], 1.8),
        ("training step, times less memory", first["memory"] / last["memory"], 1 / 0.6),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    found = {path.stem: json.loads(path.read_text()) for path in args.folder.glob("*.json")}
    gpu = "backbone" in found
    rows = on_gpu(found) if gpu else on_cpu(found)
    figure, axes = new_axes(6.4, 0.9 + 0.42 * len(rows))
    places = range(len(rows))
    axes.barh(places, [measured for _, measured, _ in rows], color="#4477aa", height=0.55, label="measured")
    axes.plot([wanted for *_, wanted in rows], places, "|", color=INK, markersize=18, label="wanted")
    for place, (_, measured, wanted) in zip(places, rows, strict=True):
        axes.text(max(measured, wanted) + 0.05, place, f"{measured:.2f}", va="center", fontsize=9, color=INK)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(places, [name for name, *_ in rows])
    axes.invert_yaxis()
    label_axes(axes, "one H200" if gpu else "times faster than the reference's way (2 CPU cores)", "")
    corner = "upper right" if gpu else "lower right"  # where the bars are short
    axes.legend(fontsize=9, frameon=False, labelcolor=INK, loc=corner)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
