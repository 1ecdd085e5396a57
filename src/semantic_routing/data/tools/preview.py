"""``semroute data preview``: a contact sheet of images and captions as training will see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro
from PIL import Image, ImageDraw, ImageFont

from semantic_routing.common.files import written_whole
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.data.streams import Row

MARGIN, GAP, LINES = 20, 16, 6
INK, FAINT, PAPER = "#1f2328", "#6e7781", "#ffffff"


@dataclass(frozen=True, kw_only=True)
class PreviewArguments:
    """Draw a contact sheet of cropped images and the captions chosen for them."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Tar shards, Parquet files, manifests, folders or "shapes", as for training."""
    out: Path = Path("contact.png")
    """PNG file to write."""
    index: str = ""
    """Folder of the index, if it is not in the data's folder."""
    caption_keys: tuple[str, ...] = ()
    """Caption keys to choose from; by default the first of txt, text, caption, prompt."""
    sidecar: str = ""
    """Parquet or JSONL file with key and caption."""
    size: int = 256
    """Side of the images in pixels."""
    count: int = 24
    """Number of images: the first ones that a run with this seed trains on."""
    columns: int = 6
    """Images per row."""
    seed: int = 42
    """Random seed of the run."""

    def __post_init__(self) -> None:
        if min(self.size, self.count, self.columns) < 1:
            raise ValueError(f"size {self.size}, count {self.count} and columns {self.columns} must be at least 1")


def preview(args: PreviewArguments) -> str:
    """Write the contact sheet; return its path and the skipped records."""
    if not args.paths:
        raise ValueError("semroute data preview needs paths of data")
    cfg = DataConfig(
        paths=args.paths,
        index=args.index,
        caption_keys=args.caption_keys,
        sidecar=args.sidecar,
        weights=(1.0,) * len(args.paths) if len(args.paths) > 1 else (),
    )
    data = open_data(cfg, image_size=args.size, seed=args.seed)
    rows = data.load(0, args.count, range(args.count))
    rows = [row for row in rows if row.epoch == 0]
    with written_whole(args.out) as scratch:
        contact_sheet(rows, args.columns).save(scratch, format="PNG")
    skipped = [f"skipped {one.key or 'a record'} of {one.shard}: {one.reason}" for row in rows for one in row.skipped]
    return "\n".join([*skipped, str(args.out)])


def contact_sheet(rows: Sequence[Row], columns: int) -> Image.Image:
    """Draw pictures of one size in a grid, each above its caption and its record's key."""
    font, small = load_font(15), load_font(11)
    height, width, _ = rows[0].image.shape
    cell = max(width, 160)
    texts = [wrap(row.caption, font, cell, LINES) for row in rows]
    keys = [wrap(row.key, small, cell, 1, from_end=True) for row in rows]
    columns = min(columns, len(rows))
    lines = [texts[start : start + columns] for start in range(0, len(rows), columns)]
    depths = [height + 8 + 20 * max(map(len, line)) + 18 + GAP for line in lines]
    sheet = Image.new("RGB", (2 * MARGIN + columns * (cell + GAP) - GAP, 2 * MARGIN + sum(depths) - GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        left = MARGIN + i % columns * (cell + GAP)
        top = MARGIN + sum(depths[: i // columns])
        sheet.paste(Image.fromarray(row.image), (left + (cell - width) // 2, top))
        top += height + 8
        for line in texts[i]:
            pen.text((left, top), line, fill=INK, font=font)
            top += 20
        pen.text((left, top + 1), "".join(keys[i]), fill=FAINT, font=small)
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int, *, from_end: bool = False) -> list[str]:
    """Wrap a text to at most ``most`` lines of ``width`` pixels, with an ellipsis if it is cut.

    ``from_end`` keeps the end of a single line instead of its beginning.
    """
    if from_end:
        while text and font.getlength(text) > width:
            text = "…" + text.lstrip("…")[1:]
        return [text]
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width:  # no spaces: a URL, or a script without spaces
            fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines += [line, word[:fits]] if line else [word[:fits]]
            line, word = "", word[fits:]
        longer = f"{line} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    lines.append(line)
    if len(lines) > most:
        last = lines[most - 1]
        while font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "…"]
    return lines


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load Matplotlib's font, which has Latin, Greek and Cyrillic letters; other scripts show as boxes."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
