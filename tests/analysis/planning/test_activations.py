"""Bytes saved for backward, against closed forms."""

from __future__ import annotations

import torch
from torch import nn

from semantic_routing.analysis.planning.activations import flash_attention, saved


def test_saved_bytes_of_a_small_network() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        x = torch.empty(5, 8)
    found, _ = saved(model, lambda: model(x))
    assert found == 4 * (5 * 8 + 5 * 16)  # the input, and the ReLU's output, which is the second layer's input


def test_attention_saves_no_matrix_of_scores() -> None:
    with torch.device("meta"):
        q, k = torch.empty(1, 4, 64, 16, requires_grad=True), torch.empty(1, 2, 64, 16, requires_grad=True)
    with flash_attention():
        attend = nn.functional.scaled_dot_product_attention
        found, out = saved(nn.Module(), lambda: attend(q, k, k, enable_gqa=True))
    assert out.shape == q.shape
    tensors = 4 * 64 * 16 * (4 + 2 + 4)  # queries, keys that serve as values too, outputs
    assert tensors <= found < tensors + 4 * 4 * 64 * 2  # and one number for each query
