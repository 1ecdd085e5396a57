"""Packed prompts: the velocities of padded prompts, one graph for any lengths. On a CPU with a naive kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import varlen

from semantic_routing.model import packing
from semantic_routing.model.context import TextContext, join_contexts
from semantic_routing.model.dit import DiT
from semantic_routing.model.packing import Packing, can_pack
from semantic_routing.model.varlen import varlen_attention
from semantic_routing.sampling.guidance import guided
from semantic_routing.sampling.samplers import euler, schedule
from semantic_routing.text.features import TextFeatures
from tests.helpers.forked import run
from tests.helpers.networks import tiny_network

TIMES = schedule(4)


def naive(q: Tensor, k: Tensor, v: Tensor, q_ranges: Tensor, k_ranges: Tensor) -> Tensor:
    """Attend one sequence at a time, with heads repeated, in float64."""
    found = []
    for rows, keys in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        a = q[slice(*rows)].double()
        b, c = (x[slice(*keys)].double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        weights = (torch.einsum("qhd,khd->hqk", a, b) / math.sqrt(q.shape[-1])).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, c))
    return torch.cat(found)


def pairs(cu_seqlens: Tensor) -> Tensor:
    return torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], dim=1)


@varlen._varlen_attn.register_kernel("cpu")
def on_cpu(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, *args: Any) -> Any:
    out = naive(query, key, value, pairs(cu_seq_q), pairs(cu_seq_k)).to(query.dtype)
    return out, out.new_zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Text is packed on a CPU, too."""
    with monkeypatch.context() as patch:
        patch.setattr(packing, "can_pack", lambda x: True)
        yield patch


def network(arm: str) -> DiT:
    model = tiny_network(arm, width=32, kv_heads=2, heads=4, text_width=32, text_layers=5)
    assert isinstance(model, DiT)
    return model


def text(*lengths: int, longest: int = 16) -> TextFeatures:
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return TextFeatures(torch.randn(5, len(lengths), longest, 32), mask)


@pytest.mark.parametrize(
    "arm", ["penultimate", "uniform", "depth", "time", "joint", "attention", "joint-state", "depth-heads-kv"]
)
def test_packed_text_gives_the_velocity_of_padded_text(arm: str, packed: pytest.MonkeyPatch) -> None:
    model, features, x, t = network(arm), text(3, 16, 9), torch.randn(3, 3, 8, 8), torch.rand(3)
    context = model.prepare_text(features, t)
    assert context.mask is None
    assert context.keys[0].shape == (1, 2, 28, 8)
    found = model(x, t, context)
    packed.undo()
    torch.testing.assert_close(found, model(x, t, model.prepare_text(features, t)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", ["depth", "joint", "time-state", "depth-heads"])
@pytest.mark.parametrize("prompts", [(3, 16, 9), (16, 16, 16)])
@pytest.mark.parametrize("null", [1, 16])
def test_guidance_of_packed_text_is_guidance_of_padded_text(
    arm: str, prompts: tuple[int, ...], null: int, packed: pytest.MonkeyPatch
) -> None:
    model, features, nothing, x = network(arm), text(*prompts), text(null), torch.randn(3, 3, 8, 8)
    found = euler(guided(model, features, nothing, 3.0, times=TIMES), x, TIMES)
    packed.undo()
    masked = euler(guided(model, features, nothing, 3.0, times=TIMES), x, TIMES)
    torch.testing.assert_close(found, masked, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_router_and_the_keys(packed: pytest.MonkeyPatch) -> None:
    model, features, t = network("depth").requires_grad_(), text(3, 16, 9), torch.rand(3)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        context = model.prepare_text(features, t)
        tokens = [context.keys[2], context.values[2]]
        seen = tokens if context.mask is None else [x.transpose(1, 2)[context.mask] for x in tokens]
        sum(x.square().sum() for x in seen).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    packed.undo()
    masked = gradients()
    assert found.keys() == masked.keys()
    assert "router.logits" in found
    for name, grad in masked.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "arm", ["penultimate", "uniform", "depth", "time", "joint", "attention", "joint-state", "depth-heads-kv"]
)
def test_prompts_that_arrive_packed_give_keys_values_and_gradients_of_padded_ones(arm: str) -> None:
    """They are padded again for attention; tokens that fill up change nothing."""
    model, padded, t = network(arm).double().requires_grad_(), text(3, 16, 9), torch.rand(3)
    places = padded.mask.flatten().nonzero()[:, 0]
    hidden = padded.hidden.flatten(1, 2)[:, places]
    arrived = TextFeatures(
        F.pad(hidden, (0, 0, 0, 4))[:, None], padded.mask, positions=F.pad(places, (0, 4), value=padded.mask.numel())
    )

    def read(features: TextFeatures) -> list[Tensor]:
        model.zero_grad()
        context = model.prepare_text(features.to(dtype=torch.float64), t)
        assert context.mask is not None
        seen = [x.transpose(1, 2)[context.mask] for x in (*context.keys, *context.values)]
        sum((x * torch.arange(x.numel()).reshape(x.shape).cos()).sum() for x in seen).backward()  # type: ignore[union-attr]
        return [*seen, *(p.grad for p in model.parameters() if p.grad is not None)]

    found, expected = read(arrived), read(padded)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_joined_contexts_hold_prompts_then_null_prompts() -> None:
    """Packed: the tokens of both, one null prompt repeated for each prompt. Padded: to the longer of the two."""

    def rows(*tokens: int) -> tuple[Tensor, ...]:
        return (torch.tensor(tokens, dtype=torch.float32).reshape(1, 1, -1, 1),)

    prompt = TextContext(rows(1, 2, 3), rows(4, 5, 6), None, Packing.of(torch.tensor([2, 1]), 7))
    null = TextContext(rows(8, 9), rows(10, 11), None)
    both = join_contexts(prompt, null)
    assert both.keys[0].flatten().tolist() == [1, 2, 3, 8, 9, 8, 9]
    assert both.values[0].flatten().tolist() == [4, 5, 6, 10, 11, 10, 11]
    assert both.packing is not None
    assert both.packing.cu_seqlens.tolist() == [0, 2, 3, 5, 7]
    assert both.packing.max_seqlen == 7

    mask = torch.tensor([[True, True, True]])
    both = join_contexts(TextContext(rows(1, 2, 3), rows(4, 5, 6), mask), TextContext(rows(8), rows(9), mask[:, :1]))
    assert both.keys[0][:, 0, :, 0].tolist() == [[1, 2, 3], [8, 0, 0]]
    assert both.values[0][:, 0, :, 0].tolist() == [[4, 5, 6], [9, 0, 0]]
    assert both.mask is not None
    assert both.mask.tolist() == [[True, True, True], [True, False, False]]


def unchecked(function: str) -> None:
    """Run a function of this file without checked annotations, which dynamo cannot trace."""
    code = f"import sys; sys.path.insert(0, sys.argv[1]); from tests.model import {Path(__file__).stem} as tests"
    run(f"{code}; tests.{function}()", Path(__file__).parents[2])


def one_graph() -> None:
    packing.can_pack = lambda x: True
    model, x, t, counter = network("depth"), torch.randn(3, 3, 8, 8), torch.rand(3), CompileCounter()
    for block in model.blocks:
        block.compile(dynamic=False, backend=counter)
    for length in (3, 7, 12, 1):
        model(x, t, model.prepare_text(text(length, 16, 9), t))
    assert counter.frame_count == 1, counter.frame_count


def test_one_graph_of_a_block_serves_any_number_of_tokens() -> None:
    unchecked("one_graph")


def test_a_cpu_keeps_its_mask() -> None:
    assert not can_pack(torch.zeros(1, dtype=torch.bfloat16))
    context = network("depth").prepare_text(text(3, 16))
    assert context.packing is None
    assert context.mask is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (32, 8)])
@pytest.mark.parametrize("lengths", [[5], [1, 77, 16, 300]])
def test_varlen_attention_on_cuda_forward_and_backward(heads: int, kv_heads: int, lengths: list[int]) -> None:
    B, S, hd, T = len(lengths), 40, 128, sum(lengths)
    where = Packing.of(torch.tensor(lengths), max(lengths))
    q, k, v = (
        torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
        for shape in ((B, heads, S, hd), (1, kv_heads, T, hd), (1, kv_heads, T, hd))
    )
    upstream = torch.randn(B, heads, S, hd).bfloat16()
    device = [x.detach().cuda().requires_grad_() for x in (q, k, v)]
    out = varlen_attention(*device, Packing(where.cu_seqlens.cuda(), where.max_seqlen))
    grads = torch.autograd.grad(out, device, upstream.cuda())
    rows = [x.double().transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    expected = naive(*rows, pairs(torch.arange(0, (B + 1) * S, S)), pairs(where.cu_seqlens))
    expected = expected.unflatten(0, (B, S)).transpose(1, 2)
    references = torch.autograd.grad(expected, [q, k, v], upstream.double())
    for name, a, b in zip("oqkv", (out, *grads), (expected, *references), strict=True):
        error = (a.cpu().double() - b.double()).norm() / b.double().norm()
        assert error < 0.01, (name, error.item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_on_cuda_packs_its_text_and_gives_the_same_velocity() -> None:
    model, features = network("depth").cuda(), text(3, 16, 9).to("cuda")
    x, t = torch.randn(3, 3, 8, 8, device="cuda"), torch.rand(3, device="cuda")
    exact = model(x, t, model.prepare_text(features, t))
    with torch.autocast("cuda", torch.bfloat16):
        context = model.prepare_text(features, t)
        assert context.packing is not None
        found = model(x, t, context)
    assert (found.double() - exact.double()).norm() / exact.double().norm() < 0.03


def from_a_graph() -> None:
    from semantic_routing.model.runtime import compile_network

    model, x = network("joint").cuda(), torch.randn(3, 3, 8, 8, device="cuda")
    nothing = text(1).to("cuda")
    prompts = [text(3, 16, 9).to("cuda"), text(2, 7, 9).to("cuda")]

    def pictures() -> list[Tensor]:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return [euler(guided(model, p, nothing, 3.0, times=TIMES), x, TIMES) for p in prompts]

    eager = pictures()
    compile_network(model)
    for found, expected in zip(pictures(), eager, strict=True):
        assert (found - expected).norm() / (expected - x).norm() < 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_in_a_cuda_graph_takes_the_same_steps() -> None:
    unchecked("from_a_graph")
