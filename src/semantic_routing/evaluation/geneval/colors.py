"""GenEval's colours: CLIP compares an object, cut out by its mask, with sentences about each colour.

The official scorer runs OpenAI's ViT-L/14 in half precision through open_clip; here it is float32 through transformers,
so results can differ only for near ties. Images are prepared by Pillow with torchvision's arithmetic: the shorter side
is resized to the network's size, bicubic and antialiased, and the middle is cut out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from semantic_routing.evaluation.geneval.verdict import COLORS, Detection

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = "#999"
"""The value of pixels outside an object's mask."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipColors:
    """Names colours by CLIP's similarity of a picture and a sentence."""

    def __init__(self, model: Any, tokenizer: Any, identity: dict[str, Any]) -> None:
        """Take a ``CLIPModel``; it is frozen and used on its device. ValueError if it is not OpenAI's kind."""
        for part in (model.config.text_config, model.config.vision_config):
            if part.hidden_act != "quick_gelu":
                raise ValueError(
                    f"this CLIP computes {part.hidden_act}, OpenAI's weights need quick_gelu; use a checkpoint such as "
                    "openai/clip-vit-large-patch14"
                )
        self.identity = identity
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._sentences: dict[str, Float[Tensor, "colors width"]] = {}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        """Return the colour of each object of the class ``name``."""
        if not objects:
            return []
        side = self._model.config.vision_config.image_size
        pixels = torch.stack([clip_pixels(cut_out(image, one), side) for one in objects])
        seen = self._model.vision_model(pixel_values=pixels.to(self._model.device)).pooler_output
        likeness = F.normalize(self._model.visual_projection(seen), dim=-1) @ self._classifier(name).T
        return [COLORS[index] for index in likeness.argmax(dim=1).tolist()]

    def _classifier(self, name: str) -> Float[Tensor, "colors width"]:
        """Return a direction for each colour of a class: the normalised mean of normalised sentences."""
        if name not in self._sentences:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._model.device)
            read = self._model.text_model(**tokens).pooler_output
            each = F.normalize(self._model.text_projection(read), dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._sentences[name] = F.normalize(each.mean(dim=1), dim=-1)
        return self._sentences[name]


def cut_out(image: Image.Image, found: Detection) -> Image.Image:
    """Crop the object's box; pixels outside of its mask are gray."""
    if found.mask is not None:
        if found.mask.shape != image.size[::-1]:
            raise ValueError(f"the mask is of a picture of {found.mask.shape[::-1]} pixels, not {image.size}")
        inside = Image.fromarray(found.mask.astype(np.uint8) * 255)
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), inside)
    x1, y1, x2, y2 = found.box
    return image.crop((round(x1), round(y1), round(x2), round(y2)))


def clip_pixels(image: Image.Image, side: int) -> Float[Tensor, "3 {side} {side}"]:
    """Prepare a picture as CLIP does for validation."""
    short = min(image.size)
    width, height = (side if length == short else side * length // short for length in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    middle = resized.crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(middle)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
