"""The recorder's bookkeeping, with a stand-in for CUDA graphs that computes anew from the recorded inputs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from semantic_routing.model.build import make_model
from semantic_routing.model.context import TextContext
from semantic_routing.model.dit import DiTConfig
from semantic_routing.model.runtime import Recording
from semantic_routing.text.features import TextFeatures


def test_a_recording_follows_its_inputs_and_starts_anew_for_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_width": 64, "channels": 4}
    model = make_model(DiTConfig(arm="joint", depth=2, text_width=32, text_layers=5, **sizes)).requires_grad_(False)
    for p in model.parameters():
        if p.eq(0).all():
            torch.nn.init.normal_(p, std=0.1)
    recording, played = Recording(model), []

    class Graph:
        def replay(self) -> None:
            played.append(self)
            recording.out = model(*recording.inputs)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    hidden, mask = torch.randn(5, 2, 16, 32), torch.arange(16) < torch.tensor([3, 9])[:, None]

    def context(batch: int, t: torch.Tensor) -> TextContext:
        return model.prepare_text(TextFeatures(hidden[:, :batch], mask[:batch]), t)

    for batch in (2, 2, 2, 1, 1, 2):
        x, t = torch.randn(batch, 4, 8, 8), torch.rand(1)
        text = context(batch, t)
        assert torch.equal(recording(x, t, text), model(x, t, text))
    # Of six calls three were the first of their sizes; two graphs played the others.
    assert len(played) == 3
    assert len(set(map(id, played))) == 2
