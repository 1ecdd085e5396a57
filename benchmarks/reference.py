"""The computation of the reference implementation on a network of this program: the baseline of the benchmarks.

Every prompt is padded to 512 tokens. Every step prepares the text: a float32 stack of the normalised hidden states, an
einsum, a projection, keys and values for each block. Attention takes a dense additive mask with a row for each image
token and repeats the keys for the query heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from semantic_routing.model.dit import DiT, patchify, unpatchify
from semantic_routing.model.layers import apply_rope, rope_2d
from semantic_routing.text.features import TextFeatures

LONGEST = 512


def padded(features: TextFeatures, length: int = LONGEST) -> TextFeatures:
    """Pad prompts to ``length`` tokens."""
    more = length - features.mask.shape[1]
    return TextFeatures(F.pad(features.hidden, (0, 0, 0, more)), F.pad(features.mask, (0, more)))


def stack_normalise_einsum(weights: Tensor, hidden: Tensor) -> Tensor:
    """Return sum_l w_l LayerNorm(H_l) [D, B, N, C] from weights [B or 1, D, L] and hidden states [L, B, N, C]."""
    normed = torch.stack([F.layer_norm(h.float(), h.shape[-1:]) for h in hidden])
    return torch.einsum("bdl,lbnc->dbnc", weights.expand(hidden.shape[1], -1, -1), normed)


def velocity(model: DiT, features: TextFeatures, x: Tensor, t: Tensor) -> Tensor:
    """Return the velocity that ``model`` predicts, computed as in the reference."""
    cfg, (height, width) = model.cfg, x.shape[2:]
    if cfg.arm == "penultimate":
        normed = F.layer_norm(features.hidden[-2].float(), features.hidden.shape[-1:])
        texts = [model.text_proj(model.text_norm(normed))] * cfg.depth
    else:
        with torch.autocast(x.device.type, enabled=False):
            fused = stack_normalise_einsum(model.router.weights(t), features.hidden)
        rows = fused.expand(cfg.depth, -1, -1, -1)
        texts = [model.text_proj(model.text_norm(row.to(features.hidden.dtype))) for row in rows]
    mask = torch.zeros(features.mask.shape, device=x.device).masked_fill(~features.mask, -math.inf)
    tokens = model.patch_embed(patchify(x, cfg.patch))
    time = None if cfg.conditioning == "none" else model.time_embed(t)
    rope = rope_2d(height // cfg.patch, width // cfg.patch, cfg.head_dim, cfg.rope_theta, x.device)
    dense = mask[:, None, None].expand(-1, 1, tokens.shape[1], -1).contiguous()  # a row for each image token
    for block, text in zip(model.blocks, texts, strict=True):
        attn, mlp = block.modulation(time)
        tokens = tokens + attn.apply_gate(_self_attention(block.attn, attn.modulate(block.norm1(tokens)), rope))
        tokens = tokens + _cross_attention(block.cross, tokens, text, dense)
        tokens = tokens + mlp.apply_gate(block.mlp(mlp.modulate(block.norm2(tokens))))
    return unpatchify(model.proj_out(model.norm_out(tokens)), cfg.patch, height, width)


def _self_attention(attn: torch.nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in attn.qkv(x).split(attn.sizes, dim=-1))
    q, k = (apply_rope(y, rope).to(v.dtype).transpose(1, 2) for y in (attn.q_norm(q), attn.k_norm(k)))
    return attn.out(_attend(q, k, v.transpose(1, 2), None))


def _cross_attention(cross: torch.nn.Module, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    k, v = cross.prepare(text)
    q = cross.q_norm(cross.q(x).unflatten(-1, (-1, cross.head_dim))).transpose(1, 2)
    return cross.out(_attend(q.to(k.dtype), k, v, mask.to(k.dtype)))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
