"""The commands from end to end on one machine: train, resume, sample, evaluate, export, adopt; seconds of each.

    python benchmarks/commands.py [--recipe small] [--steps 200] [--device cuda] [--out FILE]

Each command runs in a process of its own, as a user would start it. The first that fails ends the benchmark with its
output; the adopted part needs diffusers and is left out without it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from results import save

WARM_UP = 20
"""Steps that do not count: they compile and tune."""


def run(*args: str | Path) -> float:
    """Run a command of semroute; return its seconds, or end the program with its output if it fails."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "semantic_routing", *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{done.stdout}\nsemroute {' '.join(map(str, args))}: exit code {done.returncode}")
    sys.stdout.write(f"{seconds:7.1f} s  semroute {' '.join(map(str, args))}\n")
    sys.stdout.flush()
    return seconds


def speed(run_folder: Path) -> dict[str, float]:
    """Return images a second, the share of the device's peak FLOPs and the peak memory of a run's later steps."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    later = [row for row in rows if row["step"] > WARM_UP] or rows
    numbers = {name: [row[name] for row in later if name in row] for name in ("images_per_s", "mfu", "memory")}
    return {name: median(found) for name, found in numbers.items() if found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--arm", default="depth")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=110)
    parser.add_argument("--images", type=int, default=8, help="of one prompt")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seconds: dict[str, float] = {}
    with TemporaryDirectory() as scratch:
        folder, device, half = Path(scratch), ("--device", args.device), args.steps // 2
        model, pipeline, routing = folder / "run", folder / "pipeline", folder / "routing"
        options = ("--arm", args.arm, "--steps", half, "--checkpoint-every", half, "--preview-every", 0)
        seconds["train"] = run("train", args.recipe, *map(str, options), *device, "--out", model)
        seconds["resume"] = run("train", "--resume", model, "--steps", str(args.steps))
        found = {"training": speed(model)}
        prompt = ("--prompt", "a red circle above a blue square", "--images-per-prompt", str(args.images))
        seconds["sample"] = run("sample", model, *prompt, *device, "--out", folder / "images")
        count = ("--n", str(args.prompts))
        seconds["evaluate"] = run("evaluate", "shapes", "--model", model, *count, *device, "--out", folder / "scores")
        if importlib.util.find_spec("diffusers"):
            seconds["export"] = run("export", model, "--out", pipeline)
            fixed = ("--steps", str(half), "--batch", "32", "--checkpoint-every", str(half))
            seconds["adopt train"] = run("adopt", "train", pipeline, *fixed, *device, "--out", routing)
            seconds["adopt sample"] = run(
                "adopt", "sample", pipeline, "--routing", routing, *prompt, *device, "--out", folder / "adopted"
            )
            found["adopting"] = speed(routing)
    save(args, {"seconds": seconds, **found}, run=42)


if __name__ == "__main__":
    main()
