"""Image grids and PNG files, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semantic_routing.common.images.save import grid, is_valid_image, save_png

RNG = np.random.default_rng(0)


def images(count: int) -> list[np.ndarray]:
    return [RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8) for _ in range(count)]


def test_grid_is_filled_row_by_row() -> None:
    parts = images(5)
    found = grid(parts, columns=3, gap=1)
    grey = np.full((9, 16, 3), 200, np.uint8)
    for i, part in enumerate(parts):
        top, left = 1 + 4 * (i // 3), 1 + 5 * (i % 3)
        grey[top : top + 3, left : left + 4] = part
    np.testing.assert_array_equal(found, grey)


def test_png_holds_the_pixels_enlarged(tmp_path: Path) -> None:
    (image,) = images(1)
    save_png(tmp_path / "deep" / "a.png", image, scale=2)
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "deep" / "a.png")), np.kron(image, np.ones((2, 2, 1)))
    )
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_only_intact_images_of_the_right_size_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert not is_valid_image(path, (8, 8))
    save_png(path, RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert is_valid_image(path, (8, 8))
    assert not is_valid_image(path, (16, 16))
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"text"):
        path.write_bytes(damaged)
        assert not is_valid_image(path, (8, 8))


def test_a_png_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot write"):
        save_png(tmp_path / "file" / "a.png", images(1)[0])
