"""The exact checker: true pictures pass, pictures with one claim broken do not, smudges are no shapes."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from semantic_routing.toy.captions import TAGS, falsify, sample
from semantic_routing.toy.checker import check, find_objects
from semantic_routing.toy.claims import Background, Count, Exists, Kind
from semantic_routing.toy.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Object, Scene, render

RED, WHITE = COLORS["red"], BACKGROUNDS["white"]


@pytest.fixture(scope="module", params=[20, pytest.param(55, marks=pytest.mark.stress)])
def pairs(request):
    """Draw true samples of every tag and split, each with a falsified one."""
    rng = np.random.default_rng(0)
    samples = [
        sample(11, index, tag=tag, split=("train", "eval")[index % 2]) for tag in TAGS for index in range(request.param)
    ]
    return [(true, falsify(true, rng)) for true in samples]


def accepted(samples, disturb=lambda image: image) -> float:
    return float(np.mean([check(disturb(one.image), one.claims).correct for one in samples]))


def as_bytes(image) -> np.ndarray:
    return np.clip(image, 0, 255).round().astype(np.uint8)


def test_true_pictures_are_accepted_and_falsified_ones_are_not(pairs):
    assert accepted([true for true, _ in pairs]) >= 0.995
    assert accepted([false for _, false in pairs]) <= 0.005


@pytest.mark.parametrize("disturbance", ["noise", "blur", "both"])
def test_noise_and_blur_do_little(pairs, disturbance):
    rng = np.random.default_rng(1)
    blur, noise = {"noise": (0.0, 8.0), "blur": (0.7, 0.0), "both": (0.6, 8.0)}[disturbance]

    def disturb(image):
        soft = gaussian_filter(image.astype(float), (blur, blur, 0))
        return as_bytes(soft + rng.normal(0, 1, image.shape) * noise)

    assert accepted([true for true, _ in pairs[::2]], disturb) >= 0.97
    assert accepted([false for _, false in pairs[::2]], disturb) <= 0.03


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_color_size_and_background_is_named(shape, size, background):
    extent = SIZES[size]
    for color in COLORS:
        drawn = Object(shape, color, size, 12 + extent / 2, 3 + extent / 2, extent)
        found = find_objects(render(Scene(background, (drawn,))))
        assert found.background == background
        (thing,) = found.objects
        assert (thing.shape, thing.color, thing.size) == (shape, color, size)
        assert thing.box == pytest.approx(drawn.box, abs=0.3)
        assert thing.center == pytest.approx((drawn.x, drawn.y), abs=0.3)


def test_larger_pictures_are_judged_too():
    for index in range(40):
        true = sample(12, index, size=128)
        assert check(true.image, true.claims).correct


def paint(draw) -> np.ndarray:
    """Draw a picture at four times its size, and reduce it."""
    image = Image.new("RGB", (128, 128), WHITE)
    draw(ImageDraw.Draw(image))
    return np.array(image.reduce(4))


@pytest.mark.parametrize(
    "draw",
    [
        lambda d: d.ellipse((32, 32, 87, 87), outline=RED, width=12),  # ring
        lambda d: d.rectangle((32, 40, 87, 59), fill=RED),  # bar
        lambda d: d.ellipse((32, 32, 87, 67), fill=RED),  # flat ellipse
        lambda d: d.polygon([(32, 32), (87, 32), (60, 87)], fill=RED),  # triangle on its tip
        lambda d: d.pieslice((32, 32, 87, 87), 0, 180, fill=RED),  # half a circle
        lambda d: (d.ellipse((20, 20, 71, 71), fill=RED), d.ellipse((60, 40, 112, 92), fill=RED)),  # merged
        lambda d: d.ellipse((10, 10, 117, 117), fill=RED),  # far too large
        lambda d: d.polygon([(60, 30), (88, 58), (60, 86), (32, 58)], fill=RED),  # square on its corner
    ],
)
def test_what_is_not_clearly_a_shape_is_a_blob(draw):
    image = paint(draw)
    assert [thing.shape for thing in find_objects(image).objects] == ["blob"]
    assert not any(check(image, (Exists(Kind(shape)),)).correct for shape in SHAPES)


def test_specks_are_nothing_and_foreign_colors_have_no_name():
    image = np.full((32, 32, 3), WHITE, dtype=np.uint8)
    image[4:6, 4:6] = RED
    assert find_objects(image).objects == ()
    black = paint(lambda d: d.ellipse((32, 32, 87, 87), fill=(10, 10, 10)))
    assert [thing.color for thing in find_objects(black).objects] == ["strange"]
    for darker, name in ((60, "red"), (100, "strange")):
        off = paint(lambda d, fill=(RED[0] - darker, *RED[1:]): d.ellipse((32, 32, 87, 87), fill=fill))
        assert [thing.color for thing in find_objects(off).objects] == [name]
    between = paint(lambda d: d.ellipse((32, 32, 75, 75), fill=RED))
    assert [thing.size for thing in find_objects(between).objects] == ["medium"]
    assert find_objects(np.full((32, 32, 3), (250, 130, 20), dtype=np.uint8)).background == "strange"


def test_reasons_say_what_was_found():
    image = render(Scene("white", (Object("circle", "red", "small", 8.0, 8.0, 8),)))
    assert check(image, (Exists(Kind("circle", "red")),)).reason == "everything claimed was found"
    assert check(image, (Count(Kind("circle", "red"), 3),)).reason == "found 1 red circle, wanted 3"
    assert check(image, (Background("black"),)).reason == "the background is white, wanted black"


def test_a_picture_must_be_square():
    with pytest.raises(ValueError, match="are square"):
        find_objects(np.zeros((32, 48, 3), dtype=np.uint8))
