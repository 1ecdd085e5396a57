"""The Triton mix against Eq. 2 in float64: the same kernels in Triton's interpreter on a CPU, and compiled on CUDA.

A process chooses the interpreter when it first imports Triton, so it runs in a subprocess. It truncates a result to
bfloat16 where CUDA rounds, which costs one bit.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from semantic_routing.model.routing import mix

NAMES = ("out", "mean", "rstd", "grad_weights")
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
"""Half a unit in the last place of a number near 1."""


@dataclass(frozen=True)
class Case:
    """Sizes of a mix; its states have a common ``offset`` from 0, or layers of very different ``scales``."""

    L: int
    B: int
    N: int
    C: int
    D: int
    dtype: torch.dtype = torch.float32
    shared: bool = False
    offset: float = 0
    scales: tuple[float, float] = (1, 1)

    def __str__(self) -> str:
        return f"{self.L}x{self.B}x{self.N}x{self.C}-{self.D}-{str(self.dtype)[6:]}"

    def inputs(self, device: str = "cpu") -> dict[str, Tensor]:
        """Weights, states and an incoming gradient."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        scale = torch.logspace(*torch.tensor(self.scales).log10().tolist(), self.L, device=device)
        hidden = scale.reshape(-1, 1, 1, 1) * normal(self.L, self.B, self.N, self.C) + self.offset
        return {
            "weights": normal(1 if self.shared else self.B, self.D, self.L).softmax(-1),
            "hidden": hidden.to(self.dtype),
            "grad": normal(self.D, self.B, self.N, self.C).to(self.dtype),
        }


CASES = [
    Case(1, 1, 1, 5, 1),
    Case(5, 2, 3, 40, 3, scales=(0.01, 100)),
    Case(17, 1, 5, 296, 33, torch.bfloat16, shared=True, offset=20),  # all that can be partly filled
    Case(16, 3, 1, 256, 16, torch.bfloat16),
    Case(36, 1, 2, 300, 24, torch.bfloat16, shared=True, scales=(0.1, 1000)),
    Case(3, 1, 2, 64, 2, torch.float16, scales=(0.01, 1000)),  # scaled weights below the smallest float16
    Case(4, 1, 2, 512, 2, shared=True, offset=1000),
]
LARGER = [
    Case(36, 4, 512, 2560, 24, torch.bfloat16, shared=True, scales=(0.1, 1000)),
    Case(36, 4, 77, 2560, 24, torch.bfloat16, offset=20),
    Case(36, 4, 77, 2560, 1, torch.bfloat16),
    Case(28, 2, 77, 3584, 57, torch.float16, scales=(0.1, 100)),
    Case(24, 3, 130, 1003, 28, torch.bfloat16, shared=True),
    Case(36, 2, 50, 2560, 24, scales=(0.1, 100)),
    Case(1, 2, 77, 2560, 24, torch.bfloat16),
    Case(36, 300, 1, 640, 1, torch.bfloat16),  # every token has its own weights
]


def naive(weights: Tensor, hidden: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Eq. 2 in float64, the moments, and the gradient of every sample's weights."""
    weights, hidden, grad = weights.double(), hidden.double(), grad.double()
    mean = hidden.mean(-1, keepdim=True)
    rstd = ((hidden - mean).square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    normed = (hidden - mean) * rstd
    out = torch.einsum("bdl,lbnc->dbnc", weights.expand(hidden.shape[1], -1, -1), normed)
    return out, mean[..., 0], rstd[..., 0], torch.einsum("dbnc,lbnc->bdl", grad, normed)


def check(case: Case, given: dict[str, Tensor], found: dict[str, Tensor], cut: bool = False) -> None:
    """Check that each result is as near to float64 as its dtype and the states' offset allow."""
    out, mean, rstd, grad_weights = naive(**given)
    types = {"out": case.dtype} | dict.fromkeys(NAMES[1:], torch.float32)
    assert {name: found[name].dtype for name in NAMES} == types
    afar = 1 + abs(case.offset)  # in deviations: what float32 resolves of a state is this much less
    rtol = max(EPS[case.dtype] * (1 + cut), 1e-5)
    torch.testing.assert_close(found["out"].double(), out, rtol=rtol, atol=1e-4 if case.offset < 100 else 1e-6 * afar)
    torch.testing.assert_close(found["mean"].double(), mean, rtol=1e-6, atol=1e-6 * case.scales[1])
    torch.testing.assert_close(found["rstd"].double(), rstd, rtol=1e-6 + 1e-8 * afar, atol=0)
    scale = grad_weights.abs().max().item()
    torch.testing.assert_close(found["grad_weights"].double(), grad_weights, rtol=0, atol=2e-5 * afar * scale)


SCRIPT = """
import sys
import jaxtyping
from safetensors.torch import load_file, save_file

jaxtyping.install_import_hook("semantic_routing", "beartype.beartype")
from semantic_routing.model.kernels import mix_triton as gpu

given, found = load_file(sys.argv[1]), {}
for case in {name.split("/")[0] for name in given}:
    weights, hidden, grad = (given[f"{case}/{name}"] for name in ("weights", "hidden", "grad"))
    out, mean, rstd = gpu.mix_forward(weights, hidden)
    results = {"out": out, "mean": mean, "rstd": rstd, "grad_weights": gpu.mix_backward(grad, hidden, mean, rstd)}
    found |= {f"{case}/{name}": result for name, result in results.items()}
save_file(found, sys.argv[2])
"""


def needs_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton (Linux on x86-64): pip install triton")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Results of the interpreter for all cases."""
    needs_triton()
    given, found = (tmp_path_factory.mktemp("mix") / name for name in ("given.safetensors", "found.safetensors"))
    save_file({f"{case}/{name}": x for case in CASES for name, x in case.inputs().items()}, given)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SCRIPT, str(given), str(found)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_are_equation_2(interpreted: dict[str, Tensor], case: Case) -> None:
    found = {name: interpreted[f"{case}/{name}"] for name in NAMES}
    check(case, case.inputs(), found, cut=case.dtype == torch.bfloat16)


HOPPER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from semantic_routing.model.kernels import mix_triton as gpu

sizes = {"L": 36, "D": 24, "C": 2560, "MANY": True, "DEPTHS": 32, "LAYERS": gpu.LAYERS}
for tuned, more in ((gpu.forward_kernel, {"SPAN": 256, "VECTOR": 256}), (gpu.backward_kernel, {"TOKENS": gpu.TOKENS})):
    kernel, config = tuned.fn, tuned.configs[0]
    constants = sizes | more | config.kwargs
    types = dict.fromkeys(["hidden", "out", "grad"], "*bf16")
    types |= dict.fromkeys(["weights", "mean", "rstd", "partial"], "*fp32")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(len(compiled.asm["cubin"]) > 0, compiled.asm["ptx"].count("mma.sync"), compiled.metadata.shared)
"""


def test_kernels_compile_for_hopper_without_one(tmp_path: Path) -> None:
    """To machine code with products on the matrix units and memory to spare for two programs a processor."""
    needs_triton()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", HOPPER], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        machine_code, products, shared = line.split()
        assert machine_code == "True"
        assert int(products) > 0
        assert 2 * int(shared) < 228 * 1024
    assert len(done.stdout.splitlines()) == 2


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(given: dict[str, Tensor]) -> dict[str, Tensor]:
    from semantic_routing.model.kernels import mix_triton as gpu

    out, mean, rstd = gpu.mix_forward(given["weights"], given["hidden"])
    found = (out, mean, rstd, gpu.mix_backward(given["grad"], given["hidden"], mean, rstd))
    return dict(zip(NAMES, found, strict=True))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("case", CASES + LARGER, ids=str)
def test_compiled_kernels_are_equation_2_and_repeat_every_bit(case: Case) -> None:
    given = case.inputs("cuda")
    found, again = on_cuda(given), on_cuda(given)
    for name in NAMES:
        assert torch.equal(found[name], again[name]), name
    check(case, given, found)


@pytest.mark.gpu
@needs_cuda
def test_every_configuration_is_equation_2(monkeypatch: pytest.MonkeyPatch) -> None:
    from semantic_routing.model.kernels import mix_triton as gpu

    case = Case(36, 2, 50, 2560, 24, torch.bfloat16, shared=True, offset=20)
    given = case.inputs("cuda")
    forward, backward = gpu.forward_kernel.configs, gpu.backward_kernel.configs
    for i in range(max(len(forward), len(backward))):
        monkeypatch.setattr(gpu.forward_kernel, "configs", [forward[i % len(forward)]])
        monkeypatch.setattr(gpu.backward_kernel, "configs", [backward[i % len(backward)]])
        check(case, given, on_cuda(given))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("shared", [True, False])
def test_the_operator_on_cuda_gives_equation_2_and_its_gradient(shared: bool) -> None:
    case = Case(36, 3, 20, 640, 24, torch.bfloat16, shared=shared)
    given = case.inputs("cuda")
    weights = given["weights"].requires_grad_()
    out, *_, grad_weights = naive(**given)
    fused = mix(weights, given["hidden"])
    (grad,) = torch.autograd.grad(fused, weights, given["grad"])
    expected = grad_weights.sum_to_size(weights.shape)
    torch.testing.assert_close(fused.double(), out, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.gpu
@needs_cuda
def test_states_beyond_the_reach_of_32_bit_offsets() -> None:
    """At the paper's size with 48 prompts of 512 tokens there are 2.26e9 numbers of states."""
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of free GPU memory")
    L, B, N, C, D = 36, 48, 512, 2560, 24
    assert L * B * N * C > 2**31
    # All samples are 0 except the last, whose states in the last layers are beyond 32 bits.
    hidden = torch.zeros(L, B, N, C, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros(D, B, N, C, dtype=torch.bfloat16, device="cuda")
    last = Case(L, 1, N, C, D, torch.bfloat16, shared=True)
    given = last.inputs("cuda")
    hidden[:, -1:], grad[:, -1:] = given["hidden"], given["grad"]
    found = on_cuda({"weights": given["weights"], "hidden": hidden, "grad": grad})
    assert not found["out"][:, :-1].any()
    assert not found["grad_weights"][:-1].any()
    ends = {name: x[-1:] if name == "grad_weights" else x[:, -1:] for name, x in found.items()}
    check(last, given, ends)
