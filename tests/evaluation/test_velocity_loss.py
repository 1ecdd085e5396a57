"""The velocity loss as an evaluation: its files, its comparison, and folders and data that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semantic_routing.cli.main import main
from semantic_routing.evaluation import velocity_loss
from semantic_routing.evaluation.compare import CompareArguments, compare
from semantic_routing.evaluation.records import LOSS, read_records
from semantic_routing.evaluation.velocity_loss import evaluate_loss, held_out_loss
from semantic_routing.flow import path, velocity
from semantic_routing.model.override import RoutingOverride
from semantic_routing.sampling.folder import weights_sha256
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.text_to_image import TextToImage
from semantic_routing.toy.captions import prompts
from tests.helpers.forked import semroute
from tests.helpers.networks import move_zeros

TIMES = (0.1, 0.6)


@pytest.fixture
def bundle(tiny_run: Path) -> TextToImage:
    found = load_bundle(tiny_run, torch.device("cpu"))
    move_zeros(found.model)
    return found


def test_the_records_are_the_mean_squared_error_of_the_velocity(bundle: TextToImage, tmp_path: Path) -> None:
    summary = evaluate_loss(bundle, tmp_path, n=22, times=TIMES, seed=3, batch=5)
    found = read_records(tmp_path / "records.jsonl")
    samples = prompts(3, 22)
    assert [(record.caption, record.tags) for record in found] == [(s.caption, (s.tag,)) for s in samples]
    # At t = 0 the noisy picture is the noise alone, whatever the picture: so the noise can be asked for.
    seen = []
    real = bundle.model.forward

    def noted(x: torch.Tensor, t: torch.Tensor, context: object) -> torch.Tensor:
        seen.append(x.clone())
        return real(x, t, context)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(bundle.model, "forward", noted)
        evaluate_loss(bundle, tmp_path / "noise", n=22, times=(0.0,), seed=3, batch=22)
        (noise,) = seen
        patch.undo()
        latents = bundle.codec.encode(torch.stack([torch.from_numpy(replace(s, size=32).image) for s in samples]))
        features, losses = bundle.encode([s.caption for s in samples]), []
        for time in TIMES:
            t = torch.full((22,), time)
            noisy = path(latents, noise, t)
            predicted = bundle.model(noisy, t, bundle.model.prepare_text(features, t))
            losses.append((predicted - velocity(latents, noise)).double().square().flatten(1).mean(1))
    expected = torch.stack(losses).mean(0).numpy()
    assert [record.scores[LOSS] for record in found] == pytest.approx(expected, rel=1e-4)
    assert summary["scores"][LOSS]["overall"]["mean"] == pytest.approx(expected.mean(), rel=1e-4)
    assert summary["scores"][LOSS]["colors"]["n"] == 2
    assert np.ptp(expected) > 1e-3


def test_two_models_are_compared_in_thousandths_and_the_lower_loss_is_best(bundle: TextToImage, tmp_path: Path) -> None:
    evaluate_loss(bundle, tmp_path / "one", n=22, times=TIMES)
    with torch.no_grad():
        for p in bundle.model.parameters():
            p.mul_(1.01)
    evaluate_loss(bundle, tmp_path / "two", n=22, times=TIMES)
    one, two = (
        np.mean([record.scores[LOSS] for record in read_records(tmp_path / name / "records.jsonl")])
        for name in ("one", "two")
    )
    table = compare(CompareArguments(folders=(tmp_path / "one", tmp_path / "two"), out=tmp_path / "tables"))
    best = f"**{1000 * min(one, two):.2f}**"
    assert best in table
    assert f"{1000 * (two - one):+.2f}" in table
    evaluate_loss(bundle, tmp_path / "other", n=22, times=(0.5,))
    with pytest.raises(ValueError, match="cannot be compared: they differ in scorer"):
        compare(CompareArguments(folders=(tmp_path / "one", tmp_path / "other"), out=tmp_path / "tables"))


def test_a_folder_of_another_evaluation_is_refused(bundle: TextToImage, tmp_path: Path) -> None:
    evaluate_loss(bundle, tmp_path, n=11, times=TIMES)
    before = (tmp_path / "records.jsonl").read_bytes()
    evaluate_loss(bundle, tmp_path, n=11, times=TIMES)
    assert (tmp_path / "records.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="holds an evaluation with another prompt_set; choose another --out"):
        evaluate_loss(bundle, tmp_path, n=22, times=TIMES)
    with pytest.raises(ValueError, match="with another scorer"):
        evaluate_loss(bundle, tmp_path, n=11, times=(0.2,))
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_models_of_other_data_need_held_out_pictures(bundle: TextToImage, tmp_path: Path) -> None:
    elsewhere = replace(bundle, config=bundle.config | {"data": {"paths": ["photos"]}})
    with pytest.raises(ValueError, match="images that were not used in training: give them as --paths"):
        evaluate_loss(elsewhere, tmp_path / "loss", n=2, times=TIMES)
    assert not (tmp_path / "loss").exists()


@pytest.fixture
def elsewhere(bundle: TextToImage, tmp_path: Path) -> TextToImage:
    """A model whose run, begun in ``tmp_path``, learned long captions and was validated on four pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(folder / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "text": f"alt {i}", "long": f"a long caption of picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    data = {"paths": ["train"], "caption_keys": ["long"]}
    return replace(
        bundle, config=bundle.config | {"data": data, "validation": {"paths": ["photos"]}}, begun=str(tmp_path)
    )


def test_captions_are_those_of_training_and_every_picture_counts_once(
    elsewhere: TextToImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = evaluate_loss(elsewhere, tmp_path / "loss", n=12, times=TIMES)
    found = [record.caption for record in read_records(tmp_path / "loss" / "records.jsonl")]
    assert sorted(found) == [f"a long caption of picture {i}" for i in range(4)]
    assert "only 4 held-out pictures, so the loss is of these and not of 12" in caplog.text
    assert summary["scores"][LOSS]["overall"]["n"] == 4


def test_another_routing_is_another_evaluation(bundle: TextToImage, tmp_path: Path) -> None:
    first, last = (RoutingOverride(("block 0",), (row,)) for row in ((1.0, 0.0), (0.0, 1.0)))
    plain = evaluate_loss(bundle, tmp_path / "plain", n=11, times=TIMES)
    evaluate_loss(bundle, tmp_path / "first", n=11, times=TIMES, routing=first)
    for other in (last, None):
        with pytest.raises(ValueError, match="holds an evaluation with another routing"):
            evaluate_loss(bundle, tmp_path / "first", n=11, times=TIMES, routing=other)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("plain", "first")]
    assert [found["routing"] for found in manifests] == [None, first.to_json()]
    assert manifests[0]["weights_sha256"] == manifests[1]["weights_sha256"] == weights_sha256(bundle.model)
    assert plain["scores"] != json.loads((tmp_path / "first" / "summary.json").read_text())["scores"]
    folders = (tmp_path / "plain", tmp_path / "first")
    text = compare(CompareArguments(folders=folders, out=tmp_path / "tables", resamples=50))
    assert "differs from plain in routing (loss)" in text


def test_states_beyond_the_room_are_encoded_again(bundle: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = held_out_loss(bundle, (), 11, 0, TIMES, 4)
    first = measure.values()
    assert len(measure._texts) == 3
    monkeypatch.setattr(velocity_loss, "KEPT_TEXTS", 0)
    small = held_out_loss(bundle, (), 11, 0, TIMES, 4)
    for values in (measure.values(), small.values(), small.values()):
        np.testing.assert_array_equal(values, first)
    assert not small._texts


def test_a_network_without_a_number_writes_nothing(bundle: TextToImage, tmp_path: Path) -> None:
    next(bundle.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the network gives no number for picture 0, '"):
        evaluate_loss(bundle, tmp_path / "loss", n=11, times=TIMES)
    assert not list(tmp_path.rglob("*.json*"))


def test_the_command(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loss"
    command = ["evaluate", "loss", "--model", str(tiny_run), "--out", str(out), "--n", "11", "--times", "0.3"]
    main(command)
    assert "| overall |" in capsys.readouterr().out
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["scorer"] == {"scorer": "velocity loss", "times": [0.3], "seed": 0}
    with pytest.raises(SystemExit) as stopped:
        main([*command[:-1], "1.3"])
    assert stopped.value.code == 2
    assert "at least one time, from 0 to 1" in capsys.readouterr().err


def test_processes_share_the_pictures(tiny_run: Path, tmp_path: Path) -> None:
    command = ["evaluate", "loss", "--model", tiny_run, "--n", "11", "--times", "0.3", "--batch", "4"]
    first, second = semroute(2, *command, "--out", tmp_path / "shared")
    assert ("| overall |" in first, second) == (True, "")
    evaluate_loss(load_bundle(tiny_run, torch.device("cpu")), tmp_path / "alone", n=11, times=(0.3,), batch=4)
    shared, alone = (read_records(tmp_path / folder / "records.jsonl") for folder in ("shared", "alone"))
    assert shared == alone
