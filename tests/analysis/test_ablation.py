"""Ablations: what each does to the weights, what is measured, resuming, and where weight and need disagree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semantic_routing.analysis.ablation import run as ablation_run
from semantic_routing.analysis.ablation.figures import ablation_figures, disagreement, grid, ranks, spearman
from semantic_routing.analysis.ablation.plan import KINDS, Ablation, plan
from semantic_routing.analysis.ablation.run import (
    OVERALL,
    TABLE,
    AblationConfig,
    Measured,
    interval,
    make_score,
    read_table,
    run_ablation,
)
from semantic_routing.analysis.ablation.scores import Accuracy
from semantic_routing.analysis.routers import TIMES, routing_weights
from semantic_routing.cli.main import main
from semantic_routing.data.streams import Row
from semantic_routing.evaluation.velocity_loss import VelocityLoss
from semantic_routing.model.dit import DiT
from semantic_routing.model.override import RoutingOverride, rerouted
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.toy.captions import TAGS, prompts
from semantic_routing.toy.checker import check
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start
from semantic_routing.training.validation import batch_errors
from tests.helpers.networks import move_zeros, tiny_config, tiny_network

CPU = torch.device("cpu")
QUICK = SampleConfig(steps=2, guidance=2.0, batch=3)


@pytest.fixture
def bundle(tiny_run: Path) -> TextToImage:
    """A model whose router is far from uniform, so that layers differ."""
    found = load_bundle(tiny_run, CPU)
    torch.manual_seed(1)
    for p in found.model.router.parameters():
        p.data.normal_(std=2.0)
    move_zeros(found.model)
    return found


# --- what an ablation does to the weights ---


def test_a_layer_taken_out_leaves_the_others_in_proportion() -> None:
    weights = torch.tensor([[[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]])
    found = Ablation("without", 1, 2).edit(weights.clone(), 2)
    assert torch.equal(found[:, 0], weights[:, 0])
    torch.testing.assert_close(found[0, 1], torch.tensor([0.5, 0.5, 0.0]))


def test_one_layer_alone_and_other_rows_as_they_were() -> None:
    weights = torch.rand(2, 3, 4).softmax(-1)
    found = Ablation("alone", 2, 1).edit(weights.clone(), 3)
    assert torch.equal(found[:, :2], weights[:, :2])
    assert torch.equal(found[:, 2], torch.tensor([0.0, 1, 0, 0]).expand(2, -1))


def test_a_swap_exchanges_all_parts_of_two_blocks_at_every_time() -> None:
    weights = torch.rand(2, 6, 4)
    found = Ablation("swap", 0, 2).edit(weights.clone(), 3)
    assert torch.equal(found, weights[:, [4, 5, 2, 3, 0, 1]])


def test_the_plan_has_every_row_and_layer_and_leaves_out_what_cannot_be() -> None:
    cfg = tiny_config("depth-kv")
    weights = np.random.default_rng(0).dirichlet(np.ones(3), (2, 6))
    found = plan(cfg, weights, tuple(KINDS))
    assert [sum(a.kind == kind for a in found) for kind in KINDS] == [18, 18, 3]
    assert found[4].names(cfg) == ("block 0, values", "layer 2")
    assert found[-1].names(cfg) == ("block 1", "block 2")
    one_layer = np.broadcast_to([0.0, 1.0, 0.0], (2, 3, 3))
    found = plan(tiny_config("penultimate"), one_layer, ("without", "swap"))
    assert (len(found), {a.other for a in found}) == (6, {0, 2})


# --- what is measured ---


def test_the_loss_is_that_of_validation_and_of_the_edited_network(bundle: TextToImage) -> None:
    samples, times = prompts(3, 5), (0.1, 0.6)
    rows = [Row(replace(s, size=32).image, s.caption, 3, 0, i) for i, s in enumerate(samples)]
    score = VelocityLoss(bundle, rows, [s.tag for s in samples], times, batch=2)
    expected = batch_errors(bundle, rows, times).mean(0).numpy()
    assert score.values() == pytest.approx(expected, rel=1e-4)
    model = bundle.model
    assert isinstance(model, DiT)
    override = RoutingOverride(("block 1",), ((0.0, 1.0),))
    with rerouted(model, override.router(model.cfg, model.router)):
        other = score.values()
        assert other == pytest.approx(batch_errors(bundle, rows, times).mean(0).numpy(), rel=1e-4)
    assert not np.allclose(other, expected, rtol=1e-5)
    assert score.values() == pytest.approx(expected, rel=1e-4)


def test_accuracy_is_the_checkers_verdict_on_the_images_of_sample(
    bundle: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = prompts(0, 7)
    score = Accuracy(bundle, samples, QUICK)
    seen = []

    def noted(image: np.ndarray, claims: tuple) -> object:
        seen.append(image)
        return check(image, claims)

    monkeypatch.setattr("semantic_routing.analysis.ablation.scores.check", noted)
    values = score.values()
    images = bundle.sample([s.caption for s in samples], cfg=QUICK).numpy()
    assert np.array_equal(np.stack(seen), images)
    expected = [check(image, s.claims).correct for image, s in zip(images, samples, strict=True)]
    assert values.tolist() == [float(correct) for correct in expected]


def test_the_score_is_the_checkers_where_there_is_one(bundle: TextToImage) -> None:
    cfg = AblationConfig(n=4, sampling=QUICK)
    assert make_score(bundle, cfg).name == "accuracy"
    assert make_score(bundle, replace(cfg, score="loss")).tags == [s.tag for s in prompts(0, 4)]
    elsewhere = replace(bundle, config=bundle.config | {"data": {"paths": ["photos"]}})
    with pytest.raises(ValueError, match=r"semroute analyze as --ablation\.paths"):
        make_score(elsewhere, cfg)
    with pytest.raises(ValueError, match=r"use --ablation\.score loss"):
        make_score(elsewhere, replace(cfg, score="accuracy"))


def test_own_pictures_have_a_loss_and_no_tags(bundle: TextToImage, tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red circle")
    cfg = AblationConfig(paths=(str(tmp_path),), n=3, kinds=("alone",), times=(0.5,))
    score, measured = run_ablation(bundle, cfg, tmp_path / "out")
    assert score.name == "velocity loss"
    assert {row.tag for row in measured} == {OVERALL}
    assert len(measured) == 2 * 2


# --- the table ---


@pytest.mark.parametrize("arm", ["joint", "depth-kv", "static"])
def test_need_is_what_the_edited_network_loses_on_the_same_noise(
    arm: str, tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    start(tiny_config(arm, steps=2), tmp_path / "run")
    bundle = load_bundle(tmp_path / "run", CPU)
    move_zeros(bundle.model, std=1.0)
    cfg = AblationConfig(score="loss", n=11, times=(0.2, 0.7))
    score, measured = run_ablation(bundle, cfg, tmp_path / "out")
    base = score.values()
    model = bundle.model
    assert isinstance(model, DiT)
    one = next(row for row in measured if (row.kind, row.row, row.tag) == ("alone", model.cfg.rows[-1], OVERALL))
    override = RoutingOverride((model.cfg.rows[-1],), (tuple(np.eye(2)[int(one.other[-1]) - 1]),))
    with rerouted(model, override.router(model.cfg, model.router)):
        differences = score.values() - base
    assert one.need == pytest.approx(differences.mean(), rel=1e-6)
    assert one.value - one.base == pytest.approx(one.need, abs=1e-9)
    assert (one.low, one.high) == pytest.approx(interval(differences))
    assert one.low <= one.need <= one.high
    assert {row.tag for row in measured} == {OVERALL, *TAGS}
    kinds = {kind: sum(row.kind == kind and row.tag == OVERALL for row in measured) for kind in KINDS}
    assert kinds == {"without": 2 * len(model.cfg.rows), "alone": 2 * len(model.cfg.rows), "swap": int(arm != "static")}
    if arm == "depth-kv":
        drawn = list(ablation_figures(model.cfg, routing_weights(model, TIMES).mean(0), measured, score.name))
        assert len(drawn) == 3 * (1 + len(TAGS))
        by_name = {figure.name: figure for figure in drawn}
        assert by_name["ablation-alone"].values[-1, int(one.other[-1]) - 1] == pytest.approx(one.need)
        assert by_name["ablation-swap-two-object"].rows == ["block 0", "block 1"]


def test_a_stopped_ablation_goes_on_and_ends_as_one_that_was_not(
    bundle: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = AblationConfig(score="loss", n=11, times=(0.5,), kinds=("without", "swap"))
    _, whole = run_ablation(bundle, cfg, tmp_path / "whole")
    full = (tmp_path / "whole" / TABLE).read_text()
    table = tmp_path / "stopped" / TABLE
    calls = []

    def stop(*args: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ablation_run.Ablation, "edit", _counted(ablation_run.Ablation.edit, stop))
        with pytest.raises(KeyboardInterrupt):
            run_ablation(bundle, cfg, tmp_path / "stopped")
    kept = table.read_text()
    assert full.startswith(kept)
    assert len(kept.splitlines()) == 1 + 2 * (1 + len(TAGS))
    table.write_text(kept[: -len(kept.splitlines()[-1]) // 2])  # cut off inside the last line
    _, resumed = run_ablation(bundle, cfg, tmp_path / "stopped")
    assert resumed == whole
    assert table.read_text() == full
    monkeypatch.setattr(VelocityLoss, "values", lambda self: pytest.fail("everything is there"))
    assert run_ablation(bundle, cfg, tmp_path / "stopped")[1] == whole
    with pytest.raises(ValueError, match="holds ablations with another n, seed; choose another --out"):
        run_ablation(bundle, replace(cfg, n=12, seed=1), tmp_path / "stopped")


def _counted(edit: Callable, note: Callable) -> Callable:
    def noted(self: Ablation, weights: torch.Tensor, depth: int) -> torch.Tensor:
        note(self)
        return edit(self, weights, depth)

    return noted


def test_a_table_is_read_by_whole_ablations(tmp_path: Path) -> None:
    assert read_table(tmp_path / "none.csv", 1) == []


def test_intervals_are_those_of_the_normal_law_and_repeat() -> None:
    differences = np.random.default_rng(1).normal(0.3, 1.0, 400)
    low, high = interval(differences)
    half = 1.96 * differences.std() / 20
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.02)
    assert interval(differences) == (low, high)
    assert interval(np.zeros(5)) == (0, 0)


@pytest.mark.parametrize("arm", ["attention", "fusedit"])
def test_arms_without_weights_are_refused(arm: str, bundle: TextToImage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"arm '{arm}' has no routing weights to ablate"):
        run_ablation(replace(bundle, model=tiny_network(arm)), AblationConfig(), tmp_path)
    with pytest.raises(ValueError, match=r"ablation\.n is 1"):
        AblationConfig(n=1)


# --- weight and need ---


def test_ranks_and_correlation() -> None:
    assert ranks(np.array([3.0, 1, 1, 7])).tolist() == [2, 0.5, 0.5, 3]
    rising = np.array([1.0, 2, 5, 9])
    assert spearman(rising, np.exp(rising)) == pytest.approx(1)
    assert spearman(rising, -rising) == pytest.approx(-1)
    assert spearman(rising, np.ones(4)) is None
    # 1 - 6 sum d² / (n (n² - 1)) without ties
    assert spearman(np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])) == pytest.approx(1 - 6 * 4 / 120)


def needs(table: np.ndarray) -> list[Measured]:
    return [
        Measured("without", f"block {row}", f"layer {layer + 1}", OVERALL, 9, 0.5, 0.5, need, need - 0.1, need + 0.1)
        for (row, layer), need in np.ndenumerate(table)
    ]


def test_disagreement_lists_what_is_read_and_not_needed_and_the_reverse() -> None:
    cfg = tiny_config("depth")
    weights = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])
    need = weights.copy()
    need[0, 0], need[2, 0] = 0.0, 1.0
    found = disagreement(cfg, weights, needs(need))
    assert found is not None
    first, second = found["largest"][:2]
    assert {(one["row"], one["layer"], one["reading"]) for one in (first, second)} == {
        ("block 0", 1, "read more than needed"),
        ("block 2", 1, "needed more than read"),
    }
    assert first["interval"] == [first["need"] - 0.1, first["need"] + 0.1]
    assert found["of_rows"]["block 1"] == pytest.approx(1)
    assert found["rank_correlation"] < 0.5
    assert disagreement(cfg, weights, []) is None
    agreed = disagreement(cfg, weights, needs(weights))
    assert agreed is not None
    assert agreed["rank_correlation"] == pytest.approx(1)


def test_a_grid_has_gaps_and_marks_what_is_sure() -> None:
    measured = [m for m in needs(np.array([[0.3, 0.05], [-0.3, 0.0]])) if (m.row, m.other) != ("block 1", "layer 2")]
    need, sure = grid(measured, ["block 0", "block 1"], ["layer 1", "layer 2"])
    assert np.isnan(need[1, 1])
    assert sure.tolist() == [[True, False], [True, False]]


# --- the command ---


@pytest.mark.usefixtures("undrawn")
def test_analyze_ablates(tiny_run: Path, tmp_path: Path) -> None:
    command = ["analyze", str(tiny_run), "--ablate", "--ablation.score", "loss", "--ablation.n", "11"]
    command += ["--ablation.times", "0.5", "--html", "--device", "cpu", "--out", str(tmp_path)]
    main(command)
    for name in ("ablation-without.png", "ablation-alone-colors.csv", "ablation-swap.pdf", "ablation.csv"):
        assert (tmp_path / name).is_file(), name
    found = json.loads((tmp_path / "disagreement.json").read_text())
    assert len(found["largest"]) == 4
    page = (tmp_path / "index.html").read_text()
    assert "Where weight and need disagree" in page
    assert "What is lost when two blocks exchange their weights" in page
    main([*command, "--trajectory", "--n", "2", "--steps", "2", "--guidance", "1"])
    assert (tmp_path / "lead.json").is_file()
