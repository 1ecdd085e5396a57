"""The toy training step: eager autocast, freed memory kept, blocks compiled; and the floor of its products.

    python benchmarks/train_step.py [--steps 20]

Prints milliseconds a step of the same step in one process, ratios to the first, and the time that the step's
matrix products would take at the rate measured here for one large product.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from semantic_routing.data.loader import Loader
from semantic_routing.data.sources import DataConfig, open_data
from semantic_routing.device import keep_freed_memory
from semantic_routing.manifest import hardware
from semantic_routing.recipes import toy
from semantic_routing.text_encoder import TextEncoderConfig
from semantic_routing.tiny_lm import tiny_lm
from semantic_routing.train import Trainer


def seconds(trainer: Trainer, batches: list, steps: int) -> float:
    for batch in batches[:3]:
        trainer.advance(trainer.prepare(batch))
    began = time.perf_counter()
    for i in range(steps):
        trainer.advance(trainer.prepare(batches[i % len(batches)]))
    return (time.perf_counter() - began) / steps


def matrix_rate() -> float:
    """Multiply-adds times two a second, of one bfloat16 product."""
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    for _ in range(3):
        a @ b
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    return 20 * 2 * 2048**3 / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    data = open_data(DataConfig(), image_size=32, seed=0)
    folder = tiny_lm(data.captions(2000), steps=5)
    cfg = replace(toy("depth"), text=TextEncoderConfig(name_or_path=str(folder), dtype="bfloat16"), compile=False)
    loader = Loader(data, batch=cfg.batch, noise_shape=(3, 32, 32))
    batches = [loader.load(step) for step in range(4)]
    with TemporaryDirectory() as scratch:
        out = Path(scratch)
        rows = {"eager": seconds(Trainer(cfg, out), batches, args.steps)}
        kept = keep_freed_memory()
        rows[f"freed memory kept ({kept})"] = seconds(Trainer(cfg, out), batches, args.steps)
        compiled = Trainer(replace(cfg, compile=True), out)
        began = time.perf_counter()
        compiled.advance(compiled.prepare(batches[0]))
        first = time.perf_counter() - began
        rows["blocks compiled"] = seconds(compiled, batches, args.steps)
    blocks = sum(p.numel() for p in compiled.bundle.model.blocks.parameters())
    tokens = cfg.batch * (cfg.image_size // cfg.model.patch) ** 2
    floor = 6 * blocks * tokens / matrix_rate()
    sys.stdout.write(f"{hardware()}\nbatch {cfg.batch}, {tokens} tokens, {blocks / 1e6:.2f} M weights in blocks\n")
    for name, time_ in rows.items():
        ratio = rows["eager"] / time_
        sys.stdout.write(f"{name:28} {1e3 * time_:7.1f} ms   {ratio:4.2f}x   {time_ / floor:4.1f} floors\n")
    sys.stdout.write(f"floor (products of the blocks) {1e3 * floor:5.1f} ms; first compiled step {first:.1f} s\n")


if __name__ == "__main__":
    main()
