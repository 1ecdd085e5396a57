"""WebDataset tar shards: finds the records of a shard from its headers, and reads them at random access.

By WebDataset's rule, neighbouring members with the same key make one record; the key is the path up to the first dot
of the file's name. Pictures, .txt (or .caption) and .json are used; other members are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt32

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.dimensions import look
from semantic_routing.common.images.formats import picture_endings, unknown
from semantic_routing.data.sources.records import Record, Sharded, captions_of
from semantic_routing.data.sources.scan import SIZE, Damage, ScanResult, key_text
from semantic_routing.data.sources.storage import Arrays, Reader, is_url, shard_names
from semantic_routing.data.sources.tar import WINDOW, Member, Read, first_member, members

IMAGE, TEXT, JSON, SPARE, KOHYA = range(5)
"""Parts of a record. SPARE replaces a missing image; KOHYA (.caption) replaces missing text and JSON."""
COMMON = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2")
"""Suffixes of IMAGE; pictures with other suffixes are SPARE."""

ROW = np.dtype(
    [
        ("start", "<u8"),  # position of the record's first header in the shard; positions below are relative to it
        ("image", "<u4"),
        ("image_size", "<u4"),
        ("text", "<u4"),  # 0 if missing, as for json
        ("text_size", "<u4"),
        ("json", "<u4"),
        ("json_size", "<u4"),
        *((name, "<u4") for name in SIZE.fields or ()),
    ]
)
"""A record in the index, in 40 bytes; its key is read from the header."""
REMOTE_WINDOW = 2**23
"""Bytes read at once from a URL, where every request costs time."""
LARGEST_TEXT = 2**24
"""Bytes of the largest caption."""
GAP = 2**20
"""Bytes of unused members between two parts up to which one read fetches both."""


def scan_tar(path: str, length: int, *, look_inside: bool = False) -> ScanResult:
    """Find the records of a shard of ``length`` bytes; ``look_inside`` also finds the pictures' dimensions.

    Report and drop damaged records. Keep records whose picture is empty or undecodable, so that the count is the same
    with and without ``look_inside``.
    """
    found = ScanResult(np.empty(0, ROW))
    reader = Reader()

    def read(start: int, size: int) -> bytes:
        return reader.read(path, start, size)

    chunks = []
    try:
        headers = members(read, length, REMOTE_WINDOW if is_url(path) else WINDOW)
        for chunk in _chunks(_rows(headers, found), 4096):
            rows = np.array(chunk, ROW)
            if look_inside:
                _look(rows, read, found)
            chunks.append(rows)
    except OSError as error:
        found.report(Damage("unreadable", 0, b"", str(error)))
    if chunks:
        found.rows = np.concatenate(chunks)
    return found


def _chunks(rows: Iterator[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    yield chunk


@lru_cache(maxsize=1)
def _parts(endings: tuple[str, ...]) -> dict[bytes, int]:
    """Return the part of a record that each suffix means; ``endings`` are those of pictures."""
    pictures = {ending[1:].encode(): IMAGE if ending[1:] in COMMON else SPARE for ending in endings}
    return pictures | {b"txt": TEXT, b"json": JSON, b"caption": KOHYA}


class _Group:
    """Neighbouring members with one key."""

    __slots__ = ("key", "members", "others", "start")

    def __init__(self, key: bytes, start: int) -> None:
        self.key, self.start = key, start
        self.members: list[Member | None] = [None] * 5
        self.others: list[Member] = []
        """Members that are no part of the record."""

    @property
    def image(self) -> Member | None:
        """The picture's member."""
        return self.members[IMAGE] or self.members[SPARE]

    def lost(self) -> list[Damage]:
        """Return damage for the pictures in no record: names with more dots, or unsupported formats."""
        parts, found, strange = _parts(picture_endings()), [], []
        for member in self.others:
            whole, _, last = member.name.rpartition(b".")
            part = parts.get(last.lower())
            if part is None:
                strange.append(member)
            # Next to a picture it may be something else, such as a mask, unless it has its own caption.
            elif part in (IMAGE, SPARE) and (
                self.image is None or any(other.name == whole + b".txt" for other in self.others)
            ):
                detail = "a record's name ends at the first dot; rename it, or unpack the shard into a folder"
                found.append(Damage("dots in the name", member.start, member.name, detail))
        if found or self.image is not None:
            return found
        if strange:  # the largest member replaces the picture
            member = max(strange, key=lambda member: member.size)
            ending = member.name[member.name.rfind(b".") :].decode("ascii", "replace").lower()
            return [Damage(unknown(ending), member.start, member.name, "a record without a picture that can be read")]
        return [Damage("no picture", self.start, self.key, "a record without a picture")]


def _rows(headers: Iterable[Member | Damage], found: ScanResult) -> Iterator[tuple[int, ...]]:
    """Yield a row of dtype ``ROW`` for each group of members with a picture."""
    group: _Group | None = None
    seen: set[int] = set()
    parts = _parts(picture_endings())
    for member in headers:
        if isinstance(member, Damage):
            found.report(member)
            # A truncated member spoils its record.
            if member.name and member.reason == "truncated" and group and _key(member.name)[0] == group.key:
                group = None
            continue
        this, suffix = _key(member.name)
        if not suffix:  # belongs to no record
            _report_hidden(member, found)
            continue
        if group is None or this != group.key:
            if group and (row := _row(group, seen, found)):
                yield row
            group = _Group(this, member.start)
        part = parts.get(suffix)
        if part is None:
            part = parts.get(suffix.lower())
        if part is None:
            group.others.append(member)
            continue
        first = group.members[part]
        if first is None:
            group.members[part] = member
        elif part not in (IMAGE, SPARE) or _key(first.name)[1] == suffix:
            found.report(Damage("duplicate member", member.start, member.name, "the first one is used"))
    if group and (row := _row(group, seen, found)):
        yield row


def _report_hidden(member: Member, found: ScanResult) -> None:
    """Report a picture whose name begins with a dot, such as macOS adds to archives."""
    name = member.name[member.name.rfind(b"/") + 1 :]
    if name.startswith(b".") and _parts(picture_endings()).get(name[name.rfind(b".") + 1 :].lower()) in (IMAGE, SPARE):
        found.report(Damage("hidden file", member.start, member.name, "a name that begins with a dot"))


def _key(name: bytes) -> tuple[bytes, bytes]:
    """Split a member's name into key and suffix; both are empty for a file that belongs to no record."""
    dot = name.find(b".", name.rfind(b"/") + 1)
    if dot < 1 or name[dot - 1] == 0x2F:  # no dot, or a hidden file
        return b"", b""
    return name[:dot], name[dot + 1 :]


def _row(group: _Group, seen: set[int], found: ScanResult) -> tuple[int, ...] | None:
    """Return a group's row of dtype ``ROW``; None, with a report, if it makes no record."""
    image, (_, text, extra, _, kohya) = group.image, group.members
    key, start = group.key, group.start
    if image is None or group.others:
        for damage in group.lost():
            found.report(damage)
    if image is None:
        return None
    text = text if text or extra else kohya
    hashed = hash(key)  # 64 bits instead of the name: a shard may hold millions
    if hashed in seen:
        found.report(Damage("repeated key", start, key, "the first such record is used"))
        return None
    seen.add(hashed)
    if max(part.offset + part.size for part in (image, text, extra) if part) - start >= 2**32:
        found.report(Damage("too large", start, key, "the record has 4 GiB or more"))
        return None
    captions = max(text.size if text else 0, extra.size if extra else 0)
    if captions > LARGEST_TEXT:
        found.report(Damage("too large", start, key, "a caption of more than 16 MiB"))
        return None
    if not image.size:
        found.report(Damage("zero bytes", start, key, "the picture is empty"))
    if not captions:
        found.report(Damage("no caption", start, key, "no .txt or .json in the record"))
    row = [start, image.offset - start, image.size]
    for part in (text, extra):
        row += [part.offset - start, part.size] if part else [0, 0]
    return (*row, 0, 0)


def _look(rows: Shaped[np.ndarray, " N"], read: Read, found: ScanResult) -> None:
    """Fill in the pictures' dimensions."""
    for row in rows:
        if not row["image_size"]:
            continue  # already reported
        start = int(row["start"])

        def head(count: int, at: int = start + int(row["image"])) -> bytes:
            return read(at, count)

        try:
            row["width"], row["height"] = look(head, int(row["image_size"]))
        except BadData as error:
            found.report(Damage(error.reason, start, b"", error.detail))


class TarRecords(Sharded):
    """Records of tar shards; see ``index.open_records``.

    ``rows`` has for each shard its array of dtype ``ROW``, or the .npy file of that array.
    """

    def __init__(
        self, name: str, paths: Sequence[str], shards: Sequence[int], rows: Sequence[Path | np.ndarray]
    ) -> None:
        super().__init__(name, shard_names(paths), shards, rows)
        self._paths = tuple(paths)
        self._rows = Arrays(rows)
        self._reader = Reader()

    def read(self, index: int) -> Record:
        """Return a record by its index; see ``RecordSource.read``."""
        shard, number = self.locate(index)
        start, *parts, _, _ = self._rows[shard][number].item()
        where = self.shard_name(shard)
        try:
            head, image, text, extra = self._pieces(self._paths[shard], start, parts)
        except OSError as error:
            raise BadData("unreadable", str(error), where, f"{where}/{number}") from error
        first = first_member(head)
        if first is None:
            detail = "the shard has changed since it was indexed; run semroute data index again"
            raise BadData("bad header", detail, where, f"{where}/{number}")
        key = f"{where}/{key_text(_key(first.name)[0])}"
        if not parts[1]:
            raise BadData("zero bytes", "the picture is empty", where, key)
        if (len(image), len(text), len(extra)) != (parts[1], parts[3], parts[5]):
            raise BadData("truncated", "the shard has become shorter since it was indexed", where, key)
        try:
            return Record(key, image, captions_of(text, extra))
        except ValueError as error:
            raise BadData("bad captions", str(error), where, key) from error

    def _pieces(self, path: str, start: int, parts: Sequence[int]) -> tuple[bytes, bytes, bytes, bytes]:
        """Read the record's first headers, picture, text and JSON, in one read if they are close together."""
        image, image_size, text, text_size, extra, extra_size = parts
        head = min(at for at in (image, text, extra) if at)
        spans = [(0, head), (image, image_size), (text, text_size), (extra, extra_size)]
        length = max(at + size for at, size in spans)
        if length <= head + image_size + text_size + extra_size + GAP:
            block = self._reader.read(path, start, length)
            pieces = [block[at : at + size] for at, size in spans]
        else:
            pieces = [self._reader.read(path, start + at, size) for at, size in spans]
        return pieces[0], pieces[1], pieces[2], pieces[3]

    def dimensions(self) -> UInt32[np.ndarray, "N 2"] | None:
        """Return width and height of every picture, 0 where unknown; None if no picture's size is known."""
        found = super().dimensions()
        return found if found is not None and found.any() else None
