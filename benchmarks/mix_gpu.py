"""Normalise-and-mix on a CUDA device against the speed of a copy and a naive implementation, forward and backward.

    python benchmarks/mix_gpu.py [--prompts 64] [--tokens 512] [--scale paper|debug] [--held] [--out FILE.json]

Sizes are the paper's: 36 layers of 2560 channels in bfloat16 to 24 blocks, with weights as in S2. A pass must read the
hidden states, write (forward) or read (backward) the mixes, and the moments; the share is these bytes a second over
those of a copy in the same run. The naive implementation converts every hidden state to float32, stacks the normalised
copies and calls einsum, for a few prompts at a time. All tensors are far larger than the caches. Times are medians by
CUDA events. With --held the variant of ``mix_held.py`` is timed beside the forward pass. Scale debug tries the program
without a GPU, under TRITON_INTERPRET=1; its times mean nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mix_held import held_forward, held_kernel
from reference import stack_normalise_einsum
from results import save
from sampling import seconds as wall_seconds
from torch import Tensor

from semantic_routing.common.device import pick_device
from semantic_routing.common.manifest import hardware

SIZES = {"paper": (36, 2560, 24), "debug": (5, 40, 3)}
"""Layers, channels and depths."""
TARGETS = {"forward": 0.75, "backward": 0.65}
NAIVE_TOKENS = 2048
"""Tokens of the naive implementation at a time: 0.8 GB for each float32 copy of their hidden states."""


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of back-to-back runs on the device, after three warm-up runs."""
    for _ in range(3):
        run()
    if not torch.cuda.is_available():
        return wall_seconds(run, repeats, torch.device("cpu"))
    marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for began, ended in marks:
        began.record()
        run()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) / 1e3 for began, ended in marks)


def fitting(prompts: int, tokens: int) -> int:
    """Return the number of prompts that fit in memory: hidden states, twice the mixes, 8 GB for the naive way."""
    layers, channels, depths = SIZES["paper"]
    each = 2 * tokens * channels * (layers + 2 * depths)
    free = torch.cuda.mem_get_info()[0]
    while prompts > 1 and prompts * each + 8e9 > free:
        prompts //= 2
    return prompts


def naive(weights: Tensor, hidden: Tensor, out: Tensor, grad: Tensor | None = None) -> None:
    """Run forward, and backward if ``grad`` is given, for a few prompts at a time."""
    some = max(1, NAIVE_TOKENS // hidden.shape[2])
    for b in range(0, hidden.shape[1], some):
        part = stack_normalise_einsum(weights, hidden[:, b : b + some])
        out[:, b : b + some] = part.detach()
        if grad is not None:
            part.backward(grad[:, b : b + some].float())


def timings(kernel: Any) -> dict[str, float]:
    """Return the milliseconds of every configuration that Triton's autotuner measured."""
    found = getattr(kernel, "configs_timings", {})
    return {str(config): times[0] for config, times in found.items() if times[0] < math.inf}  # inf: it does not fit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--scale", choices=SIZES, default="paper")
    parser.add_argument("--held", action="store_true", help="time the variant of mix_held.py, too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.scale == "paper" and not torch.cuda.is_available():
        sys.stderr.write("benchmarks/mix_gpu.py needs a CUDA device; benchmarks/mix.py measures a CPU\n")
        return 2
    prompts = fitting(args.prompts, args.tokens) if args.scale == "paper" else args.prompts
    found = measure(SIZES[args.scale], prompts, args.tokens, args.repeats, args.held)
    report(found, args.tokens)
    save(args, found, states=0)
    return 0


def measure(sizes: tuple[int, int, int], prompts: int, tokens: int, repeats: int, held: bool) -> dict[str, Any]:
    """Return all times, and their ratios to the copy and to the naive implementation."""
    from semantic_routing.model.kernels import mix_triton as gpu

    torch.manual_seed(0)
    device, (layers, channels, depths) = pick_device("auto"), sizes
    hidden = torch.randn(layers, prompts, tokens, channels, device=device, dtype=torch.bfloat16)
    for layer, scale in zip(hidden, torch.logspace(-1, 2, layers).tolist(), strict=True):
        layer.mul_(scale).add_(scale)
    grad = torch.randn(depths, prompts, tokens, channels, device=device, dtype=torch.bfloat16)
    weights = torch.randn(1, depths, layers, device=device).softmax(-1)
    out, mean, rstd = gpu.mix_forward(weights, hidden)
    copied = 2 * out.nbytes / seconds(lambda: out.copy_(grad), repeats)
    counted = hidden.nbytes + grad.nbytes + mean.nbytes + rstd.nbytes
    times = {
        "forward": seconds(lambda: gpu.mix_forward(weights, hidden), repeats),
        "backward": seconds(lambda: gpu.mix_backward(grad, hidden, mean, rstd), repeats),
    }
    kernels = {"forward": gpu.forward_kernel, "backward": gpu.backward_kernel}
    if held:
        times["forward, states held"] = seconds(lambda: held_forward(weights, hidden), repeats)
        kernels["forward, states held"] = held_kernel
    shares = {name: counted / taken / copied for name, taken in times.items()}
    leaf = weights.clone().requires_grad_()
    with torch.no_grad():
        times["naive forward"] = seconds(lambda: naive(weights, hidden, out), 3)
    times["naive forward and backward"] = seconds(lambda: naive(leaf, hidden, out, grad), 3)
    ours = gpu.mix_forward(weights, hidden)[0][:, :1].float()
    differences = {"naive": ((ours - out[:, :1].float()).norm() / ours.norm()).item()}
    if held:
        variant = held_forward(weights, hidden)[0][:, :1].float()
        differences["states held"] = ((ours - variant).norm() / ours.norm()).item()
    both = times["forward"] + times["backward"]
    return {
        "prompts": prompts,
        "bytes": counted,
        "copy bytes a second": copied,
        "seconds": times,
        "shares": shares,
        "wanted": TARGETS,
        "ratios": {
            "forward": times["naive forward"] / times["forward"],
            "forward and backward": times["naive forward and backward"] / both,
        },
        "differences": differences,
        "milliseconds of configurations": {name: timings(kernel) for name, kernel in kernels.items()},
        "configurations": {name: str(kernel.best_config) for name, kernel in kernels.items()},
    }


def report(found: dict[str, Any], tokens: int) -> None:
    """Print the measurements beside their targets."""
    write, times, size = sys.stdout.write, found["seconds"], found["bytes"]
    write(f"{hardware()}\n{found['prompts']} prompts of {tokens} tokens, {size / 1e9:.2f} GB a pass\n")
    write(f"copy {found['copy bytes a second'] / 1e12:.3f} TB/s\n")
    for name, share in found["shares"].items():
        write(f"{name:20} {1e3 * times[name]:8.3f} ms {size / times[name] / 1e12:6.3f} TB/s")
        write(f"   {share:5.3f} of the copy   wanted >= {TARGETS.get(name, TARGETS['forward'])}\n")
    for name, ratio in found["ratios"].items():
        write(f"naive {name:22} {1e3 * times[f'naive {name}']:8.1f} ms   {ratio:6.1f}x\n")
    for name, difference in found["differences"].items():
        write(f"difference from {name} {difference:.1e}\n")
    for name, config in found["configurations"].items():
        write(f"{name}: {config}\n")


if __name__ == "__main__":
    sys.exit(main())
