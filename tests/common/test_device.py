"""Devices, the processor, bfloat16 and glibc's memory settings."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semantic_routing.common.device import has_bfloat16, keep_freed_memory, pick_device, processor, use_bfloat16

CPU = torch.device("cpu")


def test_a_device_is_found_by_name_or_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_processes_of_torchrun_get_a_cuda_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)
    assert pick_device("cpu") == CPU


def test_the_processor_is_described_once_for_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = "".join(f"processor: {i}\nmodel name: A\nbogomips: {i}\nflags: avx2\n\n" for i in range(2))
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: cores)
    assert processor() == ["flags: avx2", "model name: A"]


@pytest.mark.parametrize("hardware", [True, False])
def test_bfloat16_follows_the_hardware_or_the_precision(monkeypatch: pytest.MonkeyPatch, hardware: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": hardware, "avx2": True})
    assert has_bfloat16(CPU) is hardware
    assert [use_bfloat16(name, CPU) for name in ("auto", "bf16", "fp32")] == [hardware, True, False]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """A large buffer (above 32 MiB, where glibc does not adapt) causes no page faults when it is allocated again."""
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


def test_without_glibc_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert keep_freed_memory() is False
