"""Several processes, really started: the same training as one, stopped and killed at will, nothing lost."""

from __future__ import annotations

import json
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from semantic_routing.checkpoint.load import EMA, MODEL, OPTIMIZER, RANDOM, checkpoints, find_checkpoint, read_state
from semantic_routing.checkpoint.safetensors_storage import SafetensorsReader
from semantic_routing.common.config import to_dict
from semantic_routing.common.distributed import World
from semantic_routing.common.errors import Interrupted
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.model.codec import PixelCodec
from semantic_routing.sampling.load import load_bundle
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.distill import DistillConfig
from semantic_routing.training.loop import batches, resume, start
from semantic_routing.training.optim import OptimConfig
from semantic_routing.training.parallelize import ParallelConfig
from tests.helpers.forked import forking, rank_environment

PATIENCE = 300.0
"""Seconds that any run of these tests may take."""
SCRIPT = str(Path(__file__).parents[1] / "helpers" / "training_rank.py")


@dataclass(frozen=True)
class Task:
    """What each process does: train ``config``, or resume where there is none."""

    out: str
    config: str = ""
    kill_at: int = 0
    """The step after which a process kills itself ..."""
    kill_file: int = 0
    """... or the file of a checkpoint that it kills itself in the midst of, counted from 1."""
    signal_at: int = 0
    """The step after which a process gets SIGTERM."""
    full_at: str = ""
    """The disk of a process is full when it writes a file whose path holds this."""
    victim: int = 0
    """The rank that all of this happens to."""


@dataclass(frozen=True)
class Ended:
    """How a run of several processes ended."""

    codes: list[int]
    output: str


def run(task: Task, processes: int, log: Path) -> Ended:
    """Run a task on several processes, forked from one that has imported the program.

    Where one ends badly the others are stopped, as torchrun stops them.
    """
    context = forking()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [log.with_suffix(f".{rank}.log") for rank in range(processes)]
    ranks = []
    for rank, path in enumerate(logs):
        path.unlink(missing_ok=True)
        own = {"rank": rank, "log": str(path), "environment": rank_environment(rank, processes, port)}
        scope = {"TASK": asdict(task) | own}
        ranks.append(context.Process(target=runpy.run_path, args=(SCRIPT, scope, "__main__"), daemon=True))
    for process in ranks:
        process.start()
    deadline = time.monotonic() + PATIENCE
    try:
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if any(process.exitcode for process in ranks):
                deadline = min(deadline, time.monotonic() + 5)
            time.sleep(0.02)
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        failed = any(process.exitcode for process in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    output = "".join(path.read_text() for path in logs if path.is_file())
    assert failed or not hung, f"ranks {hung} hung:\n{output}"
    return Ended([process.exitcode or 0 for process in ranks], output)


Make = Callable[..., TrainConfig]
MUON = OptimConfig(name="muon", lr=1e-2, muon_lr=0.02, warmup=3, decay="cosine")


def tensors(checkpoint: Path, *files: str) -> dict[str, Tensor]:
    """What files of a checkpoint hold, whole, however many processes wrote them."""
    return SafetensorsReader(checkpoint, [Path(name).stem for name in files]).tensors()


def assert_same(a: Path, b: Path) -> None:
    """Bitwise, weights, averages, optimiser states and random generators."""
    first, second = (tensors(folder, MODEL, EMA, OPTIMIZER, RANDOM) for folder in (a, b))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_close(a: Path, b: Path) -> None:
    """The same losses, and gradients but for what orthogonalising in bfloat16 makes of their rounding."""
    first, second = np.array(rows(a)), np.array(rows(b))
    np.testing.assert_array_equal(first[:, 0], second[:, 0])
    np.testing.assert_allclose(first[:, 1], second[:, 1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(first[:, 2], second[:, 2], rtol=3e-3)


def rows(run_: Path) -> list[tuple[int, float, float]]:
    """Step, loss and norm of the gradient."""
    lines = [json.loads(line) for line in (run_ / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in lines]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Ended]:
    """Trains a configuration on two processes, or as many as asked for, in a folder of the test's own."""

    def go(name: str, cfg: TrainConfig | None = None, processes: int = 2, **how: object) -> Ended:
        config = ""
        if cfg is not None:
            config = str(tmp_path / f"{name}.json")
            Path(config).write_text(json.dumps(to_dict(cfg)))
        return run(Task(out=str(tmp_path / name), config=config, **how), processes, tmp_path / f"{name}.log")

    return go


@pytest.fixture(scope="module")
def pair(tiny_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two processes; not to be changed."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "config.json").write_text(json.dumps(to_dict(often(tiny_config))))
    ended = run(Task(out=str(folder / "run"), config=str(folder / "config.json")), 2, folder / "log")
    assert ended.codes == [0, 0], ended.output
    return folder / "run"


def often(make: Make, **changes: object) -> TrainConfig:
    """Muon and an uneven division of the router, a checkpoint every second step."""
    return make(optim=MUON, checkpoint_every=2, keep=3, **changes)


# --- the same as one process ---


@pytest.mark.parametrize(
    ("arm", "changes", "processes"),
    [
        ("depth", {}, 2),
        ("joint", {"parallel": ParallelConfig(strategy="ddp"), "accumulate": 2, "optim": MUON}, 2),
        (
            "time",
            {"parallel": ParallelConfig(text_encoder="sharded", activation_checkpointing="selective"), "optim": MUON},
            2,
        ),
        ("fusedit", {"parallel": ParallelConfig(text_encoder="sharded", activation_checkpointing="full")}, 2),
        (
            "uniform",
            {"parallel": ParallelConfig(strategy="hsdp", shard_size=2, reshard_after_forward=False), "optim": MUON},
            4,
        ),
        ("depth-heads-kv", {"optim": MUON}, 2),
    ],
    ids=["fsdp", "ddp", "encoder", "fusedit", "hsdp", "finer"],
)
def test_several_processes_train_as_one_does(
    tiny_config: Make, tmp_path: Path, train: Callable[..., Ended], arm: str, changes: dict, processes: int
) -> None:
    cfg = tiny_config(arm, **changes, preview_every=4)
    alone = start(replace(cfg, parallel=ParallelConfig(), accumulate=1), tmp_path / "alone")
    ended = train("many", cfg, processes)
    assert ended.codes == [0] * processes, ended.output
    many = find_checkpoint(tmp_path / "many")
    assert len(rows(tmp_path / "many")) == cfg.steps
    assert_close(tmp_path / "many", tmp_path / "alone")
    first, second = tensors(alone, MODEL, EMA), tensors(many, MODEL, EMA)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-2)
    one, other = (
        np.asarray(Image.open(tmp_path / name / "samples/step-0000004.png"), dtype=int) for name in ("alone", "many")
    )
    assert np.abs(one - other).max() <= 2
    load_bundle(tmp_path / "many", torch.device("cpu"))


def test_several_processes_learn_from_one_teacher_as_one_does(
    tiny_config: Make, tiny_run: Path, tmp_path: Path, train: Callable[..., Ended]
) -> None:
    cfg = tiny_config(steps=3, log_every=1, distill=DistillConfig(teacher=str(tiny_run)))
    start(cfg, tmp_path / "alone")
    ended = train("many", cfg)
    assert ended.codes == [0, 0], ended.output
    assert_close(tmp_path / "many", tmp_path / "alone")


def test_parts_of_a_batch_lie_in_order_of_rank(tiny_config: Make) -> None:
    source, codec = open_data(DataConfig(), image_size=32, seed=42), PixelCodec()
    cfg = tiny_config(batch=12)

    def samples(count: int, step: int) -> list[tuple[int, ...]]:
        parts = [next(batches(source, cfg, World(rank, count), codec, step)).samples for rank in range(count)]
        return [sample for part in parts for sample in part]

    for step in (0, 7):
        assert len(set(samples(1, step))) == 12
        assert samples(1, step) == samples(2, step) == samples(3, step)


# --- stopping and going on ---


def test_a_signal_to_any_process_stops_all_with_one_word_and_a_checkpoint(
    tiny_config: Make, tmp_path: Path, train: Callable[..., Ended], pair: Path
) -> None:
    ended = train("stopped", often(tiny_config), signal_at=3, victim=1)
    assert ended.codes == [143, 143]
    assert ended.output.count("semroute: ") == ended.output.count("stopped at step 3 of 8 and wrote") == 1
    assert read_state(find_checkpoint(tmp_path / "stopped"))["step"] == 3
    assert train("stopped").codes == [0, 0]
    assert_same(find_checkpoint(pair), find_checkpoint(tmp_path / "stopped"))
    assert rows(pair) == rows(tmp_path / "stopped")


KILLS = random.Random(4).sample(range(1, 8), 3)


@pytest.mark.parametrize(("step", "processes"), [(KILLS[0], 1), (KILLS[1], 2), (KILLS[2], 2)])
def test_killed_and_resumed_is_bitwise_as_never_killed(
    tiny_config: Make, tmp_path: Path, train: Callable[..., Ended], pair: Path, step: int, processes: int
) -> None:
    ended = train("killed", often(tiny_config), processes, kill_at=step, victim=processes - 1)
    assert ended.codes[-1] == -9
    begun = bool(checkpoints(tmp_path / "killed"))
    assert train("killed", None if begun else often(tiny_config), processes).codes == [0] * processes
    whole = pair
    if processes == 1:
        whole = tmp_path / "whole"
        start(often(tiny_config), whole)
    # The generators of this process, unlike those of a fresh one, have a past.
    files = (MODEL, EMA, OPTIMIZER)
    a, b = (tensors(find_checkpoint(folder), *files) for folder in (whole, tmp_path / "killed"))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert rows(whole) == rows(tmp_path / "killed")


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_in_the_midst_of_writing_leaves_the_checkpoint_before(
    tiny_config: Make, tmp_path: Path, train: Callable[..., Ended], pair: Path, victim: int
) -> None:
    assert train("killed", often(tiny_config), kill_file=7, victim=victim).codes[victim] == -9
    folder = tmp_path / "killed" / "checkpoints"
    assert [path.name for path in checkpoints(tmp_path / "killed")] == ["step-0000002"]
    assert [path.name for path in folder.glob(".*")] == [".step-0000004.partial-0"]
    assert train("killed").codes == [0, 0]
    assert_same(find_checkpoint(pair), find_checkpoint(tmp_path / "killed"))
    assert list(folder.glob(".*")) == []


def test_a_disk_that_is_full_on_one_process_ends_all_with_one_word(
    tiny_config: Make, tmp_path: Path, train: Callable[..., Ended], pair: Path
) -> None:
    ended = train("full", often(tiny_config), full_at="step-0000006.partial-0/ema", victim=1)
    assert ended.codes == [2, 2]
    assert ended.output.count("semroute: ") == 1
    assert "ema-00002-of-00002.safetensors: No space left on device" in ended.output
    folder = tmp_path / "full" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000002", "step-0000004"]
    assert train("full").codes == [0, 0]
    assert_same(find_checkpoint(pair), find_checkpoint(tmp_path / "full"))


def test_two_processes_become_one(tiny_config: Make, tmp_path: Path, train: Callable[..., Ended], pair: Path) -> None:
    train("run", often(tiny_config), signal_at=3, victim=0)
    last = resume(tmp_path / "run")
    assert (last / MODEL).is_file()
    assert_close(tmp_path / "run", pair)
    assert read_state(last)["position"] == read_state(find_checkpoint(pair))["position"] == 32


def test_one_process_becomes_two(tiny_config: Make, tmp_path: Path, train: Callable[..., Ended], pair: Path) -> None:
    def stop(step: int) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start(often(tiny_config), tmp_path / "run", stop)
    assert train("run").codes == [0, 0]
    assert_close(tmp_path / "run", pair)
    assert read_state(find_checkpoint(tmp_path / "run"))["processes"] == 2


# --- beginning ---


def test_what_does_not_fit_is_said_once_and_ends_all(
    tiny_config: Make, train: Callable[..., Ended], pair: Path
) -> None:
    for cfg, message in (
        (tiny_config(batch=5), "a batch of 5 does not divide among 2 processes"),
        (tiny_config(parallel=ParallelConfig(strategy="none")), "the strategy none is for one process, not 2"),
        (tiny_config(data=DataConfig(paths=("/nowhere",))), "'/nowhere' does not exist"),
    ):
        ended = train("none", cfg)
        assert ended.codes == [2, 2]
        assert ended.output.count("semroute: ") == ended.output.count(message) == 1
    ended = run(Task(out=str(pair), config=str(pair / "config.json")), 2, pair.parent / "again")
    assert ended.codes == [2, 2]
    assert ended.output.count("already holds a run") == 1


def test_torchrun_and_the_command_line(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny_config(steps=3))))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", "-m", "semantic_routing", "train", "--config", str(tmp_path / "config.json")]
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "run/checkpoints/step-0000003")]
    assert read_state(find_checkpoint(tmp_path / "run"))["processes"] == 2
