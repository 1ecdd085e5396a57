"""What people bring along: other programs' words, devices that are not here, numbers that are none, open umasks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semantic_routing.arguments import parse
from semantic_routing.checkpoint import written_whole
from semantic_routing.codec import NotFiniteError, PixelCodec
from semantic_routing.device import cache_folder, pick_device
from semantic_routing.generate import SampleArguments, SampleConfig, load_bundle, sample_to_folder
from semantic_routing.storage import as_umask_says

CPU = torch.device("cpu")


@pytest.mark.behaviour(
    "Sampling", when="an option has the name that another program gives it", then="the error names ours"
)
@pytest.mark.parametrize(
    ("typed", "ours"),
    [("--cfg", "--guidance"), ("--num-inference-steps", "--steps"), ("--output-dir", "--out"),
     ("--n", "--images-per-prompt"), ("--neg", "--negative-prompt"), ("--batch-size", "--batch")],
)  # fmt: skip
def test_words_of_other_programs(typed: str, ours: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean {ours}\?"):
        parse(SampleArguments, ["run", typed, "3"], prog="x")


@pytest.mark.behaviour("Surroundings", when="--device names one that torch lacks here", then="is refused in one line")
@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cuda:9", "cpu:1", "nonsense"])
def test_devices_that_are_not_here(name: str) -> None:
    with pytest.raises(ValueError, match="device"):
        pick_device(name)


@pytest.mark.behaviour(
    "Sampling", when="a setting of sampling is NaN, infinite or overflows", then="is refused at once"
)
@pytest.mark.parametrize("wrong", [{"guidance": float("nan")}, {"guidance": 1e38}, {"shift": float("inf")},
                                   {"shift": float("nan")}])  # fmt: skip
def test_settings_that_are_no_numbers(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        SampleConfig(**wrong)


@pytest.mark.behaviour(
    "Sampling",
    when="a picture comes out NaN or infinite",
    then="the error names prompt and step, and no file is written",
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_picture_that_is_not_finite(tiny_run: Path, value: float) -> None:
    with pytest.raises(NotFiniteError):
        PixelCodec().decode(torch.full((1, 3, 2, 2), value))
    bundle = load_bundle(tiny_run, CPU)
    bundle.model.proj_out.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"the picture of 'a star' is not finite from step 1 of 2 on"):
        bundle.sample(["a star"], [(0, 0)], SampleConfig(steps=2))


@pytest.mark.behaviour(
    "Sampling", when="--height, --width or --negative-prompt is given", then="is drawn so, and the manifest tells it"
)
def test_size_and_negative_prompt(tiny_run: Path, tmp_path: Path) -> None:
    asked = SampleArguments(model=tiny_run, out=tmp_path / "a", prompt=("a star",), steps=1, device="cpu", height=16)
    sample_to_folder(asked)
    assert np.asarray(Image.open(tmp_path / "a" / "00000_00.png")).shape == (16, 32, 3)
    with pytest.raises(ValueError, match="holds other images"):
        sample_to_folder(replace(asked, height=None))
    with pytest.raises(ValueError, match="holds other images"):
        sample_to_folder(replace(asked, negative_prompt="a circle"))
    with pytest.raises(ValueError, match="use multiples of 8"):
        sample_to_folder(replace(asked, width=12))


@pytest.mark.behaviour(
    "Surroundings", when="weights and other files are written", then="the umask decides who reads them"
)
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides(tmp_path: Path, mask: int, mode: int) -> None:
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
def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SEMROUTE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(ValueError, match="set SEMROUTE_CACHE"):
        cache_folder()
