"""A folder of sampled images: claimed by one request, resumed, shared among processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

from semantic_routing.checkpoint.safetensors_storage import TYPES
from semantic_routing.common.distributed import ALONE, Processes
from semantic_routing.common.files import write_text
from semantic_routing.common.images.save import is_valid_image, save_png
from semantic_routing.common.locks import LOCK, claimed
from semantic_routing.common.manifest import manifest
from semantic_routing.model.dit import Backbone
from semantic_routing.model.override import RoutingOverride
from semantic_routing.sampling.samplers import RENOISE_ONCE
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage

PROMPTS = "prompts.jsonl"
"""The file that names the prompt of each image."""
TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}
"""The names of tensor types in safetensors files."""


def claimed_by_first(out: Path, job: Processes) -> AbstractContextManager[None]:
    """Lock a folder against other commands; the first process of the job holds the lock for all."""
    return claimed(out / LOCK, out) if job.first else nullcontext()


def request(
    bundle: TextToImage, prompts: Sequence[str], cfg: SampleConfig, routing: RoutingOverride | None = None
) -> dict[str, Any]:
    """Return all settings that determine a folder's images; the batch size is not among them.

    ``routing`` is what replaces the model's own weights, which are not to be replaced yet: their hash is returned, too.
    """
    return {
        "weights_sha256": weights_sha256(bundle.model),
        "null_prompt": bundle.null_prompt,
        "resolution": bundle.pixels[0] if len(set(bundle.pixels)) == 1 else [*bundle.pixels],
        "sampler": {f.name: getattr(cfg, f.name) for f in fields(SampleConfig) if f.name != "batch"},
        "prompts": {"n": len(prompts), "sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()},
        "routing": None if routing is None else routing.to_json(),
    }


def weights_sha256(model: Backbone) -> str:
    """Return the SHA-256 of the safetensors file that would hold exactly a model's weights.

    The file is not written: its header is built here, and the tensors are hashed one at a time, widest types first.
    """
    state = sorted(model.state_dict().items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, x in state:
        begin, end = end, end + x.nbytes
        header[name] = {"dtype": TYPE_NAMES[x.dtype], "shape": [*x.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    for _, x in state:
        digest.update(x.detach().contiguous().flatten().view(torch.uint8).numpy(force=True))
    return digest.hexdigest()


def claim_folder(out: Path, identity: dict[str, Any], job: Processes = ALONE, **facts: Any) -> None:
    """Write the manifest of the images to come; raise ValueError if the folder holds images of another request."""
    if job.first:
        _claim(out, identity, facts)
    job.wait()


def _claim(out: Path, identity: dict[str, Any], facts: dict[str, Any]) -> None:
    path = out / "manifest.json"
    found: dict[str, Any] = {}
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged; delete {out} or choose another --out") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} is not a manifest of images; choose another --out")
    if isinstance(found.get("sampler"), dict) and found["sampler"].get("sampler") == RENOISE_ONCE:
        found["sampler"]["sampler"] = "renoise"
    other = [name for name, value in identity.items() if found.get(name) != value]
    if other and (found or any(out.rglob("*.png")) or (out / PROMPTS).exists()):
        what = ", ".join(f"{name} {found.get(name)} instead of {identity[name]}" for name in other)
        raise ValueError(f"{out} holds other images ({what}); choose another --out or delete it")
    write_text(path, json.dumps(manifest(**identity, **facts), indent=2) + "\n")


@runtime_checkable
class Draws(Protocol):
    """A model that samples images."""

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images."""

    def sample(self, prompts: Sequence[str], images: Sequence[tuple[int, int]], cfg: Any) -> Tensor:
        """Sample one image for each prompt; ``images`` holds (prompt index, image index) of each."""


def sample_missing(
    bundle: Draws,
    prompts: Sequence[str],
    paths: dict[tuple[int, int], Path],
    cfg: Any,
    job: Processes = ALONE,
) -> None:
    """Sample, in batches, the images (prompt index, image index) whose files are missing or incomplete.

    ``cfg`` holds the sampling settings of the model, and the batch size ``batch``.

    Each process of the job samples its share and returns when all are done.
    """
    share = job.share(list(paths))
    missing = [name for name in share if not is_valid_image(paths[name], bundle.pixels)]
    desc = "Sampling" if job.count == 1 else f"Sampling, 1 of {job.count} processes"
    done = len(share) - len(missing)
    with tqdm(total=len(share), initial=done, desc=desc, unit="image", disable=not job.first) as bar:
        for first in range(0, len(missing), cfg.batch):
            names = missing[first : first + cfg.batch]
            images = bundle.sample([prompts[p] for p, _ in names], names, cfg).numpy(force=True)
            for name, image in zip(names, images, strict=True):
                save_png(paths[name], image)
                bar.update()
    job.wait()
