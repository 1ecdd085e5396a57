"""The text encoder's hook: the hidden state that a pipeline reads also carries the language model's layers.

Every pipeline crops, pads, repeats and concatenates its text without looking at the channels. So the layers are passed
as additional channels of the state, ``[.., C] -> [.., C (1 + L)]``, original first, and the transformer's hook removes
them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from semantic_routing.adopt.arguments import by_name
from semantic_routing.adopt.families.family import arguments_of
from semantic_routing.text.architecture import find_layers
from semantic_routing.text.taps import recorded

Wanted = Callable[[], tuple[int, ...]]
"""Function that returns the numbers of the layers to record, 1 to L."""


class Widening:
    """Widens the output of a text encoder by all layers that any of its routings currently needs."""

    def __init__(self, encoder: nn.Module, reads: tuple[int, ...]) -> None:
        """Prepare hooks for a text encoder.

        A pipeline reads the entries ``reads`` of its ``hidden_states``, or its last state if ``reads`` is empty.
        """
        self.encoder, self.reads = encoder, reads
        self.held: tuple[int, ...] = ()
        """Layers that were recorded last, 1 to L."""
        self._wanted: list[Wanted] = []
        self._handles: list[Any] = []
        self.layers = find_layers(encoder)[0]
        self._names = arguments_of(encoder)
        self._holder = next(m for m in encoder.modules() if any(child is self.layers for child in m.children()))
        self._recording: tuple[ExitStack, dict[nn.Module, Tensor], tuple[int, ...]] | None = None

    def join(self, wanted: Wanted) -> None:
        """Also record what a routing needs; the first one registers the hooks."""
        self._wanted.append(wanted)
        if len(self._wanted) == 1:
            self._handles = [
                self.encoder.register_forward_pre_hook(self._before, with_kwargs=True),
                self.encoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]

    def leave(self, wanted: Wanted) -> None:
        """Stop recording what a routing needs; the last one removes the hooks."""
        self._wanted.remove(wanted)
        if not self._wanted:
            for handle in self._handles:
                handle.remove()

    def _before(self, encoder: nn.Module, args: Any, kwargs: Any) -> None:
        given = by_name(self._names, args, kwargs)
        self._close()
        if given.get("past_key_values") is not None or given.get("use_cache"):
            return  # the model generates
        wanted = self.held = tuple(sorted({number for routing in self._wanted for number in routing()}))
        if wanted:
            stack = ExitStack()
            taps = nn.ModuleList([self.layers[number - 1] for number in wanted if number < len(self.layers)])
            if self._holder is not encoder:
                taps.append(self._holder)  # gives the last layer after the final norm
            self._recording = stack, stack.enter_context(recorded(taps)), wanted

    def _after(self, encoder: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        recording = self._close()
        if recording is None or output is None:
            return None
        states, wanted = recording
        mask = by_name(self._names, args, kwargs).get("attention_mask")
        held = [self._state(number, states, output) for number in wanted]
        if isinstance(mask, Tensor) and mask.ndim == 2:  # what padding holds is not to be routed
            held = [state * mask[..., None].to(state) for state in held]
        return self._widened(output, held)

    def _close(self) -> tuple[dict[nn.Module, Tensor], tuple[int, ...]] | None:
        """End the recording in progress and return what it holds."""
        recording, self._recording = self._recording, None
        if recording is None:
            return None
        recording[0].close()
        return recording[1:]

    def _state(self, number: int, states: dict[nn.Module, Tensor], output: Any) -> Tensor:
        """Return a layer's output; the last layer's is the model's own last state, after the final norm."""
        if number < len(self.layers):
            return states[self.layers[number - 1]]
        last = output if self._holder is self.encoder else states[self._holder]
        return last if isinstance(last, Tensor) else _last_state(last)

    def _widened(self, output: Any, held: Sequence[Tensor]) -> Any:
        """Return the encoder's output with the layers behind the states that the pipeline reads."""
        if not self.reads:
            last = _last_state(output)
            wide = torch.cat([last, *(state.to(last) for state in held)], -1)
            if isinstance(output, tuple):
                return (wide, *output[1:])
            output.last_hidden_state = wide
            return output
        if getattr(output, "hidden_states", None) is None:
            return None  # this call does not ask for the states that the pipeline reads
        entries = list(output.hidden_states)
        size = -(-len(held) // len(self.reads))
        for slot, entry in enumerate(self.reads):
            own = entries[entry]
            part = [state.to(own) for state in held[slot * size : (slot + 1) * size]]
            part += [torch.zeros_like(own)] * (size - len(part))
            entries[entry] = torch.cat([own, *part], -1)
        output.hidden_states = tuple(entries)
        return output


def widening_of(encoder: nn.Module, reads: tuple[int, ...]) -> Widening:
    """Return the widening of a text encoder; routings of two transformers that read the same states share one."""
    for hook in encoder._forward_pre_hooks.values():
        found = getattr(hook, "__self__", None)
        if isinstance(found, Widening) and found.reads == reads:
            return found
    return Widening(encoder, reads)


def _last_state(output: Any) -> Tensor:
    """Return the last state of a model's output."""
    state = getattr(output, "last_hidden_state", None)
    return output[0] if state is None else state
