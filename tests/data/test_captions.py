"""One caption of several, by two numbers."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_routing.common.errors import BadData
from semantic_routing.data.captions import CaptionChoice

CAPTIONS = {"txt": ("short",), "dense": ("long", "longer"), "url": ("https://x",)}


def test_the_usual_keys_in_their_order():
    usual = CaptionChoice()
    assert usual.choose({"prompt": ("p",), "text": ("t",), "url": ("u",)}, 0.9, 0.9) == "t"
    assert usual.choose({"text": (), "caption": (" c\n",)}, 0.0, 0.0) == "c"
    assert CaptionChoice(prefer="dense").choose(CAPTIONS, 0.0, 0.9) == "longer"
    assert CaptionChoice(prefer="dense").choose({"txt": ("short",)}, 0.0, 0.9) == "short"


def test_keys_are_mixed_by_their_weights():
    choice = CaptionChoice(("txt", "dense"), (1.0, 3.0))
    numbers = (np.arange(1000) + 0.5) / 1000
    chosen = [choice.choose(CAPTIONS, u, 0.0) for u in numbers]
    assert chosen == ["short"] * 250 + ["long"] * 750


def test_weights_count_among_the_keys_that_a_record_has():
    choice = CaptionChoice(("txt", "none", "dense"), (1.0, 8.0, 1.0))
    numbers = (np.arange(100) + 0.5) / 100
    assert [choice.choose(CAPTIONS, u, 0.6) for u in numbers] == ["short"] * 50 + ["longer"] * 50
    assert choice.choose(CAPTIONS, 1 - 2**-53, 1 - 2**-53) == "longer"


@pytest.mark.parametrize("choice", [CaptionChoice(), CaptionChoice(("dense",))])
def test_no_caption_has_a_reason(choice: CaptionChoice):
    with pytest.raises(BadData) as caught:
        choice.choose({"url": ("https://x",)}, 0.0, 0.0)
    assert (caught.value.reason, caught.value.detail) == ("no caption", "found url")


@pytest.mark.parametrize(
    ("keys", "weights", "message"),
    [(("a", "b"), (1.0,), "1 caption weights for 2"), (("a", "a"), (), "twice"), (("a",), (0.0,), "above 0")],
)
def test_impossible_choices(keys: tuple[str, ...], weights: tuple[float, ...], message: str):
    with pytest.raises(ValueError, match=message):
        CaptionChoice(keys, weights)
