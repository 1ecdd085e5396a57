"""Normalise-and-mix on a CPU against a naive implementation and the floor of its memory traffic, forward and backward.

    python benchmarks/mix.py [--arms depth joint uniform] [--out FILE.json]

The naive implementation converts every hidden state to float32, stacks the normalised copies and calls einsum. Sizes
are the paper's, with 1,024 tokens. The floor is the time to copy the bytes that a pass must read and write. Extra
memory is the peak beyond hidden states and result. Times are measured with freed memory kept by malloc, and without in
a new process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from reference import stack_normalise_einsum
from results import save
from torch import Tensor

from semantic_routing.common.device import keep_freed_memory
from semantic_routing.common.manifest import hardware
from semantic_routing.model.kernels import mix_cpu as native
from semantic_routing.model.routing import mix

LAYERS, BATCH, LENGTH, CHANNELS, DEPTHS = 36, 4, 256, 2560, 24
WEIGHTS = {"depth": (1, DEPTHS), "joint": (BATCH, DEPTHS), "uniform": (1, 1)}
TARGETS = {"forward": 5.0, "forward and backward": 5.0, "memory": 0.25}


def naive(weights: Tensor, hidden: Tensor) -> Tensor:
    return stack_normalise_einsum(weights, hidden).to(hidden.dtype)


def case(arm: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, hidden states and an upstream gradient."""
    torch.manual_seed(0)
    rows, depths = WEIGHTS[arm]
    hidden = (torch.randn(LAYERS, BATCH, LENGTH, CHANNELS) * 3 + 1).bfloat16()
    weights = torch.randn(rows, depths, LAYERS).softmax(-1)
    return weights, hidden, torch.randn(depths, BATCH, LENGTH, CHANNELS).bfloat16()


def seconds(run: Callable[[], object], repeats: int = 9) -> float:
    """Return the median seconds of a run, after two warm-up runs."""
    found = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])


def copying(size: int) -> float:
    """Return the seconds to copy: ``size`` bytes are read and written in total."""
    source, to = torch.empty(2, size // 2, dtype=torch.uint8)
    return seconds(lambda: to.copy_(source))


def times(arm: str) -> dict[str, float]:
    weights, hidden, upstream = case(arm)
    leaf = weights.clone().requires_grad_()
    found = {"floor": copying(hidden.nbytes + upstream.nbytes)}
    for name, function in (("naive", naive), ("ours", mix)):
        with torch.no_grad():
            found[f"{name} forward"] = seconds(lambda f=function: f(weights, hidden))
        found[f"{name} forward and backward"] = seconds(lambda f=function: f(leaf, hidden).backward(upstream))
    return found


def extra_memory(arm: str, name: str) -> int:
    """Return the peak bytes of a forward pass in this process, beyond hidden states and result."""
    weights, hidden, upstream = case(arm)
    mix(weights[:, :1], hidden[:, :1, :1])  # allocations of libraries on first use
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status("VmRSS")
    (naive if name == "naive" else mix)(weights, hidden)
    return status("VmHWM") - before - upstream.nbytes  # the result has the size of its gradient


def status(name: str) -> int:
    """Return a number of this process's memory status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def child(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=WEIGHTS, default=["depth", "joint", "uniform"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=2, metavar=("ARM", "WHICH"), help=argparse.SUPPRESS)
    parser.add_argument("--times", choices=WEIGHTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        sys.stdout.write(str(extra_memory(*args.memory)))
        return
    if args.times:
        sys.stdout.write(json.dumps(times(args.times)))
        return
    write = sys.stdout.write
    form = "torch" if native.library() is None else "tiles" if native.library().has_tiles() else "vectors"
    write(f"{hardware()}\nform {form}; milliseconds, ratio to naive, floors\n")
    rows = {}
    for arm in args.arms:
        row = {"malloc as it is": json.loads(child("--times", arm))}
        keep_freed_memory()
        row["freed memory kept"] = times(arm)
        for how, found in row.items():
            write(f"\n{arm}, {how}: floor {1e3 * found['floor']:.1f} ms\n")
            for part in ("forward", "forward and backward"):
                slow, fast = found[f"naive {part}"], found[f"ours {part}"]
                floors = fast / found["floor"] / (1 if part == "forward" else 2)
                wanted = f"   wanted >= {TARGETS[part]:g}x" if arm == "depth" else ""
                write(f"  {part:22} {1e3 * slow:7.1f} {1e3 * fast:7.1f}  {slow / fast:5.2f}x {floors:5.2f}{wanted}\n")
        extra = {name: int(child("--memory", arm, name)) for name in ("naive", "ours")}
        wanted = f"   wanted <= {TARGETS['memory']:g}" if arm == "depth" else ""
        write(f"  extra memory: naive {extra['naive'] / 2**20:.0f} MiB, ours {extra['ours'] / 2**20:.0f} MiB, ")
        write(f"{extra['ours'] / extra['naive']:.3f}{wanted}\n")
        rows[arm] = row | {"extra memory": extra}
    save(args, {"form": form, "rows": rows}, states=0)


if __name__ == "__main__":
    main()
