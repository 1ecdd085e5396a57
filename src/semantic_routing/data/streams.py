"""Endless streams of images with captions, with random access: from records in shards, and from generated worlds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, Shaped, UInt8

from semantic_routing.common.errors import BadData, TrainingFailed
from semantic_routing.common.images.decode import Limits, decode
from semantic_routing.data.buckets import assign, bucket_shapes, turns
from semantic_routing.data.captions import CaptionChoice
from semantic_routing.data.damage import Skipped
from semantic_routing.data.draws import another, sample_rng
from semantic_routing.data.latents import KeptLatents, pixels_key, record_key
from semantic_routing.data.order import Mixture, ShardOrder, locate
from semantic_routing.data.sidecar import RECAPTION, Sidecar
from semantic_routing.data.sources.records import Record, RecordSource
from semantic_routing.toy.captions import Sample
from semantic_routing.toy.redraw import redrawn
from semantic_routing.toy.scenes import Dice
from semantic_routing.toy.worlds import WORLDS

CAPTIONS_SEED = 0
"""Seed of a world's captions where their number is limited."""
ATTEMPTS = 32
"""Records tried for one row: the first half from its own shard, then from all shards."""
Image = UInt8[np.ndarray, "H W 3"]
Posterior = Shaped[np.ndarray, "2 C h w"]


@dataclass(frozen=True)
class Row:
    """One row of a batch."""

    image: Image
    """Pixels; black if they were not decoded, because ``posterior`` is kept."""
    caption: str
    seed: int
    """Seed of its stream; (seed, sample, epoch) is the key of the row's random numbers."""
    epoch: int
    sample: int
    """Number in its stream."""
    key: str = ""
    """Key of the record; of the replacement if the sample's own record was skipped."""
    skipped: tuple[Skipped, ...] = ()
    stream: int = 0
    """Number of its stream in the mixture."""
    picture: bytes = b""
    """Key of its picture among kept latents; empty for data without any."""
    posterior: Posterior | None = None
    """Kept posterior of its picture, if there is one."""


@runtime_checkable
class Stream(Protocol):
    """Protocol of one source of a mixture."""

    turns: Mixture
    """The bucket of each batch."""

    def __len__(self) -> int:
        """Return the number of samples in one epoch."""
        ...

    def load(self, position: int, bucket: int = 0) -> Row:
        """Load the row at a position (from 0) of a bucket's stream."""
        ...

    def captions(self, count: int) -> list[str]:
        """Return up to ``count`` captions for previews."""
        ...


class WorldStream:
    """The training split of a world of ``WORLDS``; its first epoch is longer than any run."""

    LENGTH = 2**40

    def __init__(self, world: str, seed: int, size: int, latents: KeptLatents | None = None, captions: int = 0) -> None:
        """``captions`` is their number, the same for every seed, with unlimited images each; 0 means no limit."""
        self.name, self.seed, self.size, self.latents, self.limit = world, seed, size, latents, captions
        self.world = WORLDS[world]
        self.turns = Mixture((1.0,))
        self._captioned = lru_cache(maxsize=captions)(self._sample)

    def __reduce__(self) -> tuple[type[WorldStream], tuple[str, int, int, KeptLatents | None, int]]:
        return WorldStream, (self.name, self.seed, self.size, self.latents, self.limit)

    def __len__(self) -> int:
        return self.LENGTH

    def load(self, position: int, bucket: int = 0) -> Row:
        """Generate the row at a position; it is a function of the sample's number."""
        epoch, sample = locate(self.seed, position, self.LENGTH)
        drawn = self.draw(sample)
        return with_kept(Row(drawn.image, drawn.caption, self.seed, epoch, sample), self.latents)

    def draw(self, sample: int) -> Sample:
        """Draw the sample of a number, whose picture is rendered where it is used."""
        if not self.limit:
            return self._sample(self.seed, sample)
        picture = Dice(sample_rng(self.seed, sample, 0))
        return redrawn(self._captioned(CAPTIONS_SEED, sample % self.limit), picture)

    def _sample(self, seed: int, sample: int) -> Sample:
        return self.world.sample(seed, sample, split="train", size=self.size)

    def texts(self, count: int) -> Iterator[str]:
        """Yield the captions of the first ``count`` positions, or all that there are if those are fewer."""
        if self.limit and self.limit < count:
            yield from (self._captioned(CAPTIONS_SEED, number).caption for number in range(self.limit))
        else:
            yield from (self.draw(locate(self.seed, place, self.LENGTH)[1]).caption for place in range(count))

    def captions(self, count: int) -> list[str]:
        """Return captions of the evaluation split, which is never used in training."""
        return [drawn.caption for drawn in self.world.prompts(self.seed, count)]


def with_kept(row: Row, latents: KeptLatents | None) -> Row:
    """Return a row whose picture was drawn, with its posterior if that is kept."""
    if latents is None:
        return row
    key = pixels_key(row.image)
    return replace(row, picture=key, posterior=latents.get(key))


class Picture(NamedTuple):
    """Picture of a record, with the fields of ``Row``."""

    image: Image
    key: bytes
    posterior: Posterior | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Settings by which records become rows."""

    size: int
    """Side of the square images in pixels; with buckets, of a square of the same area."""
    window: int
    """Number of open shards."""
    choice: CaptionChoice
    sidecar: Sidecar | None
    limits: Limits
    flip: bool
    """Mirror a random half of the images."""
    multiple: int
    """Sides of buckets are multiples of this number of pixels; 0 for squares only."""
    latents: KeptLatents | None = None
    """Posteriors that were kept; their pictures are not decoded."""


class RecordStream:
    """Rows from the records of one or several sources, whose shards are combined."""

    def __init__(self, sources: Sequence[RecordSource], seed: int, how: Reading) -> None:
        self.sources, self.seed, self.how = tuple(sources), seed, how
        self._shards = [(source, shard) for source in sources for shard in range(len(source.shards))]
        sizes = np.array([source.shards[shard] for source, shard in self._shards], dtype=np.int64)
        if not sizes.sum():
            raise ValueError(f"{', '.join(source.name for source in sources)}: there are no records")
        self._starts = np.cumsum(sizes) - sizes
        starts = [np.cumsum(source.shards) - np.asarray(source.shards) for source in sources]
        self._within_source = np.concatenate(starts).astype(np.int64)
        if how.multiple:
            shapes = bucket_shapes(how.size, how.multiple)
            assigned = np.concatenate([assign(_dimensions(source), shapes) for source in sources])
            counts = np.array(
                [np.bincount(part, minlength=len(shapes)) for part in np.split(assigned, self._starts[1:])]
            )
            kept = np.flatnonzero(counts.sum(axis=0))
            self.shapes = [shapes[bucket] for bucket in kept]
            self._assigned: np.ndarray | None = np.searchsorted(kept, assigned).astype(np.uint8)
            counts = counts[:, kept]
        else:
            self.shapes, self._assigned, counts = [(how.size, how.size)], None, sizes[:, None]
        self._orders = [ShardOrder(seed, column.tolist(), how.window) for column in counts.T]
        self.turns = turns([len(order) for order in self._orders])
        for source in self.sources:
            if (keep := getattr(source, "keep", None)) is not None:  # Parquet caches complete shards
                keep(min(how.window * len(self._orders), len(source.shards)))
        self._members = lru_cache(maxsize=4 * how.window)(self._find_members)

    def __reduce__(self) -> tuple[type[RecordStream], tuple[tuple[RecordSource, ...], int, Reading]]:
        return RecordStream, (self.sources, self.seed, self.how)

    def __len__(self) -> int:
        return sum(len(order) for order in self._orders)

    def load(self, position: int, bucket: int = 0) -> Row:
        """Load the row at a position; a damaged record is replaced by another, the same on every machine.

        Raises TrainingFailed with the name of the shard if ``ATTEMPTS`` records could not be used.
        """
        epoch, shard, within = self._orders[bucket].locate(position)
        sample = int(self._starts[shard]) + self._number(shard, within, bucket)
        uniforms = sample_rng(self.seed, sample, epoch).random(3).tolist()
        skipped: list[Skipped] = []
        for attempt in range(ATTEMPTS):
            where = self._stand_in(bucket, shard, sample, epoch, attempt) if attempt else (shard, within)
            found = self._try(*where, bucket, uniforms, attempt > 0)
            if not isinstance(found, Skipped):
                picture, caption, key = found
                return Row(
                    picture.image, caption, self.seed, epoch, sample, key, tuple(skipped),
                    picture=picture.key, posterior=picture.posterior,
                )  # fmt: skip
            skipped.append(found)
        source, number = self._shards[shard]
        raise TrainingFailed(
            f"{ATTEMPTS} records of {source.name} in and around the shard {source.shard_name(number)} cannot be used, "
            f"the last because: {skipped[-1].reason} ({skipped[-1].detail}); fix the shard or leave it out"
        )

    def captions(self, count: int) -> list[str]:
        """Return captions of the records that are first in training."""
        return list(islice(self._captions(), count))

    def _captions(self) -> Iterator[str]:
        for place in self.places():
            try:
                yield self._caption(place[0], self._record(*place), 0.0, 0.0)
            except BadData:
                continue

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, number in it, bucket) of all records, bucket by bucket in the order of training."""
        for bucket, order in enumerate(self._orders):
            for position in range(len(order)):
                _, shard, within = order.locate(position)
                yield shard, within, bucket

    def check_captions(self) -> None:
        """Raise ValueError if ``ATTEMPTS`` records have no caption; the message names the keys that they have."""
        there: Counter[str] = Counter()  # characters by key: captions are longer than names
        read = False
        for place in islice(self.places(), ATTEMPTS):
            try:
                record = self._record(*place)
            except BadData:
                continue
            try:
                self._caption(place[0], record, 0.0, 0.0)
                return
            except BadData:
                read = True
                there.update({key: len(found[0]) for key, found in record.captions.items()})
        if read:
            names = ", ".join(source.name for source in self.sources)
            longest = [key for key, _ in there.most_common()]
            raise ValueError(f"{names}: {self.how.choice.missing(longest)}")

    def _stand_in(self, bucket: int, shard: int, sample: int, epoch: int, attempt: int) -> tuple[int, int]:
        """Return the shard, and the record of the bucket in it, to try next."""
        order = self._orders[bucket]
        if attempt < ATTEMPTS // 2:
            return shard, another(self.seed, sample, epoch, attempt, int(order.sizes[shard]))
        return order.place(another(self.seed, sample, epoch, attempt, len(order)))

    def _try(
        self, shard: int, within: int, bucket: int, uniforms: Sequence[float], stand_in: bool
    ) -> tuple[Picture, str, str] | Skipped:
        """Read picture, caption and key of one record, or return why it cannot be used."""
        by_key, by_text, by_flip = uniforms
        source, number = self._shards[shard]
        key = ""
        try:
            record = self._record(shard, within, bucket)
            key = record.key
            caption = self._caption(shard, record, by_key, by_text)
            picture = self._picture(record, bucket, mirrored=self.how.flip and by_flip < 0.5)
        except BadData as error:
            shard_name = error.shard or source.shard_name(number)
            return Skipped(source.name, shard_name, error.key or key, error.reason, error.detail, stand_in)
        return picture, caption, key

    def _picture(self, record: Record, bucket: int, *, mirrored: bool) -> Picture:
        """Decode a record's picture, unless its posterior is kept."""
        height, width = self.shapes[bucket]
        key, posterior = b"", None
        if (latents := self.how.latents) is not None:
            key = record_key(record.image, height, width, self.how.limits, mirrored=mirrored)
            posterior = latents.get(key)
        if posterior is not None:
            return Picture(np.zeros((height, width, 3), np.uint8), key, posterior)
        image = decode(record.image, height, width, self.how.limits)
        return Picture(image[:, ::-1] if mirrored else image, key)

    def pictures(self, shard: int, within: int, bucket: int) -> list[Picture]:
        """Return the picture of the record at a place as training may read it: as it is, and mirrored if rows are.

        Raises BadData for a record that training skips.
        """
        record = self._record(shard, within, bucket)
        self._caption(shard, record, 0.0, 0.0)
        return [
            self._picture(record, bucket, mirrored=mirrored)
            for mirrored in ((False, True) if self.how.flip else (False,))
        ]

    def shape_counts(self) -> dict[tuple[int, int], int]:
        """Return the number of records by the height and width to which they are cropped."""
        return {shape: len(order) for shape, order in zip(self.shapes, self._orders, strict=True)}

    def _caption(self, shard: int, record: Record, by_key: float, by_text: float) -> str:
        captions, sidecar = record.captions, self.how.sidecar
        if sidecar is not None and (found := sidecar.captions(record.key, self._shards[shard][0].name)):
            captions = {**captions, RECAPTION: found}
        return self.how.choice.choose(captions, by_key, by_text)

    def _record(self, shard: int, within: int, bucket: int) -> Record:
        source = self._shards[shard][0]
        return source.read(int(self._within_source[shard]) + self._number(shard, within, bucket))

    def _number(self, shard: int, within: int, bucket: int) -> int:
        """Return the number in its shard of a bucket's record."""
        return within if self._assigned is None else int(self._members(shard, bucket)[within])

    def _find_members(self, shard: int, bucket: int) -> np.ndarray:
        assert self._assigned is not None
        start = self._starts[shard]
        size = self._shards[shard][0].shards[self._shards[shard][1]]
        return np.flatnonzero(self._assigned[start : start + size] == bucket)


def _dimensions(source: RecordSource) -> Integer[np.ndarray, "N 2"]:
    """Return (width, height) of every record of a source from its index."""
    find = getattr(source, "dimensions", None)
    found = find() if find is not None else None
    if found is None:
        raise ValueError(
            f"buckets need the pictures' dimensions, which the index of {source.name} does not hold; "
            f"run: semroute data index --dimensions {source.name}"
        )
    return found
