"""The mix on a CPU, in each implementation: Eq. 2 in float64, and the same for any batch and number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from semantic_routing.model.kernels import mix_cpu
from semantic_routing.model.kernels.mix import fused_mix, fused_mix_backward

FORMS = ["torch", "vectors", "tiles"]
SIZES = [  # L B N C D, samples with weights of their own
    (1, 1, 1, 32, 1, 1),
    (36, 2, 17, 160, 24, 1),
    (8, 3, 16, 128, 6, 3),
    (33, 2, 5, 96, 17, 2),
    (7, 2, 33, 48, 13, 1),
    (36, 1, 18, 64, 40, 1),
    (70, 1, 3, 32, 33, 1),
    (50, 1, 2, 224, 9, 1),
    (6, 1, 3, 64, 384, 1),  # the rows of heads apart: more than matrix units take
]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the operator use one of its implementations."""
    if request.param == "torch":
        monkeypatch.setattr(mix_cpu, "library", lambda: None)
    elif mix_cpu.library() is None:
        pytest.skip("no C compiler here")
    elif request.param == "vectors":
        monkeypatch.setattr(mix_cpu, "has_matrix_units", lambda: False)
    elif not mix_cpu.has_matrix_units():
        pytest.skip("this processor has no matrix units (amx_bf16)")
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def case(size: tuple[int, ...], dtype: torch.dtype, common: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw weights, states whose layers differ in scale around a ``common`` mean, and an upstream gradient."""
    L, B, N, C, D, rows = size
    hidden = torch.randn(L, B, N, C) * torch.logspace(-1, 1, L)[:, None, None, None] + common
    return torch.randn(rows, D, L).softmax(-1), hidden.to(dtype), torch.randn(D, B, N, C).to(dtype)


def naive(weights: Tensor, hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Compute Eq. 2 and the gradient of every sample's weights, in float64."""
    h = hidden.double()
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    each = weights.double().expand(hidden.shape[1], -1, -1)
    return torch.einsum("bdl,lbnc->dbnc", each, h), torch.einsum("dbnc,lbnc->bdl", grad.double(), h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_backward(form: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    weights, hidden, upstream = case(size, dtype)
    expected, expected_grad = naive(weights, hidden, upstream)

    out, mean, rstd = fused_mix(weights, hidden)
    grad = fused_mix_backward(upstream, hidden, mean, rstd)

    # Bfloat16 results are rounded once, by half a unit of 8 bits; weights in tiles keep 16.
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=1e-4 if form == "tiles" else 1e-5)
    torch.testing.assert_close(mean.double(), hidden.double().mean(-1), rtol=1e-5, atol=1e-5)
    variance = hidden.double().var(-1, correction=0)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-4, atol=1e-6)
    scale = expected_grad.abs().max().item()
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-5 * scale)


def test_states_far_from_zero_lose_nothing(form: str) -> None:
    """A mean of a hundred deviations: sums of squares without care would leave no digit of the variance."""
    size = (12, 2, 9, 256, 12, 1)
    weights, hidden, upstream = case(size, torch.float32, common=100.0)
    hidden = hidden.bfloat16() if form == "tiles" else hidden
    upstream = upstream.to(hidden.dtype)
    expected, expected_grad = naive(weights, hidden, upstream)
    out, mean, rstd = fused_mix(weights, hidden)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-2)
    grad = fused_mix_backward(upstream, hidden, mean, rstd)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-3, atol=1e-3 * expected_grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.usefixtures("threads")
def test_the_same_for_any_number_of_threads_and_in_any_batch(form: str, dtype: torch.dtype) -> None:
    weights, hidden, upstream = case((9, 5, 40, 256, 12, 1), dtype)
    assert hidden.numel() > mix_cpu.SMALL  # several threads do share it
    outs, grads = [], []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out, mean, rstd = fused_mix(weights, hidden)
        outs.append(out)
        grads.append(fused_mix_backward(upstream, hidden, mean, rstd))
    if form != "torch":  # torch's own products promise neither
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
        assert torch.equal(grads[0], grads[1])
        assert torch.equal(grads[0], grads[2])
        alone = torch.cat([fused_mix(weights, hidden[:, i : i + 1])[0] for i in range(5)], dim=1)
        assert torch.equal(alone, outs[0])
    torch.testing.assert_close(outs[0], outs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_nan_in_a_state_does_not_spread_to_other_tokens(form: str, dtype: torch.dtype) -> None:
    weights, hidden, _ = case((4, 1, 3, 64, 12, 1), dtype)
    hidden[1, 0, 1, 5] = torch.nan
    out = fused_mix(weights, hidden)[0]
    assert out[:, 0, 1].isnan().all()
    assert out[:, 0, [0, 2]].isfinite().all()


def test_the_operators_keep_torchs_rules(form: str) -> None:
    """Schema, shapes on fake tensors, gradients, and compilation by AOT autograd."""
    weights, hidden, upstream = case((3, 2, 4, 32, 9, 1), torch.bfloat16)
    torch.library.opcheck(fused_mix, (weights.requires_grad_(), hidden))
    _, mean, rstd = fused_mix(weights.detach(), hidden)
    torch.library.opcheck(fused_mix_backward, (upstream, hidden, mean, rstd))


def test_products_are_counted() -> None:
    weights, hidden, _ = case((3, 2, 4, 32, 5, 1), torch.float32)
    weights.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        fused_mix(weights, hidden)[0].sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 5 * 3 * 2 * 4 * 32)


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of the library's cache, empty; the library is looked for again, now and after the test."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("SEMROUTE_CACHE", str(cache))
    mix_cpu.library.cache_clear()
    yield cache
    mix_cpu.library.cache_clear()


def test_without_a_compiler_plain_torch_mixes_and_one_line_says_so(
    rebuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    weights, hidden, upstream = case((8, 3, 16, 128, 6, 3), torch.float32)
    assert not mix_cpu.supports(hidden)
    expected = naive(weights, hidden, upstream)[0]
    torch.testing.assert_close(fused_mix(weights, hidden)[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert not rebuilt.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("semroute: no C compiler was found (install gcc, or set CC): layers are mixed in plain")


def test_a_compiler_that_fails_leaves_nothing_behind(
    rebuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "bin" / "cc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert mix_cpu.library() is None
    assert list(rebuilt.iterdir()) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not build the C library" in line


def test_the_library_is_built_once(rebuilt: Path) -> None:
    if mix_cpu.library() is None:
        pytest.skip("no C compiler here")
    (built,) = rebuilt.iterdir()
    before = built.stat()
    mix_cpu.library.cache_clear()
    assert mix_cpu.library() is not None
    assert list(rebuilt.iterdir()) == [built]
    after = built.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
