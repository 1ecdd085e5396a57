"""The networks of detectors and judges, with few and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from semantic_routing.evaluation.geneval.mmdet_weights import detector_config

SMALL: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 2, 2],
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "num_attention_heads": 4,
    "num_queries": 10,
}
SIDE = 32
WORDS = ["<unk>", "<pad>", "<image>", "Yes", "No", "Does", "this", "figure", "show", "Please", "answer", "or", "red"]
WORDS += ["blue", "USER:", "ASSISTANT:"]
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def small_model() -> Any:
    """A Mask2Former."""
    from transformers import Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation(detector_config(**SMALL))


def tokenizer(folder: Path) -> Any:
    """CLIP's kind of tokenizer that knows single letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz-"
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    made = CLIPTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=[], model_max_length=77)
    made.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def small_clip(activation: str = "quick_gelu") -> Any:
    """A CLIP."""
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": 56, "max_position_embeddings": 77, "hidden_act": activation}
    text |= {"bos_token_id": 54, "eos_token_id": 55, "pad_token_id": 55}
    vision = size | {"image_size": SIDE, "patch_size": 8, "hidden_act": activation}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.0)  # as made, all pictures look alike
    return model


def save_llava(folder: Path) -> None:
    """A LLaVA of two layers and its processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token="<pad>",
            additional_special_tokens=["<image>"],
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    )
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**size, image_size=28, patch_size=14, projection_dim=16),
            text_config=LlamaConfig(**size, vocab_size=len(WORDS), num_key_value_heads=2, initializer_range=0.5),
            image_token_index=WORDS.index("<image>"),
        )
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
