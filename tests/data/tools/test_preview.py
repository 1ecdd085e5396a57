"""The contact sheet: the first pictures of training, with their captions below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.data.streams import Row
from semantic_routing.data.tools.preview import GAP, MARGIN, PreviewArguments, contact_sheet, load_font, preview, wrap


def test_the_sheet_shows_what_training_sees(tmp_path: Path):
    folder, out = tmp_path / "pictures", tmp_path / "sheets" / "contact.png"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (300, 200), (40 * i, 0, 255)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}")
    (folder / "4.png").write_bytes(b"broken")
    answer = preview(PreviewArguments(paths=(str(folder),), out=out, size=200, count=20, columns=2, seed=3))
    assert answer.splitlines() == [answer.splitlines()[0], str(out)]
    assert "4.png" in answer
    assert "not an image" in answer
    sheet = np.asarray(Image.open(out))
    data = open_data(DataConfig(paths=(str(folder),)), image_size=200, seed=3)
    rows = data.load(0, 5, range(5))
    assert sheet.shape[1] == 2 * MARGIN + 2 * 200 + GAP
    for i, row in enumerate(rows[:2]):
        left = MARGIN + i * (200 + GAP)
        np.testing.assert_array_equal(sheet[MARGIN : MARGIN + 200, left : left + 200], row.image)
        beneath = sheet[MARGIN + 200 : MARGIN + 260, left : left + 200]
        assert beneath.min() < 100 < beneath.mean()  # ink on paper


def test_long_captions_make_room_and_are_cut():
    image = np.zeros((160, 160, 3), np.uint8)
    short, long = (contact_sheet([Row(image, text, 0, 0, 0, "k")], 3) for text in ("a", "many words " * 50))
    assert short.width == long.width == 2 * MARGIN + 160
    assert short.height < long.height < short.height + 6 * 20 + 1


@pytest.fixture(scope="module")
def font() -> ImageFont.FreeTypeFont:
    return load_font(15)


@pytest.mark.parametrize("text", ["", "word", "some words that need lines " * 3, "https://" + "x" * 100, "猫" * 60])
def test_lines_fit_and_nothing_is_lost(text: str, font: ImageFont.FreeTypeFont):
    lines = wrap(text, font, 150, 100)
    assert all(font.getlength(line) <= 150 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(wrap(text, font, 150, 2)[i] == line for i, line in enumerate(lines[:1]))


def test_cut_texts_end_with_an_ellipsis(font: ImageFont.FreeTypeFont):
    lines = wrap("many words " * 50, font, 150, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert font.getlength(lines[-1]) <= 150
    [line] = wrap("00000.tar/a-very-long-key-0123456789", font, 150, 1, from_end=True)
    assert line.startswith("…")
    assert line.endswith("-0123456789")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="needs paths"):
        preview(PreviewArguments(paths=()))
    with pytest.raises(ValueError, match="at least 1"):
        PreviewArguments(paths=("x",), count=0)
