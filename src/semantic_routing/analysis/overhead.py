"""The cost of an arm: parameters, FLOPs, latency and memory (the paper's Table 4).

FLOPs are counted on the meta device (``flops.py``). The paper counts matrix products with weights only. Its reference
prepares the text at every step, from prompts padded to 512 tokens; this program does not pad, and prepares the text
once if routing does not depend on time. The cost of mixing layers is memory traffic: the reference writes and reads a
float32 copy of every hidden state at every step, this program reads each hidden state once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from semantic_routing.analysis.table import Table
from semantic_routing.common.device import has_bfloat16
from semantic_routing.model.arms import ARMS, DEFAULT_ARM, parse_arm
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import DiTConfig
from semantic_routing.model.flops import (
    META,
    Products,
    blank_features,
    count_image,
    count_language_model,
    count_text,
    qwen3_vl,
)
from semantic_routing.model.routing import FixedRouter, make_router
from semantic_routing.model.runtime import autocast, compile_network, rounded_once
from semantic_routing.sampling.guidance import guided
from semantic_routing.sampling.samplers import euler, schedule
from semantic_routing.training.recipes import toy

GUIDED = 2
"""Guidance runs the network twice a step: with the prompt and with the null prompt."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The image and the models of Table 4; the defaults are the paper's (512x512, Qwen3-VL-4B, 50 guided steps)."""

    model: DiTConfig = field(default_factory=DiTConfig)
    """Sizes of the transformer; its arm is replaced by the measured one."""
    encoder_heads: int = 32
    """Query heads of the text encoder; its width and depth are the transformer's text_width and text_layers."""
    encoder_kv_heads: int = 8
    """Key and value heads of the text encoder."""
    encoder_head_dim: int = 128
    """Channels of each head of the text encoder."""
    encoder_mlp_width: int = 9728
    """Hidden channels of the text encoder's gated MLP."""
    latent_size: int = 64
    """Height and width of the latent."""
    steps: int = 50
    """Steps of Euler's method."""
    padded_tokens: int = 512
    """Length to which the reference pads prompts."""


SCALES = {
    "paper": Scale(),
    "toy": Scale(
        model=toy(DEFAULT_ARM).model,
        encoder_heads=4,
        encoder_kv_heads=2,
        encoder_head_dim=32,
        encoder_mlp_width=384,
        latent_size=32,
    ),
}
"""Scales by recipe; the text encoder of toy is that of ``tiny_lm``."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """The cost of one image; a multiplication with its addition is two FLOPs."""

    arm: str
    """Name of the conditioning strategy."""
    params: int
    """Parameters of the transformer, without the text encoder."""
    flops_paper: float
    """FLOPs of the reference, counted as in the paper: products with weights, at every step, from padded prompts."""
    flops_ours: float
    """FLOPs of this program at ``text_tokens``, counted as in the paper: products with weights."""
    flops_ours_all: float
    """FLOPs of all matrix products of this program at ``text_tokens``."""
    flops_text: float
    """FLOPs of all matrix products of one preparation of the text: once a prompt, or every step by a time gate."""
    flops_step: float
    """FLOPs of all matrix products of one sampling step after that."""
    mix_bytes_paper: float
    """Memory traffic of mixing in the reference, in bytes: see ``mix_bytes``."""
    mix_bytes_ours: float
    """Memory traffic of mixing in this program at ``text_tokens``, in bytes."""
    text_tokens: int
    """Length of prompt and null prompt in the numbers of this program."""
    latency: float | None = None
    """Seconds of the transformer for an image, text preparation included; None if not measured."""
    peak_memory: int | None = None
    """Peak bytes on the CUDA device; None if not measured."""


def measure(
    arm: str,
    *,
    text_tokens: int = 32,
    scale: Scale | None = None,
    device: torch.device | None = None,
    compiled: bool = False,
) -> Overhead:
    """Return the cost of an image with this arm for prompts of ``text_tokens``; with a device, measure the time too.

    All layers of the text encoder run once on prompt and null prompt, whatever the arm. ValueError for an unknown arm
    and for prompts without tokens.
    """
    if text_tokens < 1:
        raise ValueError(f"text_tokens is {text_tokens}; a prompt has at least 1")
    scale = scale or Scale()
    cfg = replace(scale.model, arm=parse_arm(arm))
    with META:
        model = make_model(cfg)
    padded, _ = count_text(model, GUIDED, scale.padded_tokens)
    context = count_text(model, GUIDED, text_tokens)[1]
    text = count_text(model, 1, text_tokens)[0] * GUIDED  # the sampler prepares prompts and null prompts apart
    # The image's products with weights do not depend on the length of the text.
    image = count_image(model, GUIDED, scale.latent_size, scale.latent_size, context)
    reference = _count_encoder(scale, scale.padded_tokens) + (padded + image) * scale.steps
    prepared = scale.steps if model.depends_on_time else 1
    ours = _count_encoder(scale, text_tokens) + text * prepared + image * scale.steps
    latency, peak = (None, None) if device is None else _time(cfg, scale, text_tokens, device, compiled)
    return Overhead(
        arm=cfg.arm,
        params=sum(p.numel() for p in model.parameters()),
        flops_paper=float(reference.weights),
        flops_ours=float(ours.weights),
        flops_ours_all=float(ours.total),
        flops_text=float(text.total),
        flops_step=float(image.total),
        mix_bytes_paper=mix_bytes(cfg, scale.padded_tokens, scale.steps, reference=True),
        mix_bytes_ours=mix_bytes(cfg, text_tokens, prepared, reference=False),
        text_tokens=text_tokens,
        latency=latency,
        peak_memory=peak,
    )


def mix_bytes(cfg: DiTConfig, tokens: int, passes: int, *, reference: bool) -> float:
    """Return the least memory traffic, in bytes, of mixing the hidden states of two prompts ``passes`` times.

    At every pass the reference reads each hidden state in bfloat16, writes and reads its normalised copy in float32,
    and writes every mix in float32. This program reads each hidden state in bfloat16, once for all passes, and writes
    every mix in bfloat16. B1 normalises one layer. FuseDiT mixes no layers.
    """
    if cfg.strategy.reads_keys:
        return 0.0
    with META:
        router = make_router(cfg.arm, cfg.text_layers, cfg.depth, cfg.text_width, cfg.kv_heads)
    layers = len(router.used) if isinstance(router, FixedRouter) else cfg.text_layers
    moved = passes * (layers * (2 + 4 + 4) + cfg.mixes * 4) if reference else 2 * layers + passes * cfg.mixes * 2
    return float(GUIDED * tokens * cfg.text_width * moved)


def to_json(rows: Sequence[Overhead]) -> dict[str, Any]:
    """Return ``{"arms": {arm: {"params": ..., "flops_paper": ..., "flops_ours": ..., ...}}}``."""
    return {"arms": {row.arm: {k: v for k, v in asdict(row).items() if k != "arm"} for row in rows}}


def table(rows: Sequence[Overhead]) -> str:
    """Return the rows as a Markdown table: parameters in millions, FLOPs in T, bytes in GB."""
    head = (
        "arm", "params (M)", "FLOPs, paper (T)", "ours, so counted (T)", "ours, all (T)", "text (T)", "step (T)",
        "mix, paper (GB)", "ours (GB)", "tokens", "latency (s)", "peak (GiB)",
    )  # fmt: skip
    cells = [
        [
            ARMS[row.arm].title,
            f"{row.params / 1e6:,.1f}",
            *(f"{x / 1e12:,.1f}" for x in (row.flops_paper, row.flops_ours, row.flops_ours_all)),
            *(f"{x / 1e12:.3g}" for x in (row.flops_text, row.flops_step)),
            f"{row.mix_bytes_paper / 1e9:,.1f}",
            f"{row.mix_bytes_ours / 1e9:,.3f}",
            str(row.text_tokens),
            "–" if row.latency is None else f"{row.latency:.3f}",
            "–" if row.peak_memory is None else f"{row.peak_memory / 2**30:.2f}",
        ]
        for row in rows
    ]
    return Table(head, cells).markdown()


def _count_encoder(scale: Scale, tokens: int) -> Products:
    """Count a forward pass of the text encoder on prompt and null prompt; its layers are equal, so one is counted."""
    layer = qwen3_vl(
        width=scale.model.text_width,
        layers=1,
        heads=scale.encoder_heads,
        kv_heads=scale.encoder_kv_heads,
        head_dim=scale.encoder_head_dim,
        mlp_width=scale.encoder_mlp_width,
    )
    return count_language_model(layer, GUIDED, tokens) * scale.model.text_layers


def _time(cfg: DiTConfig, scale: Scale, tokens: int, device: torch.device, compiled: bool) -> tuple[float, int | None]:
    """Measure the seconds and, on CUDA, the peak bytes of sampling one latent with random weights."""
    with device:
        model = make_model(cfg).eval().requires_grad_(False)
    if compiled:
        compile_network(model)
    bf16 = has_bfloat16(device)
    prompt = blank_features(cfg, 1, tokens, device)
    prompt = prompt.to(dtype=torch.bfloat16) if bf16 else prompt
    x = torch.randn(1, cfg.channels, scale.latent_size, scale.latent_size, device=device)

    def sample(steps: int) -> None:
        times = schedule(steps)
        euler(guided(model, prompt, prompt, scale=6.0, times=times), x, times)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad(), autocast(device, bf16), rounded_once(model, bf16):
        sample(3)  # the first steps compile, tune and load kernels
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        sample(scale.steps)
        seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
