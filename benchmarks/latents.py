"""Time of a training step on a VAE's latents that are kept on disk, against encoding every batch anew.

    python benchmarks/latents.py [--pictures 128] [--batch 16] [--steps 8] [--rounds 3] [--json FILE]

A random VAE of factor 8 with 16 channels (a tenth of Stable Diffusion 3's width) and the debug recipe's network read
256 x 256 crops of JPEGs in tar shards. ``semroute data encode --latents`` fills a folder; then every round trains with
and without it in turn, in this process. The loader alone is timed as well, which reads and decodes. Medians.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL
from loader_speed import write_shards

from semantic_routing.cli.main import main as semroute
from semantic_routing.common.config import to_dict
from semantic_routing.common.files import write_text
from semantic_routing.common.manifest import manifest
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.data.sources.index_writer import build
from semantic_routing.model.codec import CodecConfig
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.latents import kept_latents
from semantic_routing.training.loop import batches
from semantic_routing.training.recipes import debug
from semantic_routing.training.tiny_lm import tiny_lm, training_corpus
from semantic_routing.training.trainer import Trainer


def small_vae() -> AutoencoderKL:
    """Return a random VAE with the layers of Stable Diffusion 3's, and narrower ones."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16, norm_num_groups=8,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def configuration(folder: Path, batch: int) -> TrainConfig:
    """Return the run's configuration, with data, VAE and text encoder in ``folder``."""
    small_vae().save_pretrained(folder / "vae")
    build([str(folder / "shards")], folder / "index", workers=1)
    cfg = debug("depth")
    data = DataConfig(paths=(str(folder / "shards"),), index=str(folder / "index"))
    made = tiny_lm(training_corpus(open_data(data, image_size=256, seed=cfg.seed)), layers=2, width=64, steps=5)
    return replace(
        cfg, data=data, image_size=256, batch=batch, preview_every=0, device="cpu",
        codec=CodecConfig(kind="vae", name_or_path=str(folder / "vae")),
        text=replace(cfg.text, name_or_path=str(made)),
        model=replace(cfg.model, channels=16, patch=4),
    )  # fmt: skip


def measure(cfg: TrainConfig, out: Path, steps: int) -> tuple[float, float]:
    """Return the seconds of a training step, and of loading its batch."""
    data = open_data(cfg.data, image_size=256, seed=cfg.seed, latents=kept_latents(cfg.codec))
    trainer = Trainer(cfg, out)
    loaded = batches(data, cfg, trainer.world, trainer.bundle.codec, 0)
    loading, whole = [], []

    def timed(act: Callable[[], object]) -> float:
        start = time.perf_counter()
        act()
        return time.perf_counter() - start

    for _ in range(steps):
        loading.append(timed(lambda: next(loaded)))
    for _ in range(steps):
        whole.append(timed(lambda: trainer.advance(trainer.prepare(next(loaded)))))
    return median(whole[1:]), median(loading[1:])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pictures", 128), ("batch", 16), ("steps", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "shards").mkdir()
        write_shards(folder / "shards", args.pictures)
        cfg = configuration(folder, args.batch)
        write_text(folder / "config.json", json.dumps(to_dict(cfg)))
        start = time.perf_counter()
        semroute(["data", "encode", str(folder / "config.json"), "--latents", "--keep-on-disk", str(folder / "kept")])
        encoding = time.perf_counter() - start
        kept = replace(cfg, codec=replace(cfg.codec, keep_on_disk=str(folder / "kept")))
        rounds = [[measure(one, folder / "run", args.steps) for one in (cfg, kept)] for _ in range(args.rounds)]
        size = sum(path.stat().st_size for path in (folder / "kept").iterdir())
    (step, load), (kept_step, kept_load) = [
        [median(x) for x in zip(*way, strict=True)] for way in zip(*rounds, strict=True)
    ]
    found = {
        "step_ms": step * 1e3, "step_kept_ms": kept_step * 1e3, "load_ms": load * 1e3, "load_kept_ms": kept_load * 1e3,
        "encode_ms_per_picture": encoding / args.pictures * 1e3, "bytes_per_picture": size / args.pictures,
    }  # fmt: skip
    for name, value in found.items():
        sys.stdout.write(f"{name:<24}{value:>12,.1f}\n")
    if args.json:
        write_text(args.json, json.dumps(found | {"manifest": manifest(config=vars(args) | {"json": ""})}, indent=2))


if __name__ == "__main__":
    main()
