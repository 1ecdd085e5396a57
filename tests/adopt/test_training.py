"""Training of adopted pipelines: exact resumption, what changes and what does not, conventions, texts, bad input."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from semantic_routing.adopt import adopt, load_routing
from semantic_routing.adopt.drawing import Drawing
from semantic_routing.adopt.file import read_routing
from semantic_routing.adopt.training.config import AdoptConfig, KeepConfig, LoraSettings
from semantic_routing.adopt.training.keep_texts import decide
from semantic_routing.adopt.training.lora import LORA_FILE
from semantic_routing.adopt.training.make_subject import make_subject
from semantic_routing.adopt.training.open_pipeline import frozen, load_results
from semantic_routing.adopt.training.own_subject import as_bundle, open_adopted
from semantic_routing.adopt.training.run import resume, start
from semantic_routing.adopt.training.subjects import scheduler_shift
from semantic_routing.checkpoint.load import EMA, MODEL, OPTIMIZER, checkpoints, find_checkpoint, read_state
from semantic_routing.common.errors import Interrupted
from semantic_routing.data.dataset import DataConfig
from semantic_routing.interop.export import make_pipeline
from semantic_routing.sampling.samplers import noise_for
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.training.metrics import reproducible
from semantic_routing.training.validation import ValidationConfig
from tests.adopt.test_families import move
from tests.helpers import pipelines as own
from tests.helpers.adoptable_pipelines import pipeline

OTHERS = ("ignore::FutureWarning", "ignore::UserWarning", "ignore:__array")
"""Warnings of diffusers and peft."""
pytestmark = pytest.mark.filterwarnings(*OTHERS)
CPU = torch.device("cpu")
FAMILIES = ("own", "sana", "z-image", "prx")
SIDES = {"own": 16, "sana": 32, "z-image": 8, "prx": 8}
Make = Callable[[str], Any]


@pytest.fixture
def make(make_bundle: own.MakeBundle) -> Make:
    """Function from a family to a new tiny pipeline, always with the same weights."""

    def made(name: str) -> Any:
        torch.manual_seed(5)
        if name == "own":
            return own.quiet(make_pipeline(make_bundle("penultimate")))
        return pipeline(name)

    return made


def config(name: str = "own", **changes: Any) -> AdoptConfig:
    small = {"steps": 4, "batch": 2, "log_every": 1, "checkpoint_every": 2, "precision": "fp32", "device": "cpu"}
    return AdoptConfig(**({"pipeline": name, "image_size": SIDES[name]} | small | changes))


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds, by file and name."""
    return {
        f"{file}:{name}": tensor
        for file in (MODEL, EMA, OPTIMIZER)
        for name, tensor in load_file(checkpoint / file).items()
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    return [reproducible(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stop_at(step: int) -> Callable[[int], None]:
    return lambda finished: os.kill(os.getpid(), signal.SIGTERM) if finished == step else None


class Killed(Exception):
    """The process is gone."""


def killed_at(step: int) -> Callable[[int], None]:
    """End a run after a step without saving, as SIGKILL does."""

    def end(finished: int) -> None:
        if finished == step:
            raise Killed

    return end


@pytest.mark.parametrize("name", ["own", "sana", "z-image"])
def test_a_run_stopped_in_both_phases_and_resumed_is_bitwise_one_that_never_stopped(
    make: Make, tmp_path: Path, name: str
) -> None:
    cfg = config(name, lora=LoraSettings(rank=2, steps=4), arm="joint" if name == "own" else "depth")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    start(cfg, whole, pipe=make(name))
    begin = partial(start, cfg, stopped)
    for step in (1, 4, 6):
        with pytest.raises(Interrupted, match="semroute adopt train --resume"):
            begin(stop_at(step), pipe=make(name))
        assert read_state(find_checkpoint(stopped))["step"] == step
        begin = partial(resume, stopped)
    with pytest.raises(Killed):
        begin(killed_at(7), pipe=make(name))
    begin(pipe=make(name))
    first, second = (tensors(find_checkpoint(run)) for run in (whole, stopped))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert metrics(whole) == metrics(stopped)
    assert len(metrics(whole)) == 8
    for file in ("routing.safetensors", "pytorch_lora_weights.safetensors"):
        a, b = (load_file(run / file) for run in (whole, stopped))  # bytes differ in the order of the header
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_routing_and_then_only_the_lora_changes(make: Make, tmp_path: Path, name: str) -> None:
    pipe, lora = make(name), name != "prx"
    parts = {key: part for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    before = {f"{key}.{k}": x.clone() for key, part in parts.items() for k, x in part.state_dict().items()}
    cfg = config(name, lora=LoraSettings(rank=2 if lora else 0, steps=3), keep=9)
    start(cfg, tmp_path, pipe=pipe)
    found = {
        f"{key}.{k}".replace("base_layer.", ""): x for key, part in parts.items() for k, x in part.state_dict().items()
    }
    assert [k for k, x in before.items() if not torch.equal(found[k], x)] == []
    added = found.keys() - before.keys()
    assert all("semantic_routing" in k or ".lora_" in k for k in added)
    held = {int(c.name[5:]): load_file(c / EMA) for c in checkpoints(tmp_path)}
    routed, last = held[4], held[max(held)]
    numbers = [k for k in routed if k.startswith("router.")]
    assert any(bool((routed[k] != held[2][k]).any()) for k in numbers)
    assert all(torch.equal(routed[k], last[k]) for k in numbers)
    adapters = [k for k in routed if k.startswith("lora.")]
    assert bool(adapters) == lora
    assert all(torch.equal(routed[k], held[2][k]) for k in adapters)
    assert all(bool((last[k] != routed[k]).any()) for k in adapters)
    facts, saved = read_routing(tmp_path)
    assert facts.transformer == type(pipe.transformer).__name__
    assert all(torch.equal(saved[k.removeprefix("router.")], last[k]) for k in numbers)
    assert "load_routing" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "manifest.json").read_text())["seeds"] == {"run": 42}


def test_the_loss_on_held_out_pictures_falls(make: Make, tmp_path: Path) -> None:
    held = ValidationConfig(every=30, samples=8, times=(0.2, 0.6))
    start(config(steps=60, batch=8, validation=held, log_every=60, checkpoint_every=60), tmp_path, pipe=make("own"))
    rows = [row for row in metrics(tmp_path) if "val_loss" in row]
    pipe = frozen(make("own"))
    assert [row["step"] for row in rows] == [30, 60]
    cfg = config(steps=1, batch=8, validation=replace(held, every=1))
    cfg = replace(cfg, optim=replace(cfg.optim, router_lr=0.0))
    start(cfg, tmp_path / "still", pipe=pipe)
    (still,) = metrics(tmp_path / "still")
    assert still["router_moved"] == 0
    assert rows[1]["val_loss"] < still["val_loss"]


@pytest.mark.parametrize("name", FAMILIES)
def test_velocities_are_those_that_the_pipeline_integrates(make: Make, name: str) -> None:
    """Two Euler steps by hand against the pipeline's own call: texts, sign, time and latents."""
    pipe, side = frozen(make(name)), SIDES[name]
    move(adopt(pipe))
    subject = make_subject(pipe, CPU, "fp32")
    subject.image_size = side
    x = noise_for(0, [(0, 0)], subject.latent_shape(side, side))
    off = 0.0 if name == "z-image" else 1.0
    call = {"latents": x, "num_inference_steps": 2, "guidance_scale": off, "height": side, "width": side}
    options = {} if name in ("own", "z-image") else {"use_resolution_binning": False}
    if name == "own":
        pipe.register_to_config(precision="fp32")
    drawn = pipe("two stars", **call, **options, output_type="latent").images
    sigmas = pipe.scheduler.sigmas
    texts = subject.texts(["two stars"])
    with torch.no_grad():
        for now, then in pairwise(sigmas):
            x = x + (now - then) * subject.velocity(x, (1 - now)[None], texts)
    torch.testing.assert_close(x, torch.as_tensor(drawn), rtol=1e-4, atol=1e-4)
    pictures = pipe("two stars", **call, **options, output_type="np").images
    expected = torch.as_tensor(pictures).mul(255)
    assert (subject.codec.decode(x).float() - expected).abs().max() < 1.01
    latents = subject.codec.encode(subject.codec.decode(x))
    assert latents.shape == x.shape


@pytest.mark.parametrize("name", ["own", "sana", "z-image"])
def test_an_image_depends_on_seed_and_indices_alone(make: Make, name: str) -> None:
    subject = make_subject(frozen(make(name)), CPU)
    subject.image_size = SIDES[name]
    cfg = Drawing(steps=2, guidance=3.0)
    both = subject.sample(["two stars", "a cat"], [(0, 1), (4, 0)], cfg)
    one = subject.sample(["a cat"], [(4, 0)], cfg)
    assert (one[0].float() - both[1].float()).abs().max() <= 1
    assert not torch.equal(subject.sample(["a cat"], [(4, 1)], cfg), one)
    assert not torch.equal(subject.sample(["a cat"], [(4, 0)], replace(cfg, seed=1)), one)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, num_train_timesteps=1000
        ),
    ],
)
def test_the_shift_is_that_of_the_scheduler(scheduler: Any) -> None:
    tokens = 1000
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        scheduler.set_timesteps(10)
        plain = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config, flow_shift=1.0)
        plain.set_timesteps(10)
        even, found = plain.sigmas[:-1].double(), scheduler.sigmas[:-1].double()
    else:
        from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

        even = torch.linspace(1, 0.1, 10, dtype=torch.float64)
        scheduler.set_timesteps(sigmas=even.numpy(), mu=calculate_shift(tokens))
        found = scheduler.sigmas[:-1].double()
    shift = scheduler_shift(scheduler.config, tokens)
    torch.testing.assert_close(found, shift * even / (1 + (shift - 1) * even), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["own", "sana", "z-image"])
def test_texts_are_kept_and_the_same_with_and_without(make: Make, tmp_path: Path, name: str) -> None:
    captions = ["three red apples", "two stars", "a cat"]
    pipe = frozen(make(name))
    adopt(pipe)
    calls = []
    pipe.text_encoder.register_forward_hook(lambda *args: calls.append(1))

    def states(texts: Any) -> list[Tensor]:
        return list(texts) if isinstance(texts, list) else [texts.hidden, texts.mask]

    plain = make_subject(pipe, CPU, keep=KeepConfig(keep="0"))
    words = plain.keep(3, captions)
    assert "more than text.keep (0): encoded again in every epoch" in words
    expected = states(plain.texts([*captions, None]))
    for keep in (KeepConfig(), KeepConfig(keep="0", keep_on_disk=str(tmp_path / "texts"))):
        subject = make_subject(pipe, CPU, keep=keep)
        assert "cached in" in subject.keep(3, captions)
        assert all(torch.equal(a, b) for a, b in zip(states(subject.texts([*captions, None])), expected, strict=True))
        calls.clear()
        again = subject.texts([None, captions[2]])
        assert not calls
        if isinstance(again, list):
            assert torch.equal(again[0], expected[3])
            assert torch.equal(again[1], expected[2])
    assert len(list((tmp_path / "texts").rglob("*.safetensors"))) == 4


def test_texts_without_end_are_not_kept() -> None:
    chosen, words = decide(KeepConfig(), None, 2e6)
    assert (chosen.keep, words) == (
        "0",
        "the number of captions is unlimited: each is encoded when it is read, 2 MB per caption",
    )
    assert decide(KeepConfig(), 1000, 36e6)[1].startswith(
        "the states of 1,000 captions take about 36 GB, more than text.keep"
    )
    assert decide(KeepConfig(), 100, 5e6)[1] == "the states of 100 captions take about 500 MB: cached in memory"


@pytest.mark.parametrize("name", ["own", "sana", "z-image"])
def test_the_results_load_into_the_pipeline_and_draw_what_training_drew(make: Make, tmp_path: Path, name: str) -> None:
    pipe = make(name)
    cfg = config(name, lora=LoraSettings(rank=2, steps=3), optim=replace(config().optim, lr=1e-2))
    start(replace(cfg, preview_every=7, preview=Drawing(steps=1, batch=1)), tmp_path, pipe=pipe)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 1
    ema = load_file(find_checkpoint(tmp_path) / EMA)
    trained = dict(pipe.transformer.named_parameters())
    with torch.no_grad():
        for key, x in ema.items():
            own_name = f"semantic_routing.{key.removeprefix('router.')}"
            inner = key.removeprefix("lora.").replace("/", ".") if key.startswith("lora.") else own_name
            trained[inner].copy_(x)
    options = Drawing(steps=2, guidance=2.0)
    first = make_subject(pipe, CPU, "fp32")
    fresh = frozen(make(name))
    second = make_subject(fresh, CPU, "fp32")
    for subject in (first, second):
        subject.image_size = SIDES[name]
    plain = second.sample(["a cat"], [(0, 0)], options)
    load_results(fresh, tmp_path / "routing.safetensors")
    expected, found = (subject.sample(["a cat"], [(0, 0)], options) for subject in (first, second))
    assert (expected.float() - found.float()).abs().max() <= 1
    assert not torch.equal(found, plain)


def test_own_pipelines_open_as_models_that_benchmarks_take(make: Make, tmp_path: Path) -> None:
    """Samplers that prepare the text of several times at once are routed, too."""
    make("own").save_pretrained(tmp_path / "pipeline")
    start(config(arm="joint", pipeline=str(tmp_path / "pipeline")), tmp_path / "run")
    bundle = open_adopted(tmp_path / "pipeline", tmp_path / "run", "cpu")
    pipe = make("own")
    routing = load_routing(pipe, tmp_path / "run")
    other = as_bundle(pipe, CPU)
    cfg = SampleConfig(steps=3, guidance=2.0)
    drawn = [each.sample_latents(["two stars"], [(0, 0)], cfg) for each in (bundle, other)]
    assert torch.equal(*drawn)
    noise = noise_for(0, [(0, 0)], pipe.latent_shape())
    own_call = pipe("two stars", num_inference_steps=3, guidance_scale=2.0, latents=noise, output_type="latent").images
    routing.remove()
    plain = other.sample_latents(["two stars"], [(0, 0)], cfg)
    assert (drawn[0] - own_call).abs().max() < 0.2 * (drawn[0] - plain).abs().max()


BAD: list[tuple[str, Callable[[], dict[str, Any]], str]] = [
    ("own", lambda: {"arm": "reinject"}, "has nothing to train"),
    ("own", lambda: {"arm": "dept"}, "did you mean 'depth'"),
    ("own", lambda: {"arm": "uniform", "weights": "simplex"}, "weights='gate'"),
    ("own", lambda: {"image_size": 18}, "use multiples of 4"),
    ("own", lambda: {"batch": 3, "accumulate": 2}, "make it a multiple of 2"),
    ("own", lambda: {"gradient_checkpointing": True}, "cannot recompute its blocks"),
    ("own", lambda: {"lora": LoraSettings(rank=-1)}, "use rank 0 for none"),
    ("own", lambda: {"data": DataConfig(paths=("nowhere",))}, "nowhere"),
    ("own", lambda: {"validation": ValidationConfig(every=1, paths=("nowhere",))}, "nowhere"),
    ("prx", lambda: {"lora": LoraSettings(rank=2)}, "diffusers loads no LoRA for PRXTransformer2DModel"),
    ("sana", lambda: {"injection": "reinject"}, "its blocks do not update the text"),
    ("lumina2", dict, "of the families semantic-routing, sana, prx, z-image, but this one is of lumina2"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD)
def test_bad_settings_are_one_sentence_and_leave_nothing(
    make: Make, tmp_path: Path, name: str, changes: Callable[[], dict[str, Any]], message: str
) -> None:
    pipe = make(name)

    def attempt() -> None:
        start(config(name if name in SIDES else "own", **changes()), tmp_path / "run", pipe=pipe)

    with pytest.raises(ValueError, match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not hasattr(pipe.transformer, "semantic_routing")


def test_a_finished_run_is_kept_and_another_kind_of_run_is_refused(
    make: Make, tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(config(), tmp_path / "run", pipe=make("own"))
    with pytest.raises(ValueError, match="already holds a run: resume it with `semroute adopt train --resume"):
        start(config(), tmp_path / "run", pipe=make("own"))
    with pytest.raises(ValueError, match="was not written by semroute adopt train"):
        resume(tiny_run, pipe=make("own"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/routing.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="does not belong to a run"):
        start(config(), tmp_path / "other", pipe=make("own"))
    assert (tmp_path / "other/routing.safetensors").read_bytes() == b"mine"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        start(config(), tmp_path / "two", pipe=make("own"))


def test_a_run_goes_on_to_a_later_step_and_notices_other_weights(make: Make, tmp_path: Path) -> None:
    start(config(), tmp_path / "run", pipe=make("own"))
    resume(tmp_path / "run", steps=6, pipe=make("own"))
    start(config(steps=6), tmp_path / "whole", pipe=make("own"))
    a, b = (read_routing(tmp_path / run)[1] for run in ("run", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    other = make("own")
    next(other.transformer.parameters()).data += 1
    with pytest.raises(ValueError, match="the transformer is a different one"):
        resume(tmp_path / "run", steps=7, pipe=other)
    with pytest.raises(ValueError, match="step 3 is already done"):
        resume(tmp_path / "run", steps=3, pipe=make("own"))
    with_lora = config(lora=LoraSettings(rank=1, steps=1), steps=1)
    start(with_lora, tmp_path / "lora", pipe=make("own"))
    with pytest.raises(ValueError, match="--steps is for runs without a LoRA"):
        resume(tmp_path / "lora", steps=9, pipe=make("own"))


def test_compiled_blocks_train_the_same(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not with our own pipelines: the annotations that tests check cannot be compiled.
    cfg = config("z-image", steps=1, lora=LoraSettings(rank=1, steps=1))
    start(cfg, tmp_path / "plain", pipe=make("z-image"))
    compiled = []

    def compile_quickly(block: nn.Module, **options: Any) -> None:
        compiled.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    start(replace(cfg, compile=True), tmp_path / "compiled", pipe=make("z-image"))
    assert len(compiled) > 1
    for file in ("routing.safetensors", LORA_FILE):
        a, b = (load_file(tmp_path / label / file) for label in ("plain", "compiled"))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sana", "z-image"])
def test_recomputed_blocks_train_the_same(make: Make, tmp_path: Path, name: str) -> None:
    for label, recompute in (("plain", False), ("less", True)):
        start(config(name, gradient_checkpointing=recompute, steps=2), tmp_path / label, pipe=make(name))
    a, b = (read_routing(tmp_path / label)[1] for label in ("plain", "less"))
    for key in a:
        torch.testing.assert_close(a[key], b[key])
