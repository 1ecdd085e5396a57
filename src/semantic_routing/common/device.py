"""Facts about this machine: devices, processor, cache folder, bfloat16; and glibc's memory settings."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

_MALLOC_MMAP_MAX, _MALLOC_TRIM_THRESHOLD, _MALLOC_TOP_PAD = -4, -1, -2


def pick_device(name: str = "auto") -> torch.device:
    """Return the named device, or for "auto" a CUDA device if there is one; ValueError if torch does not see it.

    Under torchrun each process of a machine gets its own CUDA device.
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
    """Return whether torch can compute on the device."""
    if device.type == "cpu":
        return not device.index
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = accelerator is not None and accelerator.type == device.type
    return known and (device.index or 0) < torch.accelerator.device_count()


def _seen() -> str:
    """Return the devices besides the CPU as the end of a message."""
    if not torch.accelerator.is_available():
        return ""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return "".join(f" or {kind.type}:{i}" for i in range(torch.accelerator.device_count()))


def cache_folder() -> Path:
    """Return the folder for files that are made once per machine; ValueError if there is no home folder."""
    named, caches = os.environ.get("SEMROUTE_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if named:
            return Path(named).expanduser()
        # The XDG specification says to ignore a relative path.
        return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "semantic-routing"
    except RuntimeError as error:
        raise ValueError("this user has no home folder for the cache; set SEMROUTE_CACHE to a folder") from error


def processor() -> list[str]:
    """Return the distinct lines of /proc/cpuinfo that describe the processor's model and instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware; without it float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether products run in bfloat16 at precision "bf16", "fp32" or "auto", which asks the hardware."""
    return precision == "bf16" or (precision == "auto" and has_bfloat16(device))


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed buffers for the next allocation; return whether it does (False without glibc).

    By default glibc returns every large buffer to the system, and the next one costs new page faults. That makes
    elementwise work on a CPU several times slower.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    return bool(
        libc.mallopt(_MALLOC_MMAP_MAX, 0)
        and libc.mallopt(_MALLOC_TRIM_THRESHOLD, 2**31 - 1)
        and libc.mallopt(_MALLOC_TOP_PAD, 2**26)
    )
