"""Families that already read several layers: each input that reads a layer, a slot, gets its own row of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from semantic_routing.adopt.families.family import Blocks, Family, named_if
from semantic_routing.adopt.families.stream import before_image


def hidream_states(transformer: Any, text: Any, layers: int) -> tuple[Tensor, list[int], int]:
    """Return HiDream's states: all layers, of which block i reads ``llama_layers[i]``."""
    states = text if isinstance(text, Tensor) else torch.stack(list(text))
    return states, list(transformer.config.llama_layers), 0


def fibo_states(transformer: Any, text: Any, layers: int) -> tuple[Tensor, list[int], int]:
    """Return FIBO's states: the embeddings and all layers; block i reads state i, and the last ones the last layer."""
    return torch.stack(list(text[: layers + 1])), [min(i, layers) for i in range(len(text))], 1


HIDREAM = Family(
    name="hidream",
    kind="slot",
    transformer="HiDreamImageTransformer2DModel",
    encoder="text_encoder_4",
    text="encoder_hidden_states_llama3",
    # The last projection reads T5.
    blocks=(Blocks(path="caption_projection", arguments="caption", text="caption"),),
    timestep="timesteps",
    native=hidream_states,
    refuses=lambda transformer, layers: named_if(not transformer.config.llama_layers, "llama_layers=None"),
)

FIBO = Family(
    name="fibo",
    kind="slot",
    transformer="BriaFiboTransformer2DModel",
    text="text_encoder_layers",
    blocks=(Blocks(path="caption_projection", arguments="caption", text="caption"),),
    native=fibo_states,
    # Such a pipeline leaves out the first layers, which a block could then not read.
    refuses=lambda transformer, layers: named_if(
        len(transformer.caption_projection) <= layers,
        f"only {len(transformer.caption_projection)} blocks for a language model of {layers} layers",
    ),
)

FLUX2_KLEIN = Family(
    name="flux2-klein",
    kind="slot",
    transformer="Flux2Transformer2DModel",
    encoders=("Qwen3ForCausalLM",),
    reads=(9, 18, 27),
    entrance=("context_embedder",),
    blocks=(
        Blocks(
            path="transformer_blocks",
            arguments="hidden_states encoder_hidden_states temb_mod_img temb_mod_txt image_rotary_emb "
            "joint_attention_kwargs",
            text="encoder_hidden_states",
            output=0,
        ),
        Blocks(
            path="single_transformer_blocks",
            arguments="hidden_states encoder_hidden_states temb_mod image_rotary_emb joint_attention_kwargs "
            "split_hidden_states text_seq_len",
            text="hidden_states",
            joint=True,
        ),
    ),
    place=before_image,
    time=lambda timestep: 1 - timestep,
)

FAMILIES = (HIDREAM, FIBO, FLUX2_KLEIN)
