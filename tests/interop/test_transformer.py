"""Compiling, offloading and narrow types of the transformer in a pipeline."""

from __future__ import annotations

from typing import Any

import accelerate
import numpy as np
import pytest
import torch

from semantic_routing.interop.export import make_pipeline
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from tests.helpers.forked import run
from tests.helpers.pipelines import MakeBundle, draw, exact, quiet

COMPILE = """
import torch
from semantic_routing.text.features import TextFeatures
from semantic_routing.interop.transformer import SemanticRoutingTransformer

sizes = dict(depth=2, width=24, heads=2, kv_heads=1, head_dim=8, mlp_width=40, channels=3, text_width=16, text_layers=3)
for whole in (True, False):
    model = SemanticRoutingTransformer(**sizes).eval()
    torch.nn.init.normal_(model.backbone.proj_out.weight)
    text = TextFeatures(torch.randn(3, 2, 5, 16), torch.arange(5) < torch.tensor([[3], [5]]))
    x, t = torch.randn(2, 3, 4, 8), torch.tensor([0.3, 0.6])
    context = model.prepare_text(text)
    expected = model(x, t, context)
    if whole:
        model = torch.compile(model, backend="aot_eager")
    else:
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert not model.depends_on_time
    torch.testing.assert_close(model(x, t, model.prepare_text(text)), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
"""


def test_the_transformer_compiles() -> None:
    """As a whole and block by block, in another process, because torch.compile cannot trace the type checks."""
    run(COMPILE)


def test_layerwise_casting_stores_weights_in_8_bits(pipe: SemanticRoutingPipeline) -> None:
    expected = draw(exact(pipe))
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    types = {p.dtype for name, p in pipe.transformer.named_parameters() if "blocks" in name and "norm" not in name}
    assert types == {torch.float8_e4m3fn}
    error = (draw(pipe) - expected).square().mean() / expected.square().mean()
    assert 0 < error < 0.05


def test_model_offload_hooks_move_every_component(make_bundle: MakeBundle) -> None:
    """The CPU stands in for the accelerator; the hook of every component runs in the order of the components."""
    pipe = quiet(make_pipeline(make_bundle(latent=True, patch=2)))
    expected = draw(pipe, output_type="np")
    pipe.enable_model_cpu_offload(device="cpu")
    assert len(pipe._all_hooks) == 3
    moved = []
    for hook in pipe._all_hooks:
        original = hook.hook.pre_forward

        def pre_forward(module: Any, *args: Any, original: Any = original, **options: Any) -> Any:
            moved.append(type(module).__name__)
            return original(module, *args, **options)

        hook.hook.pre_forward = pre_forward
    assert np.array_equal(draw(pipe, output_type="np"), expected)
    assert list(dict.fromkeys(moved)) == ["Qwen3Model", "SemanticRoutingTransformer", "AutoencoderKL"]


@pytest.mark.parametrize("arm", ["joint", "fusedit"])
def test_weights_can_be_offloaded_layer_by_layer(make_bundle: MakeBundle, arm: str) -> None:
    """As by ``enable_sequential_cpu_offload``: weights are on the meta device between calls."""
    pipe = quiet(make_pipeline(make_bundle(arm)))
    expected = draw(pipe)
    for component in (pipe.text_encoder, pipe.transformer):
        accelerate.cpu_offload(component, torch.device("cpu"))
        assert all(p.is_meta for p in component.parameters())
    assert torch.equal(draw(pipe), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arm", ["depth", "joint", "fusedit"])
def test_model_offload_on_a_gpu(make_bundle: MakeBundle, arm: str) -> None:
    pipe = quiet(make_pipeline(make_bundle(arm, latent=True, patch=2)))
    expected = draw(pipe.to("cuda"), output_type="np")
    pipe.enable_model_cpu_offload()
    assert np.array_equal(draw(pipe, output_type="np"), expected)
    assert {module.device.type for module in (pipe.text_encoder, pipe.transformer, pipe.vae)} == {"cpu"}
