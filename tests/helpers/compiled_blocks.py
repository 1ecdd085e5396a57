"""Counts the graphs of ten blocks under regional compile, before and after adoption; run as a program."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from semantic_routing.adopt import adopt
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
    if adopted:
        routing = adopt(text_encoder=case.encoder, transformer=case.transformer)
        for parameter in routing.parameters():
            torch.nn.init.uniform_(parameter, -0.5, 0.0)
            parameter[..., 0] = -0.9  # so that no row is the original
    texts = [case.encode(torch.arange(12).view(2, 6) + first) for first in (3, 9, 15)]
    eager = [case.draw(text) for text in texts]
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    for text, expected in zip(texts, eager, strict=True):
        torch.testing.assert_close(case.draw(text), expected)
    found = len(graphs)
    if adopted:
        routing.remove()
        removed = case.draw()  # the graphs with hooks are not used any more
        for block in blocks:
            block._compiled_call_impl = None
        torch.testing.assert_close(removed, case.draw())
    return found


if __name__ == "__main__":
    for family in BLOCKS:
        sys.stdout.write(f"{family} {count(family, False)} {count(family, True)}\n")
