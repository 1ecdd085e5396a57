"""Loading runs and checkpoints as TextToImage, and refusing those that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from semantic_routing.checkpoint.load import EMA, MODEL, STATE, find_checkpoint
from semantic_routing.cli.sample import SampleArguments, sample_to_folder
from semantic_routing.sampling.load import load_bundle, locate_encoder
from semantic_routing.text.config import TINY, TextEncoderConfig

CPU = torch.device("cpu")


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
        sample_to_folder(SampleArguments(model=copy, out=tmp_path / "out", prompt=("a star",), device="cpu"))
    assert not (tmp_path / "out").exists()


def test_weights_of_another_program_are_refused(copy: Path) -> None:
    save_file({"unet.weight": torch.ones(2)}, find_checkpoint(copy) / EMA)
    with pytest.raises(ValueError, match=r"ema\.safetensors belongs to another model"):
        load_bundle(copy, CPU)


def test_a_text_encoder_made_for_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    own, named = TextEncoderConfig(name_or_path=TINY, layers="1..2"), TextEncoderConfig(name_or_path="Qwen/Qwen3-0.6B")
    assert locate_encoder(named, tmp_path) == named
    (tmp_path / "text_encoder").mkdir()
    assert locate_encoder(own, tmp_path) == replace(own, name_or_path=str(tmp_path / "text_encoder"))
