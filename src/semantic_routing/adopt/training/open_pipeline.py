"""Loading of a diffusers pipeline, from a folder or the hub, for training and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from semantic_routing.adopt.api import load_routing
from semantic_routing.adopt.routing import Routing
from semantic_routing.adopt.training.lora import LORA_FILE
from semantic_routing.common.device import use_bfloat16
from semantic_routing.common.extras import require_diffusers
from semantic_routing.text.quiet import first_line, quiet_transformers

OWN_CLASS = "SemanticRoutingPipeline"


def open_pipe(name: str, device: torch.device, precision: str = "auto") -> Any:
    """Load a pipeline onto a device and freeze it; raise ValueError if there is none or it needs custom code.

    ``precision`` determines the dtype of the weights. Pipelines of this program keep theirs; it applies to their
    products.
    """
    require_diffusers("a pipeline")
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    path = Path(name).expanduser()
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{path} is not a diffusers pipeline: it has no model_index.json; export a run with semroute export"
        )
    place = str(path) if path.is_dir() else name
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            found = DiffusionPipeline.load_config(place).get("_class_name")
            cls = found[-1] if isinstance(found, list) else found
            if cls == OWN_CLASS:
                from semantic_routing.interop.pipeline import SemanticRoutingPipeline

                pipe = SemanticRoutingPipeline.from_pretrained(place)
            elif isinstance(found, list):
                raise RuntimeError(f"it is a pipeline with custom code ({cls}), which is not run")
            else:
                dtype = torch.bfloat16 if use_bfloat16(precision, device) else torch.float32
                pipe = DiffusionPipeline.from_pretrained(place, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, AttributeError, ImportError, RuntimeError) as error:
        raise ValueError(f"cannot load a pipeline from {name!r}: {first_line(error)}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    return frozen(pipe.to(device))


def lora_beside(routing: Path) -> Path | None:
    """Return the file of the LoRA in the folder of a routing's file, if there is one."""
    lora = routing.parent / LORA_FILE
    return lora if lora.is_file() else None


def load_results(pipe: Any, routing: Path, scale: float = 1.0, *, lora: bool = True) -> Routing:
    """Load the file of a routing onto a pipeline and return it; also load the LoRA in its folder, if it is wanted."""
    loaded = load_routing(pipe, routing, scale=scale)
    if lora and (file := lora_beside(routing)) is not None:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return loaded


def frozen(pipe: Any) -> Any:
    """Freeze all models of a pipeline, in evaluation mode, and turn its progress bar off; return the pipeline."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
