"""``semroute data stats``: counts of records and damage, lengths of captions, and sizes of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.dimensions import dimensions
from semantic_routing.data.sources.records import ConcatRecords, Record, RecordSource

QUANTILES = (0, 5, 25, 50, 75, 95, 100)
"""Quantiles in percent."""
ASPECTS = (0.0, 0.5, 0.67, 0.8, 1.25, 1.5, 2.0, float("inf"))
"""Edges of the histogram of width divided by height."""


def statistics(sources: Sequence[RecordSource], sample: int) -> dict[str, Any]:
    """Compute statistics of the records of sources, in JSON types.

    Args:
        sources: The data.
        sample: Number of evenly spread records to read; 0 reads all.
    """
    records = ConcatRecords(sources)
    total = len(records)
    wanted = min(sample or total, total)
    damaged: Counter[str] = Counter()
    lengths: dict[str, list[int]] = {}
    bearers: Counter[str] = Counter()
    picture_bytes: list[int] = []
    sizes: list[tuple[int, int]] = []
    for record in _spread(records, wanted, damaged):
        for key, captions in record.captions.items():
            bearers[key] += 1
            lengths.setdefault(key, []).extend(len(caption) for caption in captions)
        picture_bytes.append(len(record.image))
        try:
            sizes.append(dimensions(record.image))
        except BadData as error:
            damaged[error.reason] += 1
    read = len(picture_bytes)
    scanned = sum((Counter(getattr(source, "damaged", {})) for source in sources), Counter[str]())
    return {
        "records": total,
        "shards": sum(len(source.shards) for source in sources),
        "sample": wanted,
        "picture_bytes": {"total": round(sum(picture_bytes) / read * total) if read else 0} | _quantiles(picture_bytes),
        "captions": {
            key: {"share": bearers[key] / read, "characters": _quantiles(lengths[key])}
            for key in sorted(lengths, key=lambda key: (-bearers[key], key))
        },
        "width": _quantiles([width for width, _ in sizes]),
        "height": _quantiles([height for _, height in sizes]),
        "aspect": _aspects(sizes),
        "damaged": {"scan": dict(scanned.most_common()), "sample": dict(damaged.most_common())},
    }


def table(facts: dict[str, Any]) -> str:
    """Format ``statistics`` as a text table."""
    records, sample = facts["records"], facts["sample"]
    read = "all were read" if sample == records else f"from {sample:,} of them, evenly spread"
    lines = [
        f"{records:,} records in {facts['shards']:,} shards; {read}",
        f"{facts['picture_bytes']['total']:,} bytes of pictures" + ("" if sample == records else ", estimated"),
        "",
        f"{'':<24}{'share':>8}" + "".join(f"{f'{percent} %':>8}" for percent in QUANTILES),
    ]
    rows = [(f"caption {key}", found["share"], found["characters"]) for key, found in facts["captions"].items()]
    rows += [(name, None, facts[name]) for name in ("width", "height")]
    for name, share, quantiles in rows:
        cells = "".join(f"{quantiles[str(percent)]:>8,}" for percent in QUANTILES) if quantiles else ""
        lines.append(f"{name[:23]:<24}{'' if share is None else f'{share:.1%}':>8}{cells}")
    lines += ["", "width : height"]
    lines += [f"  {name:<14}{share:>7.1%}  {'#' * round(40 * share)}" for name, share in facts["aspect"].items()]
    for where, title in (("scan", "left out or damaged, found by scanning"), ("sample", "damaged, among those read")):
        found = facts["damaged"][where]
        lines += ["", f"{title}: {sum(found.values()):,}", *(f"  {reason:<22}{n:>8,}" for reason, n in found.items())]
    return "\n".join(lines)


def _spread(records: ConcatRecords, count: int, damaged: Counter[str]) -> Iterator[Record]:
    """Read ``count`` records, evenly spread over all, and count damaged ones by reason."""
    for number in tqdm(range(count), desc="Reading", unit="record", leave=False):
        try:
            yield records.read(number * len(records) // count)
        except BadData as error:
            damaged[error.reason] += 1


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    """Return the ``QUANTILES`` of values by percent; an empty dict without values."""
    if not values:
        return {}
    found = np.quantile(values, [percent / 100 for percent in QUANTILES], method="nearest")
    return {str(percent): int(value) for percent, value in zip(QUANTILES, found, strict=True)}


def _aspects(sizes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return the share of each range of width divided by height."""
    if not sizes:
        return {}
    counts, _ = np.histogram([width / height for width, height in sizes], bins=ASPECTS)
    names = [f"{low:g} to {high:g}" for low, high in pairwise(ASPECTS)]
    names[0], names[-1] = f"below {ASPECTS[1]:g}", f"from {ASPECTS[-2]:g}"
    return {name: int(count) / len(sizes) for name, count in zip(names, counts, strict=True)}
