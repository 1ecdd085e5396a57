"""What this machine can do, and the settings that make a CPU fast."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

_MALLOC_MMAP_MAX, _MALLOC_TRIM_THRESHOLD, _MALLOC_TOP_PAD = -4, -1, -2


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or with "auto" a CUDA device where there is one; ValueError if it is not there.

    Processes that torchrun started on one machine take a CUDA device each.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device here; use --device cpu")
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere float32 is the faster type."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether products run in bfloat16 at a precision of "bf16", "fp32", or "auto": where hardware has it."""
    return precision == "bf16" or (precision == "auto" and has_bfloat16(device))


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed buffers for the next allocation; True if it agreed.

    By default it returns every large buffer to the system and faults its pages in again a moment later, which
    makes elementwise work on a CPU several times slower. Elsewhere than glibc nothing is done.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    return bool(
        libc.mallopt(_MALLOC_MMAP_MAX, 0)
        and libc.mallopt(_MALLOC_TRIM_THRESHOLD, 2**31 - 1)
        and libc.mallopt(_MALLOC_TOP_PAD, 2**26)
    )
