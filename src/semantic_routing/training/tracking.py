"""Where a run's metrics go: ``metrics.jsonl`` always, and TensorBoard, wandb or trackio as the run asks.

Only the first process of a job builds a ``Tracker``. Credentials are the services' own business (their login
commands and environment variables): none is read here, and what looks like one in a configuration is not sent.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import UInt8

from semantic_routing.common.extras import require
from semantic_routing.common.files import write_text
from semantic_routing.common.troubles import Troubles

Service = Literal["tensorboard", "wandb", "trackio"]
Row = dict[str, int | float]
"""One step's metrics, the step among them."""
METRICS, IDENTITY = "metrics.jsonl", "wandb.json"
PROJECT = "semantic-routing"
LIBRARIES = {
    "tensorboard": "tensorboard.summary.writer.event_file_writer",
    "wandb": "wandb",
    "trackio": "trackio",
}
"""What is imported for each service."""
SERVICES_OWN = (Exception,)
"""What services raise where they do not answer: whatever their libraries, and those libraries' libraries, think of."""
_SECRET = re.compile(r"(?<=://)[^/@\s]*@|(?<=[\w/])\?\S+")
"""In an address: user and password, and the query, where signed addresses keep their signature."""


class Board(Protocol):
    """One service that shows scalars and pictures by step."""

    @property
    def troubles(self) -> tuple[type[Exception], ...]:
        """What it raises, beside OSError, where it cannot do so."""
        ...

    def scalars(self, step: int, values: Mapping[str, int | float]) -> None:
        """Show a step's finite numbers."""

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        """Show one picture."""

    def close(self) -> None:
        """Hand over what is left."""


class Tracker:
    """A run's metrics by step; a context that closes what it opened."""

    def __init__(self, out: Path, step: int, services: Sequence[Service] = (), config: Any = None) -> None:
        """Go on after ``step``: later lines of the file are cut off, for they will come again.

        TensorBoard's files are written wherever it is installed; the other ``services`` get ``config``, the run's
        nested settings, too. ValueError where one is not installed or refuses.
        """
        self.path = out / METRICS
        self.troubles = Troubles()
        self._owed: list[str] = []
        """Lines that could not be written yet."""
        boards = {name: require(LIBRARIES[name], what=f"--track {name}", extra="track") for name in services}
        rows = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        kept = [row for row in rows if 0 <= _step(row) <= step]
        write_text(self.path, "".join(row + "\n" for row in kept))
        self.boards: list[Board] = []
        if find_spec("tensorboard") is not None:
            with self.troubles.survived(TensorBoard.__name__, ValueError):
                self.boards.append(TensorBoard(out, step))
        if "wandb" in boards:
            self.boards.append(Wandb(boards["wandb"], out, without_secrets(config)))
        if "trackio" in boards:
            self.boards.append(Trackio(boards["trackio"], out, step, without_secrets(config)))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        self._tell(lambda board: board.close())

    def write(self, row: Row) -> None:
        """Append one step's metrics, ``step`` among them; a number that is not finite is null in the file.

        What cannot be written is told once and written later, with the next row that can.
        """
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        self._owed.append(json.dumps({name: finite.get(name) for name in row}) + "\n")
        with self.troubles.survived(self.path):
            append(self.path, "".join(self._owed))
            self._owed.clear()
        step = int(row["step"])
        values = {name: value for name, value in finite.items() if name != "step"}
        self._tell(lambda board: board.scalars(step, values))

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        """Show a picture, such as a grid of samples, wherever pictures can be shown."""
        self._tell(lambda board: board.picture(step, name, picture))

    def _tell(self, act: Callable[[Board], None]) -> None:
        """Do something on every board; none of them can end the run."""
        for board in self.boards:
            with self.troubles.survived(type(board).__name__, *board.troubles):
                act(board)


def _step(row: str) -> int:
    """The step of a line of metrics; -1 of one that is none, such as the last before a crash."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def append(path: Path, text: str) -> None:
    """Add lines to a file, all or none of them; OSError where it cannot be written."""
    data = text.encode()
    with path.open("ab", buffering=0) as file:
        whole = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with suppress(OSError):
                file.truncate(whole)
            raise


class TensorBoard:
    """Event files in the run's folder."""

    troubles = ()

    def __init__(self, out: Path, step: int) -> None:
        require(LIBRARIES["tensorboard"], what="writing events", extra="track")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, int | float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, the same one after every resumption.

    Steps are a column rather than wandb's own counter, which drops steps that come again after a crash.
    """

    troubles = SERVICES_OWN

    def __init__(self, wandb: Any, out: Path, config: Any) -> None:
        self.wandb = wandb
        identity = out / IDENTITY
        known = json.loads(identity.read_text(encoding="utf-8")) if identity.is_file() else {}
        name = os.path.basename(out.absolute())
        try:
            self.run = wandb.init(
                project=PROJECT, name=name, id=known.get("id"), resume="allow", dir=str(out), config=config
            )
        except wandb.Error as error:
            raise ValueError(f"wandb: {error}; log in with `wandb login` or set WANDB_MODE=offline") from error
        write_text(identity, json.dumps({"id": self.run.id}) + "\n")
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, int | float]) -> None:
        self.run.log({"step": step, **values})

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        self.run.log({"step": step, name: self.wandb.Image(picture)})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio under the folder's name."""

    troubles = SERVICES_OWN

    def __init__(self, trackio: Any, out: Path, step: int, config: Any) -> None:
        self.trackio = trackio
        name, resume = os.path.basename(out.absolute()), "allow" if step else "never"
        self.run = trackio.init(project=PROJECT, name=name, resume=resume, config=config)

    def scalars(self, step: int, values: Mapping[str, int | float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        self.run.log({name: self.trackio.Image(picture)}, step=step)

    def close(self) -> None:
        self.run.finish()


def without_secrets(value: Any) -> Any:
    """Nested settings without user, password and query of the addresses (``scheme://...``) among them."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return _SECRET.sub("", value) if isinstance(value, str) and "://" in value else value
