"""Families whose blocks read the text as an argument and do not update it: each block gets its own text."""

from __future__ import annotations

from torch import Tensor

from semantic_routing.adopt.families.family import Blocks, Family, named_if


def latest_time(timestep: Tensor) -> Tensor:
    """Return the time of each sample [B] from its timestep, or from the largest of its tokens' [B, ...]."""
    return 1 - (timestep.flatten(1).amax(1) if timestep.ndim > 1 else timestep) / 1000


PRX = Family(
    name="prx",
    kind="read",
    transformer="PRXTransformer2DModel",
    entrance=("txt_in",),
    blocks=(
        Blocks(
            path="blocks",
            arguments="hidden_states encoder_hidden_states temb image_rotary_emb attention_mask kwargs",
            text="encoder_hidden_states",
        ),
    ),
    time=lambda timestep: 1 - timestep,
)

SANA = Family(
    name="sana",
    kind="read",
    transformer="SanaTransformer2DModel",
    entrance=("caption_projection", "caption_norm"),
    blocks=(
        Blocks(
            path="transformer_blocks",
            arguments="hidden_states attention_mask encoder_hidden_states encoder_attention_mask timestep height width",
            text="encoder_hidden_states",
        ),
    ),
    refuses=lambda transformer, layers: named_if(
        transformer.config.guidance_embeds, "guidance_embeds, as of Sana-Sprint"
    ),
)

PIXART = Family(
    name="pixart",
    kind="read",
    transformer="PixArtTransformer2DModel",
    entrance=("caption_projection",),
    blocks=(
        Blocks(
            path="transformer_blocks",
            arguments="hidden_states attention_mask encoder_hidden_states encoder_attention_mask timestep "
            "cross_attention_kwargs class_labels added_cond_kwargs",
            text="encoder_hidden_states",
        ),
    ),
    refuses=lambda transformer, layers: named_if(transformer.caption_projection is None, "caption_channels=None"),
)

WAN = Family(
    name="wan",
    kind="read",
    transformer="WanTransformer3DModel",
    entrance=("condition_embedder.text_embedder",),
    blocks=(
        Blocks(
            path="blocks",
            arguments="hidden_states encoder_hidden_states temb rotary_emb",
            text="encoder_hidden_states",
        ),
    ),
    # With first frames that stay as they are (Wan 2.2 TI2V) each token has its own timestep, 0 in those frames.
    time=latest_time,
    refuses=lambda transformer, layers: named_if(
        transformer.config.image_dim is not None or transformer.config.added_kv_proj_dim is not None,
        "image tokens beside the text (image_dim, added_kv_proj_dim), as of Wan 2.1 image-to-video",
    ),
)

LTX = Family(
    name="ltx",
    kind="read",
    transformer="LTXVideoTransformer3DModel",
    entrance=("caption_projection",),
    blocks=(
        Blocks(
            path="transformer_blocks",
            arguments="hidden_states encoder_hidden_states temb image_rotary_emb encoder_attention_mask",
            text="encoder_hidden_states",
        ),
    ),
    # Video to video gives each token a timestep.
    time=latest_time,
)

FAMILIES = (PRX, SANA, PIXART, WAN, LTX)
