"""Made one ahead or in line: the same things in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from semantic_routing.training.prefetch import one_ahead, tensors_in


@dataclass(frozen=True)
class Made:
    number: int
    x: Tensor
    more: list[Tensor | None]


def test_in_line_nothing_is_made_before_it_is_asked_for() -> None:
    made: list[int] = []
    squares = one_ahead(lambda i: made.append(i) or i * i, range(3), torch.device("cpu"))
    assert next(squares) == 0
    assert made == [0]
    assert list(squares) == [1, 4]


def test_every_tensor_is_found() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    found = list(tensors_in((Made(1, a, [b, None]), "x", [c])))
    assert [x.numel() for x in found] == [1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_next_is_made_meanwhile_and_all_are_right() -> None:
    device = torch.device("cuda")
    asked: list[int] = []

    def make(i: int) -> Made:
        x = torch.full((1 << 20,), float(i), device=device)
        for _ in range(20):
            x = x * 1.0
        return Made(i, x, [x + 1])

    def items() -> Iterator[int]:
        for i in range(8):
            asked.append(i)
            yield i

    for i, made in enumerate(one_ahead(make, items(), device)):
        assert asked[-1] == min(i + 1, 7)
        scratch = [torch.randn(1 << 20, device=device) for _ in range(4)]  # memory that the side stream must not take
        assert made.number == i
        assert bool((made.x == i).all())
        assert bool((made.more[0] == i + 1).all())
        del scratch
