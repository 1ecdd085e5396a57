"""Counts the graphs of ten adopted blocks under regional compile; run as a program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from semantic_routing.adopt import adopt
from tests.helpers.adoptable import make

BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sana": (
        "transformer_blocks",
        {
            "dim": 32, "num_attention_heads": 2, "attention_head_dim": 16, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16, "cross_attention_dim": 32,
        },
    ),
    "qwen-image": ("transformer_blocks", {"dim": 32, "num_attention_heads": 2, "attention_head_dim": 16}),
    "z-image": (
        "layers", {"layer_id": 9, "dim": 32, "n_heads": 2, "n_kv_heads": 2, "norm_eps": 1e-5, "qk_norm": True}
    ),
}  # fmt: skip
"""List of blocks and the arguments of one more."""


@torch.no_grad()
def count(name: str) -> tuple[int, int]:
    """Return the number of blocks and of graphs; fail if compiled blocks draw other pixels."""
    torch._dynamo.reset()
    case = make(name)
    path, sizes = BLOCKS[name]
    blocks = getattr(case.transformer, path)
    while len(blocks) < 10:
        blocks.append(type(blocks[0])(**sizes).eval().requires_grad_(False))
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
    routing.remove()
    removed = case.draw()  # the graphs with hooks are not used any more
    for block in blocks:
        block._compiled_call_impl = None
    torch.testing.assert_close(removed, case.draw())
    return routing.facts.blocks, found


if __name__ == "__main__":
    for family in BLOCKS:
        number, graphs = count(family)
        sys.stdout.write(f"{family}: {number} blocks, {graphs} graph\n")
