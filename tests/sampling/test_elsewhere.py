"""Unusual users: other programs' option names, missing devices, numbers that are not finite, umasks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semantic_routing.cli.arguments import parse
from semantic_routing.cli.main import main
from semantic_routing.cli.sample import SampleArguments, sample_to_folder
from semantic_routing.common.config import read_config, to_dict
from semantic_routing.common.device import cache_folder, pick_device
from semantic_routing.common.files import as_umask_says, written_whole
from semantic_routing.evaluation.shapes import evaluate_shapes
from semantic_routing.interop.export import ExportArguments, export
from semantic_routing.interop.open import open_model
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.model.codec import NotFiniteError, PixelCodec
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.samplers import noise_for
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start

CPU = torch.device("cpu")


@pytest.mark.behaviour(
    "Sampling", when="an option has the name that it has in another program", then="the error gives its name here"
)
@pytest.mark.parametrize(
    ("command", "typed", "ours"),
    [
        ("sample run", "--cfg", "--guidance"),
        ("sample run", "--guidance-scale", "--guidance"),
        ("sample run", "--num-inference-steps", "--steps"),
        ("sample run", "--output-dir", "--out"),
        ("sample run", "--n", "--images-per-prompt"),
        ("sample run", "--negative", "--negative-prompt"),
        ("sample run", "--batch-size", "--batch"),
        ("sample run", "--resolution", "--height"),
        ("train toy", "--batch-size", "--batch"),
        ("train toy", "--learning-rate", "--optim.lr"),
        ("train toy", "--max-train-steps", "--steps"),
        ("train toy", "--output-dir", "--out"),
        ("train toy", "--resolution", "--image-size"),
        ("train toy", "--guidance-scale", "--preview.guidance"),
        ("evaluate shapes", "--checkpoint", "--model"),
        ("evaluate shapes", "--cfg-scale", "--guidance"),
        ("evaluate shapes", "--output-dir", "--out"),
        ("quickstart", "--num-inference-steps", "--steps"),
        ("quickstart", "--cfg", "--guidance"),
        ("quickstart", "--output", "--out"),
    ],
)
def test_options_of_other_programs_are_corrected(
    command: str, typed: str, ours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), typed, "3"])
    assert capsys.readouterr().err == f"semroute: unknown option {typed}; did you mean {ours}?\n"


@pytest.mark.parametrize("typed", ["--learning-rate", "--mixed-precision", "--ckpt"])
def test_options_without_a_counterpart_are_refused(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "run", typed, "3"])
    assert capsys.readouterr().err == f"semroute: unknown option {typed}; semroute sample --help lists the options\n"


@pytest.mark.behaviour(
    "Surroundings",
    when="a setting is NaN or infinite, on the command line or in a configuration file",
    then="the error names the setting",
)
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["optim.lr", "prompt_dropout", "data.max_aspect", "preview.shift", "watchdog.grace"])
def test_settings_are_finite_numbers(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, name: str, value: str
) -> None:
    with pytest.raises(ValueError, match=name.rpartition(".")[2]):
        parse(TrainConfig, [f"--{name.replace('_', '-')}={value}"], prog="x", default=tiny_config())
    settings = to_dict(tiny_config())
    inner = settings
    for part in name.split(".")[:-1]:
        inner = inner[part]
    inner[name.rpartition(".")[2]] = "HERE"
    (tmp_path / "config.json").write_text(json.dumps(settings).replace('"HERE"', value))
    with pytest.raises(ValueError, match=rf"^{name} is (nan|-?inf); it must be a finite number$"):
        read_config(TrainConfig, tmp_path / "config.json")


@pytest.mark.behaviour(
    "Judges and scores",
    when="a sampled image is NaN or infinite",
    then="the evaluation stops with an error, and nothing is scored",
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pictures_that_are_not_finite_are_not_scored(tiny_run: Path, tmp_path: Path, value: float) -> None:
    bundle = load_bundle(tiny_run, CPU)
    bundle.model.proj_out.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"the picture of .* is not finite from step 1 of 1 on"):
        evaluate_shapes(bundle, tmp_path / "out", n=11, seed=0, cfg=SampleConfig(steps=1))
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("summary.json")]


@pytest.mark.behaviour(
    "Training",
    when="a preview is NaN or infinite",
    then="a line names prompt and step, no image is written, and the run continues",
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_previews_that_are_not_finite_do_not_stop_a_run(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    decode = PixelCodec.decode
    monkeypatch.setattr(PixelCodec, "decode", lambda self, latents: decode(self, torch.full_like(latents, value)))
    start(tiny_config(steps=2, preview_every=1), tmp_path / "run")
    err = capsys.readouterr().err
    for step in (1, 2):
        assert f"semroute: no samples of step {step}: the picture of " in err
    assert "is not finite when its latents are decoded" in err
    assert not list((tmp_path / "run").rglob("samples/*.png"))
    assert list((tmp_path / "run").rglob("ema.safetensors"))


@pytest.mark.behaviour(
    "Sampling",
    when="a run and the pipeline exported from it sample the same prompt",
    then="semroute sample and the pipeline's own call give the same pixels",
)
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (3.0, None), (3.0, "a circle")])
def test_a_pipeline_samples_the_images_of_its_run(
    tiny_run: Path, tmp_path: Path, guidance: float, negative: str | None
) -> None:
    export(ExportArguments(model=tiny_run, out=tmp_path / "pipe"))
    asked = SampleArguments(model=tiny_run, out=tmp_path / "run", prompt=("a star",), negative_prompt=negative,
                            sampling=SampleConfig(steps=2, guidance=guidance), device="cpu")  # fmt: skip
    drawn = [sample_to_folder(replace(asked, model=model, out=tmp_path / out), open_model) / "00000_00.png"
             for model, out in ((tiny_run, "run"), (tmp_path / "pipe", "pipe-images"))]  # fmt: skip
    pipe = SemanticRoutingPipeline.from_pretrained(str(tmp_path / "pipe"))
    noise = noise_for(0, [(0, 0)], pipe.latent_shape())
    own = pipe("a star", negative_prompt=negative, num_inference_steps=2, guidance_scale=guidance, latents=noise)
    first, second = (np.asarray(Image.open(path)) for path in drawn)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, np.asarray(own.images[0]))


@pytest.mark.behaviour("Surroundings", when="--device names a device that does not exist", then="one line says so")
@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cuda:9", "cpu:1", "nonsense"])
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="device"):
        pick_device(name)


@pytest.mark.behaviour(
    "Sampling", when="a setting of sampling is NaN, infinite or overflows", then="it is refused before sampling"
)
@pytest.mark.parametrize("wrong", [{"guidance": float("nan")}, {"guidance": 1e38}, {"shift": float("inf")},
                                   {"shift": float("nan")}])  # fmt: skip
def test_settings_of_sampling_are_finite(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        SampleConfig(**wrong)


@pytest.mark.behaviour(
    "Sampling",
    when="an image is NaN or infinite",
    then="the error names prompt and step, and no file is written",
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_picture_that_is_not_finite_is_an_error(tiny_run: Path, value: float) -> None:
    with pytest.raises(NotFiniteError):
        PixelCodec().decode(torch.full((1, 3, 2, 2), value))
    bundle = load_bundle(tiny_run, CPU)
    bundle.model.proj_out.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"the picture of 'a star' is not finite from step 1 of 2 on"):
        bundle.sample(["a star"], [(0, 0)], SampleConfig(steps=2))


@pytest.mark.behaviour(
    "Sampling",
    when="--height, --width or --negative-prompt is given",
    then="images have that size or avoid that prompt, and the manifest records it",
)
def test_size_and_negative_prompt_are_part_of_the_request(tiny_run: Path, tmp_path: Path) -> None:
    asked = SampleArguments(model=tiny_run, out=tmp_path / "a", prompt=("a star",), device="cpu", height=16,
                            sampling=SampleConfig(steps=1))  # fmt: skip
    sample_to_folder(asked)
    assert np.asarray(Image.open(tmp_path / "a" / "00000_00.png")).shape == (16, 32, 3)
    with pytest.raises(ValueError, match="holds other images"):
        sample_to_folder(replace(asked, height=None))
    with pytest.raises(ValueError, match="holds other images"):
        sample_to_folder(replace(asked, negative_prompt="a circle"))
    with pytest.raises(ValueError, match="use multiples of 8"):
        sample_to_folder(replace(asked, width=12))


@pytest.mark.behaviour(
    "Surroundings", when="weights and other files are written", then="their permissions follow the umask"
)
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_follow_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with written_whole(tmp_path / "file") as scratch:
            scratch.touch(0o600)
        (tmp_path / "other").touch(0o400)
        as_umask_says(tmp_path / "other", [tmp_path / "other"])
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "other")] == [mode, mode]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.behaviour("Surroundings", when="the user has no home folder", then="one line asks for SEMROUTE_CACHE")
def test_without_a_home_folder_the_cache_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("SEMROUTE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(ValueError, match="set SEMROUTE_CACHE"):
        cache_folder()
