"""GenEval's colours: how objects are cut out and prepared, and CLIP's choice against a plain one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semantic_routing.evaluation.geneval.colors import MEAN, STD, ClipColors, clip_pixels, cut_out
from semantic_routing.evaluation.geneval.models import load_colors
from semantic_routing.evaluation.geneval.verdict import COLORS, Detection
from tests.helpers.tiny_models import SIDE, small_clip, tokenizer


def pixels(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (20, 20), (50, 75), (90, 45), (7, 14)])
def test_preparation_equals_that_of_transformers(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = pixels(*size)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(clip_pixels(image, SIDE), expected, atol=1e-5)


def test_a_square_of_the_right_size_is_only_normalised() -> None:
    image = pixels(SIDE, SIDE)
    back = clip_pixels(image, SIDE) * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert torch.allclose(back * 255, torch.from_numpy(np.array(image)).permute(2, 0, 1).float(), atol=1e-3)


def test_the_middle_is_torchvisions() -> None:
    image = pixels(SIDE, SIDE + 19)  # round(19 / 2) = 10, where transformers cuts at 9
    assert torch.equal(clip_pixels(image, SIDE), clip_pixels(image.crop((10, 0, 10 + SIDE, SIDE)), SIDE))


def test_objects_are_cut_out_of_gray() -> None:
    image = pixels(40, 50)
    mask = np.zeros((40, 50), dtype=bool)
    mask[10:20, 5:15] = True
    mask[12, 7] = False
    cut = np.array(cut_out(image, Detection((5.0, 10.0, 15.0, 20.0), 1.0, mask)))
    expected = np.array(image)[10:20, 5:15].copy()
    expected[2, 2] = 0x99
    assert (cut == expected).all()
    plain = np.array(cut_out(image, Detection((5.0, 10.0, 15.0, 20.0), 1.0)))
    assert (plain == np.array(image)[10:20, 5:15]).all()
    with pytest.raises(ValueError, match="mask is of a picture"):
        cut_out(image, Detection((0.0, 0.0, 9.0, 9.0), 1.0, mask.T))


def test_the_choice_equals_a_plain_one(tmp_path: Path) -> None:
    model, words = small_clip().eval(), tokenizer(tmp_path)
    classifier = ClipColors(model, words, {})
    image = pixels(2, 3).resize((90, 60), Image.Resampling.NEAREST)  # six colours
    objects = [
        Detection((float(x), float(y), x + 25.0, y + 20.0), 1.0, np.random.default_rng(x + y).random((60, 90)) > 0.3)
        for x in (0, 30, 60)
        for y in (0, 20, 40)
    ]
    expected = []
    with torch.no_grad():
        for one in objects:
            view = clip_pixels(cut_out(image, one), SIDE)[None]
            likeness = []
            for color in COLORS:
                texts = [f"a photo of a {color} tv remote", f"a photo of a {color}-colored tv remote"]
                texts.append(f"a photo of a {color} object")
                answers = [model(**words(text, return_tensors="pt"), pixel_values=view) for text in texts]
                mean = torch.stack([answer.text_embeds[0] for answer in answers]).mean(dim=0)  # normalised by CLIP
                likeness.append((answers[0].image_embeds[0] @ (mean / mean.norm())).item())
            expected.append(COLORS[int(np.argmax(likeness))])
    assert len(set(expected)) > 1
    assert classifier(image, objects, "tv remote") == expected
    assert classifier(image, objects[4:5], "tv remote") == expected[4:5]
    assert classifier(image, [], "tv remote") == []


def test_the_activation_must_be_openais(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="computes gelu, OpenAI's weights need quick_gelu"):
        ClipColors(small_clip("gelu"), tokenizer(tmp_path), {})


def test_loading(tmp_path: Path) -> None:
    model = small_clip().eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_colors(tmp_path)
    tokenizer(tmp_path)
    loaded = load_colors(tmp_path)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.identity == {"name": str(tmp_path), "weights": digest, "label": f"variant: {tmp_path}"}
    image, whole = pixels(40, 40), [Detection((0.0, 0.0, 40.0, 40.0), 1.0)]
    assert loaded(image, whole, "cat") == ClipColors(model, tokenizer(tmp_path), {})(image, whole, "cat")
