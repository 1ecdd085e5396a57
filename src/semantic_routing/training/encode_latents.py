"""``semroute data encode --latents``: the posteriors of a run's images, computed before training and cached on disk."""

from __future__ import annotations

import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod

import numpy as np
import torch
from tqdm import tqdm

from semantic_routing.common.device import pick_device
from semantic_routing.common.distributed import World, open_world
from semantic_routing.common.errors import BadData
from semantic_routing.common.files import write_text
from semantic_routing.common.sizes import parse_bytes
from semantic_routing.data.dataset import Dataset, open_data
from semantic_routing.data.latents import FACTS, KeptLatents, facts_file
from semantic_routing.data.latents_writer import LatentWriter
from semantic_routing.data.streams import Picture, RecordStream, Row, WorldStream
from semantic_routing.model.codec import VAECodec, make_codec
from semantic_routing.model.codec_identity import rounding_facts, vae_facts
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.encode_arguments import EncodeArguments, check_room
from semantic_routing.training.encode_text import configuration
from semantic_routing.training.latents import check_kept, kept_latents
from semantic_routing.training.run_folder import claimed_run
from semantic_routing.training.validation import held_out

Job = Callable[[], list[Picture]]
"""Function that reads a record's pictures; raises BadData for a record that training skips."""


def encode_latents(args: EncodeArguments) -> str:
    """Encode the images whose latents are not in the folder yet; return a summary, only on the first process.

    Under torchrun every process encodes its share. Raises ValueError, before anything is encoded, for a run without a
    VAE, for a folder with latents of another VAE, and if the folder would become too large.
    """
    cfg = configuration(args)
    if cfg.codec.kind != "vae":
        raise ValueError("the run trains on pixels: latents can only be cached for a run with a VAE (codec.kind vae)")
    kept = kept_latents(cfg.codec)
    if kept is None:
        raise ValueError("the run caches no latents on disk: give --keep-on-disk, and train with --codec.keep-on-disk")
    with open_world() as world:
        device = world.everywhere(lambda: pick_device(cfg.device))
        codec = world.everywhere(lambda: make_codec(cfg.codec, device))
        assert isinstance(codec, VAECodec)
        data = world.everywhere(lambda: open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed, latents=kept))
        counts = picture_counts(data, cfg)
        size = posterior_bytes(counts, codec)
        summary = f"{counts.total():,} pictures, {size / 2**30:.2f} GiB of latents in {kept.folder}"
        if args.size_only:
            return summary if world.first else ""
        world.everywhere(lambda: check_room(size, cfg.codec.keep_on_disk_bytes, summary))
        with claimed_run(world, kept.folder):
            words = world.on_first(partial(_begin, kept, codec, cfg))
            if world.first:
                tqdm.write("\n".join([summary, *words]))
            encoder = Encoder(codec, device, LatentWriter(kept.folder, parse_bytes(cfg.codec.keep_on_disk_bytes)))
            new, there, bad = encoder.run(jobs(data, cfg, kept), counts.total(), args.batch, world)
    if not world.first:
        return ""
    left_out = f"; {bad:,} records cannot be used" if bad else ""
    return f"{new:,} pictures encoded into {kept.folder}; {there:,} were there already{left_out}"


def _begin(kept: KeptLatents, codec: VAECodec, cfg: TrainConfig) -> list[str]:
    """Record the VAE in an empty folder, or check that an existing folder belongs to it; return messages."""
    if kept.facts() is not None:
        return check_kept(cfg.codec, codec)
    write_text(kept.folder / FACTS, facts_file(vae_facts(codec, cfg.codec), rounding_facts(codec, cfg.codec)))
    return []


def picture_counts(data: Dataset, cfg: TrainConfig) -> Counter[tuple[int, int]]:
    """Return the number of images of each height and width that a run may read; duplicates count.

    For the generated worlds, which are unlimited, these are the images of the run's steps.
    """
    counts: Counter[tuple[int, int]] = Counter()
    for stream in data.streams:
        if isinstance(stream, RecordStream):
            counts += {shape: n * (1 + stream.how.flip) for shape, n in stream.shape_counts().items()}
        else:
            counts[cfg.image_size, cfg.image_size] += cfg.steps * cfg.batch
    if cfg.validation.every:
        counts[cfg.image_size, cfg.image_size] += cfg.validation.samples
    return counts


def posterior_bytes(counts: Counter[tuple[int, int]], codec: VAECodec) -> int:
    """Return the number of bytes of the posteriors of images."""
    return sum(n * 2 * prod(codec.latent_shape(*shape)) for shape, n in counts.items()) * codec.vae.dtype.itemsize


def jobs(data: Dataset, cfg: TrainConfig, kept: KeptLatents) -> Iterator[Job]:
    """Yield the reading of every record that a run may use: of training, and of validation."""
    for stream in data.streams:
        if isinstance(stream, RecordStream):
            yield from (partial(stream.pictures, *place) for place in stream.places())
        else:
            assert isinstance(stream, WorldStream)
            yield from (partial(_drawn, stream.load, position) for position in range(cfg.steps * cfg.batch))
    if cfg.validation.every:
        pictures = held_out(cfg.validation, cfg.data, cfg.image_size, kept)
        yield from (partial(_drawn, pictures, i) for i in range(cfg.validation.samples))


def _drawn(load: Callable[[int], Row], number: int) -> list[Picture]:
    row = load(number)
    return [Picture(row.image, row.picture, row.posterior)]


@dataclass(frozen=True)
class Encoder:
    """Encoder of images into a folder."""

    codec: VAECodec
    device: torch.device
    writer: LatentWriter

    def run(self, work: Iterator[Job], pictures: int, batch: int, world: World) -> tuple[int, int, int]:
        """Encode this process's share of the work, ``batch`` images at a time.

        Returns, summed over all processes, the numbers of images that were encoded, that were in the folder already,
        and of unusable records.
        """
        share = islice(work, world.rank, None, world.count)
        with tqdm(
            total=pictures // world.count, desc="Encoding pictures", unit="picture", disable=not world.first
        ) as bar:
            found = world.everywhere(lambda: self._encode(share, batch, bar))
        encoded, there, bad = (sum(numbers) for numbers in zip(*world.all_gather(found), strict=True))
        return encoded, there, bad

    def _encode(self, work: Iterable[Job], batch: int, bar: tqdm) -> tuple[int, int, int]:
        there = bad = 0
        waiting: dict[tuple[int, ...], dict[bytes, np.ndarray]] = defaultdict(dict)
        with self.writer:
            for pictures in ahead(work, batch):
                bad += pictures is None
                for picture in pictures or ():
                    if picture.posterior is not None or picture.key in self.writer:
                        there += 1
                        bar.update()
                        continue
                    same = waiting[picture.image.shape]
                    same[picture.key] = picture.image
                    if len(same) >= batch:
                        bar.update(self._add(same))
            for same in waiting.values():
                bar.update(self._add(same))
        return self.writer.written, there, bad

    def _add(self, pictures: dict[bytes, np.ndarray]) -> int:
        """Encode images of one size and pass them to the writer; return their number."""
        if not pictures:
            return 0
        images = torch.from_numpy(np.stack([*pictures.values()])).to(self.device)
        posteriors = self.codec.posterior(images).cpu()
        if not posteriors.isfinite().all():
            raise ValueError(f"the VAE's latents overflow in {self.codec.vae.dtype}: use --codec.dtype float32")
        for key, posterior in zip(pictures, posteriors, strict=True):
            self.writer.add(key, posterior)
        pictures.clear()
        return len(posteriors)


def ahead(work: Iterable[Job], most: int) -> Iterator[list[Picture] | None]:
    """Yield the results of jobs in order, None for records that cannot be used; threads run ``most`` jobs ahead."""
    waiting: deque[Future[list[Picture] | None]] = deque()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    with ThreadPoolExecutor(threads) as pool:
        for job in work:
            waiting.append(pool.submit(_usable, job))
            if len(waiting) > most:
                yield waiting.popleft().result()
        yield from (one.result() for one in waiting)


def _usable(job: Job) -> list[Picture] | None:
    try:
        return job()
    except BadData:
        return None
