"""Starts the tiny training runs of ``kill_stress.py`` and ``train_throughput.py`` through the command line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from semantic_routing.toy.captions import prompts
from semantic_routing.training.tiny_lm import tiny_lm

TINY = shlex.split(
    "--batch 8 --no-compile --precision fp32 --log-every 1 --preview-every 0 --preview.steps 2 --preview.batch 4 "
    "--model.depth 2 --model.width 32 --model.heads 2 --model.kv-heads 1 --model.head-dim 32 --model.mlp-width 48"
)
"""Options of a toy run with steps of milliseconds."""


def tiny_encoder(scratch: Path, layers: int, width: int) -> list[str]:
    """Make a barely trained language model of these sizes; returns the option that selects it."""
    captions = [drawn.caption for drawn in prompts(0, 300)]
    folder = tiny_lm(captions, layers=layers, width=width, steps=5, cache_dir=scratch)
    return ["--text.name-or-path", str(folder)]


def merged(*parts: list[str]) -> list[str]:
    """Merge options; a later one replaces an earlier one of the same name."""
    options: dict[str, list[str]] = {}
    for word in (word for part in parts for word in part):
        if word.startswith("--"):
            options[name := word] = []
        else:
            options[name].append(word)
    return [word for name, values in options.items() for word in (name, *values)]


def launch(args: list[str], processes: int, log: Path) -> subprocess.Popen[bytes]:
    """Start ``semroute train`` with one thread for each process and its output in a file."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "semantic_routing", "train", *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=env)


def finish(job: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a run; RuntimeError with the end of its log if it fails."""
    if job.wait():
        output = log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the run ended with {job.returncode}: ... {output[-8000:]}")


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's metrics."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
