"""Converts colours to sRGB, by an embedded colour profile or a PNG's gamma."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

NEAR = 3
"""Largest difference from sRGB, in levels of 255, for which a profile counts as sRGB and colours stay unchanged."""
_USUAL = 1 / 2.2
"""Gamma of files for usual screens."""
_LEVELS = Image.frombytes("L", (256, 1), bytes(range(256)))
_KINDS = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}
"""Pillow's mode for each colour space of profiles."""


def to_srgb(image: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """Convert a picture of mode L, RGB, CMYK or LAB to sRGB by its file's ``info``; without a profile, to plain RGB.

    A broken profile, or one of another colour space than the picture's, is ignored, as browsers do.
    """
    profile = info.get("icc_profile") or b""
    transform = _transform(profile, image.mode) if profile or image.mode == "LAB" else None
    if transform is None:
        image = image.convert("RGB")
        return image if profile or "srgb" in info else _from_gamma(image, info.get("gamma", _USUAL))
    if image.mode == "L":  # exact, and computed once for each level
        levels = np.asarray(ImageCms.applyTransform(_LEVELS, transform))
        return image.convert("RGB").point(levels[0].T.ravel().tolist())
    shown = ImageCms.applyTransform(image, transform)
    assert shown is not None  # None is only for in-place transforms
    return shown


def _from_gamma(image: Image.Image, gamma: float) -> Image.Image:
    """Convert levels of a file's ``gamma`` to sRGB; a gamma within 5% of 1 / 2.2 counts as sRGB, as in libpng."""
    exponent = _USUAL / gamma if gamma else 1.0
    if not 0.1 < exponent < 10 or abs(1 / exponent - 1) <= 0.05:
        return image
    return image.point(3 * np.rint(255 * (np.arange(256) / 255) ** exponent).astype(int).tolist())


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the transform from a profile's colours to sRGB; None if it is unnecessary or impossible."""
    try:
        kind, own = "LAB", ImageCms.createProfile("LAB")
        if profile:
            read = ImageCms.ImageCmsProfile(BytesIO(profile))
            kind, own = _KINDS.get(read.profile.xcolor_space.strip(), ""), read.profile
        if kind != mode:
            return None
        # As browsers and Photoshop do: relative colorimetric intent with black point compensation. The default lookup
        # table is too coarse: ten levels of 255 off in Lab and in dark greys.
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
    """Tell whether a transform changes colours by at most ``NEAR`` levels."""
    steps = np.linspace(0, 255, 16).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(64, 64, 3)
    probe = _LEVELS if mode == "L" else Image.fromarray(grid)
    shown = np.asarray(ImageCms.applyTransform(probe, transform), np.int16)
    return int(np.abs(shown - np.asarray(probe.convert("RGB"), np.int16)).max()) <= NEAR
