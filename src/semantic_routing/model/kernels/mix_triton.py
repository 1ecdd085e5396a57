"""sum_l w_l LayerNorm(H_l) on CUDA, in Triton: nothing but the states, the depths and two numbers a state in memory.

Bytes. A token has L states and D depths of C channels, in bfloat16 2 C (L + D) bytes: forward reads the states and
writes the depths, backward reads both, and all else (moments, weights, partial sums) is below 1 % of it. At the paper's
size (L = 36, D = 24, C = 2560) that is 307 kB a token, and 10.07 GB for 64 prompts of 512 tokens: no less than the time
of copying 5.03 GB. The products, padded to the matrix units' tiles and twice for the weights' halves, are less than a
quarter of what an H100 or H200 multiplies in that time.

Forward. A state must be whole before its deviation is known, so a program goes over a token's states twice: for the
moments, a few layers at a time held in registers whole, and for the products. A token is 184 kB, and on an H200 the
second-level cache keeps none of it from the first touch to the second: the time is that of 16.1 GB, 0.60 of a copy's.
Fetching the next token ahead only adds a third touch (``docs/log.md``).

Backward. The products of a token's gradients and its states are over the channels: one pass, its tiles copied
asynchronously, several stages ahead. No atomic additions: a program adds up ``TOKENS`` tokens, torch the programs.
An H200 runs it at 0.96 of the speed of a copy.

Precision. Deviations are from a mean that is known before, so an offset costs nothing. Products of
bfloat16 or float16 are exact and are summed in float32; a weight w_l / σ_l is the sum of two halves in the states'
type, 16 bits or more, and the offset takes the means by the same halves, so that what is lost of a weight multiplies
H_l - μ_l and not H_l. Sums run in an order that a configuration fixes; which one is the fastest is measured once a
machine and kept in Triton's cache.
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
"""What the largest w_l / σ_l becomes in float16, whose smallest numbers are near 1e-7."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""On a CPU, where Triton's interpreter knows no products of bfloat16."""
LAYERS = 16
"""Layers multiplied at a time, the least that matrix units take."""
LANES, RUN_BYTES = 32, 16
"""Threads of a warp, and what each of them loads at once."""
PIECES = 16
"""Vectors of a warp that hold a layer's state at most, until more warps share it."""
TOKENS = 4
"""Tokens whose contributions to the weights' gradient one program sums."""
MEASURED = 4096
"""Tokens from which on it pays to measure what configuration is the fastest; below, it is the first that fits."""


def mix_forward(
    weights: Float[Tensor, "B_or_1 D L"], hidden: Float[Tensor, "L B N C"]
) -> tuple[Float[Tensor, "D B N C"], Float[Tensor, "L B N"], Float[Tensor, "L B N"]]:
    """The mix in the states' type, and each state's mean and 1 / deviation in float32.

    The weights are in float32, the states in bfloat16, float16 or float32; both are contiguous.
    """
    L, B, N, C = hidden.shape
    D = weights.shape[1]
    out = hidden.new_empty(D, B, N, C)
    mean = hidden.new_empty(L, B, N, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    depths, vector = _depths(D), LANES * RUN_BYTES // hidden.element_size()
    if out.numel():
        with torch.cuda.device_of(hidden):
            _forward[_programs(hidden, depths, D)](
                weights,
                hidden,
                out,
                mean,
                rstd,
                B * N,
                N,
                D * L if weights.shape[0] > 1 else 0,
                L=L,
                D=D,
                C=C,
                MANY=B * N >= MEASURED,
                DEPTHS=depths,
                LAYERS=LAYERS,
                SPAN=_span(C, vector),
                VECTOR=vector,
            )
    return out, mean, rstd


def mix_backward(
    grad: Float[Tensor, "D B N C"],
    hidden: Float[Tensor, "L B N C"],
    mean: Float[Tensor, "L B N"],
    rstd: Float[Tensor, "L B N"],
) -> Float[Tensor, "B D L"]:
    """The gradient of every sample's weights in float32, from that of the mix in the states' type; all contiguous."""
    L, B, N, C = hidden.shape
    D = grad.shape[0]
    depths, splits = _depths(D), triton.cdiv(N, TOKENS)
    partial = hidden.new_empty(B, splits, D, L, dtype=torch.float32)
    if partial.numel():
        with torch.cuda.device_of(hidden):
            _backward[(B * splits * triton.cdiv(D, depths),)](
                grad,
                hidden,
                mean,
                rstd,
                partial,
                B * N,
                N,
                splits,
                L=L,
                D=D,
                C=C,
                MANY=B * N >= MEASURED,
                DEPTHS=depths,
                LAYERS=LAYERS,
                TOKENS=TOKENS,
            )
    return partial.sum(1)


def _programs(hidden: Tensor, depths: int, wanted: int) -> Callable[[dict[str, Any]], tuple[int]]:
    """As many programs as a configuration wants on each processor, for each group of depths, or as there are tokens."""
    tokens = hidden.shape[1] * hidden.shape[2]
    processors = 1 if INTERPRETED else torch.cuda.get_device_properties(hidden.device).multi_processor_count
    groups = triton.cdiv(wanted, depths)
    return lambda config: (min(tokens, max(1, processors * config["RESIDENT"] // groups)) * groups,)


def _span(channels: int, vector: int) -> int:
    """Channels of a state that are loaded at once: as few warps as can hold it."""
    return vector * min(4, triton.next_power_of_2(triton.cdiv(channels, PIECES * vector)))


def _depths(depths: int) -> int:
    """How many depths a program takes; where there are more, programs side by side share a token's states."""
    return 16 if depths <= 16 else 32


def _within(row_bytes: int) -> Callable[..., list[triton.Config]]:
    """Chooses the configurations to measure: with rows no wider, so that float32 states take half the channels."""

    def fitting(configs: list[triton.Config], arguments: dict[str, Any], **options: Any) -> list[triton.Config]:
        size = arguments["hidden"].element_size()
        found = [config for config in configs if config.kwargs["BLOCK_C"] * size <= row_bytes]
        return found if options["MANY"] else found[:1]

    return fitting


def _config(warps: int, block: int, stages: int, registers: int | None = None, **options: int) -> triton.Config:
    return triton.Config({"BLOCK_C": block, **options}, num_warps=warps, num_stages=stages, maxnreg=registers)


def _resident(warps: int, block: int, stages: int, registers: int, resident: int) -> triton.Config:
    """``resident`` programs on every processor."""
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
if INTERPRETED:  # nothing to measure
    _FORWARD, _BACKWARD = [_resident(1, 64, 1, 255, 1)], [_config(4, 64, 1)]


@triton.jit
@no_type_check
def _dot(a, b, acc):
    """acc + a b, summed in float32."""
    if a.dtype == tl.float32 or INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
@no_type_check
def _load(token, row, channel, plane, rows, C: tl.constexpr, POLICY: tl.constexpr):
    """Some channels of one token in rows, layers or depths, that lie ``plane`` apart; zero where there are none."""
    return tl.load(
        token + row.to(tl.int64)[:, None] * plane + channel[None, :],
        mask=(row < rows)[:, None] & (channel < C)[None, :],
        other=0.0,
        eviction_policy=POLICY,
    )


@triton.autotune(
    _FORWARD, key=["L", "D", "C", "MANY"], prune_configs_by={"early_config_prune": _within(512)}, cache_results=True
)
@triton.jit(do_not_specialize=["tokens", "length", "sample_stride"])
@no_type_check
def _forward(
    weights,  # [B or 1, D, L]
    hidden,  # [L, tokens, C]
    out,  # [D, tokens, C]
    mean,  # [L, tokens]
    rstd,
    tokens,
    length,  # tokens of a sample
    sample_stride,  # between two samples' weights, 0 where they share them
    L: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    MANY: tl.constexpr,
    DEPTHS: tl.constexpr,
    LAYERS: tl.constexpr,
    SPAN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WARPS: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Every so manieth token for ``DEPTHS`` depths: first its states' moments, then their products."""
    GROUPS: tl.constexpr = (D + DEPTHS - 1) // DEPTHS
    CHUNKS: tl.constexpr = (L + LAYERS - 1) // LAYERS
    ROWS: tl.constexpr = WARPS * VECTOR // SPAN  # layers whose states the program's registers hold
    PIECES: tl.constexpr = (C + SPAN - 1) // SPAN
    depth = tl.program_id(0) % GROUPS * DEPTHS + tl.arange(0, DEPTHS)
    stride = tl.num_programs(0) // GROUPS
    layers = tl.arange(0, LAYERS)
    rows = tl.arange(0, ROWS)
    span = tl.arange(0, SPAN)
    plane = tokens.to(tl.int64) * C
    dtype = hidden.dtype.element_ty

    token = (tl.program_id(0) // GROUPS).to(tl.int64)
    while token < tokens:
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
        tl.debug_barrier()  # what other threads stored is read below

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
            own = weights + token // length * sample_stride + depth[:, None] * L + layer[None, :]
            w = tl.load(own, mask=(depth < D)[:, None] & (layer < L)[None, :], other=0.0)
            scaled = w * (scales[k] * gain)[None, :]
            hi = scaled.to(dtype)
            lo = (scaled - hi.to(tl.float32)).to(dtype)
            offset += tl.sum((hi.to(tl.float32) + lo.to(tl.float32)) * centre[None, :], 1)
            high += (hi,)
            low += (lo,)

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
def _backward(
    grad,  # [D, tokens, C]
    hidden,  # [L, tokens, C]
    mean,  # [L, tokens]
    rstd,
    partial,  # [B * splits, D, L]
    tokens,
    length,  # tokens of a sample
    splits,  # programs that share a sample
    L: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    MANY: tl.constexpr,
    DEPTHS: tl.constexpr,
    LAYERS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Up to ``TOKENS`` tokens of one sample for ``DEPTHS`` depths: sum_n (g_n · h_n - mean_n sum_c g_n) / σ_n."""
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
        whole = tl.zeros([DEPTHS, LAYERS], tl.float32)  # the gradient's sum over channels, alike in all columns
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
