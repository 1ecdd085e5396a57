"""CUDA graphs around a network, with a stand-in for CUDA's that records operators and runs them on the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semantic_routing.model.context import TextContext
from semantic_routing.model.dit import Backbone
from semantic_routing.model.runtime import CUDAGraphRunner
from semantic_routing.sampling.guidance import guided
from semantic_routing.sampling.samplers import euler, schedule
from semantic_routing.text.features import TextFeatures
from tests.helpers.networks import CountingModel, tiny_network


class Graph:
    """The operators of a capture; ``replay`` repeats them from and to the tensors of the capture."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for operator, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(operator(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


@pytest.fixture(autouse=True)
def cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        with Recorder(graph):
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


def text(model: Backbone, *lengths: int) -> TextFeatures:
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return TextFeatures(torch.randn(model.cfg.text_layers, len(lengths), longest, model.cfg.text_width), mask)


def test_a_graph_follows_its_inputs_and_is_captured_again_for_other_sizes() -> None:
    model = tiny_network("joint")
    eager, counting, runner = deepcopy(model), CountingModel(model), CUDAGraphRunner(model)
    found, expected = [], []
    for batch in (2, 2, 2, 2, 1, 1, 1, 2):
        x, t = torch.randn(batch, 3, 8, 8), torch.rand(1)
        context = eager.prepare_text(text(eager, *(3, 9)[-batch:]), t)
        found.append(runner(x, t, context))
        expected.append(eager(x, t, context))
    # Compared at the end: a later call must not write into an earlier one's result.
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # The network itself ran at the first call of each size and at the capture; all others were replays.
    assert counting.rows == [2, 2, 1, 1, 2]


def test_a_graph_of_text_without_mask_is_for_one_length() -> None:
    model = tiny_network()
    eager, runner = deepcopy(model), CUDAGraphRunner(model)
    for length in (3, 3, 3, 5, 5, 3):
        x, t, context = torch.randn(2, 3, 8, 8), torch.rand(1), eager.prepare_text(text(eager, length, length))
        bare = TextContext(context.keys, context.values, None)
        assert torch.equal(runner(x, t, bare), eager(x, t, bare))


@pytest.mark.parametrize("arm", ["depth", "joint", "time-state"])
def test_a_guided_sampler_takes_the_same_steps_from_a_graph(arm: str) -> None:
    model, times = tiny_network(arm), schedule(6)
    prompts, null, x = text(model, 3, 9), text(model, 1), torch.randn(2, 3, 8, 8)
    expected = euler(guided(model, prompts, null, 3.0, times=times), x, times)
    model.use_cuda_graph = True
    counting = CountingModel(model)
    assert torch.equal(euler(guided(model, prompts, null, 3.0, times=times), x, times), expected)
    assert counting.calls == 2
