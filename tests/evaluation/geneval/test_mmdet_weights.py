"""mmdetection's weights by transformers' names: every name and shape of the full model, and the sums that they make."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semantic_routing.evaluation.geneval import models as geneval_models
from semantic_routing.evaluation.geneval.mmdet_weights import (
    RULES,
    convert_mmdet,
    detector_config,
    read_mmdet,
    unfold_to_interleaved,
    window_positions,
)

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def convolution(name: str, out: int, into: int, side: int, bias: bool) -> Shapes:
    """mmcv's ConvModule with a GroupNorm."""
    weight: Shapes = {f"{name}.conv.weight": (out, into, side, side)}
    return weight | ({f"{name}.conv.bias": (out,)} if bias else {}) | norm(f"{name}.gn", out)


def feed_forward(name: str, width: int, inner: int) -> Shapes:
    """mmcv's FFN."""
    return linear(f"{name}.layers.0.0", inner, width) | linear(f"{name}.layers.1", width, inner)


def backbone_shapes(width: int, depths: list[int], heads: list[int]) -> Shapes:
    """mmdet/models/backbones/swin.py of 2.x, as configs/mask2former/mask2former_swin-s... sets it up."""
    shapes: Shapes = {"backbone.patch_embed.projection.weight": (width, 3, 4, 4)}
    shapes |= {"backbone.patch_embed.projection.bias": (width,)} | norm("backbone.patch_embed.norm", width)
    for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        c = width * 2**stage
        for block in range(depth):
            name = f"backbone.stages.{stage}.blocks.{block}"
            shapes |= norm(f"{name}.norm1", c) | norm(f"{name}.norm2", c)
            shapes |= linear(f"{name}.attn.w_msa.qkv", 3 * c, c) | linear(f"{name}.attn.w_msa.proj", c, c)
            shapes[f"{name}.attn.w_msa.relative_position_bias_table"] = (13 * 13, count)
            shapes[f"{name}.attn.w_msa.relative_position_index"] = (49, 49)
            shapes |= feed_forward(f"{name}.ffn", c, 4 * c)
        if stage < len(depths) - 1:
            name = f"backbone.stages.{stage}.downsample"
            shapes |= norm(f"{name}.norm", 4 * c) | linear(f"{name}.reduction", 2 * c, 4 * c, bias=False)
        shapes |= norm(f"backbone.norm{stage}", c)
    return shapes


def head_shapes(channels: list[int], c: int, inner: int, encoder: int, decoder: int, queries: int) -> Shapes:
    """mmdet/models/dense_heads/mask2former_head.py and plugins/msdeformattn_pixel_decoder.py of 2.x."""
    pixel, shapes = "panoptic_head.pixel_decoder", {}
    for level in range(3):
        shapes |= convolution(f"{pixel}.input_convs.{level}", c, channels[3 - level], 1, bias=True)
    for layer in range(encoder):
        name = f"{pixel}.encoder.layers.{layer}"
        points = 8 * 3 * 4  # heads, levels, points
        shapes |= linear(f"{name}.attentions.0.sampling_offsets", 2 * points, c)
        shapes |= linear(f"{name}.attentions.0.attention_weights", points, c)
        shapes |= linear(f"{name}.attentions.0.value_proj", c, c) | linear(f"{name}.attentions.0.output_proj", c, c)
        shapes |= feed_forward(f"{name}.ffns.0", c, inner)
        shapes |= norm(f"{name}.norms.0", c) | norm(f"{name}.norms.1", c)
    shapes[f"{pixel}.level_encoding.weight"] = (3, c)
    shapes |= convolution(f"{pixel}.lateral_convs.0", c, channels[0], 1, bias=False)
    shapes |= convolution(f"{pixel}.output_convs.0", c, c, 3, bias=False)
    shapes |= {f"{pixel}.mask_feature.weight": (c, c, 1, 1), f"{pixel}.mask_feature.bias": (c,)}
    for layer in range(decoder):
        name = f"panoptic_head.transformer_decoder.layers.{layer}"
        for attention in range(2):
            inside = f"{name}.attentions.{attention}.attn"
            shapes |= {f"{inside}.in_proj_weight": (3 * c, c), f"{inside}.in_proj_bias": (3 * c,)}
            shapes |= linear(f"{inside}.out_proj", c, c)
        shapes |= feed_forward(f"{name}.ffns.0", c, 2 * inner)
        for place in range(3):
            shapes |= norm(f"{name}.norms.{place}", c)
    shapes |= norm("panoptic_head.transformer_decoder.post_norm", c)
    shapes |= {f"panoptic_head.{name}.weight": (queries, c) for name in ("query_embed", "query_feat")}
    shapes["panoptic_head.level_embed.weight"] = (3, c)
    shapes |= linear("panoptic_head.cls_embed", 81, c)
    for place in (0, 2, 4):
        shapes |= linear(f"panoptic_head.mask_embed.{place}", c, c)
    return shapes


def official_shapes() -> Shapes:
    return backbone_shapes(96, [2, 2, 18, 2], [3, 6, 12, 24]) | head_shapes([96, 192, 384, 768], 256, 1024, 6, 9, 100)


def tensors(shapes: Shapes, device: str = "cpu") -> dict[str, Tensor]:
    """Random weights; on the device "meta" only their shapes."""
    made = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    return made | {name: window_positions(7) for name in shapes if name.endswith("relative_position_index")}


SMALL = {"embed_dim": 24, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
SMALL |= {"encoder_feedforward_dim": 16, "dim_feedforward": 32, "num_queries": 5}


def small_tensors() -> dict[str, Tensor]:
    """Of the full depth but little width."""
    shapes = backbone_shapes(24, [2, 2, 18, 2], [3, 6, 12, 24]) | head_shapes([24, 48, 96, 192], 32, 16, 6, 9, 5)
    return tensors(shapes)


def load(weights: dict[str, Tensor], **sizes: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation.from_pretrained(
        None, config=detector_config(**sizes), state_dict=weights, output_loading_info=True
    )


def test_every_weight_has_its_place_in_the_full_depth() -> None:
    source = small_tensors()
    model, report = load(convert_mmdet(source), **SMALL)
    # The last norm of a Swin that classifies, which is not run here, and the weights of a loss.
    unused = ("encoder.swin.layernorm.weight", "encoder.swin.layernorm.bias", "criterion.empty_weight")
    assert all(name.endswith(unused) for name in report["missing_keys"])
    assert not report["unexpected_keys"]
    # Nothing is lost and nothing is twice: the sum over all weights stays, but for the tables of positions.
    sizes = sum(value.numel() for name, value in source.items() if not name.endswith("position_index"))
    filled = [value for name, value in model.named_parameters() if not name.endswith(unused)]
    assert sum(value.numel() for value in filled) == sizes
    total = sum(value.double().sum() for name, value in source.items() if not name.endswith("position_index"))
    assert sum(value.double().sum() for value in filled).item() == pytest.approx(total.item(), abs=1e-6)


def test_the_full_model_has_the_right_shapes() -> None:
    from transformers import Mask2FormerForUniversalSegmentation

    names = convert_mmdet(small_tensors()).keys()
    converted = convert_mmdet(tensors(official_shapes(), "meta"))
    assert converted.keys() == names
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(detector_config())
    unused = sum(
        p.numel() for n, p in model.named_parameters() if n.endswith(("swin.layernorm.weight", "swin.layernorm.bias"))
    )
    assert sum(t.numel() for t in converted.values()) == sum(p.numel() for p in model.parameters()) - unused
    own = {tuple(value.shape) for value in model.state_dict().values()}
    assert {tuple(value.shape) for value in converted.values()} <= own
    # The published model's size, in its documentation 69 million.
    assert round(sum(t.numel() for t in converted.values()) / 1e6) == 69


def test_every_rule_is_used() -> None:
    names = list(official_shapes())
    assert all(any(re.fullmatch(pattern, name) for name in names) for pattern, _ in RULES)
    matches = [sum(bool(re.fullmatch(pattern, name)) for pattern, _ in RULES) for name in names]
    assert all(n == (not name.endswith("position_index")) for n, name in zip(matches, names, strict=True))


def test_patches_merge_alike() -> None:
    from transformers.models.swin.modeling_swin import SwinPatchMerging

    height, width, c = 6, 4, 5
    scale, shift, reduction = torch.randn(4 * c), torch.randn(4 * c), torch.randn(2 * c, 4 * c)
    x = torch.randn(2, height * width, c)
    # As mmdetection merges: nn.Unfold, LayerNorm, Linear.
    picture = x.view(2, height, width, c).permute(0, 3, 1, 2)
    patches = nn.Unfold(kernel_size=2, stride=2)(picture).transpose(1, 2)
    expected = nn.functional.layer_norm(patches, (4 * c,), scale, shift) @ reduction.T
    theirs = SwinPatchMerging(c)
    theirs.load_state_dict(
        {
            "norm.weight": unfold_to_interleaved(scale),
            "norm.bias": unfold_to_interleaved(shift),
            "reduction.weight": unfold_to_interleaved(reduction),
        }
    )
    assert torch.allclose(theirs(x, (height, width)), expected, atol=1e-5)


def part(weights: dict[str, Tensor], prefix: str, renames: dict[str, str] | None = None) -> dict[str, Tensor]:
    """The weights of one module, by the names that its class has today."""
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    for old, new in (renames or {}).items():
        found = {name.replace(old, new): value for name, value in found.items()}
    return found


def test_windows_attend_alike() -> None:
    from transformers.models.swin.modeling_swin import SwinAttention

    config = detector_config(**SMALL).backbone_config
    config._attn_implementation = "eager"
    source, c, heads = small_tensors(), 48, 6
    name = "backbone.stages.1.blocks.1.attn.w_msa."
    x = torch.randn(3, 49, c)
    # As mmdetection attends within windows.
    qkv = (x @ source[f"{name}qkv.weight"].T + source[f"{name}qkv.bias"]).reshape(3, 49, 3, heads, c // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    table, places = source[f"{name}relative_position_bias_table"], source[f"{name}relative_position_index"]
    bias = table[places.view(-1)].view(49, 49, heads).permute(2, 0, 1)
    mixed = ((q * (c // heads) ** -0.5 @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v).transpose(1, 2)
    expected = mixed.reshape(3, 49, c) @ source[f"{name}proj.weight"].T + source[f"{name}proj.bias"]
    theirs = SwinAttention(config, c, heads, 7).eval()
    today = {"self.query": "q_proj", "self.key": "k_proj", "self.value": "v_proj", "output.dense": "o_proj"}
    today |= {"self.relative_position_bias_table": "relative_position_bias.relative_position_bias_table"}
    weights = convert_mmdet(source)
    prefix = "model.pixel_level_module.encoder.encoder.layers.1.blocks.1.attention."
    theirs.load_state_dict(part(weights, prefix, today))
    assert torch.allclose(theirs(x)[0], expected, rtol=1e-4, atol=1e-3)


def test_queries_attend_alike() -> None:
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerMaskedAttentionDecoderLayer

    source, c = small_tensors(), 32
    name = "panoptic_head.transformer_decoder.layers.4."

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        attention = nn.MultiheadAttention(c, 8)
        attention.load_state_dict(part(source, f"{name}attentions.{index}.attn."))
        return attention(query, key, value, attn_mask=mask)[0]

    def normalise(index: int, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(
            x, (c,), source[f"{name}norms.{index}.weight"], source[f"{name}norms.{index}.bias"]
        )

    queries, places = torch.randn(5, 2, c), torch.randn(5, 2, c)
    memory, memory_places = torch.randn(12, 2, c), torch.randn(12, 2, c)
    mask = torch.rand(16, 5, 12) > 0.6
    mask[..., 0] = False
    # mmdetection's order of a layer: cross_attn, norm, self_attn, norm, ffn, norm.
    x = normalise(0, queries + attend(0, queries + places, memory + memory_places, memory, mask))
    x = normalise(1, x + attend(1, x + places, x + places, x, None))
    inner = torch.relu(x @ source[f"{name}ffns.0.layers.0.0.weight"].T + source[f"{name}ffns.0.layers.0.0.bias"])
    x = x + inner @ source[f"{name}ffns.0.layers.1.weight"].T + source[f"{name}ffns.0.layers.1.bias"]
    expected = normalise(2, x)
    theirs = Mask2FormerMaskedAttentionDecoderLayer(detector_config(**SMALL)).eval()
    theirs.load_state_dict(part(convert_mmdet(source), "model.transformer_module.decoder.layers.4."))
    found = theirs(queries, 0, None, [memory_places], places, [memory], encoder_attention_mask=mask)[0]
    assert torch.allclose(found, expected, atol=1e-4)


def test_window_positions_are_swins() -> None:
    from transformers.models.swin.modeling_swin import SwinRelativePositionBias

    for side in (2, 3, 7):
        theirs = SwinRelativePositionBias(1, (side, side)).relative_position_index
        assert torch.equal(window_positions(side).view(-1), theirs)
        # As mmdetection computes them.
        steps = (torch.arange(side)[:, None] * (2 * side - 1) + torch.arange(side)).reshape(1, -1)
        assert torch.equal(window_positions(side), (steps + steps.T).flip(1))


def test_what_is_not_such_a_model_is_refused() -> None:
    source = small_tensors()
    with pytest.raises(ValueError, match=r"1 tensors unknown \(backbone.layer1.0.conv1.weight\)"):
        convert_mmdet(source | {"backbone.layer1.0.conv1.weight": torch.zeros(1)})
    index = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"
    with pytest.raises(ValueError, match="another order than Swin's"):
        convert_mmdet(source | {index: source[index].T})


class Harmful:
    """Would make a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_files(tmp_path: Path) -> None:
    weights = {"a": torch.arange(3.0)}
    file = tmp_path / "detector.pth"
    for new in (True, False):  # mmdetection publishes the older kind
        content = {"meta": {"CLASSES": ("person", "bicycle"), "epoch": 50}, "state_dict": weights}
        torch.save(content, file, _use_new_zipfile_serialization=new)
        assert torch.equal(read_mmdet(file)["a"], weights["a"])
    torch.save({"weights": weights}, file)
    with pytest.raises(ValueError, match="no tensors under 'state_dict'"):
        read_mmdet(file)
    torch.save({"state_dict": weights, "meta": Harmful(tmp_path / "harm")}, file)
    with pytest.raises(ValueError, match="is refused"):
        read_mmdet(file)
    assert not (tmp_path / "harm").exists()
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is damaged"):
        read_mmdet(file)
    with pytest.raises(ValueError, match="cannot read"):
        read_mmdet(tmp_path / "none.pth")


def test_the_official_file_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mask2former.pth"
    torch.save({"meta": {}, "state_dict": small_tensors()}, file, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(geneval_models, "detector_config", lambda: detector_config(**SMALL))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    variant = geneval_models.load_detector(file).identity
    assert variant == {"name": file.name, "weights": digest, "label": "variant: mmdetection's mask2former.pth"}
    monkeypatch.setattr(geneval_models, "OFFICIAL", f"mask2former-{digest[:8]}.pth")
    assert geneval_models.load_detector(str(file)).identity["label"] == "official weights"
