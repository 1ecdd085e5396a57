"""Counts the graphs of ten blocks under regional compile, before and after adoption; a program for some families."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from semantic_routing.adopt import Routing, adopt
from tests.helpers.adoptable import Case, make

BLOCKS = {"sana": "transformer_blocks", "qwen-image": "transformer_blocks", "z-image": "layers"}


@torch.no_grad()
def count(name: str, adopted: bool) -> int:
    """Return the number of graphs; fail if compiled blocks draw other pixels than uncompiled ones."""
    torch._dynamo.reset()
    case: Case = make(name)
    blocks = getattr(case.transformer, BLOCKS[name])
    while len(blocks) < 10:
        blocks.append(copy.deepcopy(blocks[1]))
    routing = routed(case) if adopted else None
    graphs = compiled(case, list(blocks), fullgraph=True)
    found = len(graphs)
    if routing is not None:
        routing.remove()
        removed = case.draw()  # the graphs with hooks are not used any more
        for block in blocks:
            block._compiled_call_impl = None
        torch.testing.assert_close(removed, case.draw())
    return found


def routed(case: Case) -> Routing:
    """Adopt a model, and give all blocks a text of their own."""
    routing = adopt(text_encoder=case.encoder, transformer=case.transformer)
    for parameter in routing.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.0)
        parameter[..., 0] = -0.9
    return routing


def compiled(case: Case, modules: list[Any], fullgraph: bool) -> list[int]:
    """Compile modules, draw three prompts of one length, and return the number of the prompt that made each graph."""
    texts = [case.encode(torch.arange(12).view(2, 6) + first) for first in (3, 9, 15)]
    eager = [case.draw(text) for text in texts]
    graphs: list[int] = []
    now = 0

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(now)
        return graph

    for module in modules:
        module.compile(backend=backend, fullgraph=fullgraph)
    for number, (text, expected) in enumerate(zip(texts, eager, strict=True)):
        now = number
        torch.testing.assert_close(case.draw(text), expected)
    return graphs


@torch.no_grad()
def new_prompts(name: str) -> int:
    """Return the number of graphs that new prompts add to those of a transformer that is compiled as a whole."""
    torch._dynamo.reset()
    case = make(name)
    routed(case)
    return sum(prompt > 0 for prompt in compiled(case, [case.transformer], fullgraph=False))


if __name__ == "__main__":
    for family in sys.argv[1:] or BLOCKS:
        sys.stdout.write(f"{family} {count(family, False)} {count(family, True)}\n")
        if family == "sana":
            sys.stdout.write(f"the whole of sana: a new prompt adds {new_prompts('sana')}\n")
