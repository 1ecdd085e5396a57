"""Speed and memory of indexing synthetic WebDataset shards, against the cost of reading the bytes.

    python benchmarks/index_speed.py [--records 1000000] [--workers 2] [--pax] [--folder DIR]

Writes shards of 10,000 records into a temporary folder and indexes them from the page cache. A record has an image, a
.json and a .txt of 512 bytes each: 3 KiB with the headers, 3.1 GB for a million records. With --pax every member has an
extended header, as from WebDataset's own writer, which doubles the size. Prints the rates of one process: of the scan,
of the complete index, and of two floors (reading the bytes; summing the headers at known offsets in numpy). Then the
rate of several processes, and the peak memory for a tenth of the records and for all.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from semantic_routing.data.sources.webdataset import scan_tar

A_SHARD = 10_000
BLOCK = 512
MEMBERS = ("jpg", "json", "txt")
CONTENT = {"jpg": b"\xff\xd8\xff" + b"x" * 509, "json": b'{"caption": "a cat"}'.ljust(BLOCK), "txt": b"cat " * 128}
DIGITS = 9


def member(name: str, content: bytes, pax: bool) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mtime = 1.7e9 + (0.25 if pax else 0)  # type: ignore[assignment]  # a fraction needs an extended header
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT) + content


def shard(pax: bool) -> bytes:
    """Repeat one record of tarfile, and write each record's number and the new checksums into its headers."""
    record = b"".join(member(f"{0:0{DIGITS}d}.{suffix}", CONTENT[suffix], pax) for suffix in MEMBERS)
    blocks = np.tile(np.frombuffer(record, np.uint8), (A_SHARD, 1)).reshape(A_SHARD, -1, BLOCK)
    digits = np.arange(A_SHARD)[:, None] // 10 ** np.arange(DIGITS)[::-1] % 10
    for number in range(blocks.shape[1]):
        block = blocks[:, number]
        if bytes(block[0, 257:262]) == b"ustar" and block[0, 156] == ord("0"):
            block[:, :DIGITS] = 48 + digits
            sums = int(bytes(block[0, 148:154]), 8) + digits.sum(axis=1)
            block[:, 148:154] = 48 + sums[:, None] // 8 ** np.arange(6)[::-1] % 8
    return blocks.tobytes() + bytes(10240)


def rates(records: int, run: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
    """Return records a second of wall-clock time and of this process's CPU time, the best of the repeats."""
    times, cpu = [], []
    for _ in range(repeats):
        began, cpu_began = time.perf_counter(), time.process_time()
        run()
        times.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    return records / min(times), records / min(cpu)


def read_bytes(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(2**20):
                pass


def check_sums(paths: list[Path], offsets: np.ndarray) -> None:
    """Sum the bytes of every header at its known offset."""
    for path in paths:
        blocks = np.memmap(path, np.uint8, "r").reshape(-1, BLOCK)[offsets]
        words = blocks.view("<u8")
        ((words & np.uint64(0x00FF00FF00FF00FF)) + (words >> 8 & np.uint64(0x00FF00FF00FF00FF))).sum(axis=1)


def peak(paths: list[str], out: Path) -> tuple[float, float]:
    """Return the peak MiB of this process before and after indexing."""
    from semantic_routing.data.sources.index_writer import build

    before = high_water()
    build(paths, out)
    return before, high_water()


def high_water() -> float:
    """Return the peak memory of this process in MiB; getrusage would include its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def list_members(path: Path) -> None:
    with tarfile.open(path) as archive:
        archive.getmembers()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pax", action="store_true")
    parser.add_argument("--folder", help="folder for the shards, by default the system's temporary folder")
    args = parser.parse_args()
    with TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        data = shard(args.pax)
        count = max(args.records // A_SHARD, 1)
        paths = [folder / f"{number:05d}.tar" for number in range(count)]
        for path in paths:
            path.write_bytes(data)
        size = f"{count * len(data) / 1e9:.2f} GB{', pax' if args.pax else ''}"
        lines = [f"{count * A_SHARD:,} records in {count} shards, {size}", *speeds(paths, folder, args.workers)]
        lines += [memory(paths[:part], folder / f"peak{part}") for part in (max(count // 10, 1), count)]
    sys.stdout.write("\n".join(lines) + "\n")


def speeds(paths: list[Path], folder: Path, workers: int) -> list[str]:
    """Return a line for each rate."""
    # Imported here because it needs torch, and worker processes import this file.
    from semantic_routing.data.sources.index_writer import build

    records, names, size = len(paths) * A_SHARD, [str(path) for path in paths], paths[0].stat().st_size
    lines = [f"{'records a second':<44}{'of time':>14}{'of a core':>14}"]

    def note(name: str, run: Callable[[], object], records: int = records, repeats: int = 1) -> None:
        lines.append(f"{name:<44}{''.join(f'{rate:>14,.0f}' for rate in rates(records, run, repeats))}")

    with tarfile.open(paths[0]) as first:
        offsets = np.array([info.offset_data // BLOCK - 1 for info in first])
    note("read the bytes", lambda: read_bytes(paths), repeats=2)
    note("sum the headers, offsets known (numpy)", lambda: check_sums(paths, offsets), repeats=2)
    note("scan, one process", lambda: [scan_tar(name, size) for name in names], repeats=3)
    note("index, one process", lambda: build(names, folder / "one"))
    note("tarfile, one shard, listing only", lambda: list_members(paths[0]), A_SHARD, repeats=3)
    many = rates(records, lambda: build(names, folder / "many", workers=workers))[0]
    return [*lines, f"{f'index, {workers} processes and their start':<44}{many:>14,.0f}"]


def memory(paths: list[Path], out: Path) -> str:
    """Return a line with the peak memory of indexing, measured in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        before, after = pool.submit(peak, list(map(str, paths)), out).result()
    return f"peak memory at {len(paths) * A_SHARD:,} records: {after:.0f} MiB, {before:.0f} before"


if __name__ == "__main__":
    main()
