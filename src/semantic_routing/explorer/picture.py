"""Pictures as PNG files that hold their settings, and as ``data:`` addresses for the page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "semantic_routing"
"""Name of the PNG's text that holds the settings as JSON."""


def to_png(image: UInt8[np.ndarray, "H W 3"], settings: Mapping[str, Any]) -> bytes:
    """Return a PNG of an image, with the settings that made it as JSON in a text of the file."""
    texts = PngInfo()
    texts.add_itxt(KEY, json.dumps(settings, ensure_ascii=False, sort_keys=True))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", pnginfo=texts)
    return buffer.getvalue()


def read_settings(png: bytes) -> dict[str, Any]:
    """Return the settings in a PNG; ValueError if it has none."""
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        text = getattr(image, "text", {}).get(KEY)
    if text is None:
        raise ValueError("this picture holds no settings: it was not downloaded from semroute explore")
    found: dict[str, Any] = json.loads(text)
    return found


def data_url(content: bytes, kind: str) -> str:
    """Return an address that holds a file of a kind, such as image/png, itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
