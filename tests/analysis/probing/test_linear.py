"""R² and similarity from second moments, against ridge regression written out on the tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semantic_routing.analysis.probing.linear import RIDGES, fold_prompts, predict_layers


def layers(tokens: int = 240, width: int = 6) -> torch.Tensor:
    """Three layers: noise, a linear image of it with some noise, and unrelated noise."""
    first, other, noise = torch.randn(3, tokens, width)
    return torch.stack([first, first @ torch.randn(width, width) + 0.5 * noise, other])


def naive(x: torch.Tensor, y: torch.Tensor, folds: tuple[torch.Tensor, ...]) -> float:
    x, y = x.double(), y.double()
    x, y = x - x[folds[0]].mean(0), y - y[folds[0]].mean(0)
    gram = x[folds[0]].T @ x[folds[0]]
    errors = []
    for ridge in RIDGES:
        penalty = ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
        weights = torch.linalg.solve(gram + penalty, x[folds[0]].T @ y[folds[0]])
        errors.append([(y[f] - x[f] @ weights).square().sum().item() for f in folds[1:]])
    chosen = min(errors)
    return 1 - chosen[1] / y[folds[2]].square().sum().item()


def test_r2_is_that_of_ridge_regression_on_held_out_prompts() -> None:
    hidden = layers()
    folds = fold_prompts(torch.arange(240) // 4, seed=0)
    found = predict_layers(hidden, folds)
    sources = [*hidden, hidden.mean(0)]
    expected = [[naive(x, y, folds) for y in hidden] for x in sources]
    np.testing.assert_allclose(found.r2, expected, atol=1e-4)
    assert found.r2[0, 0] == pytest.approx(1, abs=1e-4)
    assert found.r2[2, 0] < 0.1 < 0.8 < found.r2[0, 1]
    some = predict_layers(hidden, folds, only=(-1, -3))
    np.testing.assert_allclose(some.r2[[-1, -3]], found.r2[[-1, -3]], atol=1e-5)
    assert np.isnan(some.r2[[0, 2]]).all()


def test_similarity_is_one_for_rotated_states_and_rank_counts_dimensions() -> None:
    x = torch.randn(800, 4)
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    flat = x.clone()
    flat[:, 2:] = 0
    found = predict_layers(torch.stack([x, x @ rotation, flat]), fold_prompts(torch.arange(800) // 4, seed=0))
    assert found.cka[0, 1] == pytest.approx(1, abs=1e-5)
    assert found.rank[0] == pytest.approx(4, abs=0.1)
    assert found.rank[2] == pytest.approx(2, abs=0.1)


def test_folds_share_no_prompt_and_few_prompts_are_refused() -> None:
    prompt = torch.arange(400) // 4
    fit, choose, report = fold_prompts(prompt, seed=1)
    parts = [set(prompt[fold].tolist()) for fold in (fit, choose, report)]
    assert [len(part) for part in parts] == [70, 15, 15]
    assert len(set.union(*parts)) == 100
    with pytest.raises(ValueError, match="7 prompts are too few"):
        fold_prompts(torch.arange(7), seed=0)
