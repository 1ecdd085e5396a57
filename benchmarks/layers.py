"""Redundancy of the layers of a language model: linear prediction of each layer from another, and from mixes of all.

    python benchmarks/layers.py runs/x/text_encoder [--prompts 2000] [--out FILE.json]

The data are hidden states of toy-world captions, normalised as in routing, one row for each token. A number is R² of
ridge regression on held-out captions, which have the same words in other combinations. The last rows predict from the
uniform average (B2) and from all layers concatenated; their difference is the loss by averaging.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from results import save
from torch import Tensor

from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder

RIDGE = 1e-3
"""Regularisation, as a share of the mean variance of a channel."""


def states(folder: Path, captions: list[str]) -> Tensor:
    """Return the normalised hidden states [L, tokens, C] of the captions."""
    encoder = TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=str(folder)), torch.device("cpu"))
    found = []
    for i in range(0, len(captions), 100):
        features = encoder.encode(captions[i : i + 100])
        found.append(features.hidden[:, features.mask].float())
    hidden = torch.cat(found, dim=1)
    return F.layer_norm(hidden, hidden.shape[-1:])


def predicted(x: Tensor, y: Tensor, x_other: Tensor, y_other: Tensor) -> float:
    """Fit y [n, C'] from x [n, C] by ridge regression; returns R² on the other pair."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = (x - mean_x).double(), (y - mean_y).double()
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weights = torch.linalg.solve(gram, x.T @ y)
    left = (y_other - mean_y).double() - (x_other - mean_x).double() @ weights
    return 1 - (left.square().sum() / (y_other - mean_y).double().square().sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    captions = open_data(DataConfig(), image_size=32, seed=1).captions(args.prompts)
    half = len(captions) // 2
    fit, held = states(args.encoder, captions[:half]), states(args.encoder, captions[half:])
    layers = range(len(fit))
    sources = {f"layer {i + 1}": (fit[i], held[i]) for i in layers}
    sources["average"] = fit.mean(0), held.mean(0)
    sources["all"] = fit.transpose(0, 1).flatten(1), held.transpose(0, 1).flatten(1)
    rows = {name: [predicted(x, fit[i], other, held[i]) for i in layers] for name, (x, other) in sources.items()}
    write = sys.stdout.write
    write(f"{fit.shape[0]} layers of {fit.shape[2]}, {fit.shape[1]} tokens to fit, {held.shape[1]} held out\n")
    write(f"{'from':10}" + "".join(f"{f'to {i + 1}':>8}" for i in layers) + "\n")
    for name, row in rows.items():
        write(f"{name:10}" + "".join(f"{value:8.3f}" for value in row) + "\n")
    save(args, {"r2": rows, "tokens": fit.shape[1]}, captions=1)


if __name__ == "__main__":
    main()
