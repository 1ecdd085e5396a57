"""FID, KID and CLIPScore of a folder of images, with feature models that the user chooses.

The feature model is any vision model of transformers, such as DINOv2 or CLIP. Distances in the features of one model
cannot be compared with those of another, nor with published FIDs, which use Inception. So every number is labelled with
the model's name and the hash of its weights.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from semantic_routing.common.connection import check_hub
from semantic_routing.common.device import pick_device
from semantic_routing.common.extras import require
from semantic_routing.common.files import read_json_lines, write_text
from semantic_routing.common.images.decode import BROKEN, to_rgb
from semantic_routing.common.images.formats import formats
from semantic_routing.common.manifest import manifest
from semantic_routing.evaluation.listing import Listing, list_pictures, suffixes
from semantic_routing.evaluation.records import MANIFEST, SUMMARY, TABLE
from semantic_routing.evaluation.summary import spread, without_nan
from semantic_routing.text.quiet import quiet_transformers

ENOUGH = 2048
"""Fewest pictures for an FID by its authors' advice, better 10,000; with fewer, their number biases it."""


@dataclass(frozen=True, kw_only=True)
class FeaturesArguments:
    """FID and KID between two folders of images, CLIPScore between images and captions."""

    images: Path
    """Folder of images, including its subfolders."""
    reference: Path | None = None
    """Folder of real images, for FID and KID."""
    feature_model: str | None = None
    """Vision model of transformers (a folder, or a name on the hub), for FID and KID."""
    clip: str | None = None
    """CLIP model of transformers, for CLIPScore."""
    captions: Path | None = None
    """JSON lines with file (relative to their folder) and prompt or caption; by default the images' prompts.jsonl."""
    out: Path | None = None
    """Folder for summary.json, table.md and manifest.json."""
    subset_size: int = 1000
    """Images in each of KID's subsets; fewer if there are fewer images."""
    subsets: int = 100
    """Number of random subsets for KID."""
    batch: int = 32
    """Images processed together by a model."""
    seed: int = 0
    """Random seed of KID's subsets."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1 or another torch device."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("subsets", 1), ("subset_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if (self.reference is None) != (self.feature_model is None):
            raise ValueError("FID and KID need both --reference, a folder of real images, and --feature-model")
        if self.reference is None and self.clip is None:
            raise ValueError("nothing to compute: give --reference and --feature-model, or --clip")


def evaluate_features(args: FeaturesArguments) -> str:
    """Compute the scores that the arguments ask for; return the table."""
    if args.reference is not None:
        require("torchmetrics.image", what="--reference", extra="eval")
    device = pick_device(args.device)
    summary: dict[str, Any] = {}
    identities = {}
    notes, passed_over = [], {}
    if args.reference is not None and args.feature_model is not None:
        model = VisionModel(args.feature_model, device)
        listings = [_listed(folder) for folder in (args.reference, args.images)]
        real, fake = (model.features(listing.pictures, args.batch) for listing in listings)
        summary["fid"] = {"value": frechet_distance(real, fake), "n": len(fake), "reference_n": len(real)}
        kid = kernel_distance(real, fake, subsets=args.subsets, subset_size=args.subset_size, seed=args.seed)
        summary["kid"] = kid | {"n": len(fake), "reference_n": len(real)}
        identities["feature_model"] = model.identity
        passed_over = {str(listing.folder): dict(listing.passed_over) for listing in listings}
        notes = [f"Skipped in {listing.folder}: {listing}." for listing in listings if listing.passed_over]
        notes += few_note(min(len(real), len(fake)), real.shape[1])
    if args.clip is not None:
        captions = read_captions(args.captions or args.images / "prompts.jsonl")
        clip = VisionModel(args.clip, device)
        scores = [100 * cosine for cosine in clip.caption_cosines(captions, args.batch)]
        summary["clipscore"] = spread([max(score, 0.0) for score in scores])
        identities["clip"] = clip.identity
    table = features_table(summary, identities, notes)
    if args.out is not None:
        facts = manifest(
            images=str(args.images), reference=str(args.reference), **identities, subsets=args.subsets,
            subset_size=args.subset_size, seed=args.seed, passed_over=passed_over,
        )  # fmt: skip
        write_text(args.out / SUMMARY, json.dumps(without_nan(summary), indent=2) + "\n")
        write_text(args.out / TABLE, table)
        write_text(args.out / MANIFEST, json.dumps(facts, indent=2) + "\n")
    return table


class VisionModel:
    """A vision model of transformers with its own preprocessing."""

    def __init__(self, name: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        check_hub(name)
        with quiet_transformers():
            try:
                self.processor = AutoImageProcessor.from_pretrained(name)
                self.model = (
                    AutoModel.from_pretrained(name, use_safetensors=True).eval().requires_grad_(False).to(device)
                )
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{name} is not a vision model of transformers: {str(error).splitlines()[0]}"
                ) from error
        self.name, self.device = name, device

    @property
    def identity(self) -> dict[str, Any]:
        """Return name, kind and the hash of the weights."""
        tensors = {key: value.cpu().contiguous() for key, value in self.model.state_dict().items()}
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "sha256": hashlib.sha256(save(tensors)).hexdigest(),
            "preprocessing": type(self.processor).__name__,
        }

    def features(self, paths: Sequence[Path], batch: int) -> Float[Tensor, "N F"]:
        """Compute the pooled features of images, on the CPU in double precision."""
        with tqdm(total=len(paths), desc="Features", unit="image") as bar:
            parts = []
            for chunk in _chunks(paths, batch):
                parts.append(self._image_features(chunk).double().cpu())
                bar.update(len(chunk))
        return torch.cat(parts)

    def caption_cosines(self, captions: Sequence[tuple[Path, str]], batch: int) -> list[float]:
        """Compute the cosine of each image's and its caption's features; ValueError for a model without text."""
        if not hasattr(self.model, "get_text_features"):
            raise ValueError(
                f"{self.name} is a {type(self.model).__name__}, which cannot encode captions; give a CLIP model"
            )
        from transformers import AutoTokenizer

        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(self.name)
        length = self.model.config.text_config.max_position_embeddings
        found: list[float] = []
        for chunk in _chunks(captions, batch):
            texts = [caption for _, caption in chunk]
            tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            text = pooled(self.model.get_text_features(**tokens.to(self.device)))
            image = self._image_features([path for path, _ in chunk])
            found += (normalize(image.float(), dim=-1) * normalize(text.float(), dim=-1)).sum(-1).tolist()
        return found

    def _image_features(self, paths: Sequence[Path]) -> Float[Tensor, "B F"]:
        pixels = self.processor(images=[_open(path) for path in paths], return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device, self.model.dtype)
        if hasattr(self.model, "get_image_features"):
            return pooled(self.model.get_image_features(pixel_values=pixels))
        return pooled(self.model(pixel_values=pixels))


def pooled(output: Any) -> Float[Tensor, "B F"]:
    """Return one vector for each input: the pooled output, or the first token's."""
    if not isinstance(output, Tensor):
        found = getattr(output, "pooler_output", None)
        output = output.last_hidden_state[:, 0] if found is None else found
    return output.flatten(1)


class _AsTheyAre(nn.Module):
    """Replaces torchmetrics' feature model for features that are already computed."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
        return features


def frechet_distance(real: Float[Tensor, "N F"], fake: Float[Tensor, "M F"]) -> float:
    """Return the FID: the squared Fréchet distance of Gaussians with the features' means and unbiased covariances."""
    _check_enough(real, fake)
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsTheyAre(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def kernel_distance(
    real: Float[Tensor, "N F"], fake: Float[Tensor, "M F"], *, subsets: int, subset_size: int, seed: int
) -> dict[str, Any]:
    """Return the KID: the unbiased squared MMD under the kernel (x·y / F + 1)³, mean and spread over random subsets."""
    _check_enough(real, fake)
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(real), len(fake))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features, which are there anyway
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(feature=_AsTheyAre(real.shape[1]), subsets=subsets, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, std = metric.compute()
    return {"value": float(mean), "std": float(std), "subset_size": size}


def _check_enough(real: Tensor, fake: Tensor) -> None:
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"{len(fake)} images and {len(real)} reference images are too few; give at least 2 of each")


def few_note(count: int, width: int) -> list[str]:
    """Return a warning if too few images for features of this width bias the FID; otherwise nothing."""
    enough = max(ENOUGH, width + 1)
    if count >= enough:
        return []
    return [
        f"FID from {count:,} images is biased upwards, more so the fewer there are, and not comparable with an FID "
        f"from more images: give at least {enough:,} of each for {width:,} features. KID is unbiased."
    ]


def features_table(summary: dict[str, Any], identities: dict[str, Any], notes: Sequence[str] = ()) -> str:
    """Format the numbers as a Markdown table, with their models and notes below."""
    lines = ["| | value | std | images | reference images |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, row in summary.items():
        value = row.get("value", row.get("mean"))
        std = f"{row['std']:.5f}" if "std" in row else ""
        lines.append(f"| {name} | {value:.5f} | {std} | {row['n']} | {row.get('reference_n', '')} |")
    models = [f"{role.replace('_', ' ')}: {i['name']}, SHA-256 {i['sha256']}" for role, i in identities.items()]
    return "\n".join(lines) + "\n\n" + "\n\n".join([*models, *notes]) + "\n"


def images_below(folder: Path) -> list[Path]:
    """List all images of a folder and its subfolders; ValueError if there is none."""
    return list(_listed(folder).pictures)


def _listed(folder: Path) -> Listing:
    found = list_pictures(folder, below=True)
    if not found.pictures:
        others = f", only files that are skipped: {found}" if found.passed_over else ""
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(suffixes()))}){others}")
    return found


def read_captions(path: Path) -> list[tuple[Path, str]]:
    """Read (image, caption) from JSON lines: prompts.jsonl of semroute sample, or records.jsonl of an evaluation."""
    pairs = []
    for number, row in enumerate(read_json_lines(path, "the captions"), 1):
        file, caption = (row.get("file"), row.get("prompt")) if isinstance(row, dict) else (None, None)
        caption = caption if isinstance(caption, str) else row.get("caption") if isinstance(row, dict) else None
        if not isinstance(file, str) or not isinstance(caption, str):
            raise ValueError(f"{path}:{number} lacks file, or prompt or caption")
        pairs.append((path.parent / file, caption))
    if not pairs:
        raise ValueError(f"{path} holds no captions")
    return pairs


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=formats()) as image:
            if image.mode != "F":
                return to_rgb(image)
    except BROKEN as error:
        raise ValueError(f"{path} cannot be opened as an image; fix or remove it") from error
    raise ValueError(f"{path} has floating-point pixels, whose range is unknown; save it with 8 or 16 bits")


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
