"""From a checkpoint to images: the same image in any batch, folders that resume, input that is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy as copy_of
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from semantic_routing.checkpoint.load import EMA, MODEL, STATE, find_checkpoint
from semantic_routing.cli.sample import SampleArguments, sample_to_folder
from semantic_routing.model.arms import ARMS, PAPER_ARMS
from semantic_routing.model.build import make_model
from semantic_routing.model.codec import PixelCodec
from semantic_routing.model.runtime import rounded_once
from semantic_routing.sampling.folder import weights_sha256
from semantic_routing.sampling.load import load_bundle, locate_encoder
from semantic_routing.sampling.samplers import noise_for
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.text.loading import TINY, TextEncoderConfig
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
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("bf16", [False, True])
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
    with pytest.raises(ValueError, match=f"the routing of arm {arm} has no clock"):
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


def test_prompts_are_encoded_once_per_call_and_the_null_prompt_once(bundles: dict[str, TextToImage]) -> None:
    bundle = replace(bundles["joint"], null_prompt="nothing")
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


# --- loading ---


def test_a_run_is_loaded_with_averaged_or_latest_weights(tiny_run: Path) -> None:
    folder = find_checkpoint(tiny_run)
    for averaged, file in ((True, EMA), (False, MODEL)):
        bundle = load_bundle(tiny_run, CPU, averaged=averaged)
        saved = load_file(folder / file)
        assert all(torch.equal(p, saved[name]) for name, p in bundle.model.named_parameters())
        assert not any(p.requires_grad for p in bundle.model.parameters())
    assert bundle.checkpoint == folder
    assert (bundle.image_size, bundle.null_prompt) == (32, "")
    assert bundle.bf16 is False  # the run was in float32
    earlier = load_bundle(folder.parent / "step-0000004", CPU)
    assert earlier.checkpoint == folder.parent / "step-0000004"


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a run's folder that a test may damage."""
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def edit_state(run: Path, edit: Callable[[dict], object]) -> None:
    path = find_checkpoint(run) / STATE
    state = json.loads(path.read_text())
    edit(state)
    path.write_text(json.dumps(state))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("config"), "was not written by semroute train"),
        (lambda s: s.update(config=3), "was not written by semroute train"),
        (lambda s: s["config"].pop("codec"), "was not written by semroute train"),
        (lambda s: s["config"]["model"].update(widht=3), r"unknown setting 'model\.widht'; did you mean 'width'"),
        (lambda s: s["config"]["model"].update(width=48), r"belongs to another model: .* in the file, .* in the model"),
        (lambda s: s["config"]["model"].update(depth=3), r"blocks\.2\..*: not in the file"),
        (lambda s: s["config"]["text"].update(name_or_path="/nowhere"), "no text encoder at '/nowhere'"),
        (lambda s: s["config"]["text"].update(name_or_path=TINY), "lacks its folder text_encoder"),
        (
            lambda s: s["config"]["text"].update(layers="1"),
            "gives layers 1, width 64, but this transformer reads layers 2, width 64",
        ),
        (lambda s: s["config"].update(image_size=36), "36 x 36 pixels does not divide into .* patches of 8 x 8"),
        (lambda s: s["config"].update(image_size="32"), "'32' x '32' pixels does not divide"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(copy: Path, edit: Callable, message: str) -> None:
    edit_state(copy, edit)
    with pytest.raises(ValueError, match=message):
        load_bundle(copy, CPU)


def test_nothing_is_written_for_a_run_that_does_not_fit(copy: Path, tmp_path: Path) -> None:
    edit_state(copy, lambda s: s["config"]["text"].update(layers="2"))
    with pytest.raises(ValueError, match="gives layers 1"):
        sample_to_folder(arguments(copy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_of_weights_of_several_types_is_that_of_their_file(
    bundles: dict[str, TextToImage], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = copy_of(bundles["joint"].model).to(dtype)
    model.router.double()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert weights_sha256(model) == hashlib.sha256((tmp_path / "weights.safetensors").read_bytes()).hexdigest()


def test_weights_of_another_program_are_refused(copy: Path) -> None:
    save_file({"unet.weight": torch.ones(2)}, find_checkpoint(copy) / EMA)
    with pytest.raises(ValueError, match=r"ema\.safetensors belongs to another model"):
        load_bundle(copy, CPU)


def test_a_text_encoder_made_for_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    own, named = TextEncoderConfig(name_or_path=TINY, layers="1..2"), TextEncoderConfig(name_or_path="Qwen/Qwen3-0.6B")
    assert locate_encoder(named, tmp_path) == named
    (tmp_path / "text_encoder").mkdir()
    assert locate_encoder(own, tmp_path) == replace(own, name_or_path=str(tmp_path / "text_encoder"))


# --- folders of images ---


def arguments(run: Path, out: Path, **changes: object) -> SampleArguments:
    settings = {"prompt": ("a red circle", "a star"), "images_per_prompt": 2, "steps": 2, "guidance": 2.0, "batch": 3}
    return SampleArguments(model=run, out=out, device="cpu", **(settings | changes))


def pixels(out: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))}


def test_a_folder_holds_images_prompts_and_settings(tiny_run: Path, tmp_path: Path) -> None:
    out = sample_to_folder(arguments(tiny_run, tmp_path / "images"))
    found = pixels(out)
    assert list(found) == ["00000_00.png", "00000_01.png", "00001_00.png", "00001_01.png"]
    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert rows[2] == {"file": "00001_00.png", "prompt": "a star", "image": 0}
    assert [row["file"] for row in rows] == list(found)
    names = [(p, i) for p in range(2) for i in range(2)]
    expected = load_bundle(tiny_run, CPU).sample(
        ["a red circle"] * 2 + ["a star"] * 2, names, SampleConfig(steps=2, guidance=2.0)
    )
    for image, there in zip(expected.numpy(), found.values(), strict=True):
        assert np.array_equal(image, there)  # in batches of four here, of three in the folder
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sampler"] == {
        "steps": 2,
        "guidance": 2.0,
        "sampler": "euler",
        "shift": 1.0,
        "clock": "nominal",
        "seed": 0,
        "compile": False,
    }
    assert manifest["checkpoint"] == str(find_checkpoint(tiny_run))


def test_two_processes_sample_the_images_of_one(tiny_run: Path, tmp_path: Path) -> None:
    alone = sample_to_folder(arguments(tiny_run, tmp_path / "alone", images_per_prompt=3))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "semantic_routing", "sample", str(tiny_run), "--out", str(tmp_path / "shared")]
    command += ["--prompt", "a red circle", "a star", "--images-per-prompt", "3", "--steps", "2", "--guidance", "2"]
    command += ["--batch", "2", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "shared")]
    expected, found = pixels(alone), pixels(tmp_path / "shared")
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "shared" / "prompts.jsonl").read_text() == (alone / "prompts.jsonl").read_text()


def test_only_missing_and_damaged_images_are_sampled_again(tiny_run: Path, tmp_path: Path) -> None:
    out = sample_to_folder(arguments(tiny_run, tmp_path / "images", batch=1))
    before = pixels(out)
    (out / "00001_00.png").unlink()
    (out / "00001_01.png").write_bytes((out / "00001_01.png").read_bytes()[:100])
    written = {path: path.stat().st_mtime_ns for path in out.glob("0000*.png")}
    sample_to_folder(arguments(tiny_run, out, batch=1))
    after = pixels(out)
    assert after.keys() == before.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert {path.name for path, time in written.items() if path.stat().st_mtime_ns != time} == {"00001_01.png"}


@pytest.mark.parametrize(
    "change", [{"prompt": ("a red circle",)}, {"seed": 1}, {"steps": 3}, {"guidance": 3.0}, {"sampler": "heun"}]
)
def test_a_folder_of_other_images_is_refused(tiny_run: Path, tmp_path: Path, change: dict) -> None:
    out = sample_to_folder(arguments(tiny_run, tmp_path / "images"))
    before = pixels(out)
    with pytest.raises(ValueError, match=r"holds other images .*choose another --out"):
        sample_to_folder(arguments(tiny_run, out, **change))
    assert pixels(out).keys() == before.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged"), ("[]", "is not a manifest of images"), ('{"a": 1}', "holds other images")],
)
def test_a_folder_with_another_manifest_is_refused(tiny_run: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        sample_to_folder(arguments(tiny_run, tmp_path))
    assert (tmp_path / "manifest.json").read_text() == content


def test_prompts_are_those_of_the_command_line_and_of_a_file(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cross\n\n  a square \n")
    out = sample_to_folder(
        arguments(tiny_run, tmp_path / "out", prompts=tmp_path / "p.txt", prompt=("a star",), images_per_prompt=1)
    )
    rows = [json.loads(line)["prompt"] for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert rows == ["a star", "a cross", "a square"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ()}, 'nothing to sample: give --prompt "a red circle" or --prompts FILE'),
        ({"images_per_prompt": 0}, "images_per_prompt is 0"),
        ({"device": "gpu"}, "unknown device 'gpu'; use auto, cpu or cuda"),
        ({"model": Path("nowhere")}, "no checkpoint at nowhere"),
        ({"prompts": Path("nowhere.txt")}, r"cannot read prompts file nowhere\.txt: No such file"),
    ],
)
def test_bad_requests_write_nothing(tiny_run: Path, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_to_folder(replace(arguments(tiny_run, tmp_path / "out"), **change))
    assert list(tmp_path.iterdir()) == []


COMPILED = """
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

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
    subprocess.run([sys.executable, "-W", "error", "-c", COMPILED, str(tiny_run)], check=True)


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
