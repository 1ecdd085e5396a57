"""LoRA adapters: trained, saved, loaded, fused and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from semantic_routing.interop.export import make_pipeline
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from tests.helpers.pipelines import PROMPTS, MakeBundle, draw, exact, quiet


def test_a_lora_is_trained_saved_and_loaded(make_bundle: MakeBundle, tmp_path: Path) -> None:
    from peft import LoraConfig

    bundle = make_bundle()
    pipe = exact(quiet(make_pipeline(bundle)))
    before = draw(pipe)
    transformer = pipe.transformer
    targets = ["qkv", "q", "kv", "out", "gate_up", "down"]
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    assert torch.equal(draw(pipe), before)  # a new adapter is zero
    trained = [p for p in transformer.parameters() if p.requires_grad]
    assert 0 < len(trained) == sum("lora" in name for name, _ in transformer.named_parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    features, x, t = pipe.encode_prompt(PROMPTS), torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.6])
    losses = []
    for _ in range(10):
        loss = (transformer(x, t, transformer.prepare_text(features)) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = draw(pipe)
    assert not torch.equal(after, before)

    pipe.save_lora_weights(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    fresh = exact(quiet(make_pipeline(make_bundle())))
    assert torch.equal(draw(fresh), before)
    fresh.load_lora_weights(tmp_path, adapter_name="style")
    assert torch.equal(draw(fresh), after)
    assert fresh.get_list_adapters() == {"transformer": ["style"]}
    fresh.fuse_lora(components=["transformer"])
    torch.testing.assert_close(draw(fresh), after, atol=1e-3, rtol=1e-3)
    fresh.unfuse_lora(components=["transformer"])
    fresh.unload_lora_weights()
    torch.testing.assert_close(draw(fresh), before, atol=1e-3, rtol=1e-3)


def test_a_lora_of_the_text_takes_part_in_finer_arms(make_bundle: MakeBundle) -> None:
    """Their projections are composed from what the layers put out, adapters included."""
    from peft import LoraConfig

    pipe = exact(quiet(make_pipeline(make_bundle("depth-heads-kv"))))
    plain = draw(pipe)
    torch.manual_seed(3)
    targets = ["kv", "text_proj"]
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    drawn = draw(pipe)
    assert not near(drawn, plain)
    pipe.fuse_lora()
    assert near(draw(pipe), drawn)


def test_a_lora_of_modules_that_match_a_pattern_is_saved_and_loaded(
    pipe: SemanticRoutingPipeline, tmp_path: Path
) -> None:
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=r".*\.(qkv|out)", init_lora_weights=False))
    changed = draw(pipe)
    pipe.save_lora_weights(tmp_path)
    pipe.unload_lora_weights()
    assert not torch.equal(draw(pipe), changed)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(draw(pipe), changed)


@pytest.fixture
def styled(pipe: SemanticRoutingPipeline, tmp_path: Path) -> tuple[SemanticRoutingPipeline, Path, Tensor]:
    """A pipeline, the folder of a LoRA whose alpha is twice its rank, and latents sampled with it."""
    from peft import LoraConfig

    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["qkv", "kv"], init_lora_weights=False)
    exact(pipe).transformer.add_adapter(config)
    pipe.save_lora_weights(tmp_path)
    drawn = draw(pipe)
    pipe.unload_lora_weights()
    assert (draw(pipe) - drawn).abs().max() > 0.05
    return pipe, tmp_path, drawn


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-3)


@pytest.mark.behaviour(
    "diffusers",
    when="`fuse_lora()` and `unfuse_lora()` are called without arguments, also with a compiled transformer",
    then="the LoRA is merged into the weights, and removed again",
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_lora_is_fused_scaled_disabled_and_deleted(
    styled: tuple[SemanticRoutingPipeline, Path, Tensor], compiled: bool
) -> None:
    pipe, folder, drawn = styled
    plain = draw(pipe)
    if compiled:
        # The same wrapper as that of torch.compile, but nothing is traced.
        pipe.transformer = torch._dynamo.disable(pipe.transformer)
        assert hasattr(pipe.transformer, "_orig_mod")
    pipe.load_lora_weights(folder, adapter_name="style")
    assert near(draw(pipe), drawn)
    pipe.fuse_lora(lora_scale=0.5)
    assert not near(draw(pipe), drawn)
    pipe.unfuse_lora()
    pipe.fuse_lora()
    assert near(draw(pipe), drawn)
    pipe.unfuse_lora()
    pipe.set_adapters("style", 0.0)
    assert near(draw(pipe), plain)
    pipe.set_adapters(["style"], adapter_weights=[1.0])
    pipe.disable_lora()
    assert near(draw(pipe), plain)
    pipe.enable_lora()
    assert near(draw(pipe), drawn)
    assert pipe.get_active_adapters() == ["style"]
    assert near(draw(pipe, attention_kwargs={"scale": 0.0}), plain)
    assert near(draw(pipe, joint_attention_kwargs={"scale": 1.0}), drawn)
    pipe.save_lora_weights(folder / "again")
    pipe.delete_adapters("style")
    assert near(draw(pipe), plain)
    pipe.load_lora_weights(folder / "again")
    assert near(draw(pipe), drawn)


@pytest.mark.behaviour(
    "diffusers",
    when="a LoRA is a dictionary, or a file without its alpha",
    then="the alpha beside its matrices is used; without one an error asks for it",
)
def test_every_source_of_a_lora_needs_its_alpha(styled: tuple[SemanticRoutingPipeline, Path, Tensor]) -> None:
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    pipe, folder, drawn = styled
    name = "pytorch_lora_weights.safetensors"
    pipe.load_lora_weights(folder, weight_name=name)
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="default_0")
    SemanticRoutingPipeline.save_lora_weights(folder / "bare", transformer_lora_layers=layers)
    for source, options in (
        (folder, {"weight_name": name}),
        (folder / name, {}),
        (load_file(folder / name), {}),
        (pipe.lora_state_dict(folder), {}),
        (layers, {"network_alphas": 4}),
        (layers, {"metadata": pipe.transformer.peft_config["default_0"].to_dict()}),
        (folder / "bare", {"network_alphas": 4}),
    ):
        pipe.unload_lora_weights()
        pipe.load_lora_weights(pretrained_model_name_or_path_or_dict=source, **options)
        assert near(draw(pipe), drawn)
    pipe.unload_lora_weights()
    for source in (layers, folder / "bare"):
        with pytest.raises(ValueError, match="this LoRA has no alpha"):
            pipe.load_lora_weights(source)


def test_bad_lora_calls_are_refused(styled: tuple[SemanticRoutingPipeline, Path, Tensor]) -> None:
    pipe, folder, _ = styled
    (folder / "broken.safetensors").write_bytes(b"no")
    for call, message in (
        (lambda: pipe.load_lora_weights(folder, weight_name="x.bin"), "only read from .safetensors"),
        (lambda: pipe.load_lora_weights(folder, weight_name="broken.safetensors"), "not a complete safetensors file"),
        (lambda: pipe.load_lora_weights({"unet.down.lora_A.weight": torch.ones(2, 2)}), "is of another network"),
        (lambda: pipe.load_lora_weights(folder, lora_scale=2), "unknown argument 'lora_scale'"),
        (lambda: pipe.save_lora_weights(folder), "has no LoRA to save"),
        (lambda: pipe.save_lora_weights(folder, safe_serialization=False), "only written as .safetensors"),
        (lambda: SemanticRoutingPipeline.save_lora_weights(folder), "give transformer_lora_layers"),
        (lambda: draw(pipe, attention_kwargs={"scale": 0.5}), "no LoRA is loaded"),
        (lambda: draw(pipe, attention_kwargs={"ip_adapter": 1}), "only takes the scale of a LoRA"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
