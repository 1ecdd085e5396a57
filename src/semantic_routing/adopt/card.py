"""The model card beside the file of a routing.

Its last line holds the digest of the text before it. If the digest matches, the card is unedited and is updated with
new weights; a README.md that was edited, or was never a card, belongs to the user and is not changed.
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

Weights of the {layers} layers of `{encoder}`, and of the hidden state that the model originally reads, in each of the
{blocks} blocks of `{transformer}`: {numbers} parameters. They were made with [semantic-routing](https://pypi.org/project/semantic-routing)
{program}, arm `{arm}`, weights `{weights}`, injection `{injection}`.

```python
from semantic_routing.adopt import load_routing

routing = load_routing(pipe, "this folder, or its name on the hub", scale=1.0)  # {owner}
routing.scale = 0.0  # the original model, bit for bit
```

The routing changes only the text that blocks read. The licence of the base model applies to its images.
"""

SIGNED = re.compile(r"(.*)\n<!-- written by semantic-routing, sha256 (\w+) -->\n", re.DOTALL)


def write_card(path: Path, facts: Facts, numbers: int) -> None:
    """Write the card of a routing, unless there is a README that is not an unedited card."""
    if path.exists() or path.is_symlink():
        try:
            found = SIGNED.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:  # a folder, or not to be read: not a card of this program
            found = None
        if found is None:
            return
        if found[2] != _digest(found[1]):
            warnings.warn(f"{path} was edited and is not overwritten: it may describe other weights", stacklevel=4)
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
