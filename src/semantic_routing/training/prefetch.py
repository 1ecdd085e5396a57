"""Encodes the next batch on a side CUDA stream while the current step runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")
T = TypeVar("T")


def one_ahead(make: Callable[[S], T], items: Iterable[S], device: torch.device) -> Generator[T, None, None]:
    """Yield ``make`` of every item: on a GPU one item ahead on a side stream, on a CPU in line."""
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
            yield _hand_over(pending.pop(), side)
        pending.append(made)
    yield from (_hand_over(made, side) for made in pending)


def _hand_over(made: T, side: torch.cuda.Stream) -> T:
    """Make the current stream wait for the side stream, and keep the memory of ``made`` until it is used."""
    current = torch.cuda.current_stream()
    current.wait_stream(side)
    for x in tensors_in(made):
        x.record_stream(current)
    return made


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested dataclasses, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
