"""Memory and time of training at the paper's size on 8, 64 and 512 GPUs: derived from counts, not measured.

    python benchmarks/plan.py [--text-tokens 256] [--utilisation 0.4]

Parameters, FLOPs and the tensors saved for backward are counted on the meta device. Utilisation and nominal bandwidths
are assumed; they are printed with the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from semantic_routing.analysis.overhead import SCALES
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import Backbone
from semantic_routing.model.flops import (
    META,
    blank_features,
    count,
    count_image,
    count_language_model,
    count_text,
    qwen3_vl,
)
from semantic_routing.training.metrics import BACKWARD, PEAKS
from semantic_routing.training.parallelize import text_modules
from semantic_routing.training.recipes import paper

GB, TERA = 1e9, 1e12
GPUS = (8, 64, 512)
NODE = 8
PEAK = PEAKS["H100"]
MEMORIES = {"H100": 80 * GB, "H200": 141 * GB}
USABLE = 0.9
"""Share of a GPU's memory to plan with; the rest is for CUDA's context, workspaces and fragmentation."""
NVLINK = 450 * GB
"""Bytes a second that a GPU sends inside a node."""
NETWORK = 50 * GB
"""Bytes a second that a GPU sends to other nodes: one 400 Gb/s adapter a GPU."""
MASTER, ADAM, AVERAGE, GRADIENT, HALF = 4, 8, 4, 4, 2
"""Bytes a weight: float32 master, both Adam moments, EMA, float32 gradient; bfloat16 copy."""
KEPT = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten._scaled_dot_product_flash_attention)
"""Operators whose outputs selective activation checkpointing saves."""


@dataclass(frozen=True)
class Counts:
    """Counts of one image and of the networks, before any assumption."""

    parameters: int
    """Weights of the trained transformer."""
    block: int
    """Weights of one block, which are gathered together."""
    text: int
    """Weights that prepare the text."""
    encoder: int
    """Weights of the language model."""
    codec: int
    """Weights of the autoencoder."""
    train_flops: int
    """FLOPs of the transformer for one image, forward and backward."""
    encoder_flops: int
    """FLOPs of the language model for one prompt."""
    codec_flops: int
    """FLOPs of the autoencoder's encoder for one image."""
    activations: int
    """Bytes saved for backward of one image without activation checkpointing."""
    selective: int
    """Bytes saved with selective activation checkpointing."""
    full: int
    """Bytes saved with full activation checkpointing."""
    ahead: int
    """Bytes of one prefetched image: text features, and three of the codec's largest tensors."""

    @property
    def frozen(self) -> int:
        """Bytes of the frozen networks: the language model in bfloat16, the autoencoder in float32."""
        return HALF * self.encoder + 4 * self.codec

    @property
    def gathered(self) -> int:
        """Bytes of unsharded tensors at a time: weights of two blocks and of the text, gradients of one group."""
        return HALF * (2 * self.block + self.text) + (HALF + GRADIENT) * max(self.block, self.text)


def count_all(tokens: int) -> Counts:
    """Count the networks of the paper's recipe on the meta device, with prompts of ``tokens``."""
    cfg, scale = paper("depth").model, SCALES["paper"]
    size = paper("depth").image_size // 8
    with META:
        model, codec = make_model(cfg), autoencoder(cfg.channels)
        pixels = torch.empty(1, 3, 8 * size, 8 * size)
    llm = qwen3_vl(
        width=cfg.text_width,
        layers=cfg.text_layers,
        heads=scale.encoder_heads,
        kv_heads=scale.encoder_kv_heads,
        head_dim=scale.encoder_head_dim,
        mlp_width=scale.encoder_mlp_width,
        vocabulary=151_936,
    )
    text, context = count_text(model, 1, tokens)
    image = count_image(model, 1, size, size, context)
    with Outputs() as outputs:
        codec_flops, _ = count(lambda: codec.encoder(pixels))
    groups = text_modules(model)
    shared = {p for part in groups for p in part.parameters()}
    return Counts(
        parameters=weights(model),
        block=sum(p.numel() for p in model.blocks[0].parameters() if p not in shared),
        text=sum(p.numel() for p in shared),
        encoder=weights(llm),
        codec=weights(codec),
        train_flops=(1 + BACKWARD) * (text + image).total,
        encoder_flops=count_language_model(llm, 1, tokens).total,
        codec_flops=codec_flops.total,
        ahead=HALF * cfg.text_layers * tokens * cfg.text_width + 3 * outputs.largest,
        **dict(zip(("activations", "selective", "full"), saved_bytes(model.bfloat16(), size, tokens), strict=True)),
    )


def autoencoder(channels: int) -> AutoencoderKL:
    """Return Stable Diffusion 3's autoencoder with random weights."""
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def saved_bytes(model: Backbone, size: int, tokens: int) -> tuple[int, int, int]:
    """Return the bytes saved for backward of one image in bfloat16 with no, selective, full activation checkpointing.

    Checkpointing recomputes one block at a time, so the activations of one block are always added.
    """
    features = blank_features(model.cfg, 1, tokens, META).to(dtype=torch.bfloat16)
    x = torch.empty(1, model.cfg.channels, size, size, device=META, dtype=torch.bfloat16)
    t = torch.empty(1, device=META)
    with flash_attention():
        text, context = saved(model, lambda: model.prepare_text(features, t))
        with Outputs() as outputs:
            image, _ = saved(model, lambda: model(x, t, context))
    width, depth = model.cfg.width, model.cfg.depth
    inputs = (size // model.cfg.patch) ** 2 * width * HALF
    once = image // depth
    return text + image, text + depth * inputs + outputs.kept + once, text + depth * inputs + once


def saved(model: nn.Module, run: Callable[[], Any]) -> tuple[int, Any]:
    """Return the bytes that autograd saves for a computation, each storage once, without weights; and its result."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), result


class Outputs(TorchDispatchMode):
    """Counts the bytes of the outputs of matrix products and attention, and of the largest output of any operator."""

    kept = largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result if isinstance(result, Tensor) else result[0]
        size = first.untyped_storage().nbytes()
        self.kept += size if func.overloadpacket in KEPT else 0
        self.largest = max(self.largest, size)
        return result


@contextmanager
def flash_attention() -> Iterator[None]:
    """Use the fused attention of GPUs: on the meta device torch would save the matrix of scores."""

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, enable_gqa: bool = False) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    with patch("torch.nn.functional.scaled_dot_product_attention", attend):
        yield


@dataclass(frozen=True)
class Plan:
    """One row: memory of each GPU and time of a step."""

    gpus: int
    images: int
    """Images for each GPU and step."""
    states: float
    """Bytes of weights, optimiser, EMA and gradients on each GPU."""
    at_once: dict[str, int]
    """Largest microbatch with selective activation checkpointing, by GPU."""
    products: float
    """Seconds of matrix products."""
    fsdp: float
    """Seconds on the links with all GPUs in one shard group."""
    hsdp: float
    """Seconds on the links with one shard group in each node."""

    @property
    def step(self) -> float:
        return max(self.products, min(self.fsdp, self.hsdp))


def plan(counts: Counts, gpus: int, batch: int, utilisation: float) -> Plan:
    """Plan with everything that is trained sharded over all GPUs, and with perfect overlap of products and links."""
    images = batch // gpus
    states = (MASTER + ADAM + AVERAGE + GRADIENT) * counts.parameters / gpus
    at_once = {}
    for name, memory in MEMORIES.items():
        room = USABLE * memory - states - counts.gathered - counts.frozen
        several = room - GRADIENT * counts.parameters  # microbatches accumulate unsharded gradients
        each = counts.selective + counts.ahead
        at_once[name] = max(n for n in divisors(images) if n * each <= (room if n == images else several))
    # All-gather of the weights forward and backward in every microbatch, one reduce-scatter of the gradients.
    moved = (2 * HALF * images // min(at_once.values()) + GRADIENT) * counts.parameters
    nodes = max(1, gpus // NODE)
    between = 2 * (nodes - 1) / nodes * GRADIENT * counts.parameters / NODE / NETWORK
    flops = images * (counts.train_flops + counts.encoder_flops + counts.codec_flops)
    return Plan(
        gpus=gpus,
        images=images,
        states=states,
        at_once=at_once,
        products=flops / (utilisation * PEAK),
        # The adapters of a node share the traffic of its GPUs.
        fsdp=moved * (gpus - 1) / gpus / (NVLINK if nodes == 1 else min(NVLINK, NODE * NETWORK)),
        hsdp=moved * (NODE - 1) / NODE / NVLINK + between,
    )


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def tables(tokens: int = 256, utilisation: float = 0.4) -> str:
    """Return both tables and their assumptions as Markdown."""
    cfg, counts = paper("depth"), count_all(tokens)
    kept = ", ".join(f"{x / GB:.2f}" for x in (counts.activations, counts.selective, counts.full))
    facts = {
        f"counted (S2, {cfg.image_size}x{cfg.image_size}, prompts of {tokens} tokens)": "",
        "weights of the transformer": f"{counts.parameters:,}",
        "weights of the language model, of the autoencoder": f"{counts.encoder:,}, {counts.codec:,}",
        "products an image: transformer, forward and backward": f"{counts.train_flops / TERA:.2f} TFLOP",
        "products an image: language model": f"{counts.encoder_flops / TERA:.2f} TFLOP",
        "products an image: autoencoder": f"{counts.codec_flops / TERA:.2f} TFLOP",
        "saved for backward an image: no, selective, full activation checkpointing": f"{kept} GB",
        "a prefetched image": f"{counts.ahead / GB:.2f} GB",
        "frozen networks on each GPU": f"{counts.frozen / GB:.1f} GB",
        "unsharded weights and gradients at a time": f"{counts.gathered / GB:.1f} GB",
    }
    heads = (
        "GPUs", "images a GPU", "states a GPU (GB)", "images at once, 80 / 141 GB", "products (s)",
        "links, FSDP / HSDP (s)", "step (s)", "images/s", f"days for {cfg.steps // 1000}k steps",
    )  # fmt: skip
    one = [line(pair) for pair in facts.items()]
    one.insert(1, "| --- | ---: |")
    two = [line(heads), "|" + " ---: |" * len(heads)]
    rows = [plan(counts, gpus, cfg.batch, utilisation) for gpus in GPUS]
    two += [line(cells(row, cfg.batch, cfg.steps)) for row in rows]
    assumed = (
        f"Assumed: products at {utilisation:.0%} of {PEAK / TERA:.0f} TFLOP/s (H100 SXM and H200, dense bfloat16); "
        f"links at {NVLINK / GB:.0f} GB/s a GPU inside a node of {NODE} and {NETWORK / GB:.0f} GB/s between nodes; "
        f"products and links overlap perfectly; {USABLE:.0%} of the memory used; batch {cfg.batch}."
    )
    return "\n".join([*one, "", *two, "", assumed])


def cells(row: Plan, batch: int, steps: int) -> tuple[str, ...]:
    return (
        str(row.gpus),
        str(row.images),
        f"{row.states / GB:.2f}",
        " / ".join(map(str, row.at_once.values())),
        f"{row.products:.3f}",
        f"{row.fsdp:.3f} / {row.hsdp:.3f}",
        f"{row.step:.3f}",
        f"{batch / row.step:,.0f}",
        f"{row.step * steps / 86_400:.2f}",
    )


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--utilisation", type=float, default=0.4)
    args = parser.parse_args()
    sys.stdout.write(tables(args.text_tokens, args.utilisation) + "\n")


if __name__ == "__main__":
    main()
