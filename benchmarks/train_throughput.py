"""Images a second of the training loop, and the shares of data, metrics and checkpoints in its time.

    python benchmarks/train_throughput.py [--processes 1 2] [--steps 60] [--json FILE] [settings of semroute train]

Trains the toy recipe through the command line, uncompiled, with one thread for each process, metrics at every step and
a checkpoint at every twentieth, and reads the metrics of the run. The first steps do not count.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from train_job import finish, launch, merged, metrics, tiny_encoder

from semantic_routing.common.files import write_text
from semantic_routing.common.manifest import manifest

WARM_UP = 10
SETTINGS = ["--no-compile", "--preview-every", "0", "--log-every", "1", "--checkpoint-every", "20"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args, settings = parser.parse_known_args()
    results = {}
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        options = merged(SETTINGS, ["--steps", str(args.steps)], tiny_encoder(scratch, layers=8, width=128), settings)
        for count in args.processes:
            run, log = scratch / str(count), scratch / f"{count}.log"
            finish(launch(["toy", *options, "--out", str(run)], count, log), log)
            results[count] = measured(run)
    activities = sorted({name for result in results.values() for name in result["shares"]})
    sys.stdout.write(f"| processes | images/s | step (ms) | {' | '.join(activities)} |\n")
    sys.stdout.write(f"|{' ---: |' * (3 + len(activities))}\n")
    for count, result in results.items():
        shares = " | ".join(f"{result['shares'].get(name, 0):.1%}" for name in activities)
        sys.stdout.write(f"| {count} | {result['images_per_s']:.1f} | {1e3 * result['step_s']:.0f} | {shares} |\n")
    if args.json is not None:
        write_text(args.json, json.dumps(manifest(steps=args.steps, results=results), indent=2) + "\n")


def measured(run: Path) -> dict:
    """Return speed and shares of a run with metrics at every step."""
    rows = metrics(run)[WARM_UP:]
    seconds = sum(row["step_s"] for row in rows)
    images = sum(row["images_per_s"] * row["step_s"] for row in rows)
    activities = {name for row in rows for name in row if name.endswith("_s")} - {"step_s", "images_per_s"}
    shares = {name.removesuffix("_s"): sum(row.get(name, 0) for row in rows) / seconds for name in activities}
    return {"images_per_s": images / seconds, "step_s": seconds / len(rows), "shares": shares}


if __name__ == "__main__":
    main()
