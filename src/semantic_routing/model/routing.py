"""Routers: the weight of each language-model layer in the text that each block of the transformer reads.

Every strategy of the paper is a softmax over L layers whose logits depend on nothing, the time, the block, or both. All
have ``weights(t) -> [B|1, D|1, L]``, which training, sampling and analysis share. An axis of size 1 is one that the
weights do not depend on. If a block reads several mixes, the second axis has a row for each of them, block by block:
D P rows, named by ``DiTConfig.rows``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from semantic_routing.model.arms import ARMS
from semantic_routing.model.kernels.mix import LN_EPS, fused_mix, no_autocast
from semantic_routing.model.layers import sinusoidal


class Router(nn.Module):
    """Weights over the language model's layers, at least 0 and with the sum 1, as a function of time (Eq. 2 and 3)."""

    depends_on_time = False

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 L"]:
        """Return the softmax weights in float32, [B or 1, D or 1, L]: samples, blocks (or a block's mixes), layers.

        An axis of size 1 is one that the weights do not depend on. ``t`` (0 noise, 1 data) is needed only if
        ``depends_on_time``.
        """
        raise NotImplementedError

    def forward(
        self, hidden: Float[Tensor, "L B N C"], t: Float[Tensor, " T"] | None = None
    ) -> Float[Tensor, "D_or_1 B N C"]:
        """Return the text that each block reads, a mix of the hidden states of all layers (Eq. 2)."""
        return mix(self.weights(t), hidden)

    def mix_tokens(
        self, hidden: Float[Tensor, "L 1 T C"], t: Float[Tensor, " B"], samples: Int[Tensor, " T"]
    ) -> Float[Tensor, "D_or_1 1 T C"]:
        """Return the text of packed tokens, each mixed with the weights at its sample's time."""
        return mix(self.weights(t)[samples], hidden.transpose(1, 2)).transpose(1, 2)

    def mix_steps(
        self, hidden: Float[Tensor, "L B N C"], times: Float[Tensor, " T"]
    ) -> Float[Tensor, "T D_or_1 B N C"]:
        """Return the text at each of several times, from one pass over the hidden states."""
        weights = self.weights(times)
        return mix(weights.flatten(0, 1)[None], hidden).unflatten(0, weights.shape[:2])


class FixedRouter(Router):
    """Fixed weights: B1 (one layer), B2 (the average of all) and the hard route."""

    def __init__(self, table: list[list[float]]) -> None:
        """``table`` has a row of L weights for each block, or one row for all."""
        super().__init__()
        self.table = table  # no buffer: the table is part of the architecture, not of its state
        self.used = [i for i, column in enumerate(zip(*table, strict=True)) if any(column)]

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 L"]:
        return torch.tensor([self.table], device=None if t is None else t.device)

    def forward(
        self, hidden: Float[Tensor, "L B N C"], t: Float[Tensor, " T"] | None = None
    ) -> Float[Tensor, "D_or_1 B N C"]:
        # Layers of weight 0 are not read: B1 costs one layer, not L.
        weights = self.weights(t)[..., self.used].to(hidden.device)
        return mix(weights, hidden if len(self.used) == hidden.shape[0] else hidden[self.used])


class LogitRouter(Router):
    """Learned logits: one vector for all blocks (B3, Eq. 6), one per block (S2, Eq. 9), or several per block."""

    def __init__(self, layers: int, rows: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(rows, layers))

    def scores(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 L"]:
        """Return the logits in float32."""
        return self.logits.float()[None]

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 L"]:
        return self.scores(t).softmax(-1)


class LowRankRouter(Router):
    """Logits of a block's keys and values by head: the block's own, plus offsets along contrasts that all blocks share.

    logits[block, part] = base[block] + loadings[block, part] @ contrasts, with ``RANK`` contrasts between layers. A
    part (the keys or the values of one head) gets 1 / (2 Hkv) of its block's gradient. An optimiser such as AdamW moves
    every parameter at the same rate, however small its gradient is, so L free logits per part drift along L noisy
    directions. Here the gradients of all blocks and heads determine the contrasts, and a part learns only ``RANK``
    numbers. S2 is the case without loadings. At the paper's size there are 2,544 parameters instead of the 13,824 of
    ``depth-heads-kv``.

    The contrasts start as the first cosines over the layers (shallow against deep, middle against both ends, ...). They
    have mean 0, are orthogonal, and are scaled so that logits move as fast as if they were parameters. Everything else
    starts at zero, so routing starts as the uniform average.
    """

    RANK = 4

    def __init__(self, layers: int, depth: int, parts: int) -> None:
        super().__init__()
        rank = max(1, min(self.RANK, layers - 1))  # a softmax ignores the constant, which leaves L - 1 directions
        self.parts = parts
        self.base = nn.Parameter(torch.zeros(depth, layers))
        self.loadings = nn.Parameter(torch.zeros(depth * parts, rank))
        self.contrasts = nn.Parameter(cosines(rank, layers))

    def logits(self) -> Float[Tensor, "D_P L"]:
        """Return the logits of all parts, block by block, in float32."""
        with no_autocast(self.base.device):
            return self.base.float().repeat_interleave(self.parts, 0) + self.loadings.float() @ self.contrasts.float()

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 L"]:
        return self.logits().softmax(-1)[None]


def cosines(count: int, layers: int) -> Float[Tensor, "count L"]:
    """Return cos(pi k (l + 1/2) / L) for k = 1 .. count, scaled to a mean square of 1 / count."""
    k, place = torch.arange(1, count + 1), torch.arange(layers) + 0.5
    return torch.cos(math.pi * k[:, None] * place / layers) * math.sqrt(2 / count)


class GateRouter(Router):
    """Time-conditioned fusion gates (TCFG, Appendix A): one for all blocks (S1, Eq. 8) or one each (S3, Eq. 10).

    128 sinusoids of t -> Linear to 512 -> SiLU -> Linear to L. The last layer starts at zero, so routing
    starts as the uniform average. The gates are stacked, so that all blocks take two batched products.
    """

    depends_on_time = True

    def __init__(self, layers: int, gates: int, time_width: int = 128) -> None:
        super().__init__()
        hidden = 4 * time_width
        self.time_width = time_width
        self.w1 = nn.Parameter(torch.empty(gates, time_width, hidden))
        self.b1 = nn.Parameter(torch.zeros(gates, 1, hidden))
        self.w2 = nn.Parameter(torch.zeros(gates, hidden, layers))
        self.b2 = nn.Parameter(torch.zeros(gates, 1, layers))
        bound = math.sqrt(6 / (time_width + hidden))  # Xavier, for each gate
        nn.init.uniform_(self.w1, -bound, bound)

    def scores(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 L"]:
        """Return the logits at the times ``t`` in float32."""
        return self._logits(t).float().transpose(0, 1)

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 L"]:
        return self._logits(t).softmax(-1).float().transpose(0, 1)

    def _logits(self, t: Float[Tensor, " T"] | None) -> Float[Tensor, "D_or_1 T L"]:
        if t is None:
            raise ValueError("this router's weights depend on time: pass t, one value in [0, 1] per sample")
        with no_autocast(t.device):  # in float64, so that weights do not depend on the batch
            phi = sinusoidal(t, self.time_width).double()
            h = F.silu(phi @ self.w1.double() + self.b1.double())
            return h @ self.w2.double() + self.b2.double()


class AttentionRouter(Router):
    """Attention of every token over its own layers: softmax_l of q · LayerNorm(H_l) + b_l, the same for all blocks.

    The weights depend on the text instead of time or block. Query and layer biases start at zero, so routing starts as
    the uniform average.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(layers))

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 L"]:
        raise ValueError(
            "the weights of arm 'attention' differ from token to token and depend on the text; use token_weights"
        )

    def forward(
        self, hidden: Float[Tensor, "L B N C"], t: Float[Tensor, " T"] | None = None
    ) -> Float[Tensor, "D_or_1 B N C"]:
        weights = self.token_weights(hidden).flatten(0, 1)[:, None]  # every token is a sample
        return mix(weights, hidden.flatten(1, 2)[:, :, None]).unflatten(1, hidden.shape[1:3])[:, :, :, 0]

    def token_weights(self, hidden: Float[Tensor, "L B N C"]) -> Float[Tensor, "B N L"]:
        """Return the weight of each layer for each token."""
        with no_autocast(hidden.device):
            scores = [F.layer_norm(h.float(), h.shape[-1:], eps=LN_EPS) @ self.query.float() for h in hidden]
            logits = torch.stack(scores, dim=-1) / math.sqrt(hidden.shape[-1]) + self.bias.float()
        return logits.softmax(-1)


def make_router(arm: str, layers: int, depth: int, width: int, kv_heads: int = 1) -> Router:
    """Return the router of an arm for ``layers`` language-model layers of width ``width`` and ``depth`` blocks.

    ``kv_heads`` is the number of a block's key/value heads, which some arms route separately. Raises ValueError for
    arms without a router.
    """
    if arm == "penultimate":
        if layers < 2:
            raise ValueError(f"the penultimate arm needs at least 2 language-model layers, not {layers}")
        return FixedRouter([[float(layer == layers - 2) for layer in range(layers)]])
    if arm == "uniform":
        return FixedRouter([[1 / layers] * layers])
    if arm == "hard":  # block d reads one layer, from shallow to deep
        read = [max(0, round((block + 1) * layers / depth) - 1) for block in range(depth)]
        return FixedRouter([[float(layer == chosen) for layer in range(layers)] for chosen in read])
    kind = ARMS[arm]
    if kind.reads_keys:
        raise ValueError(f"arm {arm!r} has no router")
    if kind.by_token:
        return AttentionRouter(layers, width)
    parts = len(kind.parts(kv_heads))
    if kind.low_rank:
        return LowRankRouter(layers, depth, parts)
    rows = depth * parts if kind.by_block else 1
    return GateRouter(layers, rows) if kind.by_time else LogitRouter(layers, rows)


def mix(weights: Float[Tensor, "B_or_1 D_or_1 L"], hidden: Float[Tensor, "L B N C"]) -> Float[Tensor, "D_or_1 B N C"]:
    """Compute sum_l w_l LayerNorm(H_l) for every block (Eq. 2): [D or 1, B, N, C].

    ``weights`` [B or 1, D or 1, L] are those of ``Router.weights``, and ``hidden`` [L, B, N, C] those of
    ``TextFeatures.hidden``. LayerNorm has no affine part and eps 1e-5. Sums are in float32, and the result has the
    dtype of ``hidden``. If ``hidden`` needs no gradient (a frozen language model), one fused kernel reads each state
    once in the forward pass and once in the backward pass, without storing normalised copies. Otherwise plain torch is
    used.
    """
    if weights.shape[-1] != hidden.shape[0]:
        raise ValueError(f"weights for {weights.shape[-1]} layers, but {hidden.shape[0]} layers of hidden states")
    if not hidden.requires_grad:
        return fused_mix(weights, hidden)[0]
    with no_autocast(hidden.device):
        normed = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=LN_EPS)
        expanded = weights.expand(hidden.shape[1], -1, -1)
        return torch.einsum("bdl,lbnc->dbnc", expanded, normed).to(hidden.dtype)
