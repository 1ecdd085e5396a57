"""The normalise-and-mix on a CUDA device against the speed of a copy, forward and backward, and the naive one.

    python benchmarks/mix_gpu.py [--prompts 64] [--tokens 512] [--out FILE.json]

At the paper's size: 36 layers of 2560 channels in bfloat16 to 24 depths, S2's weights. A pass must read the states,
and write (forward) or read (backward) as many depths, and the moments; the share is those bytes a second over those
that a copy in the same run reads and writes. Naive: every state to float32, a stack of the normalised copies, an
einsum, a few prompts at a time. All tensors are far larger than the caches, so nothing is found there from before.
Times are medians by CUDA events.
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
from reference import stack_normalise_einsum
from results import save
from torch import Tensor

from semantic_routing.common.manifest import hardware

LAYERS, CHANNELS, DEPTHS = 36, 2560, 24
TARGETS = {"forward": 0.75, "backward": 0.65}
NAIVE_TOKENS = 2048
"""Tokens that the naive way takes at a time: 0.8 GB for each float32 copy of their states."""


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a run on the device, after three others, with no pause between them."""
    for _ in range(3):
        run()
    marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for began, ended in marks:
        began.record()
        run()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) / 1e3 for began, ended in marks)


def fitting(prompts: int, tokens: int) -> int:
    """As many of the prompts as memory holds: states, twice the depths, and 8 GB for the naive way."""
    each = 2 * tokens * CHANNELS * (LAYERS + 2 * DEPTHS)
    free = torch.cuda.mem_get_info()[0]
    while prompts > 1 and prompts * each + 8e9 > free:
        prompts //= 2
    return prompts


def naive(weights: Tensor, hidden: Tensor, out: Tensor, grad: Tensor | None = None) -> None:
    """Forward, and backward where there is an incoming gradient, a few prompts at a time."""
    some = max(1, NAIVE_TOKENS // hidden.shape[2])
    for b in range(0, hidden.shape[1], some):
        part = stack_normalise_einsum(weights, hidden[:, b : b + some])
        out[:, b : b + some] = part.detach()
        if grad is not None:
            part.backward(grad[:, b : b + some].float())


def timings(kernel: Any) -> dict[str, float]:
    """Milliseconds of every configuration that was measured to choose one."""
    found = getattr(kernel, "configs_timings", {})
    return {str(config): times[0] for config, times in found.items() if times[0] < math.inf}  # where it fits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks/mix_gpu.py needs a CUDA device; benchmarks/mix.py measures a CPU\n")
        return 2
    from semantic_routing.model.kernels import mix_triton as gpu

    torch.manual_seed(0)
    prompts = fitting(args.prompts, args.tokens)
    sizes = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(LAYERS, prompts, args.tokens, CHANNELS, **sizes)
    for layer, scale in zip(hidden, torch.logspace(-1, 2, LAYERS).tolist(), strict=True):
        layer.mul_(scale).add_(scale)
    grad = torch.randn(DEPTHS, prompts, args.tokens, CHANNELS, **sizes)
    weights = torch.randn(1, DEPTHS, LAYERS, device="cuda").softmax(-1)
    out, mean, rstd = gpu.mix_forward(weights, hidden)

    copied = 2 * out.nbytes / seconds(lambda: out.copy_(grad), args.repeats)
    counted = hidden.nbytes + grad.nbytes + mean.nbytes + rstd.nbytes
    times = {
        "forward": seconds(lambda: gpu.mix_forward(weights, hidden), args.repeats),
        "backward": seconds(lambda: gpu.mix_backward(grad, hidden, mean, rstd), args.repeats),
    }
    leaf = weights.clone().requires_grad_()
    with torch.no_grad():
        times["naive forward"] = seconds(lambda: naive(weights, hidden, out), 3)
    times["naive forward and backward"] = seconds(lambda: naive(leaf, hidden, out, grad), 3)
    ours = gpu.mix_forward(weights, hidden)[0][:, :1].float()
    difference = ((ours - out[:, :1].float()).norm() / ours.norm()).item()

    write = sys.stdout.write
    write(f"{hardware()}\n{prompts} prompts of {args.tokens} tokens, {counted / 1e9:.2f} GB a pass\n")
    write(f"copy {copied / 1e12:.3f} TB/s\n")
    shares = {}
    for name, wanted in TARGETS.items():
        shares[name] = counted / times[name] / copied
        write(f"{name:10} {1e3 * times[name]:8.3f} ms {counted / times[name] / 1e12:6.3f} TB/s")
        write(f"   {shares[name]:5.3f} of the copy   wanted >= {wanted}\n")
    both = times["forward"] + times["backward"]
    ratios = {
        "forward": times["naive forward"] / times["forward"],
        "forward and backward": times["naive forward and backward"] / both,
    }
    for name, ratio in ratios.items():
        write(f"naive {name:22} {1e3 * times[f'naive {name}']:8.1f} ms   {ratio:6.1f}x\n")
    write(f"difference from naive {difference:.1e}\n")
    kernels = {"forward": gpu.forward_kernel, "backward": gpu.backward_kernel}
    for name, kernel in kernels.items():
        write(f"{name}: {kernel.best_config}\n")
    save(
        args,
        {
            "prompts": prompts,
            "bytes": counted,
            "copy bytes a second": copied,
            "seconds": times,
            "shares": shares,
            "wanted": TARGETS,
            "ratios": ratios,
            "difference": difference,
            "milliseconds of configurations": {name: timings(kernel) for name, kernel in kernels.items()},
        },
        states=0,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
