"""Shared fixtures: checked annotations, a fixed seed, tiny models and runs, reference data."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest
import torch

from tests.helpers.checked import check_arrays

if TYPE_CHECKING:
    from semantic_routing.training.config import TrainConfig

# No test reaches the hub: a name that is not a folder fails immediately.
os.environ["HF_HUB_OFFLINE"] = "1"

# Before the package is imported: tests check every annotated shape at run time.
check_arrays("semantic_routing")

# Nothing is written through to the disk: no test outlives a loss of power, and thousands of files would be waited for.
os.fsync = lambda handle: None

# Handlers as in a terminal: background jobs and nohup ignore some signals, and child processes would inherit that.
for number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# torch counts all cores of the host, but this process may be limited to some.
torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed every test, so that it draws the same numbers alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train language models of runs on few texts: 20,000 take seconds to write and to tokenise."""
    from semantic_routing.training import loop

    monkeypatch.setattr(loop, "training_corpus", partial(loop.training_corpus, size=300))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the checks of annotations off, as for users, so that the program's own errors appear."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write figures as empty files, for tests of their numbers and names: drawing takes most of an analysis."""

    def save(figure: object, target: Any, **options: object) -> None:
        if options.get("format") == "svg":
            target.write("<svg></svg>")
        else:
            Path(target).touch()

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference facts and golden cases: ``shared`` beside the repository, or ``$SEMROUTE_SHARED``."""
    folder = Path(os.environ.get("SEMROUTE_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set SEMROUTE_SHARED to the one that holds golden/")
    return folder


CAPTIONS = [
    f"a {color} {shape} {place} a {other} circle"
    for color in ("red", "blue", "green", "gray")
    for shape in ("square", "star", "circle")
    for place in ("above", "below", "left of")
    for other in ("white", "black")
]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a language model with 2 layers of width 64, in float32."""
    from semantic_routing.training.tiny_lm import tiny_lm

    return tiny_lm(CAPTIONS, layers=2, width=64, steps=5, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_config(tiny_encoder: Path) -> Callable[..., TrainConfig]:
    """Function (arm, **changes) that makes the configuration of a one-second run: 8 steps in float32."""
    from semantic_routing.training.recipes import debug

    def make(arm: str = "depth", **changes: Any) -> TrainConfig:
        cfg = debug(arm)
        text = replace(cfg.text, name_or_path=str(tiny_encoder))
        return replace(cfg, **({"text": text, "preview_every": 0, "device": "cpu"} | changes))

    return make


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of the depth-wise arm; read-only."""
    from semantic_routing.training.loop import start

    out = tmp_path_factory.mktemp("runs") / "tiny"
    start(tiny_config(), out)
    return out


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="print golden losses instead of comparing them")
