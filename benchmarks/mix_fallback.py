"""Time the mix in plain torch, as it runs without a C compiler, as a multiple of the C library's time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from semantic_routing.common.device import keep_freed_memory
from semantic_routing.model.kernels import mix, mix_cpu

CASES = {"toy, a training batch": (8, 64, 32, 128, 6), "28 layers of 1024, 2 prompts": (28, 2, 128, 1024, 8)}
"""Layers, batch, tokens, channels and depths."""


def fastest(runs: int, *calls: Callable[[], object]) -> list[float]:
    """Return each call's least processor time in seconds; the calls take turns."""
    least = [float("inf")] * len(calls)
    for _ in range(runs):
        for i, call in enumerate(calls):
            start = time.process_time()
            call()
            least[i] = min(least[i], time.process_time() - start)
    return least


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    for name, (layers, batch, length, channels, depths) in CASES.items():
        hidden = torch.randn(layers, batch, length, channels)
        weights = torch.rand(1, depths, layers).softmax(-1)
        grad = torch.randn(depths, batch, length, channels)
        _, mean, rstd = mix_cpu.mix_forward(weights, hidden, mix.LN_EPS)
        slow, quick, slow_back, quick_back = fastest(
            7,
            lambda h=hidden, w=weights: mix._torch_forward(w, h),
            lambda h=hidden, w=weights: mix_cpu.mix_forward(w, h, mix.LN_EPS),
            lambda g=grad, h=hidden, m=mean, r=rstd: mix._torch_backward(g, h, m, r),
            lambda g=grad, h=hidden, m=mean, r=rstd: mix_cpu.mix_backward(g, h, m, r),
        )
        both = (slow + slow_back) / (quick + quick_back)
        print(f"{name}: forward {slow / quick:.1f}, forward and backward {both:.1f}")  # noqa: T201


if __name__ == "__main__":
    main()
