"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(size: str) -> int:
    """Return the number of bytes that "0", "2GiB" or "500 MB" mean; ValueError for other texts."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|)", size.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(f'the size {size!r} is not understood; write a number of bytes, "2GiB" or "500MB"')
    return int(float(found[1]) * UNITS[found[2].upper()])
