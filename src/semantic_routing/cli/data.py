"""``semroute data``: the arguments of each subcommand and the function that runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from semantic_routing.data.sources.index import default_folder, open_all
from semantic_routing.data.sources.index_writer import REPORT, build
from semantic_routing.data.tools.preview import PreviewArguments, preview
from semantic_routing.data.tools.recaption import RecaptionArguments, recaption
from semantic_routing.data.tools.stats import statistics, table
from semantic_routing.training.encode_arguments import EncodeArguments


@dataclass(frozen=True, kw_only=True)
class IndexArguments:
    """Scan data once, so that training can read any record directly, and report damaged records."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Tar shards, Parquet files, manifests or folders: paths, patterns such as data/{00000..00127}.tar, or URLs."""
    out: Path | None = None
    """Folder of the index; by default .semroute-index in the data's folder. Later scans skip unchanged files."""
    dimensions: bool = False
    """Also read the width and height of every image, which aspect-ratio buckets need."""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    """Number of processes."""


@dataclass(frozen=True, kw_only=True)
class StatsArguments:
    """Print statistics of captions, their lengths, image sizes and damaged records."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Data as for semroute data index, or folders of indices."""
    index: Path | None = None
    """Folder of the index, if it is not in the data's folder."""
    sample: int = 2000
    """Number of records to read, evenly spread; 0 reads all."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        if self.sample < 0:
            raise ValueError(f"sample is {self.sample}; it must be at least 1, or 0 for all records")


def index(args: IndexArguments) -> str:
    """Write the index and return a summary."""
    if not args.paths:
        raise ValueError("semroute data index needs paths of data")
    out = args.out or default_folder(args.paths[0])
    if out is None or (args.out is None and any(default_folder(path) != out for path in args.paths)):
        raise ValueError("URLs and several folders have no default folder for the index; give --out")
    report = build(args.paths, out, look_inside=args.dimensions, workers=args.workers)
    lines = [f"{report['records']:,} records in {report['files']:,} files of {report['bytes']:,} bytes"]
    if report["damaged_total"]:
        lines.append(f"{report['damaged_total']:,} left out or damaged, examples in {out / REPORT}:")
        lines += [f"  {reason:<22}{count:>8,}" for reason, count in report["damaged"].items()]
    return "\n".join([*lines, str(out)])


def stats(args: StatsArguments) -> str:
    """Read a sample and return a table of its statistics."""
    if not args.paths:
        raise ValueError("semroute data stats needs paths of data or an index")
    sources = [source for path in args.paths for source in open_all(path, args.index)]
    facts = statistics(sources, args.sample)
    return json.dumps(facts, indent=2) if args.json else table(facts)


def encode(args: EncodeArguments) -> str:
    """Fill the folder of cached states or latents and return a summary."""
    # Late, because these import torch and transformers, which the others do not need.
    from semantic_routing.training.encode_latents import encode_latents
    from semantic_routing.training.encode_text import encode_text

    return encode_latents(args) if args.latents else encode_text(args)


SUBCOMMANDS: dict[str, tuple[type, Callable[[Any], str]]] = {
    "index": (IndexArguments, index),
    "stats": (StatsArguments, stats),
    "recaption": (RecaptionArguments, recaption),
    "preview": (PreviewArguments, preview),
    "encode": (EncodeArguments, encode),
}
