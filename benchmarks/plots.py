"""Plots of what the CPU benchmarks wrote: each ratio beside the one that was wanted.

python benchmarks/plots.py docs/results/cpu docs/images/performance.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from semantic_routing.analyze.figures import INK, label_axes, new_axes


def ratios(folder: Path) -> list[tuple[str, float, float]]:
    """Name, measured and wanted times-faster of every figure found."""
    mix, step, sampling = (json.loads((folder / f"{n}.json").read_text()) for n in ("mix", "train_step", "sampling"))
    kept = mix["rows"]["depth"]["freed memory kept"]
    rows = [
        (f"mix {part}, S2", kept[f"naive {part}"] / kept[f"ours {part}"], 5.0)
        for part in ("forward", "forward and backward")
    ]
    rows.append(("guided sampling, S2", sampling["ratios"]["S2 reference / ours"], 3.0))
    first, *_, last = step["rows"].values()
    return [*rows, ("toy training step", first["time"] / last["time"], 3.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rows = ratios(args.folder)
    figure, axes = new_axes(6.4, 2.6)
    places = range(len(rows))
    axes.barh(places, [measured for _, measured, _ in rows], color="#4477aa", height=0.55, label="measured")
    axes.plot([wanted for *_, wanted in rows], places, "|", color=INK, markersize=18, label="wanted")
    for place, (_, measured, _) in zip(places, rows, strict=True):
        axes.text(measured + 0.08, place, f"{measured:.1f}", va="center", fontsize=9, color=INK)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(places, [name for name, *_ in rows])
    axes.invert_yaxis()
    label_axes(axes, "times faster than the reference's way (2 CPU cores)", "")
    axes.legend(fontsize=9, frameon=False, labelcolor=INK, loc="lower right")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
