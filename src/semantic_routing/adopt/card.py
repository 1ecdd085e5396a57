"""The model card beside the file of a routing."""

from __future__ import annotations

from semantic_routing import __version__
from semantic_routing.adopt.facts import Facts

CARD = """---
{front}library_name: diffusers
tags:
- semantic-routing
- text-to-image
---

# Routing for {base}

Weights of the {layers} layers of `{encoder}`, and of the state that the model read before, in each of the {blocks}
blocks of `{transformer}`: {numbers} numbers. They were made with [semantic-routing](https://pypi.org/project/semantic-routing)
{program}, arm `{arm}`, weights `{weights}`, injection `{injection}`.

```python
from semantic_routing.adopt import load_routing

routing = load_routing(pipe, "this folder, or its name on the hub", scale=1.0)  # {owner}
routing.scale = 0.0  # the original model, to the last bit
```

The numbers change nothing but the text that blocks read. The licence of the base model applies to its pictures.
"""


def card(facts: Facts, numbers: int) -> str:
    """Return the model card of a routing with this number of parameters."""
    hub = facts.base_model.count("/") == 1 and not facts.base_model.startswith((".", "/", "~"))
    base = facts.base_model if hub else facts.transformer
    return CARD.format(
        front=f"base_model: {base}\n" if hub else "",
        base=base,
        layers=facts.layers,
        encoder=facts.encoder,
        blocks=facts.blocks,
        transformer=facts.transformer,
        numbers=numbers,
        program=__version__,
        arm=facts.arm,
        weights=facts.weights,
        injection=facts.injection,
        owner=f"a pipeline with {facts.transformer} and {facts.encoder}",
    )
