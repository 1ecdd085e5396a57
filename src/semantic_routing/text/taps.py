"""Hidden states of a model's layers, recorded by hooks.

``output_hidden_states`` is not used, because the meaning of its last entry changed between transformers releases.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

_LOCK = threading.Lock()
_TAPPED: WeakSet[nn.Module] = WeakSet()
_CALL: ContextVar[dict[nn.Module, Any] | None] = ContextVar("_CALL", default=None)
"""Outputs of the layers in this thread's call in progress."""


@contextmanager
def recorded(modules: nn.ModuleList) -> Iterator[dict[nn.Module, Tensor]]:
    """Record the outputs of ``modules`` in this thread within the context."""
    with _LOCK:
        for module in modules:
            if module not in _TAPPED:
                module.register_forward_hook(_record)  # for good: it does nothing outside of this context
                _TAPPED.add(module)
    states: dict[nn.Module, Tensor] = {}
    token = _CALL.set(states)
    try:
        yield states
    finally:
        _CALL.reset(token)


def _record(module: nn.Module, inputs: Any, output: Any) -> None:
    if (states := _CALL.get()) is not None:
        states[module] = output[0] if isinstance(output, (tuple, list)) else output  # T5's blocks, GPT's
