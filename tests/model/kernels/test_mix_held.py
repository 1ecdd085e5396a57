"""The variant of the mix in benchmarks/mix_held.py: Eq. 2 in the interpreter, and compiled for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.kernels.test_mix_triton import EPS, Case, naive, needs_triton
from tests.test_docs_site import ROOT

CASES = [
    Case(1, 1, 1, 5, 1),
    Case(5, 2, 3, 40, 3, scales=(0.01, 100)),
    Case(36, 1, 2, 300, 24, torch.bfloat16, shared=True, scales=(0.1, 1000)),
    Case(17, 1, 2, 296, 32, torch.bfloat16, shared=True, offset=20),
    Case(4, 1, 2, 512, 2, shared=True, offset=1000),
]
INTERPRETED = """
import sys
from safetensors.torch import load_file, save_file
from mix_held import held_forward

given, found = load_file(sys.argv[1]), {}
for case in {name.split("/")[0] for name in given}:
    results = held_forward(given[f"{case}/weights"], given[f"{case}/hidden"])
    found |= {f"{case}/{name}": result for name, result in zip(("out", "mean", "rstd"), results)}
save_file(found, sys.argv[2])
"""
HOPPER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mix_held import CONFIGS, held_kernel

kernel, config = held_kernel.fn, CONFIGS[0]
constants = {"L": 36, "D": 24, "C": 2560, "DEPTHS": 32, "LAYERS": 16} | config.kwargs
types = dict.fromkeys(["hidden", "out"], "*bf16") | dict.fromkeys(["weights", "mean", "rstd"], "*fp32")
signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.maxnreg}
source = ASTSource(kernel, signature, constants, aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
open("kernel.cubin", "wb").write(compiled.asm["cubin"])
print(compiled.asm["ptx"].count("mma.sync"))
"""


def run(code: str, *args: object, folder: Path, **environment: str) -> str:
    """Run code in a process of its own, since one chooses the interpreter when it imports Triton."""
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")])
    given |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=given,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_variant_is_equation_2(tmp_path: Path) -> None:
    needs_triton()
    given, found = (tmp_path / name for name in ("given.safetensors", "found.safetensors"))
    save_file({f"{case}/{name}": x for case in CASES for name, x in case.inputs().items()}, given)
    run(INTERPRETED, given, found, folder=tmp_path, TRITON_INTERPRET="1")
    results = load_file(found)
    for case in CASES:
        out, mean, rstd, _ = naive(**case.inputs())
        afar = 1 + abs(case.offset)  # in deviations, as in test_mix_triton
        rtol = max(2 * EPS[case.dtype], 1e-5)  # the interpreter truncates
        atol = 1e-4 if case.offset < 100 else 1e-6 * afar
        torch.testing.assert_close(results[f"{case}/out"].double(), out, rtol=rtol, atol=atol)
        torch.testing.assert_close(results[f"{case}/mean"].double(), mean, rtol=1e-6, atol=1e-6 * case.scales[1])
        torch.testing.assert_close(results[f"{case}/rstd"].double(), rstd, rtol=1e-6 + 1e-8 * afar, atol=0)


@pytest.mark.stress
def test_the_variant_compiles_for_hopper_and_spills_no_register(tmp_path: Path) -> None:
    needs_triton()
    import triton

    assert int(run(HOPPER, folder=tmp_path)) > 0
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert " STACK:0 " in usage, usage
