"""Colours as viewers show them: those of an embedded profile, or of a PNG's gamma, are brought to sRGB."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

NEAR = 3
"""Levels of 255 by which a profile's colours may differ from sRGB's and still count as sRGB, which is left as it is."""
_USUAL = 1 / 2.2
"""The gamma of files for usual screens."""
_LEVELS = Image.frombytes("L", (256, 1), bytes(range(256)))
_KINDS = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}
"""The mode of Pillow for each kind of colours that profiles describe."""


def to_srgb(image: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """RGB in sRGB of a picture of mode L, RGB, CMYK or LAB by its file's ``info``; without a profile, its plain RGB.

    A profile that is broken, or of another kind of colours than the picture's, is passed over, as browsers do.
    """
    profile = info.get("icc_profile") or b""
    transform = _transform(profile, image.mode) if profile or image.mode == "LAB" else None
    if transform is None:
        image = image.convert("RGB")
        return image if profile or "srgb" in info else _from_gamma(image, info.get("gamma", _USUAL))
    if image.mode == "L":  # exactly, and of each level only once
        levels = np.asarray(ImageCms.applyTransform(_LEVELS, transform))
        return image.convert("RGB").point(levels[0].T.ravel().tolist())
    shown = ImageCms.applyTransform(image, transform)
    assert shown is not None  # as it would be if it were done in place
    return shown


def _from_gamma(image: Image.Image, gamma: float) -> Image.Image:
    """RGB whose levels are light to the power ``gamma``; within 5% of 1 / 2.2 they are sRGB's, as for libpng."""
    exponent = _USUAL / gamma if gamma else 1.0
    if not 0.1 < exponent < 10 or abs(1 / exponent - 1) <= 0.05:
        return image
    return image.point(3 * np.rint(255 * (np.arange(256) / 255) ** exponent).astype(int).tolist())


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None where nothing is to be done or nothing can be."""
    try:
        kind, own = "LAB", ImageCms.createProfile("LAB")
        if profile:
            read = ImageCms.ImageCmsProfile(BytesIO(profile))
            kind, own = _KINDS.get(read.profile.xcolor_space.strip(), ""), read.profile
        if kind != mode:
            return None
        # What browsers and Photoshop do: relative colours, with the darkest black there is taken for black. The
        # shortcut through a coarse table is off by ten levels of 255 in Lab and in dark greys.
        exact = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.HIGHRESPRECALC
        found = ImageCms.buildTransform(
            own,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            exact | ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return None if mode in ("L", "RGB") and _is_near(found, mode) else found


def _is_near(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform changes colours by so little that its profile is sRGB's, written in other words."""
    steps = np.linspace(0, 255, 16).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(64, 64, 3)
    probe = _LEVELS if mode == "L" else Image.fromarray(grid)
    shown = np.asarray(ImageCms.applyTransform(probe, transform), np.int16)
    return int(np.abs(shown - np.asarray(probe.convert("RGB"), np.int16)).max()) <= NEAR
