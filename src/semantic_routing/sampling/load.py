"""Loading a run or a checkpoint as TextToImage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from semantic_routing.checkpoint.load import EMA, MODEL, load_weights, open_checkpoint, read_state
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
"""The folder inside a run that holds the tiny language model made for it."""


def locate_encoder(cfg: TextEncoderConfig, run: Path) -> TextEncoderConfig:
    """Point the configuration at the run's own copy of its text encoder if that was trained for the run."""
    if tiny_sizes(cfg.name_or_path) is None:
        return cfg
    folder = run / TEXT_ENCODER
    if not folder.is_dir():
        raise ValueError(
            f"the run {run} lacks its folder {TEXT_ENCODER} with the language model made for it; copy it back"
        )
    return replace(cfg, name_or_path=str(folder))


def open_encoder(cfg: TextEncoderConfig, run: Path, device: torch.device) -> TextEncoder:
    """Load a run's text encoder."""
    return TextEncoder.from_pretrained(locate_encoder(cfg, run), device)


def read_run_config(folder: Path, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the configuration of the run that wrote a checkpoint; raise ValueError if it has none.

    ``state`` is the content of the checkpoint's ``state.json``, if it was read before.
    """
    config = (state or read_state(folder)).get("config")
    if not isinstance(config, dict) or not {"model", "text", "codec", "image_size"} <= config.keys():
        raise ValueError(f"{folder} was not written by semroute train: its state.json has no configuration")
    return config


def load_model(folder: Path, *, averaged: bool = True, state: dict[str, Any] | None = None) -> Backbone:
    """Load only the network of a checkpoint, on the CPU; ``state`` as in ``read_run_config``."""
    with torch.device("meta"):
        model = make_model(from_dict(DiTConfig, read_run_config(folder, state)["model"], "model."))
    load_weights(folder / (EMA if averaged else MODEL), model)
    return model


def load_bundle(path: Path, device: torch.device, *, averaged: bool = True, compiled: bool = False) -> TextToImage:
    """Load a run's latest checkpoint, or a single checkpoint, with its text encoder and codec.

    ``averaged`` loads the exponential moving average of the weights, which gives the best samples; ``compiled``
    compiles the network. Raises ValueError if there is no checkpoint, if it is damaged, or if its weights, text encoder
    or codec do not match its configuration.
    """
    folder, state = open_checkpoint(path)
    config = read_run_config(folder, state)
    size = config["image_size"]
    model = load_model(folder, averaged=averaged, state=state)
    begun = state.get(KEY, {}).get(FOLDER)  # relative paths start there
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
        begun=begun,
    )
