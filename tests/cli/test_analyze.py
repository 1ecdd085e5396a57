"""``semroute analyze`` on tiny runs: its files, its page, and a calibration that sampling accepts."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semantic_routing.cli.analyze import AnalyzeArguments, TrajectorySampling, run_analysis
from semantic_routing.interop.export import ExportArguments, export
from semantic_routing.sampling.clock import parse_clock
from semantic_routing.training.loop import start


@pytest.fixture(scope="module")
def joint_run(tiny_config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "joint"
    start(tiny_config("joint"), out)
    return out


SETTINGS: dict[str, Any] = {"trajectory": True, "n": 3, "guidance": (1.0, 4.0), "steps": (8,), "device": "cpu"}


@pytest.fixture(scope="module")
def figures(joint_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run's figures, trajectories and page."""
    out = tmp_path_factory.mktemp("figures")
    written = run_analysis(AnalyzeArguments(models=(joint_run,), out=out, html=True, **SETTINGS))
    assert {*out.glob("*.png"), out / "index.html"} == set(written)
    return out


def test_a_run_is_drawn_with_its_trajectory_and_its_page(figures: Path) -> None:
    out, names = figures, {path.name for path in figures.iterdir()}
    assert {"heatmap-t0.2.png", "similarity-times.png", "trajectory-mse-8.png", "lead-8.png", "index.html"} <= names
    for path in figures.iterdir():
        if path.suffix == ".png":
            assert all(path.with_suffix(kind).is_file() for kind in (".pdf", ".csv", ".npz"))
    leads = json.loads((out / "lead.json").read_text())
    assert [row["guidance"] for row in leads] == [1, 4]
    assert all(row["interval"][0] <= row["lead"] <= row["interval"][1] for row in leads)
    mse = np.load(out / "trajectory-mse-8.npz")
    shown = [f"guidance {g}{kind}" for g in (1, 4) for kind in ("", ", forward process", ", from fresh noise")]
    assert list(mse["columns"]) == shown
    sampled, forward, fresh = mse["values"][:, 3:].T
    t = np.arange(8) / 8
    assert forward == pytest.approx((1 - t) ** 2 * sampled[0], rel=1e-5)
    assert fresh == pytest.approx((1 - t) ** 2 * fresh[0], rel=1e-5)
    assert abs(fresh[0] / forward[0] - 1) > 1e-3
    assert abs(mse["values"][0, 0] / sampled[0] - 1) > 1e-3  # each guidance has its own forward process
    lead, effective = (np.load(out / f"{name}-8.npz") for name in ("lead", "effective-time"))
    assert effective["values"] - t[:, None] == pytest.approx(lead["values"], abs=1e-12)
    assert list(lead["columns"]) == ["guidance 1", "guidance 4", "nominal"]
    clock = parse_clock(str(out / "calibration-g4-s8.json"))
    assert clock is not None
    nominal = torch.arange(8) / 8
    measured = clock(nominal)
    assert (measured - nominal).tolist() == pytest.approx(lead["values"][:, 1].tolist(), abs=1e-5)
    assert json.loads((out / "manifest.json").read_text())["guidance"] == [1, 4]


def test_the_page_needs_nothing_beside_it(figures: Path) -> None:
    page = (figures / "index.html").read_text()
    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(value or "" for name, value in attrs if name in ("src", "href") and not tag.startswith("use"))

    Links().feed(page)
    pictures = [link for link in links if link.startswith("data:image/png;base64,")]
    assert len(pictures) == 3 * 2 * 8  # prompts, guidances, times
    assert all(link.startswith(("data:", "#")) for link in links)
    data = json.loads(page.split('id="weights">')[1].split("</script>")[0])
    assert np.shape(data["weights"])[0] == 21
    assert np.sum(data["weights"], -1) == pytest.approx(1, abs=1e-3)


@pytest.mark.usefixtures("undrawn")
def test_a_model_without_routing_weights_has_its_trajectory(tiny_config, tmp_path: Path) -> None:
    start(tiny_config("fusedit"), tmp_path / "run")
    settings = {"trajectory": True, "n": 2, "guidance": (2.0,), "steps": (3,), "html": True, "device": "cpu"}
    written = run_analysis(AnalyzeArguments(models=(tmp_path / "run",), out=tmp_path / "out", **settings))
    names = ["trajectory-mse-3.png", "trajectory-psnr-3.png", "effective-time-3.png", "lead-3.png", "index.html"]
    assert [path.name for path in written] == names
    with pytest.raises(ValueError, match="FuseDiT has no router"):
        run_analysis(AnalyzeArguments(models=(tmp_path / "run",), out=tmp_path / "again"))


@pytest.mark.usefixtures("undrawn")
def test_a_clock_changes_the_trajectory_and_is_recorded_with_its_numbers(
    figures: Path, joint_run: Path, tmp_path: Path
) -> None:
    sampling = TrajectorySampling(clock="shifted:0.5:0")
    run_analysis(AnalyzeArguments(models=(joint_run,), out=tmp_path, sampling=sampling, **SETTINGS))
    nominal, shifted = (json.loads((folder / "lead.json").read_text()) for folder in (figures, tmp_path))
    assert [row["clock"] for row in (*nominal, *shifted)] == ["nominal"] * 2 + ["shifted:0.5:0"] * 2
    assert all(one["lead"] != other["lead"] for one, other in zip(nominal, shifted, strict=True))


@pytest.mark.usefixtures("undrawn")
def test_several_models_have_a_folder_each_and_are_compared(tiny_run: Path, joint_run: Path, tmp_path: Path) -> None:
    written = run_analysis(AnalyzeArguments(models=(tiny_run, joint_run), out=tmp_path))
    assert tmp_path / "tiny" / "heatmap.png" in written
    assert tmp_path / "joint" / "heatmap-t0.png" in written
    assert list(np.load(tmp_path / "models-jensen-shannon.npz")["rows"]) == ["tiny", "joint"]


@pytest.mark.usefixtures("undrawn")
def test_an_exported_pipeline_gives_the_figures_of_its_run(figures: Path, joint_run: Path, tmp_path: Path) -> None:
    pipeline = export(ExportArguments(model=joint_run, out=tmp_path / "pipeline"))
    run_analysis(AnalyzeArguments(models=(pipeline,), out=tmp_path / "out", **SETTINGS))
    one, other = (
        {path.name: path.read_bytes() for path in folder.glob("*.csv")} for folder in (figures, tmp_path / "out")
    )
    assert "lead-8.csv" in one
    assert one == other
    (pipeline / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a transformer of semroute export"):
        run_analysis(AnalyzeArguments(models=(pipeline,), out=tmp_path / "again"))


def test_bad_arguments_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to analyse"):
        AnalyzeArguments(models=(), out=tmp_path)
    with pytest.raises(ValueError, match="steps of at least 2"):
        AnalyzeArguments(models=(tiny_run,), out=tmp_path, steps=(1,))
    with pytest.raises(ValueError, match=r"times must be from 0 \(noise\) to 1 \(data\); give at least one"):
        AnalyzeArguments(models=(tiny_run,), out=tmp_path, times=(0.5, 1.5))
    with pytest.raises(ValueError, match="guidance has the same value twice"):
        AnalyzeArguments(models=(tiny_run,), out=tmp_path, guidance=(1.0, 1.0))
    with pytest.raises(ValueError, match="the same model is given twice"):
        run_analysis(AnalyzeArguments(models=(tiny_run, tiny_run), out=tmp_path))
