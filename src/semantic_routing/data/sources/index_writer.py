"""Writes an index: scans every file of data once, in several processes, and resumes after a stop."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from semantic_routing.common.config import from_dict
from semantic_routing.common.files import check_writable, read_json, write_text, written_whole
from semantic_routing.common.images.formats import is_outdated
from semantic_routing.common.locks import LOCK, claimed
from semantic_routing.common.manifest import manifest
from semantic_routing.data.sources.discover import UNNAMED, Data, discover
from semantic_routing.data.sources.index import FORMAT, INDEX, Entry, has_rows, scan, state
from semantic_routing.data.sources.scan import ScanResult
from semantic_routing.data.sources.storage import Stored

REPORT = "report.json"
Job = tuple[str, Stored]
"""Kind and file."""


def build(paths: Sequence[str], out: Path, *, look_inside: bool = False, workers: int = 1) -> dict[str, Any]:
    """Write the index of all data at the paths, and ``report.json``; return the report.

    Args:
        paths: See ``discover.discover``.
        out: Folder of the index. Files that it lists are scanned again only if they have changed.
        look_inside: Whether to find the pictures' dimensions too, which reads the beginning of each.
        workers: Number of processes; 1 scans in this process.

    Raises ValueError for paths without data.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    found = [discover(path) for path in paths]
    check_writable(out)
    with claimed(out / LOCK, out):
        return _build(paths, found, out, look_inside, workers)


def _build(paths: Sequence[str], found: Sequence[Data], out: Path, look_inside: bool, workers: int) -> dict[str, Any]:
    jobs = list(dict.fromkeys((data.kind, state(data.kind, path)) for data in found for path in data.paths))
    entries: dict[Job, Entry] = {}
    for job in jobs:
        entry = _known(out, job, look_inside)
        if entry is not None:
            entries[job] = entry
    with tqdm(total=len(jobs), initial=len(entries), desc="Indexing", unit="shard") as bar:
        for job, scanned in _scans([job for job in jobs if job not in entries], look_inside, workers):
            entries[job] = _write(out, job, scanned, look_inside)
            bar.update()
    ordered = [entries[job] for job in jobs]
    listed = [asdict(replace(entry, examples=())) for entry in ordered]
    left_out = _left_out(dict(zip(paths, found, strict=True)).values(), ordered)
    index = {"format": FORMAT, "folder": os.path.abspath(out), "left_out": left_out, "entries": listed}
    write_text(out / INDEX, json.dumps(index, indent=1) + "\n")
    report = _report(ordered, left_out)
    write_text(out / REPORT, json.dumps(report | {"manifest": manifest()}, indent=2) + "\n")
    return report


def _scans(jobs: Sequence[Job], look_inside: bool, workers: int) -> Iterator[tuple[Job, ScanResult]]:
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, scan(job[0], job[1].path, job[1].size, look_inside)
        return
    # Spawn, because a fork would inherit torch's threads.
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn"))
    try:
        running: dict[Future[ScanResult], Job] = {
            pool.submit(scan, job[0], job[1].path, job[1].size, look_inside): job for job in jobs
        }
        for done in as_completed(running):
            yield running.pop(done), done.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker was killed, perhaps out of memory; run again with fewer --workers: finished files are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _stem(path: str) -> str:
    """Return the name, without an ending, of a file's part of the index."""
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in path.rsplit("/", 1)[-1])
    return f"{name[:80]}-{blake2b(os.fsencode(path), digest_size=8).hexdigest()}"


def _known(out: Path, job: Job, look_inside: bool) -> Entry | None:
    """Return the entry of an earlier scan; None if it is incomplete, outdated or less thorough than requested.

    A scan that left out formats that can be read now is outdated.
    """
    kind, file = job
    try:
        entry = from_dict(Entry, read_json(out / f"{_stem(file.path)}.json", "an entry of an index"))
    except ValueError:
        return None
    same = (entry.path, entry.kind, entry.size, entry.version) == (file.path, kind, file.size, file.version)
    fits = same and entry.dimensions >= look_inside and not any(map(is_outdated, entry.damaged))
    return entry if fits and has_rows(out, entry) else None


def _write(out: Path, job: Job, found: ScanResult, look_inside: bool) -> Entry:
    """Write a file's rows, then its entry, so that an entry never exists without its rows."""
    kind, file = job
    rows = out / f"{_stem(file.path)}.npy"
    entry = Entry(
        path=file.path,
        kind=kind,
        size=file.size,
        version=file.version,
        records=len(found.rows),
        rows=rows.name,
        dimensions=look_inside,
        damaged=dict(found.damaged),
        examples=tuple(found.examples),
    )
    with written_whole(rows) as scratch, scratch.open("wb") as stream:
        np.save(stream, found.rows, allow_pickle=False)
    write_text(rows.with_suffix(".json"), json.dumps(asdict(entry)) + "\n")
    return entry


def _left_out(found: Iterable[Data], entries: Sequence[Entry]) -> dict[str, int]:
    """Count the data in no entry, by reason."""
    left_out: Counter[str] = Counter()
    records = {entry.path: entry.records for entry in entries}
    for data in found:
        left_out.update(data.left_out)
        if data.pictures and (named := records[data.paths[0]]):
            left_out[UNNAMED] += max(data.pictures - named, 0)
    return dict(+left_out)


def _report(entries: Sequence[Entry], left_out: dict[str, int]) -> dict[str, Any]:
    damaged = sum((Counter(entry.damaged) for entry in entries), Counter[str](left_out))
    return {
        "files": len(entries),
        "records": sum(entry.records for entry in entries),
        "bytes": sum(entry.size for entry in entries),
        "dimensions": all(entry.dimensions for entry in entries),
        "damaged": dict(damaged.most_common()),
        "damaged_total": damaged.total(),
        "examples": [{"file": entry.path, **example} for entry in entries for example in entry.examples],
    }
