"""Load a run or a checkpoint as TextToImage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from semantic_routing.checkpoint.load import EMA, MODEL, find_checkpoint, load_weights, read_state
from semantic_routing.common.config import from_dict
from semantic_routing.common.device import use_bfloat16
from semantic_routing.model.build import make_model
from semantic_routing.model.codec import CodecConfig, make_codec
from semantic_routing.model.dit import Backbone, DiTConfig
from semantic_routing.model.runtime import compile_network
from semantic_routing.sampling.located import FOLDER, KEY, located_model
from semantic_routing.sampling.text_to_image import TextToImage, check_channels, check_encoder, latent_shape
from semantic_routing.text.config import TextEncoderConfig, tiny_sizes
from semantic_routing.text.encoder import TextEncoder

TEXT_ENCODER = "text_encoder"
"""Folder of a run that holds the text encoder made for it."""


def locate_encoder(cfg: TextEncoderConfig, run: Path) -> TextEncoderConfig:
    """Where a run's text encoder really is: in the run's own folder if it made one, else as named."""
    if tiny_sizes(cfg.name_or_path) is None:
        return cfg
    folder = run / TEXT_ENCODER
    if not folder.is_dir():
        raise ValueError(f"the run {run} lacks its folder {TEXT_ENCODER}, the language model that was made for it")
    return replace(cfg, name_or_path=str(folder))


def open_encoder(cfg: TextEncoderConfig, run: Path, device: torch.device) -> TextEncoder:
    """Load a run's text encoder."""
    return TextEncoder.from_pretrained(locate_encoder(cfg, run), device)


def read_run_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint; ValueError where it has none."""
    config = read_state(folder).get("config")
    if not isinstance(config, dict) or not {"model", "text", "codec", "image_size"} <= config.keys():
        raise ValueError(f"{folder} was not written by semroute train: its state.json has no configuration")
    return config


def load_model(folder: Path, *, averaged: bool = True) -> Backbone:
    """The network of a checkpoint alone, on the CPU."""
    with torch.device("meta"):
        model = make_model(from_dict(DiTConfig, read_run_config(folder)["model"], "model."))
    load_weights(folder / (EMA if averaged else MODEL), model)
    return model


def load_bundle(path: Path, device: torch.device, *, averaged: bool = True, compiled: bool = False) -> TextToImage:
    """The model of a run's folder (its latest checkpoint) or of one checkpoint, with encoder and codec.

    ``averaged`` takes the moving average of the weights, which is what samples best; ``compiled`` compiles the
    network. ValueError if there is no checkpoint, it is damaged, or it does not fit its own configuration, text encoder
    or codec.
    """
    folder = find_checkpoint(path)
    config = read_run_config(folder)
    size = config["image_size"]
    model = load_model(folder, averaged=averaged)
    begun = read_state(folder).get(KEY, {}).get(FOLDER)  # relative paths are meant from there
    text = located_model(from_dict(TextEncoderConfig, config["text"], "text."), begun)
    encoder = open_encoder(text, folder.parent.parent, device)
    codec = make_codec(located_model(from_dict(CodecConfig, config["codec"], "codec."), begun), device)
    check_encoder(encoder.shape, model.cfg)
    check_channels(codec, model.cfg)
    latent_shape(codec, model.cfg, size, size)
    model.eval().requires_grad_(False).to(device)
    if compiled:
        compile_network(model)
    return TextToImage(
        model=model,
        encoder=encoder,
        codec=codec,
        image_size=size,
        null_prompt=config.get("null_prompt", ""),
        bf16=use_bfloat16(config.get("precision", "auto"), device),
        checkpoint=folder,
        config=config,
    )
