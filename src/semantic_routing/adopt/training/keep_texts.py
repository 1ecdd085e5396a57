"""The choice of where texts are kept, by their number and size."""

from __future__ import annotations

from dataclasses import replace

from semantic_routing.adopt.training.config import KeepConfig
from semantic_routing.common.sizes import parse_bytes
from semantic_routing.data.dataset import Dataset
from semantic_routing.data.streams import RecordStream, WorldStream

MEASURED = 8
"""Captions whose sizes are measured."""


def caption_count(data: Dataset) -> int | None:
    """Return about how many captions a run reads; None for a world that is drawn without end."""
    total = 0
    for stream in data.streams:
        if isinstance(stream, WorldStream) and not stream.limit:
            return None
        assert isinstance(stream, WorldStream | RecordStream)
        total += stream.limit if isinstance(stream, WorldStream) else len(stream)
    return total


def decide(cfg: KeepConfig, count: int | None, size: float) -> tuple[KeepConfig, str]:
    """Return the settings for ``count`` texts of ``size`` bytes each, and a sentence that says so.

    In memory are all texts or none: of a part, few would be read again before they are dropped.
    """
    if count is None:
        words = f"captions have no end: each is encoded when it is read, {_written(size)} a caption"
        return replace(cfg, keep="0", keep_on_disk=""), words
    total = count * size
    words = f"texts of {count:,} captions take about {_written(total)}"
    if cfg.keep_on_disk:
        kept = "" if total <= parse_bytes(cfg.keep_on_disk_bytes) else f", up to {cfg.keep_on_disk_bytes} of them"
        words = f"{words}: kept in {cfg.keep_on_disk}{kept}"
        return (cfg if total <= parse_bytes(cfg.keep) else replace(cfg, keep="0")), words
    if total <= parse_bytes(cfg.keep):
        return cfg, f"{words}: kept in memory"
    return replace(cfg, keep="0"), f"{words}, more than text.keep ({cfg.keep}): encoded in every epoch again"


def _written(size: float) -> str:
    """Return a size as people write it."""
    unit = next((unit for unit in ("GB", "MB", "KB") if size >= 10 ** {"GB": 9, "MB": 6, "KB": 3}[unit]), "bytes")
    return f"{size / {'GB': 1e9, 'MB': 1e6, 'KB': 1e3}.get(unit, 1):.3g} {unit}"
