"""The mix on a CPU: a small C library, compiled on first use for this processor and kept in the cache folder.

It needs a C compiler, as torch.compile on a CPU does. Without one, or for states of another dtype or width,
``supports`` is False and ``mix.py`` uses plain torch; a line on stderr says so once where the compiler is at fault.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.common.device import cache_folder, processor
from semantic_routing.common.troubles import say

TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
WIDE = 16
"""Floats in a vector, as in mix_cpu.c; the channels must be a multiple of it."""
CHANNELS, PAD = 64, 32
"""Channels normalised at a time, and padding that keeps layers apart in the caches, as in the C sources."""
TOKENS = 16
"""Tokens whose contributions to the weights' gradient are summed together, as in mix_cpu.c."""
MAX_LAYERS, MAX_DEPTHS = 256, 256
"""Largest numbers for which matrix units are used, as in mix_amx.c."""
MIN_DEPTHS = 8
"""Smallest number of depths for which matrix units are used; fewer would leave them mostly empty."""
SMALL = 2**18
"""Elements of the states below which more threads do not pay."""
SOURCES = ("mix_cpu.c", "mix_amx.c")
SLOWER = "layers are mixed in plain PyTorch, which takes about 3 to 5 times as long"  # benchmarks/mix_fallback.py
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "batch", "length", "channels", "depths")),
        ("eps", ctypes.c_float),
    ]


def supports(hidden: Float[Tensor, "L B N C"]) -> bool:
    """Return whether the library is available and reads states of this dtype and width."""
    return hidden.dtype in TYPES and hidden.shape[-1] % WIDE == 0 and library() is not None


def mix_forward(
    weights: Float[Tensor, "B_or_1 D L"], hidden: Float[Tensor, "L B N C"], eps: float
) -> tuple[Float[Tensor, "D B N C"], Float[Tensor, "L B N"], Float[Tensor, "L B N"]]:
    """Return sum_l w_l LayerNorm(H_l), and the mean and 1 / deviation of every state; all tensors are contiguous."""
    (L, B, N, C), D = hidden.shape, weights.shape[1]
    out = hidden.new_empty(D, B, N, C)
    mean = hidden.new_empty(L, B, N, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tiled = _uses_matrix_units(hidden, D)
    if tiled:  # pad rows with zeros to complete tiles
        weights = torch.nn.functional.pad(weights, (0, -L % 32))
    function = _function("mix_tiles" if tiled else f"mix_{TYPES[hidden.dtype]}")
    step = 0 if weights.shape[0] == 1 else weights[0].numel()
    shape = _Shape(L, B, N, C, D, eps)

    def run(first: int, last: int) -> None:
        room, start = _aligned(L * max(2 * (C + PAD), 4 * CHANNELS))
        function(
            ctypes.byref(shape), hidden.data_ptr(), weights.data_ptr(), step, start, out.data_ptr(), mean.data_ptr(),
            rstd.data_ptr(), first, last,
        )  # fmt: skip
        del room

    _spread(run, B * N, hidden.numel())
    return out, mean, rstd


def mix_backward(
    grad: Float[Tensor, "D B N C"],
    hidden: Float[Tensor, "L B N C"],
    mean: Float[Tensor, "L B N"],
    rstd: Float[Tensor, "L B N"],
) -> Float[Tensor, "B D L"]:
    """Return the gradient of every sample's weights; the order of its sums does not depend on the threads."""
    (L, B, N, C), D = hidden.shape, grad.shape[0]
    chunks = -(-N // TOKENS)
    out = torch.empty(B, chunks, D, L)
    function = _function(
        "mix_backward_tiles" if _uses_matrix_units(hidden, D) else f"mix_backward_{TYPES[hidden.dtype]}"
    )
    shape = _Shape(L, B, N, C, D, 0.0)

    def run(first: int, last: int) -> None:
        room, start = _aligned(4 * D * L * WIDE)
        function(
            ctypes.byref(shape), grad.data_ptr(), hidden.data_ptr(), mean.data_ptr(), rstd.data_ptr(), start,
            out.data_ptr(), first, last,
        )  # fmt: skip
        del room

    _spread(run, B * chunks, hidden.numel())
    return out.sum(1)


def has_matrix_units() -> bool:
    """Return whether this processor multiplies bfloat16 in matrix units (AMX) and the system lets us use them."""
    return bool(_function("has_tiles")())


def _uses_matrix_units(hidden: Tensor, depths: int) -> bool:
    layers, _, _, channels = hidden.shape
    fits = MIN_DEPTHS <= depths <= MAX_DEPTHS and layers <= MAX_LAYERS and channels % 32 == 0
    return hidden.dtype == torch.bfloat16 and fits and has_matrix_units()


def _aligned(size: int) -> tuple[Tensor, int]:
    """Allocate ``size`` bytes; return their tensor and the address of its first cache line."""
    room = torch.empty(size + 64, dtype=torch.uint8)
    return room, room.data_ptr() + -room.data_ptr() % 64


def _spread(run: Callable[[int, int], None], count: int, states: int) -> None:
    """Run ``run(first, last)`` over ranges that cover ``count``, on as many threads as torch uses."""
    threads = 1 if states < SMALL else min(count, torch.get_num_threads())
    if threads == 1:
        run(0, count)
        return
    cuts = [count * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1).submit(run, *cut) for cut in pairwise(cuts[1:])]
    run(cuts[0], cuts[1])
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mix")


@lru_cache
def _function(name: str) -> Callable[..., int]:
    """Return a function of the library with its argument types; without them ctypes would cut addresses to 32 bits."""
    found = getattr(library(), name)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    if name == "has_tiles":
        found.argtypes, found.restype = [], ctypes.c_int
    elif name.startswith("mix_backward"):
        found.argtypes, found.restype = [pointer] * 7 + [number] * 2, None
    else:
        found.argtypes, found.restype = [pointer] * 3 + [number] + [pointer] * 4 + [number] * 2, None
    return found


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the library, built if needed; None, with a line on stderr, if it cannot be built."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None or platform.system() != "Linux":
        say(f"{'no C compiler was found (install gcc, or set CC)' if compiler is None else 'not Linux'}: {SLOWER}")
        return None
    folder = files("semantic_routing.model.kernels")
    source = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in SOURCES)
    machine = "\n".join([platform.machine(), *processor()])  # a home folder may be shared by several kinds
    name = hashlib.sha256("\0".join([source, compiler, *FLAGS, machine]).encode()).hexdigest()[:16]
    try:
        cache = cache_folder()
        built = cache / f"mix-{name}.so"
        if not built.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            _build(compiler, source, built)
        return ctypes.CDLL(str(built))
    # No home folder, disk full, no permission, or a compiler that does not know the language extensions.
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        say(f"{compiler} could not build the C library of the mix ({type(error).__name__}): {SLOWER}")
        return None


def _build(compiler: str, source: str, built: Path) -> None:
    """Compile into the cache atomically, because several processes may do so at once."""
    tuned = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    with tempfile.TemporaryDirectory(dir=built.parent, prefix=f".{built.name}-") as scratch:
        written = Path(scratch) / built.name
        command = [compiler, *FLAGS, tuned, "-x", "c", "-", "-o", str(written), "-lm"]
        subprocess.run(command, input=source.encode(), check=True, capture_output=True, timeout=120)
        written.replace(built)
