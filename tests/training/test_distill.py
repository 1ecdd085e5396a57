"""Guidance distillation: what the network learns, where it starts, and teachers that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from semantic_routing.cli.main import main
from semantic_routing.data.dataset import open_data
from semantic_routing.flow import path
from semantic_routing.sampling.guidance import guided
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.distill import DistillConfig, Teacher
from semantic_routing.training.loop import batches, resume, start
from semantic_routing.training.trainer import Trainer
from tests.training.test_going_on import assert_same, begin

Make = Callable[..., TrainConfig]
CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "two blue squares", ""]


@pytest.mark.parametrize("arm", ["depth", "joint", "joint-state", "fusedit"])
def test_the_teacher_gives_the_guided_velocity_at_each_images_own_time(
    arm: str, tiny_config: Make, tmp_path: Path
) -> None:
    run = start(tiny_config(arm, steps=2, checkpoint_every=2), tmp_path / "run")
    bundle = load_bundle(run, CPU)
    packed = not bundle.model.cfg.strategy.reads_keys
    noisy, t = torch.randn(3, 3, 32, 32), torch.tensor([0.1, 0.4, 0.9])
    found = Teacher(bundle.model, bundle, 3.0).velocity(noisy, t, bundle.encode(CAPTIONS, packed=packed))
    for i, caption in enumerate(CAPTIONS):
        sampler = guided(bundle.model, bundle.encode([caption]), bundle.null_features(), 3.0)
        with torch.no_grad():
            expected = sampler(noisy[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-4, atol=1e-5)


def test_training_starts_from_the_teacher_and_learns_its_guided_velocity(
    tiny_run: Path, tiny_config: Make, tmp_path: Path
) -> None:
    cfg = tiny_config(distill=DistillConfig(teacher=str(tiny_run), guidance=4.0), batch=8, log_every=1)
    teacher = load_bundle(tiny_run, CPU)
    trainer = Trainer(cfg, tmp_path / "none")
    for (name, p), q in zip(trainer.model.named_parameters(), teacher.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    data = open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed)
    with closing(batches(data, cfg, trainer.world, trainer.codec, 0)) as loaded:
        batch = next(loaded)
    (part,) = trainer.prepare(batch)
    noisy, t = path(part.latents, part.noise, part.t), part.t
    dropped = batch.drop_uniform < cfg.prompt_dropout
    captions = ["" if drop else caption for caption, drop in zip(batch.captions, dropped, strict=True)]
    errors = []
    for i, caption in enumerate(captions):
        features, x = teacher.encode([caption]), noisy[i : i + 1]
        with torch.no_grad():
            wanted, own = (
                guided(teacher.model, features, teacher.null_features(), g)(x, t[i : i + 1]) for g in (4.0, 1.0)
            )
        errors.append((wanted - own).square().mean())
    assert trainer.loss(part).item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    start(replace(cfg, steps=40, optim=replace(cfg.optim, lr=2e-3)), tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.behaviour(
    "Training",
    when="a run that learns a teacher's guided velocity is stopped and resumed, or its teacher changes meanwhile",
    then="its weights are bitwise those of a run that never stopped; another teacher is refused",
)
def test_a_stopped_run_goes_on_with_the_same_teacher(tiny_run: Path, tiny_config: Make, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(tiny_run, tmp_path / "teacher"))
    cfg = tiny_config(distill=DistillConfig(teacher=str(teacher)), steps=4)
    whole = start(cfg, tmp_path / "whole")
    begin(cfg, tmp_path / "run")
    begin(cfg, tmp_path / "other")
    assert_same(whole, resume(tmp_path / "run"))
    shutil.rmtree(teacher)
    start(tiny_config(seed=7), teacher)
    with pytest.raises(ValueError, match="was started on other data or models: the teacher is a different one"):
        resume(tmp_path / "other")


def test_teachers_that_do_not_fit(tiny_run: Path, tiny_config: Make, tmp_path: Path) -> None:
    def refused(cfg: TrainConfig, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            start(replace(cfg, distill=DistillConfig(teacher=str(tiny_run))), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused(tiny_config("uniform"), "is another network, .* --config .*/config.json in place of a recipe")
    refused(tiny_config(null_prompt="nothing"), "or has another null prompt")
    other = tiny_config()
    refused(replace(other, text=replace(other.text, name_or_path="tiny:2x64x3")), "trained with another text encoder")
    with pytest.raises(ValueError, match="guidance is nan"):
        DistillConfig(guidance=float("nan"))


def test_a_distilled_model_says_so_when_it_is_guided_again(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fast"
    main(["train", "--config", str(tiny_run / "config.json"), "--distill.teacher", str(tiny_run), "--steps", "2",
          "--distill.guidance", "5", "--preview-every", "2", "--out", str(out)])  # fmt: skip
    assert (out / "samples" / "step-0000002.png").is_file()
    bundle = load_bundle(out, CPU)
    bundle.sample(["a red circle"], cfg=SampleConfig(steps=2, guidance=1.0))
    with pytest.warns(UserWarning, match=r"has learned guidance 5.0 \(.*\): sample it with guidance 1"):
        bundle.sample(["a red circle"], cfg=SampleConfig(steps=2, guidance=5.0))
