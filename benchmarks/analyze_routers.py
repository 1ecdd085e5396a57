"""Time and memory of ``semroute analyze`` on routers of the paper's size.

    python benchmarks/analyze_routers.py [--arms depth joint] [--json FILE]

For each arm it writes a sparse checkpoint of the paper recipe: a safetensors file that declares all 2.24 billion
parameters (9 GB in float32) and holds only those of the router. Then it runs the command in a new process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from semantic_routing.checkpoint.load import EMA, STATE
from semantic_routing.common.config import to_dict
from semantic_routing.common.files import write_text
from semantic_routing.common.manifest import manifest
from semantic_routing.model.build import make_model
from semantic_routing.training.recipes import paper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["depth", "joint"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.stdout.write("| arm | weights (GB) | figures | seconds | processor seconds | peak memory (MiB) |\n")
    sys.stdout.write("| --- | ---: | ---: | ---: | ---: | ---: |\n")
    results = {}
    for arm in args.arms:
        with TemporaryDirectory() as folder:
            run = Path(folder) / arm
            size = write_checkpoint(run, arm)
            found = measured(run, Path(folder) / "figures") | {"weights": size}
        results[arm] = found
        sys.stdout.write(
            f"| {arm} | {size / 1e9:.2f} | {found['figures']} | {found['seconds']:.1f} "
            f"| {found['processor_seconds']:.1f} | {found['peak_memory'] / 2**20:.0f} |\n"
        )
    if args.json is not None:
        write_text(args.json, json.dumps(manifest(results=results), indent=2) + "\n")


def write_checkpoint(run: Path, arm: str) -> int:
    """Write a sparse checkpoint that holds only the router's EMA weights; returns its declared bytes."""
    cfg = paper(arm)
    with torch.device("meta"):
        model = make_model(cfg.model)
    folder = run / "checkpoints" / "step-0000001"
    folder.mkdir(parents=True)
    header, places, end = {}, {}, 0
    for name, p in model.named_parameters():
        begin, end = end, end + 4 * prod(p.shape)
        header[name] = {"dtype": "F32", "shape": list(p.shape), "data_offsets": [begin, end]}
        places[name] = begin
    text = json.dumps(header).encode()
    with (folder / EMA).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        for name, p in model.named_parameters():
            if name.startswith("router."):
                file.seek(first + places[name])
                file.write(nn.init.normal_(torch.empty(p.shape), std=0.3).numpy().tobytes())
        file.truncate(first + end)
    state = {"step": 1, "config": to_dict(cfg), "files": [EMA]}
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    return end


def measured(run: Path, out: Path) -> dict[str, float]:
    """Run the command and return its time, memory and number of figures."""
    command = [sys.executable, "-m", "semantic_routing", "analyze", str(run), "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory": 1024 * usage.ru_maxrss,
        "figures": len(list(out.glob("*.png"))),
    }


if __name__ == "__main__":
    main()
