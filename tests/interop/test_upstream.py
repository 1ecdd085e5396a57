"""Conversion of reference checkpoints: golden cases, a naive reference network, file layouts, bad input."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from semantic_routing.checkpoint.foreign import read_upstream
from semantic_routing.interop.upstream import (
    UpstreamFuseDiT,
    from_upstream,
    load_upstream,
    to_upstream,
    upstream_config,
    upstream_forward,
)
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


# --- a random checkpoint of the reference ---------------------------------------------------------------


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


# --- the reference's network, written from its description ----------------------------------------


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


# --- the numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", PAPER_ARMS)
def test_golden_cases_are_reproduced(shared: Path, arm: str) -> None:
    folder = shared / "golden" / "upstream"
    case = load_file(folder / f"{arm}.safetensors")
    weights = {k.removeprefix("weights."): v for k, v in case.items() if k.startswith("weights.")}
    inputs = {k.removeprefix("inputs."): v for k, v in case.items() if k.startswith("inputs.")}
    model = from_upstream(weights, json.loads((folder / "config.json").read_text()), arm)
    torch.testing.assert_close(upstream_forward(model, **inputs), case["output"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("arm", PAPER_ARMS)
@pytest.mark.parametrize(
    ("sizes", "height", "width"),
    [
        ({}, 6, 10),
        ({"depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "patch_size": 1}, 5, 2),
        ({"num_text_layers": 7, "fusedit_first_llm_layer": 4, "in_channels": 1, "patch_size": 3}, 6, 12),
        ({"num_heads": 4, "num_kv_heads": 4, "head_dim": 12, "depth": 4, "mrope_section": [2, 2, 2]}, 32, 24),
    ],
)
def test_a_converted_model_equals_the_naive_reference(arm: str, sizes: dict[str, int], height: int, width: int) -> None:
    config = CONFIG | sizes
    weights, inputs = random_weights(config, arm), random_inputs(config, arm, height, width, batch=3)
    model = from_upstream(weights, config, arm)
    expected = naive_forward(weights, config, arm, inputs)
    torch.testing.assert_close(upstream_forward(model, **inputs), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("arm", PAPER_ARMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_back_restores_the_weights(arm: str, dtype: torch.dtype) -> None:
    weights = {name: x.to(dtype) for name, x in random_weights(CONFIG, arm).items()}
    model = from_upstream(weights, CONFIG, arm)
    back = to_upstream(model)
    assert back.keys() == weights.keys()
    for name, x in weights.items():
        # The first layer of a gate changes by one rounding in float32.
        turned = "weight_generator.0.weight" in name and dtype == torch.float32
        torch.testing.assert_close(back[name], x, atol=1e-7 if turned else 0, rtol=0)
    again = from_upstream(back, upstream_config(model), arm)
    assert again.cfg == model.cfg
    inputs = random_inputs(CONFIG, arm, 4, 4)
    if dtype == torch.float32:
        torch.testing.assert_close(upstream_forward(again, **inputs), upstream_forward(model, **inputs))


def test_another_activation_and_one_rope_base_are_read() -> None:
    config = CONFIG | {"hidden_act": "gelu_pytorch_tanh", "rope_theta": 77.0}
    model = from_upstream(random_weights(config, "depth"), config, "S2")
    assert (model.cfg.activation, model.cfg.rope_theta, model.cfg.mlp_width) == ("gelu_tanh", 77.0, MLP_WIDTH)
    assert upstream_config(model)["hidden_act"] == "gelu_pytorch_tanh"


def test_a_converted_model_owns_its_weights_and_is_trainable() -> None:
    weights = random_weights(CONFIG, "depth")
    model = from_upstream(weights, CONFIG, "depth")
    assert all(p.requires_grad for p in model.parameters())
    before = weights["layers.0.mlp.down_proj.weight"].clone()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(weights["layers.0.mlp.down_proj.weight"], before)


def test_the_language_model_is_not_in_the_state_dict() -> None:
    weights = random_weights(CONFIG, "fusedit")
    model = from_upstream(weights, CONFIG, "fusedit")
    assert isinstance(model, UpstreamFuseDiT)
    assert model.language_model is not None
    assert sum(p.numel() for p in model.parameters()) == sum(
        x.numel() for name, x in weights.items() if name.startswith("dit.")
    )
    bare = {name.removeprefix("dit."): x for name, x in weights.items() if name.startswith("dit.")}
    alone = from_upstream(bare, CONFIG, "fusedit")
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match="came without its language model: convert a checkpoint"):
        upstream_forward(alone, **random_inputs(CONFIG, "fusedit", 4, 4))


# --- files ------------------------------------------------------------------------------------------------


def as_safetensors(weights: Weights, folder: Path) -> Path:
    save_file(weights, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_shards(weights: Weights, folder: Path, suffix: str, save: Callable[[Weights, Path], None]) -> Path:
    names = sorted(weights)
    places = {name: f"model-{i % 3}{suffix}" for i, name in enumerate(names)}
    for file in set(places.values()):
        save({name: weights[name] for name in names if places[name] == file}, folder / file)
    (folder / f"model{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def as_safetensors_shards(weights: Weights, folder: Path) -> Path:
    return as_shards(weights, folder, ".safetensors", save_file)


def as_torch_shards(weights: Weights, folder: Path) -> Path:
    return as_shards(weights, folder, ".bin", torch.save)


def as_torch_file(weights: Weights, folder: Path) -> Path:
    torch.save({f"_orig_mod.{name}": x for name, x in weights.items()}, folder / "weights.pth")
    return folder / "weights.pth"


def as_deepspeed(weights: Weights, folder: Path) -> Path:
    (folder / "pytorch_model").mkdir()
    (folder / "scheduler.bin").write_bytes(b"")
    state = {"module": {f"module.{name}": x for name, x in weights.items()}, "ds_config": {"a": 1}, "step": 3}
    torch.save(state, folder / "pytorch_model" / "mp_rank_00_model_states.pt")
    return folder


def as_deepspeed_itself(weights: Weights, folder: Path) -> Path:
    """Write the layout of DeepSpeed itself, with other states beside the weights."""
    state = {
        "module": OrderedDict((f"module.{name}", x) for name, x in weights.items()),
        "optimizer": None,
        "param_shapes": [OrderedDict((name, x.shape) for name, x in weights.items())],
        "sparse_tensor_module_names": set(),
        "lr_scheduler": {"base_lrs": [1e-4], "last_epoch": 5},
    }
    (folder / "global_step5").mkdir()
    torch.save(state, folder / "global_step5" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step5")
    return folder


def as_accelerate(weights: Weights, folder: Path) -> Path:
    save_file(weights, folder / "model.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    torch.save({}, folder / "optimizer.bin")
    return folder


@pytest.mark.parametrize("arm", ["joint", "fusedit"])
@pytest.mark.parametrize(
    "write",
    [
        as_safetensors,
        as_safetensors_shards,
        as_torch_shards,
        as_torch_file,
        as_deepspeed,
        as_deepspeed_itself,
        as_accelerate,
    ],
)
def test_every_layout_loads(tmp_path: Path, write: Callable[[Weights, Path], Path], arm: str) -> None:
    weights = random_weights(CONFIG, arm)
    expected = from_upstream(weights, CONFIG, arm).state_dict()
    loaded = load_upstream(write(weights, tmp_path), CONFIG, arm).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], x) for name, x in expected.items())


@pytest.mark.parametrize("prefix", ["module.", "transformer.", "dit.", "module._orig_mod.", "model.module."])
def test_a_prefix_of_all_names_is_removed(prefix: str) -> None:
    weights = random_weights(CONFIG, "static")
    model = from_upstream({f"{prefix}{name}": x for name, x in weights.items()}, CONFIG, "static")
    expected = from_upstream(weights, CONFIG, "static").state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    some = {f"{prefix}{name}" if name == "norm_out.weight" else name: x for name, x in weights.items()}
    with pytest.raises(ValueError, match=rf"not in the checkpoint \(norm_out.weight\).*\({prefix}norm_out.weight\)"):
        from_upstream(some, CONFIG, "static")


def test_written_weights_can_be_loaded(tmp_path: Path) -> None:
    model = from_upstream(random_weights(CONFIG, "time"), CONFIG, "time")
    save_file(to_upstream(model), tmp_path / "model.safetensors")
    again = load_upstream(tmp_path, upstream_config(model), "time")
    inputs = random_inputs(CONFIG, "time", 4, 4)
    torch.testing.assert_close(upstream_forward(again, **inputs), upstream_forward(model, **inputs))


PEAK = """
import json, sys
from pathlib import Path
import torch
from semantic_routing.interop.upstream import load_upstream
from semantic_routing.model.dit import DiTConfig
from semantic_routing.model.build import make_model

def status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024

src, config = Path(sys.argv[1]), json.loads(sys.argv[2])
with torch.device("meta"):
    make_model(DiTConfig(depth=1))  # imports of torch for its meta device are not measured
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
model = load_upstream(src, config, "depth")
size = sum(p.numel() * p.element_size() for p in model.parameters())
sys.stdout.write(f"{(status('VmHWM') - before) / size}")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory through Linux's /proc")
@pytest.mark.parametrize("write", [as_safetensors_shards, as_safetensors, as_torch_file])
def test_peak_memory_is_that_of_the_model(tmp_path: Path, write: Callable[[Weights, Path], Path]) -> None:
    config = CONFIG | {"depth": 24, "hidden_size": 384, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
    config |= {"text_hidden_size": 256}
    src = write(random_weights(config, "depth"), tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", PEAK, src, json.dumps(config)], check=True, capture_output=True, text=True
    )
    assert 0.9 < float(run.stdout) < 1.15


# --- bad input --------------------------------------------------------------------------------------------


def test_both_sides_of_a_mismatch_are_named() -> None:
    weights = random_weights(CONFIG, "depth")
    weights["adaln.weight"] = weights.pop("layers.1.mlp.up_proj.weight")
    with pytest.raises(
        ValueError, match=r"not in the checkpoint \(layers.1.mlp.up_proj.weight\).*not in the model \(ada"
    ):
        from_upstream(weights, CONFIG, "depth")
    with pytest.raises(ValueError, match=r"text_fusion_weight\).*text_fusion_weights.0, "):
        from_upstream(random_weights(CONFIG, "depth"), CONFIG, "static")


@pytest.mark.parametrize("name", ["dit.layers.2.mlp.down_proj.weight", "llm.norm.weight"])
def test_fusedit_checkpoints_must_match_too(name: str) -> None:
    weights = random_weights(CONFIG, "fusedit")
    lost = weights.pop(name)
    with pytest.raises(ValueError, match=re.escape(name.split(".", 1)[1])):
        from_upstream(weights, CONFIG, "fusedit")
    with pytest.raises(ValueError, match="vision"):
        from_upstream(weights | {name: lost, "vision.weight": lost}, CONFIG, "fusedit")


def test_other_sizes_are_named() -> None:
    weights = random_weights(CONFIG, "depth")
    message = r"layers.0.cross_attn.k_norm.weight: \[8\] in the checkpoint, \[4\] in the model"
    with pytest.raises(ValueError, match=message):
        from_upstream(weights, CONFIG | {"head_dim": 4}, "depth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu' is not known"),
        ({"timestep_conditioning": "adaln-zero"}, "timestep_conditioning='adaln-zero' cannot be converted"),
        ({"hidden_act": ["silu"]}, r"hidden_act=.* is not known"),
        ({"rope_theta": {"time": 1e4}}, "has time, but not arm 'depth'"),
        ({"rope_theta": None}, "rope_theta of the configuration is None; expected a number above 0"),
        ({"rope_theta": {"depth": "1e4"}}, "rope_theta of the configuration is '1e4'"),
        ({"depth": "3"}, "depth of the configuration is '3'; expected a whole number from 1 on"),
        ({"num_kv_heads": 0}, "num_kv_heads of the configuration is 0"),
        ({"hidden_size": 28.0}, r"hidden_size of the configuration is 28\.0"),
        ({"head_dim": None}, "head_dim of the configuration is None"),
    ],
)
def test_bad_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_upstream(random_weights(CONFIG, "depth"), CONFIG | change, "depth")


def test_weights_must_be_floating_point() -> None:
    weights = random_weights(CONFIG, "depth")
    weights["norm_out.weight"] = weights["norm_out.weight"].long()
    with pytest.raises(ValueError, match=r"1 tensors not of floating point \(norm_out.weight: torch.int64\)"):
        from_upstream(weights, CONFIG, "depth")


def test_a_missing_setting_is_named() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "num_heads"}
    with pytest.raises(ValueError, match="lacks 'num_heads'"):
        from_upstream(random_weights(CONFIG, "depth"), config, "depth")


class Runs:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "weights.pt", tmp_path / "ran"
    torch.save({"w": Runs(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_upstream(path, CONFIG, "depth")
    assert not marker.exists()


def with_changed_pickle(folder: Path) -> bytes:
    """Return a torch file with a changed pickle."""
    torch.save({"w": torch.zeros(2)}, folder / "good.pt")
    return (folder / "good.pt").read_bytes().replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v2"[::-1])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = as_safetensors(random_weights(CONFIG, "static"), tmp_path)
    data = whole.read_bytes()
    for name, content in {
        "short.safetensors": data[:-100],
        "header.safetensors": data[:8] + b"!" + data[9:],
        "empty.safetensors": b"",
        "short.pt": b"PK\x03\x04" + data[:50],
        "empty.pt": b"",
        "model.safetensors.index.json": b"{]",
        "pickle.pt": with_changed_pickle(tmp_path),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(name)):
            load_upstream(path, CONFIG, "static")


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    as_safetensors_shards(random_weights(CONFIG, "static"), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    places.pop("norm_out.weight")
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"norm_out.weight"):
        load_upstream(tmp_path, CONFIG, "static")
    (tmp_path / "model-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no checkpoint .*model-0.safetensors"):
        load_upstream(tmp_path, CONFIG, "static")


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", ".", "a/b.safetensors"])
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, file: str) -> None:
    index = tmp_path / "inner" / "model.safetensors.index.json"
    index.parent.mkdir()
    as_safetensors(random_weights(CONFIG, "static"), tmp_path)
    index.write_text(json.dumps({"weight_map": {"norm_out.weight": file}}))
    with pytest.raises(ValueError, match=re.escape(f"names {file!r}, which is not a file beside it")):
        load_upstream(tmp_path / "inner", CONFIG, "static")


def test_an_index_that_names_itself_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm_out.weight": index.name}}))
    with pytest.raises(ValueError, match=re.escape(index.name)):
        load_upstream(tmp_path, CONFIG, "static")


def test_folders_without_exactly_one_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        read_upstream(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"name one of \['a.safetensors', 'b.safetensors'\]"):
        read_upstream(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_upstream(tmp_path / "list.pt")


def test_models_that_the_reference_lacks_are_refused() -> None:
    model = from_upstream(random_weights(CONFIG, "depth"), CONFIG, "depth")
    object.__setattr__(model.cfg, "prediction", "image")
    with pytest.raises(ValueError, match="has no known counterpart"):
        to_upstream(model)
    with pytest.raises(ValueError, match="reads text_hidden_states"):
        upstream_forward(model, **random_inputs(CONFIG, "fusedit", 4, 4))
