"""Mask2Former's pictures and answers: OpenCV's pixels, and the official reading in double precision."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from semantic_routing.evaluation.geneval import detector as geneval_detector
from semantic_routing.evaluation.geneval.detector import (
    MEAN,
    STD,
    TOP,
    Geometry,
    Mask2FormerDetector,
    fill_mask,
    fit,
    postprocess,
    preprocess,
    resize_bilinear,
    two_resizes,
)
from semantic_routing.evaluation.geneval.mmdet_weights import detector_config
from semantic_routing.evaluation.geneval.models import load_detector, load_geneval_models
from semantic_routing.evaluation.geneval.verdict import CLASSES
from tests.helpers.tiny_models import SMALL, small_model


def pattern(height: int, width: int) -> np.ndarray:
    i, j, c = np.ogrid[:height, :width, :3]
    return ((i * i * 7 + j * j * 13 + c * 101 + i * j * 3) % 256).astype(np.uint8)


def test_resizing_equals_opencv() -> None:
    # What cv2.resize of OpenCV 4.10.0 and of 5.0.0 returned.
    assert resize_bilinear(pattern(3, 4), (5, 6))[..., 0].tolist() == [
        [0, 6, 19, 45, 84, 117],
        [3, 10, 23, 50, 90, 123],
        [7, 15, 30, 58, 99, 133],
        [20, 28, 44, 74, 116, 151],
        [28, 37, 54, 84, 127, 163],
    ]


@pytest.mark.parametrize(
    ("size", "target", "digest"),
    [
        ((37, 41), (722, 800), "3092f9501f757d60"),
        ((256, 256), (800, 800), "b8b19eb603a948b0"),
        ((512, 768), (800, 1200), "7ec34a72dd6c6739"),
        ((1024, 1024), (800, 800), "5459cc8ffd591dc4"),
        ((333, 100), (1333, 400), "0e625ddde611ed91"),
        ((1600, 1600), (800, 800), "ddda23059b106dc0"),
    ],
)
def test_resizing_equals_opencv_to_the_last_bit(size: tuple[int, int], target: tuple[int, int], digest: str) -> None:
    resized = resize_bilinear(pattern(*size), target)
    assert resized.shape == (*target, 3)
    assert hashlib.sha256(resized.tobytes()).hexdigest()[:16] == digest


def test_resizing_to_the_same_size_changes_nothing() -> None:
    assert (resize_bilinear(pattern(9, 7), (9, 7)) == pattern(9, 7)).all()


@pytest.mark.parametrize(
    ("original", "resized", "padded"),
    [
        ((256, 256), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((480, 640), (800, 1067), (800, 1088)),
        ((640, 480), (1067, 800), (1088, 800)),
        ((100, 1000), (133, 1333), (160, 1344)),
    ],
)
def test_sizes(original: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]) -> None:
    assert fit(*original) == Geometry(original, resized, padded)


def test_a_line_is_no_picture() -> None:
    with pytest.raises(ValueError, match="too narrow for the detector: 3000 x 1 pixels"):
        fit(1, 3000)


def test_padding_is_gray_before_normalising() -> None:
    pixels, geometry = preprocess(np.full((48, 64, 3), (10, 20, 30), dtype=np.uint8))
    assert pixels.shape == (3, *geometry.padded) == (3, 800, 1088)
    for channel, value in enumerate((10, 20, 30)):
        inside = (value - MEAN[channel]) / STD[channel]
        outside = (128 - MEAN[channel]) / STD[channel]
        assert torch.allclose(pixels[channel, :, :1067], torch.tensor(inside))
        assert torch.allclose(pixels[channel, :, 1067:], torch.tensor(outside))


def naive(class_logits: Tensor, mask_logits: Tensor, geometry: Geometry) -> list[tuple[str, float, tuple, Tensor]]:
    """The official reading, step by step and in double precision: class, score, box and enlarged logits."""
    large = F.interpolate(mask_logits.double()[None], size=geometry.padded, mode="bilinear", align_corners=False)
    large = large[:, :, : geometry.resized[0], : geometry.resized[1]]
    large = F.interpolate(large, size=geometry.original, mode="bilinear", align_corners=False)[0]
    probabilities = class_logits.double().softmax(dim=-1)[:, :-1].flatten()
    top = probabilities.topk(min(TOP, len(probabilities)))
    found = []
    for probability, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        logits = large[place // len(CLASSES)]
        mask = (logits > 0).double()
        score = probability * ((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)).item()
        y, x = mask.bool().any(dim=1).nonzero(), mask.bool().any(dim=0).nonzero()
        box = tuple(float(v) for v in (x[0], y[0], x[-1] + 1, y[-1] + 1)) if len(x) else (0.0, 0.0, 0.0, 0.0)
        found.append((CLASSES[place % len(CLASSES)], score, box, logits))
    return found


GEOMETRIES = [
    Geometry((40, 56), (100, 139), (128, 160)),
    Geometry((200, 130), (123, 80), (128, 96)),
    Geometry((96, 64), (96, 64), (96, 64)),
    Geometry((300, 257), (65, 55), (96, 64)),
]


def answers(geometry: Geometry, kind: str) -> tuple[Tensor, Tensor]:
    """Class logits of which some are sure, and masks at a quarter of the padded size."""
    height, width = (side // 4 for side in geometry.padded)
    classes = torch.randn(12, len(CLASSES) + 1)
    classes[torch.arange(8), torch.randint(len(CLASSES), (8,))] += torch.linspace(2, 9, 8)
    masks = torch.randn(12, height, width) * 3
    if kind == "objects":
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        center = torch.rand(12, 2) * torch.tensor([height, width])
        masks = 8 - 2 * torch.hypot(y - center[:, :1, None], x - center[:, 1:, None]) + 0.1 * masks
    masks[0] = -1.0  # an empty mask
    return classes, masks


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", ["noise", "objects"])
def test_reading_equals_the_official_steps(geometry: Geometry, kind: str) -> None:
    classes, masks = answers(geometry, kind)
    expected = naive(classes, masks, geometry)
    for min_score in (0.0, 0.05, 0.3, 0.9):
        found = postprocess(classes, masks, geometry, min_score)
        wanted = [one for one in expected if one[1] > min_score]
        assert sum(map(len, found.values())) == len(wanted)
        assert all(one.score > min_score for objects in found.values() for one in objects)
        for name in found:
            for one, (_, score, box, logits) in zip(found[name], [w for w in wanted if w[0] == name], strict=True):
                assert one.score == pytest.approx(score, rel=1e-5)
                assert one.mask is not None
                clear = logits.abs().numpy() > 1e-4  # float32 may see nothing on the other side of 0
                assert (one.mask == (logits > 0).numpy())[clear].all()
                assert clear.mean() > 0.99
                assert one.box == box
    assert len(wanted) < len(expected)
    assert postprocess(classes, masks, geometry, 1.0) == {}


def test_a_query_may_be_of_several_classes() -> None:
    classes = torch.full((2, len(CLASSES) + 1), -20.0)
    classes[0, :2], classes[1, -1] = 0.0, 0.0
    masks = torch.full((2, 8, 8), 3.0)
    found = postprocess(classes, masks, Geometry((32, 32), (32, 32), (32, 32)), 0.3)
    assert {name: [one.score for one in objects] for name, objects in found.items()} == {
        name: [pytest.approx(0.5 * torch.tensor(3.0).sigmoid().item(), rel=1e-5)] for name in CLASSES[:2]
    }


def test_a_mask_in_the_padding_is_empty() -> None:
    classes = torch.zeros(1, len(CLASSES) + 1)
    masks = torch.full((1, 8, 8), -1.0)
    masks[0, 6:], masks[0, :, 6:] = 5.0, 5.0
    geometry = Geometry((16, 16), (16, 16), (32, 32))
    assert postprocess(classes, masks, geometry) == {}
    assert all(one[1] == 0 for one in naive(classes, masks, geometry))


def test_an_empty_mask_has_no_box_and_no_score() -> None:
    rows = two_resizes(8, 32, 32, 40)
    mask = np.zeros((40, 40), dtype=bool)
    assert fill_mask(mask, torch.full((8, 8), -1.0), rows, rows) == ((0.0, 0.0, 0.0, 0.0), 0.0)
    assert not mask.any()


@pytest.mark.parametrize("sizes", [(8, 32, 32, 40), (25, 100, 90, 37), (40, 160, 139, 600), (1, 32, 5, 3)])
def test_one_map_is_both_resizes(sizes: tuple[int, int, int, int]) -> None:
    n, padded, resized, original = sizes
    values = torch.randn(n, dtype=torch.float64)
    wide = F.interpolate(values[None, None], size=padded, mode="linear", align_corners=False)[..., :resized]
    expected = F.interpolate(wide, size=original, mode="linear", align_corners=False)[0, 0]
    resize = two_resizes(*sizes)
    assert torch.allclose(resize.weights.double() @ values, expected, atol=1e-6)
    for start in range(n):
        for stop in range(start + 1, n + 1):
            first, last = resize.touched(start, stop)
            reached = (resize.weights[:, start:stop] != 0).any(dim=1)
            assert reached[first:last].all()
            assert not reached[:first].any()
            assert not reached[last:].any()


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures fit 133 x 80, so that a network takes no time."""
    monkeypatch.setattr(geneval_detector, "LONG_SIDE", 133)
    monkeypatch.setattr(geneval_detector, "SHORT_SIDE", 80)


@pytest.mark.usefixtures("small_pictures")
def test_the_detector_reads_what_the_network_answers() -> None:
    model = small_model()
    with torch.no_grad():
        model.class_predictor.weight.mul_(60)  # else no class is likely
    detector = Mask2FormerDetector(model, {"name": "small"})
    image = Image.fromarray(pattern(60, 90))
    found = detector(image, 0.05)
    pixels, geometry = preprocess(pattern(60, 90))
    with torch.no_grad():
        answer = model(pixel_values=pixels[None])
    assert answer.masks_queries_logits.shape[-2:] == (geometry.padded[0] // 4, geometry.padded[1] // 4)
    expected = naive(answer.class_queries_logits[0], answer.masks_queries_logits[0], geometry)
    expected = [one for one in expected if one[1] > 0.05]
    assert len(expected) > 0
    assert sorted(one.score for objects in found.values() for one in objects) == pytest.approx(
        sorted(one[1] for one in expected), rel=1e-4
    )
    assert all(one.mask.shape == (60, 90) for objects in found.values() for one in objects)


@pytest.mark.usefixtures("small_pictures")
def test_a_narrow_picture_leaves_no_trace() -> None:
    # Some of transformers' Swins shrink their windows on narrow pictures, and for good; mmdetection's never does.
    model = small_model()
    detector = Mask2FormerDetector(model, {})

    def windows() -> list[tuple[int, int]]:
        return [(m.window_size, m.shift_size) for m in model.modules() if hasattr(m, "shift_size")]

    detector(Image.fromarray(pattern(8, 120)))
    assert windows() == [(7, 0), (7, 0), (7, 0), (7, 3), (7, 0)]


def test_other_classes_are_refused() -> None:
    from transformers import Mask2FormerForUniversalSegmentation

    config = detector_config(**SMALL)
    config.num_labels = 5
    with pytest.raises(ValueError, match="knows 5 classes, GenEval needs COCO's 80"):
        Mask2FormerDetector(Mask2FormerForUniversalSegmentation(config), {})


@pytest.mark.usefixtures("small_pictures")
def test_loading_a_folder(tmp_path: Path) -> None:
    model = small_model().eval()
    model.save_pretrained(tmp_path)
    detector = load_detector(tmp_path)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert detector.identity == {"name": str(tmp_path), "weights": digest, "label": f"variant: {tmp_path}"}
    image = Image.fromarray(pattern(48, 64))
    expected = Mask2FormerDetector(model, {})(image)
    found = detector(image)
    assert [one.score for name in found for one in found[name]] == [
        one.score for name in expected for one in expected[name]
    ]


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "class_predictor" not in name}, file)
    with pytest.raises(ValueError, match=r"they lack 2 tensors, first class_predictor.bias"):
        load_detector(tmp_path)
    save_file(weights | {"class_predictor.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"no weights in .* that fit a Mask2Former"):
        load_detector(tmp_path)
    file.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"no weights in .* that fit a Mask2Former"):
        load_detector(tmp_path)


def test_one_message_names_both_models_that_are_not_here() -> None:
    with pytest.raises(ValueError, match=r"GenEval's detector 'a/b' is not here; .*; GenEval's CLIP 'c/d' is not here"):
        load_geneval_models("a/b", "c/d")
    with pytest.raises(ValueError, match="detector 'no such folder' is not here"):
        load_detector("no such folder")
