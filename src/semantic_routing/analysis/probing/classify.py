"""Linear probes: classify a hidden state by ridge regression, with one output for each answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

FOLDS = 10
RIDGES = tuple(10.0**k for k in range(-4, 5, 2))
"""Ridges to try, as shares of the mean eigenvalue of the kernel matrix."""


@dataclass(frozen=True)
class Accuracy:
    """The share of prompts that a probe answers correctly, each by a probe that was fitted without it."""

    mean: float
    error: float
    """Standard error over prompts."""


def cross_validate(
    x: Float[Tensor, "N C"], answers: Int[np.ndarray, " N"], allowed: Bool[np.ndarray, "N K"], seed: int
) -> Accuracy:
    """Return the accuracy of a linear probe by cross-validation.

    Of ten folds one is tested, the next chooses the ridge and the others fit. ``allowed`` are the answers among which a
    prompt's answer is chosen.
    """
    fold = np.random.default_rng(seed).permutation(len(x)) % FOLDS
    kernel = x.double() @ x.double().T
    targets = torch.nn.functional.one_hot(torch.from_numpy(answers), allowed.shape[1]).double().to(x.device)
    right = np.zeros(len(x), bool)
    for k in range(FOLDS):
        tested, choosing = fold == k, fold == (k + 1) % FOLDS
        fit = ~(tested | choosing)
        scores = _scores(kernel, targets, fit, np.flatnonzero(choosing | tested))
        answer = np.where(allowed[choosing | tested], scores, -np.inf).argmax(-1) == answers[choosing | tested]
        among = choosing[choosing | tested]
        best = int(answer[:, among].mean(1).argmax())
        right[tested] = answer[best, ~among]
    return Accuracy(float(right.mean()), float(right.std() / np.sqrt(len(right))))


def _scores(
    kernel: Float64[Tensor, "N N"],
    targets: Float64[Tensor, "N K"],
    fit: Bool[np.ndarray, " N"],
    asked: Int[np.ndarray, " M"],
) -> Float64[np.ndarray, "R M K"]:
    """Return a score for each ridge, asked row and answer, by kernel ridge regression with an intercept."""
    rows, others = torch.from_numpy(np.flatnonzero(fit)), torch.from_numpy(asked)
    own = kernel[rows][:, rows]
    cross = kernel[others][:, rows]
    mean = own.mean(0)
    cross = cross - cross.mean(1, keepdim=True) - mean + mean.mean()
    own = own - mean - mean[:, None] + mean.mean()
    y = targets[rows]
    ridges = own.diagonal().mean() * torch.tensor(RIDGES, dtype=torch.float64, device=own.device)
    penalised = own + ridges[:, None, None] * torch.eye(len(own), dtype=torch.float64, device=own.device)
    fitted = torch.cholesky_solve((y - y.mean(0)).expand(len(ridges), *y.shape), torch.linalg.cholesky(penalised))
    return (cross @ fitted + y.mean(0)).numpy(force=True)
