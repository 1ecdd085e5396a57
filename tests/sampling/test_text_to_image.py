"""From a checkpoint to images: the same image in any company, folders that resume, input that is refused."""

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
from typing import Any

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
from semantic_routing.text.config import TINY, TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square above a black circle and a white star below a gray circle", "", "a star"]
CFG = SampleConfig(steps=3, guidance=2.5, batch=4)


@pytest.fixture(scope="module")
def bundles(tiny_config: Callable, tiny_encoder: Path) -> dict[str, TextToImage]:
    """For each arm a model in float32 whose zero-initialised weights have been moved, as by training."""
    torch.manual_seed(0)
    encoder = TextEncoder.from_pretrained(tiny_config().text)
    found = {}
    for arm in ARMS:
        model = make_model(tiny_config(arm).model).requires_grad_(False)
        for p in model.parameters():
            if p.eq(0).all():
                nn.init.normal_(p, std=0.2)
        found[arm] = TextToImage(model=model, encoder=encoder, codec=PixelCodec(), image_size=32)
    return found


def final(bundle: TextToImage, prompts: list[str], images: list[tuple[int, int]], cfg: SampleConfig = CFG) -> Tensor:
    """What enters the sampler's last step, in float32: not rounded, as images are."""
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
def test_a_clock_changes_what_the_gate_is_told_and_nothing_else(
    bundles: dict[str, TextToImage], arm: str, tmp_path: Path
) -> None:
    images = [(0, 0)]
    nominal = final(bundles[arm], PROMPTS[:1], images)
    told = tmp_path / "calibration.json"
    told.write_text('{"times": [0.5], "effective": [0.5]}')
    assert torch.equal(final(bundles[arm], PROMPTS[:1], images, replace(CFG, clock=str(told))), nominal)
    told.write_text('{"times": [0.5], "effective": [0.9]}')
    assert not torch.equal(final(bundles[arm], PROMPTS[:1], images, replace(CFG, clock=str(told))), nominal)
    assert not torch.equal(final(bundles[arm], PROMPTS[:1], images, replace(CFG, clock="shifted")), nominal)


@pytest.mark.parametrize("arm", ["depth", "joint-state", "fusedit"])
def test_a_clock_for_routing_that_goes_by_no_given_time_is_refused(bundles: dict[str, TextToImage], arm: str) -> None:
    with pytest.raises(ValueError, match=f"the routing of arm {arm} goes by no given time"):
        final(bundles[arm], PROMPTS[:1], [(0, 0)], replace(CFG, clock="shifted"))


def test_a_state_aware_gate_is_told_what_the_latent_shows(bundles: dict[str, TextToImage]) -> None:
    model = bundles["time-state"].model
    noise, image = torch.randn(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    t = torch.tensor([0.5])
    assert not torch.equal(model.gate_time(noise, t), model.gate_time(image, t))
    assert torch.equal(model.gate_time(noise, t), model.gate_time(noise, torch.tensor([0.9])))
    assert torch.equal(bundles["time"].model.gate_time(noise, t), t)


def test_the_callback_sees_the_trajectory_from_the_noise_on(bundles: dict[str, TextToImage]) -> None:
    seen: list[tuple[int, float, Tensor]] = []
    names = [(3, 1), (0, 2)]
    images = bundles["depth"].sample(PROMPTS[:2], names, CFG, lambda i, t, x, v: seen.append((i, float(t), x)))
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-6)
    assert torch.equal(seen[0][2], noise_for(CFG.seed, names, (3, 32, 32)))
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), torch.uint8)


def test_the_text_is_read_once_for_all_steps(bundles: dict[str, TextToImage], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder,
        "encode",
        lambda self, prompts, **options: calls.append(prompts) or encode(self, prompts, **options),
    )
    replace(bundles["joint"], null_prompt="nothing").sample(["a star"], [(0, 0)], CFG)
    assert calls == [["a star"], ["nothing"]]


@pytest.mark.parametrize("arm", ["depth", "fusedit"])
@pytest.mark.parametrize("bf16", [False, True])
def test_states_in_bfloat16_serve_a_model_of_either_precision(
    bundles: dict[str, TextToImage], tiny_config: Callable, arm: str, bf16: bool
) -> None:
    """As in the toy recipe, whose language model is in bfloat16 also where products are not."""
    exact = final(bundles[arm], PROMPTS[:2], [(0, 0), (1, 0)])
    encoder = TextEncoder.from_pretrained(replace(tiny_config().text, dtype="bfloat16"))
    found = final(replace(bundles[arm], encoder=encoder, bf16=bf16), PROMPTS[:2], [(0, 0), (1, 0)])
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().mean() < 0.05


# --- loading ---


def test_a_run_gives_its_averaged_or_its_last_weights(tiny_run: Path) -> None:
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
    """A run's folder to be spoilt."""
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
def test_a_checkpoint_that_does_not_fit_its_configuration(copy: Path, edit: Callable, message: str) -> None:
    edit_state(copy, edit)
    with pytest.raises(ValueError, match=message):
        load_bundle(copy, CPU)


def test_nothing_is_written_for_a_run_that_does_not_fit(copy: Path, tmp_path: Path) -> None:
    edit_state(copy, lambda s: s["config"]["text"].update(layers="2"))
    with pytest.raises(ValueError, match="gives layers 1"):
        sample_to_folder(arguments(copy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hash_of_weights_of_several_types(bundles: dict[str, TextToImage], tmp_path: Path, dtype: torch.dtype) -> None:
    """Equal to that of the file that holds them."""
    model = copy_of(bundles["joint"].model).to(dtype)
    model.router.double()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert weights_sha256(model) == hashlib.sha256((tmp_path / "weights.safetensors").read_bytes()).hexdigest()


def test_foreign_weights(copy: Path) -> None:
    save_file({"unet.weight": torch.ones(2)}, find_checkpoint(copy) / EMA)
    with pytest.raises(ValueError, match=r"ema\.safetensors belongs to another model"):
        load_bundle(copy, CPU)


def test_a_runs_own_encoder_is_found_in_its_folder(tmp_path: Path) -> None:
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


def test_a_folder_holds_images_their_prompts_and_how_they_were_made(tiny_run: Path, tmp_path: Path) -> None:
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
        assert np.array_equal(image, there)  # in batches of four here, of three there
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


def test_two_processes_sample_what_one_does(tiny_run: Path, tmp_path: Path) -> None:
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


def test_only_what_is_missing_is_sampled_again(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = sample_to_folder(arguments(tiny_run, tmp_path / "images", batch=1))
    before = pixels(out)
    untouched = {path: path.stat().st_mtime_ns for path in out.glob("*.png") if path.name != "00001_00.png"}
    (out / "00001_00.png").unlink()
    asked: list[tuple[int, int]] = []
    sample = TextToImage.sample
    monkeypatch.setattr(
        TextToImage,
        "sample",
        lambda self, prompts, images, *rest: asked.extend(images) or sample(self, prompts, images, *rest),
    )
    sample_to_folder(arguments(tiny_run, out, batch=1))
    assert asked == [(1, 0)]
    after = pixels(out)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched


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
    [("{", "is damaged"), ("[]", "is no manifest of images"), ('{"a": 1}', "holds other images")],
)
def test_a_folder_with_another_manifest_is_refused(tiny_run: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        sample_to_folder(arguments(tiny_run, tmp_path))
    assert (tmp_path / "manifest.json").read_text() == content


def test_prompts_come_from_the_command_line_and_a_file(tiny_run: Path, tmp_path: Path) -> None:
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
        ({"prompts": Path("nowhere.txt")}, r"there is no prompts file nowhere\.txt"),
    ],
)
def test_bad_requests_leave_nothing(tiny_run: Path, tmp_path: Path, change: dict, message: str) -> None:
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
    """Nothing is compiled again for other prompts or noise; without the checks of annotations, which dynamo cannot
    trace."""
    subprocess.run([sys.executable, "-W", "error", "-c", COMPILED, str(tiny_run)], check=True)


def test_weights_are_rounded_while_sampling_only(tiny_run: Path) -> None:
    """As autocast rounds them: bitwise the same products, and the exact weights afterwards."""
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


def test_the_null_prompt_is_read_once(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(tiny_run, CPU)
    asked: list[Any] = []
    encode = bundle.encoder.encode
    monkeypatch.setattr(bundle.encoder, "encode", lambda texts, **how: asked.append(texts) or encode(texts, **how))
    for _ in range(2):
        bundle.sample(["a star"], [(0, 0)], SampleConfig(steps=1, guidance=2.0))
    assert asked.count([""]) == 1
