"""FuseDiT, the deep-fusion baseline (Tang et al., 2025): image tokens attend jointly to text and image.

Block i reads the attention keys and values of layer ``first + i`` of the language model. Image queries see all text and
image tokens; text sees only text. So one forward pass of the language model per prompt serves every step.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from semantic_routing.model.context import TextContext
from semantic_routing.model.dit import Backbone, DiTConfig, Modulation
from semantic_routing.model.layers import BlockText, GatedMLP, RMSNorm, Rope, SelfAttention, apply_rope
from semantic_routing.text.features import TextFeatures


class FuseBlock(nn.Module):
    """Attention over text and image together and gated MLP, each with a residual connection."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(cfg.width)
        self.attn = SelfAttention(cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim)
        self.norm2 = RMSNorm(cfg.width)
        self.mlp = GatedMLP(cfg.width, cfg.mlp_width, cfg.activation)
        self.modulation = Modulation(cfg)

    def forward(
        self, x: Float[Tensor, "B S W"], rope: Rope, text: BlockText, time: Tensor | None
    ) -> Float[Tensor, "B S W"]:
        attn, mlp = self.modulation(time)
        x = x + attn.apply_gate(self.attn(attn.modulate(self.norm1(x)), rope, text))
        return x + mlp.apply_gate(self.mlp(mlp.modulate(self.norm2(x))))


class FuseDiT(Backbone):
    """The deep-fusion baseline: no cross-attention; every block reads one layer of the language model."""

    block = FuseBlock

    def __init__(self, cfg: DiTConfig) -> None:
        last = cfg.fusedit_first_layer + cfg.depth
        if last > cfg.text_layers:
            raise ValueError(
                f"fusedit_first_layer={cfg.fusedit_first_layer} with depth={cfg.depth} needs {last} "
                f"language-model layers, but there are {cfg.text_layers}: lower one of the two"
            )
        super().__init__(cfg)

    def prepare_text(self, features: TextFeatures, t: Float[Tensor, " T"] | None = None) -> TextContext:
        if features.keys is None or features.values is None:
            raise ValueError("FuseDiT reads keys and values of the language model: encode with with_kv=True")
        layers, _, heads, _, head_dim = features.keys.shape
        expected = (self.cfg.text_layers, self.cfg.kv_heads, self.cfg.head_dim)
        if (layers, heads, head_dim) != expected:
            raise ValueError(
                f"the text encoder gives {layers} layers with {heads} key heads of {head_dim}, but FuseDiT "
                f"joins them and needs {expected[0]} layers with {expected[1]} heads of {expected[2]}"
            )
        used = slice(self.cfg.fusedit_first_layer, self.cfg.fusedit_first_layer + self.cfg.depth)
        keys = rotate_keys_by_text_length(features.keys[used], features.mask.sum(1), self.cfg.rope_theta)
        return TextContext(tuple(keys), tuple(features.values[used]), features.mask)


def rotate_keys_by_text_length(
    keys: Float[Tensor, "L B Hkv N hd"], lengths: Int[Tensor, " B"], theta: float
) -> Float[Tensor, "L B Hkv N hd"]:
    """Rotate a prompt's keys by the 2-D rotary angles of row and column ``-length``; the result is float32.

    The reference counts an image's rows and columns from the number of text tokens before it. Rotating the text's keys
    back by the same amount gives the same attention scores, and is done once per prompt instead of once per step.
    """
    quarter = keys.shape[-1] // 4
    freqs = theta ** (-torch.arange(quarter, dtype=torch.float32, device=keys.device) / quarter)
    angles = -lengths[:, None] * freqs.repeat(2)
    # apply_rope rotates the second axis by position: here that is the batch.
    x = keys.float().transpose(1, 2).flatten(0, 1)
    turned = apply_rope(x, (angles.cos(), angles.sin())).unflatten(0, (len(keys), -1))
    return turned.transpose(1, 2)
