"""Conversion of checkpoints of the paper's reference implementation to this program's models, and back.

The reference differs in layout (separate projections, a patch convolution), sign (noise - data) and time (its gates
read sigma = timestep / 1000 = 1 - t). ``upstream_rules.py`` folds all of that into the weights, so a loaded model is an
ordinary one. Every tensor of the source is used once and every tensor of the model is filled, or a ValueError lists the
mismatches. Tensors are read one at a time, so no checkpoint is in memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from semantic_routing.checkpoint.foreign import LazyTensors, raise_if_any, read_upstream, renamed, unwrapped
from semantic_routing.interop.upstream_rules import GATE_IN, SAME, Rule, rules_of
from semantic_routing.model.arms import ARMS, PAPER_ARMS, parse_arm
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import Backbone, DiTConfig
from semantic_routing.model.fusedit import FuseDiT
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
"""Our names of sizes -> the reference's."""
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""The reference's names of activations -> ours. The reference's MLP uses the text encoder's activation."""


def load_upstream(src: Path, config: Mapping[str, Any], arm: str) -> Backbone:
    """Load a reference checkpoint from disk; peak memory is the model and a few tensors of one layer.

    ``src`` is a safetensors or torch file, or a folder with one, with shards and their index, or saved by DeepSpeed or
    Accelerate. Raises the ValueErrors of ``read_upstream`` and ``from_upstream``.
    """
    return from_upstream(read_upstream(src), config, arm)


def from_upstream(state_dict: Mapping[str, Tensor], config: Mapping[str, Any], arm: str) -> Backbone:
    """Convert a reference checkpoint to a model with the dtype of its weights, which are copied.

    ``state_dict`` holds the reference's tensors by name. ``config`` holds the reference's sizes (``SIZES``),
    ``rope_theta`` (a number, or one per arm), optionally ``hidden_act`` (silu), and for FuseDiT
    ``fusedit_first_llm_layer`` and ``text_rope_theta``. The MLP's width is taken from the weights. FuseDiT is returned
    as ``UpstreamFuseDiT``. If the weights of its language model (``llm.*``) are in ``state_dict``, ``config`` also
    holds ``text_vocab_size``, ``text_intermediate_size`` and ``mrope_section``. Raises ValueError, which names both
    sides, if weights, sizes and arm do not match.
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
    _fill(model, rules_of(cfg), source, f"a {arm} model of this configuration")
    return model


def to_upstream(model: Backbone) -> dict[str, Tensor]:
    """Convert a model's weights to the reference's state dict: the inverse of ``from_upstream``.

    The conversion is exact, except that the first layer of time gates changes by one rounding in float32 models. (In
    16-bit models this layer is stored in float32.) Tensors share memory with the model if possible. Raises ValueError
    for models that the reference does not have.
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
    for rule in rules_of(cfg):
        parts = rule.form.split(own[rule.target])
        if rule.form is GATE_IN:
            parts = [part.to(model.proj_out.weight.dtype) for part in parts]
        result |= {prefix + name: part.contiguous() for name, part in zip(rule.sources, parts, strict=True)}
    if isinstance(model, UpstreamFuseDiT) and model.language_model is not None:
        result |= {f"llm.{name}": tensor for name, tensor in model.language_model.state_dict().items()}
    return result


def upstream_config(model: Backbone) -> dict[str, Any]:
    """Return the ``config`` with which ``from_upstream`` reads the weights that ``to_upstream`` returns."""
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
    """Run a forward pass with the reference's inputs; return noise - data at timesteps 0..1000 (1000 is noise).

    The text is ``text_hidden_states``, or ``input_ids`` for a FuseDiT with its language model.
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
    """FuseDiT with the language model of its checkpoint, if there is one, which is not in its state dict."""

    def __init__(self, cfg: DiTConfig, language_model: nn.Module | None = None) -> None:
        super().__init__(cfg)
        self._language_model = (language_model,)  # in a tuple, because torch would register it

    @property
    def language_model(self) -> Any:
        """The Qwen3-VL text model of the checkpoint, or None."""
        return self._language_model[0]

    @torch.no_grad()
    def read(self, input_ids: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> TextFeatures:
        """Compute keys and values of all layers of the language model; the hidden states, not needed, have width 0."""
        if self.language_model is None:
            raise ValueError("this FuseDiT has no language model: convert a checkpoint that contains llm.* weights")
        from transformers import DynamicCache

        cache = DynamicCache()
        model = self.language_model.to(input_ids.device)
        model(input_ids=input_ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True)
        keys = torch.stack([layer.keys for layer in cache.layers])
        values = torch.stack([layer.values for layer in cache.layers])
        return TextFeatures(keys.new_empty(len(keys), *mask.shape, 0), mask, keys, values)


def _check_of_paper(arm: str) -> None:
    if not ARMS[arm].paper:
        raise ValueError(f"the reference implementation has no arm {arm!r}; it has {', '.join(PAPER_ARMS)}")


@torch.no_grad()
def _fill(model: nn.Module, rules: Sequence[Rule], source: Mapping[str, Tensor], what: str) -> None:
    """Fill a model on the meta device from the source, one tensor at a time."""
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
    """Translate the reference's configuration; sizes that it lacks are those of the weights."""
    if kind := config.get("timestep_conditioning"):
        raise ValueError(
            f"timestep_conditioning={kind!r} cannot be converted, because the layout of such checkpoints is not known; "
            "convert one with timestep_conditioning=null"
        )
    activation = str(config.get("hidden_act", "silu"))
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act={activation!r} is not known; expected {' or '.join(ACTIVATIONS)}")
    fields: dict[str, Any] = {ours: _size(config, theirs) for ours, theirs in SIZES.items()}
    if ARMS[arm].reads_keys:
        fields["fusedit_first_layer"] = _size(config, "fusedit_first_llm_layer", least=0)
    gate = "layers.0.mlp.gate_proj.weight"
    fields["mlp_width"] = len(source[gate]) if gate in source else 1  # without it, _fill raises
    fields["activation"] = ACTIVATIONS[activation]
    return DiTConfig(arm=arm, rope_theta=_rope_theta(config, arm), **fields)


def _rope_theta(config: Mapping[str, Any], arm: str) -> float:
    """Read the base of the image's rotary frequencies; the reference's FuseDiT uses that of its language model."""
    bases = config.get("rope_theta", {}) if ARMS[arm].reads_keys else _get(config, "rope_theta")
    if isinstance(bases, Mapping) and arm in bases:
        return _base("rope_theta", bases[arm])
    if ARMS[arm].reads_keys:
        return _base("text_rope_theta", _get(config, "text_rope_theta"))
    if isinstance(bases, Mapping):
        raise ValueError(f"rope_theta of the configuration has {', '.join(bases)}, but not arm {arm!r}; add it")
    return _base("rope_theta", bases)


def _base(key: str, value: Any) -> float:
    """Check a base of rotary frequencies."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{key} of the configuration is {value!r}; expected a number above 0")
    return float(value)


def _size(config: Mapping[str, Any], key: str, *, least: int = 1) -> int:
    """Read a size of a configuration."""
    value = _get(config, key)
    if type(value) is not int or value < least:
        raise ValueError(f"{key} of the configuration is {value!r}; expected a whole number from {least} on")
    return value


def _get(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise ValueError(f"the configuration lacks {key!r}; it has {', '.join(sorted(config))}")
    return config[key]


def _split_fusedit(source: Mapping[str, Tensor]) -> tuple[LazyTensors, LazyTensors]:
    """Separate FuseDiT's tensors, with or without the prefix ``dit.``, from those of its language model."""
    text = renamed(source, "llm.")
    own = {name.removeprefix("dit."): name for name in source if not name.startswith("llm.")}
    if len(own) + len(text) != len(source):
        raise ValueError("the checkpoint holds the same tensors with and without the prefix 'dit.'; keep one of them")
    return LazyTensors(source.__getitem__, own), text


def _language_model(source: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Build the Qwen3-VL text model of a FuseDiT checkpoint."""
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
    model.rotary_emb = type(model.rotary_emb)(text)  # its frequencies are not in the state dict
    return model.eval().requires_grad_(False)
