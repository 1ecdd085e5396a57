"""What the frozen models make of the next batch, while the step of this one runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")
T = TypeVar("T")


def one_ahead(make: Callable[[S], T], items: Iterable[S], device: torch.device) -> Generator[T, None, None]:
    """``make`` of every item. On a GPU one of them ahead, on a stream of its own; on a CPU in line."""
    if device.type != "cuda":
        for item in items:
            yield make(item)
        return
    side = torch.cuda.Stream(device)
    pending: list[T] = []
    for item in items:
        with torch.cuda.stream(side):
            made = make(item)
        if pending:
            yield _handed_over(pending.pop(), side)
        pending.append(made)
    yield from (_handed_over(made, side) for made in pending)


def _handed_over(made: T, side: torch.cuda.Stream) -> T:
    """What the side stream made, for the current one to use: it waits, and the memory stays until it is done."""
    current = torch.cuda.current_stream()
    current.wait_stream(side)
    for x in tensors_in(made):
        x.record_stream(current)
    return made


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dataclasses, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
