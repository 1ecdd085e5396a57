"""The layers of a block, each against its plainest implementation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semantic_routing.model.layers import (
    BlockText,
    CrossAttention,
    GatedMLP,
    RMSNorm,
    SelfAttention,
    TimeEmbedding,
    apply_rope,
    attention,
    linear,
    rope_2d,
    sinusoidal,
    zero_,
)

CPU = torch.device("cpu")


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend one query at a time to its head's visible keys, in float64."""
    B, H, S, hd = q.shape
    out = torch.empty(B, H, S, hd, dtype=torch.float64)
    for b in range(B):
        seen = slice(None) if mask is None else mask[b]
        for h in range(H):
            group = h * k.shape[1] // H
            keys, values = k[b, group, seen].double(), v[b, group, seen].double()
            for s in range(S):
                scores = keys @ q[b, h, s].double() / math.sqrt(hd)
                out[b, h, s] = (scores.exp() / scores.exp().sum()) @ values
    return out


def qkv(heads: int, kv_heads: int, length: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    q = torch.randn(2, heads, 5, 8, dtype=dtype)
    k, v = torch.randn(2, 2, kv_heads, length, 8, dtype=dtype)
    return q, k, v


def some_mask(length: int = 7) -> Tensor:
    """Return the mask of two prompts: one fills the length, the other has three tokens."""
    return torch.arange(length) < torch.tensor([[length], [3]])


HEADS = [(4, 4), (6, 2), (4, 1), (1, 1)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_grouped_attention_is_attention_with_repeated_heads(heads: int, kv_heads: int, masked: bool) -> None:
    q, k, v = qkv(heads, kv_heads, dtype=torch.float64)
    mask = some_mask() if masked else None
    out = attention(q, k, v, mask)
    repeated = [x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v)]
    sdpa = F.scaled_dot_product_attention(q, *repeated, attn_mask=None if mask is None else mask[:, None, None, :])
    # The softmax runs in float32 for every dtype of inputs.
    torch.testing.assert_close(out, sdpa, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out, naive_attention(q, k, v, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_gradients_are_those_of_repeated_heads(heads: int, kv_heads: int) -> None:
    leaves = [x.requires_grad_() for x in qkv(heads, kv_heads)]
    upstream = torch.randn(2, heads, 5, 8)
    grads = torch.autograd.grad(attention(*leaves, some_mask()), leaves, upstream)
    expected = torch.autograd.grad(naive_attention(*leaves, some_mask()), leaves, upstream.double())
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5)


def test_masked_keys_weigh_exactly_nothing() -> None:
    q, k, v = qkv(4, 2)
    short = attention(q, k[:, :, :3], v[:, :, :3])
    mask = torch.arange(7).expand(2, -1) < 3
    k[:, :, 3:], v[:, :, 3:] = 1e4, -1e30
    torch.testing.assert_close(attention(q, k, v, mask), short, rtol=1e-6, atol=1e-6)


def test_bfloat16_attention_stays_within_its_rounding() -> None:
    q, k, v = (x.bfloat16() for x in qkv(4, 2, length=300))
    out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    # Scores and weights are rounded to 8 significant bits; 300 such errors average out.
    torch.testing.assert_close(out.double(), naive_attention(q, k, v), rtol=2**-6, atol=2**-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_on_cuda(heads: int, kv_heads: int, masked: bool) -> None:
    q, k, v = qkv(heads, kv_heads)
    mask = some_mask() if masked else None
    out = attention(q.cuda(), k.cuda(), v.cuda(), None if mask is None else mask.cuda())
    torch.testing.assert_close(out.cpu().double(), naive_attention(q, k, v, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 7), (6, 2), (1, 5)])
def test_rope_scores_depend_on_offsets_alone(height: int, width: int) -> None:
    rope = rope_2d(height, width, 16, 100.0, CPU)
    q, k = (torch.randn(16).expand(1, height * width, 1, 16) for _ in range(2))
    scores = apply_rope(q, rope)[0, :, 0] @ apply_rope(k, rope)[0, :, 0].T
    scores = scores.reshape(height, width, height, width)
    seen: dict[tuple[int, int], Tensor] = {}
    for index in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape)):
        r, c, r2, c2 = index.tolist()
        expected = seen.setdefault((r - r2, c - c2), scores[r, c, r2, c2])
        torch.testing.assert_close(scores[r, c, r2, c2], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[0, 0], q[0, 0, 0] @ k[0, 0, 0], rtol=1e-5, atol=1e-5)
    values = torch.stack(list(seen.values()))
    assert values.unique().numel() == len(seen), "different offsets must score differently"


def test_rope_turns_pairs_by_row_then_by_column() -> None:
    height, width, hd, theta = 3, 4, 8, 50.0
    x = torch.randn(1, height * width, 1, hd)
    out = apply_rope(x, rope_2d(height, width, hd, theta, CPU))[0, :, 0]
    for r in range(height):
        for c in range(width):
            token, turned = x[0, r * width + c, 0], out[r * width + c]
            positions = [r, r, c, c]
            speeds = [1.0, theta**-0.5] * 2
            for i, (position, speed) in enumerate(zip(positions, speeds, strict=True)):
                # The pair (i, i + hd/2) is a complex number that turns.
                z = torch.complex(token[i], token[i + 4]) * torch.polar(
                    torch.tensor(1.0), torch.tensor(position * speed)
                )
                torch.testing.assert_close(torch.stack([turned[i], turned[i + 4]]), torch.view_as_real(z))


def test_rope_of_a_larger_grid_continues_that_of_a_smaller() -> None:
    small, large = (rope_2d(n, n + 1, 8, 1e4, CPU) for n in (3, 5))
    for a, b in zip(small, large, strict=True):
        assert torch.equal(a.reshape(3, 4, 4), b.reshape(5, 6, 4)[:3, :4])


def test_rope_made_while_sampling_serves_training() -> None:
    grid = (5, 3, 8, 1234.5, CPU)  # in no other test, so that sampling makes it
    with torch.inference_mode():
        rope_2d(*grid)
    x = torch.randn(1, 15, 1, 8, requires_grad=True)
    apply_rope(x, rope_2d(*grid)).sum().backward()
    assert x.grad is not None


def test_rope_needs_quarters() -> None:
    with pytest.raises(ValueError, match="head_dim 6 must be a multiple of 4"):
        rope_2d(2, 2, 6, 1e4, CPU)


def test_linear_is_xavier_for_each_part_by_itself() -> None:
    width, parts = 64, (256, 16, 64)
    layer = linear(width, *parts, bias=True)
    assert layer.weight.shape == (sum(parts), width)
    assert layer.bias.eq(0).all()
    for part in layer.weight.split(parts):
        bound = math.sqrt(6 / (width + part.shape[0]))
        assert 0.98 * bound < part.abs().max() <= bound
        torch.testing.assert_close(part.std().item(), bound / math.sqrt(3), rtol=0.05, atol=0)
    assert linear(4, 4).bias is None


def test_zero_silences_a_layer() -> None:
    layer = zero_(nn.Linear(3, 4))
    assert layer(torch.randn(2, 3)).eq(0).all()


def test_rms_norm_is_torchs_and_runs_in_float32() -> None:
    norm, x = RMSNorm(16), torch.tensor([[1e-3], [1.0], [100.0]]) * torch.randn(3, 16)
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, eps=1e-6))
    rough = norm(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert torch.equal(rough, norm(x.bfloat16().float()).bfloat16())


def split_heads(x: Tensor, hd: int) -> Tensor:
    return x.unflatten(-1, (-1, hd)).transpose(1, 2)


def test_self_attention_written_out() -> None:
    layer, x = SelfAttention(24, heads=4, kv_heads=2, head_dim=8), torch.randn(2, 6, 24)
    for norm in (layer.q_norm, layer.k_norm):
        nn.init.normal_(norm.weight)
    rope = rope_2d(2, 3, 8, 1e4, CPU)
    wq, wk, wv = layer.qkv.weight.split([32, 16, 16])
    q, k = (
        apply_rope(norm((x @ w.T).unflatten(-1, (-1, 8))), rope).transpose(1, 2)
        for norm, w in ((layer.q_norm, wq), (layer.k_norm, wk))
    )
    expected = naive_attention(q, k, split_heads(x @ wv.T, 8)).transpose(1, 2).flatten(2)
    expected = expected @ layer.out.weight.double().T
    torch.testing.assert_close(layer(x, rope).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_with_text_is_one_softmax_over_both(masked: bool) -> None:
    """Deep fusion: text first and under its mask, then all image tokens."""
    layer, x = SelfAttention(24, heads=4, kv_heads=2, head_dim=8), torch.randn(2, 6, 24)
    text = BlockText(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), some_mask(5) if masked else None)
    rope = rope_2d(2, 3, 8, 1e4, CPU)
    q, k, v = (part.unflatten(-1, (-1, 8)) for part in layer.qkv(x).split(layer.sizes, dim=-1))
    q, k = (apply_rope(norm(part), rope).transpose(1, 2) for norm, part in ((layer.q_norm, q), (layer.k_norm, k)))
    k, v = torch.cat([text.keys, k], dim=2), torch.cat([text.values, v.transpose(1, 2)], dim=2)
    seen = None if text.mask is None else torch.cat([text.mask, torch.ones(2, 6, dtype=torch.bool)], dim=1)
    expected = layer.out(naive_attention(q, k, v, seen).float().transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, rope, text), expected, rtol=1e-4, atol=1e-5)


def test_cross_attention_written_out() -> None:
    layer = CrossAttention(24, 20, heads=4, kv_heads=2, head_dim=8)
    x, text, mask = torch.randn(2, 6, 24), torch.randn(2, 7, 20), some_mask()
    wk, wv = layer.kv.weight.chunk(2)
    q = layer.q_norm((x @ layer.q.weight.T).unflatten(-1, (-1, 8))).transpose(1, 2)
    k = layer.k_norm((text @ wk.T).unflatten(-1, (-1, 8))).transpose(1, 2)
    expected = naive_attention(q, k, split_heads(text @ wv.T, 8), mask).transpose(1, 2).flatten(2)
    out = layer(x, BlockText(*layer.prepare(text), mask))
    torch.testing.assert_close(out.double(), expected @ layer.out.weight.double().T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_mlp_written_out(activation: str) -> None:
    layer, x = GatedMLP(6, 10, activation), torch.randn(1, 3, 6)
    gate, up = layer.gate_up.weight.chunk(2)
    g = x @ gate.T
    # silu(g) = g sigma(g); the tanh form of GELU is g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))).
    curve = 1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))
    acted = g / (1 + torch.exp(-g)) if activation == "silu" else g / 2 * curve
    torch.testing.assert_close(layer(x), (acted * (x @ up.T)) @ layer.down.weight.T, rtol=1e-4, atol=1e-5)


def test_sinusoids_are_equation_12() -> None:
    t = torch.tensor([0.0, 0.3, 1.0])
    phi = sinusoidal(t, 8)
    for b, s in enumerate(t.tolist()):
        omega = [10000 ** (-2 * i / 8) for i in range(4)]
        expected = [math.cos(s * w) for w in omega] + [math.sin(s * w) for w in omega]
        torch.testing.assert_close(phi[b], torch.tensor(expected))


def test_time_embedding_reads_a_thousand_times_the_time() -> None:
    layer, t = TimeEmbedding(12), torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(layer(t), layer.mlp(sinusoidal(torch.tensor([0.0, 250.0, 1000.0]), 256)))
