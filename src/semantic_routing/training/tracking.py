"""Writes a run's metrics: always to ``metrics.jsonl``, and to TensorBoard, wandb or trackio.

Only the first process of a job has a ``Tracker``. Credentials are handled by the services (login commands, environment
variables): this program reads none, and those in URLs of a configuration are not sent.
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
"""Module to import for each service."""
SERVICES_OWN = (Exception,)
"""Exceptions of services that do not answer; their libraries document no narrower type."""
_SECRET = re.compile(r"(?<=://)[^/@\s]*@|(?<=[\w/])\?\S+")
"""In an address: user and password, and the query, which holds the signature of signed addresses."""


class Board(Protocol):
    """A service that shows scalars and images by step."""

    @property
    def troubles(self) -> tuple[type[Exception], ...]:
        """Exceptions besides OSError that it raises if it fails."""
        ...

    def scalars(self, step: int, values: Mapping[str, int | float]) -> None:
        """Show a step's finite numbers."""

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        """Show one picture."""

    def close(self) -> None:
        """Flush and close."""


class Tracker:
    """Writes a run's metrics by step; a context manager that closes the services."""

    def __init__(self, out: Path, step: int, services: Sequence[Service] = (), config: Any = None) -> None:
        """Continue after ``step``: later lines of the file are removed, because those steps will be logged again.

        TensorBoard's files are written if it is installed; the other ``services`` also receive ``config``, the run's
        nested settings. Raises ValueError if a service is not installed or refuses the connection.
        """
        self.path = out / METRICS
        self.troubles = Troubles()
        self._pending: list[str] = []
        """Lines that could not be written so far."""
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
        self._on_boards(lambda board: board.close())

    def write(self, row: Row) -> None:
        """Append one step's metrics, including ``step``; NaN and infinite numbers are null in the file.

        A failure to write is reported once, and the row is written together with the next one that can be written.
        """
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        self._pending.append(json.dumps({name: finite.get(name) for name in row}) + "\n")
        with self.troubles.survived(self.path):
            append(self.path, "".join(self._pending))
            self._pending.clear()
        step = int(row["step"])
        values = {name: value for name, value in finite.items() if name != "step"}
        self._on_boards(lambda board: board.scalars(step, values))

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        """Show an image, such as a grid of samples, on all services."""
        self._on_boards(lambda board: board.picture(step, name, picture))

    def _on_boards(self, act: Callable[[Board], None]) -> None:
        """Run ``act`` on every board; a failure is reported and does not end the run."""
        for board in self.boards:
            with self.troubles.survived(type(board).__name__, *board.troubles):
                act(board)


def _step(row: str) -> int:
    """Return the step of a line of metrics; -1 for an invalid line, such as the last before a crash."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def append(path: Path, text: str) -> None:
    """Append lines to a file, all or none of them; raise OSError if it cannot be written."""
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
    """A run of Weights & Biases, which is continued when the training run is resumed.

    The step is logged as a column instead of wandb's own counter, because that drops steps that are repeated after a
    crash.
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
    """A run of trackio with the name of the folder."""

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
    """Remove user, password and query from the addresses (``scheme://...``) in nested settings."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return _SECRET.sub("", value) if isinstance(value, str) and "://" in value else value
