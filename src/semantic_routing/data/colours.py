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
_KINDS = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}
"""The mode of Pillow for each kind of colours that profiles describe."""


def to_srgb(image: Image.Image, info: Mapping[str, Any]) -> Image.Image:
    """RGB in sRGB of a picture of mode L, RGB, CMYK or LAB by its file's ``info``; without a profile, its plain RGB.

    A profile that is broken, or of another kind of colours than the picture's, is passed over, as browsers do.
    """
    profile = info.get("icc_profile") or b""
    transform = _transform(profile, image.mode) if profile or image.mode == "LAB" else None
    if transform is not None:
        return ImageCms.applyTransform(image, transform)  # type: ignore[return-value]  # None only if done in place
    image = image.convert("RGB")
    # A gamma means something only where nothing better is known; within 5% of 1 / 2.2 it is sRGB's, as for libpng.
    gamma = 1.0 if profile or "srgb" in info else info.get("gamma", 1 / 2.2) * 2.2
    if 0.1 < gamma < 10 and abs(gamma - 1) > 0.05 and "gamma" in info:
        curve = np.rint(255 * (np.arange(256) / 255) ** (1 / gamma)).astype(int).tolist()
        return image.point(3 * curve)
    return image


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None where nothing is to be done or nothing can be."""
    try:
        own = ImageCms.ImageCmsProfile(BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
        kind = own.profile.xcolor_space if profile else "Lab"
        if _KINDS.get(kind.strip()) != mode:
            return None
        # What browsers and Photoshop do: relative colours, with the darkest black there is taken for black.
        found = ImageCms.buildTransform(
            own,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return None if mode in ("L", "RGB") and _is_near(found, mode) else found


def _is_near(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform changes colours by so little that its profile is sRGB's, written in other words."""
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    probe = Image.fromarray(grid if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    shown = np.asarray(ImageCms.applyTransform(probe, transform), np.int16)
    return int(np.abs(shown - np.asarray(probe.convert("RGB"), np.int16)).max()) <= NEAR
