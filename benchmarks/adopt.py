"""Time of one adopted step against the original's, on small random Sana and Z-Image transformers.

    python benchmarks/adopt.py [--repeats 20] [--out FILE.json]

A step is one call of the transformer with the text of two prompts, as in a pipeline: the same tensors at every step.
Rounds of original and of adopted steps alternate in one process and change places each time; a round's ratio is that
of its medians, and what is said is the median of the rounds' ratios with their quartiles. The clock is the processor
time of this thread, which work of other processes does not lengthen as it does the wall clock's, said beside it.
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

WIDTH, TOKENS, LAYERS = 64, 32, 8


def sana() -> tuple[Any, Any, Callable[[Any], dict[str, Any]], Callable[[Any], Any]]:
    """Return text encoder, transformer, (text) -> arguments, and (states) -> the text that the pipeline makes."""
    config = transformers.Gemma2Config(
        hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=64,
    )  # fmt: skip
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=8, num_attention_heads=8, attention_head_dim=32,
        num_cross_attention_heads=8, cross_attention_head_dim=32, cross_attention_dim=256, caption_channels=WIDTH,
        sample_size=16, patch_size=1,
    )  # fmt: skip
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 500.0])
    return (
        transformers.Gemma2Model(config),
        transformer,
        lambda text: {"hidden_states": x, "encoder_hidden_states": text, "timestep": t},
        lambda output: output[0],
    )


def z_image() -> tuple[Any, Any, Callable[[Any], dict[str, Any]], Callable[[Any], Any]]:
    """Return the same for Z-Image."""
    config = transformers.Qwen3Config(
        hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=64,
    )  # fmt: skip
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=256, n_layers=8, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=WIDTH,
        axes_dims=[32, 16, 16], axes_lens=[256, 64, 64],
    )  # fmt: skip
    x, t = [torch.randn(4, 1, 32, 32) for _ in range(2)], torch.tensor([0.5, 0.5])
    return (
        transformers.Qwen3Model(config),
        transformer,
        lambda text: {"x": x, "t": t, "cap_feats": text},
        lambda output: list(output.hidden_states[-2]),
    )


@torch.no_grad()
def ratios(make: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Return the original's milliseconds, and adopted steps' ratios to it, before and after training."""
    torch.manual_seed(0)
    encoder, transformer, inputs, read = make()
    encoder.eval(), transformer.eval().requires_grad_(False)
    ids = torch.randint(3, 64, (2, TOKENS))
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
    found = {"original, ms": 1e3 * statistics.median(first[0] for first, _ in rounds)}
    for clock, place in (("", 0), (", wall clock", 1)):
        low, middle, high = statistics.quantiles([b[place] / a[place] for a, b in rounds], n=4, method="inclusive")
        found |= {f"{name}{clock}": middle, f"{name}{clock}, from": low, f"{name}{clock}, to": high}
    return found


Times = tuple[float, float]
"""Processor time of a step in this thread, and its wall-clock time, in seconds."""


def _times(step: Callable[[], object]) -> Times:
    """Return the medians of four steps, after one that prepares the text."""
    step()
    seconds = []
    for _ in range(4):
        began = time.thread_time(), time.perf_counter()
        step()
        seconds.append((time.thread_time() - began[0], time.perf_counter() - began[1]))
    processor, wall = zip(*seconds, strict=True)
    return statistics.median(processor), statistics.median(wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="rounds of each kind, at least 2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that the thread's time is all of it
    sys.stdout.write(f"{hardware()}, load {os.getloadavg()}\n")
    rows = {name: ratios(make, args.repeats) for name, make in (("Sana", sana), ("Z-Image", z_image))}
    for name, row in rows.items():
        sys.stdout.write(f"{name}: " + ", ".join(f"{what} {value:.3f}" for what, value in row.items()) + "\n")
    save(args, {"rows": rows, "load": os.getloadavg()})


if __name__ == "__main__":
    main()
