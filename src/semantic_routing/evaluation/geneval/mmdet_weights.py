"""The official detector's weights, as mmdetection 2.x saved them, by the names and shapes of transformers.

The names are those of the checkpoints that transformers publishes, such as
facebook/mask2former-swin-small-coco-instance, which every release of it can load. Each tensor of the file goes to one
place or, where transformers separates query, key and value, to three. Two things differ besides names: mmdetection
merges patches in the order of ``nn.Unfold``, and it stores the table of window positions, which transformers computes;
the table is compared with that and left out.

The mapping was made from the sources of both (mmdetection 2.x, mmcv 1.x, transformers 5.23). It is tested by modules
with small sizes and by the names and shapes of the full model. The file itself was not available.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.checkpoint.foreign import raise_if_any, read_upstream

OFFICIAL = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
"""The file that GenEval's own script downloads; mmdetection ends names with the start of the file's SHA-256."""
SIZES: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
"""Swin-S."""

_PIXELS, _SWIN = "model.pixel_level_module", "model.pixel_level_module.encoder"
_DECODER = "model.transformer_module.decoder"
_ENDS = r"(weight|bias)"
_BLOCK, _OUR_BLOCK = r"backbone\.stages\.(\d+)\.blocks\.(\d+)", rf"{_SWIN}.encoder.layers.\1.blocks.\2"
_PIXEL_DECODER = r"panoptic_head\.pixel_decoder"
_PIXEL_LAYER, _OUR_PIXEL_LAYER = rf"{_PIXEL_DECODER}\.encoder\.layers\.(\d+)", rf"{_PIXELS}.decoder.encoder.layers.\1"
_LAYER, _OUR_LAYER = r"panoptic_head\.transformer_decoder\.layers\.(\d+)", rf"{_DECODER}.layers.\1"
_DEFORMABLE = "(sampling_offsets|attention_weights|value_proj|output_proj)"

RULES: tuple[tuple[str, str], ...] = (
    # Swin
    (rf"backbone\.patch_embed\.projection\.{_ENDS}", rf"{_SWIN}.embeddings.patch_embeddings.projection.\1"),
    (rf"backbone\.patch_embed\.norm\.{_ENDS}", rf"{_SWIN}.embeddings.norm.\1"),
    (rf"{_BLOCK}\.norm1\.{_ENDS}", rf"{_OUR_BLOCK}.layernorm_before.\3"),
    (
        rf"{_BLOCK}\.attn\.w_msa\.relative_position_bias_table",
        rf"{_OUR_BLOCK}.attention.self.relative_position_bias_table",
    ),
    (rf"{_BLOCK}\.attn\.w_msa\.qkv\.{_ENDS}", rf"{_OUR_BLOCK}.attention.self.{{query,key,value}}.\3"),
    (rf"{_BLOCK}\.attn\.w_msa\.proj\.{_ENDS}", rf"{_OUR_BLOCK}.attention.output.dense.\3"),
    (rf"{_BLOCK}\.norm2\.{_ENDS}", rf"{_OUR_BLOCK}.layernorm_after.\3"),
    (rf"{_BLOCK}\.ffn\.layers\.0\.0\.{_ENDS}", rf"{_OUR_BLOCK}.intermediate.dense.\3"),
    (rf"{_BLOCK}\.ffn\.layers\.1\.{_ENDS}", rf"{_OUR_BLOCK}.output.dense.\3"),
    (
        rf"backbone\.stages\.(\d+)\.downsample\.(norm|reduction)\.{_ENDS}",
        rf"{_SWIN}.encoder.layers.\1.downsample.\2.\3",
    ),
    *((rf"backbone\.norm{i}\.{_ENDS}", rf"{_SWIN}.hidden_states_norms.stage{i + 1}.\1") for i in range(4)),
    # the pixel decoder; both programs count its levels from the coarsest
    (rf"{_PIXEL_DECODER}\.input_convs\.(\d+)\.conv\.{_ENDS}", rf"{_PIXELS}.decoder.input_projections.\1.0.\2"),
    (rf"{_PIXEL_DECODER}\.input_convs\.(\d+)\.gn\.{_ENDS}", rf"{_PIXELS}.decoder.input_projections.\1.1.\2"),
    (rf"{_PIXEL_LAYER}\.attentions\.0\.{_DEFORMABLE}\.{_ENDS}", rf"{_OUR_PIXEL_LAYER}.self_attn.\2.\3"),
    (rf"{_PIXEL_LAYER}\.norms\.0\.{_ENDS}", rf"{_OUR_PIXEL_LAYER}.self_attn_layer_norm.\2"),
    (rf"{_PIXEL_LAYER}\.ffns\.0\.layers\.0\.0\.{_ENDS}", rf"{_OUR_PIXEL_LAYER}.fc1.\2"),
    (rf"{_PIXEL_LAYER}\.ffns\.0\.layers\.1\.{_ENDS}", rf"{_OUR_PIXEL_LAYER}.fc2.\2"),
    (rf"{_PIXEL_LAYER}\.norms\.1\.{_ENDS}", rf"{_OUR_PIXEL_LAYER}.final_layer_norm.\2"),
    (rf"{_PIXEL_DECODER}\.level_encoding\.weight", rf"{_PIXELS}.decoder.level_embed"),
    (rf"{_PIXEL_DECODER}\.lateral_convs\.0\.conv\.weight", rf"{_PIXELS}.decoder.adapter_1.0.weight"),
    (rf"{_PIXEL_DECODER}\.lateral_convs\.0\.gn\.{_ENDS}", rf"{_PIXELS}.decoder.adapter_1.1.\1"),
    (rf"{_PIXEL_DECODER}\.output_convs\.0\.conv\.weight", rf"{_PIXELS}.decoder.layer_1.0.weight"),
    (rf"{_PIXEL_DECODER}\.output_convs\.0\.gn\.{_ENDS}", rf"{_PIXELS}.decoder.layer_1.1.\1"),
    (rf"{_PIXEL_DECODER}\.mask_feature\.{_ENDS}", rf"{_PIXELS}.decoder.mask_projection.\1"),
    # the decoder of queries; its first attention looks at the picture, its second at the queries
    (rf"{_LAYER}\.attentions\.0\.attn\.in_proj_{_ENDS}", rf"{_OUR_LAYER}.cross_attn.in_proj_\2"),
    (rf"{_LAYER}\.attentions\.0\.attn\.out_proj\.{_ENDS}", rf"{_OUR_LAYER}.cross_attn.out_proj.\2"),
    (rf"{_LAYER}\.norms\.0\.{_ENDS}", rf"{_OUR_LAYER}.cross_attn_layer_norm.\2"),
    (rf"{_LAYER}\.attentions\.1\.attn\.in_proj_{_ENDS}", rf"{_OUR_LAYER}.self_attn.{{q_proj,k_proj,v_proj}}.\2"),
    (rf"{_LAYER}\.attentions\.1\.attn\.out_proj\.{_ENDS}", rf"{_OUR_LAYER}.self_attn.out_proj.\2"),
    (rf"{_LAYER}\.norms\.1\.{_ENDS}", rf"{_OUR_LAYER}.self_attn_layer_norm.\2"),
    (rf"{_LAYER}\.ffns\.0\.layers\.0\.0\.{_ENDS}", rf"{_OUR_LAYER}.fc1.\2"),
    (rf"{_LAYER}\.ffns\.0\.layers\.1\.{_ENDS}", rf"{_OUR_LAYER}.fc2.\2"),
    (rf"{_LAYER}\.norms\.2\.{_ENDS}", rf"{_OUR_LAYER}.final_layer_norm.\2"),
    (rf"panoptic_head\.transformer_decoder\.post_norm\.{_ENDS}", rf"{_DECODER}.layernorm.\1"),
    (r"panoptic_head\.query_embed\.weight", "model.transformer_module.queries_embedder.weight"),
    (r"panoptic_head\.query_feat\.weight", "model.transformer_module.queries_features.weight"),
    (r"panoptic_head\.level_embed\.weight", "model.transformer_module.level_embed.weight"),
    *(
        (rf"panoptic_head\.mask_embed\.{2 * i}\.{_ENDS}", rf"{_DECODER}.mask_predictor.mask_embedder.{i}.0.\1")
        for i in range(3)
    ),
    (rf"panoptic_head\.cls_embed\.{_ENDS}", r"class_predictor.\1"),
)
"""A pattern of mmdetection's names and what transformers calls it; names in braces share its rows evenly."""
_POSITIONS = re.compile(rf"{_BLOCK}\.attn\.w_msa\.relative_position_index")
_MERGING = re.compile(r"backbone\.stages\.\d+\.downsample\..*")


def detector_config(**changes: Any) -> Any:
    """Return the ``Mask2FormerConfig`` of the official detector; ``changes`` of its sizes are for tests."""
    from transformers import Mask2FormerConfig, SwinConfig

    sizes = {name: changes.pop(name, value) for name, value in SIZES.items()}
    stages = [f"stage{i + 1}" for i in range(len(sizes["depths"]))]
    return Mask2FormerConfig(backbone_config=SwinConfig(**sizes, out_features=stages), num_labels=80, **changes)


def read_mmdet(path: Path) -> Mapping[str, Tensor]:
    """Read the tensors of an mmdetection checkpoint; ValueError if it is damaged or would run code."""
    if path.suffix == ".safetensors":
        return read_upstream(path)
    try:
        # mmdetection publishes torch's older kind of file, which cannot be mapped: it is read whole.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values and is refused, because loading it "
            "could run code; download it again or, if you trust it, save its 'state_dict' as safetensors"
        ) from error
    tensors = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} has no tensors under 'state_dict'; it is not a checkpoint of mmdetection")
    return tensors


def convert_mmdet(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename mmdetection's tensors to transformers' names.

    Raises ValueError for a name that does not belong to a Mask2Former on Swin, or windows that are numbered
    differently. Missing tensors are reported by transformers when it loads them.
    """
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in source.items():
        if _POSITIONS.fullmatch(name):
            if not torch.equal(tensor, window_positions(round(len(tensor) ** 0.5))):
                raise ValueError(f"{name} numbers the places of a window in another order than Swin's")
            continue
        places = _places(name)
        merging = _MERGING.fullmatch(name)
        parts = (unfold_to_interleaved(tensor) if merging else tensor).chunk(max(len(places), 1))
        converted |= zip(places, parts, strict=True) if places else ()
        unknown += [] if places else [name]
    raise_if_any({"unknown": unknown}, "mmdetection's Mask2Former with a Swin backbone")
    return converted


def _places(name: str) -> list[str]:
    """Return transformers' names for one of mmdetection's; empty if it is unknown."""
    for pattern, template in RULES:
        if match := re.fullmatch(pattern, name):
            place = match.expand(template)
            before, brace, after = place.partition("{")
            choices, _, end = after.partition("}")
            return [f"{before}{choice}{end}" for choice in choices.split(",")] if brace else [place]
    return []


def unfold_to_interleaved(tensor: Float[Tensor, "*out merged"]) -> Float[Tensor, "*out merged"]:
    """Reorder weights on four merged patches from the order of ``nn.Unfold`` to that of Swin.

    Unfold counts channels, then rows, then columns of the 2 x 2 patches; Swin columns, then rows, then channels.
    """
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)


def window_positions(side: int) -> Tensor:
    """Return the row of mmdetection's table of biases for each two places of a window."""
    row, column = torch.arange(side**2) // side, torch.arange(side**2) % side
    down, right = row[:, None] - row + side - 1, column[:, None] - column + side - 1
    return down * (2 * side - 1) + right
