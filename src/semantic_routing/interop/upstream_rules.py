"""Rules that turn the tensors of the paper's reference implementation into this program's, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from semantic_routing.model.dit import DiTConfig
from semantic_routing.model.layers import sinusoidal


class Form(NamedTuple):
    """A conversion of the reference's tensors to one of ours, and its inverse."""

    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


class Rule(NamedTuple):
    """One of our tensors, the reference's tensors that it is made of, and the conversion."""

    target: str
    sources: tuple[str, ...]
    form: Form


def _flip_time(weight: Tensor) -> Tensor:
    """Convert a gate's first layer [hidden, time_width] from [cos | sin] of 1 - t to those of t; its own inverse.

    cos((1-t)f) = cos f cos tf + sin f sin tf and sin((1-t)f) = sin f cos tf - cos f sin tf. It is computed in float64
    and stored in float32 or wider, because routing is always computed in float32.
    """
    ones = torch.ones(1, device=weight.device)
    cos, sin = sinusoidal(ones, weight.shape[1])[0].double().chunk(2)
    on_cos, on_sin = weight.double().chunk(2, dim=1)
    turned = torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], dim=1)
    return turned.to(torch.promote_types(weight.dtype, torch.float32))


SAME = Form(lambda parts: parts[0].clone(memory_format=torch.contiguous_format), lambda whole: [whole])
NEGATED = Form(lambda parts: -parts[0], lambda whole: [-whole])
STACKED = Form(lambda parts: torch.stack(parts), lambda whole: whole.unbind())
GATE_IN = Form(
    lambda parts: torch.stack([_flip_time(part).T for part in parts]),
    lambda whole: [_flip_time(gate.T) for gate in whole],
)
GATE_OUT = Form(lambda parts: torch.stack([part.T for part in parts]), lambda whole: list(whole.mT))
GATE_BIAS = Form(lambda parts: torch.stack(parts)[:, None], lambda whole: whole[:, 0].unbind())


def _rows(*sizes: int) -> Form:
    """Return the form of linear layers with the same input, stacked to one product."""
    return Form(lambda parts: torch.cat(parts), lambda whole: whole.split(sizes))


def _convolution(channels: int, patch: int) -> Form:
    """Return the form of a convolution [W, channels, patch, patch] as a product with (row, column, channel) patches."""
    return Form(
        lambda parts: parts[0].permute(0, 2, 3, 1).flatten(1).clone(),
        lambda whole: [whole.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2)],
    )


def rules_of(cfg: DiTConfig) -> list[Rule]:
    """List one rule for each tensor of a model."""
    rules = [
        Rule("patch_embed.weight", ("patch_embed.proj.weight",), _convolution(cfg.channels, cfg.patch)),
        Rule("patch_embed.bias", ("patch_embed.proj.bias",), SAME),
        Rule("norm_out.weight", ("norm_out.weight",), SAME),
        Rule("proj_out.weight", ("proj_out.weight",), NEGATED),
        Rule("proj_out.bias", ("proj_out.bias",), NEGATED),
    ]
    for d in range(cfg.depth):
        rules += _block_rules(cfg, f"blocks.{d}.", f"layers.{d}.")
    if cfg.strategy.reads_keys:
        return rules
    return [
        *rules,
        Rule("text_norm.weight", ("context_embedder.0.weight",), SAME),
        Rule("text_proj.weight", ("context_embedder.1.weight",), SAME),
        Rule("text_proj.bias", ("context_embedder.1.bias",), SAME),
        *_router_rules(cfg),
    ]


def _block_rules(cfg: DiTConfig, ours: str, theirs: str) -> Iterator[Rule]:
    query, key = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    table = {
        "norm1": ("input_layernorm", SAME),
        "norm2": ("post_attention_layernorm", SAME),
        "attn.qkv": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", _rows(query, key, key)),
        "attn.q_norm": ("self_attn.q_norm", SAME),
        "attn.k_norm": ("self_attn.k_norm", SAME),
        "attn.out": ("self_attn.o_proj", SAME),
        "mlp.gate_up": ("mlp.gate_proj mlp.up_proj", _rows(cfg.mlp_width, cfg.mlp_width)),
        "mlp.down": ("mlp.down_proj", SAME),
    }
    if not cfg.strategy.reads_keys:
        table |= {
            "cross.q": ("cross_attn.q_proj", SAME),
            "cross.kv": ("cross_attn.text_k_proj cross_attn.text_v_proj", _rows(key, key)),
            "cross.q_norm": ("cross_attn.q_norm", SAME),
            "cross.k_norm": ("cross_attn.k_norm", SAME),
            "cross.out": ("cross_attn.o_proj", SAME),
        }
    for target, (sources, form) in table.items():
        yield Rule(f"{ours}{target}.weight", tuple(f"{theirs}{s}.weight" for s in sources.split()), form)


def _router_rules(cfg: DiTConfig) -> Iterator[Rule]:
    """Yield the rules of the router's logits or gates: one for all blocks, or one per block."""
    arm = cfg.strategy
    if not arm.learned:
        return
    what = "module" if arm.by_time else "weight"
    names = tuple(f"text_fusion_{what}s.{d}" for d in range(cfg.depth)) if arm.by_block else (f"text_fusion_{what}",)
    if not arm.by_time:
        yield Rule("router.logits", names, STACKED)
    else:
        for target, source, form in (
            ("w1", "0.weight", GATE_IN),
            ("b1", "0.bias", GATE_BIAS),
            ("w2", "2.weight", GATE_OUT),
            ("b2", "2.bias", GATE_BIAS),
        ):
            yield Rule(f"router.{target}", tuple(f"{gate}.weight_generator.{source}" for gate in names), form)
