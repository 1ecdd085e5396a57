"""GenEval's two models from a folder, the hub, or mmdetection's file, each with its identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from semantic_routing.common.connection import check_hub
from semantic_routing.common.files import hash_files
from semantic_routing.evaluation.geneval.colors import ClipColors
from semantic_routing.evaluation.geneval.detector import Mask2FormerDetector
from semantic_routing.evaluation.geneval.mmdet_weights import OFFICIAL, convert_mmdet, detector_config, read_mmdet
from semantic_routing.text.quiet import quiet_transformers

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
UNUSED = ("criterion.empty_weight", "encoder.swin.layernorm.weight", "encoder.swin.layernorm.bias")
"""Ends of names that a checkpoint of the detector may lack: what is only trained with, and a norm that is not run."""


def load_geneval_models(
    detector: str | Path = DETECTOR, clip: str | Path = CLIP, device: torch.device | str = "cpu"
) -> tuple[Mask2FormerDetector, ClipColors]:
    """Load the detector and the colour classifier onto a device.

    Each is a folder written by ``save_pretrained`` or a name on the Hugging Face hub; the detector may also be
    mmdetection's file of weights. Raises a ValueError that says what is wrong with either.
    """
    loaded: list[Any] = []
    problems = []
    for load, place in ((load_detector, detector), (load_colors, clip)):
        try:
            loaded.append(load(place, device))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return loaded[0], loaded[1]


def load_detector(place: str | Path, device: torch.device | str = "cpu") -> Mask2FormerDetector:
    """Load the detector; "official weights" labels only mmdetection's published file, known by its hash."""
    from transformers import Mask2FormerForUniversalSegmentation

    if Path(place).suffix in (".pth", ".pt", ".safetensors"):
        file = Path(place)
        config, weights = detector_config(), convert_mmdet(read_mmdet(file))
        model = _load(Mask2FormerForUniversalSegmentation, None, str(file), config=config, state_dict=weights)
        digest = hash_files([file])
        official = digest.startswith(OFFICIAL.removesuffix(".pth").rpartition("-")[2])
        name, label = file.name, "official weights" if official else f"variant: mmdetection's {file.name}"
    else:
        folder = _folder(place, "detector", f", or mmdetection's file {OFFICIAL}")
        model = _load(Mask2FormerForUniversalSegmentation, folder, str(place))
        digest = hash_files(folder.glob("*.safetensors"))
        name, label = str(place), f"variant: {place}"
    return Mask2FormerDetector(model.to(device), {"name": name, "weights": digest, "label": label})


def load_colors(place: str | Path, device: torch.device | str = "cpu") -> ClipColors:
    """Load the colour classifier; it is labelled a variant unless it is OpenAI's ViT-L/14 by name."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = _folder(place, "CLIP", "")
    model = _load(CLIPModel, folder, str(place))
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place} has no tokenizer: {str(error).partition(chr(10))[0]}") from error
    if len(tokenizer) != model.config.text_config.vocab_size:  # without files, one that knows special tokens alone
        raise ValueError(f"{place} has no tokenizer of its model; save CLIP's there with save_pretrained")
    label = "official weights" if str(place) == CLIP else f"variant: {place}"
    identity = {"name": str(place), "weights": hash_files(folder.glob("*.safetensors")), "label": label}
    return ClipColors(model.to(device), tokenizer, identity)


def _folder(place: str | Path, what: str, other: str) -> Path:
    """Return the folder of a model, downloaded from the hub or found in its cache."""
    from huggingface_hub import snapshot_download

    if Path(place).is_dir():
        return Path(place)
    check_hub(str(place))
    try:
        return Path(snapshot_download(str(place), allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (OSError, ValueError) as error:  # among them the hub's own for bad names, missing files and no network
        raise ValueError(
            f"GenEval's {what} {str(place)!r} is not here; give a folder written by save_pretrained, a name on the "
            f"Hugging Face hub that can be reached or was fetched before (hf download {place}){other}"
        ) from error


def _load(model_class: Any, folder: Path | None, place: str, **settings: Any) -> Any:
    """Load a model of transformers; ValueError if the file lacks a weight that is used."""
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **settings
            )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"no weights in {place} that fit a {model_class.__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
    if missing := sorted(name for name in report["missing_keys"] if not name.endswith(UNUSED)):
        raise ValueError(
            f"the weights in {place} are not those of a {model_class.__name__}: they lack {len(missing)} tensors, "
            f"first {missing[0]}"
        )
    return model
