"""The training data of a run: its configuration, and its rows at random access."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.decode import Limits
from semantic_routing.data.captions import CaptionChoice
from semantic_routing.data.draws import stream_seed
from semantic_routing.data.latents import KeptLatents
from semantic_routing.data.order import Mixture
from semantic_routing.data.sidecar import RECAPTION, Sidecar
from semantic_routing.data.sources.index import open_records
from semantic_routing.data.sources.records import RecordSource
from semantic_routing.data.streams import Reading, RecordStream, Row, Stream, WorldStream
from semantic_routing.toy.worlds import SHAPES, WORLDS

_LOG = logging.getLogger(__name__)
FIRST = 16
"""Records of each source whose keys are compared before training."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data, and how it is read."""

    paths: tuple[str, ...] = (SHAPES,)
    """The toy world "shapes", the world of words "words", or WebDataset shards, Parquet files, manifests or folders:
    paths, patterns or URLs. For your own folder with such a name write "./shapes"."""
    weights: tuple[float, ...] = ()
    """Relative frequency of each path, such as 70 20 10; by default every record of all paths is used once per
    epoch."""
    captions: int = 0
    """Only for the generated worlds: number of different captions, the same for every seed, each with an unlimited
    number of images; 0 generates new captions all the time. With a limit, a language model encodes each caption only
    once (text.keep_on_disk)."""
    index: str = ""
    """Folder of the index written by `semroute data index`; by default the same as that command's."""
    caption_keys: tuple[str, ...] = ()
    """Caption keys to choose from, such as txt recaption; by default the first of txt, text, caption, prompt."""
    caption_weights: tuple[float, ...] = ()
    """Relative frequency of each caption key among those that a record has; equal by default."""
    sidecar: str = ""
    """Parquet or JSONL file with the columns key and caption; its captions get the caption key "recaption"."""
    buckets: bool = False
    """Crop to the nearest of several aspect ratios with about the same area; all images of a batch have the same
    one."""
    bucket_multiple: int = 32
    """Sides of buckets are multiples of this number of pixels."""
    flip: bool = False
    """Mirror half of the images; captions that mention left or right become wrong."""
    min_side: int = 0
    """Minimum of an image's shorter side in pixels; smaller images count as damaged."""
    max_aspect: float = 16.0
    """Maximum aspect ratio of an image, long side by short side; others count as damaged."""
    max_pixels: int = 2**26
    """Maximum number of pixels of an image; larger images count as decompression bombs."""
    max_damaged: float = 0.1
    """Maximum share of damaged records; above it the run stops."""
    window: int = 16
    """Number of open shards, whose records are shuffled together."""
    workers: int = 0
    """Worker processes per rank that read and decode; 0 uses the training process."""
    ahead: int = 2
    """Number of batches that each worker prefetches."""

    def __post_init__(self) -> None:
        if not self.paths or not all(self.paths):
            raise ValueError('data.paths is empty; give "shapes" or the path of your data')
        if self.weights and len(self.weights) != len(self.paths):
            raise ValueError(f"{len(self.weights)} weights for {len(self.paths)} paths; give one for each path")
        for world in WORLDS.keys() & set(self.paths):
            if len(self.paths) > 1 and not self.weights:
                raise ValueError(f"{WORLDS[world].title} is unlimited, so it has no share by size: give data.weights")
            if self.buckets:
                raise ValueError(f"{WORLDS[world].title} is square; leave out data.buckets")
        if self.captions and not WORLDS.keys() & set(self.paths):
            raise ValueError("data.captions is for generated worlds; leave it out for your own data")
        if not 0 <= self.max_damaged <= 1:
            raise ValueError(f"max_damaged is {self.max_damaged}; it must be from 0 to 1")
        for name, least in (("captions", 0), ("window", 1), ("workers", 0), ("ahead", 1), ("bucket_multiple", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if RECAPTION in self.caption_keys and not self.sidecar:
            raise ValueError(f'captions of the key "{RECAPTION}" come from a sidecar; give data.sidecar')
        if self.sidecar and self.caption_keys and RECAPTION not in self.caption_keys:
            raise ValueError(f'no caption key uses the sidecar; add "{RECAPTION}" to data.caption_keys')
        self.limits()
        self.choice()

    def limits(self) -> Limits:
        """Return the limits of images that are decoded."""
        return Limits(min_side=self.min_side, max_aspect=self.max_aspect, max_pixels=self.max_pixels)

    def choice(self) -> CaptionChoice:
        """Return the choice of captions; without keys, captions of the sidecar come first."""
        return CaptionChoice(self.caption_keys, self.caption_weights, prefer=RECAPTION if self.sidecar else "")


class Dataset:
    """All rows of a run by step and index in the batch: a pure function of configuration and seed."""

    def __init__(self, cfg: DataConfig, streams: Sequence[Stream], *, image_size: int) -> None:
        """Mix ``streams`` by ``cfg.weights``; see ``open_data``."""
        self.cfg, self.image_size = cfg, image_size
        self.streams = tuple(streams)
        self._mixture = Mixture(cfg.weights if len(self.streams) > 1 else (1.0,))

    def load(self, step: int, batch: int, rows: range) -> list[Row]:
        """Load the given rows of the batch of a step.

        Without buckets, rows are at positions ``step * batch + row`` of the mixture. With buckets, the mixture chooses
        the stream of the whole batch, and the stream chooses its bucket.
        """
        if step < 0 or batch < 1 or not 0 <= rows.start <= rows.stop <= batch:
            raise ValueError(f"rows {rows.start} to {rows.stop} of {batch} at step {step}; expected some of a batch")
        if self.cfg.buckets:
            number, turn = self._mixture.locate(step)
            bucket, turn = self.streams[number].turns.locate(turn)
            return [self._row(number, turn * batch + row, bucket) for row in rows]
        places = [self._mixture.locate(step * batch + row) for row in rows]
        return [self._row(number, place) for number, place in places]

    def _row(self, number: int, position: int, bucket: int = 0) -> Row:
        return replace(self.streams[number].load(position, bucket), stream=number)

    def captions(self, count: int, *, trained: bool = False) -> list[str]:
        """Return up to ``count`` captions from all streams in turn.

        Those of generated worlds are of the evaluation split, for previews, or with ``trained`` of the training split.
        """
        found = [
            stream.texts(count) if trained and isinstance(stream, WorldStream) else stream.captions(count)
            for stream in self.streams
        ]
        mixed = chain.from_iterable(zip_longest(*found))
        return list(islice((caption for caption in mixed if caption is not None), count))


def open_data(cfg: DataConfig, *, image_size: int, seed: int, latents: KeptLatents | None = None) -> Dataset:
    """Open the data sources of a run. Raises ValueError if data is missing, not indexed or without captions.

    Args:
        cfg: The data.
        image_size: Side of the square images in pixels.
        seed: Seed of the run, for the order of samples and their random numbers.
        latents: Cached latents; images that have some are not decoded.
    """
    if image_size < 1:
        raise ValueError(f"the image size is {image_size} pixels; use at least 1")
    how = Reading(
        size=image_size,
        window=cfg.window,
        choice=cfg.choice(),
        sidecar=Sidecar(cfg.sidecar) if cfg.sidecar else None,
        limits=cfg.limits(),
        flip=cfg.flip,
        multiple=cfg.bucket_multiple if cfg.buckets else 0,
        latents=latents,
    )
    for world in WORLDS:
        if world in cfg.paths and os.path.exists(world):
            title = WORLDS[world].title
            _LOG.warning("%s means %s; for the folder of that name write ./%s", world, title, world)
    index, sources = Path(cfg.index) if cfg.index else None, list[RecordSource]()
    groups = [[path] for path in cfg.paths] if cfg.weights else [list(cfg.paths)]
    streams: list[Stream] = []
    for number, paths in enumerate(groups):
        own = stream_seed(seed, number)
        if paths[0] in WORLDS:  # then alone: a world is never without weights beside other paths
            streams.append(WorldStream(paths[0], own, image_size, latents, cfg.captions))
        else:
            opened = [open_records(path, index) for path in paths]
            sources += opened
            stream = RecordStream(opened, own, how)
            stream.check_captions()
            streams.append(stream)
    if how.sidecar is not None and len(sources) > 1:
        _check_keys(how.sidecar, sources)
    return Dataset(cfg, streams, image_size=image_size)


def _check_keys(sidecar: Sidecar, sources: Sequence[RecordSource]) -> None:
    """Raise ValueError if the first records of two sources have one key, under which a sidecar has captions."""
    seen: dict[str, RecordSource] = {}
    for source in sources:
        keys = set()
        for index in range(min(FIRST, len(source))):
            with suppress(BadData):
                keys.add(source.read(index).key)
        for key in keys:
            if sidecar.names_source(key, source.name) or not sidecar.captions(key):
                continue
            if (other := seen.setdefault(key, source)) is not source:
                raise ValueError(
                    f"{other.name} and {source.name} both have the key {key!r}, so {sidecar.path} does not say whose "
                    "caption it holds: caption them together, with semroute data recaption, or train on one of them"
                )
