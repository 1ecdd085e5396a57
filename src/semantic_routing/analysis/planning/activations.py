"""Counts the bytes that autograd saves for the backward pass, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from semantic_routing.model.dit import Backbone
from semantic_routing.model.flops import META, blank_features

HALF = 2
"""Bytes of a bfloat16 number."""
KEPT = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten._scaled_dot_product_flash_attention)
"""Operators whose outputs selective activation checkpointing saves."""


def saved_bytes(model: Backbone, size: int, tokens: int) -> dict[str, int]:
    """Return the bytes saved for backward of one image in bfloat16, for each kind of activation checkpointing.

    Checkpointing recomputes one block at a time, so the activations of one block are always added.
    """
    features = blank_features(model.cfg, 1, tokens, META).to(dtype=torch.bfloat16)
    x = torch.empty(1, model.cfg.channels, size, size, device=META, dtype=torch.bfloat16)
    t = torch.empty(1, device=META)
    with flash_attention():
        text, context = saved(model, lambda: model.prepare_text(features, t))
        with Outputs() as outputs:
            image, _ = saved(model, lambda: model(x, t, context))
    width, depth = model.cfg.width, model.cfg.depth
    inputs = (size // model.cfg.patch) ** 2 * width * HALF
    full = text + depth * inputs + image // depth
    return {"none": text + image, "selective": full + outputs.kept, "full": full}


def saved(model: nn.Module, run: Callable[[], Any]) -> tuple[int, Any]:
    """Return the bytes that autograd saves for a computation, each storage once, without weights; and its result."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), result


class Outputs(TorchDispatchMode):
    """Counts the bytes of the outputs of matrix products and attention, and of the largest output of any operator."""

    kept = largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count its first output."""
        result = func(*args, **(kwargs or {}))
        first = result if isinstance(result, Tensor) else result[0] if isinstance(result, tuple | list) else None
        size = first.untyped_storage().nbytes() if isinstance(first, Tensor) else 0
        self.kept += size if func.overloadpacket in KEPT else 0
        self.largest = max(self.largest, size)
        return result


@contextmanager
def flash_attention() -> Iterator[None]:
    """Use the fused attention of GPUs: on the meta device torch would save the matrix of scores."""

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, enable_gqa: bool = False) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    with patch("torch.nn.functional.scaled_dot_product_attention", attend):
        yield
