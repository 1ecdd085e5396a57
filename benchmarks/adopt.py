"""Time of one adopted step against the original's, on random Sana and Z-Image transformers.

    python benchmarks/adopt.py [--scale small|real] [--device cpu|cuda] [--repeats 20] [--out FILE.json]

A step is one call of the transformer with the text of two prompts, as in a pipeline: the same tensors at every step.
Rounds of original and of adopted steps alternate in one process and change places each time; a round's ratio is that
of its medians, and what is said is the median of the rounds' ratios with their quartiles. On a CPU the clock is the
processor time of this thread, which work of other processes does not lengthen as it does the wall clock's, said beside
it; on a GPU the wall clock alone counts, up to the end of the device's work.

Scale real has the transformers of Sana 1.6B and Z-Image in bfloat16, pictures of 1024x1024 and text of 300 tokens. Its
text encoders have as many and as wide layers as the pipelines' own, but little inside: only their states are read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from results import save

from semantic_routing.adopt import adopt
from semantic_routing.common.manifest import hardware

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 8}
ENCODER = {
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64,
}  # fmt: skip
TOKENS = {"small": 32, "real": 300}

Parts = tuple[Any, Any, Callable[[Any], dict[str, Any]], Callable[[Any], Any]]
"""Text encoder, transformer, (text) -> arguments, and (states) -> the text that the pipeline makes."""


def sana(scale: str) -> Parts:
    """Return Sana's parts on torch's default device; diffusers' defaults are the sizes of Sana 1.6B."""
    states = SMALL if scale == "small" else {"hidden_size": 2304, "num_hidden_layers": 26}
    sizes: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "num_layers": 8, "num_attention_heads": 8, "attention_head_dim": 32,
        "num_cross_attention_heads": 8, "cross_attention_head_dim": 32, "cross_attention_dim": 256,
        "sample_size": 16, "patch_size": 1,
    } if scale == "small" else {}  # fmt: skip
    transformer = diffusers.SanaTransformer2DModel(caption_channels=states["hidden_size"], **sizes)
    side = transformer.config.sample_size
    x, t = torch.randn(2, transformer.config.in_channels, side, side), torch.tensor([500.0, 500.0])
    return (
        transformers.Gemma2Model(transformers.Gemma2Config(**states, **ENCODER)),
        transformer,
        lambda text: {"hidden_states": x, "encoder_hidden_states": text, "timestep": t},
        lambda output: output[0],
    )


def z_image(scale: str) -> Parts:
    """Return the same for Z-Image, whose sizes are diffusers' defaults, too."""
    states = SMALL if scale == "small" else {"hidden_size": 2560, "num_hidden_layers": 36}
    sizes: dict[str, Any] = {
        "in_channels": 4, "dim": 256, "n_layers": 8, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4,
        "axes_dims": [32, 16, 16], "axes_lens": [256, 64, 64],
    } if scale == "small" else {}  # fmt: skip
    transformer = diffusers.ZImageTransformer2DModel(cap_feat_dim=states["hidden_size"], **sizes)
    side = 32 if scale == "small" else 128
    x = [torch.randn(transformer.config.in_channels, 1, side, side) for _ in range(2)]
    t = torch.tensor([0.5, 0.5])
    config = transformers.Qwen3Config(**states, **ENCODER)
    return (
        transformers.Qwen3Model(config),
        transformer,
        lambda text: {"x": x, "t": t, "cap_feats": text},
        lambda output: list(output.hidden_states[-2]),
    )


@torch.no_grad()
def ratios(make: Callable[[str], Parts], scale: str, repeats: int) -> dict[str, float]:
    """Return the original's milliseconds, and adopted steps' ratios to it, before and after training."""
    torch.manual_seed(0)
    encoder, transformer, inputs, read = make(scale)
    encoder.eval(), transformer.eval().requires_grad_(False)
    ids = torch.randint(3, 64, (2, TOKENS[scale]))
    plain = read(encoder(ids, output_hidden_states=True))
    found: dict[str, float] = {}
    for name, std in (("before training", 0.0), ("after training", 0.5)):
        routing = adopt(text_encoder=encoder, transformer=transformer)
        for parameter in routing.parameters():
            torch.nn.init.normal_(parameter, std=std)
        packed = read(encoder(ids, output_hidden_states=True))
        routing.remove()
        numbers = routing.state_dict()

        def original() -> Times:
            return _times(lambda: transformer(**inputs(plain)))

        def adopted(numbers: Any = numbers, packed: Any = packed) -> Times:
            routing = adopt(text_encoder=encoder, transformer=transformer)
            routing.load_state_dict(numbers)
            times = _times(lambda: transformer(**inputs(packed)))
            routing.remove()
            return times

        found |= _compared(name, original, adopted, repeats)
    return found


def _compared(name: str, original: Callable[[], Times], adopted: Callable[[], Times], repeats: int) -> dict[str, float]:
    """Return the original's milliseconds and the quartiles of the rounds' ratios, by both clocks."""
    rounds = []
    for number in range(repeats):
        if number % 2:
            second = adopted()
            rounds.append((original(), second))
        else:
            rounds.append((original(), adopted()))
    on_gpu = torch.get_default_device().type == "cuda"
    clocks = {"": 1} if on_gpu else {"": 0, ", wall clock": 1}
    found = {"original, ms": 1e3 * statistics.median(first[clocks[""]] for first, _ in rounds)}
    for clock, place in clocks.items():
        low, middle, high = statistics.quantiles([b[place] / a[place] for a, b in rounds], n=4, method="inclusive")
        found |= {f"{name}{clock}": middle, f"{name}{clock}, from": low, f"{name}{clock}, to": high}
    return found


Times = tuple[float, float]
"""Processor time of a step in this thread, and its wall-clock time, in seconds."""


def _times(step: Callable[[], object]) -> Times:
    """Return the medians of four steps, after one that prepares the text."""
    on_gpu = torch.get_default_device().type == "cuda"
    step()
    seconds = []
    for _ in range(4):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.thread_time(), time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append((time.thread_time() - began[0], time.perf_counter() - began[1]))
    processor, wall = zip(*seconds, strict=True)
    return statistics.median(processor), statistics.median(wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=TOKENS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of each kind, at least 2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that the thread's time is all of it
    torch.set_default_device(args.device)
    if args.scale == "real":
        torch.set_default_dtype(torch.bfloat16)
    sys.stdout.write(f"{hardware()}, load {os.getloadavg()}\n")
    rows = {name: ratios(make, args.scale, args.repeats) for name, make in (("Sana", sana), ("Z-Image", z_image))}
    for name, row in rows.items():
        sys.stdout.write(f"{name}: " + ", ".join(f"{what} {value:.3f}" for what, value in row.items()) + "\n")
    save(args, {"rows": rows, "load": os.getloadavg()})


if __name__ == "__main__":
    main()
