"""The diffusers pipeline: the same pixels as this program's own sampler, and what diffusers does with components."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from semantic_routing.common.device import has_bfloat16
from semantic_routing.interop.export import make_pipeline
from semantic_routing.interop.flow_schedulers import set_times
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.interop.transformer import SemanticRoutingTransformer
from semantic_routing.model.arms import PAPER_ARMS
from semantic_routing.model.build import make_model
from semantic_routing.model.codec import NotFiniteError, PixelCodec, VAECodec
from semantic_routing.model.dit import DiTConfig
from semantic_routing.sampling.samplers import noise_for, schedule
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder

PROMPTS = ["a red square above a white circle", "a blue star"]
STEPS, GUIDANCE = 5, 3.0
SIZES = DiTConfig(
    depth=2,
    width=24,
    heads=2,
    kv_heads=1,
    head_dim=32,
    mlp_width=40,
    patch=4,
    channels=3,
    text_width=64,
    text_layers=2,
    fusedit_first_layer=0,
)
MakeBundle = Callable[..., TextToImage]


def tiny_vae() -> AutoencoderKL:
    """A random VAE of factor 2 with 3 latent channels."""
    torch.manual_seed(1)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, sample_size=16, shift_factor=0.1, **blocks
    )


@pytest.fixture(autouse=True)
def _quiet() -> None:
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture
def make_bundle(tiny_encoder: Path) -> MakeBundle:
    """Makes a model whose weights are all random, with text encoder and codec: (arm, latent=..., **sizes)."""

    def make(arm: str = "depth", *, latent: bool = False, layers: str = "all", **sizes: Any) -> TextToImage:
        torch.manual_seed(0)
        encoder = TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=str(tiny_encoder), layers=layers))
        model = make_model(replace(SIZES, arm=arm, text_layers=encoder.num_layers, **sizes))
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return TextToImage(
            model=model.eval().requires_grad_(False),
            encoder=encoder,
            codec=VAECodec(tiny_vae()) if latent else PixelCodec(),
            image_size=16,
            null_prompt="gray",
            bf16=has_bfloat16(torch.device("cpu")),
        )

    return make


@pytest.fixture
def pipe(make_bundle: MakeBundle) -> SemanticRoutingPipeline:
    return quiet(make_pipeline(make_bundle()))


def quiet(pipe: SemanticRoutingPipeline) -> SemanticRoutingPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exact(pipe: SemanticRoutingPipeline) -> SemanticRoutingPipeline:
    """With float32 products, for comparisons of what is computed in another way."""
    pipe.register_to_config(precision="fp32")
    return pipe


def draw(pipe: SemanticRoutingPipeline, **options: Any) -> Tensor:
    """Final latents of the two prompts from fixed noise."""
    noise = noise_for(0, [(0, 0), (1, 0)], pipe.latent_shape())
    defaults = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": noise, "output_type": "latent"}
    return pipe(PROMPTS, **(defaults | options)).images


# --- the same as this program's sampler -------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
@pytest.mark.parametrize("arm", PAPER_ARMS)
def test_pixels_are_those_of_sample(make_bundle: MakeBundle, arm: str, guidance: float) -> None:
    bundle = make_bundle(arm)
    names = [(0, 0), (1, 0)]
    expected = bundle.sample(PROMPTS, names, SampleConfig(steps=STEPS, guidance=guidance, seed=3)).numpy()
    assert expected.std() > 20
    pipe = quiet(make_pipeline(bundle))
    noise = noise_for(3, names, pipe.latent_shape())
    images = pipe(PROMPTS, num_inference_steps=STEPS, guidance_scale=guidance, latents=noise).images
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), expected)


@pytest.mark.parametrize("sizes", [{"conditioning": "adaln-zero"}, {"prediction": "image"}])
def test_pixels_of_latent_and_conditioned_models(make_bundle: MakeBundle, sizes: dict[str, str]) -> None:
    bundle = make_bundle(latent=True, layers="2", patch=2, **sizes)
    cfg = SampleConfig(steps=STEPS, guidance=GUIDANCE)
    expected = bundle.sample(PROMPTS, [(0, 0), (1, 0)], cfg).numpy()
    images = draw(quiet(make_pipeline(bundle)), output_type="np")
    assert np.array_equal((images * 255).round().astype(np.uint8), expected)


@pytest.mark.parametrize("arm", ["depth", "fusedit"])
def test_pixels_of_a_narrow_text_encoder_with_wide_products(make_bundle: MakeBundle, arm: str) -> None:
    bundle = replace(make_bundle(arm), bf16=False, config={"precision": "fp32"})
    bundle.encoder.model.to(torch.bfloat16)
    expected = bundle.sample(PROMPTS, [(0, 0), (1, 0)], SampleConfig(steps=STEPS, guidance=GUIDANCE)).numpy()
    images = draw(quiet(make_pipeline(bundle)), output_type="np")
    assert np.array_equal((images * 255).round().astype(np.uint8), expected)


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_euler_takes_this_programs_steps_exactly(pipe: SemanticRoutingPipeline, steps: int) -> None:
    times = set_times(pipe.scheduler, steps, torch.device("cpu"))
    assert torch.equal(times, schedule(steps)[:-1])
    assert torch.equal(-pipe.scheduler.sigmas.diff(), schedule(steps).diff())
    assert torch.equal(pipe.scheduler.timesteps, 1000 * pipe.scheduler.sigmas[:-1])


def test_shift_is_the_schedulers() -> None:
    times = set_times(FlowMatchEulerDiscreteScheduler(shift=3.0), 20, torch.device("cpu"))
    torch.testing.assert_close(times, schedule(20, 3.0)[:-1])


def test_images_of_one_prompt_follow_each_other(pipe: SemanticRoutingPipeline) -> None:
    noise = noise_for(0, [(0, 0), (0, 1), (1, 0), (1, 1)], pipe.latent_shape())
    four = draw(exact(pipe), latents=noise, num_images_per_prompt=2, negative_prompt=["gray", "a star"])
    for i in range(4):
        one = pipe(
            PROMPTS[i // 2],
            ["gray", "a star"][i // 2],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=noise[i : i + 1],
            output_type="latent",
        ).images
        torch.testing.assert_close(four[i : i + 1], one, atol=1e-4, rtol=1e-4)


def test_negative_prompt_takes_the_null_prompts_place(pipe: SemanticRoutingPipeline) -> None:
    default = draw(pipe)
    assert torch.equal(draw(pipe, negative_prompt="gray"), default)
    assert torch.equal(draw(pipe, negative_prompt=["gray"] * 2), default)
    assert not torch.equal(draw(pipe, negative_prompt="a green circle"), default)


@pytest.mark.parametrize(("arm", "prepared"), [("depth", 1), ("joint", STEPS)])
def test_text_is_read_once_and_prepared_once_where_time_allows(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, arm: str, prepared: int
) -> None:
    pipe = quiet(make_pipeline(make_bundle(arm)))
    counts = {"prepare": 0, "read": 0}

    def count(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def counted(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, method, counted)

    count(pipe.transformer.backbone, "prepare_text", "prepare")
    count(pipe.text_encoder, "forward", "read")
    draw(pipe)
    assert counts == {"prepare": prepared, "read": 2}


# --- schedulers of diffusers ------------------------------------------------------------------------------


def other_schedulers() -> dict[str, Any]:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return {
        "heun": diffusers.FlowMatchHeunDiscreteScheduler(),
        "dpm": diffusers.DPMSolverMultistepScheduler(**flow),
        "dpm-single": diffusers.DPMSolverSinglestepScheduler(**flow, lower_order_final=True),
        "unipc": diffusers.UniPCMultistepScheduler(**flow),
        "deis": diffusers.DEISMultistepScheduler(**flow),
    }


@pytest.mark.filterwarnings("ignore:__array")  # diffusers reads tensors with an old numpy call
@pytest.mark.parametrize("name", other_schedulers())
def test_other_flow_schedulers_end_where_euler_does(pipe: SemanticRoutingPipeline, name: str) -> None:
    """Of many steps: sign, time and order of the velocity are right for solvers that keep their own accounts."""
    fine = draw(exact(pipe), num_inference_steps=400)
    start = noise_for(0, [(0, 0), (1, 0)], pipe.latent_shape())
    pipe.scheduler = other_schedulers()[name]
    error = (draw(pipe, num_inference_steps=100) - fine).square().mean().sqrt()
    assert error < 0.02 * (fine - start).square().mean().sqrt()


def test_scheduler_swapped_from_configuration(pipe: SemanticRoutingPipeline) -> None:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, **flow)
    assert draw(pipe).isfinite().all()
    pipe.scheduler = diffusers.FlowMatchLCMScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(i) for i in (4, 4)]
    assert torch.equal(draw(pipe, generator=generators[0]), draw(pipe, generator=generators[1]))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.DDIMScheduler(), "DDIMScheduler with prediction_type='epsilon' .* is not flow matching"),
        (diffusers.EulerDiscreteScheduler(), "EulerDiscreteScheduler .* not flow matching"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "prediction_type='epsilon'"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=False"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
    ],
)
def test_schedulers_that_are_refused(pipe: SemanticRoutingPipeline, scheduler: Any, message: str) -> None:
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        draw(pipe)


def test_sigmas_that_are_not_flow_matching(pipe: SemanticRoutingPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    monkeypatch.setattr(scheduler, "sigma_max", 80.0)
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match="sigmas from 80 to 0, but flow matching needs them"):
        draw(pipe)


# --- what a call takes and gives --------------------------------------------------------------------------


def test_output_types_are_the_same_pixels(pipe: SemanticRoutingPipeline) -> None:
    pil, array, tensor = (draw(pipe, output_type=kind) for kind in ("pil", "np", "pt"))
    assert all(isinstance(image, Image.Image) for image in pil)
    assert array.shape == (2, 16, 16, 3)
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), (array * 255).round().astype(np.uint8))
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))
    images = pipe(PROMPTS, num_inference_steps=1, return_dict=False)
    assert len(images) == 1
    assert len(images[0]) == 2


def test_generator_decides_the_noise(pipe: SemanticRoutingPipeline) -> None:
    seeds = (1, 1, 2)
    a, b, c = (draw(pipe, latents=None, generator=torch.Generator().manual_seed(seed)) for seed in seeds)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_other_sizes(pipe: SemanticRoutingPipeline) -> None:
    (image,) = pipe("a blue star", height=24, width=8, num_inference_steps=1).images
    assert image.size == (8, 24)


def test_callback_sees_and_changes_latents(pipe: SemanticRoutingPipeline) -> None:
    seen = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, float(timestep), pipe.guidance_scale, pipe.num_timesteps))
        return {"latents": torch.full_like(tensors["latents"], 7.0)} if step == STEPS - 1 else tensors

    result = draw(pipe, callback_on_step_end=callback)
    assert seen == [(i, pytest.approx(1000 * (1 - i / STEPS)), GUIDANCE, STEPS) for i in range(STEPS)]
    assert (result == 7).all()


def test_callback_can_stop(pipe: SemanticRoutingPipeline) -> None:
    steps = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    draw(pipe, callback_on_step_end=callback)
    assert steps == [0, 1]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 18, "width": 16}, r"18 x 16 pixels does not divide into .* patches of 4 x 4 pixels"),
        ({"height": 0}, "height is 0; it must be at least 1"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"\(2, 3, 8, 8\), but these images need \(2, 3, 16, 16\)"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; it must be at least 1"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 2 images"),
        ({"output_type": "jpeg"}, "unknown output_type 'jpeg'"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be at least 1"),
        ({"callback_on_step_end_tensor_inputs": ["pooled"]}, r"not \['pooled'\]"),
    ],
)
def test_bad_calls(pipe: SemanticRoutingPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(pipe, **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("prompt", [None, 3, ["a", None]])
def test_prompts_that_are_no_texts(pipe: SemanticRoutingPipeline, prompt: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"prompt is {prompt!r}; expected a text or a list of texts")):
        pipe(prompt)


def test_generators_of_every_image(pipe: SemanticRoutingPipeline) -> None:
    both = draw(exact(pipe), latents=None, generator=[torch.Generator().manual_seed(i) for i in (3, 4)])
    one = pipe(
        PROMPTS[1],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).images
    torch.testing.assert_close(both[1:], one, atol=1e-4, rtol=1e-4)


def test_components_that_do_not_fit(pipe: SemanticRoutingPipeline, make_bundle: MakeBundle) -> None:
    parts = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer, "scheduler": pipe.scheduler}
    facts = {"image_size": 16, "null_prompt": "gray", "text": {"layers": "all"}}

    def around(arm: str = "depth", **sizes: Any) -> SemanticRoutingPipeline:
        transformer = SemanticRoutingTransformer(**asdict(replace(SIZES, arm=arm, **sizes)))
        return SemanticRoutingPipeline(**parts, transformer=transformer, **facts)

    with pytest.raises(ValueError, match="gives layers 2, width 64, but this transformer reads layers 2, width 32"):
        around(text_width=32)
    with pytest.raises(ValueError, match="gives layers 2, width 64, but this transformer reads layers 9, width 64"):
        around(text_layers=9)
    with pytest.raises(
        ValueError, match="head width 32, but this transformer reads layers 2, key heads 1, head width 16"
    ):
        around("fusedit", head_dim=16)
    with pytest.raises(ValueError, match="pixels have 3 channels, but this transformer draws 4"):
        around(channels=4)
    with pytest.raises(ValueError, match="unknown precision 'fp8'; use one of auto, bf16, fp32"):
        SemanticRoutingPipeline(**parts, transformer=pipe.transformer, precision="fp8")
    with pytest.raises(ValueError, match=r"layer 3 of .* is asked for, but the text encoder holds 2 layers"):
        SemanticRoutingPipeline(**parts, transformer=pipe.transformer, text={"layers": [2, 3], "total_layers": 8})
    pipe.text_encoder = make_bundle(layers="1").encoder.model  # exchanged later
    with pytest.raises(ValueError, match=r"layer 2 of .* holds 1 layers"):
        draw(pipe)


# --- files ------------------------------------------------------------------------------------------------


def test_saved_pipeline_draws_the_same(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = quiet(make_pipeline(make_bundle(latent=True, layers="1", patch=2)))
    pipe.save_pretrained(str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model_index.json", "pipeline.py", "text_encoder", "tokenizer", "transformer", "scheduler", "vae"}
    capsys.readouterr()
    again = quiet(SemanticRoutingPipeline.from_pretrained(str(tmp_path)))
    assert "annotation" not in capsys.readouterr().err  # diffusers warns of types that it does not understand
    assert again.config.text["total_layers"] == 2
    assert torch.equal(draw(again), draw(pipe))


def test_configuration_is_the_networks(tmp_path: Path) -> None:
    transformer = SemanticRoutingTransformer(**asdict(SIZES))
    transformer.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: value for key, value in config.items() if key[0] != "_"} == asdict(SIZES) | {"facts": None}
    assert SemanticRoutingTransformer.from_pretrained(str(tmp_path)).backbone.cfg == SIZES
    with torch.device("meta"):
        assert SemanticRoutingTransformer().backbone.cfg == DiTConfig()


def test_narrow_types(make_bundle: MakeBundle, tmp_path: Path) -> None:
    pipe = quiet(make_pipeline(make_bundle("joint")))
    expected = draw(exact(pipe))
    pipe.save_pretrained(str(tmp_path))
    half = quiet(SemanticRoutingPipeline.from_pretrained(str(tmp_path), dtype=torch.bfloat16))
    types = {name: p.dtype for name, p in half.transformer.named_parameters()}
    assert half.transformer.dtype == half.text_encoder.dtype == torch.bfloat16
    assert {dtype for name, dtype in types.items() if "router" in name} == {torch.float32}
    assert {dtype for name, dtype in types.items() if "router" not in name} == {torch.bfloat16}
    result = draw(half)
    assert result.dtype == torch.float32
    assert (result - expected).square().mean() < 0.02 * expected.square().mean()


# --- what diffusers and peft do with the transformer ------------------------------------------------------


def test_lora_trains_saves_and_loads(make_bundle: MakeBundle, tmp_path: Path) -> None:
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


def test_lora_of_modules_named_by_a_pattern(pipe: SemanticRoutingPipeline, tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=r".*\.(qkv|out)", init_lora_weights=False))
    changed = draw(pipe)
    pipe.save_lora_weights(tmp_path)
    pipe.unload_lora_weights()
    assert not torch.equal(draw(pipe), changed)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(draw(pipe), changed)


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


def test_compiles() -> None:
    """As a whole and block by block; without the checks of annotations, which torch.compile cannot trace."""
    subprocess.run([sys.executable, "-c", COMPILE], check=True)


def test_layerwise_casting(pipe: SemanticRoutingPipeline) -> None:
    """The hook by which diffusers keeps weights in 8 bits and widens each where it is used."""
    expected = draw(exact(pipe))
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    types = {p.dtype for name, p in pipe.transformer.named_parameters() if "blocks" in name and "norm" not in name}
    assert types == {torch.float8_e4m3fn}
    error = (draw(pipe) - expected).square().mean() / expected.square().mean()
    assert 0 < error < 0.05


def test_model_offload_hooks_move_every_component(make_bundle: MakeBundle) -> None:
    """With the CPU itself as the accelerator: every component is asked for on its way through."""
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
def test_weights_that_lie_elsewhere_layer_by_layer(make_bundle: MakeBundle, arm: str) -> None:
    """As ``enable_sequential_cpu_offload`` leaves them: on the meta device between calls."""
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


def test_vae_tiling(make_bundle: MakeBundle, pipe: SemanticRoutingPipeline) -> None:
    latent = quiet(make_pipeline(make_bundle(latent=True, patch=2)))
    noise = noise_for(0, [(0, 0)], latent.latent_shape(64, 64))

    def image() -> Any:
        size = {"height": 64, "width": 64, "latents": noise}
        return latent("a star", num_inference_steps=1, output_type="np", **size).images

    whole = image()
    latent.enable_vae_tiling()
    assert latent.vae.use_tiling
    tiled = image()
    assert tiled.shape == whole.shape
    assert not np.array_equal(tiled, whole)
    latent.disable_vae_tiling()
    assert np.array_equal(image(), whole)
    with pytest.raises(ValueError, match="draws pixels and has no VAE"):
        pipe.enable_vae_tiling()


# --- what a pipeline must know ----------------------------------------------------------------------------


@pytest.mark.behaviour(
    "diffusers",
    when="a pipeline is built from another's components, `SemanticRoutingPipeline(**pipe.components)`",
    then="it draws the same pictures: size, null prompt, text settings and precision are in the transformer's config",
)
@pytest.mark.parametrize("latent", [False, True])
def test_pipeline_of_anothers_components(make_bundle: MakeBundle, latent: bool) -> None:
    bundle = make_bundle(layers="2", latent=latent, patch=2)
    bundle = replace(bundle, config={"precision": "fp32", "text": {"name_or_path": "tiny"}})
    bundle.encoder.config = replace(bundle.encoder.config, prefix="Draw this: ")
    pipe = quiet(make_pipeline(bundle))
    again = quiet(SemanticRoutingPipeline(**pipe.components))
    for name in ("image_size", "null_prompt", "text", "precision"):
        assert again.config[name] == pipe.config[name]
    assert again.config.text["prefix"] == "Draw this: "
    assert torch.equal(draw(again), draw(pipe))


def test_facts_are_in_the_transformers_folder(pipe: SemanticRoutingPipeline, tmp_path: Path) -> None:
    pipe.transformer.save_pretrained(str(tmp_path))
    parts = pipe.components | {"transformer": SemanticRoutingTransformer.from_pretrained(str(tmp_path))}
    again = quiet(SemanticRoutingPipeline(**parts))
    assert (again.config.image_size, again.config.null_prompt) == (16, "gray")
    assert torch.equal(draw(again), draw(pipe))
    assert SemanticRoutingPipeline(**parts, null_prompt="blue").config.null_prompt == "blue"


@pytest.mark.behaviour(
    "diffusers",
    when="a pipeline is built around a transformer whose config does not tell image size, null prompt or text settings",
    then="it is refused in one line that names what to give",
)
def test_facts_that_nobody_knows(pipe: SemanticRoutingPipeline) -> None:
    parts = pipe.components | {"transformer": SemanticRoutingTransformer(**asdict(SIZES))}
    with pytest.raises(ValueError, match="does not tell image_size and null_prompt and text of the model: give them"):
        SemanticRoutingPipeline(**parts)
    with pytest.raises(ValueError, match="does not tell null_prompt of the model"):
        SemanticRoutingPipeline(**parts, image_size=16, text={"layers": "all"})


def test_latents_of_another_kind(make_bundle: MakeBundle, pipe: SemanticRoutingPipeline) -> None:
    latent = make_pipeline(make_bundle(latent=True, patch=2))
    with pytest.raises(ValueError, match=r"draws latents of a VAE \(factor 2.* but the pipeline decodes pixels"):
        SemanticRoutingPipeline(**(latent.components | {"vae": None}))
    with pytest.raises(ValueError, match="draws pixels, but the pipeline decodes latents of a VAE"):
        SemanticRoutingPipeline(**(pipe.components | {"vae": latent.vae}))
    latent.vae.register_to_config(scaling_factor=2.0)
    with pytest.raises(ValueError, match=r"decodes latents of a VAE .*scale 2"):
        draw(latent)


# --- what callbacks change --------------------------------------------------------------------------------


@pytest.mark.behaviour(
    "diffusers",
    when="a callback changes `_guidance_scale`, `_interrupt`, latents, prompt embeddings or sigmas in mid-course",
    then="the next step heeds it",
)
def test_callback_turns_guidance_off_and_on(pipe: SemanticRoutingPipeline) -> None:
    def become(scale: float) -> Callable[..., Any]:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._guidance_scale = scale
            return tensors

        return callback

    guided, plain = draw(pipe), draw(pipe, guidance_scale=1.0)
    for scale in (1.0, 0.0, 9.0):
        assert not torch.equal(draw(pipe, callback_on_step_end=become(scale)), guided)
    assert not torch.equal(draw(pipe, guidance_scale=1.0, callback_on_step_end=become(GUIDANCE)), plain)
    assert torch.equal(draw(pipe, callback_on_step_end=become(GUIDANCE)), guided)
    cutoff = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.0)
    noise = noise_for(0, [(0, 0)], pipe.latent_shape())
    one = {"num_inference_steps": STEPS, "latents": noise, "output_type": "latent"}
    off = pipe("a star", guidance_scale=1.0, **one).images
    step_0 = pipe("a star", callback_on_step_end=cutoff, callback_on_step_end_tensor_inputs=[], **one).images
    assert step_0.shape == off.shape
    with pytest.raises(ValueError, match="guidance_scale is nan"):
        draw(pipe, callback_on_step_end=become(float("nan")))


def test_callback_exchanges_the_prompt_and_its_sigmas(make_bundle: MakeBundle) -> None:
    for arm in ("depth", "joint"):
        pipe = quiet(make_pipeline(make_bundle(arm)))
        stars, null = pipe.encode_prompt(["a star"] * 2), pipe.encode_prompt("gray")

        def swap(
            pipe: Any, step: int, timestep: Any, tensors: dict[str, Any], stars: Any = stars, null: Any = null
        ) -> dict[str, Any]:
            return {"prompt_embeds": stars, "negative_prompt_embeds": null}

        def sigmas(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                pipe.scheduler.sigmas[2:-1] *= 0.5
            return tensors

        names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
        plain = draw(pipe)
        changed = draw(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names)
        assert not torch.equal(changed, plain)
        assert not torch.equal(draw(pipe, callback_on_step_end=sigmas), plain)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("back", "message"),
    [
        (None, "returned None; expected the dictionary"),
        ({"latents": torch.zeros(1)}, r"latents have the shape \(1,\)"),
        ({"prompt_embeds": torch.zeros(2)}, "prompt_embeds is a Tensor; expected what encode_prompt returns"),
        ({"latents": torch.full((2, 3, 16, 16), torch.nan)}, "the pictures came out as NaN or infinite"),
    ],
)
def test_what_callbacks_may_not_return(pipe: SemanticRoutingPipeline, back: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(pipe, callback_on_step_end=lambda *_: back)


# --- prompts that were encoded before ---------------------------------------------------------------------


@pytest.mark.behaviour(
    "diffusers",
    when="`encode_prompt` is called in a pipeline without transformer, and its result drawn in one without encoder",
    then="the pictures are the same to the last bit",
)
@pytest.mark.parametrize("arm", ["depth", "joint", "fusedit"])
def test_encode_once_and_free_the_language_model(make_bundle: MakeBundle, tmp_path: Path, arm: str) -> None:
    pipe = quiet(make_pipeline(make_bundle(arm)))
    expected = draw(pipe)
    pipe.save_pretrained(str(tmp_path))
    reader = SemanticRoutingPipeline.from_pretrained(str(tmp_path), transformer=None, vae=None)
    embeds = {"prompt_embeds": reader.encode_prompt(PROMPTS), "negative_prompt_embeds": reader.encode_prompt("gray")}
    drawer = quiet(SemanticRoutingPipeline.from_pretrained(str(tmp_path), text_encoder=None, tokenizer=None))
    noise = noise_for(0, [(0, 0), (1, 0)], pipe.latent_shape())
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": noise, "output_type": "latent"}
    for other in (pipe, drawer):
        assert torch.equal(other(**embeds, **options).images, expected)
    with pytest.raises(ValueError, match="has no text encoder and tokenizer to read prompts: give prompt_embeds"):
        draw(drawer)
    with pytest.raises(ValueError, match=r"give negative_prompt_embeds, what encode_prompt\('gray'\) says"):
        drawer(prompt_embeds=embeds["prompt_embeds"])
    with pytest.raises(ValueError, match="has no transformer to draw with"):
        reader("a star")
    drawer.save_pretrained(str(tmp_path / "drawer"))
    again = quiet(SemanticRoutingPipeline.from_pretrained(str(tmp_path / "drawer")))
    assert torch.equal(again(**embeds, **options).images, expected)


@pytest.mark.usefixtures("unchecked")
def test_embeds_that_do_not_fit(pipe: SemanticRoutingPipeline) -> None:
    good = pipe.encode_prompt(["a star"])
    narrow = replace(good, hidden=good.hidden[..., :32])
    for options, message in (
        ({"prompt_embeds": good.hidden}, "prompt_embeds is a Tensor; expected what encode_prompt returns"),
        ({"prompt_embeds": narrow}, "prompt_embeds has 2 layers of width 32, but this transformer reads 2 layers of"),
        ({"prompt_embeds": replace(good, mask=good.mask & False)}, "True on one token of every prompt"),
        ({"prompt_embeds": replace(good, hidden=good.hidden * torch.nan)}, "not finite"),
        ({"prompt": "a", "prompt_embeds": good}, "say the same thing"),
        ({"prompt": ["a"] * 3, "negative_prompt_embeds": pipe.encode_prompt(["b"] * 2)}, "2 prompts; expected 1 or 3"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**options)


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.behaviour(
    "diffusers",
    when="a size, a number of steps or a guidance scale is `np.int64(32)`, `32.0` or a tensor's number",
    then="it is taken as the number it is; 32.5, True, a text or NaN is refused as what it is",
)
def test_numbers_of_any_type(pipe: SemanticRoutingPipeline) -> None:
    for eight in (np.int64(8), 8.0, np.float32(8), torch.tensor(8), np.array(8)):
        (image,) = pipe("a", height=eight, width=24, num_inference_steps=eight, num_images_per_prompt=1.0).images
        assert image.size == (24, 8)
    guided = draw(pipe)
    for scale in (np.float64(GUIDANCE), int(GUIDANCE), torch.tensor(GUIDANCE)):
        assert torch.equal(draw(pipe, guidance_scale=scale), guided)
    for name in ("height", "num_inference_steps", "num_images_per_prompt"):
        for value in (8.5, "8", True, [8], float("nan"), torch.ones(2)):
            with pytest.raises(ValueError, match=f"{name} is .*; expected a whole number"):
                draw(pipe, **{name: value})
    for scale in (float("nan"), float("inf"), 1e38, "3", None):
        with pytest.raises(ValueError, match=r"guidance_scale is .*; expected a number between -1000 and 1000"):
            draw(pipe, guidance_scale=scale)


@pytest.mark.behaviour(
    "diffusers",
    when="weights, noise or a LoRA hold NaN",
    then="the call ends with an error instead of a black picture",
)
def test_pictures_that_are_not_finite(pipe: SemanticRoutingPipeline) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        draw(pipe, latents=torch.full((2, 3, 16, 16), torch.inf))
    pipe.transformer.backbone.proj_out.weight.data[0] = torch.nan
    for kind in ("latent", "pil"):
        with pytest.raises(ValueError, match="the pictures came out as NaN or infinite"):
            draw(pipe, output_type=kind)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_vae_that_overflows(make_bundle: MakeBundle, value: float) -> None:
    latent = quiet(make_pipeline(make_bundle(latent=True, patch=2)))
    latent.vae.decoder.conv_out.bias.data[0] = value
    assert draw(latent, output_type="latent").isfinite().all()
    for kind in ("pil", "np", "pt"):
        with pytest.raises(NotFiniteError, match=r"the pictures came out as NaN or infinite: .* the VAE's"):
            draw(latent, output_type=kind)


@pytest.mark.behaviour(
    "diffusers",
    when="`guidance_scale` is 1 or less",
    then="the picture is of the prompt alone, without guidance, as in every pipeline of diffusers",
)
def test_no_guidance(pipe: SemanticRoutingPipeline) -> None:
    plain = draw(pipe, guidance_scale=1.0)
    for scale in (0, 0.5, -2):
        assert torch.equal(draw(pipe, guidance_scale=scale), plain)


def test_sigmas_and_timesteps(pipe: SemanticRoutingPipeline) -> None:
    expected = draw(pipe)
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2]
    torch.testing.assert_close(draw(pipe, sigmas=sigmas), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(draw(pipe, timesteps=[1000 * s for s in sigmas]), expected, atol=1e-3, rtol=1e-3)
    assert not torch.equal(draw(pipe, sigmas=np.array([1.0, 0.1])), expected)
    for options, message in (
        ({"sigmas": [0.5, 0.8]}, "sigmas must fall from at most 1"),
        ({"timesteps": [2000, 3]}, "timesteps must fall from at most 1000"),
        ({"sigmas": [1.0], "timesteps": [1000]}, "say the same thing"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipe, **options)
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="makes its own sigmas"):
        draw(pipe, sigmas=sigmas)


def test_usual_attributes(make_bundle: MakeBundle, pipe: SemanticRoutingPipeline) -> None:
    latent = quiet(make_pipeline(make_bundle(latent=True, patch=2)))
    assert (pipe.vae_scale_factor, latent.vae_scale_factor) == (1, 2)
    images = pipe.image_processor.postprocess(draw(pipe), output_type="np")
    assert np.abs(images - draw(pipe, output_type="np")).max() < 0.01
    whole = draw(latent, output_type="np")
    latent.enable_vae_slicing()
    assert latent.vae.use_slicing
    assert np.abs(draw(latent, output_type="np") - whole).max() < 0.01
    latent.disable_vae_slicing()
    with pytest.raises(ValueError, match="has no VAE to slice"):
        pipe.enable_vae_slicing()
    assert torch.equal(draw(SemanticRoutingPipeline.from_pipe(pipe)), draw(pipe))


# --- LoRA as elsewhere in diffusers -----------------------------------------------------------------------


@pytest.fixture
def styled(pipe: SemanticRoutingPipeline, tmp_path: Path) -> tuple[SemanticRoutingPipeline, Path, Tensor]:
    """A pipeline, the folder of a LoRA whose alpha is twice its rank, and what the two draw."""
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
    when="`fuse_lora()` and `unfuse_lora()` are called without arguments, also of a `torch.compile`d transformer",
    then="the LoRA is in the weights, and out of them again",
)
@pytest.mark.parametrize("compiled", [False, True])
def test_lora_is_fused_and_changed(styled: tuple[SemanticRoutingPipeline, Path, Tensor], compiled: bool) -> None:
    pipe, folder, drawn = styled
    plain = draw(pipe)
    if compiled:
        # The wrapper that torch.compile makes, around nothing that would have to be traced.
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
    when="a LoRA comes as a dictionary, or from a file that does not say its alpha",
    then="the alpha beside its matrices is used; without one it is asked for in one line",
)
def test_lora_by_the_usual_names(styled: tuple[SemanticRoutingPipeline, Path, Tensor]) -> None:
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
        with pytest.raises(ValueError, match="does not say its alpha"):
            pipe.load_lora_weights(source)


def test_lora_calls_that_are_refused(styled: tuple[SemanticRoutingPipeline, Path, Tensor]) -> None:
    pipe, folder, _ = styled
    (folder / "broken.safetensors").write_bytes(b"no")
    for call, message in (
        (lambda: pipe.load_lora_weights(folder, weight_name="x.bin"), "read from .safetensors alone"),
        (lambda: pipe.load_lora_weights(folder, weight_name="broken.safetensors"), "no whole safetensors file"),
        (lambda: pipe.load_lora_weights({"unet.down.lora_A.weight": torch.ones(2, 2)}), "no LoRA of this transformer"),
        (lambda: pipe.load_lora_weights(folder, lora_scale=2), "unknown argument 'lora_scale'"),
        (lambda: pipe.save_lora_weights(folder), "has no LoRA to save"),
        (lambda: pipe.save_lora_weights(folder, safe_serialization=False), "written as .safetensors alone"),
        (lambda: SemanticRoutingPipeline.save_lora_weights(folder), "give transformer_lora_layers"),
        (lambda: draw(pipe, attention_kwargs={"scale": 0.5}), "no LoRA is loaded"),
        (lambda: draw(pipe, attention_kwargs={"ip_adapter": 1}), "takes a LoRA's scale and no more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
