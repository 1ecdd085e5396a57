"""What tests check of annotations: calls of functions and dataclasses that have arrays."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from semantic_routing.analysis.statistics import entropy
from semantic_routing.common.config import nearest
from semantic_routing.text.features import TextFeatures


def test_another_name_of_an_array_is_checked() -> None:
    with pytest.raises(TypeCheckError, match="weights"):
        entropy(torch.ones(2))


def test_arrays_of_dataclasses_are_checked() -> None:
    with pytest.raises(TypeCheckError, match="hidden"):
        TextFeatures(torch.zeros(2, 3, 4), torch.ones(3, 4, dtype=torch.bool))


def test_functions_without_arrays_are_called_directly() -> None:
    assert hasattr(entropy, "__wrapped__")
    assert not hasattr(nearest, "__wrapped__")
