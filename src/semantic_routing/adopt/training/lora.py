"""The LoRA on a pipeline's text projections: adapters of peft, in a file that the pipeline's own loader reads.

peft's adapters are used, through the transformers' ``add_adapter``, because they are what ``load_lora_weights`` of
diffusers loads; the project's pipelines do the same (``interop/lora.py``).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semantic_routing.adopt.families import find_family
from semantic_routing.adopt.training.config import LoraSettings
from semantic_routing.common.extras import require
from semantic_routing.common.files import written_whole

LORA_FILE = "pytorch_lora_weights.safetensors"
TARGETS = {
    "semantic-routing": r"backbone\.(text_proj|blocks\.\d+\.cross\.kv)",
    "sana": r"transformer_blocks\.\d+\.attn2\.to_[kv]",
    "z-image": r"layers\.\d+\.attention\.to_[kv]",
}
"""Patterns of the names of each family's text projections; those of Z-Image also project the image."""


def check_lora(transformer: Any) -> None:
    """Raise ValueError if diffusers cannot load a LoRA for this transformer, or peft is missing."""
    family = find_family(transformer)
    if family.name not in TARGETS or not hasattr(transformer, "add_adapter"):
        raise ValueError(
            f"diffusers loads no LoRA for {family.transformer}: train the routing alone, with --lora.rank 0"
        )
    require("peft", what="--lora.rank")


def add_lora(transformer: Any, cfg: LoraSettings, seed: int) -> dict[str, nn.Parameter]:
    """Add a LoRA that has no effect yet, turned off, and return its parameters in float32 by name."""
    from peft import LoraConfig

    targets = TARGETS[find_family(transformer).name]
    config = LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha or cfg.rank, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    found = {name: p for name, p in transformer.named_parameters() if ".lora_" in name}
    for p in found.values():
        p.data = p.data.float()
    switch_lora(transformer, found, on=False)
    return found


def switch_lora(transformer: Any, parameters: dict[str, nn.Parameter], *, on: bool) -> None:
    """Turn a LoRA on, to be trained, or off."""
    if on:
        transformer.enable_adapters()
    else:
        transformer.disable_adapters()
    for p in parameters.values():
        p.requires_grad_(on)


def save_lora(pipe: Any, folder: Path) -> None:
    """Write a LoRA for the pipeline's ``load_lora_weights``, completely or not at all."""
    from semantic_routing.interop.lora import adapter_of

    layers, metadata = adapter_of(pipe.transformer, None)
    with tempfile.TemporaryDirectory() as scratch:
        type(pipe).save_lora_weights(
            scratch, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )
        with written_whole(folder / LORA_FILE) as path:
            path.write_bytes((Path(scratch) / LORA_FILE).read_bytes())
