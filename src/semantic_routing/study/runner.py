"""Runs the commands of a study, one run at a time on each device, with a live table. It can be resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from semantic_routing.common.config import read_config
from semantic_routing.common.errors import Interrupted, TrainingFailed
from semantic_routing.common.files import check_writable, write_text
from semantic_routing.common.locks import LOCK, claimed
from semantic_routing.common.stopping import stop_signals
from semantic_routing.evaluation.records import CORRECT, MANIFEST, SUMMARY
from semantic_routing.evaluation.scoring import read_manifest
from semantic_routing.study.keep import is_kept, keep, kept_file, kept_prompts, kept_records
from semantic_routing.study.plan import SCALES, Job, Stage, StudyArguments, config_text, evaluation_folder, jobs, stages
from semantic_routing.training.config import TrainConfig

POLL_SECONDS = 1.0
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"


@dataclass
class Progress:
    """Progress of a run."""

    job: Job
    state: str = WAITING
    stage: str = ""
    began: float = 0.0
    seconds: float = 0.0
    """Time since the run was started by this process."""
    process: subprocess.Popen[bytes] | None = None
    device: str = ""
    error: str = ""
    todo: list[Stage] = field(default_factory=list)


def run_study(args: StudyArguments) -> None:
    """Run the stages that are missing; finished stages are kept.

    Raises Interrupted after a signal, TrainingFailed if runs failed, and ValueError if the folder holds a study with
    other settings or is in use by another process.
    """
    check_writable(args.out)
    study_devices(args)
    every = [Progress(job) for job in jobs(args)]
    with claimed(args.out / LOCK, args.out), stop_signals(patient=True) as stop:
        _check_same(every, args)
        for progress in every:
            if not is_kept(args, progress.job):
                progress.todo = [stage for stage in stages(progress.job, args) if not stage.done.exists()]
            progress.state = WAITING if progress.todo else DONE
            if not progress.todo and not is_kept(args, progress.job):  # by an earlier version
                _keep(progress, args)
        _schedule(every, args, stop)
    failed = [progress for progress in every if progress.state == FAILED]
    if stop:
        raise Interrupted(f"stopped; resume with the same command: {args.out} keeps the finished stages", stop[0])
    if failed:
        one = failed[0]
        raise TrainingFailed(
            f"{len(failed)} of {len(every)} runs failed, the first {one.job.name} while {one.stage}: {one.error} "
            f"(its log is {_log(args, one.job)}); repeat the command to try them again"
        )


def _schedule(every: list[Progress], args: StudyArguments, stop: list[int]) -> None:
    """Keep every device busy until all runs have ended or a signal arrives."""
    free = study_devices(args)
    console = Console(stderr=True)
    try:
        with Live(console=console, refresh_per_second=2, auto_refresh=console.is_terminal) as live:
            while not stop and any(p.state in (WAITING, RUNNING) for p in every):
                for progress in every:
                    if progress.state == WAITING and free:
                        progress.state, progress.device, progress.began = RUNNING, free.pop(0), time.monotonic()
                        _launch(progress, args)
                    elif progress.state == RUNNING and _advance(progress, args):
                        free.append(progress.device)
                        if not console.is_terminal:
                            console.print(_line(progress, args), highlight=False)
                live.update(table(every, args))
                time.sleep(POLL_SECONDS)
            live.update(table(every, args), refresh=True)
    finally:
        _end(every)


CORES_A_RUN = 4
"""CPU cores for each run on a GPU: its main process, and processes that draw images and compile."""


def study_devices(args: StudyArguments) -> list[str]:
    """Return a device for each concurrent run: the requested devices, every GPU, or the CPU.

    Runs share a GPU up to the limits of the scale and of the CPU cores. ValueError for an unknown device.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in args.devices:
        if device not in ("cpu", *gpus):
            raise ValueError(f"there is no device {device!r} here; known: {', '.join(['cpu', *gpus])}")
    if args.devices:
        return list(args.devices)
    share = max(1, min(SCALES[args.scale].at_once, _cores() // (CORES_A_RUN * max(1, len(gpus)))))
    return gpus * share or ["cpu"]


def _visible(device: str) -> str:
    """Return CUDA_VISIBLE_DEVICES for a process on ``device``, whose number counts the GPUs visible here."""
    if device == "cpu":
        return ""
    number, seen = device.removeprefix("cuda:"), os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[int(number)].strip() if seen else number


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _launch(progress: Progress, args: StudyArguments) -> None:
    """Start the next stage of the run as a process that sees only its device."""
    stage = progress.todo[0]
    progress.stage = stage.what
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = _visible(progress.device)
    if (sharing := len(study_devices(args))) > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, _cores() // sharing))
    log = _log(args, progress.job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        command = [sys.executable, "-m", "semantic_routing", *stage.command]
        # In a new session: signals of the terminal reach only this process, which forwards them.
        progress.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def _advance(progress: Progress, args: StudyArguments) -> bool:
    """Start the next stage if the current one has ended; return whether the run has ended."""
    assert progress.process is not None
    progress.seconds = time.monotonic() - progress.began
    code = progress.process.poll()
    if code is None:
        return False
    stage = progress.todo[0]
    if code or not stage.done.exists():
        progress.state, progress.error = FAILED, _last_line(_log(args, progress.job), code)
        return True
    progress.todo.pop(0)
    if progress.todo:
        _launch(progress, args)
        return False
    _keep(progress, args)
    return True


def _keep(progress: Progress, args: StudyArguments) -> None:
    """Store what a finished run found; a run whose files are damaged has failed, and the others go on."""
    progress.stage = "storing its results"
    try:
        keep(args, progress.job)
    except (OSError, ValueError) as error:
        progress.state, progress.error = FAILED, str(error)
    else:
        progress.state = DONE


def _end(every: list[Progress]) -> None:
    """Send SIGTERM to the running processes, so that they save and exit, and wait for them."""
    running = [p.process for p in every if p.process is not None and p.process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        process.wait()


def _last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


def table(every: list[Progress], args: StudyArguments) -> Table:
    """Return a table of all runs and their progress."""
    found = Table("run", "state", "steps", "loss", "accuracy", "minutes", title=f"Study in {args.out}")
    for progress in every:
        step, loss = _training(args, progress.job)
        found.add_row(
            progress.job.name,
            f"{progress.stage} on {progress.device}" if progress.state == RUNNING else progress.state,
            f"{step} of {progress.job.config.steps}",
            loss,
            _accuracy(args, progress.job),
            f"{progress.seconds / 60:.1f}" if progress.seconds else "",
        )
    return found


def _line(progress: Progress, args: StudyArguments) -> str:
    end = progress.error if progress.state == FAILED else f"accuracy {_accuracy(args, progress.job)}"
    return f"{progress.job.name}: {progress.state} after {progress.seconds / 60:.1f} minutes, {end}"


def _training(args: StudyArguments, job: Job) -> tuple[int, str]:
    """Return step and loss of the last line of a run's metrics."""
    path = args.out / "runs" / job.name / "metrics.jsonl"
    if not path.is_file():
        return 0, ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line for line in file.read().splitlines() if line.startswith(b"{") and line.endswith(b"}")]
    if not lines:
        return 0, ""
    row = json.loads(lines[-1])
    return int(row["step"]), f"{row['loss']:.4f}" if "loss" in row else ""


def _accuracy(args: StudyArguments, job: Job) -> str:
    path = evaluation_folder(args, job) / SUMMARY
    if path.is_file():
        return f"{json.loads(path.read_text(encoding='utf-8'))['accuracy']['overall']:.3f}"
    if kept_file(args, job).is_file():
        scores = [record.scores[CORRECT] or 0.0 for record in kept_records(args, job)]
        return f"{sum(scores) / len(scores):.3f}"
    return ""


def _log(args: StudyArguments, job: Job) -> Path:
    return args.out / "logs" / f"{job.name}.log"


def _check_same(every: list[Progress], args: StudyArguments) -> None:
    """Write every run's configuration; ValueError if the folder has one with other settings, or other prompts."""
    for progress in every:
        path = args.out / "configs" / f"{progress.job.name}.json"
        # Read as settings: a file of an earlier version lacks those that came later.
        if path.is_file() and read_config(TrainConfig, path) != progress.job.config:
            raise ValueError(f"{path} has other settings than this study; choose another --out")
        write_text(path, config_text(progress.job))
        for clock in ("", *progress.job.clocks):
            folder = evaluation_folder(args, progress.job, clock)
            scored = read_manifest(folder / MANIFEST).get("prompts", {}).get("n") or kept_prompts(args, progress.job)
            if scored not in (None, args.n):
                raise ValueError(f"{folder} was scored on {scored} prompts; give --n {scored} or choose another --out")
