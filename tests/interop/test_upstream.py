"""Conversion of reference checkpoints: golden cases, a naive reference network, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from semantic_routing.interop.upstream import (
    UpstreamFuseDiT,
    from_upstream,
    to_upstream,
    upstream_config,
    upstream_forward,
)
from semantic_routing.model.arms import PAPER_ARMS
from tests.helpers.reference import CONFIG, MLP_WIDTH, naive_forward, random_inputs, random_weights


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
    with pytest.raises(ValueError, match="has no language model: convert a checkpoint"):
        upstream_forward(alone, **random_inputs(CONFIG, "fusedit", 4, 4))


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


def test_models_that_the_reference_lacks_are_refused() -> None:
    model = from_upstream(random_weights(CONFIG, "depth"), CONFIG, "depth")
    object.__setattr__(model.cfg, "prediction", "image")
    with pytest.raises(ValueError, match="has no known counterpart"):
        to_upstream(model)
    with pytest.raises(ValueError, match="reads text_hidden_states"):
        upstream_forward(model, **random_inputs(CONFIG, "fusedit", 4, 4))
