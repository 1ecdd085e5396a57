"""Samples of the toy world: reproducible, true to their captions, and separate in training and evaluation."""

from collections import Counter

import numpy as np
import pytest

from semantic_routing.toy.captions import GENEVAL_TAGS, TAG_WEIGHTS, TAGS, falsify, prompts, sample, split_of
from semantic_routing.toy.claims import Count
from semantic_routing.toy.scenes import Object, Scene


def faults(drawn) -> list[str | None]:
    return [claim.fault(drawn.scene.objects, drawn.scene.background) for claim in drawn.claims]


def test_a_sample_depends_on_seed_and_index_alone():
    first = [sample(3, index) for index in range(20)]
    np.random.seed(0)
    again = [sample(3, index) for index in reversed(range(20))][::-1]
    assert first == again
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert [s.caption for s in first] != [sample(4, index).caption for index in range(20)]


def test_the_stream_is_the_same_on_every_machine():
    drawn = sample(0, 0)
    assert drawn.caption == "we see a large circle"
    assert drawn.scene == Scene("white", (Object("circle", "green", "large", 23.5, 7.5, 15),))
    assert sample(0, 1).caption == "i want two crosses, one blue and one purple"


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("tag", TAGS)
def test_captions_are_true_plain_and_of_their_split(tag, split):
    for index in range(100):
        drawn = sample(1, index, split=split, tag=tag)
        assert drawn.tag == tag
        assert faults(drawn) == [None] * len(drawn.claims)
        assert 1 <= len(drawn.scene.objects) <= 4
        assert drawn.caption == drawn.caption.lower()
        assert drawn.caption.isascii()
        assert len(drawn.caption.split()) <= 20
        assert split_of(drawn.caption) == split


def test_the_vocabulary_is_small():
    captions = (sample(2, index).caption for index in range(2000))
    words = {word for caption in captions for word in caption.replace(",", " ").split()}
    assert 80 < len(words) < 120


def test_tags_come_as_often_as_their_weights():
    assert set(GENEVAL_TAGS) < set(TAGS)
    assert sum(TAG_WEIGHTS.values()) == pytest.approx(1)
    counts = Counter(sample(5, index).tag for index in range(2000))
    for tag, weight in TAG_WEIGHTS.items():
        assert counts[tag] / 2000 == pytest.approx(weight, abs=0.025)


def test_counting_draws_exactly_what_is_counted():
    for index in range(50):
        drawn = sample(6, index, tag="counting")
        (claim,) = drawn.claims
        assert isinstance(claim, Count)
        assert len(drawn.scene.objects) == claim.count


def test_one_caption_in_eight_is_for_evaluation():
    share = np.mean([split_of(f"caption {i}") == "eval" for i in range(4000)])
    assert share == pytest.approx(1 / 8, abs=0.02)


def test_prompts_are_balanced_unseen_and_distinct():
    chosen = prompts(0, 220)
    assert Counter(p.tag for p in chosen) == dict.fromkeys(TAGS, 20)
    assert all(split_of(p.caption) == "eval" for p in chosen)
    assert len({p.caption for p in chosen}) == 220
    assert chosen == prompts(0, 220)
    assert [p.tag for p in prompts(0, 4, ("colors", "scene"))] == ["colors", "scene"] * 2


def test_prompts_repeat_only_where_a_tag_has_nothing_new():
    chosen = prompts(0, 100, ("single_object",))
    assert len(chosen) == 100
    assert 15 < len({p.caption for p in chosen}) < 100


@pytest.mark.parametrize("tag", TAGS)
def test_falsify_breaks_exactly_one_claim(tag):
    rng = np.random.default_rng(0)
    broken = set()
    for index in range(60):
        drawn = sample(7, index, tag=tag)
        false = falsify(drawn, rng)
        assert (false.caption, false.claims) == (drawn.caption, drawn.claims)
        wrong = [i for i, fault in enumerate(faults(false)) if fault is not None]
        assert len(wrong) == 1
        broken.update(wrong)
    assert broken == set(range(len(drawn.claims)))


def test_size_sets_the_pictures_side():
    assert sample(0, 0, size=64).image.shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "use 'train' or 'eval'"),
        ({"tag": "colour"}, "use one of single_object"),
        ({"seed": -1}, "must be at least 0"),
        ({"size": 0}, "at least 1 pixel"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(**{"seed": 0, "index": 0, **arguments})
    with pytest.raises(ValueError, match="at least one"):
        prompts(0, 0)
