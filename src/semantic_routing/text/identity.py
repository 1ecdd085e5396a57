"""A digest of everything that determines a text encoder's states bit for bit."""

from __future__ import annotations

import json
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

import torch

from semantic_routing.text.config import TextShape

RULE = 1
"""Number of the rule by which prompts are batched; another one changes the last bits."""


def encoder_identity(model: Any, shape: TextShape) -> str:
    """Return a digest of an encoder's weights, configuration and layers, and of the libraries' versions.

    ValueError for weights that are not in memory, such as those that accelerate offloads layer by layer.
    """
    digest = blake2b(digest_size=20)
    settings = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    attention = getattr(model.config, "_attn_implementation", None)
    facts = [RULE, settings, attention, shape.layers, shape.total_layers, torch.__version__, version("transformers")]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, x in sorted(model.state_dict().items()):
        if x.is_meta:
            raise ValueError("text.keep_on_disk needs the language model's weights in memory: leave it out")
        digest.update(repr((name, tuple(x.shape), x.dtype)).encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def machine(device: torch.device) -> tuple[object, ...]:
    """Return what determines the order of a sum on a device: the kind of processor, and a CPU's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.version.cuda
    return device.type, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
