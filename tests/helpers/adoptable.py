"""Tiny random transformers and text encoders of every family that ``adopt`` knows, built from configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from diffusers.models import transformers as dits
from torch import Tensor, nn

from semantic_routing.interop.transformer import SemanticRoutingTransformer
from semantic_routing.text.features import TextFeatures

LAYERS, WIDTH, VOCABULARY, TOKENS = 4, 16, 32, 6


@dataclass
class Case:
    """A text encoder, a transformer, and how its pipeline passes the text from one to the other."""

    encoder: nn.Module
    transformer: Any
    read: Callable[[nn.Module, Tensor, Tensor], Any]
    """(encoder, ids, mask) -> the text as the pipeline makes it."""
    inputs: Callable[[Any, Tensor], dict[str, Any]]
    """(text, mask) -> arguments of the transformer."""

    def encode(self, ids: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """Return the text of two prompts; the second is shorter."""
        ids = IDS if ids is None else ids
        with torch.no_grad():
            return self.read(self.encoder, ids, MASK if mask is None else mask)

    def draw(self, text: Any = None, mask: Tensor | None = None) -> Tensor:
        """Return the transformer's output for a text."""
        text = self.encode() if text is None else text
        output = self.transformer(**self.inputs(text, MASK if mask is None else mask), return_dict=False)[0]
        return torch.stack(list(output)) if isinstance(output, list) else output


IDS = torch.tensor([[3, 5, 7, 9, 11, 13], [4, 6, 8, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
TIMES = torch.tensor([700.0, 200.0])


def decoder(cls: type, config: type, layers: int = LAYERS, **fields: Any) -> Any:
    """Return a decoder-only language model."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCABULARY, "pad_token_id": 1}
    return cls(config(**(shape | {"eos_token_id": 2, "bos_token_id": 0} | fields))).eval()


def t5(cls: type, config: type) -> Any:
    """Return an encoder of T5's kind."""
    shape = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": LAYERS, "num_heads": 2}
    return cls(config(vocab_size=VOCABULARY, **shape)).eval()


def gemma() -> Any:
    return decoder(transformers.Gemma2Model, transformers.Gemma2Config, attn_implementation="eager")


def last(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return encoder(ids, attention_mask=mask)[0]


def unmasked(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return encoder(ids)[0]


def state(number: int) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    def read(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        return encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[number]

    return read


def image(channels: int, side: int = 8) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def prx() -> Case:
    module = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    module |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    parts = [transformers.T5GemmaModuleConfig(**module) for _ in range(2)]
    config = transformers.T5GemmaConfig(encoder=parts[0], decoder=parts[1])
    encoder = transformers.models.t5gemma.modeling_t5gemma.T5GemmaEncoder(config.encoder).eval()
    transformer = dits.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=WIDTH, hidden_size=16, num_heads=2, depth=3, axes_dim=[4, 4]
    )
    return Case(
        encoder, transformer,
        lambda encoder, ids, mask: encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)[
            "last_hidden_state"
        ],
        lambda text, mask: {
            "hidden_states": image(4), "timestep": TIMES / 1000, "encoder_hidden_states": text,
            "attention_mask": mask.bool(),
        },
    )  # fmt: skip


def sana() -> Case:
    transformer = dits.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    return Case(
        gemma(), transformer, last,
        lambda text, mask: {
            "hidden_states": image(4), "encoder_hidden_states": text, "timestep": TIMES,
            "encoder_attention_mask": mask,
        },
    )  # fmt: skip


def pixart() -> Case:
    transformer = dits.PixArtTransformer2DModel(
        sample_size=8, num_layers=3, patch_size=2, attention_head_dim=4, num_attention_heads=2, caption_channels=WIDTH,
        in_channels=4, cross_attention_dim=8, out_channels=8, attention_bias=True, use_additional_conditions=False,
        norm_type="ada_norm_single",
    )  # fmt: skip
    return Case(
        t5(transformers.T5EncoderModel, transformers.T5Config), transformer, last,
        lambda text, mask: {
            "hidden_states": image(4), "encoder_hidden_states": text, "timestep": TIMES,
            "encoder_attention_mask": mask, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    )  # fmt: skip


def wan() -> Case:
    transformer = dits.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip

    def read(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        states = encoder(ids, mask).last_hidden_state
        return states * mask[..., None]  # the pipeline cuts padding off and pads with zeros

    return Case(
        t5(transformers.UMT5EncoderModel, transformers.UMT5Config), transformer, read,
        lambda text, mask: {
            "hidden_states": image(4)[:, :, None], "timestep": TIMES, "encoder_hidden_states": text
        },
    )  # fmt: skip


def ltx() -> Case:
    transformer = dits.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=3, caption_channels=WIDTH,
    )  # fmt: skip
    return Case(
        t5(transformers.T5EncoderModel, transformers.T5Config), transformer, unmasked,
        lambda text, mask: {
            "hidden_states": image(4).flatten(2).transpose(1, 2), "encoder_hidden_states": text,
            "timestep": TIMES, "encoder_attention_mask": mask, "num_frames": 1, "height": 8, "width": 8,
        },
    )  # fmt: skip


def z_image() -> Case:
    transformer = dits.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(token)

    def read(encoder: nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
        states = state(-2)(encoder, ids, mask.bool())
        return [sample[real.bool()] for sample, real in zip(states, mask, strict=True)]

    return Case(
        decoder(transformers.Qwen3Model, transformers.Qwen3Config), transformer, read,
        lambda text, mask: {"x": list(image(4)[:, :, None].unbind()), "t": 1 - TIMES / 1000, "cap_feats": text},
    )  # fmt: skip


def lumina2() -> Case:
    transformer = dits.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=3, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=None, axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64), cap_feat_dim=WIDTH,
    )  # fmt: skip
    return Case(
        gemma(), transformer, state(-2),
        lambda text, mask: {
            "hidden_states": image(4), "timestep": 1 - TIMES / 1000, "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
        },
    )  # fmt: skip


def qwen_image() -> Case:
    text = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    transformer = dits.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip

    def read(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        return state(-1)(encoder, ids, mask) * mask[..., None]  # the pipeline pads with zeros

    return Case(
        encoder, transformer, read,
        lambda text, mask: {
            "hidden_states": image(16, 4).flatten(2).transpose(1, 2), "encoder_hidden_states": text,
            "encoder_hidden_states_mask": mask, "timestep": TIMES / 1000, "img_shapes": [[(1, 4, 4)]] * 2,
        },
    )  # fmt: skip


def cogview4() -> Case:
    transformer = dits.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=3, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    size = torch.tensor([[8, 8]] * 2)
    return Case(
        decoder(transformers.GlmModel, transformers.GlmConfig), transformer,
        lambda encoder, ids, mask: encoder(ids, output_hidden_states=True).hidden_states[-2],
        lambda text, mask: {
            "hidden_states": image(4), "encoder_hidden_states": text, "timestep": TIMES, "original_size": size,
            "target_size": size, "crop_coords": torch.zeros(2, 2),
        },
    )  # fmt: skip


def sd3() -> Case:
    transformer = dits.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=WIDTH, pooled_projection_dim=16, out_channels=4,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    clip = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))

    def read(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        states = encoder(ids)[0]
        return torch.cat([nn.functional.pad(clip, (0, states.shape[-1] - clip.shape[-1])), states], 1)

    return Case(
        t5(transformers.T5EncoderModel, transformers.T5Config), transformer, read,
        lambda text, mask: {
            "hidden_states": image(4), "encoder_hidden_states": text, "pooled_projections": torch.ones(2, 16),
            "timestep": TIMES,
        },
    )  # fmt: skip


def ids_for(text: Tensor, axes: int = 3) -> dict[str, Tensor]:
    """Return the positions of a text and of 16 image tokens."""
    positions = torch.zeros(16, axes)
    positions[:, 1], positions[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {"img_ids": positions, "txt_ids": torch.zeros(text.shape[1], axes)}


def tokens(channels: int) -> Tensor:
    return image(channels, 4).flatten(2).transpose(1, 2)


def flux() -> Case:
    transformer = dits.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return Case(
        t5(transformers.T5EncoderModel, transformers.T5Config), transformer, unmasked,
        lambda text, mask: {
            "hidden_states": tokens(4), "encoder_hidden_states": text, "pooled_projections": torch.ones(2, 16),
            "timestep": TIMES / 1000, **ids_for(text),
        },
    )  # fmt: skip


def chroma() -> Case:
    transformer = dits.ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return Case(
        t5(transformers.T5EncoderModel, transformers.T5Config), transformer, last,
        lambda text, mask: {
            "hidden_states": tokens(4), "encoder_hidden_states": text, "timestep": TIMES / 1000, **ids_for(text)
        },
    )  # fmt: skip


def hidream() -> Case:
    transformer = dits.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[24, WIDTH], text_emb_dim=16, num_routed_experts=2,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[0, 2, 3, 3],
        force_inference_output=True,
    )  # fmt: skip
    others = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))

    def read(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        output = encoder(ids, attention_mask=mask, output_hidden_states=True)
        return torch.stack(output.hidden_states[1:])

    return Case(
        decoder(transformers.LlamaForCausalLM, transformers.LlamaConfig), transformer, read,
        lambda text, mask: {
            "hidden_states": image(4), "timesteps": TIMES, "encoder_hidden_states_t5": others,
            "encoder_hidden_states_llama3": text, "pooled_embeds": torch.ones(2, 16),
        },
    )  # fmt: skip


def fibo() -> Case:
    transformer = dits.BriaFiboTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=4, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=2 * WIDTH, axes_dims_rope=[2, 2, 4], text_encoder_dim=WIDTH,
    )  # fmt: skip

    def read(encoder: nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
        states = list(encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states)
        return [state * mask[..., None] for state in states + [states[-1]] * (7 - len(states))]

    return Case(
        decoder(transformers.SmolLM3ForCausalLM, transformers.SmolLM3Config), transformer, read,
        lambda text, mask: {
            "hidden_states": tokens(4), "encoder_hidden_states": torch.cat([text[-1], text[-2]], -1),
            "text_encoder_layers": text, "timestep": TIMES, **ids_for(text[0]),
        },
    )  # fmt: skip


def flux2_klein() -> Case:
    transformer = dits.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip

    def read(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return torch.stack([output.hidden_states[k] for k in (9, 18, 27)], 1).permute(0, 2, 1, 3).flatten(2)

    return Case(
        decoder(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, layers=28), transformer, read,
        lambda text, mask: {
            "hidden_states": tokens(4), "encoder_hidden_states": text, "timestep": TIMES / 1000, **ids_for(text, 4)
        },
    )  # fmt: skip


class OwnCase(Case):
    """A transformer of this program, which gets all layers and prepares the text before it is called."""

    def draw(self, text: Any = None, mask: Tensor | None = None) -> Tensor:
        features = self.encode() if text is None else text
        t = 1 - TIMES / 1000
        context = self.transformer.prepare_text(features, t if self.transformer.depends_on_time else None)
        return self.transformer(image(3), t, context)


def own() -> Case:
    transformer = SemanticRoutingTransformer(
        arm="penultimate", depth=3, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=32, channels=3, patch=2,
        text_width=WIDTH, text_layers=LAYERS,
    )  # fmt: skip

    def read(encoder: nn.Module, ids: Tensor, mask: Tensor) -> TextFeatures:
        output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return TextFeatures(torch.stack(output.hidden_states[1:]), mask.bool())

    return OwnCase(decoder(transformers.Qwen3Model, transformers.Qwen3Config), transformer, read, lambda *_: {})


MAKERS: dict[str, Callable[[], Case]] = {
    "semantic-routing": own,
    "prx": prx,
    "sana": sana,
    "pixart": pixart,
    "wan": wan,
    "ltx": ltx,
    "z-image": z_image,
    "lumina2": lumina2,
    "qwen-image": qwen_image,
    "cogview4": cogview4,
    "sd3": sd3,
    "flux": flux,
    "chroma": chroma,
    "hidream": hidream,
    "fibo": fibo,
    "flux2-klein": flux2_klein,
}


def make(name: str) -> Case:
    """Return a family's case, the same at every call, with weights of which none is 0."""
    torch.manual_seed(0)
    case = MAKERS[name]()
    case.transformer.eval().requires_grad_(False)  # some products differ by rounding if weights need a gradient
    for parameter in case.transformer.parameters():  # zeroed gates would hide the text
        if parameter.ndim and not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    return case
