"""The transformer's hooks: they separate the layers from the text, and compute and store each block's text.

Nothing else of a pipeline is changed, so that all pipelines around the same transformer are adopted with it. Code that
needs the transformer's weights runs inside of its forward pass, where offloading has loaded them: in a hook of the last
module of the entrance (the text's way to the transformer's width), which runs before any block that reads the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from semantic_routing.adopt import injection
from semantic_routing.adopt.arguments import by_name, replaced
from semantic_routing.adopt.families.family import Blocks, Family, arguments_of, module_at
from semantic_routing.adopt.moments import restyled
from semantic_routing.adopt.prompts import Layout, Prompt, Prompts, versions
from semantic_routing.adopt.routing import ATTRIBUTE, Routing
from semantic_routing.adopt.weights import REINJECT


class Mechanism:
    """The hooks of one transformer and their state between the beginning and the end of a forward pass."""

    def __init__(self, family: Family, transformer: nn.Module, routing: Routing, held: Callable[[], tuple[int, ...]]):
        """Prepare hooks; ``held`` returns the layers that the text encoder has recorded last."""
        facts = routing.facts
        self.family, self.transformer, self.routing, self.held = family, transformer, routing, held
        self.layout = Layout(facts.slots, facts.width, facts.layers, facts.rows)
        self.entrance = [module_at(transformer, path) for path in family.entrance]
        self.blocks: list[tuple[Any, Blocks]] = readers(family, transformer)
        self._names = arguments_of(transformer)
        self._place = self._names.index(family.text)
        self._prompts = Prompts()
        self._now: tuple[Prompt, dict[str, Any]] | None = None
        self._set = False
        self._embedding = False

    def install(self) -> list[Any]:
        """Register the hooks and return their handles."""
        plain = torch.compiler.disable(reason=NOT_COMPILED)
        handles = [
            self.transformer.register_forward_pre_hook(plain(self._begin), with_kwargs=True),
            self.transformer.register_forward_hook(plain(self._end), always_call=True),
        ]
        if self.entrance:
            handles.append(self.entrance[-1].register_forward_hook(plain(self._enter)))
        for blocks in self.family.blocks:
            modules = [module for module, spec in self.blocks if spec is blocks]
            handles += injection.install(modules, blocks, adds=bool(self.family.entrance) and not self._reads)
        return handles

    @property
    def _reads(self) -> bool:
        return self.family.kind == "read"

    def narrow(self, other: nn.Module) -> list[Any]:
        """Register a hook that removes the layers from the text of another component, and return its handle."""
        names = arguments_of(other)

        def narrowed(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if ATTRIBUTE in module._modules:
                return None  # adopted as well: its own routing takes them off
            text = by_name(names, args, kwargs).get(self.family.text)
            kept = None if text is None else self.layout.layers_behind(text, self.held())
            if not kept:
                return None
            return replaced(
                self.family.text, names.index(self.family.text), self.layout.unpacked(text, kept).original, args, kwargs
            )

        return [other.register_forward_pre_hook(narrowed, with_kwargs=True)]

    def forget(self) -> None:
        """Remove what the hooks have left on modules, and the checkpointing function's wrapper."""
        injection.forget(module for module, _ in self.blocks)
        function = getattr(self.transformer, "_gradient_checkpointing_func", None)
        if hasattr(function, "unbound"):
            self.transformer._gradient_checkpointing_func = function.unbound  # type: ignore[union-attr]

    def _begin(self, transformer: Any, args: Any, kwargs: Any) -> Any:
        given = by_name(self._names, args, kwargs)
        text = given.get(self.family.text)
        if text is None:
            return None
        check_parallel(transformer)
        self._bind_checkpointing()
        prompt = self._native(text) if self.family.native else self._packed(text)
        if prompt is None:
            return None
        self._now = prompt, given
        if not self.entrance:
            self._set_texts()
        if self.family.native:
            return None
        return replaced(self.family.text, self._place, prompt.original, args, kwargs)

    def _enter(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._now is not None and not self._embedding:
            self._set_texts()

    def _end(self, transformer: nn.Module, args: Any, output: Any) -> None:
        self._now = None
        if self._set:
            for module, _ in self.blocks:
                injection.set_text(module, None)
            self._set = False

    def _bind_checkpointing(self) -> None:
        """Wrap the checkpointing function, which may be replaced at any time, unless it is already wrapped."""
        if not (torch.is_grad_enabled() and getattr(self.transformer, "gradient_checkpointing", False)):
            return
        function = self.transformer._gradient_checkpointing_func
        if not hasattr(function, "unbound"):
            self.transformer._gradient_checkpointing_func = injection.bound(function)  # type: ignore[arg-type, assignment]

    def _packed(self, text: Any) -> Prompt | None:
        """Return a prompt whose channels hold layers, or None for a plain text that is left unchanged."""
        kept = self.layout.layers_behind(text, self.held())
        if kept is None:
            raise ValueError(self._widths(text))
        if not kept and not self._plain_is_enough():
            return None
        prompt = self._prompts.get(text, kept)
        if prompt is None:
            prompt = self.layout.unpacked(text, kept)
            if not prompt.states.requires_grad:
                self._prompts.put(text, kept, prompt)
        return prompt

    def _plain_is_enough(self) -> bool:
        """Return whether to route a text without layers; raise ValueError if that needs its missing layers."""
        if self._trains_weights():
            raise ValueError(MISSING)
        if self.routing.depends_on_time:
            if self.routing.wanted() and self.routing.scale and self._moves_at_some_time():
                raise ValueError(MISSING)
            return False
        change, blocks = self.routing.change(None)
        if not blocks:  # as at every step of an untrained model: without waiting for the device
            return False
        if self.routing.facts.arm != REINJECT and bool((change != 0).any()):
            raise ValueError(MISSING)
        return True

    def _moves_at_some_time(self) -> bool:
        device = next(self.routing.parameters()).device
        return bool((self.routing.weights(torch.linspace(0, 1, 11, device=device))[..., 0] != 1).any())

    def _native(self, text: Any) -> Prompt | None:
        """Return the prompt of a pipeline that passes all layers, or None if no block reads another text."""
        if not self.routing.depends_on_time and not self.routing.change(None)[1]:
            return None
        prompt = self._prompts.get(text, None)
        if prompt is None:
            assert self.family.native is not None
            facts = self.routing.facts
            states, origins, before = self.family.native(self.transformer, text, facts.layers)
            if (len(states) - before, states.shape[-1]) != (facts.layers, facts.width):
                raise ValueError(
                    f"{self.family.text} holds {len(states) - before} layers of width {states.shape[-1]}, but this "
                    f"routing reads {facts.layers} layers of width {facts.width}: use the pipeline's own text encoder"
                )
            kept = tuple(range(1, facts.layers + 1))
            prompt = Prompt(text, states, origins, kept, None, [states.shape[2]] * states.shape[1])
            self._prompts.put(text, None, prompt)
        return prompt

    def _widths(self, text: Any) -> str:
        facts = self.routing.facts
        found = (text[0] if isinstance(text, list | tuple) else text).shape[-1]
        plain = facts.slots * facts.width
        whole = facts.slots * facts.width * (1 + -(-facts.layers // facts.slots))
        return (
            f"{self.family.text} has width {found}, but the routing expects {whole} (the state that the model read and "
            f"{facts.layers} layers) or {plain} (the state alone): encode the prompt again with the adopted pipeline"
        )

    def _set_texts(self) -> None:
        """Store at each block the text that it reads."""
        assert self._now is not None
        prompt, given = self._now
        t = self._time(given) if self.routing.depends_on_time else None
        change, active = self.routing.change(t)
        if not active:
            return
        place = self.family.place
        places = None if place is None else tuple(place(self.transformer, given, prompt.lengths))
        key = None
        if t is None and not torch.is_grad_enabled():
            key = (self.routing.key(), places, *map(_fingerprint, self.entrance))
        texts = prompt.texts.get(key) if key else None
        if texts is None:
            texts = self._placed(prompt, change, active, places)
            prompt.texts = {key: texts} if key else {}
        self._set = True
        for block, (text, rows) in zip(active, texts, strict=True):
            injection.set_text(self.blocks[block][0], text, rows)

    def _placed(
        self, prompt: Prompt, change: Tensor, active: list[int], places: Sequence[tuple[int, int]] | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return each active block's text, and its rows if the block's sequence is shared with the image."""
        self._check_layers(prompt, change)
        self._embedding = True
        try:
            texts = list(self._texts(prompt, change, active))
        finally:
            self._embedding = False
        if places is None:
            return [(text, None) for text in texts]
        rows, valid = _rows(prompt, places)
        joint = [self.blocks[block][1].joint for block in active]
        return [
            (text.masked_fill(~valid[..., None], 0), rows) if shared else (text, None)
            for text, shared in zip(texts, joint, strict=True)
        ]

    def _check_layers(self, prompt: Prompt, change: Tensor) -> None:
        """Raise ValueError if a prompt was encoded without a layer that now has a weight or is to be trained."""
        missing = [number for number in range(1, self.routing.facts.layers + 1) if number not in prompt.kept]
        if missing and (self._trains_weights() or bool((change[..., missing] != 0).any())):
            raise ValueError(MISSING)

    def _trains_weights(self) -> bool:
        return self.routing.trains() and any(p.requires_grad for p in self.routing.router.parameters())

    def _texts(self, prompt: Prompt, change: Tensor, active: list[int]) -> Iterator[Tensor]:
        """Yield what each active block reads, or what is added to its stream."""
        slots = self.routing.facts.slots
        numbers = [block * slots + slot for block in active for slot in range(slots)]
        states = prompt.states
        mixed = restyled(
            change[:, numbers].to(states.device), states, [prompt.origins[r] for r in numbers], prompt.kept,
            prompt.neutral,
        )  # fmt: skip
        swaps = self.routing.gain is None and self.entrance and not self._reads
        original = self._embed([states[slot] for slot in range(slots)]) if swaps else None
        for block in active:
            text = self._embed([next(mixed) for _ in range(slots)])
            gain = self.routing.strength(block)
            if gain is not None:
                text = text * gain.to(text)
            elif original is not None:
                text = text - original
            yield text

    def _embed(self, states: list[Tensor]) -> Tensor:
        """Apply the transformer's text input to states."""
        text = states[0] if len(states) == 1 else torch.cat(states, -1)
        for module in self.entrance:
            text = module(text)
        return text

    def _time(self, given: dict[str, Any]) -> Tensor:
        timestep = given[self.family.timestep]
        timestep = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep)
        timestep = timestep[None] if timestep.ndim == 0 else timestep
        return self.family.time(timestep.float())


MISSING = (
    "the text was encoded before adoption, or with the routing disabled or in evaluation mode, and lacks layers that "
    "it needs: encode the prompt again with the adopted pipeline, or set routing.scale = 0"
)


NOT_COMPILED = (
    "adopt prepares the text here, outside of graphs: compile the transformer without fullgraph=True, or only its "
    "blocks"
)


def readers(family: Family, transformer: nn.Module) -> list[tuple[Any, Blocks]]:
    """Return the modules that read their own text, each with its entry in the family."""
    found = [(module, blocks) for blocks in family.blocks for module in module_at(transformer, blocks.path)]
    return found[:-1] if family.name == "hidream" else found  # its last projection reads T5


def _rows(prompt: Prompt, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return the rows of each sample's text in a sequence shared with the image, and which of them are text."""
    count = prompt.states.shape[2]
    rows = torch.zeros(len(places), count, dtype=torch.long)
    valid = torch.zeros(len(places), count, dtype=torch.bool)
    for i, (first, length) in enumerate(places):
        rows[i, :length] = torch.arange(first, first + length)
        valid[i, :length] = True
    return rows.to(prompt.states.device), valid.to(prompt.states.device)


def check_parallel(transformer: Any) -> None:
    """Raise ValueError if the transformer splits sequences over processes."""
    config = getattr(transformer, "_parallel_config", None)
    if getattr(config, "context_parallel_config", None) is not None:
        raise ValueError(
            f"{type(transformer).__name__} splits its sequences over processes (context parallelism), but adopt places "
            "the text in whole sequences: use tensor or data parallelism, or remove() the routing"
        )


def _fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Return what a module's results depend on: its parameters, and the scales of LoRA adapters in it."""
    tensors = list(module.parameters())
    adapters = [
        (repr(getattr(part, "scaling", None)), repr(getattr(part, "active_adapters", None)), part.disable_adapters)
        for part in module.modules()
        if hasattr(part, "disable_adapters")
    ]
    return tuple(map(id, tensors)), versions(tensors), tuple(adapters)
