"""State of the page and its links, and pictures that hold their settings."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import parse_qsl

import numpy as np
import pytest

from semantic_routing.explorer.picture import read_settings, to_png
from semantic_routing.explorer.state import State, check_prompt, from_query, to_query
from semantic_routing.model.override import RoutingOverride

EDIT = RoutingOverride(("block 3, head 1, values",), ((0.1234, 0.3766, 0.5),))


@pytest.mark.parametrize(
    "state",
    [
        State(),
        State(prompt='a "red" circle & 50 % of a <square>, ünïcödé\nand ${value} #1', seed=7, time=0.35),
        State(prompt="a star", steps=12, guidance=4.5, sampler="renoise", shift=4.0, edit=EDIT),
        State(scale=0.5, gains={1: 0.0, 12: 2.5}),
    ],
)
def test_a_link_reproduces_the_state(state: State) -> None:
    default = State(prompt="other", steps=3, sampler="heun", shift=2.0)
    query = dict(parse_qsl(to_query(state), keep_blank_values=True))
    assert from_query(query, replace(default, edit=None)) == state


def test_what_a_link_does_not_name_is_the_default() -> None:
    default = State(prompt="a star", steps=3)
    assert from_query({"seed": "4", "__theme": "dark"}, default) == replace(default, seed=4)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"steps": "many"}, "bad steps"),
        ({"steps": "0"}, "there are 0 steps; the page draws with 1 to 200"),
        ({"steps": "9000"}, "there are 9000 steps"),
        ({"seed": "-1"}, "the seed is -1"),
        ({"guidance": "nan"}, "guidance is nan"),
        ({"sampler": "euller"}, "unknown sampler 'euller'; did you mean"),
        ({"time": "2"}, "the time is 2"),
        ({"scale": "inf"}, "the scale is inf"),
        ({"edit": "{"}, "bad edit"),
        ({"edit": '{"rows":["block 0"],"weights":[[0.5,0.1]]}'}, "must be at least 0 and add up to 1"),
        ({"gains": "[1]"}, "bad gains"),
        ({"gains": '{"0": 2}'}, "gains are for layers from 1 on"),
    ],
)
@pytest.mark.behaviour(
    "Exploring",
    when="a link to the page has a value that is missing, out of range or cut off",
    then="the page opens as usual, and one sentence names the value",
)
def test_bad_links_are_refused_with_the_parameter(query: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_query(query, State())


@pytest.mark.behaviour(
    "Exploring",
    when="a prompt is empty or has 10,000 characters",
    then="one sentence says what to type; pictures stay as they are",
)
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "Type a prompt first"),
        (" \n", "Type a prompt first"),
        ("a" * 10_000, "has 10,000 characters; at most 4,000"),
    ],
)
def test_bad_prompts_get_a_sentence(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_prompt(prompt)
    assert check_prompt(" a star ") == "a star"


def test_a_png_holds_its_settings() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    settings = {"prompt": "ein röter Kreis 红", "seed": 3, "edit": EDIT.to_json()}
    assert read_settings(to_png(image, settings)) == settings
