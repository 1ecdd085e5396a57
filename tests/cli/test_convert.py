"""``semroute convert``: a reference checkpoint becomes a run for every command, and a run becomes a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from semantic_routing.checkpoint.load import EMA, MODEL, find_checkpoint
from semantic_routing.cli.convert import OursArguments, UpstreamArguments, convert_ours, convert_upstream
from semantic_routing.cli.main import main
from semantic_routing.interop.upstream import to_upstream, upstream_config
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import Backbone, DiTConfig
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start

CPU = torch.device("cpu")


def network(arm: str, **changes: Any) -> Backbone:
    """Make a random network for the tiny text encoder and pixels."""
    sizes = {"depth": 2, "width": 24, "heads": 2, "kv_heads": 1, "head_dim": 32, "mlp_width": 40, "channels": 3}
    text = {"text_width": 64, "text_layers": 2, "fusedit_first_layer": 0}
    model = make_model(DiTConfig(**({"arm": arm} | sizes | text | changes)))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture
def reference(tmp_path: Path) -> Callable[..., Backbone]:
    """Function that writes a random network as ``weights.safetensors`` and ``config.json`` and returns it."""

    def write(arm: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Backbone:
        model = network(arm, **changes).to(dtype)
        save_file(to_upstream(model), tmp_path / "weights.safetensors")
        config = upstream_config(model) | ({"text_rope_theta": 1e4} if arm == "fusedit" else {})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model

    return write


def command(folder: Path, encoder: Path, arm: str, *more: str) -> list[str]:
    paths = [str(folder / "weights.safetensors"), "--config", str(folder / "config.json"), "--out", str(folder / "run")]
    local = ["--text.name-or-path", str(encoder), "--codec.kind", "pixels", "--image-size", "16"]
    return ["convert", "upstream", *paths, "--arm", arm, *local, *more]


def test_a_run_of_s2_becomes_a_finer_one_and_comes_back(tiny_run: Path, tmp_path: Path) -> None:
    prompts, cfg = ["a star", "a red circle"], SampleConfig(steps=2, guidance=2.0)
    main(["convert", "arm", str(tiny_run), "--arm", "depth-heads-kv", "--out", str(tmp_path / "finer")])
    main(["convert", "arm", str(tmp_path / "finer"), "--arm", "S2", "--out", str(tmp_path / "back")])
    finer, own = load_bundle(tmp_path / "finer", CPU), load_bundle(tiny_run, CPU)
    assert finer.model.cfg.arm == "depth-heads-kv"
    assert (finer.sample(prompts, cfg=cfg).int() - own.sample(prompts, cfg=cfg).int()).abs().max() <= 1
    back = find_checkpoint(tmp_path / "back")
    for name in (EMA, MODEL):
        one, other = load_file(back / name), load_file(find_checkpoint(tiny_run) / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    facts = json.loads((tmp_path / "finer" / "manifest.json").read_text())
    assert facts["arms"] == ["depth", "depth-heads-kv"]


def test_a_finer_run_whose_parts_differ_stays_what_it_is(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tiny_config("depth-kv"), tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        main(["convert", "arm", str(tmp_path / "run"), "--arm", "depth", "--out", str(tmp_path / "other")])
    assert end.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not a case of arm 'depth': the weights of keys and values of a block differ by up to" in line
    assert not (tmp_path / "other" / "checkpoints").exists()
    main(["convert", "arm", str(tmp_path / "run"), "--arm", "depth-heads-kv", "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit):
        main(["convert", "arm", str(tmp_path / "run"), "--arm", "depth-heads-kv", "--out", str(tmp_path / "other")])
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("arm", ["uniform", "depth", "joint", "fusedit"])
def test_there_and_back(reference: Callable[..., Backbone], tiny_encoder: Path, tmp_path: Path, arm: str) -> None:
    model = reference(arm)
    main(command(tmp_path, tiny_encoder, arm))
    bundle = load_bundle(tmp_path / "run", CPU)
    assert bundle.model.cfg.arm == arm
    for name, x in bundle.model.state_dict().items():
        torch.testing.assert_close(x, model.state_dict()[name], atol=1e-6, rtol=1e-6)
    images = bundle.sample(["a star"], [(0, 0)], SampleConfig(steps=2, guidance=2.0))
    assert images.shape == (1, 16, 16, 3)

    main(["convert", "ours", str(tmp_path / "run"), "--out", str(tmp_path / "back.safetensors")])
    back, there = load_file(tmp_path / "back.safetensors"), load_file(tmp_path / "weights.safetensors")
    assert back.keys() == there.keys()
    for name, x in back.items():
        torch.testing.assert_close(x, there[name], atol=1e-6, rtol=1e-6)
    config = json.loads((tmp_path / "config.json").read_text())
    assert json.loads((tmp_path / "back.json").read_text()).items() <= config.items()


def test_labels_of_the_paper_and_manifest(
    reference: Callable[..., Backbone], tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference("depth")
    main(command(tmp_path, tiny_encoder, "S2"))
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "checkpoints" / "step-0000000")
    facts = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert facts["converted_from"] == "weights.safetensors"
    with pytest.raises(SystemExit, match="2"):
        main(command(tmp_path, tiny_encoder, "S2"))
    assert "already holds a run" in capsys.readouterr().err


def test_weights_are_stored_once_in_float32(
    reference: Callable[..., Backbone], tiny_encoder: Path, tmp_path: Path
) -> None:
    reference("depth", torch.bfloat16)
    main(command(tmp_path, tiny_encoder, "depth"))
    folder = tmp_path / "run" / "checkpoints" / "step-0000000"
    assert os.path.samefile(folder / EMA, folder / MODEL)
    assert {x.dtype for x in load_file(folder / EMA).values()} == {torch.float32}


def test_text_encoder_must_fit(reference: Callable[..., Backbone], tiny_encoder: Path, tmp_path: Path) -> None:
    reference("depth", text_layers=3)
    arguments = UpstreamArguments(
        src=tmp_path / "weights.safetensors",
        config=tmp_path / "config.json",
        arm="depth",
        out=tmp_path / "run",
        text=TextEncoderConfig(name_or_path=str(tiny_encoder)),
    )
    with pytest.raises(
        ValueError, match=r"gives layers 2, width 64, but .* reads layers 3, width 64.*--text.name-or-path"
    ):
        convert_upstream(arguments)
    with pytest.raises(ValueError, match="no text encoder at '/nowhere'"):
        convert_upstream(replace(arguments, text=TextEncoderConfig(name_or_path="/nowhere")))
    assert not (tmp_path / "run").exists()


def test_sizes_that_patches_do_not_divide(
    reference: Callable[..., Backbone], tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference("depth")
    with pytest.raises(SystemExit, match="2"):
        main([*command(tmp_path, tiny_encoder, "depth")[:-1], "17"])
    assert "17 x 17 pixels does not divide into this transformer's patches of 2 x 2" in capsys.readouterr().err
    reference("depth", channels=4)
    with pytest.raises(SystemExit, match="2"):
        main(command(tmp_path, tiny_encoder, "depth"))
    assert "pixels have 3 channels, but this transformer draws 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the sizes .*config.json: No such file"),
        ("{", "is not JSON"),
        ("[]", "must hold an object of sizes"),
    ],
)
def test_sizes_that_cannot_be_read(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    arguments = UpstreamArguments(src=tmp_path, config=tmp_path / "config.json", arm="depth", out=tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        convert_upstream(arguments)


def test_a_run_is_written_under_the_references_names(tiny_run: Path, tmp_path: Path) -> None:
    """The weights are the averaged ones by default."""
    files = {True: EMA, False: MODEL}
    for averaged, file in files.items():
        out = convert_ours(OursArguments(model=tiny_run, out=tmp_path / file, averaged=averaged))
        expected = load_file(find_checkpoint(tiny_run) / file)["norm_out.weight"]
        assert torch.equal(load_file(out)["norm_out.weight"], expected)


def test_directions(capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", "--help"])
    assert "semroute convert ours RUN --out FILE" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "upstraem"])
    assert "did you mean 'upstream'?" in capsys.readouterr().err
