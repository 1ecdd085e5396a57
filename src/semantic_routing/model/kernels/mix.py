"""The fused normalise-and-mix as a custom operator of torch, for compile, autocast, sharding and FLOP counters.

``semroute::mix`` returns sum_l w_l LayerNorm(H_l) for every depth (Eq. 2), and each state's mean and 1 / deviation.
From these, one more pass over the states gives the weights' gradient; the states get none. It runs in C on a CPU
(``mix_cpu.py``), in Triton on CUDA (``mix_triton.py``), and in plain torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from semantic_routing.model.kernels import mix_cpu

LN_EPS = 1e-5
BLOCK_TOKENS = 512
"""Tokens that plain torch casts to float32 at a time."""


@torch.library.custom_op("semroute::mix", mutates_args=(), schema="(Tensor w, Tensor h) -> (Tensor, Tensor, Tensor)")
def fused_mix(weights: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix states [L, B, N, C] with weights [B or 1, D, L] to [D, B, N, C] in the states' dtype.

    Also return the states' mean and 1 / deviation, each [L, B, N] in float32.
    """
    weights, hidden = weights.float().contiguous(), hidden.contiguous()
    if hidden.device.type == "cuda" and hidden.dtype != torch.float64:
        from semantic_routing.model.kernels import mix_triton

        return mix_triton.mix_forward(weights, hidden)
    if hidden.device.type == "cpu" and mix_cpu.supports(hidden):
        return mix_cpu.mix_forward(weights, hidden, LN_EPS)
    with no_autocast(hidden.device):
        return _torch_forward(weights, hidden)


@torch.library.custom_op(
    "semroute::mix_backward", mutates_args=(), schema="(Tensor g, Tensor h, Tensor mean, Tensor rstd) -> Tensor"
)
def fused_mix_backward(grad: Tensor, hidden: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return the float32 gradient [B, D, L] of every sample's weights from the gradient [D, B, N, C] of the mix."""
    grad, hidden = grad.to(hidden.dtype).contiguous(), hidden.contiguous()
    if hidden.device.type == "cuda" and hidden.dtype != torch.float64:
        from semantic_routing.model.kernels import mix_triton

        return mix_triton.mix_backward(grad, hidden, mean, rstd)
    if hidden.device.type == "cpu" and mix_cpu.supports(hidden):
        return mix_cpu.mix_backward(grad, hidden, mean, rstd)
    with no_autocast(hidden.device):
        return _torch_backward(grad, hidden, mean, rstd)


@fused_mix.register_fake
def _(weights: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    moments = hidden.new_empty(hidden.shape[:3], dtype=torch.float32)
    return hidden.new_empty(weights.shape[1], *hidden.shape[1:]), moments, torch.empty_like(moments)


@fused_mix_backward.register_fake
def _(grad: Tensor, hidden: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[1], grad.shape[0], hidden.shape[0], dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    weights, hidden = inputs
    ctx.save_for_backward(hidden, *output[1:])
    ctx.shape, ctx.dtype = weights.shape, weights.dtype


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, None]:
    per_sample = fused_mix_backward(grad, *ctx.saved_tensors)
    return per_sample.sum_to_size(ctx.shape).to(ctx.dtype), None


fused_mix.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula([torch.ops.semroute.mix, torch.ops.semroute.mix_backward])
def _flops(first: Any, states: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """Count a multiplication and an addition for each depth and state, in the forward and the backward pass."""
    layers, batch, length, channels = states
    depths = first[0] if len(first) == 4 else first[1]  # the gradient of the mix, or the weights
    return 2 * depths * layers * batch * length * channels


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context without autocast: the mix subtracts sums that bfloat16 cannot resolve."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _torch_forward(weights: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix a block of tokens at a time; the LayerNorm's division is folded into the weights, w_l / σ_l."""
    _, B, N, C = hidden.shape
    w = weights.expand(B, -1, -1)
    out = hidden.new_empty(w.shape[1], B, N, C)
    mean = hidden.new_empty(hidden.shape[:3], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    for b, n in _blocks(B, N):
        h = hidden[:, b, n].float()
        mean[:, b, n] = h.mean(-1)
        h = h - mean[:, b, n, None]
        rstd[:, b, n] = torch.rsqrt(h.square().mean(-1) + LN_EPS)
        scaled = torch.einsum("bdl,lbn->bndl", w[b], rstd[:, b, n])
        out[:, b, n] = torch.einsum("bndl,lbnc->dbnc", scaled, h)
    return out, mean, rstd


def _torch_backward(grad: Tensor, hidden: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    L, B, N, _ = hidden.shape
    out = torch.zeros(B, grad.shape[0], L, device=grad.device)
    for b, n in _blocks(B, N):
        h, g = hidden[:, b, n].float() - mean[:, b, n, None], grad[:, b, n].float()
        inner = torch.einsum("dbnc,lbnc->bdln", g, h)
        out[b] += torch.einsum("bdln,lbn->bdl", inner, rstd[:, b, n])
    return out


def _blocks(batch: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of batch and length that cover all tokens, about ``BLOCK_TOKENS`` at a time."""
    samples = max(1, BLOCK_TOKENS // max(length, 1))
    for b in range(0, batch, samples):
        for n in range(0, length, BLOCK_TOKENS):
            yield slice(b, b + samples), slice(n, n + BLOCK_TOKENS)
