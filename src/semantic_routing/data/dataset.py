"""The training data of a run: what it is made of, and its rows at random access."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path

from semantic_routing.common.images.decode import Limits
from semantic_routing.data.captions import CaptionChoice
from semantic_routing.data.draws import stream_seed
from semantic_routing.data.order import Mixture
from semantic_routing.data.sidecar import RECAPTION, Sidecar
from semantic_routing.data.sources.discover import SHAPES, WORLDS
from semantic_routing.data.sources.index import open_records
from semantic_routing.data.streams import Reading, RecordStream, Row, ShapesStream, Stream

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run is trained on, and how it is read."""

    paths: tuple[str, ...] = (SHAPES,)
    """The toy world "shapes", or WebDataset shards, Parquet files, manifests or folders: paths, patterns or URLs.
    A folder of your own that has the toy world's name is "./shapes"."""
    weights: tuple[float, ...] = ()
    """How often each path comes, such as 70 20 10; by default each record of all paths once an epoch."""
    index: str = ""
    """Folder of the index written by `semroute data index`; by default where that command puts it."""
    caption_keys: tuple[str, ...] = ()
    """Captions to choose from, such as txt recaption; by default the first of txt, text, caption, prompt."""
    caption_weights: tuple[float, ...] = ()
    """How often each caption key is chosen where a record has several; by default all alike."""
    sidecar: str = ""
    """Parquet or JSONL file with key and caption, whose captions have the caption key "recaption"."""
    buckets: bool = False
    """Crop to the nearest of several aspect ratios instead of the square; a batch has one, the area stays."""
    bucket_multiple: int = 32
    """Pixels that the sides of buckets are multiples of."""
    flip: bool = False
    """Mirror half of the pictures; captions that tell left from right then become wrong."""
    min_side: int = 0
    """Pixels that the shorter side of a picture must have; others count as damaged."""
    max_aspect: float = 16.0
    """How many times as long as wide a picture may be; others count as damaged."""
    max_pixels: int = 2**26
    """Pixels from which a picture counts as a decompression bomb."""
    max_damaged: float = 0.1
    """Share of damaged records beyond which the run stops."""
    window: int = 16
    """Shards that are read from at any time; their records are shuffled among each other."""
    workers: int = 0
    """Processes of each rank that read and decode; 0 does that in the training process."""
    ahead: int = 2
    """Batches that each of them keeps ready."""

    def __post_init__(self) -> None:
        if not self.paths or not all(self.paths):
            raise ValueError('data.paths is empty; give "shapes" or the path of your data')
        if self.weights and len(self.weights) != len(self.paths):
            raise ValueError(f"{len(self.weights)} weights for {len(self.paths)} paths; give one for each path")
        if SHAPES in self.paths and len(self.paths) > 1 and not self.weights:
            raise ValueError("the toy world has no end, so it has no share by size: give data.weights")
        if SHAPES in self.paths and self.buckets:
            raise ValueError("the toy world is square; leave out data.buckets")
        if not 0 <= self.max_damaged <= 1:
            raise ValueError(f"max_damaged is {self.max_damaged}; it is a share from 0 to 1")
        for name, least in (("window", 1), ("workers", 0), ("ahead", 1), ("bucket_multiple", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if RECAPTION in self.caption_keys and not self.sidecar:
            raise ValueError(f'captions of the key "{RECAPTION}" come from a sidecar; give data.sidecar')
        if self.sidecar and self.caption_keys and RECAPTION not in self.caption_keys:
            raise ValueError(f'no caption would come from the sidecar; add "{RECAPTION}" to data.caption_keys')
        self.limits()
        self.choice()

    def limits(self) -> Limits:
        """Which pictures are decoded."""
        return Limits(min_side=self.min_side, max_aspect=self.max_aspect, max_pixels=self.max_pixels)

    def choice(self) -> CaptionChoice:
        """Which captions are taken: with a sidecar and no keys, its own where it has one."""
        return CaptionChoice(self.caption_keys, self.caption_weights, prefer=RECAPTION if self.sidecar else "")


class Dataset:
    """All rows of a run, by step and number in the batch: a pure function of the configuration and the seed."""

    def __init__(self, cfg: DataConfig, streams: Sequence[Stream], *, image_size: int) -> None:
        """Streams in proportion to ``cfg.weights``; see ``open_data``."""
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

    def captions(self, count: int) -> list[str]:
        """Up to ``count`` captions to watch the training by, from all streams in turn."""
        found = [stream.captions(count) for stream in self.streams]
        mixed = chain.from_iterable(zip_longest(*found))
        return list(islice((caption for caption in mixed if caption is not None), count))


def open_data(cfg: DataConfig, *, image_size: int, seed: int) -> Dataset:
    """Open the sources of a run; ValueError for what is missing, not indexed or without captions.

    Args:
        cfg: The data.
        image_size: Side of the square pictures in pixels.
        seed: Of the run: decides the order and all that is random about a sample.
    """
    if image_size < 1:
        raise ValueError(f"pictures of {image_size} pixels cannot be made; ask for a size of at least 1")
    how = Reading(
        size=image_size,
        window=cfg.window,
        choice=cfg.choice(),
        sidecar=Sidecar(cfg.sidecar) if cfg.sidecar else None,
        limits=cfg.limits(),
        flip=cfg.flip,
        multiple=cfg.bucket_multiple if cfg.buckets else 0,
    )
    for world in WORLDS:
        if world in cfg.paths and os.path.exists(world):
            _LOG.warning("%s means the toy world; what lies here under that name is ./%s", world, world)
    index = Path(cfg.index) if cfg.index else None
    groups = [[path] for path in cfg.paths] if cfg.weights else [list(cfg.paths)]
    streams: list[Stream] = []
    for number, paths in enumerate(groups):
        own = stream_seed(seed, number)
        if paths == [SHAPES]:
            streams.append(ShapesStream(own, image_size))
        else:
            stream = RecordStream([open_records(path, index) for path in paths], own, how)
            stream.check_captions()
            streams.append(stream)
    return Dataset(cfg, streams, image_size=image_size)
