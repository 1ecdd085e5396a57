"""Files of version 0.1, some of which are in ``tests/v0_1``, still load although modules and names have changed.

Written at commit 8558117 by a run of four steps, `semroute export` and `semroute sample RUN --prompt "a red circle"
--steps 3 --guidance 3 --sampler ancestral`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semantic_routing.checkpoint.load import find_checkpoint, read_state
from semantic_routing.cli.main import main
from semantic_routing.common.config import read_config
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.samplers import noise_for
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.training.config import TrainConfig

OLD = Path(__file__).with_name("v0_1")
pytestmark = pytest.mark.filterwarnings("ignore:the sampler .ancestral. is now called renoise:FutureWarning")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def assert_alike(found: Path | Image.Image) -> None:
    """Compare a picture with the old one; machines may round to neighbouring levels."""
    image = found if isinstance(found, Image.Image) else Image.open(found)
    expected = np.asarray(Image.open(OLD / "sample.png")).astype(int)
    np.testing.assert_allclose(np.asarray(image.convert("RGB")).astype(int), expected, atol=1)


def test_a_run_samples_the_same_picture(old: Path, tmp_path: Path) -> None:
    asked = ["--prompt", "a red circle", "--steps", "3", "--guidance", "3", "--device", "cpu"]
    main(["sample", str(old / "run"), *asked, "--sampler", "renoise", "--out", str(tmp_path / "out")])
    assert_alike(tmp_path / "out" / "00000_00.png")


def test_a_folder_of_images_is_resumed(old: Path, tmp_path: Path) -> None:
    """Its manifest has the sampler's old name."""
    out = tmp_path / "images"
    out.mkdir()
    shutil.copy(OLD / "images-manifest.json", out / "manifest.json")
    asked = ["--prompt", "a red circle", "--steps", "3", "--guidance", "3", "--sampler", "ancestral"]
    main(["sample", str(old / "run"), *asked, "--device", "cpu", "--out", str(out)])
    assert_alike(out / "00000_00.png")


def test_a_run_is_resumed_from_its_checkpoint(old: Path) -> None:
    state = json.loads((old / "run" / "config.json").read_text())
    assert state["preview"]["sampler"] == "ancestral"
    main(["train", "--resume", str(old / "run"), "--steps", "6"])
    assert read_state(find_checkpoint(old / "run"))["step"] == 6


def test_a_configuration_is_read(old: Path) -> None:
    cfg = read_config(TrainConfig, old / "run" / "config.json")
    assert (cfg.model.arm, cfg.steps, cfg.preview.sampler) == ("depth", 4, "renoise")


def test_a_run_is_analysed_and_exported(old: Path, tmp_path: Path) -> None:
    main(["analyze", str(old / "run"), "--out", str(tmp_path / "figures")])
    assert (tmp_path / "figures" / "heatmap.csv").is_file()
    main(["export", str(old / "run"), "--out", str(tmp_path / "pipeline")])
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


@pytest.mark.filterwarnings("ignore:__array")  # diffusers reads tensors with an old numpy call
def test_a_pipeline_samples_the_pixels_of_its_run(old: Path) -> None:
    from semantic_routing.interop.pipeline import SemanticRoutingPipeline

    index = json.loads((old / "pipeline" / "model_index.json").read_text())
    assert index["transformer"][0] == "semantic_routing.transformer"
    pipe = SemanticRoutingPipeline.from_pretrained(old / "pipeline")
    noise = noise_for(0, [(0, 0)], pipe.latent_shape())
    found = pipe(["a red circle"], num_inference_steps=3, guidance_scale=3.0, latents=noise).images[0]
    run = load_bundle(old / "run", torch.device("cpu"))
    expected = run.sample(["a red circle"], [(0, 0)], SampleConfig(steps=3, guidance=3.0))[0].numpy()
    assert expected.std() > 10
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_an_analysis_reads_a_pipeline(old: Path, tmp_path: Path) -> None:
    main(["analyze", str(old / "pipeline"), "--out", str(tmp_path)])
    assert (tmp_path / "heatmap.csv").is_file()
