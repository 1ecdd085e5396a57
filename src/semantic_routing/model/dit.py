"""The diffusion transformer: in every block, image tokens attend to each other and to that block's text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from semantic_routing.flow import velocity_from_image
from semantic_routing.model.arms import ARMS, DEFAULT_ARM, Arm, parse_arm
from semantic_routing.model.context import TextContext, packed_context
from semantic_routing.model.layers import (
    BlockText,
    CrossAttention,
    GatedMLP,
    RMSNorm,
    Rope,
    SelfAttention,
    TimeEmbedding,
    linear,
    rope_2d,
    zero_,
)
from semantic_routing.model.noise_level import NoiseLevel
from semantic_routing.model.packing import Layout
from semantic_routing.model.parts import basis
from semantic_routing.model.routing import make_router
from semantic_routing.text.features import TextFeatures


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a transformer; the defaults are the paper's (Section 4.1)."""

    arm: str = DEFAULT_ARM
    """Routing strategy: a name or a paper label of the table in ``arms.py``, such as "depth" or "S2"."""
    depth: int = 24
    """Number of blocks, D."""
    width: int = 2048
    """Channels of an image token."""
    heads: int = 32
    """Query heads."""
    kv_heads: int = 8
    """Key and value heads; must divide the query heads."""
    head_dim: int = 128
    """Channels of a head; a multiple of 4."""
    mlp_width: int = 8192
    """Hidden channels of the gated MLP."""
    activation: Literal["gelu_tanh", "silu"] = "silu"
    """Activation of the MLP's gate."""
    patch: int = 2
    """Side of a square patch, in latent pixels."""
    channels: int = 16
    """Channels of a latent."""
    text_width: int = 2560
    """Width C of the language model's hidden states."""
    text_layers: int = 36
    """Number L of the language model's layers that are read."""
    conditioning: Literal["none", "adaln-zero", "adaln-single", "addition"] = "none"
    """How blocks are conditioned on the time; in the paper they are not."""
    prediction: Literal["velocity", "image"] = "velocity"
    """What the last layer predicts. The network always returns the velocity, computed from an image prediction if
    needed."""
    rope_theta: float = 1e4
    """Base of the rotary frequencies."""
    text_init_std: float = 0.02
    """Standard deviation of the text projection's initial weights."""
    fusedit_first_layer: int = 6
    """FuseDiT only: the text layer (0-based) that block 0 reads; block i reads layer first + i."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "arm", parse_arm(self.arm))  # "S2" is "depth"
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.head_dim % 4:
            raise ValueError(f"head_dim={self.head_dim} must be a multiple of 4 for 2-D rotary positions")

    @property
    def strategy(self) -> Arm:
        """The arm's entry in the table of arms."""
        return ARMS[self.arm]

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows of routing weights: "block 3", or "block 3, head 1, values" if a block reads several."""
        parts = self.strategy.parts(self.kv_heads)
        return tuple(", ".join(filter(None, (f"block {d}", part))) for d in range(self.depth) for part in parts)

    @property
    def mixes(self) -> int:
        """Number of different mixes of layers that the blocks read."""
        return len(self.rows) if self.strategy.by_block else 1

    @property
    def composed(self) -> bool:
        """Whether a block multiplies the text projection and its own projection into one matrix (``parts.py``).

        This is done in blocks with several mixes. It is also done in blocks with one mix each if the text is much wider
        than a block's keys and values: training then needs fewer FLOPs, and in sampling the time is negligible beside a
        step.
        """
        kind, channels = self.strategy, 2 * self.kv_heads * self.head_dim
        return kind.finer or (kind.by_block and not kind.by_time and self.text_width > 2 * channels)


class Block(nn.Module):
    """Self-attention, cross-attention to the block's text and gated MLP, each with a residual connection."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(cfg.width)
        self.attn = SelfAttention(cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim)
        self.cross = CrossAttention(cfg.width, cfg.text_width, cfg.heads, cfg.kv_heads, cfg.head_dim)
        self.norm2 = RMSNorm(cfg.width)
        self.mlp = GatedMLP(cfg.width, cfg.mlp_width, cfg.activation)
        self.modulation = Modulation(cfg)

    def forward(
        self, x: Float[Tensor, "B S W"], rope: Rope, text: BlockText, time: Tensor | None
    ) -> Float[Tensor, "B S W"]:
        attn, mlp = self.modulation(time)
        x = x + attn.apply_gate(self.attn(attn.modulate(self.norm1(x)), rope))
        x = x + self.cross(x, text)
        return x + mlp.apply_gate(self.mlp(mlp.modulate(self.norm2(x))))


@dataclass(frozen=True)
class BranchModulation:
    """Shift, scale and gate [B, 1, W] of one residual branch; all None in blocks that do not see the time."""

    shift: Tensor | None = None
    scale: Tensor | None = None
    gate: Tensor | None = None

    def modulate(self, x: Tensor) -> Tensor:
        return x if self.shift is None or self.scale is None else x * (1 + self.scale) + self.shift

    def apply_gate(self, x: Tensor) -> Tensor:
        return x if self.gate is None else x * self.gate


class Modulation(nn.Module):
    """Adaptive layer norm: modulates a block's attention and MLP by the time embedding.

    adaLN-zero projects in every block (Peebles & Xie, 2023); adaLN-single shares the projection and learns a
    table per block (Chen et al., 2023).
    """

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.kind = cfg.conditioning
        if self.kind == "adaln-zero":
            self.proj = nn.Sequential(nn.SiLU(), zero_(nn.Linear(cfg.width, 6 * cfg.width)))
        elif self.kind == "adaln-single":
            self.table = nn.Parameter(torch.randn(6 * cfg.width) / cfg.width**0.5)

    def forward(self, time: Tensor | None) -> tuple[BranchModulation, BranchModulation]:
        if time is None or self.kind not in ("adaln-zero", "adaln-single"):
            return BranchModulation(), BranchModulation()
        six = self.proj(time) if self.kind == "adaln-zero" else time + self.table
        parts = six[:, None].chunk(6, dim=-1)
        return BranchModulation(*parts[:3]), BranchModulation(*parts[3:])


class Backbone(nn.Module):
    """Image half of the network, shared by DiT and FuseDiT: patch embedding, blocks, output projection."""

    block: type[nn.Module] = Block
    use_cuda_graph = False
    """Whether samplers capture the forward pass as a CUDA graph; it must not wait for the GPU."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.patch_embed = linear(cfg.channels * cfg.patch**2, cfg.width, bias=True)
        self.blocks = nn.ModuleList(self.block(cfg) for _ in range(cfg.depth))
        self.norm_out = RMSNorm(cfg.width)
        self.proj_out = zero_(nn.Linear(cfg.width, cfg.channels * cfg.patch**2))
        if cfg.conditioning != "none":
            self.time_embed = TimeEmbedding(cfg.width)
        if cfg.conditioning == "adaln-single":
            self.time_shared = nn.Sequential(nn.SiLU(), linear(cfg.width, 6 * cfg.width, bias=True))

    @property
    def depends_on_time(self) -> bool:
        """Whether the text must be prepared again for every time, instead of once per prompt."""
        return False

    def gate_time(self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " T"]) -> Float[Tensor, " T_or_B"]:
        """Return the time for ``prepare_text``: ``t``, or an estimate from the noisy latents ``x`` if gates use one."""
        return t

    @property
    def reads_latents(self) -> bool:
        """Whether routing estimates the time from the noisy latents, so that each image has its own weights."""
        return False

    def prepare_text(self, features: TextFeatures, t: Float[Tensor, " T"] | None = None) -> TextContext:
        """Return the keys and values of these prompts for every block.

        Samplers call this once per prompt if routing does not depend on time, and otherwise at every step. ``t`` is
        needed only if routing depends on time: one time for all prompts, or one for each, from 0 (noise) to 1 (data).
        """
        raise NotImplementedError

    def prepare_steps(self, features: TextFeatures, times: Float[Tensor, " T"]) -> list[TextContext]:
        """Return one context of these prompts for each of several times."""
        return [self.prepare_text(features, t[None]) for t in times]

    def forward(
        self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " T"], context: TextContext
    ) -> Float[Tensor, "B Ch h w"]:
        """Return the velocity (data minus noise), of the shape of ``x``, at the noisy latents ``x`` and times ``t``.

        ``t`` is 0 at the noise and 1 at the data, with one time for each sample or one for all. ``text`` is what
        ``prepare_text`` returns.
        """
        cfg, (height, width) = self.cfg, x.shape[2:]
        if height % cfg.patch or width % cfg.patch:
            raise ValueError(f"latents of {height}x{width} do not divide into patches of {cfg.patch}")
        grid = height // cfg.patch, width // cfg.patch
        rope = rope_2d(*grid, cfg.head_dim, cfg.rope_theta, x.device)
        tokens = self.patch_embed(patchify(x, cfg.patch))
        time = None if cfg.conditioning == "none" else self.time_embed(t)
        if cfg.conditioning == "adaln-single":
            time = self.time_shared(time)
        elif time is not None and cfg.conditioning == "addition":
            tokens = tokens + time[:, None]
        for block, text in zip(self.blocks, context.blocks(), strict=True):
            tokens = block(tokens, rope, text, time)
        out = unpatchify(self.proj_out(self.norm_out(tokens)), cfg.patch, height, width)
        return out if cfg.prediction == "velocity" else velocity_from_image(out, x, t)


class DiT(Backbone):
    """The paper's cross-attention transformer. Its router mixes the language model's layers for each block.

    model = DiT(DiTConfig(arm="depth", text_width=encoder.width, text_layers=encoder.num_layers))
    context = model.prepare_text(encoder.encode(["a red circle"]))  # once per prompt
    velocity = model(x, t, context)  # x: noisy latents [B, C, h, w], t: times [B], 0 noise, 1 data
    """

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__(cfg)
        self.text_norm = RMSNorm(cfg.text_width)
        self.text_proj = nn.Linear(cfg.text_width, cfg.text_width)
        nn.init.normal_(self.text_proj.weight, std=cfg.text_init_std)
        nn.init.zeros_(self.text_proj.bias)
        # Last, so that with one seed all arms begin with the same backbone.
        self.router = make_router(cfg.arm, cfg.text_layers, cfg.depth, cfg.text_width, cfg.kv_heads)
        self.noise_level = NoiseLevel() if cfg.strategy.time_from == "latent" else None

    @property
    def depends_on_time(self) -> bool:
        return self.router.depends_on_time

    def gate_time(self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " T"]) -> Float[Tensor, " T_or_B"]:
        return t if self.noise_level is None else self.noise_level(x)

    @property
    def reads_latents(self) -> bool:
        return self.noise_level is not None

    def prepare_text(self, features: TextFeatures, t: Float[Tensor, " T"] | None = None) -> TextContext:
        check_text(features, self.cfg)
        layout = Layout.of(features)
        if self.depends_on_time and t is not None and len(t) > 1:  # each sample has its own weights: mix, then pack
            if layout.arrived is not None:
                mixed = self.router.mix_tokens(features.hidden, t, layout.samples())
            else:
                mixed = layout.pack(self.router(features.hidden, t))
        else:
            mixed = self.router(layout.pack(features.hidden), t)
        return self._keys_and_values(mixed, layout)

    def prepare_steps(self, features: TextFeatures, times: Float[Tensor, " T"]) -> list[TextContext]:
        if not self.depends_on_time:
            return super().prepare_steps(features, times)
        check_text(features, self.cfg)
        layout = Layout.of(features)
        steps = self.router.mix_steps(layout.pack(features.hidden), times)
        return [self._keys_and_values(mixed, layout) for mixed in steps]

    def _keys_and_values(self, mixed: Float[Tensor, "K B N C"], layout: Layout) -> TextContext:
        """Return the context in which every block attends to its own mix or mixes (Section 3.3)."""
        blocks, depth = cast(Iterable[Block], self.blocks), len(self.blocks)
        normed = self.text_norm(mixed)
        if self.cfg.composed:
            split, probed = self.cfg.strategy.split(self.cfg.kv_heads), self.text_proj(basis(normed))
            parts = normed.unflatten(0, (depth, -1))
            pairs = [block.cross.prepare_parts(own, probed, split) for block, own in zip(blocks, parts, strict=True)]
        else:
            texts = self.text_proj(normed).expand(depth, -1, -1, -1)
            pairs = [block.cross.prepare(own) for block, own in zip(blocks, texts, strict=True)]
        keys, values = (tuple(map(layout.pad, side)) for side in zip(*pairs, strict=True))
        if layout.packing is None:
            return TextContext(keys, values, layout.mask)
        return packed_context(keys, values, layout.packing)


def check_text(features: TextFeatures, cfg: DiTConfig) -> None:
    """Raise ValueError unless the features have the number of layers and the width that the transformer reads."""
    layers, _, _, width = features.hidden.shape
    if (layers, width) != (cfg.text_layers, cfg.text_width):
        raise ValueError(
            f"the text encoder gives {layers} layers of width {width}, but this transformer reads "
            f"{cfg.text_layers} layers of width {cfg.text_width}: use the encoder it was trained with"
        )


def patchify(x: Float[Tensor, "B Ch h w"], patch: int) -> Float[Tensor, "B S P"]:
    """Cut latents into patches, row by row; a token holds (row, column, channel) in this order."""
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B Ch h p w p
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Float[Tensor, "B S P"], patch: int, height: int, width: int) -> Float[Tensor, "B Ch h w"]:
    """Invert ``patchify`` for latents of ``height`` x ``width``."""
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height // patch, width // patch))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
