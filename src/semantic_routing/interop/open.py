"""Loading a model from a run, a checkpoint or an exported diffusers pipeline."""

from __future__ import annotations

from pathlib import Path

import torch

from semantic_routing.common.device import pick_device, use_bfloat16
from semantic_routing.common.extras import require_diffusers
from semantic_routing.model.runtime import compile_network
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.text_to_image import TextToImage

PIPELINE = "model_index.json"
"""The file that marks a folder as a diffusers pipeline."""


def load(path: Path | str, device: str = "auto") -> TextToImage:
    """Load a run (its latest checkpoint), a single checkpoint, or a pipeline of ``semroute export``, ready to sample.

    ``path`` is the run's folder, one of its ``checkpoints/step-*`` folders, or the pipeline's folder. ``device`` is
    "auto" or a torch device, such as "cpu", "cuda", "cuda:1" or "mps". The weights are the exponential moving average.
    Raises ValueError, which names the reason, if loading fails.

        model = load("runs/quickstart")
        images = model.sample(["a red circle"])  # uint8 [1, H, W, 3]
    """
    return open_model(Path(path), pick_device(device))


def open_model(path: Path, device: torch.device, *, compiled: bool = False) -> TextToImage:
    """Load a model; raise ValueError if ``path`` is neither a run, a checkpoint nor an exported pipeline."""
    if not (path / PIPELINE).is_file():
        return load_bundle(path, device, compiled=compiled)
    bundle = open_pipeline(path, device)
    if compiled:
        compile_network(bundle.model)
    return bundle


def open_pipeline(path: Path, device: torch.device) -> TextToImage:
    """Load an exported pipeline as TextToImage, which samples like a run, with the same samplers and noise."""
    require_diffusers("a pipeline")
    from semantic_routing.interop.pipeline import SemanticRoutingPipeline
    from semantic_routing.text.quiet import quiet_transformers

    try:
        with quiet_transformers():
            pipe = SemanticRoutingPipeline.from_pretrained(str(path)).to(device)
    except (OSError, AttributeError) as error:
        raise ValueError(f"{path} was not written by semroute export: {str(error).splitlines()[0]}") from error
    return TextToImage(
        model=pipe.transformer.backbone.eval().requires_grad_(False),
        encoder=pipe.encoder(),
        codec=pipe.codec(),
        image_size=pipe.config.image_size,
        null_prompt=pipe.config.null_prompt,
        bf16=use_bfloat16(pipe.config.precision, device),
        checkpoint=path,
    )
