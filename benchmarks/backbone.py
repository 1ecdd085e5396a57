"""Utilisation of the paper's network: its counted FLOPs a second against the measured rate of one matrix product.

    python benchmarks/backbone.py [--batch 32] [--arm depth] [--scale paper|debug] [--out FILE.json]

The forward pass is that of sampling: 512x512 images, weights in bfloat16, the whole network compiled, text prepared
before. Forward and backward are those of training: 256x256 images, weights in float32, each block compiled. Both have a
batch of 32 and 32 text tokens. The rate is that of one large bfloat16 product, measured between the two. Scale debug
tries the program on any device, with images of 32x32 and 16x16.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from results import save
from sampling import SCALES, matrix_rate, network, prompts, seconds

from semantic_routing.common.device import pick_device
from semantic_routing.common.distributed import World
from semantic_routing.common.manifest import hardware
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import DiTConfig
from semantic_routing.model.flops import META, blank_features, count, count_image
from semantic_routing.model.runtime import compile_network, rounded_once
from semantic_routing.training.parallelize import ParallelConfig, parallelize

WANTED = 0.55
TOKENS = 32
SIDES = {"paper": (64, 32), "debug": (4, 2)}
"""Sides of the latents in sampling and in training."""


def forward(cfg: DiTConfig, batch: int, side: int, device: torch.device) -> float:
    """Measure the seconds of a forward pass."""
    model = network(cfg, device)
    compile_network(model)
    x = torch.randn(batch, cfg.channels, side, side, device=device)
    t = torch.rand(batch, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16), rounded_once(model, True):
        context = model.prepare_text(prompts(cfg, batch, TOKENS, device), t)
        for _ in range(3):
            model(x, t, context)
        return seconds(lambda: model(x, t, context), 10, device)


def forward_and_backward(cfg: DiTConfig, batch: int, side: int, device: torch.device) -> float:
    """Measure the seconds of forward and backward, text preparation included."""
    model = network(cfg, device).requires_grad_().train()
    model = parallelize(model, ParallelConfig(), World(device=device), bf16=True, compiled=True)
    x = torch.randn(batch, cfg.channels, side, side, device=device)
    t = torch.rand(batch, device=device)
    features = prompts(cfg, batch, TOKENS, device)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(x, t, model.prepare_text(features, t)).square().mean()
        model.zero_grad()
        loss.backward()
        return loss

    for _ in range(2):
        step()
    return seconds(step, 5, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--arm", default="depth")
    parser.add_argument("--scale", choices=SIDES, default="paper")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.scale == "paper" and not torch.cuda.is_available():
        sys.stderr.write("benchmarks/backbone.py needs a CUDA device: the paper's network takes minutes elsewhere\n")
        return 2
    device, cfg = pick_device("auto"), replace(SCALES[args.scale], arm=args.arm)
    large, small = SIDES[args.scale]
    with META:
        shapes = make_model(cfg)
    features = blank_features(cfg, args.batch, TOKENS, META)
    text, context = count(lambda: shapes.prepare_text(features, torch.empty(args.batch, device=META)))
    sampled, trained = (f"{8 * side}x{8 * side}" for side in (large, small))
    counted = {
        f"forward, {sampled}": count_image(shapes, args.batch, large, large, context).total,
        f"forward and backward, {trained}": 3 * (count_image(shapes, args.batch, small, small, context) + text).total,
    }
    times = {f"forward, {sampled}": forward(cfg, args.batch, large, device)}
    rate = matrix_rate(device, args.scale)
    times[f"forward and backward, {trained}"] = forward_and_backward(cfg, args.batch, small, device)
    shares = {name: counted[name] / times[name] / rate for name in times}
    sys.stdout.write(
        f"{hardware()}\narm {args.arm}, {args.batch} images; a product runs at {rate / 1e12:.0f} TFLOP/s\n"
    )
    for name, share in shares.items():
        sys.stdout.write(f"{name:32} {1e3 * times[name]:8.1f} ms {counted[name] / 1e12:7.1f} TFLOP ")
        sys.stdout.write(f"{share:6.3f} of the rate   wanted >= {WANTED}\n")
    save(args, {"flop": counted, "seconds": times, "rate": rate, "shares": shares, "wanted": WANTED}, weights=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
