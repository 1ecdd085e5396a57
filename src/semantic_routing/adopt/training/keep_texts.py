"""Decides where encoded captions are cached, from their number and size."""

from __future__ import annotations

from dataclasses import replace

from semantic_routing.adopt.training.config import KeepConfig
from semantic_routing.common.sizes import parse_bytes
from semantic_routing.data.dataset import Dataset
from semantic_routing.data.streams import RecordStream, WorldStream

MEASURED = 8
"""Captions whose sizes are measured."""


def caption_count(data: Dataset) -> int | None:
    """Return approximately how many captions a run reads; None for a generated world, which is unlimited."""
    total = 0
    for stream in data.streams:
        if isinstance(stream, WorldStream) and not stream.limit:
            return None
        assert isinstance(stream, WorldStream | RecordStream)
        total += stream.limit if isinstance(stream, WorldStream) else len(stream)
    return total


def decide(cfg: KeepConfig, count: int | None, size: float) -> tuple[KeepConfig, str]:
    """Return the cache settings for ``count`` texts of ``size`` bytes each, and a sentence that explains them.

    In memory either all texts are cached or none, because of a part, few would be used again before they are dropped.
    """
    if count is None:
        words = f"the number of captions is unlimited: each is encoded when it is read, {_written(size)} per caption"
        return replace(cfg, keep="0", keep_on_disk=""), words
    total = count * size
    words = f"the states of {count:,} captions take about {_written(total)}"
    if cfg.keep_on_disk:
        kept = "" if total <= parse_bytes(cfg.keep_on_disk_bytes) else f", up to {cfg.keep_on_disk_bytes} of them"
        words = f"{words}: cached in {cfg.keep_on_disk}{kept}"
        return (cfg if total <= parse_bytes(cfg.keep) else replace(cfg, keep="0")), words
    if total <= parse_bytes(cfg.keep):
        return cfg, f"{words}: cached in memory"
    return replace(cfg, keep="0"), f"{words}, more than text.keep ({cfg.keep}): encoded again in every epoch"


def _written(size: float) -> str:
    """Return a size as people write it."""
    unit = next((unit for unit in ("GB", "MB", "KB") if size >= 10 ** {"GB": 9, "MB": 6, "KB": 3}[unit]), "bytes")
    return f"{size / {'GB': 1e9, 'MB': 1e6, 'KB': 1e3}.get(unit, 1):.3g} {unit}"
