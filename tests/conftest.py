"""What all tests share: checked annotations, a fixed seed, the reference material beside the repository."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest
import torch

if TYPE_CHECKING:
    from semantic_routing.training.config import TrainConfig

# Nothing is ever asked of the hub: a name that is no folder fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"

# Before anything imports the package: every annotated shape and type is checked while tests run.
jaxtyping.install_import_hook("semantic_routing", "beartype.beartype")

# As from a terminal: a shell's background jobs and nohup ignore some of these, and so would all that tests start.
for number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# torch counts the host's cores, also where this process may use only some of them.
torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run it: annotations are not checked, so that the program's own messages are heard."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of facts and golden cases: ``shared`` beside the repository, or ``$SEMROUTE_SHARED``."""
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
    """Folder of a language model of 2 layers of 64, in float32."""
    from semantic_routing.training.tiny_lm import tiny_lm

    return tiny_lm(CAPTIONS, layers=2, width=64, steps=5, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_config(tiny_encoder: Path) -> Callable[..., TrainConfig]:
    """Makes the configuration of a run of 8 steps in float32 that takes about a second: (arm, **changes)."""
    from semantic_routing.training.recipes import debug

    def make(arm: str = "depth", **changes: Any) -> TrainConfig:
        cfg = debug(arm)
        text = replace(cfg.text, name_or_path=str(tiny_encoder))
        return replace(cfg, **({"text": text, "preview_every": 0, "device": "cpu"} | changes))

    return make


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of the depth-wise arm; not to be changed."""
    from semantic_routing.training.loop import start

    out = tmp_path_factory.mktemp("runs") / "tiny"
    start(tiny_config(), out)
    return out


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="print golden losses instead of comparing them")
