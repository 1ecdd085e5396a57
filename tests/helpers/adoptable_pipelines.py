"""Tiny random diffusers pipelines with the transformers and text encoders of ``adoptable``."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from tests.helpers.adoptable import VOCABULARY, make

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "three", "red", "apples", "two", "blue", "stars", "a", "cat", "user", "of"]
PROMPTS = ["three red apples", "two stars"]
LATENT = {"output_type": "latent", "num_inference_steps": 2}


def tokenizer() -> Any:
    """Return a tokenizer of a dozen words."""
    words = WORDS + [f"w{i}" for i in range(VOCABULARY - len(WORDS))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=16, chat_template="{% for m in messages %}user {{ m['content'] }}{% endfor %}",
    )  # fmt: skip


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def vae(channels: int = 4) -> Any:
    torch.manual_seed(1)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, shift_factor=0.1, **blocks
    ).eval()


def sana() -> Any:
    case = make("sana")
    torch.manual_seed(1)
    shape = {"block_out_channels": (8, 8), "layers_per_block": (1, 1)}
    codec = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, scaling_factor=0.4, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        **{f"{half}_{field}": value for half in ("encoder", "decoder") for field, value in shape.items()},
    ).eval()  # fmt: skip
    return diffusers.SanaPipeline(tokenizer(), case.encoder, codec, case.transformer, flow())


def z_image() -> Any:
    case = make("z-image")
    return diffusers.ZImagePipeline(flow(), vae(), case.encoder, tokenizer(), case.transformer)


def lumina2() -> Any:
    case = make("lumina2")
    return diffusers.Lumina2Pipeline(case.transformer, flow(), vae(), case.encoder, tokenizer())


def prx() -> Any:
    case = make("prx")
    pipe = diffusers.PRXPipeline(case.transformer, flow(), case.encoder, tokenizer(), vae())
    pipe.text_preprocessor = SimpleNamespace(clean_text=str)  # diffusers' own needs ftfy
    return pipe


def flux2_klein() -> Any:
    case = make("flux2-klein")
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    codec = diffusers.AutoencoderKLFlux2(block_out_channels=(4,), latent_channels=1, norm_num_groups=1, **blocks)
    return diffusers.Flux2KleinPipeline(flow(), codec.eval(), case.encoder, tokenizer(), case.transformer)


def hidream() -> Any:
    case = make("hidream")
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPTextConfig(
        **size, projection_dim=8, vocab_size=VOCABULARY, eos_token_id=2, bos_token_id=0, max_position_embeddings=128
    )
    torch.manual_seed(1)
    clips = [transformers.CLIPTextModelWithProjection(clip).eval() for _ in range(2)]
    shape = {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    t5 = transformers.T5EncoderModel(transformers.T5Config(d_model=24, **shape)).eval()
    case.encoder.set_attn_implementation("eager")  # the pipeline asks for attentions
    pipe = diffusers.HiDreamImagePipeline(
        flow(), vae(), clips[0], tokenizer(), clips[1], tokenizer(), t5, tokenizer(), case.encoder, tokenizer(),
        case.transformer,
    )  # fmt: skip
    pipe.default_sample_size = 8  # it scales every size to this one's area
    return pipe


def wan() -> Any:
    """Return a pipeline of two transformers, as Wan 2.2: one for the first step of two, one for the second."""
    case = make("wan")
    torch.manual_seed(1)
    codec = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    second = make("wan").transformer
    return diffusers.WanPipeline(
        tokenizer(), case.encoder, codec.eval(), flow(), case.transformer, second, boundary_ratio=0.5
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALLS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sana": (sana, {"complex_human_instruction": None, "height": 32, "width": 32, "use_resolution_binning": False}),
    "z-image": (z_image, {"height": 16, "width": 16, "guidance_scale": 3.0}),
    "lumina2": (lumina2, {"height": 16, "width": 16, "system_prompt": "a"}),
    "prx": (prx, {"height": 16, "width": 16, "use_resolution_binning": False}),
    "flux2-klein": (flux2_klein, {"height": 16, "width": 16, "max_sequence_length": 16}),
    "wan": (wan, {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}),
    "hidream": (hidream, {"height": 16, "width": 16}),
}


def pipeline(name: str) -> Any:
    """Return the tiny pipeline of a family."""
    return quiet(CALLS[name][0]())


@torch.no_grad()
def draw(pipe: Any, name: str, prompts: Any = None, **options: Any) -> Tensor:
    """Return the latents of two prompts (PRX takes one at a time)."""
    prompts = (PROMPTS[:1] if name == "prx" else PROMPTS) if prompts is None else prompts
    if "prompt_embeds" in options:
        prompts = None
    call = CALLS[name][1] | LATENT | {"generator": torch.Generator().manual_seed(7)} | options
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # some pipelines change it
    prompts = list(prompts) if prompts else prompts  # Z-Image writes into the list
    return torch.as_tensor(pipe(prompt=prompts, **call)[0])
