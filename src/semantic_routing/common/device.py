"""What this machine can do, and the settings that make a CPU fast."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

_MALLOC_MMAP_MAX, _MALLOC_TRIM_THRESHOLD, _MALLOC_TOP_PAD = -4, -1, -2


def pick_device(name: str = "auto") -> torch.device:
    """Find the named device, or with "auto" a CUDA device where there is one; ValueError if it is not there.

    Processes that torchrun started on one machine take a CUDA device each.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; use auto, cpu or cuda{_seen()}") from error
    if not _is_here(device):
        raise ValueError(f"torch sees no device {name!r} here; use --device cpu{_seen()}")
    return device


def _is_here(device: torch.device) -> bool:
    """Whether torch can compute on the device."""
    if device.type == "cpu":
        return not device.index
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = accelerator is not None and accelerator.type == device.type
    return known and (device.index or 0) < torch.accelerator.device_count()


def _seen() -> str:
    """The devices besides the CPU, as the end of a message."""
    if not torch.accelerator.is_available():
        return ""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return "".join(f" or {kind.type}:{i}" for i in range(torch.accelerator.device_count()))


def cache_folder() -> Path:
    """Find the folder of what is made once a machine; ValueError where there is no home to keep it in."""
    named, caches = os.environ.get("SEMROUTE_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if named:
            return Path(named).expanduser()
        # A relative XDG_CACHE_HOME is to be ignored, as its specification says.
        return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "semantic-routing"
    except RuntimeError as error:
        raise ValueError("this user has no home folder to keep a cache in; set SEMROUTE_CACHE to a folder") from error


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
