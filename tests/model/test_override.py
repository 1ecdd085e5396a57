"""Routing edited from outside: the file's form, what fits a network, and that the network reads what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from semantic_routing.model.dit import DiT
from semantic_routing.model.override import EditedRouter, RoutingOverride, rerouted
from semantic_routing.text.features import TextFeatures
from tests.helpers.networks import tiny_network

ROWS, WEIGHTS = ("block 2", "block 0"), ((0.5, 0.25, 0.25), (0.0, 0.0, 1.0))


def network(arm: str = "depth") -> DiT:
    model = tiny_network(arm, std=0.5, kv_heads=2)
    assert isinstance(model, DiT)
    return model


def some_text() -> TextFeatures:
    return TextFeatures(torch.randn(3, 2, 5, 8), torch.ones(2, 5, dtype=torch.bool))


def test_json_there_and_back() -> None:
    override = RoutingOverride(ROWS, WEIGHTS)
    assert RoutingOverride.from_json(json.loads(json.dumps(override.to_json()))) == override


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected {"),
        ({"rows": ["block 0"]}, "expected {"),
        ({"rows": ["block 0"], "weights": [[1]], "time": 0}, "expected {"),
        ({"rows": "block 0", "weights": [[1]]}, '"rows" must be a list of names'),
        ({"rows": [0], "weights": [[1]]}, '"rows" must be a list of names'),
        ({"rows": ["block 0"], "weights": [["1"]]}, '"weights" must be a list'),
        ({"rows": ["block 0"], "weights": [[True]]}, '"weights" must be a list'),
        ({"rows": [], "weights": []}, "0 rows"),
        ({"rows": ["block 0"], "weights": [[1], [1]]}, "1 rows, but 2 rows of weights"),
        ({"rows": ["block 0", "block 0"], "weights": [[1], [1]]}, "given twice"),
        ({"rows": ["block 0", "block 1"], "weights": [[1], [0.5, 0.5]]}, "'block 0' has 1 weights, but 'block 1' 2"),
        ({"rows": ["block 0"], "weights": [[0.5, 0.3]]}, "'block 0' must be at least 0 and add up to 1, not 0.8"),
        ({"rows": ["block 0"], "weights": [[1.5, -0.5]]}, "at least 0"),
        ({"rows": ["block 0"], "weights": [[float("nan"), 1]]}, "at least 0"),
    ],
)
def test_bad_files_are_named(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingOverride.from_json(data)


@pytest.mark.parametrize(
    ("arm", "rows", "weights", "message"),
    [
        ("depth", ("blok 1",), ((1.0, 0.0, 0.0),), "arm 'depth' has no row 'blok 1'; did you mean 'block 1'"),
        ("depth", ("block 1, keys",), ((1.0, 0.0, 0.0),), "has no row 'block 1, keys'"),
        ("depth", ("block 1",), ((1.0, 0.0),), "rows have 2 weights, but the model reads 3 layers"),
        ("attention", ("block 1",), ((1.0, 0.0, 0.0),), "depend on the text: give all rows, block 0, block 1, block 2"),
        ("fusedit", ("block 1",), ((1.0, 0.0, 0.0),), "arm 'fusedit' has no routing weights to override"),
    ],
)
def test_what_does_not_fit_a_network_is_named(arm: str, rows: tuple, weights: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingOverride(rows, weights).check(tiny_network(arm).cfg)


@pytest.mark.parametrize("arm", ["depth", "static", "uniform", "penultimate", "joint", "time", "hard"])
def test_named_rows_are_replaced_and_others_keep_their_own(arm: str) -> None:
    model, t = network(arm), torch.tensor([0.2, 0.8])
    router = RoutingOverride(ROWS, WEIGHTS).router(model.cfg, model.router)
    own = model.router.weights(t).expand(-1, 3, -1)
    weights = router.weights(t)
    assert weights.shape == own.shape
    assert torch.equal(weights[:, 1], own[:, 1])
    for place, row in zip((2, 0), WEIGHTS, strict=True):
        assert torch.equal(weights[:, place], torch.tensor(row).expand(len(own), -1))
    assert router.depends_on_time == model.depends_on_time
    assert torch.equal(model.router.weights(t).expand(-1, 3, -1), own), "the router itself must not change"


def test_rounded_rows_are_normalised() -> None:
    model = network()
    router = RoutingOverride(("block 1",), ((0.33, 0.33, 0.33),)).router(model.cfg, model.router)
    torch.testing.assert_close(router.weights()[0, 1], torch.full((3,), 1 / 3))


@pytest.mark.parametrize("arm", ["depth", "uniform", "joint", "attention", "depth-heads-kv", "joint-state"])
def test_the_network_reads_the_override_and_then_its_own_weights_again(arm: str) -> None:
    model, features, x, t = network(arm), some_text(), torch.randn(2, 3, 8, 8), torch.rand(2)
    before = model(x, t, model.prepare_text(features, t))
    table = torch.rand(len(model.cfg.rows), 3).softmax(-1)
    override = RoutingOverride(model.cfg.rows, tuple(map(tuple, table.tolist())))
    with rerouted(model, override.router(model.cfg, model.router)):
        assert not model.depends_on_time, "all rows are constant now"
        found = model(x, t, model.prepare_text(features))
    again = model(x, t, model.prepare_text(features, t))
    assert torch.equal(again, before)
    if arm == "depth":  # the same weights as logits of its own
        model.router.logits.data = table.log()
        torch.testing.assert_close(found, model(x, t, model.prepare_text(features)), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, before, atol=1e-5)


def test_an_edit_sees_the_weights_of_every_time() -> None:
    model, t = network("joint"), torch.tensor([0.0, 1.0])
    own = model.router.weights(t)
    flipped = EditedRouter(model.router, (len(model.cfg.rows), model.cfg.text_layers), lambda weights: weights.flip(1))
    assert torch.equal(flipped.weights(t), own.flip(1))
    with rerouted(model, flipped):
        assert model.depends_on_time
        steps = model.prepare_steps(some_text(), t)
    assert len(steps) == 2


def test_fusedit_has_nothing_to_reroute() -> None:
    with (
        pytest.raises(ValueError, match="arm 'fusedit' has no routing weights"),
        rerouted(tiny_network("fusedit"), network().router),
    ):
        pass
