"""The backbone: the paper's network, its start, what text and time may change, its sizes and its errors."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from semantic_routing.flow import path, velocity_from_image
from semantic_routing.model.arms import ARMS, PAPER_ARMS
from semantic_routing.model.build import make_model
from semantic_routing.model.context import TextContext
from semantic_routing.model.dit import Backbone, Block, DiT, DiTConfig, patchify, unpatchify
from semantic_routing.model.flops import META, count_image, count_text
from semantic_routing.model.fusedit import FuseBlock
from semantic_routing.model.layers import BlockText, TimeEmbedding, rope_2d
from semantic_routing.text.features import TextFeatures
from tests.helpers.networks import DISTINCT, move_zeros, randomize, tiny_config
from tests.helpers.reference_network import reference_velocity

CFG = tiny_config(**DISTINCT)
ROUTED = [arm for arm in PAPER_ARMS if arm != "fusedit"]
FINER = [arm.name for arm in ARMS.values() if arm.finer]
TIMED = ["time", "joint"]
CONDITIONINGS = ["none", "adaln-zero", "adaln-single", "addition"]
IMAGE = (3, 4, 6)
"""Channels and two different sides, so that rows and columns cannot be confused."""


def trained(cfg: DiTConfig) -> Backbone:
    """Return a frozen network whose zero weights have moved, as by training."""
    return move_zeros(make_model(cfg), std=0.2).requires_grad_(False)


def some_text(cfg: DiTConfig = CFG, lengths: tuple[int, ...] = (5, 3), padded_to: int = 5) -> TextFeatures:
    """Return states, keys and values for prompts of these lengths; padding holds large finite garbage."""
    mask = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
    L, B, N = cfg.text_layers, len(lengths), padded_to
    hidden = torch.randn(L, B, N, cfg.text_width)
    keys, values = torch.randn(2, L, B, cfg.kv_heads, N, cfg.head_dim)
    hidden[:, ~mask] = 1e4 * torch.randn(L, int((~mask).sum()), cfg.text_width)
    keys.transpose(2, 3)[:, ~mask] = 1e4
    values.transpose(2, 3)[:, ~mask] = -1e4
    return TextFeatures(hidden, mask, keys, values)


def run(model: Backbone, x: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
    return model(x, t, model.prepare_text(features, t))


def some_image() -> tuple[Tensor, Tensor]:
    return torch.randn(2, *IMAGE), torch.tensor([0.2, 0.7])


# --- patches ---


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patches_stand_row_by_row_and_hold_row_column_channel(patch: int) -> None:
    rows, columns, channels = 2, 3, 4
    x = torch.randn(2, channels, rows * patch, columns * patch)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, rows * columns, patch * patch * channels)
    for r in range(rows):
        for c in range(columns):
            token = tokens[:, r * columns + c].reshape(2, patch, patch, channels)
            cut = x[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            assert torch.equal(token, cut.permute(0, 2, 3, 1))
    assert torch.equal(unpatchify(tokens, patch, rows * patch, columns * patch), x)


def test_patch_embedding_is_a_strided_convolution() -> None:
    model, x = trained(CFG), torch.randn(2, *IMAGE)
    kernel = model.patch_embed.weight.reshape(CFG.width, 2, 2, 3).permute(0, 3, 1, 2)
    conv = nn.functional.conv2d(x, kernel, model.patch_embed.bias, stride=2)
    torch.testing.assert_close(model.patch_embed(patchify(x, 2)), conv.flatten(2).transpose(1, 2))


# --- the start of training ---


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("arm", [*PAPER_ARMS, *FINER])
def test_every_arm_and_conditioning_runs_starts_at_zero_and_learns(arm: str, conditioning: str) -> None:
    model = make_model(replace(CFG, arm=arm, conditioning=conditioning))
    x, t = some_image()
    out = run(model, x, t, some_text())
    assert out.shape == x.shape
    assert out.eq(0).all(), "the last layer starts at zero"

    nn.init.normal_(model.proj_out.weight)
    run(model, x, t, some_text()).square().sum().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert not unused


def a_block(kind: type[nn.Module], conditioning: str) -> tuple[nn.Module, tuple]:
    block = kind(replace(CFG, conditioning=conditioning))
    text = BlockText(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), None)
    return block, (torch.randn(2, 6, CFG.width), rope_2d(2, 3, 8, 1e4, torch.device("cpu")), text)


def test_adaln_zero_branches_start_as_identity() -> None:
    time = torch.randn(2, CFG.width)
    fuse, (x, rope, text) = a_block(FuseBlock, "adaln-zero")
    assert torch.equal(fuse(x, rope, text, time), x)
    # Attention to the text has no gate: it alone acts from the first step.
    block, (x, rope, text) = a_block(Block, "adaln-zero")
    assert torch.equal(block(x, rope, text, time), x + block.cross(x, text))


def test_text_projection_starts_normal_with_the_given_deviation() -> None:
    model = DiT(replace(CFG, text_width=128, text_init_std=0.3))
    assert model.text_proj.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert model.text_proj.bias.eq(0).all()


# --- the whole network, written out ---


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("arm", [*PAPER_ARMS, *FINER])
def test_the_network_is_the_papers(arm: str, conditioning: str) -> None:
    """Every arm and conditioning against float64 attention, RoPE, RMSNorm and SwiGLU of other code."""
    model = randomize(make_model(replace(CFG, arm=arm, conditioning=conditioning))).requires_grad_(False)
    features, x = some_text(), torch.randn(2, *IMAGE)
    t = torch.tensor([0.25, 0.75])
    found = run(model, x, t, features)
    expected = reference_velocity(model, x, t, features)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


# --- time ---


@pytest.mark.parametrize("arm", ROUTED)
def test_without_conditioning_only_the_gates_see_the_time(arm: str) -> None:
    model, features = trained(replace(CFG, arm=arm)), some_text()
    x, t = some_image()
    context = model.prepare_text(features, t)
    assert torch.equal(model(x, t, context), model(x, 1 - t, context)), "image work must not see t"

    assert model.depends_on_time == (arm in TIMED)
    changed = not torch.allclose(run(model, x, t, features), run(model, x, 1 - t, features), atol=1e-4)
    assert changed == model.depends_on_time


@pytest.mark.parametrize("conditioning", CONDITIONINGS[1:])
def test_conditioned_blocks_see_the_time_of_their_own_sample(conditioning: str) -> None:
    model, features = trained(replace(CFG, conditioning=conditioning)), some_text()
    x, t = some_image()
    later = t + torch.tensor([0.0, 0.2])
    a, b = run(model, x, t, features), run(model, x, later, features)
    torch.testing.assert_close(a[0], b[0])
    assert not torch.allclose(a[1], b[1], atol=1e-3)


def test_adaln_single_projects_the_time_once_and_adaln_zero_in_every_block() -> None:
    def products(conditioning: str) -> int:
        with META:
            model = make_model(replace(CFG, conditioning=conditioning))
        return count_image(model, 2, *IMAGE[1:], count_text(model, 2, 5)[1]).total

    embedding, projection = 2 * 2 * (256 + CFG.width) * CFG.width, 2 * 2 * CFG.width * 6 * CFG.width
    assert products("addition") - products("none") == embedding
    assert products("adaln-single") - products("none") == embedding + projection
    assert products("adaln-zero") - products("none") == embedding + CFG.depth * projection


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_only_conditioned_networks_have_a_time_embedding(conditioning: str) -> None:
    model = make_model(replace(CFG, conditioning=conditioning))
    found = any(isinstance(module, TimeEmbedding) for module in model.modules())
    assert found == (conditioning != "none")


def test_image_prediction_gives_the_velocity_to_the_predicted_image() -> None:
    model, features = trained(replace(CFG, prediction="image")), some_text()
    x, t = some_image()
    v = run(model, x, t, features)
    model.cfg = CFG  # the same weights, their output taken as it is
    image = run(model, x, t, features)
    torch.testing.assert_close(v, velocity_from_image(image, x, t))
    # Followed to the end, the velocity leads to the image: x + (1 - t) v.
    torch.testing.assert_close(x + (1 - t).reshape(2, 1, 1, 1) * v, image, rtol=1e-5, atol=1e-5)


def test_untrained_image_prediction_is_the_velocity_to_zero() -> None:
    model = make_model(replace(CFG, prediction="image"))
    image, noise = torch.zeros(2, *IMAGE), torch.randn(2, *IMAGE)
    t = torch.tensor([0.0, 0.5])
    v = run(model, path(image, noise, t), t, some_text())
    torch.testing.assert_close(v, image - noise)


# --- text ---


@pytest.mark.parametrize("arm", [*PAPER_ARMS, *FINER])
def test_padding_never_changes_an_image(arm: str) -> None:
    model, features = trained(replace(CFG, arm=arm)), some_text()
    x, t = some_image()
    longer = some_text(padded_to=9)
    for part, axis in (("hidden", 2), ("keys", 3), ("values", 3)):
        getattr(longer, part).narrow(axis, 0, 5).copy_(getattr(features, part))
    expected = run(model, x, t, features)
    torch.testing.assert_close(run(model, x, t, longer), expected, rtol=1e-4, atol=1e-5)

    assert features.keys is not None
    assert features.values is not None
    alone = TextFeatures(
        features.hidden[:, 1:, :3],
        features.mask[1:, :3],
        features.keys[:, 1:, :, :3],
        features.values[:, 1:, :, :3],
    )
    torch.testing.assert_close(run(model, x[1:], t[1:], alone), expected[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", [*PAPER_ARMS, *FINER])
def test_text_changes_its_own_sample_only(arm: str) -> None:
    model, features = trained(replace(CFG, arm=arm)), some_text()
    x, t = some_image()
    before = run(model, x, t, features)
    other = some_text()
    for part in ("hidden", "keys", "values"):
        getattr(features, part)[:, 1] = getattr(other, part)[:, 1]
    after = run(model, x, t, features)
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1], atol=1e-3)


@pytest.mark.parametrize("arm", ROUTED)
def test_shared_mixtures_are_projected_once(arm: str) -> None:
    """B1, B2, B3 and S1 run the wide text projection once, S2 and S3 once per block."""
    with META:
        model = make_model(replace(CFG, arm=arm))
    tokens, width = 2 * 5, CFG.text_width
    projections = CFG.depth if arm in ("depth", "joint") else 1
    keys_and_values = CFG.depth * width * 2 * CFG.kv_heads * CFG.head_dim
    assert count_text(model, 2, 5)[0].weights == 2 * tokens * (projections * width**2 + keys_and_values)


def test_context_without_mask_sees_every_token() -> None:
    model, features = trained(CFG), some_text(lengths=(5, 5))
    x, t = some_image()
    context = model.prepare_text(features)
    bare = TextContext(context.keys, context.values, None)
    torch.testing.assert_close(model(x, t, bare), model(x, t, context))


# --- sizes and mistakes ---

PAPER_PARAMETERS = {
    "penultimate": 2_246_693_952,
    "uniform": 2_246_693_952,
    "static": 2_246_693_988,
    "time": 2_246_778_468,
    "depth": 2_246_694_816,
    "joint": 2_248_722_336,
    "fusedit": 1_711_646_784,
}
"""The reference's counts at the paper's scale, exact; the paper's Table 4 gives them in millions."""


@pytest.mark.parametrize("arm", PAPER_ARMS)
def test_paper_scale_has_the_references_parameter_count(arm: str) -> None:
    with torch.device("meta"):
        model = make_model(DiTConfig(arm=arm))
    assert sum(p.numel() for p in model.parameters()) == PAPER_PARAMETERS[arm]


@pytest.mark.parametrize("arm", [*PAPER_ARMS, *FINER])
def test_shapes_can_be_worked_out_without_memory(arm: str) -> None:
    with torch.device("meta"):
        model, features = (
            make_model(replace(CFG, arm=arm)),
            TextFeatures(
                torch.empty(5, 2, 7, 20),
                torch.empty(2, 7, dtype=torch.bool),
                torch.empty(5, 2, 2, 7, 8),
                torch.empty(5, 2, 2, 7, 8),
            ),
        )
        x, t = torch.empty(2, *IMAGE), torch.empty(2)
    out = run(model, x, t, features)
    assert out.is_meta
    assert out.shape == x.shape


def test_sampling_in_inference_mode_leaves_training_possible() -> None:
    model, features = make_model(CFG), some_text()
    x, t = torch.randn(2, 3, 8, 10), torch.rand(2)  # a grid that no other test uses
    with torch.inference_mode():
        run(model, x, t, features)
    run(model, x, t, features).sum().backward()
    assert model.proj_out.weight.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 6, "kv_heads": 4}, "kv_heads=4 must divide heads=6"),
        ({"head_dim": 10}, "head_dim=10 must be a multiple of 4"),
    ],
)
def test_impossible_sizes_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CFG, **change)


@pytest.mark.parametrize(("height", "width"), [(5, 4), (4, 5)])
def test_latents_must_divide_into_patches(height: int, width: int) -> None:
    model = make_model(CFG)
    context = model.prepare_text(some_text())
    with pytest.raises(ValueError, match=f"latents of {height}x{width} do not divide into patches of 2"):
        model(torch.randn(2, 3, height, width), torch.rand(2), context)


@pytest.mark.parametrize("change", [{"text_layers": 6}, {"text_width": 24}])
def test_features_of_another_language_model_are_refused(change: dict) -> None:
    other = replace(CFG, **change)
    message = (
        f"the text encoder gives {other.text_layers} layers of width {other.text_width}, "
        "but this transformer reads 5 layers of width 20"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        make_model(CFG).prepare_text(some_text(other))


def test_time_routed_text_needs_the_time() -> None:
    with pytest.raises(ValueError, match="pass t"):
        make_model(replace(CFG, arm="time")).prepare_text(some_text())


def test_with_one_seed_all_arms_begin_with_the_same_backbone() -> None:
    found = []
    for arm in ("penultimate", "static", "depth", "time", "joint", "joint-state", "attention", *FINER):
        torch.manual_seed(3)
        model = DiT(replace(CFG, arm=arm))
        found.append({k: v for k, v in model.state_dict().items() if not k.startswith(("router.", "noise_level."))})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], found[0][name]) for name in other)
