"""Hidden states of a language model as probes read them: one row for each token, and their sizes before normalising."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float16, Int
from torch import Tensor
from tqdm import tqdm

from semantic_routing.text.encoder import TextEncoder

BATCH = 64
"""Prompts encoded together."""


@dataclass(frozen=True)
class TokenStates:
    """States of every token of some prompts, each layer-normalised as routing reads it."""

    hidden: Float16[Tensor, "L T C"]
    """Half precision: rounding adds 1e-7 of a state's variance."""
    prompt: Int[Tensor, " T"]
    """Index of each token's prompt."""
    first: Bool[Tensor, " T"]
    """True for the first token of each prompt."""
    norm: Float[Tensor, "L T"]
    """Euclidean norm of each state before normalisation."""
    peak: Float[Tensor, "L T"]
    """Largest magnitude among a state's channels before normalisation."""
    channel: Int[Tensor, "L T"]
    """The channel of that magnitude."""
    median: Float[Tensor, " L"]
    """Median magnitude of a layer's channels, over the first batch."""

    def without_first(self) -> TokenStates:
        """Return the states of all tokens but the first of each prompt, where attention sinks are."""
        keep = ~self.first
        return TokenStates(
            self.hidden[:, keep], self.prompt[keep], self.first[keep],
            self.norm[:, keep], self.peak[:, keep], self.channel[:, keep], self.median,
        )  # fmt: skip


def token_states(encoder: TextEncoder, prompts: Sequence[str], *, most: int) -> TokenStates:
    """Encode prompts until they have given ``most`` tokens; all of them if they have fewer."""
    parts: list[tuple[Tensor, ...]] = []
    tokens, medians = 0, None
    with tqdm(total=most, desc="Encoding", unit="token") as bar:
        for start, hidden, mask in encoded(encoder, prompts):
            raw = hidden[:, mask].float()
            if medians is None:
                medians = torch.stack([layer.abs().median() for layer in raw])
            position = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
            index = start + torch.arange(len(mask), device=mask.device)[:, None].expand(mask.shape)
            peak, channel = raw.abs().max(-1)
            parts.append((normalise(raw).half(), index[mask], position[mask] == 0, raw.norm(dim=-1), peak, channel))
            tokens += int(mask.sum())
            bar.update(int(mask.sum()))
            if tokens >= most:
                break
    hidden, prompt, first, norm, peak, channel = (torch.cat(part, -1 if part[0].dim() < 3 else 1)
                                                  for part in zip(*parts, strict=True))  # fmt: skip
    assert medians is not None
    return TokenStates(hidden, prompt, first, norm, peak, channel, medians)


def states_at(encoder: TextEncoder, prompts: Sequence[str], tokens: Int[np.ndarray, "P N"]) -> Float[Tensor, "L P N C"]:
    """Return normalised states of N chosen tokens of each prompt, given by their positions."""
    found = []
    for start, hidden, mask in encoded(encoder, prompts):
        rows = torch.arange(len(mask), device=hidden.device)[:, None]
        chosen = torch.from_numpy(tokens[start : start + len(mask)]).to(hidden.device)
        found.append(normalise(hidden[:, rows, chosen].float()))
    return torch.cat(found, 1)


def normalise(x: Float[Tensor, "*shape C"]) -> Float[Tensor, "*shape C"]:
    """Layer-normalise states without weights, as routing does before it mixes them."""
    return F.layer_norm(x, x.shape[-1:])


def encoded(encoder: TextEncoder, prompts: Sequence[str]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the index of a batch's first prompt, its hidden states [L, B, N, C] and its mask [B, N]."""
    for start in range(0, len(prompts), BATCH):
        features = encoder.encode(list(prompts[start : start + BATCH]), strict=False)
        yield start, features.hidden, features.mask


def check_memory(tokens: int, layers: int, width: int) -> None:
    """Raise ValueError if the states of ``tokens`` tokens would fill more than half of the free memory."""
    need = 2 * tokens * layers * width
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if need > free / 2:
        fits = int(tokens * free / 2 / need) // 1000 * 1000
        raise ValueError(
            f"{tokens} tokens in {layers} layers of {width} need {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            f"free: give --tokens {max(fits, 1000)}"
        )
