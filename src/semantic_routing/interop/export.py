"""Export of a trained checkpoint to the folder of a diffusers pipeline, with a model card."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging

from semantic_routing.checkpoint.load import read_state
from semantic_routing.common.config import to_dict
from semantic_routing.common.files import check_writable, written_whole
from semantic_routing.common.locks import LOCK, claimed
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.interop.transformer import SemanticRoutingTransformer
from semantic_routing.model.codec import VAECodec
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.text.quiet import quiet_transformers

CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- semantic-routing
- flow-matching
---

# Semantic Routing, arm {arm}

A text-to-image diffusion transformer whose blocks read all layers of a language model, mixed by the routing
strategy **{arm}**. It is a [diffusers](https://huggingface.co/docs/diffusers) pipeline written by `semroute export`.

| | |
| --- | --- |
| transformer | {parameters:,} parameters: {depth} blocks of width {width}, patches of {patch}, {weights} |
| text encoder | {encoder}: {text_layers} layers of width {text_width} |
| images | {image_size} x {image_size} pixels, {latents} |
| null prompt | {null_prompt!r} |

{copies}.

## Use

```python
from semantic_routing import SemanticRoutingPipeline  # pip install "semantic-routing[diffusers]"

pipe = SemanticRoutingPipeline.from_pretrained("this folder, or its name on the hub")
image = pipe({prompt!r}, num_inference_steps=50, guidance_scale={guidance}).images[0]
```

The image that `semroute sample --seed 0` samples for prompt 0 starts from the noise
`noise_for(0, [(0, 0)], pipe.latent_shape())` of `semantic_routing.sampling.samplers`, passed as `latents`.

## Training

{training}
"""


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Export a trained run as a diffusers pipeline, with a model card."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run (its latest checkpoint is used), or one of its checkpoints."""
    out: Path
    """Folder to write; it must be new or empty."""
    averaged: bool = True
    """Export the exponential moving average of the weights, which gives the best samples; --no-averaged exports the
    latest weights."""


def export(args: ExportArguments) -> Path:
    """Write the pipeline's folder, completely or not at all, and return it."""
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists already; choose another --out")
    check_writable(args.out)
    with claimed(args.out.absolute().parent / f".{args.out.absolute().name}{LOCK}", args.out):
        return _export(args)


def _export(args: ExportArguments) -> Path:
    bundle = load_bundle(args.model, torch.device("cpu"), averaged=args.averaged)
    pipe = make_pipeline(bundle)
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with written_whole(args.out) as scratch, quiet_transformers():
            pipe.save_pretrained(str(scratch))
            (scratch / "README.md").write_text(model_card(bundle, averaged=args.averaged), encoding="utf-8")
    finally:
        if progress:
            logging.enable_progress_bar()
    return args.out


def make_pipeline(bundle: TextToImage) -> SemanticRoutingPipeline:
    """Return a pipeline that shares the weights of a trained model."""
    shape = bundle.encoder.shape
    text = to_dict(replace(bundle.encoder.config, name_or_path=_encoder_name(bundle), layers=shape.layers))
    for name in ("dtype", "offload", "keep", "keep_on_disk", "keep_on_disk_bytes"):  # the weights' own, the pipeline's
        del text[name]
    return SemanticRoutingPipeline(
        text_encoder=bundle.encoder.model,
        tokenizer=bundle.encoder.tokenizer,
        transformer=SemanticRoutingTransformer.from_backbone(bundle.model),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=bundle.codec.vae if isinstance(bundle.codec, VAECodec) else None,
        image_size=bundle.image_size,
        null_prompt=bundle.null_prompt,
        precision=bundle.config.get("precision", "auto"),
        text=text | {"total_layers": shape.total_layers, "keys_and_values": bundle.model.cfg.strategy.reads_keys},
    )


def model_card(bundle: TextToImage, *, averaged: bool) -> str:
    """Return the model card: sizes, use and training."""
    cfg, vae = bundle.model.cfg, isinstance(bundle.codec, VAECodec)
    has_learned_guidance = bundle.config.get("distill", {}).get("teacher")
    return CARD.format(
        guidance=1.0 if has_learned_guidance else SampleConfig.guidance,
        arm=cfg.arm,
        parameters=sum(p.numel() for p in bundle.model.parameters()),
        depth=cfg.depth,
        width=cfg.width,
        patch=cfg.patch,
        weights="averaged weights" if averaged else "latest weights",
        encoder=_encoder_name(bundle),
        text_layers=cfg.text_layers,
        text_width=cfg.text_width,
        image_size=bundle.image_size,
        latents=f"latents of {cfg.channels} channels" if vae else "sampled as pixels",
        null_prompt=bundle.null_prompt,
        copies="The text encoder and the VAE in this folder are copies of models with their own licences"
        if vae
        else "The text encoder in this folder is a copy of a model with its own licence",
        prompt="a red circle left of a blue square",
        training=_training_facts(bundle),
    )


def _training_facts(bundle: TextToImage) -> str:
    """Return facts of the checkpoint and its run's manifest as a Markdown list."""
    assert bundle.checkpoint is not None
    path = bundle.checkpoint.parent.parent / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = bundle.config
    facts = {
        "steps": read_state(bundle.checkpoint).get("step"),
        "batch": config.get("batch"),
        "data": config.get("data"),
        "seed": config.get("seed"),
        "optimiser": config.get("optim", {}).get("name"),
        "converted from": manifest.get("converted_from"),
        "command": manifest.get("command"),
        "date": manifest.get("date"),
        "commit": manifest.get("commit"),
        "hardware": manifest.get("hardware", {}).get("gpu") or manifest.get("hardware", {}).get("processor"),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
    }
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact not in (None, ""))


def _encoder_name(bundle: TextToImage) -> str:
    """Return the text encoder's name in the run's configuration, or the last part of its path."""
    name = bundle.config.get("text", {}).get("name_or_path") or bundle.encoder.config.name_or_path
    return Path(name).name if Path(name).exists() else name
