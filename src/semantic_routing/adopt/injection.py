"""The blocks' hooks: they replace a block's text, or add to it while the block runs.

The hooks read attributes of the block, and nothing that differs from block to block, so that ``torch.compile`` makes
one graph for all blocks of a class. A compiled block runs its hooks outside of its graph. They are not compiled there,
because that would make one graph for each. In a transformer that is compiled as a whole they are part of its graph.

Gradient checkpointing runs a block again in the backward pass, when its attributes may already be those of another
forward pass; ``bound`` binds them to the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from semantic_routing.adopt.arguments import replaced
from semantic_routing.adopt.families.family import Blocks

TEXT, ROWS = "_routed_text", "_routed_rows"
"""Attributes of a block: its text [B, N, W], or the addition to it; and its rows [B, N] in a shared sequence."""


def set_text(block: Any, text: Tensor | None, rows: Tensor | None = None) -> None:
    """Set the attributes that a block's hooks read."""
    setattr(block, TEXT, text)
    setattr(block, ROWS, rows)


def install(modules: Iterable[nn.Module], blocks: Blocks, adds: bool) -> list[Any]:
    """Register the hooks on blocks and return their handles; ``adds`` if their text is added to a stream."""
    _keep_out_of_graphs()
    names = blocks.arguments.split()
    place = names.index(blocks.text)
    before, after = partial(_add if adds else _read, blocks.text, place), partial(_take_off, blocks.output)
    handles = []
    for module in modules:
        set_text(module, None)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if adds:
            handles.append(module.register_forward_hook(after))
    return handles


def forget(modules: Iterable[nn.Module]) -> None:
    """Delete the attributes that the hooks read."""
    for module in modules:
        for name in (TEXT, ROWS):
            if hasattr(module, name):
                delattr(module, name)


def _read(name: str, place: int, block: Any, args: Any, kwargs: Any) -> Any:
    """Replace the text that a block reads."""
    text = block._routed_text
    return None if text is None else replaced(name, place, text, args, kwargs)


def _add(name: str, place: int, block: Any, args: Any, kwargs: Any) -> Any:
    """Add to the text in a block's stream."""
    added = block._routed_text
    if added is None:
        return None
    stream = kwargs[name] if name in kwargs else args[place]
    return replaced(name, place, _sum(stream, added, block._routed_rows), args, kwargs)


def _take_off(number: int | None, block: Any, args: Any, output: Any) -> Any:
    """Subtract the addition from the text that leaves a block; the block's own update stays."""
    added = block._routed_text
    if added is None:
        return None
    if number is None:
        return _sum(output, added, block._routed_rows, -1)
    if output[number] is None:  # the last block of SD3 returns no text
        return None
    changed = _sum(output[number], added, block._routed_rows, -1)
    return (*output[:number], changed, *output[number + 1 :])


def _sum(stream: Tensor, added: Tensor, rows: Tensor | None, sign: int = 1) -> Tensor:
    """Add to all rows of a stream, or to the given rows of each sample; with the sign -1, subtract."""
    if rows is None:
        return stream.add(added, alpha=sign)
    return stream.scatter_add(1, rows[..., None].expand(-1, -1, added.shape[-1]), added if sign == 1 else -added)


def _keep_out_of_graphs() -> None:
    """Tell torch not to compile the hooks on their own; they are still compiled as part of a caller's graph."""
    import torch._dynamo  # diffusers has done so before; here it would slow the first import down

    skip = getattr(torch._dynamo.eval_frame, "skip_code", None)  # without it each sum is a graph more
    for function in (_read, _add, _take_off, _sum, replaced):
        if skip is not None:
            skip(function.__code__)


def bound(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return a checkpointing function that stores a block's text for when the block is run again."""

    def with_text(run: Any, *args: Any, **kwargs: Any) -> Any:
        block = getattr(run, "__self__", run)  # some transformers pass ``block.__call__``
        text, rows = getattr(block, TEXT, None), getattr(block, ROWS, None)
        if text is None:
            return checkpoint(run, *args, **kwargs)

        def again(*inputs: Any, **options: Any) -> Any:
            now = getattr(block, TEXT), getattr(block, ROWS)
            set_text(block, text, rows)
            try:
                return run(*inputs, **options)
            finally:
                set_text(block, *now)

        return checkpoint(again, *args, **kwargs)

    with_text.unbound = checkpoint  # type: ignore[attr-defined]
    return with_text
