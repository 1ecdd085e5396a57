"""Folders of images: resumed, shared among processes, refused for another request."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from semantic_routing.checkpoint.load import find_checkpoint
from semantic_routing.cli.sample import SampleArguments, sample_to_folder
from semantic_routing.sampling.folder import weights_sha256
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.text_to_image import SampleConfig
from tests.helpers.forked import semroute
from tests.helpers.networks import tiny_network

CPU = torch.device("cpu")


def arguments(run: Path, out: Path, **changes: object) -> SampleArguments:
    settings = {"prompt": ("a red circle", "a star"), "images_per_prompt": 2} | changes
    sampling = {field.name: settings.pop(field.name) for field in fields(SampleConfig) if field.name in changes}
    cfg = SampleConfig(**({"steps": 2, "guidance": 2.0, "batch": 3} | sampling))
    return SampleArguments(model=run, out=out, device="cpu", sampling=cfg, **settings)


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
    options = ["--prompt", "a red circle", "a star", "--images-per-prompt", "3", "--steps", "2", "--guidance", "2"]
    options += ["--batch", "2", "--device", "cpu"]
    said = semroute(2, "sample", tiny_run, "--out", tmp_path / "shared", *options)
    assert said == [f"{tmp_path / 'shared'}\n", ""]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_of_weights_of_several_types_is_that_of_their_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_network("joint").to(dtype)
    model.router.double()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert weights_sha256(model) == hashlib.sha256((tmp_path / "weights.safetensors").read_bytes()).hexdigest()
