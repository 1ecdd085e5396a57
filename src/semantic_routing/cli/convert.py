"""``semroute convert``: converts reference checkpoints to runs and back, and runs to other arms."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from safetensors.torch import save_file

from semantic_routing.checkpoint.load import EMA, MODEL, STATE, find_checkpoint, open_checkpoint
from semantic_routing.common.config import to_dict
from semantic_routing.common.files import check_writable, read_json, write_text, written_whole
from semantic_routing.common.locks import LOCK, claimed
from semantic_routing.common.manifest import manifest
from semantic_routing.interop.upstream import load_upstream, to_upstream, upstream_config
from semantic_routing.model.arms import DEFAULT_ARM, parse_arm
from semantic_routing.model.change_arm import change_arm
from semantic_routing.model.codec import HUB_NAME, CodecConfig, PixelCodec
from semantic_routing.model.dit import Backbone
from semantic_routing.sampling.load import TEXT_ENCODER, load_model, read_run_config
from semantic_routing.sampling.located import KEY
from semantic_routing.sampling.text_to_image import check_channels, check_encoder, latent_shape
from semantic_routing.text.architecture import text_shape
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.training.recipes import paper


@dataclass(frozen=True, kw_only=True)
class UpstreamArguments:
    """Convert a checkpoint of the paper's reference implementation to a run that every command can use."""

    src: Annotated[Path, tyro.conf.Positional]
    """A safetensors or torch file, a folder with it or its shards, or a folder saved by DeepSpeed or Accelerate."""
    config: Path
    """JSON file with the checkpoint's sizes under the reference's names."""
    arm: str
    """Routing strategy: penultimate, uniform, static, time, depth, joint or fusedit (or B1 ... FuseDiT)."""
    out: Path
    """Folder of the run to write."""
    image_size: int = 256
    """Side of an image in pixels."""
    text: TextEncoderConfig = field(default_factory=lambda: paper(DEFAULT_ARM).text)
    """The language model that it was trained with; the default is the paper's."""
    codec: CodecConfig = field(default_factory=lambda: paper(DEFAULT_ARM).codec)
    """The codec between latents and images; the default is the paper's."""


@dataclass(frozen=True, kw_only=True)
class OursArguments:
    """Convert a run's weights to the reference implementation's names, with a file of their sizes."""

    model: Annotated[Path, tyro.conf.Positional]
    """Run's folder, or one of its checkpoints."""
    out: Path
    """Safetensors file to write; its sizes are written to the same name with the ending .json."""
    averaged: bool = True
    """Write the exponential moving average of the weights, which gives the best samples; --no-averaged writes the
    trained weights."""


@dataclass(frozen=True, kw_only=True)
class ArmArguments:
    """Convert a run to the same network under another arm: depth to depth-heads-kv, or back if that is exact."""

    model: Annotated[Path, tyro.conf.Positional]
    """Run's folder, or one of its checkpoints."""
    arm: str
    """The other arm: uniform, static, depth, depth-kv, depth-heads, depth-heads-kv or depth-low-rank."""
    out: Path
    """Folder of the run to write."""


def convert_upstream(args: UpstreamArguments) -> Path:
    """Write a run with the reference's weights as its only checkpoint; return that checkpoint.

    The weights are stored in float32, as in every run, and only once, under both names that they have in a checkpoint.
    Raises ValueError if the run exists, if ``load_upstream`` does, if a text encoder on this machine does not match the
    weights, or if the size in pixels does not divide into patches.
    """
    check_writable(args.out)
    with claimed(args.out / LOCK, args.out):
        return _convert_upstream(args)


def _convert_upstream(args: UpstreamArguments) -> Path:
    if (args.out / "checkpoints").exists():
        raise ValueError(f"{args.out} already holds a run; choose another --out")
    sizes = _read_sizes(args.config)
    model = load_upstream(args.src, sizes, parse_arm(args.arm)).float()
    _check_text(model, args.text)
    if args.codec.kind == "pixels":
        check_channels(PixelCodec(), model.cfg)
        latent_shape(PixelCodec(), model.cfg, args.image_size, args.image_size)
    cfg = replace(paper(model.cfg.arm), model=model.cfg, text=args.text, codec=args.codec, image_size=args.image_size)
    folder = args.out / "checkpoints" / "step-0000000"
    with written_whole(folder) as scratch:
        scratch.mkdir()
        save_file({name: x.detach().contiguous() for name, x in model.state_dict().items()}, scratch / EMA)
        os.link(scratch / EMA, scratch / MODEL)
        state = {"step": 0, "config": to_dict(cfg)}
        (scratch / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    facts = manifest(converted_from=args.src.name, upstream_config=sizes)
    write_text(args.out / "manifest.json", json.dumps(facts, indent=2) + "\n")
    return folder


def convert_ours(args: OursArguments) -> Path:
    """Write a run's weights under the reference's names; return the file."""
    model = load_model(find_checkpoint(args.model), averaged=args.averaged)
    tensors = to_upstream(model)
    with written_whole(args.out) as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})
    write_text(args.out.with_suffix(".json"), json.dumps(upstream_config(model), indent=2) + "\n")
    return args.out


def convert_arm(args: ArmArguments) -> Path:
    """Write a run whose only checkpoint is the same network under another arm; return that checkpoint.

    Raises ValueError if the run to write exists or ``change_arm`` does. The optimiser state is not converted.
    """
    check_writable(args.out)
    with claimed(args.out / LOCK, args.out):
        return _convert_arm(args)


def _convert_arm(args: ArmArguments) -> Path:
    if (args.out / "checkpoints").exists():
        raise ValueError(f"{args.out} already holds a run; choose another --out")
    source, state = open_checkpoint(args.model)
    arm, config = parse_arm(args.arm), read_run_config(source, state)
    changed = {
        name: change_arm(load_model(source, averaged=name == EMA, state=state), arm).state_dict()
        for name in (EMA, MODEL)
    }
    encoder = source.parent.parent / TEXT_ENCODER
    if encoder.is_dir() and not (args.out / TEXT_ENCODER).exists():
        with written_whole(args.out / TEXT_ENCODER) as scratch:
            shutil.copytree(encoder, scratch)
    folder = args.out / "checkpoints" / "step-0000000"
    with written_whole(folder) as scratch:
        scratch.mkdir()
        for name, tensors in changed.items():
            save_file({key: x.detach().contiguous() for key, x in tensors.items()}, scratch / name)
        own = {"step": 0, "config": config | {"model": config["model"] | {"arm": arm}}}
        own |= {key: state[key] for key in (KEY,) if key in state}
        (scratch / STATE).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
    facts = manifest(converted_from=str(args.model), arms=[config["model"]["arm"], arm])
    write_text(args.out / "manifest.json", json.dumps(facts, indent=2) + "\n")
    return folder


DIRECTIONS: dict[str, tuple[type, Callable[[Any], Path]]] = {
    "upstream": (UpstreamArguments, convert_upstream),
    "ours": (OursArguments, convert_ours),
    "arm": (ArmArguments, convert_arm),
}
"""By direction: the arguments and the function that converts."""


def _read_sizes(path: Path) -> dict[str, Any]:
    sizes = read_json(path, "the sizes")
    if not isinstance(sizes, dict):
        raise ValueError(f'{path} must hold an object of sizes such as {{"hidden_size": 2048, ...}}')
    return sizes


def _check_text(model: Backbone, text: TextEncoderConfig) -> None:
    """Raise ValueError if a text encoder on this machine does not match the weights; the hub is not asked."""
    name = text.name_or_path
    if re.fullmatch(HUB_NAME, name) and not Path(name).is_dir():
        return
    shape = text_shape(text)
    try:
        check_encoder(shape, model.cfg)
    except ValueError as error:
        raise ValueError(f"{error}; give the model of its training as --text.name-or-path instead of {name}") from error
