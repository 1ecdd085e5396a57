"""FuseDiT: which layers it joins, that its attention is one softmax over text and image, and its refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from semantic_routing.model.arms import PAPER_ARMS
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import DiT, DiTConfig, patchify, unpatchify
from semantic_routing.model.fusedit import FuseDiT, turned_back
from semantic_routing.model.layers import apply_rope, rope_2d
from semantic_routing.text.features import TextFeatures

CFG = DiTConfig(
    arm="fusedit",
    depth=2,
    width=24,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=40,
    channels=3,
    text_width=20,
    text_layers=5,
    fusedit_first_layer=2,
)


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
    keys = turned_back(features.keys, features.mask.sum(1), CFG.rope_theta)
    for i in range(CFG.depth):
        assert torch.equal(context.keys[i], keys[2 + i])
        assert torch.equal(context.values[i], features.values[2 + i])
    assert context.mask is features.mask


def naive_forward(model: FuseDiT, x: Tensor, features: TextFeatures) -> Tensor:
    """The network one sample at a time: padding cut off, text and image concatenated, head by head."""
    assert features.keys is not None
    assert features.values is not None
    height, width = x.shape[2:]
    images = []
    for b in range(len(x)):
        n = int(features.mask[b].sum())
        # Rows and columns of the image are counted from the number of text tokens before it.
        rows, cols = height // 2 + n, width // 2 + n
        grid = [t.unflatten(0, (rows, cols)) for t in rope_2d(rows, cols, CFG.head_dim, CFG.rope_theta, x.device)]
        rope = (grid[0][n:, n:].flatten(0, 1), grid[1][n:, n:].flatten(0, 1))
        h = model.patch_embed(patchify(x[b : b + 1], 2))
        for i, block in enumerate(model.blocks):
            heads = block.attn.qkv(block.norm1(h))[0].unflatten(-1, (-1, CFG.head_dim))
            q, k, v = heads.split([CFG.heads, CFG.kv_heads, CFG.kv_heads], dim=1)
            q = apply_rope(block.attn.q_norm(q)[None], rope)[0]
            k = apply_rope(block.attn.k_norm(k)[None], rope)[0]
            out = []
            for head in range(CFG.heads):
                group = head * CFG.kv_heads // CFG.heads
                text_k = features.keys[CFG.fusedit_first_layer + i, b, group, :n]
                text_v = features.values[CFG.fusedit_first_layer + i, b, group, :n]
                keys, values = torch.cat([text_k, k[:, group]]), torch.cat([text_v, v[:, group]])
                out.append((q[:, head] @ keys.T / math.sqrt(CFG.head_dim)).softmax(-1) @ values)
            h = h + block.attn.out(torch.cat(out, dim=-1))
            h = h + block.mlp(block.norm2(h))
        images.append(unpatchify(model.proj_out(model.norm_out(h)), 2, height, width))
    return torch.cat(images)


def test_network_is_joint_attention_over_valid_text_and_image() -> None:
    model, features = FuseDiT(CFG), some_text()
    nn.init.normal_(model.proj_out.weight)
    x = torch.randn(2, 3, 4, 6)
    out = model(x, torch.rand(2), model.prepare_text(features))
    torch.testing.assert_close(out, naive_forward(model, x, features), rtol=1e-4, atol=1e-4)


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
