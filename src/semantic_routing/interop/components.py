"""The components of a pipeline: how they are checked, combined, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from semantic_routing.common.config import from_dict
from semantic_routing.common.device import use_bfloat16
from semantic_routing.interop.facts import check_latents
from semantic_routing.interop.numerals import Number, whole
from semantic_routing.model.arms import ARMS
from semantic_routing.model.codec import Codec, PixelCodec, VAECodec
from semantic_routing.sampling.text_to_image import check_channels, check_encoder, latent_shape
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.text.features import TextFeatures

CLASS_FILE = "pipeline"
IMPORT = "from semantic_routing import SemanticRoutingPipeline\n"
"""The file ``pipeline.py`` of a folder, in which ``DiffusionPipeline.from_pretrained`` looks for the class."""


class Components(DiffusionPipeline):
    """A pipeline of text encoder, transformer and VAE, any of which may be missing."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer", "transformer", "vae"]

    def encode_prompt(self, prompts: str | Sequence[str]) -> TextFeatures:
        """Encode prompts, in the dtype and on the device that the transformer needs.

        A call accepts the result as ``prompt_embeds`` or ``negative_prompt_embeds``.
        """
        reads_keys = (self.config.text or {}).get("keys_and_values", False)
        if self.transformer is not None:
            reads_keys = ARMS[self.transformer.config.arm].reads_keys
        features = self.encoder().encode([prompts] if isinstance(prompts, str) else prompts, with_kv=reads_keys)
        return self.as_products_need(features)

    def as_products_need(self, features: TextFeatures) -> TextFeatures:
        """Move features to the device where the pipeline runs, and to the type of its matrix products' inputs."""
        device = self._execution_device
        if self.transformer is None:
            return features.to(device)
        return features.to(device, torch.float32 if self.product_type(device) == torch.float32 else None)

    def latent_shape(self, height: Number | None = None, width: Number | None = None) -> tuple[int, int, int]:
        """Return the shape (channels, h, w) of an image's latents; raise ValueError if patches do not divide it."""
        size = self.config.image_size
        rows, columns = (
            size if side is None else whole(name, side) for name, side in {"height": height, "width": width}.items()
        )
        return latent_shape(self.codec(), self.transformer.backbone.cfg, rows, columns)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position along one side."""
        return self.codec().factor

    @property
    def image_processor(self) -> VaeImageProcessor:
        """The converter between images and tensors with values from -1 to 1."""
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def enable_vae_tiling(self) -> None:
        """Decode large images in overlapping tiles: less memory, different pixels. ValueError without a VAE."""
        self._vae("tile").enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode images without tiles again."""
        self._vae("tile").disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decode the images of a call one by one: less memory, same pixels. Raises ValueError without a VAE."""
        self._vae("slice").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode the images of a call together again."""
        self._vae("slice").disable_slicing()

    def _vae(self, purpose: str) -> Any:
        if self.vae is None:
            raise ValueError(f"this model samples pixels and has no VAE to {purpose}")
        return self.vae

    def product_type(self, device: torch.device) -> torch.dtype:
        """Return the type of matrix products: the weights' type, or as ``precision`` says if they are float32."""
        dtype = self.transformer.dtype
        wide = dtype == torch.float32
        return torch.bfloat16 if wide and use_bfloat16(self.config.precision, device) else dtype

    def products(self, device: torch.device) -> AbstractContextManager[None]:
        """Return a context in which matrix products have the type ``product_type``."""
        dtype = self.product_type(device)
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def encoder(self) -> TextEncoder:
        """Return the text encoder with its training settings; raise ValueError if the pipeline has none."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder and tokenizer to encode prompts: give prompt_embeds and "
                "negative_prompt_embeds, from encode_prompt of a pipeline that has them"
            )
        settings = {name: value for name, value in (self.config.text or {}).items() if name != "keys_and_values"}
        total = settings.pop("total_layers", 0)
        settings.setdefault("name_or_path", self.text_encoder.name_or_path or "the text encoder")
        config = from_dict(TextEncoderConfig, settings, "text.")
        return TextEncoder.from_model(self.text_encoder, self.tokenizer, config, total)

    def codec(self) -> Codec:
        """Return the VAE as a codec, or the codec of pixels if there is none."""
        return PixelCodec() if self.vae is None else VAECodec(self.vae)

    def check_components(self) -> Codec:
        """Return the codec; raise ValueError if components do not match or the transformer is missing."""
        if self.transformer is None:
            raise ValueError("this pipeline has no transformer to sample with: it can only encode_prompt")
        codec, cfg = self.codec(), self.transformer.backbone.cfg
        if self.text_encoder is not None and self.tokenizer is not None:
            check_encoder(self.encoder().shape, cfg)
        check_latents(self.transformer, codec)
        check_channels(codec, cfg)
        return codec

    def save_config(self, save_directory: Path | str, push_to_hub: bool = False, **options: Any) -> None:
        """Write ``model_index.json`` and the file in which diffusers finds the pipeline's class."""
        super().save_config(save_directory, **options)
        path = Path(save_directory, self.config_name)
        index = json.loads(path.read_text(encoding="utf-8"))
        index["_class_name"] = [CLASS_FILE, index["_class_name"]]
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        path.with_name(f"{CLASS_FILE}.py").write_text(IMPORT, encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: Path | str) -> dict[str, Any]:
        """Read ``model_index.json``; drop the name of the class's file, because the class is already here."""
        index = super()._dict_from_json_file(json_file)
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][-1]
        return index
