"""TextToImage: the same image in any batch, clocks, callbacks, precision, compiling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from semantic_routing.model.arms import ARMS, PAPER_ARMS
from semantic_routing.model.build import make_model
from semantic_routing.model.codec import PixelCodec
from semantic_routing.model.runtime import rounded_once
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.samplers import noise_for
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.text.encoder import TextEncoder
from tests.helpers.forked import run
from tests.helpers.networks import move_zeros

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square above a black circle and a white star below a gray circle", "", "a star"]
CFG = SampleConfig(steps=3, guidance=2.5, batch=4)


@pytest.fixture(scope="module")
def bundles(tiny_config: Callable, tiny_encoder: Path) -> dict[str, TextToImage]:
    """For each arm a model in float32 without zero weights, as after training."""
    torch.manual_seed(0)
    encoder = TextEncoder.from_pretrained(tiny_config().text)
    models = {arm: move_zeros(make_model(tiny_config(arm).model), 0.2).requires_grad_(False) for arm in ARMS}
    return {
        arm: TextToImage(model=model, encoder=encoder, codec=PixelCodec(), image_size=32)
        for arm, model in models.items()
    }


def final(bundle: TextToImage, prompts: list[str], images: list[tuple[int, int]], cfg: SampleConfig = CFG) -> Tensor:
    """Sample, and return the latents at the beginning of the last step, which are not rounded to bytes."""
    seen: list[Tensor] = []
    bundle.sample(prompts, images, cfg, lambda i, t, x, v: seen.append(x))
    return seen[-1]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("guidance", "bf16"),
    [
        (1.0, False),
        (2.5, True),
        *(pytest.param(*case, marks=pytest.mark.stress) for case in ((1.0, True), (2.5, False))),
    ],
)
def test_an_image_depends_on_neither_its_batch_nor_other_prompts(
    bundles: dict[str, TextToImage], arm: str, guidance: float, bf16: bool
) -> None:
    bundle, cfg = replace(bundles[arm], bf16=bf16), replace(CFG, guidance=guidance)
    names = [(i, 0) for i in range(len(PROMPTS))]
    together = final(bundle, PROMPTS, names, cfg)
    assert together.std() > 0.1
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(final(bundle, [prompt], [(i, 0)], cfg)[0], together[i])
    assert torch.equal(final(bundle, PROMPTS[::-1], names[::-1], cfg).flip(0), together)


@pytest.mark.parametrize("arm", PAPER_ARMS)
def test_an_image_depends_on_its_prompt_its_name_and_the_seed(bundles: dict[str, TextToImage], arm: str) -> None:
    bundle = bundles[arm]
    first = final(bundle, ["a red circle"], [(0, 0)])
    for prompt, name, cfg in (
        ("a blue square", (0, 0), CFG),
        ("a red circle", (0, 1), CFG),
        ("a red circle", (1, 0), CFG),
        ("a red circle", (0, 0), replace(CFG, seed=1)),
        ("a red circle", (0, 0), replace(CFG, guidance=4.0)),
        ("a red circle", (0, 0), replace(CFG, shift=3.0)),
        ("a red circle", (0, 0), replace(CFG, sampler="heun")),
    ):
        assert (final(bundle, [prompt], [name], cfg) - first).abs().max() > 1e-4


@pytest.mark.parametrize("arm", ["time", "joint"])
def test_a_clock_changes_the_gate_time_and_nothing_else(
    bundles: dict[str, TextToImage], arm: str, tmp_path: Path
) -> None:
    images = [(0, 0)]
    nominal = final(bundles[arm], PROMPTS[:1], images)
    curve = tmp_path / "calibration.json"
    curve.write_text('{"times": [0.5], "effective": [0.5]}')
    assert torch.equal(final(bundles[arm], PROMPTS[:1], images, replace(CFG, clock=str(curve))), nominal)
    curve.write_text('{"times": [0.5], "effective": [0.9]}')
    assert not torch.equal(final(bundles[arm], PROMPTS[:1], images, replace(CFG, clock=str(curve))), nominal)
    assert not torch.equal(final(bundles[arm], PROMPTS[:1], images, replace(CFG, clock="shifted")), nominal)


@pytest.mark.parametrize("arm", ["depth", "joint-state", "fusedit"])
def test_a_clock_for_routing_without_one_is_refused(bundles: dict[str, TextToImage], arm: str) -> None:
    with pytest.raises(ValueError, match=f"the routing of arm {arm} takes no clock"):
        final(bundles[arm], PROMPTS[:1], [(0, 0)], replace(CFG, clock="shifted"))


def test_the_gate_time_of_a_state_aware_arm_depends_on_the_latents(bundles: dict[str, TextToImage]) -> None:
    model = bundles["time-state"].model
    noise, image = torch.randn(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    t = torch.tensor([0.5])
    assert not torch.equal(model.gate_time(noise, t), model.gate_time(image, t))
    assert torch.equal(model.gate_time(noise, t), model.gate_time(noise, torch.tensor([0.9])))
    assert torch.equal(bundles["time"].model.gate_time(noise, t), t)


def test_the_callback_gets_the_trajectory_from_the_noise_on(bundles: dict[str, TextToImage]) -> None:
    seen: list[tuple[int, float, Tensor]] = []
    names = [(3, 1), (0, 2)]
    images = bundles["depth"].sample(PROMPTS[:2], names, CFG, lambda i, t, x, v: seen.append((i, float(t), x)))
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-6)
    assert torch.equal(seen[0][2], noise_for(CFG.seed, names, (3, 32, 32)))
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), torch.uint8)


def test_prompts_are_encoded_once_per_call_and_the_null_prompt_once(
    bundles: dict[str, TextToImage], tiny_config: Callable
) -> None:
    encoder = TextEncoder.from_pretrained(replace(tiny_config().text, keep="0"))
    bundle = replace(bundles["joint"], null_prompt="nothing", encoder=encoder)
    runs: list[nn.Module] = []
    handle = bundle.encoder.model.register_forward_hook(lambda module, *_: runs.append(module))
    for count in (2, 3):
        bundle.sample(["a star"], [(0, 0)], CFG)
        assert len(runs) == count
    handle.remove()


@pytest.mark.parametrize("arm", ["depth", "fusedit"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_bfloat16_text_encoder_works_with_either_precision(
    bundles: dict[str, TextToImage], tiny_config: Callable, arm: str, bf16: bool
) -> None:
    """As in the toy recipe, whose language model is in bfloat16 even if matrix products are not."""
    exact = final(bundles[arm], PROMPTS[:2], [(0, 0), (1, 0)])
    encoder = TextEncoder.from_pretrained(replace(tiny_config().text, dtype="bfloat16"))
    found = final(replace(bundles[arm], encoder=encoder, bf16=bf16), PROMPTS[:2], [(0, 0), (1, 0)])
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().mean() < 0.05


COMPILED = """
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

warnings.simplefilter("error")
counter = CompileCounterWithBackend("aot_eager")
torch.compile = partial(torch.compile, backend=counter)

from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.sampling.load import load_bundle

bundle, eager = (load_bundle(Path(sys.argv[1]), torch.device("cpu"), compiled=c) for c in (True, False))
cfg = SampleConfig(steps=3, guidance=2.0)
graphs = []
for prompt in ("a red circle", "a blue square left of a red star", "a star"):  # one bucket of lengths
    for seed in (0, 1):
        images, (name,) = [(seed, 0), (seed, 1)], [prompt]
        found = bundle.sample_latents([name] * 2, images, cfg)
        torch.testing.assert_close(found, eager.sample_latents([name] * 2, images, cfg), rtol=1e-3, atol=1e-4)
        graphs.append(counter.frame_count)
assert graphs == [3] * 6, graphs  # the network, the text of two prompts, the text of the null prompt
bundle.sample_latents(["a star and " * 12] * 2, images, cfg)
assert counter.frame_count == 5, counter.frame_count  # another bucket: the network, the text of two prompts
"""


def test_one_graph_for_each_length_of_text(tiny_run: Path) -> None:
    """Other prompts and noise compile nothing. Runs in another process, because dynamo cannot trace the type checks."""
    run(COMPILED, tiny_run)


def test_weights_are_rounded_only_while_sampling(tiny_run: Path) -> None:
    """As autocast rounds them: products are bitwise the same, and the exact weights are restored."""
    model = load_bundle(tiny_run, CPU).model
    exact = {name: p.clone() for name, p in model.named_parameters()}
    linear, x = model.blocks[0].mlp.down, torch.randn(9, model.cfg.mlp_width)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = linear(x)
        with rounded_once(model, True):
            assert {m.weight.dtype for m in model.modules() if isinstance(m, nn.Linear)} == {torch.bfloat16}
            assert model.norm_out.weight.dtype == torch.float32
            assert torch.equal(linear(x), expected)
        with rounded_once(model, False):
            assert linear.weight.dtype == torch.float32
    assert all(torch.equal(p, exact[name]) for name, p in model.named_parameters())
