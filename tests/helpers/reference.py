"""Random checkpoints of the paper's reference implementation, and its network written from its description."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semantic_routing.model.arms import PAPER_ARMS

Weights = dict[str, Tensor]
CONFIG: dict[str, Any] = {
    "text_hidden_size": 20,
    "num_text_layers": 5,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "hidden_size": 28,
    "depth": 3,
    "patch_size": 2,
    "in_channels": 3,
    "text_vocab_size": 31,
    "text_intermediate_size": 36,
    "text_rope_theta": 5e5,
    "mrope_section": [2, 1, 1],
    "rope_theta": {arm: 3e3 for arm in PAPER_ARMS if arm != "fusedit"},
    "fusedit_first_llm_layer": 1,
}
MLP_WIDTH = 44
TEXT_HEADS = 4  # the language model may have another number of query heads than the transformer


def attention_shapes(prefix: str, config: dict[str, Any], names: str, q: int, kv: int, out: int) -> dict:
    head, (query, key, value) = config["head_dim"], names.split()
    query_width, key_width = q, config["num_kv_heads"] * head
    return {
        f"{prefix}.{query}.weight": (query_width, out),
        f"{prefix}.{key}.weight": (key_width, kv),
        f"{prefix}.{value}.weight": (key_width, kv),
        f"{prefix}.o_proj.weight": (out, query_width),
        f"{prefix}.q_norm.weight": (head,),
        f"{prefix}.k_norm.weight": (head,),
    }


def decoder_shapes(prefix: str, config: dict[str, Any], heads: int, width: int, mlp: int) -> dict:
    query = heads * config["head_dim"]
    return {
        f"{prefix}.input_layernorm.weight": (width,),
        f"{prefix}.post_attention_layernorm.weight": (width,),
        **attention_shapes(f"{prefix}.self_attn", config, "q_proj k_proj v_proj", query, width, width),
        f"{prefix}.mlp.gate_proj.weight": (mlp, width),
        f"{prefix}.mlp.up_proj.weight": (mlp, width),
        f"{prefix}.mlp.down_proj.weight": (width, mlp),
    }


def gate_shapes(prefix: str, layers: int) -> dict:
    return {
        f"{prefix}.weight_generator.0.weight": (512, 128),
        f"{prefix}.weight_generator.0.bias": (512,),
        f"{prefix}.weight_generator.2.weight": (layers, 512),
        f"{prefix}.weight_generator.2.bias": (layers,),
    }


def upstream_shapes(config: dict[str, Any], arm: str) -> dict[str, tuple[int, ...]]:
    width, text, layers = config["hidden_size"], config["text_hidden_size"], config["num_text_layers"]
    patch, channels, query = config["patch_size"], config["in_channels"], config["num_heads"] * config["head_dim"]
    shapes = {
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm_out.weight": (width,),
        "proj_out.weight": (patch * patch * channels, width),
        "proj_out.bias": (patch * patch * channels,),
    }
    for d in range(config["depth"]):
        shapes |= decoder_shapes(f"layers.{d}", config, config["num_heads"], width, MLP_WIDTH)
        if arm != "fusedit":
            names = "q_proj text_k_proj text_v_proj"
            shapes |= attention_shapes(f"layers.{d}.cross_attn", config, names, query, text, width)
    if arm == "fusedit":
        shapes = {f"dit.{name}": shape for name, shape in shapes.items()}
        for i in range(layers):
            mlp = config["text_intermediate_size"]
            shapes |= decoder_shapes(f"llm.layers.{i}", config, TEXT_HEADS, text, mlp)
        return shapes | {
            "llm.embed_tokens.weight": (config["text_vocab_size"], text),
            "llm.norm.weight": (text,),
        }
    shapes |= {
        "context_embedder.0.weight": (text,),
        "context_embedder.1.weight": (text, text),
        "context_embedder.1.bias": (text,),
    }
    if arm == "static":
        shapes["text_fusion_weight"] = (layers,)
    if arm == "depth":
        shapes |= {f"text_fusion_weights.{d}": (layers,) for d in range(config["depth"])}
    if arm == "time":
        shapes |= gate_shapes("text_fusion_module", layers)
    if arm == "joint":
        for d in range(config["depth"]):
            shapes |= gate_shapes(f"text_fusion_modules.{d}", layers)
    return shapes


def random_weights(config: dict[str, Any], arm: str) -> Weights:
    return {
        name: torch.randn(shape) / math.sqrt(shape[-1]) + (0.8 if "norm" in name else 0)
        for name, shape in upstream_shapes(config, arm).items()
    }


def random_inputs(config: dict[str, Any], arm: str, height: int, width: int, batch: int = 2) -> Weights:
    length = 7
    valid = torch.randint(1, length + 1, (batch, 1))
    inputs = {
        "hidden_states": torch.randn(batch, config["in_channels"], height, width),
        "timestep": 1000 * torch.rand(batch),
        "attention_mask": (torch.arange(length) < valid).long(),
    }
    if arm == "fusedit":
        return inputs | {"input_ids": torch.randint(config["text_vocab_size"], (batch, length))}
    shape = (config["num_text_layers"], batch, length, config["text_hidden_size"])
    return inputs | {"text_hidden_states": 3 * torch.randn(shape) + 1}


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs (i, i + half) of [..., hd] as complex numbers."""
    real, imaginary = x.chunk(2, -1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def heads(x: Tensor, weight: Tensor, head_dim: int) -> Tensor:
    """Return a projection as [heads, tokens, head_dim]."""
    return (x @ weight.T).reshape(len(x), -1, head_dim).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Compute attention over [heads, tokens, hd] with repeated keys; return [tokens, heads * hd]."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def self_qkv(w: Weights, p: str, x: Tensor, hd: int, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (heads(x, w[f"{p}.{name}_proj.weight"], hd) for name in "qkv")
    return turn(rms(q, w[f"{p}.q_norm.weight"]), angles), turn(rms(k, w[f"{p}.k_norm.weight"]), angles), v


def mlp(w: Weights, p: str, x: Tensor) -> Tensor:
    gate = F.silu(x @ w[f"{p}.gate_proj.weight"].T)
    return (gate * (x @ w[f"{p}.up_proj.weight"].T)) @ w[f"{p}.down_proj.weight"].T


def text_keys_values(w: Weights, config: dict[str, Any], ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Compute keys and values of every layer of the language model for one prompt."""
    hd, x, kept = config["head_dim"], w["llm.embed_tokens.weight"][ids], []
    freqs = config["text_rope_theta"] ** (-torch.arange(hd // 2) / (hd // 2))
    angles = torch.arange(len(ids))[:, None] * freqs
    visible = mask[None] & torch.ones(len(ids), len(ids)).tril().bool()
    for i in range(config["num_text_layers"]):
        p = f"llm.layers.{i}"
        q, k, v = self_qkv(w, f"{p}.self_attn", rms(x, w[f"{p}.input_layernorm.weight"]), hd, angles)
        x = x + attend(q, k, v, visible) @ w[f"{p}.self_attn.o_proj.weight"].T
        x = x + mlp(w, f"{p}.mlp", rms(x, w[f"{p}.post_attention_layernorm.weight"]))
        kept.append((k, v))
    return kept


def layer_weights(w: Weights, config: dict[str, Any], arm: str, block: int, sigma: Tensor) -> Tensor:
    layers = config["num_text_layers"]
    if arm == "penultimate":
        return F.one_hot(torch.tensor(layers - 2), layers).float()
    if arm == "uniform":
        return torch.full((layers,), 1 / layers)
    if arm in ("static", "depth"):
        return w["text_fusion_weight" if arm == "static" else f"text_fusion_weights.{block}"].softmax(0)
    p = ("text_fusion_module" if arm == "time" else f"text_fusion_modules.{block}") + ".weight_generator"
    angles = sigma * torch.exp(-math.log(10000) * torch.arange(64) / 64)
    hidden = F.silu(w[f"{p}.0.weight"] @ torch.cat([angles.cos(), angles.sin()]) + w[f"{p}.0.bias"])
    return (w[f"{p}.2.weight"] @ hidden + w[f"{p}.2.bias"]).softmax(0)


def cross(w: Weights, config: dict[str, Any], p: str, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    text = rms(text, w["context_embedder.0.weight"])
    text = text @ w["context_embedder.1.weight"].T + w["context_embedder.1.bias"]
    hd = config["head_dim"]
    q = rms(heads(x, w[f"{p}.q_proj.weight"], hd), w[f"{p}.q_norm.weight"])
    k = rms(heads(text, w[f"{p}.text_k_proj.weight"], hd), w[f"{p}.k_norm.weight"])
    v = heads(text, w[f"{p}.text_v_proj.weight"], hd)
    return attend(q, k, v, mask) @ w[f"{p}.o_proj.weight"].T


def naive_forward(w: Weights, config: dict[str, Any], arm: str, inputs: Weights) -> Tensor:
    batch = len(inputs["timestep"])
    rows = [{name: x[b] for name, x in inputs.items() if name != "text_hidden_states"} for b in range(batch)]
    if arm != "fusedit":
        for b, row in enumerate(rows):
            row["text"] = inputs["text_hidden_states"][:, b]
    return torch.stack([naive_single(w, config, arm, row) for row in rows])


def naive_single(w: Weights, config: dict[str, Any], arm: str, inputs: Weights) -> Tensor:
    hd, patch, mask = config["head_dim"], config["patch_size"], inputs["attention_mask"].bool()
    theta, offset, text = config["rope_theta"].get(arm), 0, []
    if arm == "fusedit":
        text = text_keys_values(w, config, inputs["input_ids"], mask)[config["fusedit_first_llm_layer"] :]
        theta, offset = config["text_rope_theta"], int(mask.sum())
        w = {name.removeprefix("dit."): x for name, x in w.items() if name.startswith("dit.")}
    else:
        normed = F.layer_norm(inputs["text"], inputs["text"].shape[-1:])
    grid = F.conv2d(inputs["hidden_states"], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], patch)
    height, width = grid.shape[1:]
    freqs = theta ** (-torch.arange(hd // 4) / (hd // 4))
    places = [(i + offset, j + offset) for i in range(height) for j in range(width)]
    angles = torch.stack([torch.cat([i * freqs, j * freqs]) for i, j in places])
    x = grid.flatten(1).T
    for d in range(config["depth"]):
        p = f"layers.{d}"
        q, k, v = self_qkv(w, f"{p}.self_attn", rms(x, w[f"{p}.input_layernorm.weight"]), hd, angles)
        visible = torch.ones(len(x), dtype=torch.bool)
        if arm == "fusedit":
            k, v = (torch.cat(pair, 1) for pair in zip(text[d], (k, v), strict=True))
            visible = torch.cat([mask, visible])
        x = x + attend(q, k, v, visible) @ w[f"{p}.self_attn.o_proj.weight"].T
        if arm != "fusedit":
            weights = layer_weights(w, config, arm, d, inputs["timestep"] / 1000)
            fused = sum(weight * layer for weight, layer in zip(weights, normed, strict=True))
            x = x + cross(w, config, f"{p}.cross_attn", x, fused, mask)
        x = x + mlp(w, f"{p}.mlp", rms(x, w[f"{p}.post_attention_layernorm.weight"]))
    out = rms(x, w["norm_out.weight"]) @ w["proj_out.weight"].T + w["proj_out.bias"]
    out = out.reshape(height, width, patch, patch, -1)
    return out.permute(4, 0, 2, 1, 3).reshape(-1, height * patch, width * patch)
