"""Kills ``semroute train`` at random moments, resumes it each time, and compares it with an undisturbed run.

    python benchmarks/kill_stress.py [--kills 30] [--processes 1] [--seed 0] [--json FILE] [settings of semroute train]

SIGKILL comes at random: during a step, while a checkpoint is being written, at the start. With several processes half
of the kills hit one rank, after which torchrun stops the others, and half hit all. Both runs must end with the same
weights, EMA, optimiser state, metrics of every step and sample grids, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import equal
from train_job import TINY, finish, launch, merged, metrics, tiny_encoder

from semantic_routing.checkpoint.load import EMA, MODEL, OPTIMIZER, checkpoints, find_checkpoint, read_tensors
from semantic_routing.common.files import PARTIAL, write_text
from semantic_routing.common.manifest import manifest
from semantic_routing.training.metrics import reproducible
from semantic_routing.training.tracking import METRICS

Identity = tuple[Path, int]

EVERY = 4
"""Steps between checkpoints."""
MOMENTS = ("step", "writing", "start")
SHARES = (0.5, 0.4, 0.1)


@dataclass(frozen=True)
class Kill:
    """One SIGKILL and the state of the run at that moment."""

    moment: str
    """Moment of the kill: a step, the writing of a checkpoint, the start."""
    victims: str
    """"one" rank, or "all" processes."""
    step: int
    """Last step in the metrics."""
    checkpoint: int
    """Step of the latest checkpoint; -1 if there was none."""
    half_written: bool
    """Whether an unfinished checkpoint was left."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args, settings = parser.parse_known_args()
    steps = EVERY * (2 * args.kills + 2)
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        often = ["--steps", str(steps), "--checkpoint-every", str(EVERY), "--preview-every", str(5 * EVERY)]
        begin = ["toy", *merged(TINY, often, tiny_encoder(scratch, layers=2, width=64), settings)]
        left, killed = scratch / "left", scratch / "killed"
        log = scratch / "left.log"
        finish(launch([*begin, "--out", str(left)], args.processes, log), log)
        kills = stress(begin, killed, args.processes, args.kills, random.Random(args.seed))
        differences = compare(left, killed)
    report(kills, differences, steps)
    if args.json is not None:
        facts = {"kills": [asdict(kill) for kill in kills], "differences": differences, "steps": steps}
        write_text(args.json, json.dumps(manifest(processes=args.processes, seed=args.seed, **facts), indent=2) + "\n")
    sys.exit(bool(differences) or len(kills) < args.kills)


def stress(begin: list[str], run: Path, processes: int, count: int, dice: random.Random) -> list[Kill]:
    """Train to the end with ``count`` kills; returns the kills."""
    kills: list[Kill] = []
    log = run.with_suffix(".log")
    while True:
        there, old = latest(run), identities(run)
        job = launch(["--resume", str(run)] if there >= 0 else [*begin, "--out", str(run)], processes, log)
        if len(kills) == count:
            finish(job, log)
            return kills
        moment = dice.choices(MOMENTS, SHARES)[0]
        wait_for(moment, run, job, old, max(there, 0) + dice.randint(1, 2 * EVERY - 1), dice)
        if job.poll() is not None:
            finish(job, log)  # the run ended before the kill
            return kills
        workers = descendants(job.pid)
        one = len(workers) >= processes > 1 and dice.random() < 0.5
        kill([dice.choice(workers[:processes])] if one else [job.pid, *workers])
        job.wait()
        kill(workers)
        rows = metrics(run)
        half = any(path.is_dir() for path, _ in identities(run) - old)
        kills.append(Kill(moment, "one" if one else "all", rows[-1]["step"] if rows else 0, latest(run), half))
        sys.stderr.write(f"{len(kills):3} {kills[-1]}\n")


def wait_for(
    moment: str, run: Path, job: subprocess.Popen[bytes], old: set[Identity], target: int, dice: random.Random
) -> None:
    """Wait for the moment of the kill or the end of the run."""
    if moment == "start":
        time.sleep(dice.uniform(0, 3))
    while moment != "start" and job.poll() is None:
        new = {path for path, _ in identities(run) - old}
        if moment == "step" and run / METRICS in new and metrics(run)[-1:] and metrics(run)[-1]["step"] >= target:
            time.sleep(dice.uniform(0, 0.05))  # about a step
            return
        if moment == "writing" and any(path.is_dir() for path in new):
            time.sleep(dice.uniform(0, 0.01))  # about the time that writing takes
            return
        time.sleep(0.001 if moment == "writing" else 0.005)


def identities(run: Path) -> set[Identity]:
    """Return metrics and unfinished checkpoints with their inodes: a resumed run writes new files."""
    found = [run / METRICS, *(run / "checkpoints").glob(f".step-*{PARTIAL}*")]
    return {(path, path.stat().st_ino) for path in found if path.exists()}


def latest(run: Path) -> int:
    """Return the step of the latest checkpoint; -1 if there is none."""
    found = checkpoints(run)
    return int(found[-1].name.removeprefix("step-")) if found else -1


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process, children first."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    direct = [int(word) for word in children.read_text().split()] if children.exists() else []
    return direct + [below for child in direct for below in descendants(child)]


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def compare(left: Path, killed: Path) -> list[str]:
    """Return the differences between two finished runs."""
    ends = [find_checkpoint(run) for run in (left, killed)]
    found = [] if ends[0].name == ends[1].name else [f"last checkpoint: {ends[0].name}, {ends[1].name}"]
    for name in (MODEL, EMA, OPTIMIZER):
        a, b = (read_tensors(end / name) for end in ends)
        found += [
            f"{name}: {key}" for key in a.keys() | b.keys() if key not in a or key not in b or not equal(a[key], b[key])
        ]
    first, second = ([reproducible(row) for row in metrics(run)] for run in (left, killed))
    found += [f"metrics: {a} {b}" for a, b in zip_longest(first, second) if a != b]
    grids = [{path.name: path.read_bytes() for path in (run / "samples").glob("*.png")} for run in (left, killed)]
    found += [
        f"samples: {name}" for name in grids[0].keys() | grids[1].keys() if grids[0].get(name) != grids[1].get(name)
    ]
    return found


def report(kills: list[Kill], differences: list[str], steps: int) -> None:
    """Print a table of the kills, and the result."""
    counts = Counter((kill.moment, kill.victims) for kill in kills)
    sys.stdout.write("| kills | waited for | hit |\n| ---: | --- | --- |\n")
    for (moment, victims), count in sorted(counts.items()):
        sys.stdout.write(f"| {count} | {moment} | {victims} |\n")
    lost = sum(kill.step - max(kill.checkpoint, 0) for kill in kills)
    half = sum(kill.half_written for kill in kills)
    sys.stdout.write(
        f"\n{len(kills)} kills in {steps} steps: {lost} steps done again, {half} checkpoints left unfinished; "
    )
    sys.stdout.write("no difference\n" if not differences else f"{len(differences)} differences:\n")
    sys.stdout.writelines(f"  {difference}\n" for difference in differences[:20])


if __name__ == "__main__":
    main()
