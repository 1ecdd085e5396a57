"""``semroute export``: a diffusers pipeline that samples the pixels of its run in another process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import semantic_routing
from semantic_routing.checkpoint.load import EMA, MODEL, find_checkpoint
from semantic_routing.cli.main import main
from semantic_routing.interop.export import ExportArguments, export, model_card
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.sampling.load import load_bundle
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start
from tests.helpers.forked import run

FRESH = """
import sys
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.sampling.samplers import noise_for

folder, out, *prompts = sys.argv[1:]
pipe = SemanticRoutingPipeline.from_pretrained(folder)
names = [(i, 0) for i in range(len(prompts))]
noise = noise_for(5, names, pipe.latent_shape())
images = pipe(prompts, num_inference_steps=6, guidance_scale=2.5, latents=noise).images
for (p, i), image in zip(names, images, strict=True):
    image.save(f"{out}/{p:05d}_{i:02d}.png")
"""
PROMPTS = ["a red square above a white circle", "a blue star"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("arm", ["depth", "time", "fusedit"])
def test_an_exported_pipeline_samples_the_pixels_of_its_run(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, arm: str
) -> None:
    start(tiny_config(arm), tmp_path / "run")
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "pipe")])
    prompts = ["--prompt", *PROMPTS]
    settings = ["--steps", "6", "--guidance", "2.5", "--seed", "5", "--out", str(tmp_path / "sampled")]
    main(["sample", str(tmp_path / "run"), *prompts, *settings])
    (tmp_path / "drawn").mkdir()
    run(FRESH, tmp_path / "pipe", tmp_path / "drawn", *PROMPTS)
    for name in ("00000_00.png", "00001_00.png"):
        expected = pixels(tmp_path / "sampled" / name)
        assert expected.std() > 10
        assert np.array_equal(pixels(tmp_path / "drawn" / name), expected)


def test_diffusers_alone_opens_the_folder(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This program must be installed, but need not be imported."""
    export(ExportArguments(model=tiny_run, out=tmp_path / "pipe"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    folder, again = str(tmp_path / "pipe"), str(tmp_path / "again")
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    assert type(pipe) is SemanticRoutingPipeline
    pipe.save_pretrained(again)
    for place in (folder, again):
        assert type(DiffusionPipeline.from_pretrained(place, trust_remote_code=True)) is SemanticRoutingPipeline


@pytest.mark.behaviour(
    "diffusers",
    when="a pipeline was exported before its files named the package and the transformer's config held its facts",
    then="it loads and samples the same images",
)
def test_files_name_the_package_and_old_ones_load(tiny_run: Path, tmp_path: Path) -> None:
    folder = export(ExportArguments(model=tiny_run, out=tmp_path / "pipe"))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "SemanticRoutingPipeline"]
    assert index["transformer"] == ["semantic_routing", "SemanticRoutingTransformer"]
    latents = torch.randn(1, 3, 32, 32)
    options = {"num_inference_steps": 2, "latents": latents, "output_type": "latent"}
    expected = SemanticRoutingPipeline.from_pretrained(str(folder))("a star", **options).images

    index |= {"_class_name": "SemanticRoutingPipeline"}
    index |= {"transformer": ["semantic_routing.interop.transformer", "SemanticRoutingTransformer"]}
    del index["text"]["keys_and_values"]
    (folder / "model_index.json").write_text(json.dumps(index))
    sizes = json.loads((folder / "transformer" / "config.json").read_text())
    assert sizes.pop("facts")["image_size"] == 32
    (folder / "transformer" / "config.json").write_text(json.dumps(sizes))
    old = SemanticRoutingPipeline.from_pretrained(str(folder))
    assert torch.equal(old("a star", **options).images, expected)
    assert torch.equal(SemanticRoutingPipeline(**old.components)("a star", **options).images, expected)


def test_the_package_imports_the_pipeline_on_access() -> None:
    assert semantic_routing.SemanticRoutingPipeline is SemanticRoutingPipeline
    assert semantic_routing.SemanticRoutingTransformer.__module__ == "semantic_routing"
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        _ = semantic_routing.Pipeline


@pytest.mark.parametrize(("averaged", "file"), [(True, EMA), (False, MODEL)])
def test_exported_weights_are_averaged_unless_turned_off(
    tiny_run: Path, tmp_path: Path, averaged: bool, file: str
) -> None:
    export(ExportArguments(model=tiny_run, out=tmp_path / "pipe", averaged=averaged))
    written = load_file(tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = load_file(find_checkpoint(tiny_run) / file)
    assert written.keys() == {f"backbone.{name}" for name in expected}
    assert all(torch.equal(written[f"backbone.{name}"], x) for name, x in expected.items())


def test_the_card_names_sizes_and_training(tiny_run: Path, tmp_path: Path) -> None:
    export(ExportArguments(model=tiny_run, out=tmp_path / "pipe"))
    card = (tmp_path / "pipe" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    pipe = SemanticRoutingPipeline.from_pretrained(str(tmp_path / "pipe"))
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    for fact in ("arm depth", f"{parameters:,} parameters: 2 blocks", "32 x 32 pixels", "- steps: 8", "- batch: 4"):
        assert fact in card
    assert "2 layers of width 64" in card
    assert str(tmp_path) not in card
    loading = next(line for line in card.splitlines() if "from_pretrained" in line)
    assert loading.startswith("pipe = SemanticRoutingPipeline.from_pretrained(")


def test_the_card_of_a_model_that_has_learned_guidance_asks_for_none(tiny_run: Path) -> None:
    bundle = load_bundle(tiny_run, torch.device("cpu"))
    assert "guidance_scale=6.0" in model_card(bundle, averaged=True)
    learned = replace(bundle, config=bundle.config | {"distill": {"teacher": "runs/teacher", "guidance": 3.0}})
    assert "guidance_scale=1.0" in model_card(learned, averaged=True)


def test_a_checkpoint_without_its_run_is_exported(tiny_run: Path, tmp_path: Path) -> None:
    """There is no manifest, so the card holds only facts of the checkpoint."""
    shutil.copytree(find_checkpoint(tiny_run), tmp_path / "some" / "checkpoint")
    export(ExportArguments(model=tmp_path / "some" / "checkpoint", out=tmp_path / "pipe"))
    card = (tmp_path / "pipe" / "README.md").read_text()
    assert "- steps: 8" in card
    assert "- hardware" not in card


def test_nothing_is_overwritten(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(tiny_run), "--out", str(tmp_path)])
    assert "exists already; choose another --out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no checkpoint at"):
        export(ExportArguments(model=tmp_path / "nowhere", out=tmp_path / "pipe"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_diffusers_an_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match="2"):
        main(["export", "runs/x", "--out", "pipelines/x"])
    assert 'pip install "semantic-routing[diffusers]"' in capsys.readouterr().err


def test_training_and_conversion_do_not_import_diffusers() -> None:
    code = (
        "import sys, semantic_routing.training.loop, semantic_routing.interop.upstream\n"
        "sys.exit('diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
