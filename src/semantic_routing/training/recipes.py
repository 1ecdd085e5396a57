"""Recipes: functions from an arm, such as "depth", to a complete ``TrainConfig``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from semantic_routing.data.dataset import DataConfig
from semantic_routing.flow import TimeConfig
from semantic_routing.model.arms import ARMS
from semantic_routing.model.codec import CodecConfig
from semantic_routing.model.dit import DiTConfig
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.text.config import TINY, TextEncoderConfig
from semantic_routing.toy.worlds import WORDS
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.optim import OptimConfig
from semantic_routing.training.parallelize import ParallelConfig

TOY_SAMPLING = SampleConfig(sampler="renoise", steps=100, guidance=3.0, shift=4.0, batch=110)
"""Sampling settings of toy models: most steps are close to the noise, where the content of the scene is decided."""
WORDS_SAMPLING = replace(TOY_SAMPLING, steps=25, batch=133)
"""Sampling settings of models of the world of words, with a batch of seven images per tag."""
SMALL_SAMPLING = replace(TOY_SAMPLING, batch=506)
"""The same for small models, with a batch size for a GPU."""

GATE_RATE = 2e-5
"""Learning rate of gates. AdamW moves a gate's logits through all of its 512 hidden channels, a hundred times faster
than logits that are parameters: at the network's rate gates collapse onto one layer (docs/log.md)."""

KEPT_STATES = "~/.cache/semantic-routing/states"
"""Folder of a real language model's hidden states, which all runs of a study share."""


def toy(arm: str) -> TrainConfig:
    """Train in minutes on two CPU cores: 32x32 images of shapes in pixel space, with a tiny language model."""
    model = DiTConfig(
        arm=arm, depth=6, width=192, heads=6, kv_heads=2, head_dim=32, mlp_width=512, patch=8, channels=3,
        conditioning="adaln-zero", prediction="image", rope_theta=100.0,
        text_width=128, text_layers=8, text_init_std=128**-0.5, fusedit_first_layer=1,
    )  # fmt: skip
    return TrainConfig(
        image_size=32,
        model=model,
        text=TextEncoderConfig(name_or_path=TINY, dtype="bfloat16"),
        codec=CodecConfig(kind="pixels"),
        optim=OptimConfig(
            name="muon",
            lr=2e-3,
            muon_lr=0.02,
            router_lr=GATE_RATE if ARMS[arm].by_time else None,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            warmup=50,
            decay="cosine",
        ),
        steps=3000,
        batch=128,
        # Large flat areas are visible early, so the content of a scene is decided close to the noise.
        time=TimeConfig(mean=-1.7, std=1.15),
        ema_decay=0.997,
        ema_every=1,
        compile=True,
        checkpoint_every=1000,
        preview_every=500,
        preview=replace(TOY_SAMPLING, steps=25, batch=16),
    )


def debug(arm: str) -> TrainConfig:
    """Train in seconds on any machine: two blocks and a language model of two layers, which learn almost nothing.

    Use it to check that an installation, a data set or a change works from end to end; the tests use it, too.
    """
    model = DiTConfig(
        arm=arm, depth=2, width=32, heads=2, kv_heads=1, head_dim=32, mlp_width=48, patch=8, channels=3,
        text_width=64, text_layers=2, fusedit_first_layer=0,
    )  # fmt: skip
    return TrainConfig(
        image_size=32,
        model=model,
        text=TextEncoderConfig(name_or_path=f"{TINY}:2x64x5", buckets=(16, 32, 64)),
        codec=CodecConfig(kind="pixels"),
        optim=OptimConfig(lr=1e-2),
        steps=8,
        batch=4,
        ema_every=1,
        precision="fp32",
        log_every=1,
        checkpoint_every=4,
        preview_every=8,
        preview=SampleConfig(steps=2, guidance=2.0, batch=3),
    )


def words(arm: str) -> TrainConfig:
    """Train in minutes on two CPU cores: the world of words with SmolLM2, which encodes each of 16,384 captions once.

    The hidden states take 12 GB in the user's cache folder, where the runs of all arms and seeds share them.
    """
    cfg = toy(arm)
    model = replace(cfg.model, text_width=576, text_layers=30, text_init_std=576**-0.5)
    if arm == "fusedit":  # its heads are the language model's, and it reads the middle layers
        model = replace(model, heads=3, kv_heads=3, head_dim=64, fusedit_first_layer=12)
    return replace(
        cfg,
        data=DataConfig(paths=(WORDS,), captions=16_384),
        model=model,
        text=TextEncoderConfig(name_or_path="smollm2", dtype="bfloat16", keep="0", keep_on_disk=KEPT_STATES),
    )


def small(arm: str) -> TrainConfig:
    """Train 41 million parameters on the toy world: seven arms and three seeds take half an hour on one GPU.

    ``tests/study/test_budget.py`` counts the FLOPs of that.
    """
    cfg = toy(arm)
    # FuseDiT reads the keys of eight language-model layers with its own heads: 2 key heads of 32.
    model = replace(cfg.model, depth=8, width=512, heads=16, mlp_width=1536, fusedit_first_layer=0)
    return replace(
        cfg,
        model=model,
        optim=replace(cfg.optim, lr=1e-3, warmup=100),
        batch=256,
        preview=replace(SMALL_SAMPLING, steps=25, batch=16),
    )


def small_words(arm: str) -> TrainConfig:
    """Train 41 million parameters on the world of words with SmolLM2 on one GPU, which encodes every caption."""
    cfg, own = small(arm), words(arm).model
    model = replace(cfg.model, text_width=own.text_width, text_layers=own.text_layers, text_init_std=own.text_init_std)
    if arm == "fusedit":
        model = replace(model, heads=9, kv_heads=3, head_dim=64, fusedit_first_layer=11)
    data = DataConfig(paths=(WORDS,), workers=4)  # drawing takes longer than a step
    return replace(cfg, data=data, model=model, text=TextEncoderConfig(name_or_path="smollm2", dtype="bfloat16"))


def paper(arm: str) -> TrainConfig:
    """Train as in Section 4.1: 2.24 billion parameters, Qwen3-VL-4B-Instruct, SD3's VAE, 256x256 pixels, batch 512."""
    return TrainConfig(
        data=DataConfig(paths=("shards",), workers=8),
        image_size=256,
        model=DiTConfig(arm=arm),
        text=TextEncoderConfig(name_or_path="Qwen/Qwen3-VL-4B-Instruct", dtype="bfloat16"),
        codec=CodecConfig(kind="vae", name_or_path="stabilityai/stable-diffusion-3-medium-diffusers", subfolder="vae"),
        optim=OptimConfig(),
        parallel=ParallelConfig(activation_checkpointing="selective"),
        steps=500_000,
        batch=512,
        precision="bf16",
        keep_every=50_000,
        preview_every=5000,
        preview=SampleConfig(batch=16),
    )


RECIPES: dict[str, Callable[[str], TrainConfig]] = {
    "debug": debug,
    "toy": toy,
    "words": words,
    "small": small,
    "small-words": small_words,
    "paper": paper,
}
