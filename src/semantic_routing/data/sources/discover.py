"""Determines what a path of data means: its kind, its files, and what is left out.

A folder's kind depends on all files below it. The first of these that it holds decides:

1. tar shards 2. Parquet files with pictures 3. a manifest with a name in ``MANIFESTS`` 4. pictures with captions in
files next to them 5. a manifest with a name in ``TABLES``, or the only manifest in a subfolder, such as Hugging Face's
``train`` 6. pictures

Other files that look like data are counted by reason, as are splits other than ``train``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from semantic_routing.common.images.formats import picture_endings, unknown
from semantic_routing.data.sources.folder import BESIDE, is_hidden, list_pictures
from semantic_routing.data.sources.manifest_rows import MANIFESTS, NAMES, TABLES, find_manifest, manifests_in
from semantic_routing.data.sources.splits import without_other_splits
from semantic_routing.data.sources.storage import absolute, everything_below, expand, is_file, is_folder
from semantic_routing.toy.worlds import WORLDS

TAR, PARQUET, MANIFEST, FOLDER = "tar", "parquet", "manifest", "folder"
ENDINGS = {
    ".tar": TAR,
    ".parquet": PARQUET,
    ".jsonl": MANIFEST,
    ".json": MANIFEST,
    ".csv": MANIFEST,
    ".tsv": MANIFEST,
}
ABOUT = (
    *("", ".csv", ".css", ".db", ".html", ".ini", ".jsonl", ".lock", ".log", ".md", ".npy", ".npz", ".part", ".py"),
    *(".rst", ".safetensors", ".sh", ".toml", ".tsv", ".url", ".xml", ".yaml", ".yml"),
)
"""Endings of files that often accompany pictures; they are not reported."""

NOTES = ("readme", "license", "licence", "notes", "classes", "labels", "requirements")
"""Names of text files that are no captions."""
UNNAMED = "picture that the manifest does not name"


@dataclass(frozen=True)
class Data:
    """Meaning of a path of data."""

    kind: str
    """``TAR``, ``PARQUET``, ``MANIFEST``, or ``FOLDER`` for a folder of pictures without a manifest."""
    paths: list[str]
    left_out: dict[str, int]
    """Counts of unused files, by reason."""
    pictures: int = 0
    """Number of pictures in a manifest's folder, named by the manifest or not."""


def refuse_world(path: str) -> None:
    """Raise ValueError if a path of data is the name of a toy world."""
    if path in WORLDS:
        raise ValueError(
            f"{path!r} is {WORLDS[path].title}, which is generated and has no files; for a folder of that name write "
            f"./{path}"
        )


def discover(path: str) -> Data:
    """Determine what a path, pattern or URL means; ValueError if it has no data, or files of several kinds."""
    refuse_world(path)
    paths = expand(path)
    if len(paths) == 1 and is_folder(paths[0]):
        return _discover_folder(paths[0])
    if not paths or not all(is_file(found) for found in paths[:1]):
        raise ValueError(f"{path!r} does not exist; give shards, a Parquet file, a manifest or a folder")
    kinds = {ENDINGS.get(_ending(found), "") for found in paths}
    if "" in kinds:
        other = next(found for found in paths if _ending(found) not in ENDINGS)
        hint = "unpack it to .tar: a compressed one has no random access" if ".tar." in other or ".tgz" in other else ""
        raise ValueError(f"{other} is not {', '.join(ENDINGS)}; {hint or 'give such files or a folder'}")
    if len(kinds) > 1:
        raise ValueError(
            f"{path!r} matches files of several kinds ({', '.join(sorted(kinds))}); give each as its own path"
        )
    kind = kinds.pop()
    if kind == PARQUET and len(paths) == 1 and _has_pictures(paths[0]) is False and _names_pictures(paths[0]):
        kind = MANIFEST
    if kind == MANIFEST and len(paths) > 1:
        raise ValueError(f"{path!r} matches several manifests; give each as its own path")
    return Data(kind, paths, {})


def _discover_folder(folder: str) -> Data:
    everything = everything_below(folder)
    kept, splits = without_other_splits(folder, (path for path, _ in everything if _looks_like_data(path)))
    left_out = Counter({f"of a split other than train (give {way} to take it)": n for way, n in splits.items()})
    left_out["hidden file"] += sum(is_hidden(path) for path in kept)
    there = [path for path in kept if not is_hidden(path)]
    pictures = [path for path in there if _ending(path) in picture_endings()]
    known = {*picture_endings(), *ENDINGS, *BESIDE}
    left_out.update(unknown(_ending(path)) for path in there if _ending(path) not in known)
    shards = [path for path in there if _ending(path) == ".tar"]
    tables = [path for path in there if _ending(path) == ".parquet"]
    if shards:
        kind, paths = TAR, shards
        stems = {path[: path.rfind(".")] for path in shards}
        left_out["table beside tar shards"] += sum(path[: path.rfind(".")] not in stems for path in tables)
        left_out["picture beside tar shards"] += len(pictures)
    elif holding := _with_pictures(tables):
        kind, paths = PARQUET, holding
        left_out["table without pictures"] += len(tables) - len(holding)
        left_out["picture beside Parquet files"] += len(pictures)
    elif manifest := _manifest(folder, everything, there):
        return Data(MANIFEST, [manifest], _counted(left_out), len(pictures))
    elif tables and not pictures:
        kind, paths = PARQUET, tables  # opening it says what is missing
    else:
        kind, paths = FOLDER, [absolute(folder)]
        left_out["table without pictures"] += len(tables)
        left_out["manifest in a folder inside, taken by its own path"] += sum(_is_manifest(path) for path in there)
        left_out["no picture"] += _captions_alone(there)
        if not pictures:
            others = describe(_counted(left_out))
            endings = ", ".join(picture_endings())
            raise ValueError(f"{folder!r} holds no pictures ({endings})" + f"; left out: {others}" * bool(others))
    return Data(kind, paths, _counted(left_out))


def _counted(left_out: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in left_out.items() if count}


def _looks_like_data(path: str) -> bool:
    """Tell whether a file may be a picture, shard, table or caption; a hidden file needs the ending of one."""
    ending = _ending(path)
    return (not is_hidden(path) and ending not in ABOUT) or ending in ENDINGS or ending in picture_endings()


def _with_pictures(tables: Sequence[str]) -> list[str]:
    """Return the Parquet files with pictures, and damaged ones; an empty list if no file has pictures."""
    with ThreadPoolExecutor(16) as pool:  # each URL is a request
        found = list(pool.map(_has_pictures, tables))
    return [path for path, holds in zip(tables, found, strict=True) if holds is not False] if True in found else []


def _has_pictures(path: str) -> bool | None:
    """Tell whether a Parquet file holds pictures; None if it cannot be read."""
    try:
        from semantic_routing.data.sources.parquet import picture_column
        from semantic_routing.data.sources.row_groups import open_parquet

        with open_parquet(path) as file:
            return picture_column(file.schema_arrow) is not None
    except ValueError:  # pyarrow is missing, or the file is not Parquet
        return None


def _names_pictures(path: str) -> bool:
    """Tell whether a table without pictures has a column of their paths."""
    from semantic_routing.data.sources.parquet import text_columns
    from semantic_routing.data.sources.row_groups import open_parquet

    with open_parquet(path) as file:
        return any(name in text_columns(file.schema_arrow) for name in NAMES)


def _manifest(folder: str, everything: Sequence[tuple[str, int]], there: Sequence[str]) -> str:
    """Return the manifest that makes a folder a manifest's; an empty string if there is no such manifest."""
    if manifests_in(folder):
        return find_manifest(folder)
    inside = {path.rsplit("/", 1)[0] for path in there if _is_manifest(path)}
    own = absolute(folder).rstrip("/")
    place = own if own in inside else inside.pop() if len(inside) == 1 else ""
    if not place or list_pictures(folder, everything).beside.any():
        return ""
    return find_manifest(place)


def _is_manifest(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in (*MANIFESTS, *TABLES)


def _captions_alone(paths: Sequence[str]) -> int:
    """Count the text files without a picture or other file of that name; JSON files may be anything."""
    others = {path for path in paths if _ending(path) not in BESIDE}
    stems = {path[: path.rfind(".")] for path in others}
    alone = [path[: path.rfind(".")] for path in paths if _ending(path) in (".txt", ".caption")]
    known = stems | others
    return sum(stem not in known and stem.rsplit("/", 1)[-1].lower() not in NOTES for stem in alone)


def _ending(path: str) -> str:
    name = path[path.rfind("/") + 1 :]
    return name[name.rfind(".") :].lower() if name.rfind(".") > 0 else ""


def describe(left_out: dict[str, int]) -> str:
    """Describe in one line what is left out or damaged, the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(left_out).most_common())
