"""Linear prediction of one layer from another, and similarity of layers, from second moments alone.

A source X [T, C] predicts a target Y [T, C] by ridge regression W = (G + r I)^-1 X'Y with G = X'X. Prompts, not tokens,
are split: of 20, 14 fit, three choose the ridge r and three give the reported R². With G = Q diag(e) Q' factored once
for each source and U = Q'X'Y, the squared error on another fold with moments A = Q'X'X Q and V = Q'X'Y is

    |Y|² - 2 sum_i d_i (U V')_ii + d' (A * U U') d,    d_i = 1 / (e_i + r),

so that a further ridge costs C² and no pass over the tokens. The moments of a pair serve both of its directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges tried, as shares of the mean eigenvalue of G."""

Folds = tuple[Tensor, Tensor, Tensor]
"""Indices of the tokens that fit, that choose the ridge, and that are reported."""


@dataclass(frozen=True)
class Linear:
    """Sources in rows: each layer, then their uniform average. Targets in columns: each layer."""

    r2: Float[np.ndarray, "S L"]
    """Share of a target's variance on held-out prompts that a source predicts: 1 is all of it."""
    cka: Float[np.ndarray, "S L"]
    """Similarity by centred kernel alignment (Kornblith et al., 2019): 1 for states that differ by a rotation."""
    rank: Float[np.ndarray, " S"]
    """Effective rank: exp of the entropy of the covariance's eigenvalues (Roy & Vetterli, 2007)."""


def fold_prompts(prompt: Int[Tensor, " T"], seed: int) -> Folds:
    """Split tokens by their prompts: 14, 3 and 3 of 20. Raises ValueError for fewer than 8 prompts."""
    names = prompt.unique()
    if len(names) < 8:
        raise ValueError(
            f"{len(names)} prompts are too few to hold some out: give at least 8, and 1,000 or more for good estimates"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    fold = torch.zeros(int(names.max()) + 1, dtype=torch.long)
    twentieths = torch.arange(len(names)) * 20 // len(names)
    fold[names[order].cpu()] = torch.bucketize(twentieths, torch.tensor([14, 17]), right=True)
    of_token = fold[prompt.cpu()].to(prompt.device)
    first, second, third = ((of_token == k).nonzero()[:, 0] for k in range(3))
    return first, second, third


class Source:
    """Centred states of one source, and the factored Gram matrix of its fitting fold."""

    def __init__(self, states: Float[Tensor, "T C"], folds: Folds) -> None:
        self.parts = centred(states, folds)
        grams = [part.T @ part for part in self.parts]
        self.values, self.basis = (x.float() for x in torch.linalg.eigh(grams[0].double()))
        self.values.clamp_(min=0)
        self.moments = [self.basis.T @ gram @ self.basis for gram in grams]
        self.ridges = self.values.mean() * torch.tensor(RIDGES, device=states.device)
        self.norm = grams[0].norm()

    def rank(self) -> float:
        """Return the effective rank of the states."""
        share = self.values.double() / self.values.double().sum()
        return float(torch.exp(-torch.special.xlogy(share, share).sum()))

    def predict(self, cross: Sequence[Float[Tensor, "C C2"]], targets: Sequence[Float[Tensor, ""]]) -> float:
        """Return the R² of a target, of which ``cross`` is X'Y and ``targets`` |Y|² in each of the three folds."""
        fitted, *others = (self.basis.T @ moment for moment in cross)
        outer = fitted @ fitted.T
        errors = []
        for fold, other in enumerate(others, 1):
            linear, square = (fitted * other).sum(1).double(), (self.moments[fold] * outer).double()
            d = 1 / (self.values + self.ridges[:, None]).double()
            errors.append(targets[fold] - 2 * d @ linear + ((d @ square) * d).sum(1))
        best = int(errors[0].argmin())
        return float(1 - errors[1][best] / targets[2])


def centred(states: Float[Tensor, "T C"], folds: Folds) -> list[Float[Tensor, "n C"]]:
    """Return the states of each fold in float32, less the mean of the first."""
    x = states.float()
    mean = x[folds[0]].mean(0)
    return [x[fold] - mean for fold in folds]


def predict_layers(hidden: Float[Tensor, "L T C"], folds: Folds, only: Sequence[int] | None = None) -> Linear:
    """Predict every layer from every layer and from the uniform average of all, the last source.

    ``only`` restricts the sources to these indices; -1 is the average. The rows of other sources are NaN.
    """
    layers = len(hidden)
    wanted = range(layers + 1) if only is None else [index % (layers + 1) for index in only]
    r2, cka = np.full((2, layers + 1, layers), np.nan)
    rank = np.full(layers + 1, np.nan)
    sources = {index: Source(_states(hidden, index), folds) for index in wanted}
    for index, source in sources.items():
        rank[index] = source.rank()
    for target in tqdm(range(layers), desc="Predicting layers"):
        held = sources.get(target)
        y = held.parts if held else centred(hidden[target], folds)
        energy = [part.double().square().sum() for part in y]
        norm = held.norm if held else (y[0].T @ y[0]).norm()
        for index, source in _pairs(sources, target, layers):
            cross = [a.T @ b for a, b in zip(source.parts, y, strict=True)]
            r2[index, target] = source.predict(cross, energy)
            cka[index, target] = float(cross[0].norm().square() / (source.norm * norm))
            if index < target and held is not None:
                turned = [moment.T for moment in cross]
                own = [part.double().square().sum() for part in source.parts]
                r2[target, index], cka[target, index] = held.predict(turned, own), cka[index, target]
    return Linear(r2, cka, rank)


def _states(hidden: Float[Tensor, "L T C"], index: int) -> Float[Tensor, "T C"]:
    """Return a layer, or the average of all for the index after the last."""
    if index < len(hidden):
        return hidden[index]
    average = hidden[0].float()
    for layer in hidden[1:]:
        average = average + layer
    return average / len(hidden)


def _pairs(sources: dict[int, Source], target: int, layers: int) -> Iterator[tuple[int, Source]]:
    """Yield the sources of a target whose moments no other pair gives."""
    both = target in sources
    for index, source in sources.items():
        if index == layers or index <= target or not both:
            yield index, source
