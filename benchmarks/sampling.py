"""Speed of guided sampling against the reference: the same network, weights, prompts and noise in one process.

    python benchmarks/sampling.py [--scale mid|paper] [--device cpu|cuda] [--out FILE.json]

For each arm: seconds of 50 guided Euler steps in the reference (text padded to 512 tokens and prepared at every step, a
float32 stack of hidden states, a dense mask, eager), in this program uncompiled and compiled, and the ratios that have
targets. On a GPU a compiled network is a CUDA graph; its seconds without the graph are measured, too. The floor is the
time of the network's matrix products at the rate of one large product measured here. Scale debug tries the program.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from reference import padded, velocity
from results import save
from torch import Tensor, nn

from semantic_routing.common.device import keep_freed_memory
from semantic_routing.common.manifest import hardware
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import DiT, DiTConfig
from semantic_routing.model.flops import count_image
from semantic_routing.model.runtime import compile_network, rounded_once
from semantic_routing.sampling.guidance import extrapolated, guided, join
from semantic_routing.sampling.samplers import euler, schedule
from semantic_routing.text.features import TextFeatures

SCALES = {
    "mid": DiTConfig(
        depth=8, width=512, heads=8, kv_heads=2, head_dim=64, mlp_width=2048, text_width=640, text_layers=36
    ),
    "paper": DiTConfig(),
    "debug": DiTConfig(
        depth=2, width=32, heads=2, kv_heads=1, head_dim=32, mlp_width=48, text_width=64, text_layers=2,
        fusedit_first_layer=0,
    ),
}  # fmt: skip
SIDES = {"mid": 32, "paper": 64, "debug": 4}  # of latents: 256, 1024 and 4 image tokens
TARGETS = {
    "debug": {},
    "mid": {"S2 reference / ours": (3.0, None), "S2 / B1": (None, 1.03), "S3 / B1": (None, 1.15)},
    "paper": {"S2 reference / ours": (1.5, None), "S2 / B1": (None, 1.01)},
}
TOKENS, GUIDANCE = 32, 6.0


def network(cfg: DiTConfig, device: torch.device) -> DiT:
    """Make a network with random weights in place of zero initialisation; backbones are equal for all arms."""
    torch.manual_seed(0)
    with torch.device(device):
        model = make_model(cfg).requires_grad_(False).eval()
        for p in model.parameters():
            if p.eq(0).all():
                nn.init.normal_(p, std=0.02)
    return model


def prompts(cfg: DiTConfig, batch: int, tokens: int, device: torch.device) -> TextFeatures:
    """Return random features in bfloat16 of prompts with up to ``tokens`` tokens."""
    lengths = torch.linspace(tokens * 2 // 3, tokens, batch).long()
    hidden = torch.randn(cfg.text_layers, batch, tokens, cfg.text_width, device=device, dtype=torch.bfloat16)
    return TextFeatures(hidden, (torch.arange(tokens) < lengths[:, None]).to(device))


def seconds(run: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    """Return the median seconds of a run."""
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def matrix_rate(device: torch.device, scale: str) -> float:
    """Return the FLOP/s of one bfloat16 product, a large one unless the scale is debug."""
    size = 128 if scale == "debug" else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds(lambda: a @ b, 3, device)
    return 2 * size**3 / seconds(lambda: a @ b, 10, device)


def measure(arm: str, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the seconds of each implementation for an arm, and the difference between the images."""
    cfg = replace(SCALES[args.scale], arm=arm)
    model = network(cfg, device)
    text, null = prompts(cfg, args.batch, TOKENS, device), prompts(cfg, 1, 16, device)
    x = torch.randn(args.batch, cfg.channels, SIDES[args.scale], SIDES[args.scale], device=device)
    times, found = schedule(args.steps), {}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16), rounded_once(model, True):
        slow = padded(join(text, null))
        reference = extrapolated(lambda x, t: velocity(model, slow, x, t).float(), GUIDANCE)
        ours = {"reference": lambda steps: euler(reference, x, steps)}
        ours["eager"] = lambda steps: euler(guided(model, text, null, GUIDANCE, times=steps), x, steps)
        pictures = {}
        for name in ("reference", "eager", "compiled"):
            if name == "compiled":
                compile_network(model)
                ours[name] = ours["eager"]
            began = time.perf_counter()
            ours[name](schedule(2))
            first = time.perf_counter() - began
            repeats = args.repeats if name == "compiled" else args.others
            found[name] = seconds(lambda run=ours[name]: run(times), repeats, device)
            pictures[name] = ours[name](schedule(4))
        found["compiling"] = first
        if model.use_cuda_graph:
            model.use_cuda_graph = False
            found["without a graph"] = seconds(lambda: ours["compiled"](times), args.repeats, device)
        change = pictures["compiled"] - pictures["reference"]
        found["difference"] = (change.norm() / (pictures["reference"] - x).norm()).item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4, help="prompts; guidance doubles them")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--others", type=int, default=3, help="repeats of the reference and of the uncompiled network")
    parser.add_argument("--arms", nargs="+", default=["penultimate", "depth", "joint"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    keep_freed_memory()
    rate = matrix_rate(device, args.scale)
    cfg = SCALES[args.scale]
    with torch.device("meta"):
        model = make_model(cfg)
        context = model.prepare_text(
            TextFeatures(torch.empty(cfg.text_layers, 1, TOKENS, cfg.text_width), torch.ones(1, TOKENS).bool())
        )
        products = count_image(model, 1, SIDES[args.scale], SIDES[args.scale], context).total
    floor = products * 2 * args.batch * args.steps / rate
    write = sys.stdout.write
    write(f"{hardware()}\nscale {args.scale}, {args.batch} prompts of {TOKENS} tokens, {args.steps} guided steps\n")
    write(f"floor {floor:.2f} s: {products / 1e9:.1f} GFLOP for each image and step at {rate / 1e12:.2f} TFLOP/s\n\n")
    write(f"{'':12} {'reference':>10} {'eager':>8} {'compiled':>9} {'ratio':>7} {'floors':>7} {'difference':>11}\n")
    rows: dict[str, dict[str, float]] = {}
    for arm in args.arms:
        row = rows[arm] = measure(arm, args, device)
        ratio, floors = row["reference"] / row["compiled"], row["compiled"] / floor
        write(f"{arm:12} {row['reference']:8.2f} s {row['eager']:6.2f} s {row['compiled']:7.2f} s {ratio:6.2f}x ")
        write(f"{floors:7.2f} {row['difference']:11.1e}\n")
    found = ratios(rows)
    for name, value in found.items():
        low, high = TARGETS[args.scale].get(name, (None, None))
        wanted = "" if low is None and high is None else f"   wanted {f'>= {low}' if low else f'<= {high}'}"
        write(f"{name:22} {value:6.3f}{wanted}\n")
    save(args, {"rows": rows, "ratios": found, "floor": floor, "rate": rate}, weights=0)


def ratios(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the ratios that have targets, and what CUDA graphs give."""
    found = {}
    if "depth" in rows:
        found["S2 reference / ours"] = rows["depth"]["reference"] / rows["depth"]["compiled"]
    for label, arm in (("S2", "depth"), ("S3", "joint")):
        if arm in rows and "penultimate" in rows:
            found[f"{label} / B1"] = rows[arm]["compiled"] / rows["penultimate"]["compiled"]
    for label, arm in (("B1", "penultimate"), ("S1", "time"), ("S2", "depth"), ("S3", "joint")):
        if "without a graph" in rows.get(arm, {}):
            found[f"{label} without a graph / with"] = rows[arm]["without a graph"] / rows[arm]["compiled"]
    return found


if __name__ == "__main__":
    main()
