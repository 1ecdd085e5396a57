"""The study of scale small takes less than half an hour on one GPU: counted FLOPs at an assumed rate."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from semantic_routing.model.arms import ARMS, PAPER_ARMS
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import Backbone, DiTConfig
from semantic_routing.model.flops import META, count, count_image, count_language_model, count_text, qwen3_vl
from semantic_routing.sampling.text_to_image import check_encoder
from semantic_routing.study.plan import CALIBRATION, LOSS_TIMES, SCALES, Job, StudyArguments, jobs, stages
from semantic_routing.text.architecture import text_shape
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.metrics import flops_per_image
from semantic_routing.training.optim import OptimConfig, make_optimizers
from semantic_routing.training.recipes import SMALL_SAMPLING, small
from semantic_routing.training.tiny_lm import tiny_lm

RATE = 0.15 * 790e12
"""Assumed FLOP/s: the share of an H200's practical rate that networks this narrow reach."""
HALF_HOUR = 1800.0
START = 60.0
"""Seconds for a process to start, compile and check its images."""
LOAD = 20.0
"""Seconds for a process to start that compiles nothing and has no images: that of the losses."""
TOKENS = 16
"""Padded length of all captions and prompts; the longest has 13 tokens."""
MILLION = 1e6


@cache
def reading(prompts: int) -> int:
    """Count a forward pass of the tiny language model of ``tiny_lm``."""
    model = qwen3_vl(width=128, layers=8, heads=4, kv_heads=2, head_dim=32, mlp_width=384)
    return count_language_model(model, prompts, TOKENS).total


@cache
def network(model: DiTConfig) -> Backbone:
    """Return a network on the meta device."""
    with META:
        return make_model(model)


@cache
def muon(model: DiTConfig, optim: OptimConfig) -> int:
    """Count a step of the Muon optimiser."""
    for p in network(model).parameters():
        p.grad = torch.empty_like(p)
    return count(make_optimizers(network(model), optim)[1].step)[0].total


counted_per_image = cache(flops_per_image)


def step(cfg: TrainConfig) -> int:
    """Count a training step."""
    trained = cfg.batch * counted_per_image(cfg.model, cfg.image_size, cfg.image_size, TOKENS)
    return trained + reading(cfg.batch) + muon(cfg.model, cfg.optim)


@cache
def picture(model: DiTConfig, size: int) -> int:
    """Count a sampled image: guidance doubles it; the text is prepared at every step if routing depends on time."""
    text, context = count_text(network(model), 2, TOKENS)
    image = count_image(network(model), 2, size, size, context)
    steps = SMALL_SAMPLING.steps
    return reading(2) + text.total * (steps if network(model).depends_on_time else 1) + image.total * steps


def run(job: Job, n: int) -> tuple[int, int]:
    """Return the FLOPs of a run's training and of all its scores."""
    measured = int(CALIBRATION[1]) if "calibrated" in job.clocks else 0
    pictures = n * (1 + len(job.clocks)) + measured
    return job.config.steps * step(job.config), pictures * picture(job.config.model, job.config.image_size)


def test_all_arms_and_seeds_fit_into_half_an_hour(tmp_path: Path) -> None:
    args = StudyArguments(scale="small", out=tmp_path)
    every = jobs(args)
    assert len(every) == 7 * 3
    by_arm = {job.arm: run(job, args.n) for job in every if job.seed == 0}
    training, scoring = (sum(by_arm[job.arm][i] for job in every) for i in (0, 1))
    # The loss takes one forward pass without guidance for each of its times.
    share = len(LOSS_TIMES) / (2 * SMALL_SAMPLING.steps)
    losses = sum(share * args.n * picture(job.config.model, job.config.image_size) for job in every)
    seconds = (training + scoring + losses) / RATE
    commands = [stage.command[:2] for job in every for stage in stages(job, args)]
    light = commands.count(("evaluate", "loss"))
    processes = len(commands) - light
    assert seconds + (processes * START + light * LOAD) / SCALES["small"].at_once < HALF_HOUR
    # The numbers in the recipe's docstring.
    assert (processes, light) == (21 + 33 + 6, 21)
    assert step(small("depth")) == pytest.approx(1.08e12, rel=0.02)
    assert muon(small("depth").model, small("depth").optim) == pytest.approx(0.35e12, rel=0.02)
    assert by_arm["depth"][0] == pytest.approx(3.25e15, rel=0.02)
    assert training == pytest.approx(6.66e16, rel=0.02)
    assert scoring == pytest.approx(1.55e16, rel=0.02)
    assert round(seconds / 60) == 12


def test_the_count_follows_the_work(tmp_path: Path) -> None:
    args = StudyArguments(scale="small", out=tmp_path, arms=("joint",), seeds=1)
    (job,) = jobs(args)
    training, scoring = run(job, args.n)
    longer = replace(job, config=replace(job.config, steps=2 * job.config.steps))
    assert run(longer, args.n) == (2 * training, scoring)
    nominal = run(replace(job, clocks=()), args.n)[1]
    assert scoring == 3 * nominal + 128 * picture(job.config.model, job.config.image_size)


def test_the_network_has_tens_of_millions_of_parameters() -> None:
    sizes = {arm: sum(p.numel() for p in network(small(arm).model).parameters()) for arm in ARMS}
    assert round(sizes.pop("fusedit") / MILLION) == 37
    assert {round(size / MILLION) for size in sizes.values()} == {41, 42}


def test_every_arm_fits_the_tiny_language_model(tmp_path: Path) -> None:
    folder = tiny_lm(["a red circle", "a blue star"], steps=1, cache_dir=tmp_path)
    shape = text_shape(TextEncoderConfig(name_or_path=str(folder)))
    for arm in PAPER_ARMS:
        check_encoder(shape, small(arm).model)
