"""Guidance distillation (Meng et al., 2023): a network learns the guided velocity of a trained one.

Classifier-free guidance asks the network twice at every step of sampling, for the prompt and for the null prompt. A
network that has learned the result of both is asked once, which halves the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.checkpoint.load import open_checkpoint
from semantic_routing.flow import guided_velocity
from semantic_routing.model.dit import Backbone, DiTConfig
from semantic_routing.model.runtime import autocast
from semantic_routing.sampling.load import load_model, read_run_config
from semantic_routing.sampling.located import KEY
from semantic_routing.sampling.text_to_image import TextToImage, check_guidance
from semantic_routing.text.features import TextFeatures
from semantic_routing.training.origins import TEXT


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The guided velocity that a run learns in place of that of the images."""

    teacher: str = ""
    """Folder of the trained run whose guided velocity is learned; training starts from its weights. None by default."""
    guidance: float = 3.0
    """Scale of the teacher's classifier-free guidance."""

    def __post_init__(self) -> None:
        check_guidance(self.guidance)


def teacher_network(cfg: DistillConfig, model: DiTConfig, null_prompt: str, text: str) -> Backbone:
    """Load the teacher's averaged weights on the CPU.

    Raises ValueError unless it is a network of the same form that reads the same text encoder, whose digest is
    ``text``.
    """
    folder, state = open_checkpoint(Path(cfg.teacher))
    network = load_model(folder, state=state)
    its = read_run_config(folder, state).get("null_prompt", "")
    if network.cfg != model or its != null_prompt:
        raise ValueError(
            f"the teacher {cfg.teacher} is another network, or has another null prompt: start from its configuration, "
            f"with --config {cfg.teacher}/config.json in place of a recipe"
        )
    if state.get(KEY, {}).get(TEXT, text) != text:
        raise ValueError(f"the teacher {cfg.teacher} was trained with another text encoder: use that one here, too")
    return network.eval().requires_grad_(False)


class Teacher:
    """A trained network with guidance."""

    def __init__(self, network: Backbone, student: TextToImage, guidance: float) -> None:
        """``student`` is what learns from ``network``; both read the same text."""
        self.network, self.guidance = network, guidance
        self._null, self._bf16 = student.null_features(), student.bf16

    @torch.no_grad()
    def velocity(
        self, noisy: Float[Tensor, "B C h w"], t: Float[Tensor, " B"], features: TextFeatures
    ) -> Float[Tensor, "B C h w"]:
        """Return the guided velocity, ``null + guidance * (prompt - null)``, in float32."""
        prompt = self._predicted(noisy, t, features)
        nothing = self._predicted(noisy, t, self._null.repeat(len(noisy)))
        return guided_velocity(prompt, nothing, self.guidance)

    def _predicted(
        self, noisy: Float[Tensor, "B C h w"], t: Float[Tensor, " B"], features: TextFeatures
    ) -> Float[Tensor, "B C h w"]:
        network = self.network
        with autocast(noisy.device, self._bf16):
            context = network.prepare_text(features, network.gate_time(noisy, t))
            return network(noisy, t, context).float()
