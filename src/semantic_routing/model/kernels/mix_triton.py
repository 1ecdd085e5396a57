"""sum_l w_l LayerNorm(H_l) on CUDA, in Triton; nothing in memory but the states, the mix and two numbers per state.

Bytes. A token has L states and D depths of C channels, 2 C (L + D) bytes in bfloat16. The forward pass reads the states
and writes the depths; the backward pass reads both. All else (moments, weights, partial sums) is below 1 % of that. At
the paper's size (L = 36, D = 24, C = 2560) a token takes 307 kB, and 64 prompts of 512 tokens take 10.07 GB: at least
the time of copying 5.03 GB. The products, padded to the matrix units' tiles and doubled for the weights' halves, take
less than a quarter of that time on an H100 or H200.

Forward pass. The deviation of a state needs all of its channels, so a program reads a token's states twice: for the
moments, with a few layers at a time in registers, and for the products. A token is 184 kB, and the second-level cache
of an H200 keeps none of it from the first read to the second: the time is that of 16.1 GB, 0.60 of a copy's speed.
Prefetching the next token only adds a third read (``docs/log.md``).

Backward pass. The products of a token's gradients and states are over the channels: one pass, with tiles copied
asynchronously several stages ahead. There are no atomic additions: a program sums ``TOKENS`` tokens, and torch sums the
programs. An H200 runs it at 0.96 of a copy's speed.

Precision. Deviations are from a mean that is already known, so an offset costs no precision. Products of bfloat16 or
float16 are exact and are summed in float32. A weight w_l / σ_l is the sum of two halves in the states' dtype, 16 bits
or more. The offset is computed with the same halves, so that the rounding error of a weight multiplies H_l - μ_l and
not H_l. A configuration fixes the order of the sums; the fastest is found once per machine and kept in Triton's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

LN_EPS = tl.constexpr(1e-5)
LARGE = tl.constexpr(16384.0)
"""Value that the largest w_l / σ_l is scaled to in float16, whose smallest numbers are near 1e-7."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels on a CPU; it has no bfloat16 products."""
LAYERS = 16
"""Layers multiplied at a time: the smallest number that matrix units take."""
LANES, RUN_BYTES = 32, 16
"""Threads of a warp, and bytes that each of them loads at once."""
MAX_PIECES = 16
"""Largest number of a warp's vectors that hold a layer's state; above it, more warps share the state."""
TOKENS = 4
"""Tokens over which one program sums the weights' gradient."""
MIN_TIMED = 4096
"""Smallest number of tokens for which the configurations are timed; below it, the first that fits is used."""


def mix_forward(
    weights: Float[Tensor, "B_or_1 D L"], hidden: Float[Tensor, "L B N C"]
) -> tuple[Float[Tensor, "D B N C"], Float[Tensor, "L B N"], Float[Tensor, "L B N"]]:
    """Return the mix in the states' dtype, and each state's mean and 1 / deviation in float32.

    The weights are float32, the states bfloat16, float16 or float32; both are contiguous.
    """
    L, B, N, C = hidden.shape
    D = weights.shape[1]
    out = hidden.new_empty(D, B, N, C)
    mean = hidden.new_empty(L, B, N, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    depths, vector = _depths(D), LANES * RUN_BYTES // hidden.element_size()
    stride = D * L if weights.shape[0] > 1 else 0
    if out.numel():
        with torch.cuda.device_of(hidden):
            forward_kernel[_grid(hidden, depths, D)](
                weights, hidden, out, mean, rstd, B * N, N, stride,
                L=L, D=D, C=C, MANY=B * N >= MIN_TIMED, DEPTHS=depths, LAYERS=LAYERS, SPAN=_span(C, vector),
                VECTOR=vector,
            )  # fmt: skip
    return out, mean, rstd


def mix_backward(
    grad: Float[Tensor, "D B N C"],
    hidden: Float[Tensor, "L B N C"],
    mean: Float[Tensor, "L B N"],
    rstd: Float[Tensor, "L B N"],
) -> Float[Tensor, "B D L"]:
    """Return the float32 gradient of every sample's weights, from the gradient of the mix in the states' dtype.

    All tensors are contiguous.
    """
    L, B, N, C = hidden.shape
    D = grad.shape[0]
    depths, splits = _depths(D), triton.cdiv(N, TOKENS)
    partial = hidden.new_empty(B, splits, D, L, dtype=torch.float32)
    if partial.numel():
        with torch.cuda.device_of(hidden):
            backward_kernel[(B * splits * triton.cdiv(D, depths),)](
                grad, hidden, mean, rstd, partial, B * N, N, splits,
                L=L, D=D, C=C, MANY=B * N >= MIN_TIMED, DEPTHS=depths, LAYERS=LAYERS, TOKENS=TOKENS,
            )  # fmt: skip
    return partial.sum(1)


def _grid(hidden: Tensor, depths: int, wanted: int) -> Callable[[dict[str, Any]], tuple[int]]:
    """Return the grid of ``forward_kernel``: ``RESIDENT`` programs per processor, at most one per token and group."""
    tokens = hidden.shape[1] * hidden.shape[2]
    processors = 1 if INTERPRETED else torch.cuda.get_device_properties(hidden.device).multi_processor_count
    groups = triton.cdiv(wanted, depths)
    return lambda config: (min(tokens, max(1, processors * config["RESIDENT"] // groups)) * groups,)


def _span(channels: int, vector: int) -> int:
    """Return the channels of a state that are loaded at once, with as few warps as can hold the state."""
    return vector * min(4, triton.next_power_of_2(triton.cdiv(channels, MAX_PIECES * vector)))


def _depths(depths: int) -> int:
    """Return the depths that one program computes; for more, several programs read the same token."""
    return 16 if depths <= 16 else 32


def _within(row_bytes: int) -> Callable[..., list[triton.Config]]:
    """Return a filter of configurations: those whose rows of ``BLOCK_C`` channels have at most these bytes."""

    def fitting(configs: list[triton.Config], arguments: dict[str, Any], **options: Any) -> list[triton.Config]:
        size = arguments["hidden"].element_size()
        small = [config for config in configs if config.kwargs["BLOCK_C"] * size <= row_bytes]
        return small if options["MANY"] else small[:1]

    return fitting


def _config(warps: int, block: int, stages: int, registers: int | None = None, **options: int) -> triton.Config:
    return triton.Config({"BLOCK_C": block, **options}, num_warps=warps, num_stages=stages, maxnreg=registers)


def _resident(warps: int, block: int, stages: int, registers: int, resident: int) -> triton.Config:
    """Return a configuration with ``resident`` programs on every processor."""
    return _config(warps, block, stages, registers, WARPS=warps, RESIDENT=resident)


_FORWARD = [
    _resident(4, 128, 3, 128, 4),
    _resident(4, 128, 3, 168, 3),
    _resident(4, 64, 4, 128, 4),
    _resident(8, 128, 3, 128, 2),
]
_BACKWARD = [
    _config(4, 128, 3, 168),
    _config(4, 128, 4),
    _config(4, 64, 4),
    _config(4, 64, 6),
    _config(2, 64, 4, 168),
    _config(8, 128, 3),
]
if INTERPRETED:  # nothing to time
    _FORWARD, _BACKWARD = [_resident(1, 64, 1, 255, 1)], [_config(4, 64, 1)]


@triton.jit
@no_type_check
def _dot(a, b, acc):
    """Return acc + a b, summed in float32."""
    if a.dtype == tl.float32 or INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
@no_type_check
def _load(token, row, channel, plane, rows, C: tl.constexpr, POLICY: tl.constexpr):
    """Load channels of one token from rows (layers or depths) that are ``plane`` apart; zero out of bounds."""
    return tl.load(
        token + row.to(tl.int64)[:, None] * plane + channel[None, :],
        mask=(row < rows)[:, None] & (channel < C)[None, :],
        other=0.0,
        eviction_policy=POLICY,
    )


@triton.jit
@no_type_check
def _store_moments(
    hidden, mean, rstd, token, tokens, L: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr
):
    """Store mean and 1 / deviation of one token's states, ``ROWS`` layers at a time."""
    PIECES: tl.constexpr = (C + SPAN - 1) // SPAN
    rows = tl.arange(0, ROWS)
    span = tl.arange(0, SPAN)
    plane = tokens.to(tl.int64) * C
    for k in tl.range(0, (L + ROWS - 1) // ROWS):
        layer = rows + k * ROWS
        pieces = ()
        total = tl.zeros([ROWS, SPAN], tl.float32)
        for i in tl.static_range(PIECES):
            pieces += (_load(hidden + token * C, layer, span + i * SPAN, plane, L, C, ""),)
            total += pieces[i].to(tl.float32)
        centre = tl.sum(total, 1) / C
        squares = tl.zeros([ROWS, SPAN], tl.float32)
        for i in tl.static_range(PIECES):
            x = pieces[i].to(tl.float32) - centre[:, None]
            if i * SPAN + SPAN > C:
                x = tl.where((span + i * SPAN < C)[None, :], x, 0.0)
            squares += x * x
        place = layer.to(tl.int64) * tokens + token
        tl.store(mean + place, centre, mask=layer < L)
        tl.store(rstd + place, 1.0 / tl.sqrt(tl.sum(squares, 1) / C + LN_EPS), mask=layer < L)


@triton.jit
@no_type_check
def _load_weights(
    weights, mean, rstd, token, tokens, depth, dtype: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, DEPTHS: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """Return two halves of w_l / σ_l for each chunk of layers, the offset sum_l w_l μ_l / σ_l, and float16's scale."""
    CHUNKS: tl.constexpr = (L + LAYERS - 1) // LAYERS
    layers = tl.arange(0, LAYERS)
    scales = ()
    gain = 1.0
    largest = 0.0
    for k in tl.static_range(CHUNKS):
        layer = layers + k * LAYERS
        scales += (tl.load(rstd + layer.to(tl.int64) * tokens + token, mask=layer < L, other=0.0),)
        if dtype == tl.float16:
            largest = tl.maximum(largest, tl.max(scales[k], 0))
            gain = LARGE / largest
    high = ()
    low = ()
    offset = tl.zeros([DEPTHS], tl.float32)
    for k in tl.static_range(CHUNKS):
        layer = layers + k * LAYERS
        centre = tl.load(mean + layer.to(tl.int64) * tokens + token, mask=layer < L, other=0.0)
        w = tl.load(
            weights + depth[:, None] * L + layer[None, :], mask=(depth < D)[:, None] & (layer < L)[None, :], other=0.0
        )
        scaled = w * (scales[k] * gain)[None, :]
        hi = scaled.to(dtype)
        lo = (scaled - hi.to(tl.float32)).to(dtype)
        offset += tl.sum((hi.to(tl.float32) + lo.to(tl.float32)) * centre[None, :], 1)
        high += (hi,)
        low += (lo,)
    return high, low, offset, gain


@triton.autotune(
    _FORWARD, key=["L", "D", "C", "MANY"], prune_configs_by={"early_config_prune": _within(512)}, cache_results=True
)
@triton.jit(do_not_specialize=["tokens", "length", "sample_stride"])
@no_type_check
def forward_kernel(
    weights,  # [B or 1, D, L]
    hidden,  # [L, tokens, C]
    out,  # [D, tokens, C]
    mean,  # [L, tokens]
    rstd,
    tokens,
    length,  # tokens of a sample
    sample_stride,  # between two samples' weights; 0 if they share them
    L: tl.constexpr, D: tl.constexpr, C: tl.constexpr, MANY: tl.constexpr,
    DEPTHS: tl.constexpr, LAYERS: tl.constexpr, SPAN: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, WARPS: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Grid-stride loop over tokens: moments of each layer's state, then the weighted sums for ``DEPTHS`` depths."""
    GROUPS: tl.constexpr = (D + DEPTHS - 1) // DEPTHS
    CHUNKS: tl.constexpr = (L + LAYERS - 1) // LAYERS
    ROWS: tl.constexpr = WARPS * VECTOR // SPAN  # layers whose states the program's registers hold
    depth = tl.program_id(0) % GROUPS * DEPTHS + tl.arange(0, DEPTHS)
    stride = tl.num_programs(0) // GROUPS
    layers = tl.arange(0, LAYERS)
    plane = tokens.to(tl.int64) * C
    dtype = hidden.dtype.element_ty

    token = (tl.program_id(0) // GROUPS).to(tl.int64)
    while token < tokens:
        _store_moments(hidden, mean, rstd, token, tokens, L, C, ROWS, SPAN)
        tl.debug_barrier()  # what other threads stored is read below

        own = weights + token // length * sample_stride
        high, low, offset, gain = _load_weights(own, mean, rstd, token, tokens, depth, dtype, L, D, DEPTHS, LAYERS)
        for c in tl.range(0, C, BLOCK_C):
            channel = c + tl.arange(0, BLOCK_C)
            tiles = ()
            for k in tl.static_range(CHUNKS):
                tiles += (_load(hidden + token * C, layers + k * LAYERS, channel, plane, L, C, "evict_first"),)
            acc = tl.zeros([DEPTHS, BLOCK_C], tl.float32) - offset[:, None]
            for k in tl.static_range(CHUNKS):
                acc = _dot(high[k], tiles[k], acc)
                if dtype != tl.float32:
                    acc = _dot(low[k], tiles[k], acc)
            if dtype == tl.float16:
                acc = acc * (1.0 / gain)
            tl.store(
                out + depth.to(tl.int64)[:, None] * plane + token * C + channel[None, :],
                acc.to(dtype),
                mask=(depth < D)[:, None] & (channel < C)[None, :],
                eviction_policy="evict_first",
            )
        token += stride


@triton.autotune(
    _BACKWARD, key=["L", "D", "C", "MANY"], prune_configs_by={"early_config_prune": _within(256)}, cache_results=True
)
@triton.jit(do_not_specialize=["tokens", "length", "splits"])
@no_type_check
def backward_kernel(
    grad,  # [D, tokens, C]
    hidden,  # [L, tokens, C]
    mean,  # [L, tokens]
    rstd,
    partial,  # [B * splits, D, L]
    tokens,
    length,  # tokens of a sample
    splits,  # programs that share a sample
    L: tl.constexpr, D: tl.constexpr, C: tl.constexpr, MANY: tl.constexpr,
    DEPTHS: tl.constexpr, LAYERS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum over up to ``TOKENS`` tokens n of a sample, for ``DEPTHS`` depths: (g_n · h_n - mean_n sum_c g_n) / σ_n."""
    GROUPS: tl.constexpr = (D + DEPTHS - 1) // DEPTHS
    CHUNKS: tl.constexpr = (L + LAYERS - 1) // LAYERS
    program = tl.program_id(0) // GROUPS
    depth = tl.program_id(0) % GROUPS * DEPTHS + tl.arange(0, DEPTHS)
    layers = tl.arange(0, LAYERS)
    plane = tokens.to(tl.int64) * C
    skipped = program % splits * TOKENS
    first = (program // splits).to(tl.int64) * length + skipped
    ones = tl.full([BLOCK_C, LAYERS], 1.0, tl.float32).to(hidden.dtype.element_ty)

    totals = ()
    for _ in tl.static_range(CHUNKS):
        totals += (tl.zeros([DEPTHS, LAYERS], tl.float32),)
    for i in tl.range(0, TOKENS):
        token = first + i
        there = skipped + i < length
        centres = ()
        scales = ()
        sums = ()
        for k in tl.static_range(CHUNKS):
            layer = layers + k * LAYERS
            place = layer.to(tl.int64) * tokens + token
            centres += (tl.load(mean + place, mask=there & (layer < L), other=0.0),)
            scales += (tl.load(rstd + place, mask=there & (layer < L), other=0.0),)
            sums += (tl.zeros([DEPTHS, LAYERS], tl.float32),)
        whole = tl.zeros([DEPTHS, LAYERS], tl.float32)  # the gradient's sum over channels, in every column
        for c in tl.range(0, C, BLOCK_C):
            channel = c + tl.arange(0, BLOCK_C)
            g = _load(grad + token * C, depth, channel, plane, tl.where(there, D, 0), C, "evict_first")
            tiles = ()
            for k in tl.static_range(CHUNKS):
                row = layers + k * LAYERS
                tiles += (_load(hidden + token * C, row, channel, plane, tl.where(there, L, 0), C, "evict_first"),)
            whole = _dot(g, ones, whole)
            added = ()
            for k in tl.static_range(CHUNKS):
                added += (_dot(g, tl.trans(tiles[k]), sums[k]),)
            sums = added
        added = ()
        for k in tl.static_range(CHUNKS):
            added += (totals[k] + (sums[k] - whole * centres[k][None, :]) * scales[k][None, :],)
        totals = added

    partial += program.to(tl.int64) * (D * L)
    for k in tl.static_range(CHUNKS):
        layer = layers + k * LAYERS
        mask = (depth < D)[:, None] & (layer < L)[None, :]
        tl.store(partial + depth[:, None] * L + layer[None, :], totals[k], mask=mask)
