"""Families whose blocks update the text: a block reads its text plus an addition, which is then subtracted again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from semantic_routing.adopt.families.family import Blocks, Family, named_if

Z_IMAGE_MULTIPLE = 32
"""Z-Image pads image and caption to a multiple of this."""


def after_image(transformer: Any, arguments: Mapping[str, Any], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Find Z-Image's captions: after the padded image."""
    p, f = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    places = []
    for image, length in zip(arguments["x"], lengths, strict=True):
        _, frames, height, width = image.shape
        tokens = (frames // f) * (height // p) * (width // p)
        places.append((tokens + -tokens % Z_IMAGE_MULTIPLE, length))
    return places


def before_image(transformer: Any, arguments: Mapping[str, Any], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Find texts at the beginning of the sequence, padding included."""
    return [(0, length) for length in lengths]


def unpadded(transformer: Any, arguments: Mapping[str, Any], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Find Lumina 2's texts: at the beginning of the sequence, without padding."""
    return [(0, length) for length in arguments["encoder_attention_mask"].sum(1).tolist()]


Z_IMAGE = Family(
    name="z-image",
    kind="stream",
    transformer="ZImageTransformer2DModel",
    reads=(-2,),
    text="cap_feats",
    entrance=("cap_embedder",),
    blocks=(
        Blocks(
            path="layers",
            arguments="x attn_mask freqs_cis adaln_input noise_mask adaln_noisy adaln_clean",
            text="x",
            joint=True,
        ),
    ),
    place=after_image,
    timestep="t",
    time=lambda timestep: timestep,
    refuses=lambda transformer, layers: named_if(
        transformer.config.siglip_feat_dim is not None, "siglip_feat_dim, as of Omni"
    ),
)

LUMINA2 = Family(
    name="lumina2",
    kind="stream",
    transformer="Lumina2Transformer2DModel",
    reads=(-2,),
    entrance=("time_caption_embed.caption_embedder",),
    blocks=(
        Blocks(
            path="layers",
            arguments="hidden_states attention_mask image_rotary_emb temb",
            text="hidden_states",
            joint=True,
        ),
    ),
    place=unpadded,
    time=lambda timestep: timestep,
)

QWEN_IMAGE = Family(
    name="qwen-image",
    kind="stream",
    transformer="QwenImageTransformer2DModel",
    reads=(-1,),
    entrance=("txt_norm", "txt_in"),
    blocks=(
        Blocks(
            path="transformer_blocks",
            arguments="hidden_states encoder_hidden_states encoder_hidden_states_mask temb image_rotary_emb "
            "joint_attention_kwargs modulate_index",
            text="encoder_hidden_states",
            output=0,
        ),
    ),
    time=lambda timestep: 1 - timestep,
    refuses=lambda transformer, layers: named_if(
        transformer.config.use_additional_t_cond or transformer.config.use_layer3d_rope,
        "use_additional_t_cond or use_layer3d_rope, as of Qwen-Image-Layered",
    ),
)

COGVIEW4 = Family(
    name="cogview4",
    kind="stream",
    transformer="CogView4Transformer2DModel",
    reads=(-2,),
    entrance=("patch_embed.text_proj",),
    blocks=(
        Blocks(
            path="transformer_blocks",
            arguments="hidden_states encoder_hidden_states temb image_rotary_emb attention_mask attention_kwargs",
            text="encoder_hidden_states",
            output=1,
        ),
    ),
)

SD3 = Family(
    name="sd3",
    kind="stream",
    transformer="SD3Transformer2DModel",
    encoder="text_encoder_3",
    entrance=("context_embedder",),
    blocks=(
        Blocks(
            path="transformer_blocks",
            arguments="hidden_states encoder_hidden_states temb joint_attention_kwargs",
            text="encoder_hidden_states",
            output=0,
        ),
    ),
)

FLUX = Family(
    name="flux",
    kind="stream",
    transformer="FluxTransformer2DModel",
    encoder="text_encoder_2",
    entrance=("context_embedder",),
    blocks=tuple(
        Blocks(
            path=path,
            arguments="hidden_states encoder_hidden_states temb image_rotary_emb joint_attention_kwargs",
            text="encoder_hidden_states",
            output=0,
        )
        for path in ("transformer_blocks", "single_transformer_blocks")
    ),
    time=lambda timestep: 1 - timestep,
)

CHROMA = Family(
    name="chroma",
    kind="stream",
    transformer="ChromaTransformer2DModel",
    entrance=("context_embedder",),
    blocks=(
        Blocks(
            path="transformer_blocks",
            arguments="hidden_states encoder_hidden_states temb image_rotary_emb attention_mask joint_attention_kwargs",
            text="encoder_hidden_states",
            output=0,
        ),
        Blocks(
            path="single_transformer_blocks",
            arguments="hidden_states temb image_rotary_emb attention_mask joint_attention_kwargs",
            text="hidden_states",
            joint=True,
        ),
    ),
    place=before_image,
    time=lambda timestep: 1 - timestep,
)

FAMILIES = (Z_IMAGE, LUMINA2, QWEN_IMAGE, COGVIEW4, SD3, FLUX, CHROMA)
