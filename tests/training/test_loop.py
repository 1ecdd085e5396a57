"""Training: exact resumption, stops that lose nothing, failures that spoil nothing, and that it learns."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import semantic_routing.checkpoint.safetensors_storage as storage
import semantic_routing.training.loop as module
from semantic_routing.checkpoint.load import EMA, MODEL, OPTIMIZER, checkpoints, find_checkpoint, read_state
from semantic_routing.common.config import read_config
from semantic_routing.common.errors import Interrupted, TrainingFailed
from semantic_routing.common.images.save import grid
from semantic_routing.common.stopping import ENDING
from semantic_routing.data.batch import Batch
from semantic_routing.data.damage import FILE as DAMAGED
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.data.draws import draw
from semantic_routing.data.loader import Loader
from semantic_routing.data.sources.index_writer import build
from semantic_routing.data.streams import WorldStream
from semantic_routing.flow import path
from semantic_routing.model.dit import Backbone
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import resume, start
from semantic_routing.training.metrics import reproducible
from semantic_routing.training.optim import OptimConfig
from semantic_routing.training.tiny_lm import training_corpus
from semantic_routing.training.trainer import Trainer, prepare
from tests.helpers.damaged import RECORDS, TEN, write_shards

Make = Callable[..., TrainConfig]
MUON = OptimConfig(name="muon", lr=1e-2, muon_lr=0.02, warmup=3, decay="cosine")


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds, by file and name."""
    return {
        f"{file}:{name}": tensor
        for file in (MODEL, EMA, OPTIMIZER)
        for name, tensor in load_file(checkpoint / file).items()
    }


def assert_same(a: Path, b: Path) -> None:
    """Bitwise, weights, averages and optimiser states."""
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, but for what the machine decides."""
    return [reproducible(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_at(step: int, number: signal.Signals = signal.SIGTERM) -> Callable[[int], None]:
    """Sends this process a real signal after a step."""
    return lambda finished: os.kill(os.getpid(), number) if finished == step else None


def stop_and_resume(cfg: TrainConfig, out: Path, *steps: int, number: signal.Signals = signal.SIGTERM) -> Path:
    """Train, but stopped by a signal after each of the steps and begun again."""
    begin = partial(start, cfg, out)
    for step in steps:
        with pytest.raises(Interrupted):
            begin(kill_at(step, number))
        assert read_state(find_checkpoint(out))["step"] == step
        begin = partial(resume, out)
    return begin()


# --- stopping and going on ---


ADAMW = OptimConfig(lr=1e-2)
MORE = [
    pytest.param(arm, optim, marks=pytest.mark.stress)
    for arm, optim in (("depth", MUON), ("joint", ADAMW), ("fusedit", ADAMW))
]


@pytest.mark.parametrize(("arm", "optim"), [("depth", ADAMW), ("joint", MUON), ("fusedit", MUON), *MORE])
def test_a_run_stopped_and_resumed_is_bitwise_one_that_never_stopped(
    tiny_config: Make, tmp_path: Path, arm: str, optim: OptimConfig
) -> None:
    cfg = tiny_config(arm, optim=optim)
    whole = start(cfg, tmp_path / "whole")
    resumed = stop_and_resume(cfg, tmp_path / "stopped", 3)
    assert read_state(whole)["step"] == read_state(resumed)["step"] == 8
    assert_same(whole, resumed)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")
    rows = metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, 9))
    rates = [1e-2 * min(1, (k + 1) / 3) * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert [row["lr"] for row in rows] == pytest.approx(rates if optim is MUON else [1e-2] * 8)


@pytest.mark.behaviour(
    "Training",
    when="a run with --minutes is stopped and resumed",
    then="it trains for the time that is left",
)
def test_a_time_limit_ends_a_run_and_its_rate_follows_the_clock(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of 10 s in a minute, half of them before a stop: six, with the rates of six."""
    cfg = tiny_config(optim=MUON, steps=100, minutes=1.0, checkpoint_every=100)
    for first, begin in ((0, partial(start, cfg)), (1000, resume)):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=partial(next, count(float(first), 10.0))))
        if first:
            last = begin(tmp_path)
        else:
            with pytest.raises(Interrupted):
                begin(tmp_path, kill_at(3))
    assert (read_state(last)["step"], read_state(last)["seconds"]) == (6, 60)
    rates = [1e-2 * min(1, (k + 1) / 3) * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx(rates)
    assert resume(tmp_path) == last
    # Steps that are asked for lift the limit that has ended the run, also when they are those of its configuration.
    same = shutil.copytree(tmp_path, tmp_path.with_name("same"))
    with pytest.raises(Interrupted):
        resume(same, kill_at(7), steps=100)
    assert read_state(find_checkpoint(same))["step"] == 7
    # More steps do, too, also for whoever resumes it next.
    with pytest.raises(Interrupted):
        resume(tmp_path, kill_at(8), steps=10)
    resumed = read_state(resume(tmp_path))
    assert (resumed["step"], resumed["config"]["steps"], resumed["config"]["minutes"]) == (10, 10, 0)
    rates = [1e-2 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(6, 10)]
    assert [row["lr"] for row in metrics(tmp_path)][6:] == pytest.approx(rates)
    assert read_config(TrainConfig, tmp_path / "config.json").minutes == 0
    said = capsys.readouterr().err
    assert "the run's time is over: it continues to step 10 without a time limit" in said
    assert f"after step 6 it continues at {rates[0] / 1e-2:.3g} of its peak instead of 0" in said


def test_the_toy_recipes_kind_of_run_resumes_exactly_in_bfloat16(tiny_config: Make, tmp_path: Path) -> None:
    """Muon, bfloat16 products and states, images predicted, blocks that see the time."""
    cfg = tiny_config(optim=MUON, precision="bf16")
    model = replace(cfg.model, prediction="image", conditioning="adaln-zero")
    cfg = replace(cfg, model=model, text=replace(cfg.text, dtype="bfloat16"))
    assert_same(start(cfg, tmp_path / "whole"), stop_and_resume(cfg, tmp_path / "stopped", 5))


def test_stops_at_any_steps_and_rare_averages_change_nothing(tiny_config: Make, tmp_path: Path) -> None:
    """Metrics every third step, an average every second, previews, three stops."""
    cfg = tiny_config("time", optim=MUON, log_every=3, ema_every=2, preview_every=3)
    whole = start(cfg, tmp_path / "whole")
    resumed = stop_and_resume(cfg, tmp_path / "stopped", 1, 2, 6, number=signal.SIGINT)
    assert_same(whole, resumed)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")
    assert [row["step"] for row in metrics(tmp_path / "whole")] == [3, 6, 8]
    for name in ("step-0000003.png", "step-0000006.png"):
        assert (tmp_path / "whole/samples" / name).read_bytes() == (tmp_path / "stopped/samples" / name).read_bytes()


@pytest.mark.behaviour(
    "Training",
    when="a signal ends the run: Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU, SIGQUIT",
    then="the step is finished, a checkpoint is written, and one line says how to resume",
)
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(
    tiny_config: Make, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "a run"
    handlers = [signal.getsignal(n) for n in ENDING]
    with pytest.raises(Interrupted) as stopped:
        start(tiny_config(), out, kill_at(3, number))
    assert stopped.value.number == number
    message = str(stopped.value)
    assert message.startswith(f"stopped at step 3 of 8 and wrote {out}/checkpoints/step-0000003; ")
    assert message.endswith(f"resume with: semroute train --resume '{out}'")
    assert [signal.getsignal(n) for n in ENDING] == handlers


def test_a_second_interrupt_does_not_wait_for_the_step(tiny_config: Make, tmp_path: Path) -> None:
    def twice(step: int) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start(tiny_config(), tmp_path / "run", twice)
    assert checkpoints(tmp_path / "run") == []


def test_a_signal_at_the_last_step_lets_the_run_finish(tiny_config: Make, tmp_path: Path) -> None:
    last = start(tiny_config(steps=2), tmp_path / "run", kill_at(2))
    assert read_state(last)["step"] == 2


def test_resuming_a_finished_run_changes_nothing(tiny_config: Make, tmp_path: Path) -> None:
    last = start(tiny_config(steps=2), tmp_path / "run")
    before = files(last), metrics(tmp_path / "run")
    assert resume(tmp_path / "run") == last
    assert (files(last), metrics(tmp_path / "run")) == before


def test_lines_written_after_the_last_checkpoint_come_again_once(tiny_config: Make, tmp_path: Path) -> None:
    """As after a crash: more lines than the checkpoint knows of, the last of them cut off."""
    run = tmp_path / "run"
    stop_and_resume(tiny_config(), run, 3)
    expected = metrics(run)
    with pytest.raises(Interrupted):
        start(tiny_config(), tmp_path / "crashed", kill_at(3))
    with (tmp_path / "crashed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    resume(tmp_path / "crashed")
    assert metrics(tmp_path / "crashed") == expected


def test_only_the_latest_checkpoint_is_resumed(tiny_config: Make, tmp_path: Path) -> None:
    last = start(tiny_config(checkpoint_every=1, keep=3, steps=4), tmp_path / "run")
    assert [read_state(folder)["step"] for folder in checkpoints(tmp_path / "run")] == [2, 3, 4]
    with pytest.raises(ValueError, match="step-0000002 is not its run's latest checkpoint"):
        resume(last.with_name("step-0000002"))
    assert resume(last) == last


# --- what a run leaves ---


def test_a_run_keeps_its_last_checkpoints_and_its_configuration(tiny_config: Make, tiny_run: Path) -> None:
    assert [read_state(folder)["step"] for folder in checkpoints(tiny_run)] == [4, 8]
    written = json.loads((tiny_run / "config.json").read_text())
    assert read_state(find_checkpoint(tiny_run))["config"] == written
    facts = json.loads((tiny_run / "manifest.json").read_text())
    assert facts["config"] == written
    assert (facts["seeds"], facts["from_step"]) == ({"run": 42}, 0)
    assert {"command", "versions", "hardware"} <= facts.keys()
    assert any((tiny_run / "tensorboard").iterdir())


def test_checkpoints_beyond_those_kept_are_deleted(tiny_config: Make, tmp_path: Path) -> None:
    start(tiny_config(steps=7, checkpoint_every=1, keep=2, keep_every=3), tmp_path / "run")
    assert [folder.name[-1] for folder in checkpoints(tmp_path / "run")] == ["3", "6", "7"]


def test_previews_show_the_average_and_leave_the_training_alone(tiny_config: Make, tmp_path: Path) -> None:
    cfg = tiny_config(steps=4, preview=SampleConfig(steps=2, guidance=2.0, batch=9), preview_every=4)
    last = start(cfg, tmp_path / "shown")
    assert_same(last, start(replace(cfg, preview_every=0), tmp_path / "plain"))
    assert not (tmp_path / "plain" / "samples").exists()
    (picture,) = (tmp_path / "shown" / "samples").iterdir()
    captions = open_data(cfg.data, image_size=32, seed=cfg.seed).captions(9)
    bundle = load_bundle(last, torch.device("cpu"))
    images = bundle.sample(captions, [(i, 0) for i in range(9)], cfg.preview)
    expected = grid(list(images.numpy()), columns=8).repeat(3, 0).repeat(3, 1)
    assert picture.name == "step-0000004.png"
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), expected)


def test_the_seed_decides_everything(tiny_config: Make, tiny_run: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)  # the global generator nothing
    same, other = start(tiny_config(), tmp_path / "same"), start(tiny_config(seed=43), tmp_path / "other")
    assert_same(find_checkpoint(tiny_run), same)
    first, second = load_file(same / MODEL), load_file(other / MODEL)
    random = [name for name in first if name.endswith(("qkv.weight", "kv.weight"))]
    assert len(random) == 4
    assert all(not torch.equal(first[name], second[name]) for name in random)
    assert metrics(tiny_run) == metrics(tmp_path / "same") != metrics(tmp_path / "other")


# --- failures ---


@contextmanager
def forward_passes(see: Callable[[int, Backbone, tuple[Any, ...]], object]) -> Iterator[None]:
    """Call ``see`` before each forward pass of training with its number from 1; what it returns replaces the inputs."""
    numbers = count(1)

    def before(module: nn.Module, args: tuple[Any, ...]) -> object:
        training = isinstance(module, Backbone) and torch.is_grad_enabled()
        return see(next(numbers), module, args) if training else None

    hook = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def nan_latents(*numbers: int) -> Iterator[None]:
    """Give these forward passes latents that are not finite."""

    def see(number: int, model: Backbone, args: tuple[Any, ...]) -> object:
        x, t, context = args
        return (x * math.nan, t, context) if number in numbers else None

    with forward_passes(see):
        yield


@pytest.mark.parametrize(
    ("poisoned", "step", "what"), [(5, 6, "the loss is nan"), (6, 6, "weights are no longer finite")]
)
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny_config: Make, tmp_path: Path, poisoned: int, step: int, what: str
) -> None:
    """In the middle, and just before a checkpoint would have been written."""
    run = tmp_path / "run"
    cfg = tiny_config(checkpoint_every=3, max_bad_steps=1)
    networks: list[Backbone] = []

    def poison(finished: int) -> None:
        if finished == poisoned:
            next(networks[-1].parameters()).data[0] = math.nan

    stopped = pytest.raises(TrainingFailed, match=f"stopped at step {step}: {what}")
    with forward_passes(lambda number, model, args: networks.append(model)), stopped as failed:
        start(cfg, run, poison)
    assert str(failed.value).endswith(f"the last good checkpoint is {run}/checkpoints/step-0000003")
    assert os.listdir(run / "checkpoints") == ["step-0000003"]
    assert_same(resume(run), start(cfg, tmp_path / "whole"))


def test_an_exploding_loss_stops_the_run(tiny_config: Make, tmp_path: Path) -> None:
    cfg = tiny_config(optim=OptimConfig(lr=1e30), max_bad_steps=1)
    with pytest.raises(TrainingFailed, match=r"at step [2-4]: the loss is (inf|nan).*no checkpoint had been written"):
        start(cfg, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == []


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny_config: Make, tmp_path: Path) -> None:
    cfg = tiny_config(max_bad_steps=3, optim=MUON, ema_every=100)
    trainer, twin = Trainer(cfg, tmp_path), Trainer(cfg, tmp_path)
    good = trainer.prepare(batch_of(cfg, 4))
    bad = [replace(good[0], latents=torch.full_like(good[0].latents, float("nan")))]
    assert trainer.advance(good)["skipped"] == twin.advance(good)["skipped"] == 0
    for skipped in (1, 2):
        row = trainer.advance(bad)
        assert (row["step"], row["skipped"]) == (1 + skipped, skipped)
        assert math.isnan(row["loss"])
    twin.step = trainer.step  # the schedule goes on; nothing else did
    assert trainer.advance(good) == twin.advance(good) | {"skipped": 2}
    for ours, theirs in ((trainer, twin), (twin, trainer)):
        for name, p in ours.bundle.model.named_parameters():
            assert torch.equal(p, dict(theirs.bundle.model.named_parameters())[name]), name
    trainer.advance(bad)
    trainer.advance(bad)
    with pytest.raises(TrainingFailed, match=r"at step 7: the loss is nan .*, for 3 steps in a row\. .*no checkpoint"):
        trainer.advance(bad)


def test_the_count_of_skipped_steps_outlives_a_stop(tiny_config: Make, tmp_path: Path) -> None:
    """Steps 3 to 5 have no finite loss; the run is stopped between them."""
    cfg = tiny_config(max_bad_steps=4)
    with nan_latents(3, 4, 5):
        whole = start(cfg, tmp_path / "whole")
    with nan_latents(3, 4, 5):
        assert_same(whole, stop_and_resume(cfg, tmp_path / "stopped", 4))
    rows = metrics(tmp_path / "whole")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 2, 3, 3, 3, 3]
    assert [row["loss"] is None for row in rows] == [False] * 2 + [True] * 3 + [False] * 3
    assert rows == metrics(tmp_path / "stopped")
    with nan_latents(3, 4, 5), pytest.raises(TrainingFailed, match=r"at step 5: .*for 3 steps in a row"):
        stop_and_resume(replace(cfg, max_bad_steps=3), tmp_path / "failed", 4)


def test_a_failed_write_leaves_the_checkpoint_before(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cfg = tmp_path / "run", tiny_config(checkpoint_every=3)
    save_file = storage.save_file

    def full(values: dict[str, Tensor], path: Path, header: dict[str, str] | None) -> None:
        if "step-0000006" in str(path) and path.name == OPTIMIZER:
            raise OSError(28, "No space left on device")
        save_file(values, path, header)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", full)
        with pytest.raises(ValueError, match=r"cannot write .*step-0000006.*: No space left on device"):
            start(cfg, run)
    assert os.listdir(run / "checkpoints") == ["step-0000003"]
    assert_same(resume(run), start(cfg, tmp_path / "whole"))


def test_what_is_written_beside_the_checkpoints_cannot_end_a_run(
    tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Metrics, samples and the list of damaged records, on a disk that is full from the second step on."""
    run, cfg = tmp_path / "run", tiny_config(preview_every=2, steps=6, checkpoint_every=3)

    def fill(step: int) -> None:
        if step == 1:
            (run / "metrics.jsonl").unlink()
            (run / "metrics.jsonl").symlink_to("/dev/full")
            (run / "samples").write_text("in the way")

    last = start(cfg, run, fill)
    assert_same(last, start(cfg, tmp_path / "whole"))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("semroute: ")]
    assert [line.split(": ")[1] for line in told] == [str(run / "metrics.jsonl"), str(run / "samples")]


@pytest.mark.behaviour(
    "Training",
    when="the terminal is closed or the disk of its output is full",
    then="the run continues without its progress bar",
)
def test_output_that_cannot_be_shown_cannot_end_a_run(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        start(tiny_config(steps=2), tmp_path / "run")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.write("\n")
        with pytest.raises(OSError, match="No space left"):
            full.close()
    assert find_checkpoint(tmp_path / "run").name == "step-0000002"


def test_a_run_killed_while_it_wrote_its_first_checkpoint_can_begin_again(tiny_config: Make, tmp_path: Path) -> None:
    remnant = tmp_path / "run" / "checkpoints" / ".step-0000004.partial-99"
    remnant.mkdir(parents=True)
    (remnant / MODEL).write_bytes(b"half")
    start(tiny_config(), tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-0000004", "step-0000008"]


def test_a_folder_with_a_run_is_not_begun_again(tiny_config: Make, tiny_run: Path) -> None:
    before = files(tiny_run)
    with pytest.raises(ValueError, match="already holds a run: resume it with `semroute train --resume"):
        start(tiny_config(), tiny_run)
    assert files(tiny_run) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"paths": ("nowhere",)}}, "nowhere' does not exist"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"model": {"channels": 4}}, "latents have 3 channels, but model.channels is 4"),
        ({"model": {"patch": 5}}, "32 x 32 do not divide into patches: model.patch is 5"),
        ({"model": {"arm": "fusedit", "fusedit_first_layer": 1}}, "needs 3 language-model layers, but there are 2"),
        ({"text": {"name_or_path": "nowhere"}}, "no text encoder at 'nowhere'"),
        ({"text": {"layers": "2..3"}}, "layers '2..3' must be an increasing choice from 1..2"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    tiny_config: Make, tmp_path: Path, change: dict, message: str
) -> None:
    cfg = tiny_config()
    parts = {name: replace(getattr(cfg, name), **value) if isinstance(value, dict) else value
             for name, value in change.items()}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        start(replace(cfg, **parts), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_buckets_whose_latents_do_not_divide_into_patches(tiny_config: Make, tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (40 + 20 * i, 40)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a picture")
    build([str(tmp_path)], tmp_path / ".semroute-index", look_inside=True, workers=1)
    cfg = tiny_config(data=DataConfig(paths=(str(tmp_path),), buckets=True, bucket_multiple=4))
    with pytest.raises(ValueError, match=r"patches of 8: data\.bucket_multiple is 4; use a larger one"):
        start(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unwritable_place_is_said_before_the_language_model_is_trained(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMROUTE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("in the way")
    cfg = tiny_config()
    with pytest.raises(ValueError, match="cannot write"):
        start(replace(cfg, text=replace(cfg.text, name_or_path="tiny")), tmp_path / "file" / "run")
    assert files(tmp_path) == {"file": b"in the way"}


# --- learning ---


def batch_of(cfg: TrainConfig, rows: int) -> Batch[Tensor]:
    return Loader(open_data(cfg.data, image_size=32, seed=0), batch=rows, noise_shape=(3, 32, 32)).load(0)


@pytest.mark.parametrize("arm", ["depth", "joint", "fusedit"])
def test_the_loss_of_a_fixed_batch_falls(tiny_config: Make, tmp_path: Path, arm: str) -> None:
    cfg = tiny_config(arm, optim=OptimConfig(lr=3e-3), steps=60)
    trainer = Trainer(cfg, tmp_path)
    batch = batch_of(cfg, 4)
    losses = [trainer.advance(trainer.prepare(batch))["loss"] for _ in range(cfg.steps)]
    assert losses[0] == pytest.approx(float((trainer.bundle.codec.encode(batch.images) - batch.noise).square().mean()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("arm", ["static", "depth", "time", "joint"])
def test_every_learned_router_moves_off_the_uniform_average(tiny_config: Make, tmp_path: Path, arm: str) -> None:
    cfg = tiny_config(arm, optim=OptimConfig(lr=1e-2, router_lr=1e-3))
    last = start(cfg, tmp_path / "run")
    fresh = Trainer(cfg, tmp_path).bundle.model
    saved = load_file(last / MODEL)
    names = [name for name in saved if name.startswith("router.")]
    assert len(names) == (4 if arm in ("time", "joint") else 1)
    for name, p in fresh.named_parameters():
        assert not torch.equal(p, saved[name]), name
    t = torch.tensor([0.0, 0.5, 1.0])
    router = load_bundle(tmp_path / "run", torch.device("cpu"), averaged=False).model.router
    weights = router.weights(t)
    assert (weights - 0.5).abs().max() > 1e-5
    if arm in ("time", "joint"):
        assert (weights[0] - weights[2]).abs().max() > 1e-5


def test_the_average_follows_the_weights(tiny_config: Make, tmp_path: Path) -> None:
    cfg = tiny_config(ema_decay=0.3, ema_every=2, steps=8)
    trainer = Trainer(cfg, tmp_path)
    name = "blocks.1.mlp.down.weight"
    weight = dict(trainer.bundle.model.named_parameters())[name]
    expected = weight.detach().clone()
    for step in range(1, 9):
        trainer.advance(trainer.prepare(batch_of(cfg, 2)))
        if step % 2 == 0:
            decay = min(0.3, (1 + step / 2) / (10 + step / 2))  # rises over the first updates
            expected = decay * expected + (1 - decay) * weight.detach()
        torch.testing.assert_close(trainer.ema[name], expected)


def test_prompts_are_dropped_where_the_draw_is_below_the_share(tiny_config: Make, tmp_path: Path) -> None:
    cfg = tiny_config(prompt_dropout=0.1, null_prompt="a picture")
    trainer = Trainer(cfg, tmp_path)
    batch = replace(batch_of(cfg, 4), drop_uniform=torch.tensor([0.0, 0.099, 0.101, 0.999]))
    for share, dropped in ((0.1, 2), (0.0, 0), (1.0, 4)):
        read = prepare(trainer.bundle, batch, replace(cfg, prompt_dropout=share)).features
        expected = trainer.bundle.encode(["a picture"] * dropped + batch.captions[dropped:], packed=True)
        assert torch.equal(read.mask, expected.mask)
        assert torch.equal(read.hidden, expected.hidden)
    draws = [draw(42, sample, 0, (1,)).drop_uniform for sample in range(4000)]
    assert np.mean(np.array(draws) < 0.1) == pytest.approx(0.1, abs=4 * (0.09 / 4000) ** 0.5)


# --- other data, other encoders ---


def test_real_photographs(tiny_config: Make, tmp_path: Path) -> None:
    """The pictures that scikit-image ships: colour and grey, PNG and JPEG, none of them square alike."""
    skimage = pytest.importorskip("skimage")
    photos = tmp_path / "photos"
    photos.mkdir()
    texts = {
        "astronaut.png": ["an astronaut", "a woman in an orange suit"],
        "coffee.png": "a cup of coffee",
        "chelsea.png": "a cat",
        "camera.png": "a man with a camera",
        "rocket.jpg": "a rocket",
    }
    for name in texts:
        (photos / name).write_bytes((Path(skimage.__file__).parent / "data" / name).read_bytes())
    rows = [json.dumps({"image": name, "text": text}) for name, text in texts.items()]
    (photos / "metadata.jsonl").write_text("\n".join(rows))
    cfg = tiny_config("uniform", data=DataConfig(paths=(str(photos),)), steps=6, preview_every=6)
    whole = start(cfg, tmp_path / "whole")
    assert_same(whole, stop_and_resume(cfg, tmp_path / "stopped", 2))
    assert all(np.isfinite(row["loss"]) for row in metrics(tmp_path / "whole"))
    assert (tmp_path / "whole" / "samples" / "step-0000006.png").is_file()


def test_damaged_records_are_trained_past_and_every_one_is_counted(tiny_config: Make, tmp_path: Path) -> None:
    shards = str(write_shards(tmp_path / "shards"))
    cfg = tiny_config(data=DataConfig(paths=(shards,)), batch=20, steps=RECORDS // 20, checkpoint_every=4)
    whole = start(cfg, tmp_path / "whole")
    state = read_state(whole)
    assert state["damaged"] == {"rows": RECORDS} | dict.fromkeys(TEN, 1)
    assert metrics(tmp_path / "whole")[-1]["damaged"] == len(TEN)
    assert len((tmp_path / "whole" / DAMAGED).read_text().splitlines()) == len(TEN)
    again = stop_and_resume(cfg, tmp_path / "stopped", 6)
    assert_same(whole, again)
    assert read_state(again)["damaged"] == state["damaged"]
    strict = replace(cfg, data=replace(cfg.data, max_damaged=0.01), batch=100, steps=12, checkpoint_every=12)
    with pytest.raises(TrainingFailed, match=r"50 of 10\d\d records could not be used .* more than the 1% allowed"):
        start(strict, tmp_path / "strict")


@pytest.mark.parametrize("arm", ["time-state", "joint-state"])
def test_a_state_aware_gate_learns_to_tell_the_time_and_resumes(tiny_config: Make, tmp_path: Path, arm: str) -> None:
    cfg = tiny_config(arm, steps=6)
    whole = start(cfg, tmp_path / "whole")
    assert_same(whole, stop_and_resume(cfg, tmp_path / "stopped", 3))
    trainer = Trainer(tiny_config(arm, steps=80, optim=OptimConfig(lr=1e-2)), tmp_path / "x")
    inputs = trainer.prepare(batch_of(trainer.cfg, 32))
    (part,) = inputs
    noisy = path(part.latents, part.noise, part.t)

    def error() -> float:
        return float((trainer.bundle.model.gate_time(noisy, part.t) - part.t).detach().abs().mean())

    before = error()
    for _ in range(80):
        trainer.advance(inputs)
    assert error() < 0.3 * before


def test_the_tiny_encoder_is_made_once_and_kept_with_the_run(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "training_corpus", lambda data: [f"a {i} circle" for i in range(40)])
    monkeypatch.setenv("SEMROUTE_CACHE", str(tmp_path / "cache"))
    cfg = tiny_config("S2")
    cfg = replace(cfg, text=replace(cfg.text, name_or_path="tiny:3x64x2"))
    with pytest.raises(Interrupted):
        start(cfg, tmp_path / "run", kill_at(3))
    (made,) = (tmp_path / "cache").iterdir()
    assert made.name.startswith("tiny-lm-")
    made.rename(tmp_path / "gone")
    (tmp_path / "run").rename(tmp_path / "moved")  # a run's folder holds all that it needs
    state = read_state(resume(tmp_path / "moved"))["config"]
    assert list((tmp_path / "cache").iterdir()) == []  # resuming reads the run's own copy
    assert (state["text"]["name_or_path"], state["model"]["arm"]) == ("tiny:3x64x2", "depth")
    assert (cfg.model.text_layers, state["model"]["text_layers"]) == (2, 3)  # the transformer follows the encoder
    images = load_bundle(tmp_path / "moved", torch.device("cpu")).sample(["a star"], [(0, 0)], SampleConfig(steps=2))
    assert images.shape == (1, 32, 32, 3)


def test_the_corpus_holds_stories_and_the_users_own_captions(tmp_path: Path) -> None:
    stories = training_corpus(open_data(DataConfig(), image_size=32, seed=0), 5)
    assert len(set(stories)) == 5
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"image": "a.png", "text": "my own picture"}')
    own = open_data(DataConfig(paths=(str(tmp_path),)), image_size=32, seed=0)
    assert training_corpus(own, 5) == [*stories, "my own picture"]
    mixed = open_data(DataConfig(paths=("words", str(tmp_path)), weights=(0.5, 0.5)), image_size=32, seed=0)
    corpus = training_corpus(mixed, 40)
    (world, _) = mixed.streams
    assert isinstance(world, WorldStream)
    assert corpus[40:] == [next(world.texts(1)), "my own picture", *list(world.texts(39))[1:]]
