"""A network under another arm: the same weights of layers, or one line that says why not."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from semantic_routing.model.arms import ARMS
from semantic_routing.model.change_arm import change_arm, changeable
from semantic_routing.model.dit import DiT
from semantic_routing.model.routing import LogitRouter
from semantic_routing.text.features import TextFeatures
from tests.helpers.networks import DISTINCT, tiny_network

FINER = [arm.name for arm in ARMS.values() if arm.finer]
CHAIN = ["uniform", "static", "depth", "depth-kv", "depth-heads", "depth-heads-kv", "depth-low-rank"]


def network(arm: str) -> DiT:
    model = tiny_network(arm, std=0.5, **DISTINCT)
    assert isinstance(model, DiT)
    return model


def changed(model: DiT, arm: str) -> DiT:
    found = change_arm(model, arm)
    assert isinstance(found, DiT)
    assert found.cfg.arm == arm
    return found


def rows(model: DiT) -> torch.Tensor:
    """Return the weights of each block's keys and values by head: [D, 2, Hkv, L]."""
    cfg = model.cfg
    weights = model.router.weights()[0].expand(len(cfg.rows), -1)
    table = weights.reshape(cfg.depth, *cfg.strategy.split(cfg.kv_heads), -1)
    return table.expand(-1, 2, cfg.kv_heads, -1)


def test_the_chain_is_all_that_has_constant_logits() -> None:
    assert [name for name, arm in ARMS.items() if changeable(arm)] == CHAIN


@pytest.mark.parametrize(("coarse", "fine"), [("uniform", "depth"), ("static", "depth"), *product(["depth"], FINER)])
def test_a_coarser_arm_is_exact_as_a_finer_one_and_comes_back(coarse: str, fine: str) -> None:
    model = network(coarse)
    finer = changed(model, fine)
    assert torch.equal(rows(finer), rows(model)) or coarse == "uniform"
    torch.testing.assert_close(rows(finer), rows(model), rtol=0, atol=1e-7)
    hidden = torch.randn(model.cfg.text_layers, 2, 5, model.cfg.text_width)
    features = TextFeatures(hidden, torch.ones(2, 5, dtype=torch.bool))
    x, t = torch.randn(2, 3, 4, 6), torch.rand(2)
    before = model(x, t, model.prepare_text(features))
    torch.testing.assert_close(finer(x, t, finer.prepare_text(features)), before, rtol=1e-4, atol=1e-5)
    back = changed(finer, coarse)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize("arm", ["depth-kv", "depth-heads", "depth-low-rank"])
def test_a_finer_arm_is_exact_with_all_parts_apart(arm: str) -> None:
    model = network(arm)
    assert torch.equal(rows(changed(model, "depth-heads-kv")), rows(model))


@pytest.mark.parametrize(
    ("arm", "other", "axis"),
    [
        ("depth", "static", "blocks"),
        ("depth-kv", "depth", "keys and values of a block"),
        ("depth-heads", "depth-kv", "heads of a block"),
        ("depth-heads-kv", "depth-low-rank", "keys and values of a block"),
        ("depth-low-rank", "depth", "keys and values of a block"),
    ],
)
def test_rows_that_differ_cannot_become_one(arm: str, other: str, axis: str) -> None:
    message = f"not a case of arm '{other}': the weights of {axis} differ by up to 0"
    with pytest.raises(ValueError, match=message):
        change_arm(network(arm), other)


def test_one_row_that_differs_is_enough_and_a_constant_is_no_difference() -> None:
    model = changed(network("depth"), "depth-heads-kv")
    assert isinstance(model.router, LogitRouter)
    model.router.logits.data[5] += 3.0  # a softmax ignores it
    change_arm(model, "depth")
    model.router.logits.data[5, 2] += 0.01
    with pytest.raises(ValueError, match="differ by up to 0"):
        change_arm(model, "depth")


def test_weights_that_are_not_uniform_are_not_uniform() -> None:
    with pytest.raises(ValueError, match="not a case of arm 'uniform': its weights differ"):
        change_arm(network("static"), "uniform")


@pytest.mark.parametrize("arm", ["penultimate", "time", "attention", "fusedit", "hard", "joint-state"])
def test_arms_without_constant_logits_are_named(arm: str) -> None:
    with pytest.raises(ValueError, match=f"arm '{arm}' has no constant logits to convert; arms that have are uniform"):
        change_arm(network("depth"), arm)
