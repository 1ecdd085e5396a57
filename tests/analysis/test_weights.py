"""Routing weights: read from the router alone, and drawn with their numbers beside them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from PIL import Image

from semantic_routing.analysis.figures import INK, new_axes, to_svg
from semantic_routing.analysis.routers import TIMES, open_router, routing_weights
from semantic_routing.analysis.weights import plot_heatmap, plot_lines, weight_figures
from semantic_routing.common.config import to_dict
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import Backbone, DiTConfig
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.networks import tiny_config, tiny_network

DEPTH, LAYERS = 4, 5


def config(arm: str) -> DiTConfig:
    return tiny_config(arm, depth=DEPTH, text_layers=LAYERS, fusedit_first_layer=1)


def trained(arm: str) -> Backbone:
    """Make a model whose weights are far from uniform."""
    return tiny_network(arm, std=1.0, depth=DEPTH, text_layers=LAYERS, fusedit_first_layer=1)


def write_run(folder: Path, model: Backbone) -> Path:
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_checkpoint(folder, 7, model, ema, [], {"config": {"model": to_dict(model.cfg)}})
    return folder


def test_depth_weights_are_the_softmax_of_the_logits():
    model = make_model(config("depth"))
    model.router.logits.data = torch.tensor([[0.0] * LAYERS, [1e3] + [0.0] * 4, [0, 1, 0, 0, 0.0], [0.0] * LAYERS])
    weights = routing_weights(model, [0.0, 0.5, 1.0])
    assert weights.shape == (3, DEPTH, LAYERS)
    assert weights[0, 0] == pytest.approx([0.2] * LAYERS)
    assert weights[1, 1] == pytest.approx([1, 0, 0, 0, 0])
    assert weights[2, 2] == pytest.approx(np.array([1, np.e, 1, 1, 1]) / (4 + np.e))


def test_penultimate_weights_are_repeated_for_every_time_and_block():
    weights = routing_weights(make_model(config("penultimate")), [0.0, 1.0])
    assert np.array_equal(weights, np.broadcast_to(np.float32([0, 0, 0, 1, 0]), (2, DEPTH, LAYERS)))


@pytest.mark.parametrize("arm", ["penultimate", "uniform", "static", "time", "depth", "joint"])
def test_a_run_gives_the_weights_of_its_model(tmp_path, arm):
    model = trained(arm)
    times = [0.0, 0.3, 1.0]
    found = routing_weights(open_router(write_run(tmp_path, model)), times)
    with torch.no_grad():
        expected = model.router.weights(torch.tensor(times)).expand(3, DEPTH, LAYERS)
    assert np.array_equal(found, expected.numpy())
    assert found.sum(-1) == pytest.approx(np.ones((3, DEPTH)), abs=1e-6)


def test_only_the_router_is_read(tmp_path):
    model = open_router(write_run(tmp_path, trained("joint")))
    assert {name for name, p in model.named_parameters() if not p.is_meta} == {
        f"router.{name}" for name in ("w1", "b1", "w2", "b2")
    }


def test_fusedit_has_no_router(tmp_path):
    with pytest.raises(ValueError, match="FuseDiT has no router"):
        list(weight_figures(open_router(write_run(tmp_path / "run", trained("fusedit")))))
    assert not (tmp_path / "out").exists()


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at"):
        open_router(tmp_path / "none")
    run = write_run(tmp_path / "run", trained("depth"))
    folder = run / "checkpoints" / "step-0000007"
    (folder / "state.json").write_text(json.dumps({"step": 7, "config": {"model": to_dict(config("joint"))}}))
    with pytest.raises(ValueError, match="does not hold the router of its configuration, arm 'joint'"):
        open_router(run)
    (folder / "ema.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        open_router(run)
    (folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by semroute train"):
        open_router(run)


MAPS = [f"heatmap-t{t}" for t in ("0", "0.2", "0.4", "0.6", "0.8", "1")]
BLOCKS = [f"{form}-block{block}" for form in ("heatmap", "lines") for block in (0, 1, 3)]


@pytest.mark.parametrize(
    ("arm", "names"),
    [
        ("static", {"heatmap", "lines"}),
        ("depth", {"heatmap", "lines"}),
        ("time", {"heatmap-times", "lines"}),
        ("joint", {*MAPS, *BLOCKS}),
        ("depth-kv", {"heatmap", *BLOCKS[3:]}),
        ("depth-heads", {"heatmap", *BLOCKS[3:]}),
        ("depth-heads-kv", {"heatmap", *BLOCKS[3:]}),
        ("depth-low-rank", {"heatmap", *BLOCKS[3:]}),
    ],
)
def test_every_figure_has_its_numbers_beside_it(tmp_path, arm, names):
    model = trained(arm)
    before = dict(rcParams)
    figures = [drawn.save(tmp_path / "out") for drawn in weight_figures(model)]
    assert {path.stem if path.suffix == ".png" else path.name for path in figures} == names
    kinds = (".png", ".pdf", ".csv", ".npz")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {name + kind for name in names for kind in kinds}
    assert dict(rcParams) == before
    for path in figures:
        assert np.ptp(np.asarray(Image.open(path).convert("L"))) > 100  # something dark on something light
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF-")
        archive = np.load(path.with_suffix(".npz"))
        with path.with_suffix(".csv").open() as file:
            header, *rows = csv.reader(file)
        assert header[1:] == list(archive["columns"]) == [f"layer {layer}" for layer in range(1, LAYERS + 1)]
        assert [row[0] for row in rows] == list(archive["rows"])
        assert np.array_equal(np.array([row[1:] for row in rows], dtype=np.float32), archive["values"])


def test_figures_hold_the_weights_of_their_times_and_blocks(tmp_path):
    model = trained("joint")
    for drawn in weight_figures(model):
        drawn.save(tmp_path / "out")
    names = ("heatmap-t0.2", "lines-block3", "heatmap-block1")
    heatmap, lines, over_time = (np.load(tmp_path / "out" / f"{name}.npz") for name in names)
    assert heatmap["values"] == pytest.approx(routing_weights(model, [0.2])[0], abs=1e-6)
    assert list(heatmap["rows"]) == [f"block {block}" for block in range(DEPTH)]
    assert over_time["values"] == pytest.approx(routing_weights(model, TIMES)[:, 1], abs=1e-6)
    assert list(over_time["rows"])[::10] == ["t = 0", "t = 0.5", "t = 1"]
    expected = routing_weights(model, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])[:, 3]
    assert lines["values"] == pytest.approx(expected, abs=1e-6)
    assert list(lines["rows"]) == ["t = 0", "t = 0.2", "t = 0.4", "t = 0.6", "t = 0.8", "t = 1"]


def test_rows_of_finer_arms_are_named_by_block_head_and_side():
    model = tiny_network("depth-heads-kv", std=1.0, depth=DEPTH, kv_heads=2, text_layers=LAYERS)
    drawn = {figure.name: figure for figure in weight_figures(model, blocks=[2])}
    assert list(drawn) == ["heatmap", "lines-block2"]
    assert drawn["heatmap"].rows[8:12] == [
        "block 2, head 0, keys",
        "block 2, head 1, keys",
        "block 2, head 0, values",
        "block 2, head 1, values",
    ]
    assert np.array_equal(drawn["heatmap"].values, model.router.weights()[0].numpy())
    assert drawn["lines-block2"].rows == ["head 0, keys", "head 1, keys", "head 0, values", "head 1, values"]
    assert np.array_equal(drawn["lines-block2"].values, drawn["heatmap"].values[8:12])
    axes = drawn["heatmap"].figure.axes[0]
    assert axes.get_ylabel() == "block, head, keys or values"
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["0, head 0, keys", "0, head 0, values"]


def test_times_and_blocks_are_chosen():
    model = trained("joint")
    drawn = {figure.name: figure for figure in weight_figures(model, times=[0.125, 0.9], blocks=[2])}
    assert list(drawn) == ["heatmap-t0.125", "heatmap-t0.9", "heatmap-block2", "lines-block2"]
    assert drawn["lines-block2"].values == pytest.approx(routing_weights(model, [0.125, 0.9])[:, 2])
    (lines,) = [figure for figure in weight_figures(trained("depth"), blocks=[3, 1]) if figure.name == "lines"]
    assert lines.rows == ["block 3", "block 1"]
    with pytest.raises(ValueError, match="there is no block 4: this model has blocks 0 to 3"):
        list(weight_figures(model, blocks=[0, 4]))


def test_heatmaps_start_with_block_0_on_top_and_show_their_numbers():
    weights = np.float32([[1, 0, 0], [0.25, 0.5, 0.25]])
    axes = plot_heatmap(weights).axes[0]
    bottom, top = axes.get_ylim()
    assert top < 0 < 1 < bottom
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written[1, 0] == "100"
    assert written[2, 1] == "50"


def test_heatmaps_can_share_their_darkest_colour():
    weights = np.float32([[0.5, 0.25, 0.25, 0, 0]])
    assert [plot_heatmap(weights, "", top).axes[0].collections[0].get_clim() for top in (0.0, 0.8)] == [
        (0, 50),
        (0, 80),
    ]


def test_large_heatmaps_have_few_labels_and_no_numbers():
    axes = plot_heatmap(np.full((24, 36), 1 / 36)).axes[0]
    assert not axes.texts
    assert max(len(axes.get_xticks()), len(axes.get_yticks())) <= 12


def test_rows_are_named_by_time():
    times = [f"{t:g}" for t in TIMES]
    axes = plot_heatmap(np.full((21, 36), 1 / 36), rows=times, label="time").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == times[::2]
    assert axes.get_ylabel() == "time"


def test_lines_are_the_rows():
    weights = np.float32([[1, 0, 0], [0.25, 0.5, 0.25]])
    axes = plot_lines(weights, ["block 0", "block 1"]).axes[0]
    assert [line.get_label() for line in axes.lines] == ["block 0", "block 1", "uniform"]
    assert np.array_equal(axes.lines[1].get_ydata(), weights[1])
    assert list(axes.lines[1].get_xdata()) == [1, 2, 3]


def test_svg_takes_the_pages_colour_and_escapes_its_description():
    figure, _ = new_axes(3.0, 2.0, "title")
    drawing = to_svg(figure, 'a "<b>" & c')
    assert drawing.startswith('<svg role="img" aria-label="a &quot;&lt;b&gt;&quot; &amp; c"')
    assert "currentColor" in drawing
    assert INK not in drawing
