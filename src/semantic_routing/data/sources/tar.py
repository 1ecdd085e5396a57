"""The members of a tar file, found from their headers alone, several times as fast as ``tarfile`` finds them.

Knows ustar, GNU long names and base-256 numbers, and pax names and sizes. Nothing is written to disk and names are
only names. A sum over each header's bytes is part of the format; it is checked for many headers at once, and nothing
behind a header whose sum is wrong is believed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from semantic_routing.data.sources.scan import Damage

BLOCK = 512
WINDOW = 2**16
"""Bytes read at once. Small members share a window; the content of large ones is stepped over."""
LONGEST = 2**20
"""Bytes of the longest extended header (a name, mostly) that is read."""
CHECKED_AT_ONCE = 1024
ZEROS = bytes(BLOCK)
_SAYS_MORE = re.compile(rb"path=|size=|GNU\.sparse").search
PAIRS = np.uint64(0x00FF00FF00FF00FF)

REGULAR = b"0\0007"
NO_CONTENT = b"123456"  # links, devices, folders, pipes: their size says nothing
EXTENDED = b"xLKXg"
FOLDER, SPARSE, LONG_NAME, LONG_LINK, PAX_GLOBAL = b"5SLKg"

Read = Callable[[int, int], bytes]
"""(start, size) to bytes, fewer where the file ends."""


class Member(NamedTuple):
    """A regular file in the archive."""

    name: bytes
    start: int
    """Where its first header is, extended ones included."""
    offset: int
    """Where its content is."""
    size: int


class _Unreadable(Exception):
    """Nothing more can be read."""


_Item = tuple[bytes, int, Member | Damage | None]
"""A header, where its member begins, and what it means; without a header, why nothing more can be read."""


def members(read: Read, length: int, window: int = WINDOW) -> Iterator[Member | Damage]:
    """The regular files of an archive of ``length`` bytes in order, and in between what is damaged.

    Folders are left out. Links, devices and sparse files are damage that is stepped over; a header that is none, or
    content that is not all there, ends the archive.
    """
    walk = _walk(read, length, window)
    while batch := list(islice(walk, CHECKED_AT_ONCE)):
        end = batch.pop()[2] if not batch[-1][0] else None
        right = _sums_are_right([header for header, _, _ in batch])
        whole = len(batch) if right.all() else int(right.argmin())
        yield from (found for _, _, found in batch[:whole] if found is not None)
        if whole < len(batch):
            end = _no_header(batch[whole][1])
        if end is not None:
            yield end
            return


def first_member(head: bytes) -> Member | None:
    """The first regular file of an archive by its beginning, up to its content; None where another thing is there."""
    for header, _, found in _walk(lambda start, size: head[start : start + size], 2**63, len(head)):
        if not header or not _sum_is_right(header):
            return None
        if found is not None:
            return found if isinstance(found, Member) else None
    return None


def _walk(read: Read, length: int, window: int) -> Iterator[_Item]:
    """Every header, and what it means if its sum turns out to be right."""
    base, buffer = 0, b""
    position = start = 0  # of this header, and of the first of those that belong together
    extended = _Extended()
    try:
        while True:
            local = position - base
            if local + BLOCK > len(buffer):
                rest = min(window, length - position)
                base, local, buffer = position, 0, read(position, rest) if rest > 0 else b""
            header = buffer[local : local + BLOCK]
            if len(header) < BLOCK:
                raise _Unreadable(_ending(position, header, length))
            if not header[0] and header == ZEROS:
                _check_tail(buffer[local:], position, length)
                return
            kind, content = header[156], position + BLOCK
            try:
                size = int(header[124:135], 8)  # what nearly every archive holds
            except ValueError:
                size = -1
            if size < 0 or header[135] not in b"\0 ":
                size = _number(header[124:136], position)
            if kind in EXTENDED:
                position = content + (size + BLOCK - 1) // BLOCK * BLOCK
                yield header, start, None
                if content + size > length:
                    raise _Unreadable(Damage("truncated", start, b"", f"an extended header of {size} bytes"))
                if size <= LONGEST:
                    text = buffer[content - base : content - base + size]
                    extended.note(kind, text if len(text) == size else read(content, size), start)
                else:
                    extended.leave_out("too large", f"an extended header of {size} bytes")
                continue
            name = extended.name if extended.name is not None else _plain_name(header)
            if kind in NO_CONTENT:
                size = 0
            elif extended.size is not None:
                size = extended.size
            if kind == SPARSE:
                content = _behind_sparse_map(read, header, content)
            if content + size > length:
                yield header, start, None
                detail = f"{size} bytes announced, {max(length - content, 0)} there"
                raise _Unreadable(Damage("truncated", start, name, detail))
            position = content + (size + BLOCK - 1) // BLOCK * BLOCK
            yield header, start, extended.meaning(kind, Member(name, start, content, size))
            if extended.said:
                extended = _Extended()
            start = position
    except _Unreadable as error:
        yield b"", position, error.args[0]


def _plain_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _number(field: bytes, position: int) -> int:
    """A size: octal digits, or binary after a byte of 128."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):
        raise _Unreadable(_no_header(position))
    return int(digits or b"0", 8)


def _no_header(position: int) -> Damage:
    return Damage("bad header", position, b"", "no tar header here; what follows is not read")


class _Extended:
    """What extended headers say of the member behind them."""

    __slots__ = ("name", "reason", "said", "size", "why")

    def __init__(self) -> None:
        self.said = False
        self.name: bytes | None = None
        self.size: int | None = None
        self.reason = self.why = ""

    def note(self, kind: int, text: bytes, position: int) -> None:
        """Take in the content of one such header."""
        if kind == LONG_NAME:
            self.said, self.name = True, text.split(b"\0", 1)[0]
        elif kind not in (LONG_LINK, PAX_GLOBAL) and _SAYS_MORE(text):
            fields = _pax(text, position)
            self.said, self.name = True, fields.get(b"path", self.name)
            if b"size" in fields:
                self.size = _decimal(fields[b"size"], position)
            if any(key.startswith(b"GNU.sparse") for key in fields):
                self.leave_out("not a file", "a sparse file")

    def leave_out(self, reason: str, why: str) -> None:
        """The member cannot be used."""
        self.said, self.reason, self.why = True, reason, why

    def meaning(self, kind: int, member: Member) -> Member | Damage | None:
        """What a member of a kind is: a file, none, or something that is left out."""
        if self.reason:
            return Damage(self.reason, member.start, member.name, self.why)
        if kind in REGULAR:
            return member if not member.name.endswith(b"/") else None
        if kind == FOLDER:
            return None
        return Damage("not a file", member.start, member.name, f"tar type {chr(kind)!r}: a link, device or sparse file")


def _pax(text: bytes, position: int) -> dict[bytes, bytes]:
    """The fields of a pax header: records ``LENGTH KEY=VALUE\\n``, the length in bytes and of all of the record."""
    fields: dict[bytes, bytes] = {}
    at = 0
    while at < len(text) and text[at]:
        digits = text[at : at + 20].split(b" ", 1)[0]
        end = at + _decimal(digits, position)
        key, equals, value = text[at + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or not at < end <= len(text) or text[end - 1] != 0x0A:  # also against going in circles
            raise _Unreadable(Damage("bad header", position, b"", "a pax header that is not as pax says"))
        fields[key] = value
        at = end
    return fields


def _decimal(digits: bytes, position: int) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise _Unreadable(Damage("bad header", position, b"", "a pax header with a bad number"))
    return int(digits)


def _behind_sparse_map(read: Read, header: bytes, content: int) -> int:
    """Where the data of an old GNU sparse file begins: behind further blocks that list its holes."""
    more = header[482]
    while more:
        block = read(content, BLOCK)
        more = block[504] if len(block) == BLOCK else 0
        content += BLOCK
    return content


def _ending(position: int, rest: bytes, length: int) -> Damage:
    """What is wrong with an archive that ends here, without its end mark."""
    if not length:
        return Damage("zero bytes", 0, b"", "the file is empty")
    if rest:
        return Damage("truncated", position, b"", "the file ends inside a header")
    return Damage("truncated", position, b"", "no end mark; the file may have been cut between two members")


def _check_tail(rest: bytes, position: int, length: int) -> None:
    """Raise where something follows the end mark; only what has been read is looked at."""
    if rest.strip(b"\0"):
        detail = f"{length - position} bytes follow the end mark and are not read; are these several archives in one?"
        raise _Unreadable(Damage("bad header", position, b"", detail))


def _sums_are_right(headers: list[bytes]) -> Bool[np.ndarray, " N"]:
    """Whether the sum that each header states is that of its bytes, its own field taken as spaces."""
    blocks = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, BLOCK)
    # Eight bytes at a time, as four sums of 16 bits, which 512 bytes cannot overflow.
    words = blocks.view("<u8")
    sums = (words & PAIRS) + (words >> 8 & PAIRS)
    whole = sums.sum(axis=1)[:, None].view("<u2").sum(axis=1, dtype=np.int64)
    field = blocks[:, 148:156]
    expected = whole - field.sum(axis=1, dtype=np.int64) + 8 * 32
    stated = np.zeros(len(blocks), dtype=np.int64)
    for column in field.T:
        stated = np.where((column >= 0x30) & (column < 0x38), stated * 8 + (column & 7), stated)
    right = expected == stated
    for i in np.flatnonzero(~right):
        right[i] = _sum_is_right(headers[i])
    return right


def _sum_is_right(header: bytes) -> bool:
    field = header[148:156]
    rest = header[:148] + header[156:]
    total = sum(rest) + 8 * 32
    stated = int(bytes(digit for digit in field if 0x30 <= digit < 0x38) or b"0", 8)
    # Some old programs took bytes as signed.
    return stated in (total, total - 256 * sum(byte >= 0x80 for byte in rest))
