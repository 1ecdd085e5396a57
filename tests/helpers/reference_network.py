"""DiT and FuseDiT in plain float64 torch: one sample, one head and one patch at a time, from weights by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from semantic_routing.model.dit import Backbone, DiT, DiTConfig
from semantic_routing.text.features import TextFeatures

EPS = 1e-6


@dataclass(frozen=True)
class Weights:
    """The weights of a network in float64, by name below a prefix."""

    named: dict[str, Tensor]
    prefix: str = ""

    def at(self, prefix: str) -> Weights:
        return Weights(self.named, f"{self.prefix}{prefix}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.named[self.prefix + name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.named.get(f"{self.prefix}{name}.bias")
        return x @ self[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * self[f"{name}.weight"]


def reference_velocity(model: Backbone, x: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
    """Return the velocity of each latent; a router's weights are read off the model."""
    w = Weights({name: p.double() for name, p in model.state_dict().items()})
    return torch.stack([_velocity(model, w, x.double(), t.double(), features, b) for b in range(len(x))])


def _velocity(model: Backbone, w: Weights, x: Tensor, t: Tensor, features: TextFeatures, b: int) -> Tensor:
    cfg, p, length = model.cfg, model.cfg.patch, int(features.mask[b].sum())
    rows, columns = x.shape[2] // p, x.shape[3] // p
    grid = [(r, c) for r in range(rows) for c in range(columns)]
    patches = [x[b, :, r * p : (r + 1) * p, c * p : (c + 1) * p].permute(1, 2, 0).flatten() for r, c in grid]
    tokens = w.linear("patch_embed", torch.stack(patches))
    time = _time(cfg, w, t[b])
    if cfg.conditioning == "addition":
        tokens = tokens + time
    offset = length if cfg.arm == "fusedit" else 0  # FuseDiT counts rows and columns from the end of the text
    positions = torch.tensor(grid, dtype=torch.float64) + offset
    for d in range(cfg.depth):
        text = _text(model, w, t, features, b, d)
        tokens = _block(cfg, w.at(f"blocks.{d}"), tokens, positions, text, time)
    out = w.linear("proj_out", w.norm("norm_out", tokens)).reshape(-1, p, p, cfg.channels)
    image = torch.empty_like(x[b])
    for (r, c), patch in zip(grid, out, strict=True):
        image[:, r * p : (r + 1) * p, c * p : (c + 1) * p] = patch.permute(2, 0, 1)
    return image


def _time(cfg: DiTConfig, w: Weights, t: Tensor) -> Tensor | None:
    """Return the time's embedding, for adaLN-single with its shared projection."""
    if cfg.conditioning == "none":
        return None
    angles = 1000 * t * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    hidden = w.linear("time_embed.mlp.0", torch.cat([angles.cos(), angles.sin()]))
    time = w.linear("time_embed.mlp.2", _silu(hidden))
    return w.linear("time_shared.1", _silu(time)) if cfg.conditioning == "adaln-single" else time


def _text(model: Backbone, w: Weights, t: Tensor, features: TextFeatures, b: int, d: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [N, Hkv, hd] of the text that block d reads, without padding."""
    cfg, length = model.cfg, int(features.mask[b].sum())
    if not isinstance(model, DiT):
        assert features.keys is not None
        assert features.values is not None
        layer = cfg.fusedit_first_layer + d
        keys, values = features.keys[layer, b, :, :length], features.values[layer, b, :, :length]
        return keys.double().transpose(0, 1), values.double().transpose(0, 1)
    states = features.hidden[:, b, :length].double()
    mean, variance = states.mean(-1, keepdim=True), states.var(-1, correction=0, keepdim=True)
    rows = model.router.weights(t.float()).double().expand(len(t), len(cfg.rows), -1)[b]
    sides, heads = cfg.strategy.split(cfg.kv_heads)
    cross = w.at(f"blocks.{d}.cross")
    read = torch.empty(2, length, cfg.kv_heads, cfg.head_dim, dtype=torch.float64)
    for side in range(2):  # each head's keys and each head's values from their own row, whole and then cut
        for head in range(cfg.kv_heads):
            weights = rows.reshape(cfg.depth, sides, heads, -1)[d, side % sides, head % heads]
            mixed = (weights[:, None, None] * (states - mean) / (variance + 1e-5).sqrt()).sum(0)
            text = w.linear("text_proj", w.norm("text_norm", mixed))
            read[side, :, head] = cross.linear("kv", text).reshape(length, 2, cfg.kv_heads, cfg.head_dim)[:, side, head]
    return cross.norm("k_norm", read[0]), read[1]


def _block(
    cfg: DiTConfig, w: Weights, x: Tensor, positions: Tensor, text: tuple[Tensor, Tensor], time: Tensor | None
) -> Tensor:
    """Run a block: self-attention, cross-attention, gated MLP; FuseDiT's self-attention also reads the text."""
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(cfg, w, time)
    h = w.norm("norm1", x) * (1 + scale1) + shift1
    split = [cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim]
    q, k, v = (part.reshape(len(x), -1, cfg.head_dim) for part in w.linear("attn.qkv", h).split(split, dim=-1))
    q = _rotate(w.norm("attn.q_norm", q), positions, cfg.rope_theta)
    k = _rotate(w.norm("attn.k_norm", k), positions, cfg.rope_theta)
    if cfg.arm == "fusedit":
        k, v = torch.cat([text[0], k]), torch.cat([text[1], v])
    x = x + gate1 * w.linear("attn.out", _attend(q, k, v))
    if cfg.arm != "fusedit":
        q = w.norm("cross.q_norm", w.linear("cross.q", x).reshape(len(x), cfg.heads, cfg.head_dim))
        x = x + w.linear("cross.out", _attend(q, *text))
    gate, up = w.linear("mlp.gate_up", w.norm("norm2", x) * (1 + scale2) + shift2).split(cfg.mlp_width, dim=-1)
    return x + gate2 * w.linear("mlp.down", _silu(gate) * up)


def _modulation(cfg: DiTConfig, w: Weights, time: Tensor | None) -> list[Tensor]:
    if time is None or cfg.conditioning == "addition":
        return [torch.tensor(float(i in (2, 5)), dtype=torch.float64) for i in range(6)]
    six = (
        w.linear("modulation.proj.1", _silu(time)) if cfg.conditioning == "adaln-zero" else time + w["modulation.table"]
    )
    return list(six.reshape(6, cfg.width))


def _rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn the complex channel pairs (i, i + hd/2) of [S, H, hd], one half by the row and one by the column."""
    half = x.shape[-1] // 2
    speeds = torch.tensor([theta ** (-2 * i / half) for i in range(half // 2)], dtype=torch.float64)
    angles = torch.cat([positions[:, :1] * speeds, positions[:, 1:] * speeds], dim=-1)[:, None]
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of [S, H, hd] to [N, Hkv, hd], a head at a time."""
    out = []
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        scores = (q[:, head] @ k[:, group].T / math.sqrt(q.shape[-1])).exp()
        out.append(scores / scores.sum(-1, keepdim=True) @ v[:, group])
    return torch.cat(out, dim=-1)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())
