"""Checkpoints of the paper's reference implementation: into this program's models, and back.

The reference differs in layout (separate projections, a patch convolution), sign (noise - data) and time
(its gates read sigma = timestep / 1000 = 1 - t). All of that is folded into the weights, so a loaded model is
simply one of ours. Every tensor of the source is used once and every one of the model is filled, or a
ValueError lists what does not match. Tensors are read one at a time, so no checkpoint is held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from semantic_routing.checkpoint.foreign import LazyTensors, raise_if_any, read_upstream, renamed, unwrapped
from semantic_routing.model.arms import ARMS, PAPER_ARMS, parse_arm
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import Backbone, DiTConfig
from semantic_routing.model.fusedit import FuseDiT
from semantic_routing.model.layers import sinusoidal
from semantic_routing.text.features import TextFeatures

SIZES = {
    "depth": "depth",
    "width": "hidden_size",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "patch": "patch_size",
    "channels": "in_channels",
    "text_width": "text_hidden_size",
    "text_layers": "num_text_layers",
}
"""Sizes: our names and the reference's."""
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Activations: the reference's names, whose MLP takes the text encoder's, and ours."""


def load_upstream(src: Path, config: Mapping[str, Any], arm: str) -> Backbone:
    """The model of a reference checkpoint on disk; memory peaks at the model and a few tensors of one layer.

    ``src`` is a safetensors or torch file, or a folder with one, with shards and their index, or with what
    DeepSpeed or Accelerate saved. Raises ValueError where ``read_upstream`` or ``from_upstream`` do.
    """
    return from_upstream(read_upstream(src), config, arm)


def from_upstream(state_dict: Mapping[str, Tensor], config: Mapping[str, Any], arm: str) -> Backbone:
    """The model of a reference checkpoint, in the type of its weights, which are copied.

    ``config`` holds the reference's sizes (``SIZES``), ``rope_theta`` (a number, or one for each arm),
    optionally ``hidden_act`` (silu), and for FuseDiT ``fusedit_first_llm_layer`` and ``text_rope_theta``. The
    MLP's width is read off the weights. FuseDiT comes as ``UpstreamFuseDiT``; where its language model's
    weights are there too (``llm.*``), ``config`` also holds ``text_vocab_size``, ``text_intermediate_size``
    and ``mrope_section``. Raises ValueError naming both sides where weights, sizes and arm do not agree.
    """
    arm = parse_arm(arm)
    _check_of_paper(arm)
    source = unwrapped(state_dict)
    text: Mapping[str, Tensor] = {}
    if ARMS[arm].reads_keys:
        source, text = _split_fusedit(source)
    cfg = _dit_config(source, config, arm)
    language_model = _language_model(text, config) if text else None
    with torch.device("meta"):
        model = UpstreamFuseDiT(cfg, language_model) if ARMS[arm].reads_keys else make_model(cfg)
    _fill(model, _rules(cfg), source, f"a {arm} model of this configuration")
    return model


def to_upstream(model: Backbone) -> dict[str, Tensor]:
    """A model's weights as the reference's state dict: the inverse of ``from_upstream``.

    Exact, but for the first layer of time gates, which comes back within a rounding of float32 (exactly again
    where the other weights are of half the width: it is kept in float32). Tensors share memory with the model
    where they can. Raises ValueError for models that the reference does not have.
    """
    cfg = model.cfg
    _check_of_paper(cfg.arm)
    if (cfg.conditioning, cfg.prediction) != ("none", "velocity"):
        raise ValueError(
            f"a model with conditioning={cfg.conditioning!r} and prediction={cfg.prediction!r} has no known "
            "counterpart: only conditioning='none' with prediction='velocity' can be converted"
        )
    own = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    prefix = "dit." if cfg.strategy.reads_keys else ""
    result: dict[str, Tensor] = {}
    for rule in _rules(cfg):
        parts = rule.form.split(own[rule.target])
        if rule.form is GATE_IN:
            parts = [part.to(model.proj_out.weight.dtype) for part in parts]
        result |= {prefix + name: part.contiguous() for name, part in zip(rule.sources, parts, strict=True)}
    if isinstance(model, UpstreamFuseDiT) and model.language_model is not None:
        result |= {f"llm.{name}": tensor for name, tensor in model.language_model.state_dict().items()}
    return result


def upstream_config(model: Backbone) -> dict[str, Any]:
    """The ``config`` with which ``from_upstream`` reads what ``to_upstream`` wrote."""
    cfg = model.cfg
    config: dict[str, Any] = {theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()}
    config["rope_theta"] = {cfg.arm: cfg.rope_theta}
    config["hidden_act"] = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == cfg.activation)
    if cfg.strategy.reads_keys:
        config["fusedit_first_llm_layer"] = cfg.fusedit_first_layer
    if isinstance(model, UpstreamFuseDiT) and model.language_model is not None:
        text = model.language_model.config
        config["text_vocab_size"] = text.vocab_size
        config["text_intermediate_size"] = text.intermediate_size
        config["text_rope_theta"] = text.rope_parameters["rope_theta"]
        config["mrope_section"] = text.rope_parameters["mrope_section"]
    return config


@torch.no_grad()
def upstream_forward(
    model: Backbone,
    *,
    hidden_states: Float[Tensor, "B Ch h w"],
    timestep: Float[Tensor, " B"],
    attention_mask: Int[Tensor, "B N"] | Bool[Tensor, "B N"],
    text_hidden_states: Float[Tensor, "L B N C"] | None = None,
    input_ids: Int[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B Ch h w"]:
    """What the reference returns for its own inputs: noise - data, at timesteps 0..1000 (1000 is noise).

    The text is ``text_hidden_states``, or ``input_ids`` for a FuseDiT that came with its language model.
    """
    mask = attention_mask.bool()
    if isinstance(model, UpstreamFuseDiT):
        if input_ids is None:
            raise ValueError("FuseDiT reads input_ids, not text_hidden_states")
        features = model.read(input_ids, mask)
    elif text_hidden_states is None:
        raise ValueError(f"arm {model.cfg.arm!r} reads text_hidden_states, not input_ids")
    else:
        features = TextFeatures(text_hidden_states, mask)
    t = 1 - timestep / 1000
    return -model(hidden_states, t, model.prepare_text(features, t))


class UpstreamFuseDiT(FuseDiT):
    """FuseDiT with the language model it joins, where that came along, outside of its state."""

    def __init__(self, cfg: DiTConfig, language_model: nn.Module | None = None) -> None:
        super().__init__(cfg)
        self._language_model = (language_model,)  # in a tuple torch does not see it: it is no part of the state

    @property
    def language_model(self) -> Any:
        """The Qwen3-VL text model of transformers that came with the checkpoint, or None."""
        return self._language_model[0]

    @torch.no_grad()
    def read(self, input_ids: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> TextFeatures:
        """Keys and values of the language model's layers; the states, unread here, have no width."""
        if self.language_model is None:
            raise ValueError("this FuseDiT came without its language model: convert weights with llm.* too")
        from transformers import DynamicCache

        cache = DynamicCache()
        model = self.language_model.to(input_ids.device)
        model(input_ids=input_ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True)
        keys = torch.stack([layer.keys for layer in cache.layers])
        values = torch.stack([layer.values for layer in cache.layers])
        return TextFeatures(keys.new_empty(len(keys), *mask.shape, 0), mask, keys, values)


class Form(NamedTuple):
    """How one tensor of ours is made of the reference's, and taken apart again."""

    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


class Rule(NamedTuple):
    """The tensors of the reference that make one of ours."""

    target: str
    sources: tuple[str, ...]
    form: Form


def _flip_time(weight: Tensor) -> Tensor:
    """A gate's first layer [hidden, time_width] reading [cos | sin] of t instead of 1 - t; its own inverse.

    cos((1-t)f) = cos f cos tf + sin f sin tf and sin((1-t)f) = sin f cos tf - cos f sin tf. In float64, and
    stored in float32 at least: routing is computed in float32 whatever the other weights are.
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
    """Maps of the same input, computed in one product."""
    return Form(lambda parts: torch.cat(parts), lambda whole: whole.split(sizes))


def _convolution(channels: int, patch: int) -> Form:
    """A convolution [W, channels, patch, patch] as a product with patches of (row, column, channel)."""
    return Form(
        lambda parts: parts[0].permute(0, 2, 3, 1).flatten(1).clone(),
        lambda whole: [whole.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2)],
    )


def _rules(cfg: DiTConfig) -> list[Rule]:
    """What makes each tensor of a model."""
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
    """The router's logits or gates: one for all blocks, or one for each."""
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


def _check_of_paper(arm: str) -> None:
    if not ARMS[arm].paper:
        raise ValueError(f"the reference implementation has no arm {arm!r}; it has {', '.join(PAPER_ARMS)}")


@torch.no_grad()
def _fill(model: nn.Module, rules: Sequence[Rule], source: Mapping[str, Tensor], what: str) -> None:
    """Make every tensor of a model on the meta device from the source, one after the other."""
    known = {name for rule in rules for name in rule.sources}
    problems = {"not in the checkpoint": known - source.keys(), "not in the model": source.keys() - known}
    raise_if_any(problems, what)
    own, filled = model.state_dict(), {}
    wrong: dict[str, list[str]] = {"of another shape": [], "not of floating point": []}
    for rule in rules:
        parts = [source[name] for name in rule.sources]
        for name, part, expected in zip(rule.sources, parts, rule.form.split(own[rule.target]), strict=True):
            if part.shape != expected.shape:
                shapes = f"{[*part.shape]} in the checkpoint, {[*expected.shape]} in the model"
                wrong["of another shape"].append(f"{name}: {shapes}")
            elif not part.is_floating_point():
                wrong["not of floating point"].append(f"{name}: {part.dtype}")
        if not any(wrong.values()):
            filled[rule.target] = rule.form.join(parts)
    raise_if_any(wrong, what)
    model.load_state_dict(filled, assign=True)


def _dit_config(source: Mapping[str, Tensor], config: Mapping[str, Any], arm: str) -> DiTConfig:
    """Our configuration from the reference's and from what only the weights tell."""
    if kind := config.get("timestep_conditioning"):
        raise ValueError(
            f"timestep_conditioning={kind!r} cannot be converted: the layout of the reference's conditioned "
            "variants is not known; only checkpoints without it (null) are"
        )
    activation = str(config.get("hidden_act", "silu"))
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act={activation!r} is not known; expected {' or '.join(ACTIVATIONS)}")
    fields: dict[str, Any] = {ours: _size(config, theirs) for ours, theirs in SIZES.items()}
    if ARMS[arm].reads_keys:
        fields["fusedit_first_layer"] = _size(config, "fusedit_first_llm_layer", least=0)
    gate = "layers.0.mlp.gate_proj.weight"
    fields["mlp_width"] = len(source[gate]) if gate in source else 1  # without it filling the model says so
    fields["activation"] = ACTIVATIONS[activation]
    return DiTConfig(arm=arm, rope_theta=_rope_theta(config, arm), **fields)


def _rope_theta(config: Mapping[str, Any], arm: str) -> float:
    """The base of the image's rotary frequencies; in the reference FuseDiT's is its language model's."""
    bases = config.get("rope_theta", {}) if ARMS[arm].reads_keys else _get(config, "rope_theta")
    if isinstance(bases, Mapping) and arm in bases:
        return _base("rope_theta", bases[arm])
    if ARMS[arm].reads_keys:
        return _base("text_rope_theta", _get(config, "text_rope_theta"))
    if isinstance(bases, Mapping):
        raise ValueError(f"rope_theta of the configuration knows {', '.join(bases)}, but not arm {arm!r}")
    return _base("rope_theta", bases)


def _base(key: str, value: Any) -> float:
    """The base of rotary frequencies that a configuration gives."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{key} of the configuration is {value!r}; expected a number above 0")
    return float(value)


def _size(config: Mapping[str, Any], key: str, *, least: int = 1) -> int:
    """A size that a configuration gives."""
    value = _get(config, key)
    if type(value) is not int or value < least:
        raise ValueError(f"{key} of the configuration is {value!r}; expected a whole number from {least} on")
    return value


def _get(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise ValueError(f"the configuration lacks {key!r}; it has {', '.join(sorted(config))}")
    return config[key]


def _split_fusedit(source: Mapping[str, Tensor]) -> tuple[LazyTensors, LazyTensors]:
    """FuseDiT's own tensors, with or without ``dit.`` before their names, and its language model's."""
    text = renamed(source, "llm.")
    own = {name.removeprefix("dit."): name for name in source if not name.startswith("llm.")}
    if len(own) + len(text) != len(source):
        raise ValueError("the checkpoint holds the same tensors with and without 'dit.' before their names")
    return LazyTensors(source.__getitem__, own), text


def _language_model(source: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """The Qwen3-VL text model whose weights came with FuseDiT's."""
    from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

    query, head_dim = "layers.0.self_attn.q_proj.weight", _size(config, "head_dim")
    text = Qwen3VLTextConfig(
        vocab_size=_size(config, "text_vocab_size"),
        hidden_size=_size(config, "text_hidden_size"),
        intermediate_size=_size(config, "text_intermediate_size"),
        num_hidden_layers=_size(config, "num_text_layers"),
        num_attention_heads=len(source[query]) // head_dim if query in source else 1,
        num_key_value_heads=_size(config, "num_kv_heads"),
        head_dim=head_dim,
        hidden_act=config.get("hidden_act", "silu"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _base("text_rope_theta", _get(config, "text_rope_theta")),
            "mrope_section": list(_get(config, "mrope_section")),
            "mrope_interleaved": True,
        },
    )
    with torch.device("meta"):
        model = Qwen3VLTextModel(text)
    rules = [Rule(name, (name,), SAME) for name in model.state_dict()]
    _fill(model, rules, source, "the language model of this configuration")
    model.rotary_emb = type(model.rotary_emb)(text)  # its frequencies are no state: made again, on the CPU
    return model.eval().requires_grad_(False)
