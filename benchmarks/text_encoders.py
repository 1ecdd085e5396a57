"""Time of a toy training step on SmolLM2's states, against one on the tiny language model's.

    python benchmarks/text_encoders.py [--steps 10] [--rounds 5] [--json FILE]

Every round trains the same batches with each encoder in turn, in this process. In the first round the captions are
encoded, later their states are kept in memory. The first round also compiles and is left out of the step's time.
Medians.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from semantic_routing.common.config import to_dict
from semantic_routing.common.device import keep_freed_memory
from semantic_routing.common.files import write_text
from semantic_routing.common.manifest import manifest
from semantic_routing.data.dataset import Dataset, open_data
from semantic_routing.data.loader import Loader
from semantic_routing.text.architecture import text_shape
from semantic_routing.text.config import TINY
from semantic_routing.text.source import SMOLLM2
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.recipes import toy
from semantic_routing.training.tiny_lm import tiny_lm, training_corpus
from semantic_routing.training.trainer import Trainer


def configuration(encoder: str, data: Dataset) -> TrainConfig:
    """Return the toy recipe with a text encoder, whose states are all kept."""
    cfg = toy("depth")
    name = str(tiny_lm(training_corpus(data))) if encoder == TINY else encoder
    text = replace(cfg.text, name_or_path=name, keep="3GiB")
    shape = text_shape(text)
    model = replace(cfg.model, text_width=shape.width, text_layers=len(shape.layers))
    return replace(cfg, text=text, model=model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_freed_memory()
    base = toy("depth")
    data = open_data(base.data, image_size=base.image_size, seed=base.seed)
    seconds: dict[str, list[tuple[float, float]]] = {TINY: [], SMOLLM2: []}
    encoding = {}
    with TemporaryDirectory() as scratch:
        trainers = {name: Trainer(configuration(name, data), Path(scratch)) for name in seconds}
        latent = trainers[TINY].bundle.codec.latent_shape(base.image_size)
        loader = Loader(data, batch=base.batch, noise_shape=latent)
        batches = [loader.load(step) for step in range(args.steps)]
        for turn in range(args.rounds + 1):
            for name, trainer in trainers.items():
                times = []
                for batch in batches:
                    began = time.perf_counter()
                    inputs = trainer.prepare(batch)
                    prepared = time.perf_counter()
                    trainer.advance(inputs)
                    times.append((prepared - began, time.perf_counter() - prepared))
                if turn:
                    seconds[name] += times
                else:
                    encoding[name] = median(first for first, _ in times)
    found = {
        name: {
            "encoding": encoding[name],
            "kept": median(first for first, _ in each),
            "network": median(second for _, second in each),
            "step": median(first + second for first, second in each),
        }
        for name, each in seconds.items()
    }
    ratio = found[SMOLLM2]["step"] / found[TINY]["step"]
    lines = [
        "| text encoder | encode a batch | read kept states | network | step with kept states |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | " + " | ".join(f"{1000 * x:.0f} ms" for x in parts.values()) + " |"
            for name, parts in found.items()
        ),
        f"\nA step on {SMOLLM2} takes {ratio:.2f} times as long as one on the {TINY} language model.\n",
    ]
    sys.stdout.write("\n".join(lines))
    if args.json:
        facts = manifest(config=to_dict(base), steps=args.steps, rounds=args.rounds)
        write_text(args.json, json.dumps({"seconds": found, "ratio": ratio, "manifest": facts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
