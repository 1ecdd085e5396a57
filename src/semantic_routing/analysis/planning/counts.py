"""Counts of one image and of the networks of a run, on the meta device, before any assumption about hardware."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Muon

from semantic_routing.analysis.planning.activations import HALF, Outputs, saved_bytes
from semantic_routing.analysis.planning.encoders import encoder_sizes
from semantic_routing.common.extras import require_diffusers
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import Backbone, DiT
from semantic_routing.model.flops import META, count, count_image, count_text
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.metrics import BACKWARD
from semantic_routing.training.optim import make_optimizers, orthogonal
from semantic_routing.training.parallelize import text_modules

FLOAT = 4
"""Bytes of a float32 number."""
SHRINK = 8
"""Pixels of an image for each pixel of an autoencoder's latent, along a side."""


@dataclass(frozen=True)
class Counts:
    """Counts of one image and of the networks."""

    parameters: int
    """Weights of the trained transformer."""
    depth: int
    """Blocks of the transformer, each of which is gathered alone."""
    block: int
    """Weights of one block without those that prepare the text."""
    moments: int
    """Numbers in the states of the optimisers."""
    encoder: int
    """Weights of the language model."""
    codec: int
    """Weights of the autoencoder."""
    text_flops: int
    """FLOPs of the transformer to prepare one prompt, forward."""
    image_flops: int
    """FLOPs of the blocks for one image, forward."""
    encoder_flops: int
    """FLOPs of the language model for one prompt; 0 if its states are cached on disk."""
    codec_flops: int
    """FLOPs of the autoencoder's encoder for one image; 0 if its latents are cached on disk."""
    codec_wide: bool
    """Whether the autoencoder runs in float32."""
    update_flops: int
    """FLOPs of Muon's orthogonalisation in one update of all weights."""
    activations: dict[str, int]
    """Bytes saved for backward of one image, for each kind of activation checkpointing."""
    ahead: int
    """Bytes of one prefetched image on the GPU: its text's states, and three of the codec's largest tensors."""
    stored: int
    """Bytes of cached states and latents that are read from disk for one image."""

    @property
    def train_flops(self) -> int:
        """FLOPs of the transformer for one image, forward and backward."""
        return (1 + BACKWARD) * (self.text_flops + self.image_flops)

    @property
    def text(self) -> int:
        """Weights outside the blocks and those that prepare the text; they are gathered first."""
        return self.parameters - self.depth * self.block

    @property
    def frozen(self) -> int:
        """Bytes of the frozen networks: the language model in bfloat16, the autoencoder in its own type."""
        return HALF * self.encoder + (FLOAT if self.codec_wide else HALF) * self.codec

    @property
    def states(self) -> int:
        """Bytes of weights, average and moments, all in float32: those that a checkpoint holds."""
        return FLOAT * (2 * self.parameters + self.moments)

    @property
    def gathered(self) -> int:
        """Bytes of unsharded tensors at a time: weights of two blocks and of the text, gradients of one group."""
        return HALF * (2 * self.block + self.text) + (HALF + FLOAT) * max(self.block, self.text)


def count_all(cfg: TrainConfig, tokens: int) -> Counts:
    """Count the networks of a run with prompts of ``tokens``; ValueError for none, or if its encoder is unknown."""
    if tokens < 1:
        raise ValueError(f"text_tokens is {tokens}; a prompt has at least 1")
    sizes = encoder_sizes(cfg.text, cfg.model)
    shape = sizes.of(cfg.model)
    with META:
        model = make_model(shape)
    size = cfg.image_size if cfg.codec.kind == "pixels" else cfg.image_size // SHRINK
    text, context = count_text(model, 1, tokens)
    image = count_image(model, 1, size, size, context)
    encoder, encoder_flops = sizes.count(tokens)
    codec, codec_flops, largest = _count_codec(cfg)
    moments, update = _count_optimisers(model, cfg)
    apart = {p for part in text_modules(model) for p in part.parameters()} if isinstance(model, DiT) else set()
    features = HALF * shape.text_layers * tokens * shape.text_width
    keeps_text, keeps_latents = bool(cfg.text.keep_on_disk), bool(cfg.codec.keep_on_disk)
    return Counts(
        parameters=weights(model),
        depth=shape.depth,
        block=sum(p.numel() for p in model.blocks[0].parameters() if p not in apart),
        moments=moments,
        encoder=encoder,
        codec=codec,
        text_flops=text.total,
        image_flops=image.total,
        encoder_flops=0 if keeps_text else encoder_flops,
        codec_flops=0 if keeps_latents else codec_flops,
        codec_wide=cfg.codec.dtype == "float32",
        update_flops=update,
        ahead=features + 3 * largest,
        stored=features * keeps_text + FLOAT * 2 * shape.channels * size**2 * keeps_latents,
        activations=saved_bytes(model.bfloat16(), size, tokens),
    )


def weights(model: nn.Module) -> int:
    """Return the number of weights of a network."""
    return sum(p.numel() for p in model.parameters())


def _count_codec(cfg: TrainConfig) -> tuple[int, int, int]:
    """Return weights, FLOPs and the bytes of the largest tensor of the autoencoder; zeros for pixels."""
    if cfg.codec.kind == "pixels":
        return 0, 0, 0
    with META:
        codec, pixels = autoencoder(cfg.model.channels), torch.empty(1, 3, cfg.image_size, cfg.image_size)
    with Outputs() as outputs:
        flops, _ = count(lambda: codec.encoder(pixels))
    return weights(codec), flops.total, outputs.largest


def autoencoder(channels: int) -> Any:
    """Return Stable Diffusion 3's autoencoder with random weights."""
    require_diffusers("semroute plan with an autoencoder")
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _count_optimisers(model: Backbone, cfg: TrainConfig) -> tuple[int, int]:
    """Return the numbers in the optimisers' states (AdamW two a weight, Muon one) and the FLOPs of Muon's update."""
    moments = flops = 0
    for optimizer in make_optimizers(model, cfg.optim):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        muon = isinstance(optimizer, Muon)
        moments += sum(p.numel() for p in params) * (1 if muon else 2)
        for shape, times in Counter(p.shape for p in params).items() if muon else ():
            flops += times * _orthogonal_flops(shape)
    return moments, flops


def _orthogonal_flops(shape: torch.Size) -> int:
    with META:
        matrix = torch.empty(1, *shape)
    return count(lambda: orthogonal(matrix))[0].total
