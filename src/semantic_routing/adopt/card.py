"""The model card beside the file of a routing.

Its last line has the digest of what stands before it. A card whose digest is right is as it was written, and is
rewritten with other weights; a README.md that is edited, or was never a card, is the user's own and stays.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path

from semantic_routing import __version__
from semantic_routing.adopt.facts import Facts
from semantic_routing.common.files import written_whole

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

SIGNED = re.compile(r"(.*)\n<!-- written by semantic-routing, sha256 (\w+) -->\n", re.DOTALL)


def write_card(path: Path, facts: Facts, numbers: int) -> None:
    """Write the card of a routing, unless a README that is not a card as it was written lies there."""
    if path.exists() or path.is_symlink():
        try:
            found = SIGNED.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:  # a folder, or not to be read: not a card of this program
            found = None
        if found is None:
            return
        if found[2] != _digest(found[1]):
            warnings.warn(f"{path} was edited, and stays: it may describe other weights", stacklevel=4)
            return
    text = card(facts, numbers)
    with written_whole(path) as scratch:
        scratch.write_text(f"{text}\n<!-- written by semantic-routing, sha256 {_digest(text)} -->\n", encoding="utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
