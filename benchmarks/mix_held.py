"""A variant of the mix's forward pass, for ``mix_gpu.py`` to time: it keeps part of a token's states in registers.

The program's kernel reads a token twice, with four programs of 184 kB on each of 132 processors between the two reads:
97 MB, more than an H200's second-level cache of 60 MB holds. Here a program keeps the first ``HELD`` times 16 layers
after their moments, and reads only the others again. With one program a processor these are 13 MB (16 layers kept) or
3 MB (32), and are to be found in the cache. With 8 warps and 16 layers kept the kernel compiles for sm_90 to 250
registers and spills none; with 32 it spills 172 bytes. It was never run on a GPU. It waits for each group of layers
with less beside it to do, so it may lose by latency what it saves in bytes.

The moments need only one pass: deviations are taken from the mean of the state's first run of channels, which cancels
at most as many times the rounding error as there are runs. It takes bfloat16 or float32 and at most 32 depths.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from semantic_routing.model.kernels.mix_triton import INTERPRETED, LAYERS, LN_EPS, _dot, _load


def held_forward(
    weights: Float[Tensor, "B_or_1 D L"], hidden: Float[Tensor, "L B N C"]
) -> tuple[Float[Tensor, "D B N C"], Float[Tensor, "L B N"], Float[Tensor, "L B N"]]:
    """Return what ``mix_triton.mix_forward`` returns."""
    L, B, N, C = hidden.shape
    D = weights.shape[1]
    out = hidden.new_empty(D, B, N, C)
    mean = hidden.new_empty(L, B, N, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    processors = 1 if INTERPRETED else torch.cuda.get_device_properties(hidden.device).multi_processor_count
    with torch.cuda.device_of(hidden):
        held_kernel[(min(B * N, processors),)](
            weights, hidden, out, mean, rstd, B * N, N, D * L if weights.shape[0] > 1 else 0,
            L=L, D=D, C=C, DEPTHS=16 if D <= 16 else 32, LAYERS=LAYERS,
        )  # fmt: skip
    return out, mean, rstd


def _config(held: int, warps: int, block: int, registers: int) -> triton.Config:
    return triton.Config({"HELD": held, "BLOCK_C": block}, num_warps=warps, num_stages=1, maxnreg=registers)


CONFIGS = [_config(1, 8, 256, 255), _config(2, 8, 256, 255), _config(2, 16, 256, 128)]
if INTERPRETED:  # nothing to time
    CONFIGS = [_config(1, 1, 64, 255)]


@triton.autotune(CONFIGS, key=["L", "D", "C"])
@triton.jit(do_not_specialize=["tokens", "length", "sample_stride"])
@no_type_check
def held_kernel(
    weights, hidden, out, mean, rstd, tokens, length, sample_stride,  # as those of ``forward_kernel``
    L: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DEPTHS: tl.constexpr, LAYERS: tl.constexpr,
    BLOCK_C: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Grid-stride loop over tokens: moments and scaled weights by chunks of layers, then the weighted sums."""
    CHUNKS: tl.constexpr = (L + LAYERS - 1) // LAYERS
    RUNS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    FIRST: tl.constexpr = min(C, BLOCK_C)
    depth = tl.arange(0, DEPTHS)
    rows = tl.arange(0, LAYERS)
    span = tl.arange(0, BLOCK_C)
    plane = tokens.to(tl.int64) * C
    dtype = hidden.dtype.element_ty

    token = tl.program_id(0).to(tl.int64)
    while token < tokens:
        own = weights + token // length * sample_stride
        held = ()
        high = ()
        low = ()
        offset = tl.zeros([DEPTHS], tl.float32)
        for k in tl.static_range(CHUNKS):
            layer = rows + k * LAYERS
            runs = ()
            for i in tl.static_range(RUNS):
                runs += (_load(hidden + token * C, layer, span + i * BLOCK_C, plane, L, C, "evict_last"),)
            pivot = tl.sum(runs[0].to(tl.float32), 1) / FIRST
            total = tl.zeros([LAYERS, BLOCK_C], tl.float32)
            squares = tl.zeros([LAYERS, BLOCK_C], tl.float32)
            for i in tl.static_range(RUNS):
                x = runs[i].to(tl.float32) - pivot[:, None]
                if i * BLOCK_C + BLOCK_C > C:
                    x = tl.where((span + i * BLOCK_C < C)[None, :], x, 0.0)
                total += x
                squares += x * x
            away = tl.sum(total, 1) / C
            centre = pivot + away
            scale = 1.0 / tl.sqrt(tl.sum(squares, 1) / C - away * away + LN_EPS)
            place = layer.to(tl.int64) * tokens + token
            tl.store(mean + place, centre, mask=layer < L)
            tl.store(rstd + place, scale, mask=layer < L)
            there = (depth < D)[:, None] & (layer < L)[None, :]
            scaled = tl.load(own + depth[:, None] * L + layer[None, :], mask=there, other=0.0) * scale[None, :]
            hi = scaled.to(dtype)
            lo = (scaled - hi.to(tl.float32)).to(dtype)
            offset += tl.sum((hi.to(tl.float32) + lo.to(tl.float32)) * centre[None, :], 1)
            high += (hi,)
            low += (lo,)
            if k < HELD:
                held += (runs,)

        for i in tl.static_range(RUNS):
            channel = span + i * BLOCK_C
            acc = tl.zeros([DEPTHS, BLOCK_C], tl.float32) - offset[:, None]
            for k in tl.static_range(CHUNKS):
                if k < HELD:
                    tile = held[k][i]
                else:
                    tile = _load(hidden + token * C, rows + k * LAYERS, channel, plane, L, C, "evict_first")
                acc = _dot(high[k], tile, acc)
                if dtype != tl.float32:
                    acc = _dot(low[k], tile, acc)
            tl.store(
                out + depth.to(tl.int64)[:, None] * plane + token * C + channel[None, :],
                acc.to(dtype),
                mask=(depth < D)[:, None] & (channel < C)[None, :],
                eviction_policy="evict_first",
            )
        token += tl.num_programs(0)
