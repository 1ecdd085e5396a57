"""GenEval's postprocessing of Mask2Former's output for a 1024 x 1024 image, against the official steps.

    python benchmarks/geneval_post.py [--repeats 9] [--threads 1] [--out result.json]

Prints the median wall-clock and CPU milliseconds for three outputs of 100 queries, and writes them with a manifest.
``few`` has objects of many sizes, a tenth of them with a high score; ``all`` is the same with high scores only;
``full`` is the worst case: high scores, and masks of noise over the whole image. ``keep`` is the least score of objects
that are kept: GenEval's, or 0, which keeps all of the top 100.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semantic_routing.common.files import write_text
from semantic_routing.common.manifest import manifest
from semantic_routing.evaluation.geneval.detector import TOP, Geometry, fit, postprocess
from semantic_routing.evaluation.geneval.verdict import CLASSES, THRESHOLD

QUERIES, SIDE = 100, 1024


def answers(name: str, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return logits of the classes, and logits of the masks at a quarter of the input's size."""
    height, width = (side // 4 for side in geometry.padded)
    classes = torch.randn(QUERIES, len(CLASSES) + 1)
    classes[:, -1] += 6  # no object
    sure = torch.arange(QUERIES // 10 if name == "few" else QUERIES)
    classes[sure, torch.randint(len(CLASSES), (len(sure),))] += 12
    noise = torch.randn(QUERIES, height, width)
    if name == "full":
        return classes, 3 * noise + 2
    y, x = torch.arange(height)[:, None], torch.arange(width)
    center, radius = torch.rand(QUERIES, 2, 1, 1) * height, torch.rand(QUERIES, 1, 1) * 50 + 5
    away = torch.hypot(y - center[:, 0], x - center[:, 1]) / radius
    return classes, 10 * (1 - away).clamp(min=-2) + 0.1 * noise


def plain(classes: Tensor, masks: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Run the official steps: returns the scores of the top 100 and their boxes."""
    large = F.interpolate(masks[None], size=geometry.padded, mode="bilinear", align_corners=False)
    large = large[:, :, : geometry.resized[0], : geometry.resized[1]]
    large = F.interpolate(large, size=geometry.original, mode="bilinear", align_corners=False)[0]
    top = classes.softmax(dim=-1)[:, :-1].flatten().topk(TOP)
    logits = large[top.indices // len(CLASSES)]
    binary = (logits > 0).float()
    certain = (logits.sigmoid() * binary).flatten(1).sum(1) / (binary.flatten(1).sum(1) + 1e-6)
    boxes = torch.zeros(TOP, 4)
    for i, (in_columns, in_rows) in enumerate(zip(binary.any(dim=1), binary.any(dim=2), strict=True)):
        x, y = in_columns.nonzero(), in_rows.nonzero()
        if len(x):
            boxes[i] = torch.cat((x[0], y[0], x[-1] + 1, y[-1] + 1))
    return top.values * certain, boxes


def milliseconds(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    work()
    wall, processor = [], []
    for _ in range(repeats):
        began, spent = time.perf_counter(), time.process_time()
        work()
        wall.append(1e3 * (time.perf_counter() - began))
        processor.append(1e3 * (time.process_time() - spent))
    return {"wall": round(median(wall), 1), "processor": round(median(processor), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    geometry, rows = fit(SIDE, SIDE), {}
    with torch.inference_mode():
        for name in ("few", "all", "full"):
            classes, masks = answers(name, geometry)
            scores = plain(classes, masks, geometry)[0]
            found = [one.score for objects in postprocess(classes, masks, geometry).values() for one in objects]
            apart = (torch.tensor(sorted(found)) - scores[scores > 0].sort().values).abs().max().item()
            for keep in (THRESHOLD, 0.0):
                timed = milliseconds(lambda: postprocess(classes, masks, geometry, keep), args.repeats)  # noqa: B023
                rows[f"{name}, keep {keep}"] = timed
            rows[f"{name}, official steps"] = milliseconds(lambda: plain(classes, masks, geometry), 2)  # noqa: B023
            rows[f"{name}, greatest difference of a score"] = {"all": apart}
    for name, values in rows.items():
        sys.stdout.write(f"{name:40} " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()) + "\n")
    if args.out:
        write_text(args.out, json.dumps(manifest(milliseconds=rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
