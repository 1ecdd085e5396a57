"""``semroute sample``: samples images of prompts into a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from semantic_routing.cli.arguments import FLAT
from semantic_routing.common.device import keep_freed_memory, pick_device
from semantic_routing.common.distributed import processes
from semantic_routing.common.files import write_text
from semantic_routing.sampling.folder import PROMPTS, claim_folder, claimed_by_first, request, sample_missing
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.prompts import read_prompts
from semantic_routing.sampling.routing_file import overridden, read_override
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage, latent_shape


@dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """Sample images from a trained run."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run (its latest checkpoint is used), one of its checkpoints, or a pipeline of semroute export."""
    out: Path
    """Folder for the PNG files; complete images that are already there are kept."""
    prompt: tuple[str, ...] = ()
    """Prompts, each in quotation marks."""
    prompts: Path | None = None
    """File of prompts: one per line, or .jsonl or .csv with a column prompt, text or caption."""
    images_per_prompt: int = 1
    """Number of images per prompt, each from different noise."""
    negative_prompt: str | None = None
    """Prompt that classifier-free guidance moves away from; by default the model's null prompt."""
    height: int | None = None
    """Height of the images in pixels; by default the model's."""
    width: int | None = None
    """Width of the images in pixels; by default the model's."""
    routing: Path | None = None
    """JSON file of routing weights that replace the model's own: {"rows": ["block 0", ...], "weights": [[...],
    ...]}."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1 or another torch device."""
    sampling: Annotated[SampleConfig, FLAT] = field(default_factory=SampleConfig)
    """How the images are sampled."""

    def arranged(self, bundle: TextToImage) -> TextToImage:
        """Return the model set to these arguments' size and negative prompt.

        ValueError for a size that does not divide into patches.
        """
        size = (self.height or bundle.image_size, self.width or bundle.image_size)
        for name in ("height", "width"):
            if (pixels := getattr(self, name)) is not None and pixels < 1:
                raise ValueError(f"{name} is {pixels}; it must be at least 1")
        latent_shape(bundle.codec, bundle.model.cfg, *size)
        null = bundle.null_prompt if self.negative_prompt is None else self.negative_prompt
        return replace(bundle, size=size, null_prompt=null)


def sample_to_folder(args: SampleArguments, open_model: Callable[..., TextToImage] = load_bundle) -> Path:
    """Write ``PPPPP_II.png`` for prompt P and image I, ``prompts.jsonl`` and ``manifest.json``; return the folder.

    Existing images are kept; ValueError if the folder's manifest describes other images. Under torchrun each process
    samples its share.
    """
    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts is not None else [])]
    if not prompts:
        raise ValueError('nothing to sample: give --prompt "a red circle" or --prompts FILE')
    if args.images_per_prompt < 1:
        raise ValueError(f"images_per_prompt is {args.images_per_prompt}; it must be at least 1")
    keep_freed_memory()
    bundle = args.arranged(open_model(args.model, pick_device(args.device), compiled=args.sampling.compile))
    names = [(p, i) for p in range(len(prompts)) for i in range(args.images_per_prompt)]
    paths = {name: args.out / f"{name[0]:05d}_{name[1]:02d}.png" for name in names}
    routing = None if args.routing is None else read_override(args.routing, bundle.model.cfg)
    with processes() as job, claimed_by_first(args.out, job):
        # Large weights take a while to hash.
        identity = request(bundle, prompts, args.sampling, routing) if job.first else {}
        claim_folder(args.out, identity, job, checkpoint=str(bundle.checkpoint))
        with overridden(bundle.model, routing):
            sample_missing(bundle, prompts, paths, args.sampling, job)
        if job.first:
            rows = [{"file": paths[name].name, "prompt": prompts[name[0]], "image": name[1]} for name in names]
            write_text(args.out / PROMPTS, "".join(json.dumps(row) + "\n" for row in rows))
    return args.out
