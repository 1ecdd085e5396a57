"""Processes without checked annotations, forked from one that has imported the program: they start in no time.

Importing torch and the program takes seconds, so a server does it once for all tests of a process. Where a fresh
interpreter is the claim, a test starts one itself.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import socket
import tempfile
import time
import weakref
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PRELOAD = [
    "semantic_routing.training.loop",
    "semantic_routing.interop.pipeline",
    "semantic_routing.cli.sample",
    "transformers.models.qwen3.modeling_qwen3",
    "torch.utils.tensorboard",
    "torch._dynamo",
]
CHILD = str(Path(__file__).parent / "forked_child.py")
PATIENCE = 600.0
"""Seconds that a process may take, on a machine that does much else."""


def forking() -> ForkServerContext:
    """Return the server's context."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@dataclass
class Forked:
    """A running program: the code, what it calls ``sys.argv[1:]``, and further variables of its environment.

    Both outputs go to the end of ``log`` if it is given.
    """

    code: str
    args: tuple[object, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    log: Path | None = None

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="forked-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        program = {
            "code": self.code, "argv": ["-c", *map(str, self.args)], "cwd": os.getcwd(),
            "environment": os.environ | self.environment, "out": str(self.log or self.folder / "out"),
            "err": str(self.log or self.folder / "err"),
        }  # fmt: skip
        scope = {"PROGRAM": program}
        self.process: Any = forking().Process(target=runpy.run_path, args=(CHILD, scope, "__main__"), daemon=True)
        self.process.start()

    @property
    def out(self) -> str:
        """What it has written to the standard output so far."""
        return self._written("out")

    @property
    def err(self) -> str:
        """What it has written to the standard error so far."""
        return self._written("err")

    def _written(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.is_file() else ""

    def wait_for_output(self, lines: int = 1) -> None:
        """Return when it has written some lines to the standard output."""
        deadline = time.monotonic() + PATIENCE
        while self.out.count("\n") < lines:
            assert self.process.is_alive(), self.err
            assert time.monotonic() < deadline, self.err
            time.sleep(0.01)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.process.kill()
        self.process.join()

    def wait(self) -> int:
        """Return the exit code, negative for a signal."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.kill()
        return self.process.exitcode


MAIN = "import sys; from semantic_routing.cli.main import main; main(sys.argv[1:])"


def run(code: str, *args: object, **environment: str) -> str:
    """Run code to its end, which must be a good one; return what it wrote to the standard output."""
    process = Forked(code, args, environment)
    assert process.wait() == 0, process.err
    return process.out


def semroute(processes: int, *command: object) -> list[str]:
    """Run a command on several processes, as torchrun does; return what each wrote to the standard output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [Forked(MAIN, command, rank_environment(rank, processes, port)) for rank in range(processes)]
    for rank in ranks:
        assert rank.wait() == 0, rank.err
    return [rank.out for rank in ranks]


def rank_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables by which torchrun tells a process its rank."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()} | {
        "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"
    }  # fmt: skip
