"""``adopt``: routing on a diffusers pipeline that is already loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from semantic_routing.adopt.facts import Facts
from semantic_routing.adopt.families import Family, find_family
from semantic_routing.adopt.families.family import check_signature, module_at
from semantic_routing.adopt.file import check_fits, check_shapes, read_routing
from semantic_routing.adopt.mechanism import Mechanism, check_parallel, readers
from semantic_routing.adopt.own import OwnMechanism
from semantic_routing.adopt.routing import ATTRIBUTE, INJECTIONS, Routing
from semantic_routing.adopt.weights import REINJECT, check_arm
from semantic_routing.adopt.widening import widening_of
from semantic_routing.common.config import nearest
from semantic_routing.common.extras import require_diffusers
from semantic_routing.model.arms import ARMS, DEFAULT_ARM
from semantic_routing.text.architecture import find_layers, stack_config

TRANSFORMERS = ("transformer", "transformer_2")
OTHERS = (*TRANSFORMERS, "controlnet")
"""Components of pipelines that may receive the text besides the adopted one."""


def adopt(
    pipe: Any = None,
    arm: str = DEFAULT_ARM,
    *,
    weights: str | None = None,
    injection: str = "swap",
    component: str = "transformer",
    text_encoder: nn.Module | None = None,
    transformer: nn.Module | None = None,
) -> Routing:
    """Put routing onto a loaded diffusers pipeline, in place, and return it. Until it is trained, pixels stay the same.

        pipe = SanaPipeline.from_pretrained("Efficient-Large-Model/Sana_600M_1024px_diffusers")
        routing = adopt(pipe, arm="depth")
        optimizer = torch.optim.AdamW(routing.parameters(), lr=1e-2)  # then train as usual: docs/adopt.md
        routing.save("routings/mine")

    Args:
        pipe: A pipeline of a supported family (docs/adopt.md). Training scripts may give ``text_encoder`` and
            ``transformer`` instead.
        arm: An arm of ``ARMS``, such as "depth", or "reinject", which needs no training (Prompt Reinjection, Yao et
            al., 2026, arXiv 2602.06886).
        weights: How weights are parameterised: "simplex", "gate" or "affine" (``weights.py``). By default "simplex" for
            learned arms and "gate" for fixed ones.
        injection: Only for families whose blocks update the text: what is added to a block's text while it runs.
            "swap" adds the difference between the routed text and the original one, "reinject" a learned part of the
            routed text.
        component: Name of the transformer in pipelines that have two.
        text_encoder: The text encoder, if there is no pipeline.
        transformer: The transformer, if there is no pipeline.

    Raises ValueError for anything that is not supported; the model is then unchanged.
    """
    target, encoder, family = find_parts(pipe, component, text_encoder, transformer)
    arm = check_arm(arm)
    if weights is None:
        weights = "simplex" if arm == REINJECT or ARMS[arm].learned else "gate"
    facts = facts_of(target, encoder, family, component, arm, weights, injection, pipe)
    return attach(Routing(facts), pipe, target, encoder, family)


def load_routing(
    pipe: Any = None,
    source: str | Path = "",
    *,
    scale: int | float = 1.0,
    text_encoder: nn.Module | None = None,
    transformer: nn.Module | None = None,
) -> Routing:
    """Load a saved routing onto a pipeline, in place, and return it, in evaluation mode and frozen.

        routing = load_routing(pipe, "routings/mine", scale=1.0)
        image = pipe("three red apples").images[0]

    ``source`` is a folder that ``Routing.save`` wrote, its file, or a name on the Hugging Face hub. ``scale`` is the
    strength of the routing: 0 is the original model, 1 what was trained. ``text_encoder`` and ``transformer`` are as
    for ``adopt``. Raises ValueError if there is no such file, or if it belongs to another model; the model is then
    unchanged.
    """
    saved, numbers = read_routing(source)
    target, encoder, family = find_parts(pipe, saved.component, text_encoder, transformer)
    facts = facts_of(target, encoder, family, saved.component, saved.arm, saved.weights, saved.injection, pipe)
    check_fits(saved, facts, source)
    routing = Routing(saved)
    check_shapes(routing.state_dict(), numbers, source)
    routing.load_state_dict(numbers)
    routing.scale = scale
    return attach(routing.eval().requires_grad_(False), pipe, target, encoder, family)


def find_parts(
    pipe: Any, component: str, text_encoder: nn.Module | None, transformer: nn.Module | None
) -> tuple[Any, Any, Family]:
    """Return transformer, text encoder and family; raise ValueError if they cannot be adopted."""
    require_diffusers("adopt")
    if pipe is None and (text_encoder is None or transformer is None):
        raise ValueError("adopt needs a pipeline, or both text_encoder and transformer")
    if pipe is not None and (text_encoder is not None or transformer is not None):
        raise ValueError("give adopt a pipeline, or text_encoder and transformer, but not both")
    target = transformer if pipe is None else getattr(pipe, component, None)
    if target is None:
        known = ", ".join(name for name in TRANSFORMERS if getattr(pipe, name, None) is not None) or "none"
        raise ValueError(
            f"{type(pipe).__name__} has no component {component!r} to adopt; its transformers are: {known}"
        )
    if hasattr(target, "_orig_mod") or any(m._compiled_call_impl is not None for m in target.modules()):
        raise ValueError(f"{type(target).__name__} is already compiled: call adopt before torch.compile")
    family = find_family(target)
    if ATTRIBUTE in target._modules:
        raise ValueError(
            f"{type(target).__name__} is already adopted, with the arm {getattr(target, ATTRIBUTE).facts.arm!r}: call "
            f"remove() of that routing first, or use it, {component}.{ATTRIBUTE}"
        )
    encoder = text_encoder if pipe is None else getattr(pipe, family.encoder, None)
    if encoder is None:
        raise ValueError(
            f"{type(pipe).__name__} has no {family.encoder}, whose layers routing reads: load the pipeline with it"
        )
    if family.encoders and type(encoder).__name__ not in family.encoders:
        raise ValueError(
            f"{family.transformer} is adopted with the text encoder {' or '.join(family.encoders)}, but this one is "
            f"{type(encoder).__name__}"
        )
    return target, encoder, family


def facts_of(
    target: Any, encoder: Any, family: Family, component: str, arm: str, weights: str, injection: str, pipe: Any = None
) -> Facts:
    """Return the sizes of a routing for these parts; raise ValueError for options and sizes that do not match."""
    layers, width, blocks = sizes(target, encoder, family)
    if option := family.refuses(target, layers):
        raise ValueError(f"this {family.transformer} has {option}, which adopt does not support")
    check_parallel(target)
    for listed in family.blocks:
        check_signature(target, listed)
    if injection not in INJECTIONS:
        raise ValueError(f"unknown injection {injection!r}; {nearest(injection, list(INJECTIONS))}")
    adds = bool(family.entrance) and family.kind != "read"
    if REINJECT in (arm, injection) and not adds:
        raise ValueError(
            f"nothing can be reinjected into {family.transformer}, because its blocks do not update the text: use "
            "another arm, and injection='swap'"
        )
    _check_reads(family, layers, encoder)
    _check_width(target, family, width)
    return Facts(
        family=family.name,
        transformer=type(target).__name__,
        component=component,
        blocks=blocks,
        slots=family.slots,
        encoder=type(encoder).__name__,
        width=width,
        layers=layers,
        origin=_origin(family),
        arm=arm,
        weights=weights,
        injection=REINJECT if arm == REINJECT else injection,
        base_model=str(getattr(pipe, "name_or_path", "") or target.config.get("_name_or_path", "") or ""),
    )


def sizes(target: Any, encoder: Any, family: Family) -> tuple[int, int, int]:
    """Return the number of layers, the width of a state and the number of blocks."""
    if family.kind == "own":
        config = target.config
        return config.text_layers, config.text_width, config.depth
    stack = getattr(encoder.config, "encoder", stack_config(encoder.config))  # T5Gemma keeps two
    return len(find_layers(encoder)[0]), stack.hidden_size, len(readers(family, target))


def attach(routing: Routing, pipe: Any, target: Any, encoder: Any, family: Family) -> Routing:
    """Register all hooks of a routing and store it in the transformer."""
    device = next((p.device for p in target.parameters() if not p.is_meta), None)  # none has one while offloaded
    if device is not None:
        routing.to(device)
    handles: list[Any] = []
    widening = None if family.kind == "own" or family.native else widening_of(encoder, family.reads)
    mechanism: Mechanism | OwnMechanism
    if family.kind == "own":
        mechanism = OwnMechanism(target, routing)
    else:
        mechanism = Mechanism(family, target, routing, lambda: () if widening is None else widening.held)
        if widening is not None:
            widening.join(routing.wanted)
            others = [getattr(pipe, name, None) for name in OTHERS]
            handles += [h for other in others if other not in (None, target) for h in mechanism.narrow(other)]
    handles += mechanism.install()
    target.add_module(ATTRIBUTE, routing)

    def undo() -> None:
        for handle in handles:
            handle.remove()
        if widening is not None:
            widening.leave(routing.wanted)
        mechanism.forget()
        del target._modules[ATTRIBUTE]

    routing._undo = undo
    return routing


def _origin(family: Family) -> str:
    if family.kind == "own":
        return "what the pipeline's own router gives"
    if family.native:
        return "the layer of each block"
    return "hidden_states " + " ".join(map(str, family.reads)) if family.reads else "last_hidden_state"


def _check_reads(family: Family, layers: int, encoder: Any) -> None:
    """Raise ValueError if the language model lacks a state that the pipeline reads."""
    if any(not -layers - 1 <= number <= layers for number in family.reads):
        raise ValueError(
            f"pipelines of {family.transformer} read {_origin(family)}, but {type(encoder).__name__} has "
            f"{layers} layers"
        )


def _check_width(target: Any, family: Family, width: int) -> None:
    """Raise ValueError if the transformer's text input does not have this width."""
    paths = family.entrance or tuple(blocks.path for blocks in family.blocks)
    modules = [part for path in paths for part in module_at(target, path).modules()]
    found = next((part.in_features for part in modules if hasattr(part, "in_features")), None)
    if found is not None and found != family.slots * width:
        states = "states" if family.slots == 1 else f"{family.slots} states"
        raise ValueError(
            f"{family.transformer} reads {states} of width {found // family.slots}, but the text encoder gives width "
            f"{width}: use the text encoder of its pipeline"
        )
