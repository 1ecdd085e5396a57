"""FuseDiT: the layers that its blocks read, its joint attention over text and image, and its errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from semantic_routing.model.arms import PAPER_ARMS
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import DiT
from semantic_routing.model.fusedit import FuseDiT, rotate_keys_by_text_length
from semantic_routing.text.features import TextFeatures
from tests.helpers.networks import DISTINCT, randomize, tiny_config
from tests.helpers.reference_network import reference_velocity

CFG = tiny_config("fusedit", **DISTINCT | {"depth": 2, "fusedit_first_layer": 2})


def some_text(layers: int = 5, kv_heads: int = 2, head_dim: int = 8) -> TextFeatures:
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    keys, values = torch.randn(2, layers, 2, kv_heads, 6, head_dim)
    return TextFeatures(torch.randn(layers, 2, 6, 20), mask, keys, values)


def test_block_i_reads_layer_first_plus_i() -> None:
    features = some_text()
    context = FuseDiT(CFG).prepare_text(features)
    assert features.keys is not None
    assert features.values is not None
    assert len(context.keys) == len(context.values) == CFG.depth
    keys = rotate_keys_by_text_length(features.keys, features.mask.sum(1), CFG.rope_theta)
    for i in range(CFG.depth):
        assert torch.equal(context.keys[i], keys[2 + i])
        assert torch.equal(context.values[i], features.values[2 + i])
    assert context.mask is features.mask


def test_network_is_joint_attention_over_valid_text_and_image() -> None:
    model, features = randomize(FuseDiT(CFG)), some_text()
    x, t = torch.randn(2, 3, 4, 6), torch.rand(2)
    expected = reference_velocity(model, x, t, features)
    found = model(x, t, model.prepare_text(features))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_text_is_prepared_without_time() -> None:
    model, features = FuseDiT(CFG), some_text()
    assert not model.depends_on_time
    context = model.prepare_text(features)
    assert features.values is not None
    assert context.values[0].data_ptr() == features.values[2].data_ptr(), "values are used in place"


def test_frozen_bfloat16_text_joins_a_float32_image() -> None:
    model, features = FuseDiT(CFG), some_text()
    nn.init.normal_(model.proj_out.weight)
    rough = features.to(dtype=torch.bfloat16)
    x, t = torch.randn(2, 3, 4, 6), torch.rand(2)
    out = model(x, t, model.prepare_text(rough))
    assert out.dtype == torch.float32
    assert torch.equal(out, model(x, t, model.prepare_text(rough.to(dtype=torch.float32))))


def test_states_without_keys_and_values_are_refused() -> None:
    features = some_text()
    with pytest.raises(ValueError, match="with_kv=True"):
        FuseDiT(CFG).prepare_text(TextFeatures(features.hidden, features.mask))


@pytest.mark.parametrize("sizes", [(4, 2, 8), (5, 1, 8), (5, 2, 4)])
def test_keys_of_another_shape_are_refused(sizes: tuple[int, int, int]) -> None:
    layers, heads, head_dim = sizes
    message = (
        f"gives {layers} layers with {heads} key heads of {head_dim}, but FuseDiT joins them and needs "
        "5 layers with 2 heads of 8"
    )
    with pytest.raises(ValueError, match=message):
        FuseDiT(CFG).prepare_text(some_text(*sizes))


def test_more_blocks_than_layers_are_refused() -> None:
    FuseDiT(replace(CFG, depth=3))
    message = "fusedit_first_layer=2 with depth=4 needs 6 language-model layers, but there are 5"
    with pytest.raises(ValueError, match=message):
        FuseDiT(replace(CFG, depth=4))


@pytest.mark.parametrize("arm", PAPER_ARMS)
def test_make_model_knows_every_arm(arm: str) -> None:
    assert type(make_model(replace(CFG, arm=arm))) is (FuseDiT if arm == "fusedit" else DiT)
