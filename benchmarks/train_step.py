"""Time of a training step against the reference, in one process, and the floor of its matrix products.

    python benchmarks/train_step.py [--scale toy|paper|debug] [--device cpu|cuda] [--out FILE.json]

toy: the complete step of the toy recipe. The reference is eager autocast with torch's Muon; then, added in turn: freed
memory kept, batched Muon, compilation.

paper: the backbone at the paper's size with AdamW and 256x256 images; hidden states are given (150 of 512 tokens on
average). The reference pads to 512 tokens and keeps a float32 stack of the hidden states and a dense mask. This program
pads to the longest prompt and compiles the blocks. Peak memory is printed too. debug: the same with a tiny network, to
try the program.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from reference import padded, velocity
from results import save
from sampling import SCALES, matrix_rate, network, seconds
from torch.optim import Muon

import semantic_routing.training.optim
from semantic_routing.common.device import keep_freed_memory
from semantic_routing.common.distributed import World
from semantic_routing.common.manifest import hardware
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.data.loader import Loader
from semantic_routing.flow import path, velocity_loss
from semantic_routing.model.dit import DiTConfig
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.features import TextFeatures
from semantic_routing.training.parallelize import ParallelConfig, parallelize
from semantic_routing.training.recipes import toy
from semantic_routing.training.tiny_lm import tiny_lm
from semantic_routing.training.trainer import Trainer

Rows = dict[str, dict[str, float]]
TARGETS = {"toy": {"time": 3.0}, "paper": {"time": 1.8, "memory": 1 / 0.6}, "debug": {}}


def toy_rows(steps: int) -> tuple[Rows, float]:
    """Return the seconds of a step in each variant, and the FLOPs of the blocks in one step."""
    data = open_data(DataConfig(), image_size=32, seed=0)
    folder = tiny_lm(data.captions(2000), steps=5)
    cfg = replace(toy("depth"), text=TextEncoderConfig(name_or_path=str(folder), dtype="bfloat16"), compile=False)
    loader = Loader(data, batch=cfg.batch, noise_shape=(3, 32, 32))
    batches = [loader.load(step) for step in range(4)]
    rows: Rows = {}

    def measure(name: str, **changes: bool) -> Trainer:
        with TemporaryDirectory() as scratch:
            trainer = Trainer(replace(cfg, **changes), Path(scratch))
            began = time.perf_counter()
            trainer.advance(trainer.prepare(batches[0]))
            first = time.perf_counter() - began
            for batch in batches[:3]:
                trainer.advance(trainer.prepare(batch))
            taken = []
            for i in range(steps):
                began = time.perf_counter()
                trainer.advance(trainer.prepare(batches[i % len(batches)]))
                taken.append(time.perf_counter() - began)
        rows[name] = {"time": sorted(taken)[steps // 2], "first": first}
        return trainer

    batched = semantic_routing.training.optim.BatchedMuon
    semantic_routing.training.optim.BatchedMuon = Muon
    measure("eager autocast")
    keep_freed_memory()
    measure("freed memory kept")
    semantic_routing.training.optim.BatchedMuon = batched
    measure("Muon by batches")
    trainer = measure("compiled", compile=True)
    weights = sum(p.numel() for p in trainer.bundle.model.blocks.parameters() if p.ndim == 2)
    return rows, 6 * weights * cfg.batch * (cfg.image_size // cfg.model.patch) ** 2


def paper_rows(steps: int, device: torch.device, batch: int, cfg: DiTConfig) -> tuple[Rows, float]:
    """Return the same as ``toy_rows`` for the paper's size on a GPU, with gigabytes of peak memory."""
    torch.manual_seed(0)
    lengths = (torch.distributions.Exponential(1 / 150).sample((batch,)) + 1).clamp(max=512).long()
    lengths = (lengths * (150 / lengths.float().mean())).long().clamp(1, 512)
    longest = -(-int(lengths.max()) // 16) * 16
    hidden = torch.randn(cfg.text_layers, batch, longest, cfg.text_width, device=device, dtype=torch.bfloat16)
    features = TextFeatures(hidden, (torch.arange(longest) < lengths[:, None]).to(device))
    x, noise, t = (*torch.randn(2, batch, 16, 32, 32, device=device).unbind(), torch.rand(batch, device=device))
    rows: Rows = {}

    def measure(name: str, predict: Callable[..., torch.Tensor], model: torch.nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

        def step() -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                predicted = predict(path(x, noise, t), t)
            loss = velocity_loss(predicted, x - noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        step()
        step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rows[name] = {"time": seconds(step, steps, device)}
        if device.type == "cuda":
            rows[name]["memory"] = torch.cuda.max_memory_allocated() / 1e9

    model = network(cfg, device).requires_grad_().train()
    measure("reference", partial(velocity, model, padded(features)), model)
    del model
    model = network(cfg, device).requires_grad_().train()
    model = parallelize(model, ParallelConfig(), World(device=device), bf16=True, compiled=True)
    measure("ours", lambda x, t: model(x, t, model.prepare_text(features)), model)
    image = sum(p.numel() for n, p in model.blocks.named_parameters() if p.ndim == 2 and ".kv." not in n)
    return rows, 6 * image * batch * 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=TARGETS, default="toy")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="of paper")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.scale == "toy":
        rows, products = toy_rows(args.steps)
    else:
        rows, products = paper_rows(args.steps, device, args.batch, replace(SCALES[args.scale], arm="depth"))
    floor = products / matrix_rate(device, args.scale)
    first, *_, last = rows.values()
    sys.stdout.write(f"{hardware()}\nfloor (products of the blocks with their weights): {1e3 * floor:.1f} ms\n")
    for name, row in rows.items():
        more = "".join(f"   {key} {value:.1f}" for key, value in row.items() if key != "time")
        sys.stdout.write(f"{name:20} {1e3 * row['time']:8.1f} ms {first['time'] / row['time']:6.2f}x ")
        sys.stdout.write(f"{row['time'] / floor:6.1f} floors{more}\n")
    for key, wanted in TARGETS[args.scale].items():
        if key in last:
            sys.stdout.write(f"{key}: {first[key] / last[key]:.2f}, wanted >= {wanted:.2f}\n")
    save(args, {"rows": rows, "floor": floor}, weights=0)


if __name__ == "__main__":
    main()
