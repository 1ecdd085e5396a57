"""What this machine is asked and told."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from semantic_routing.common.device import has_bfloat16, keep_freed_memory, pick_device, use_bfloat16

CPU = torch.device("cpu")


def test_pick_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == CPU
    with pytest.raises(ValueError, match="torch sees no device 'cuda:0' here; use --device cpu"):
        pick_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="unknown device 'gpu'; use auto, cpu or cuda"):
        pick_device("gpu")


@pytest.mark.parametrize("hardware", [True, False])
def test_bfloat16_is_automatic_or_as_asked(monkeypatch: pytest.MonkeyPatch, hardware: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": hardware, "avx2": True})
    assert has_bfloat16(CPU) is hardware
    assert [use_bfloat16(name, CPU) for name in ("auto", "bf16", "fp32")] == [hardware, True, False]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """A large buffer (beyond 32 MiB, where glibc adapts to nothing) asked for again comes without new page faults."""
    code = """
import resource, torch
from semantic_routing.common.device import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(10_000_000).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
assert keep_freed_memory()
faults()
assert faults() < 0.2 * first, (faults(), first)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert keep_freed_memory() is False
