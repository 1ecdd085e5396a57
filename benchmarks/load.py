"""Speed of toy training and sampling beside busy processes, by how OpenMP's threads wait for each other.

    python benchmarks/load.py [--rounds 2] [--busy 0 1 2] [--spin default chosen 0 1000] [--json FILE]

Threads that wait at a barrier spin, which is fast while every thread has a core, and wasteful when another process has
it. ``GOMP_SPINCOUNT`` limits the turns, and ``chosen`` is what the commands choose when they begin. Every round
measures each setting in a process of its own, in rotation: steps a second of the compiled S2 training step, and images
a second of Euler sampling. Medians, and ratios to the default.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

STEPS, WARM_UP, PICTURES = 24, 8, 16
CHILD, DEFAULT, CHOSEN = "--child", "default", "chosen"


def child() -> None:
    """Measure in this process and print the numbers."""
    from semantic_routing.common.waiting import wait_without_spinning_if_busy

    if CHOSEN in sys.argv[1:]:
        wait_without_spinning_if_busy()  # before torch is imported
    from dataclasses import replace

    from semantic_routing.common.device import keep_freed_memory
    from semantic_routing.data.dataset import open_data
    from semantic_routing.data.loader import Loader
    from semantic_routing.training.recipes import TOY_SAMPLING, toy
    from semantic_routing.training.tiny_lm import tiny_lm, training_corpus
    from semantic_routing.training.trainer import Trainer

    keep_freed_memory()
    cfg = toy("depth")
    data = open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed)
    text = replace(cfg.text, name_or_path=str(tiny_lm(training_corpus(data))))
    with TemporaryDirectory() as scratch:
        trainer = Trainer(cfg, Path(scratch), text=text)
        loader = Loader(data, batch=cfg.batch, noise_shape=trainer.bundle.codec.latent_shape(cfg.image_size))
        times = []
        for step in range(STEPS):
            began = time.perf_counter()
            trainer.advance(trainer.prepare(loader.load(step)))
            times.append(time.perf_counter() - began)
        captions, names = data.captions(PICTURES), [(i, 0) for i in range(PICTURES)]
        sampling = replace(TOY_SAMPLING, sampler="euler", steps=10, batch=PICTURES)
        drawn = []
        for _ in range(4):
            began = time.perf_counter()
            trainer.bundle.sample(captions, names, sampling)
            drawn.append(time.perf_counter() - began)
    found = {"steps_per_s": 1 / median(times[WARM_UP:]), "images_per_s": PICTURES / median(drawn[1:])}
    sys.stdout.write(json.dumps(found) + "\n")


def measure(spin: str) -> dict[str, float]:
    """Run the measurement in a process with a setting of ``GOMP_SPINCOUNT``."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    if spin not in (DEFAULT, CHOSEN):
        environment["GOMP_SPINCOUNT"] = spin
    command = [sys.executable, __file__, CHILD, spin]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep ``count`` other processes computing while the context lasts."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--spin", nargs="+", default=[DEFAULT, CHOSEN, "0", "1000"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    each: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for turn in range(args.rounds):
        for count in args.busy:
            for spin in args.spin[turn % len(args.spin) :] + args.spin[: turn % len(args.spin)]:
                with busy(count):
                    for what, value in measure(spin).items():
                        each[count, spin, what].append(value)
    found = {key: median(values) for key, values in each.items()}
    first = args.spin[0]
    lines = ["| busy processes | GOMP_SPINCOUNT | training steps/s | to the first | images/s | to the first |"]
    lines.append("| ---: | --- | ---: | ---: | ---: | ---: |")
    for count in args.busy:
        for spin in args.spin:
            cells = []
            for what in ("steps_per_s", "images_per_s"):
                value = found[count, spin, what]
                cells += [f"{value:.2f}", f"{value / found[count, first, what]:.2f}"]
            lines.append(f"| {count} | {spin} | " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")
    if args.json:
        from semantic_routing.common.files import write_text
        from semantic_routing.common.manifest import manifest

        rows = [{"busy": c, "spin": s, "what": w, "values": v} for (c, s, w), v in each.items()]
        write_text(args.json, json.dumps({"rows": rows, "manifest": manifest(rounds=args.rounds)}, indent=2) + "\n")


if __name__ == "__main__":
    if CHILD in sys.argv[1:]:
        child()
    else:
        main()
