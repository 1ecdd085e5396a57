"""Text features: what they refuse, and how they move."""

from __future__ import annotations

import pytest
import torch

from semantic_routing.text.features import TextFeatures


@pytest.mark.usefixtures("unchecked")
def test_hidden_states_and_mask_must_agree() -> None:
    with pytest.raises(ValueError, match=r"hidden states \(3, 2, 5, 8\) and mask \(2, 4\) do not agree"):
        TextFeatures(torch.zeros(3, 2, 5, 8), torch.ones(2, 4, dtype=torch.bool))


def test_to_changes_every_floating_part_and_leaves_the_mask() -> None:
    mask = torch.tensor([[True, False]])
    kv = torch.randn(3, 1, 2, 2, 4)
    features = TextFeatures(torch.randn(3, 1, 2, 8), mask, kv, 2 * kv)
    moved = features.to(dtype=torch.bfloat16)
    for part in ("hidden", "keys", "values"):
        assert torch.equal(getattr(moved, part), getattr(features, part).bfloat16())
    assert torch.equal(moved.mask, mask)
    assert TextFeatures(features.hidden, mask).to("cpu", torch.bfloat16).keys is None


def test_packed_features_move_and_are_not_sliced() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    packed = TextFeatures(torch.randn(3, 1, 4, 8), mask, positions=torch.tensor([0, 2, 3, 4]))
    moved = packed.to(dtype=torch.bfloat16)
    assert moved.positions is not None
    assert moved.positions.tolist() == [0, 2, 3, 4]
    with pytest.raises(ValueError, match="packed features cannot be sliced"):
        packed[:1]
