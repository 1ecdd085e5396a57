"""``semroute adopt`` and ``semroute analyze`` on routings: from a pipeline on disk to figures, and bad input."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from semantic_routing.adopt import adopt, load_routing
from semantic_routing.adopt.facts import Facts
from semantic_routing.adopt.file import read_routing, save_routing
from semantic_routing.adopt.routing import Routing
from semantic_routing.adopt.training.open_pipeline import open_pipe
from semantic_routing.checkpoint.load import checkpoints
from semantic_routing.cli.main import main
from semantic_routing.interop.export import make_pipeline
from tests.adopt.test_families import move
from tests.helpers import pipelines as own
from tests.helpers.adoptable_pipelines import draw, pipeline

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SMALL = ["--steps", "3", "--batch", "2", "--log-every", "1", "--precision", "fp32", "--device", "cpu"]


def call(*args: object) -> int:
    """Run the command in this process and return its exit code."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def exported(make_bundle: own.MakeBundle, tmp_path: Path) -> Path:
    folder = tmp_path / "pipelines/base"
    own.quiet(make_pipeline(make_bundle("penultimate"))).save_pretrained(folder)
    return folder


def routing_of(folder: Path, arm: str = "depth", weights: str = "simplex") -> Path:
    """Write a routing of two blocks over three layers and return its folder."""
    facts = Facts(
        family="sana", transformer="SanaTransformer2DModel", blocks=2, encoder="Gemma2Model", width=16, layers=3,
        origin="last_hidden_state", arm=arm, weights=weights,
    )  # fmt: skip
    routing = Routing(facts)
    with torch.no_grad():
        for p in routing.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    save_routing(facts, routing.state_dict(), folder)
    return folder


def test_from_a_pipeline_on_disk_to_images_and_figures(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relative paths are resolved from the folder in which the run was started."""
    monkeypatch.chdir(tmp_path)
    pipe = "pipelines/base"
    assert call("adopt", "train", pipe, "--data", "shapes", "--out", "routings/x", *SMALL, "--preview-every", "3") == 0
    shown = capsys.readouterr()
    assert shown.out == "routings/x\n"
    assert "the number of captions is unlimited" in shown.err
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    assert call("adopt", "train", "--resume", tmp_path / "routings/x", "--steps", "4") == 0
    assert [c.name for c in checkpoints(tmp_path / "routings/x")] == ["step-0000003", "step-0000004"]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    asked = ["--prompt", "a red circle", "a star", "--routing", "routings/x", "--steps", "2", "--device", "cpu"]
    assert call("adopt", "sample", pipe, *asked, "--out", "a") == 0
    files = sorted(path.name for path in Path("a").glob("*.png"))
    assert files == ["00000_00.png", "00001_00.png"]
    assert call("adopt", "sample", pipe, *asked, "--scale", "0.0", "--out", "b") == 0
    assert call("adopt", "sample", pipe, *asked[:3], *asked[5:], "--out", "c") == 0
    pixels = {name: np.asarray(Image.open(Path(name, files[0]))) for name in "abc"}
    assert np.array_equal(pixels["b"], pixels["c"])
    assert call("adopt", "sample", pipe, *asked, "--scale", "0.5", "--out", "a") == 2
    assert "scale 1.0 instead of 0.5" in capsys.readouterr().err
    manifest = json.loads(Path("a/manifest.json").read_text())
    assert manifest["sampler"]["seed"] == 0
    assert len(manifest["routing_sha256"]) == 64

    assert call("adopt", "info", "routings/x") == 0
    table = capsys.readouterr().out
    assert re.search(r"^transformer +SemanticRoutingTransformer$", table, re.MULTILINE)
    assert re.search(r"^block 1  origin \d+\.\d, layer", table, re.MULTILINE)
    assert call("analyze", "routings/x", "--out", "figures") == 0
    assert capsys.readouterr().out == "figures/heatmap.png\n"
    assert Path("figures/heatmap.pdf").is_file()


@pytest.mark.parametrize("name", ["sana", "z-image"])
def test_pipelines_of_diffusers_load_from_disk(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    pipe = pipeline(name)
    pipe.save_pretrained(tmp_path)
    opened = open_pipe(str(tmp_path), torch.device("cpu"), "fp32")
    assert not any(p.requires_grad for p in opened.transformer.parameters())
    routing = adopt(opened)
    move(routing)
    assert torch.equal(draw(opened, name), routed_like(pipe, routing, name))


def routed_like(pipe: Any, routing: Routing, name: str) -> torch.Tensor:
    other = adopt(pipe)
    other.load_state_dict(routing.state_dict())
    return draw(pipe, name)


@pytest.mark.parametrize(
    ("arm", "weights", "figures"),
    [
        ("depth", "simplex", ["heatmap"]),
        ("depth", "affine", ["heatmap"]),
        ("joint", "gate", ["heatmap-t0", "heatmap-t0.5"]),
        ("static", "simplex", ["heatmap"]),
    ],
)
def test_figures_hold_the_weights_over_origin_and_layers(
    tmp_path: Path, arm: str, weights: str, figures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = routing_of(tmp_path / "routing", arm, weights)
    assert call("analyze", folder, "--times", "0", "0.5", "--out", tmp_path / "figures") == 0
    assert sorted(path.stem for path in (tmp_path / "figures").glob("*.png")) == figures
    facts, numbers = read_routing(folder)
    routing = Routing(facts)
    routing.load_state_dict(numbers)
    for number, name in enumerate(figures):
        rows = list(csv.reader((tmp_path / f"figures/{name}.csv").open()))
        assert rows[0] == ["", "origin", "layer 1", "layer 2", "layer 3"]
        assert [row[0] for row in rows[1:]] == ["block 0", "block 1"]
        found = torch.tensor([[float(x) for x in row[1:]] for row in rows[1:]])
        expected = routing.weights(torch.tensor([0.0, 0.5])).detach()
        torch.testing.assert_close(found, expected[min(number, len(expected) - 1)].expand(2, -1))
    capsys.readouterr()
    assert call("adopt", "info", folder / "routing.safetensors", "--times", "0", "0.5") == 0
    table = capsys.readouterr().out
    assert table.count("weights in percent") == len(figures)
    assert ("all blocks" in table) == (arm == "static")
    assert call("adopt", "info", folder, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["header"]["arm"] == arm
    assert len(shown["at"]) == (3 if arm == "joint" else 1)


def test_a_routing_and_a_run_are_drawn_beside_each_other(tmp_path: Path, tiny_run: Path) -> None:
    folder = routing_of(tmp_path / "routing")
    assert call("analyze", tiny_run, folder, "--out", tmp_path / "figures") == 0
    assert (tmp_path / "figures/routing/heatmap.png").is_file()
    assert (tmp_path / f"figures/{tiny_run.name}/heatmap.png").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("adopt", ""),
        ("adopt trian x", "did you mean 'train'"),
        ("adopt train --out x", "give the pipeline's folder or hub name"),
        ("adopt train BASE", "--out routings"),
        ("adopt train nowhere --out x", "cannot load a pipeline from 'nowhere'"),
        ("adopt train . --out x", "not a diffusers pipeline: it has no model_index.json"),
        ("adopt train BASE --out x --data shapes --data.paths words", "--data and --data.paths are the same option"),
        ("adopt train BASE --out x --lora 4", "did you mean --lora.rank"),
        ("adopt train --resume x --batch 3", "--resume takes the settings from the run's checkpoint"),
        ("adopt train --resume x", "no checkpoint at x"),
        ("adopt sample BASE --out x", "nothing to sample"),
        ("adopt sample BASE --out x --prompt a --routing nowhere", "there is no routing at 'nowhere'"),
        ("adopt sample BASE --out x --prompt a --routing SANA --device cpu", "for family 'sana', but this model has"),
        ("adopt sample BASE --out x --prompt a --height 18 --device cpu", "use multiples of 4"),
        ("adopt info nowhere", "there is no routing at 'nowhere'"),
        ("adopt info BASE", "holds no routing.safetensors"),
        ("analyze SANA --out x --trajectory", "is a routing without a model"),
    ],
)
def test_mistakes_are_one_sentence(
    args: str, message: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    routing_of(tmp_path / "sana")
    code = call(*args.replace("BASE", str(exported)).replace("SANA", "sana").split())
    shown = capsys.readouterr()
    assert code == (2 if message else 0)
    assert message in shown.err
    assert shown.err.count("\n") == (1 if message else 0)
    assert not Path("x").exists()


def test_pipelines_with_code_of_their_own_are_not_run(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "other")
    index = tmp_path / "other/model_index.json"
    index.write_text(index.read_text().replace("SemanticRoutingPipeline", "TheirPipeline"))
    with pytest.raises(ValueError, match="with custom code"):
        open_pipe(str(tmp_path / "other"), torch.device("cpu"))


def test_a_routing_of_a_run_loads_into_the_pipeline(exported: Path, tmp_path: Path) -> None:
    assert call("adopt", "train", exported, "--out", tmp_path / "run", *SMALL) == 0
    pipe = open_pipe(str(exported), torch.device("cpu"))
    routing = load_routing(pipe, tmp_path / "run")
    assert routing.facts.base_model == str(exported)
    assert not routing.training
