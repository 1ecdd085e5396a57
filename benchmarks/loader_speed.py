"""Time for worker processes to load an image, against decoding and resizing alone in the same number of processes.

    python benchmarks/loader_speed.py [--workers 2] [--pictures 512] [--batch 64] [--rounds 5] [--json FILE]

Writes the same JPEGs as tar shards and as Parquet row groups, and loads them as 256 x 256 images with captions and
noise. The floor is a pool of processes that decode the same bytes from memory and return nothing. Every round measures
all rows in turn; the medians of the rounds' ratios are printed, for wall-clock time and for the CPU time of all
processes, which other programs disturb less. Then one process reads an epoch in training order; the bytes that it
requests from the system are printed as a multiple of the size of the files.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import sys
import tarfile
import time
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from semantic_routing.common.files import write_text
from semantic_routing.common.images.decode import decode
from semantic_routing.common.manifest import manifest
from semantic_routing.data.dataset import DataConfig, Dataset, open_data
from semantic_routing.data.loader import Loader

SIZE, LATENT = 256, (16, 32, 32)
CAPTION = b"a picture that was made for a measurement"
GROUP = 16
"""Rows in each row group."""
WARM = 3
Seconds = tuple[float, float]
"""Wall-clock seconds, and CPU seconds of all processes, for each image."""


def write_shards(folder: Path, pictures: int, shards: int = 4) -> list[bytes]:
    """Write photograph-like JPEGs of 512 x 384 pixels with captions; returns their bytes."""
    rng = np.random.default_rng(0)
    made = []
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, pictures, shards):
                coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((512, 384), Image.Resampling.BICUBIC)).astype(np.int16)
                pixels = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG", quality=90)
                made.append(file.getvalue())
                for ending, content in ((".jpg", made[-1]), (".txt", CAPTION)):
                    member = tarfile.TarInfo(f"{i:09d}{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return made


def write_row_groups(folder: Path, pictures: list[bytes], files: int = 4) -> None:
    """Write the same images and captions as Parquet files."""
    for file in range(files):
        rows = pictures[file::files]
        table = pa.table({"jpg": rows, "txt": [CAPTION.decode()] * len(rows)})
        pq.write_table(table, folder / f"{file:05d}.parquet", row_group_size=GROUP)


def read_times(data: Dataset, folder: Path, batch: int, count: int) -> float:
    """Return the bytes read in one epoch in training order, as a multiple of the size of the files."""

    def asked() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = asked()
    for step in range(-(-count // batch)):
        data.load(step, batch, range(min(batch, count - step * batch)))
    return (asked() - before) / sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def decode_all(pictures: list[bytes]) -> Seconds:
    """Decode and resize; returns wall-clock and CPU seconds of this process."""
    began, used = time.perf_counter(), time.process_time()
    for picture in pictures:
        decode(picture, SIZE, SIZE)
    return time.perf_counter() - began, time.process_time() - used


def floor(pictures: list[bytes], workers: int) -> Seconds:
    """Decode all images in every process at the same time."""
    parts = [pictures] * workers
    with get_context("spawn").Pool(workers) as pool:
        pool.map(decode_all, [pictures[:8]] * workers, chunksize=1)
        taken = pool.map(decode_all, parts, chunksize=1)
    count = len(pictures) * workers
    return max(passed for passed, _ in taken) / count, sum(used for _, used in taken) / count


def processor_time() -> float:
    """Return the CPU seconds of this process and of its ended children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def fed(loader: Loader, batch: int, steps: int) -> Seconds:
    """Load batches as fast as possible; the start of the processes does not count."""
    used = processor_time()
    with closing(loader.batches()) as batches:
        for _ in range(WARM):
            next(batches)
    start = processor_time() - used
    used = processor_time()
    with closing(loader.batches()) as batches:
        for _ in range(WARM):
            next(batches)
        began = time.perf_counter()
        for _ in range(steps):
            next(batches)
        passed = time.perf_counter() - began
    return passed / (steps * batch), (processor_time() - used - start) / (steps * batch)


def summary(rounds: list[Seconds], floors: list[Seconds]) -> dict[str, float]:
    """Return the medians of the rounds, and of their ratios to the floor."""
    ratios = list(zip(rounds, floors, strict=True))
    return {
        "ms_passed": 1e3 * median(passed for passed, _ in rounds),
        "ms_processor": 1e3 * median(used for _, used in rounds),
        "ratio_passed": median(own[0] / least[0] for own, least in ratios),
        "ratio_processor": median(own[1] / least[1] for own, least in ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("workers", 2), ("pictures", 512), ("batch", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = max(args.workers * args.pictures // args.batch, 1)
    with TemporaryDirectory() as scratch:
        places = {name: Path(scratch) / name for name in ("tar", "parquet")}
        for place in places.values():
            place.mkdir()
        pictures = write_shards(places["tar"], args.pictures)
        write_row_groups(places["parquet"], pictures)
        data = {
            name: open_data(DataConfig(paths=(str(place),)), image_size=SIZE, seed=0) for name, place in places.items()
        }
        feeding: dict[str, Any] = {"batch": args.batch, "noise_shape": LATENT, "posterior": True, "ahead": 2}
        loaders = {name: Loader(one, workers=args.workers, **feeding) for name, one in data.items()}
        taken: dict[str, list[Seconds]] = {name: [] for name in ("floor", *loaders)}
        for _ in range(args.rounds):
            taken["floor"].append(floor(pictures, args.workers))
            for name, loader in loaders.items():
                taken[name].append(fed(loader, args.batch, steps))
        read = {name: read_times(data[name], places[name], args.batch, len(pictures)) for name in places}
    results = {name: summary(rounds, taken["floor"]) for name, rounds in taken.items()}
    kilobytes = sum(map(len, pictures)) / len(pictures) / 1e3
    sys.stdout.write(f"{args.workers} workers, JPEGs of 512 x 384 pixels, {kilobytes:.0f} kB; for each image:\n")
    for name, row in results.items():
        sys.stdout.write(
            f"{name:8} {row['ms_passed']:6.2f} ms of time ({row['ratio_passed']:4.2f} of the floor), "
            f"{row['ms_processor']:6.2f} ms of CPU ({row['ratio_processor']:4.2f} of the floor)\n"
        )
    for name, times in read.items():
        sys.stdout.write(f"{name:8} {times:6.2f} times its bytes are read in an epoch by one process\n")
    if args.json is not None:
        facts = manifest(
            results=results, rounds=taken, read_times=read, kilobytes=kilobytes, settings=vars(args) | {"json": ""}
        )
        write_text(args.json, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
