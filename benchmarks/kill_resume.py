"""Kills a training run at random moments, resumes it each time, and compares it with an undisturbed run.

    python benchmarks/kill_resume.py [--kills 30] [--processes 2] [--seed 0]

A small network trains on the toy world. All its processes get SIGKILL at random moments, also while a checkpoint is
being written, and the run resumes from its latest complete checkpoint. In the end weights, EMA, optimiser states and
metrics must equal those of an undisturbed run bit for bit; the exit code is then 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from semantic_routing.checkpoint.load import checkpoints, find_checkpoint
from semantic_routing.checkpoint.safetensors_storage import SafetensorsReader
from semantic_routing.common.config import to_dict
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.recipes import toy
from semantic_routing.training.tiny_lm import tiny_lm

FASTEST = 12
"""Largest number of steps between a start and the next kill."""


def small(steps: int) -> TrainConfig:
    """Return a configuration with steps of milliseconds and a checkpoint at every second step."""
    captions = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("star", "square", "circle")]
    encoder = tiny_lm(captions, layers=2, width=64, steps=5)
    cfg = toy("joint")
    model = replace(cfg.model, depth=2, width=64, heads=2, kv_heads=1, mlp_width=128)
    return replace(
        cfg, model=model, text=TextEncoderConfig(name_or_path=str(encoder)), steps=steps, batch=8, compile=False,
        precision="fp32", log_every=1, checkpoint_every=2, preview_every=0, device="cpu",
    )  # fmt: skip


def launch(arguments: list[str], processes: int, log: Path) -> list[subprocess.Popen[bytes]]:
    """Start the processes of a run with torchrun's environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "semantic_routing", "train", *arguments]
    with log.open("ab") as out:
        return [
            subprocess.Popen(command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=out, stderr=out)
            for rank in range(processes)
        ]


def lines(run: Path) -> list[dict[str, float]]:
    """Return the metrics that do not depend on the machine."""
    path = run / "metrics.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines() if row.endswith("}")] if path.is_file() else []
    return [{name: row[name] for name in ("step", "loss", "grad_norm", "router_entropy")} for row in rows]


def alive(ranks: list[subprocess.Popen[bytes]]) -> bool:
    return all(process.poll() is None for process in ranks)


def train(config: Path, run: Path, processes: int, kills: int, chance: random.Random) -> int:
    """Train to the end with up to ``kills`` kills; returns their number."""
    done = 0
    while True:
        begun = ["--resume", str(run)] if checkpoints(run) else ["--config", str(config), "--out", str(run)]
        ranks = launch(begun, processes, run.with_suffix(".log"))
        began, target = time.time(), chance.randint(1, FASTEST)
        if done < kills:
            first = len(lines(run))
            while alive(ranks) and not (lines(run) and (run / "metrics.jsonl").stat().st_mtime > began):
                time.sleep(0.005)
            first = min(first, len(lines(run)) - 1)
            while alive(ranks) and len(lines(run)) < first + target:
                time.sleep(0.002)
            time.sleep(chance.random() * 0.05)
            if alive(ranks):
                for process in ranks:
                    process.kill()
                done += 1
        codes = [process.wait() for process in ranks]
        if codes == [0] * processes:
            return done
        if any(code not in (0, -9) for code in codes):
            raise SystemExit(f"exit codes {codes}: {run.with_suffix('.log').read_text()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.json"
        config.write_text(json.dumps(to_dict(small(FASTEST * args.kills))))
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        train(config, whole, args.processes, 0, random.Random(0))
        began = time.perf_counter()
        done = train(config, killed, args.processes, args.kills, random.Random(args.seed))
        seconds = time.perf_counter() - began
        states = [
            SafetensorsReader(find_checkpoint(run), ["model", "ema", "optimizer"]).tensors() for run in (whole, killed)
        ]
        wrong = [name for name, x in states[0].items() if not torch.equal(x, states[1][name])]
        same = not wrong and states[0].keys() == states[1].keys() and lines(whole) == lines(killed)
        sys.stdout.write(
            f"{args.processes} processes, {len(lines(whole))} steps, killed {done} times in {seconds:.0f} s: "
            f"{len(states[0])} tensors and {len(lines(whole))} rows of metrics "
            f"{'are bitwise the same' if same else f'DIFFER ({wrong[:3]})'}\n"
        )
        sys.exit(0 if same and done == args.kills else 1)


if __name__ == "__main__":
    main()
