"""The frozen text encoder: what its states mean in every family, how it treats prompts and bad input."""

from __future__ import annotations

import gc
import json
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

from semantic_routing.text.architecture import text_shape
from semantic_routing.text.config import TextEncoderConfig, resolve_layers
from semantic_routing.text.encoder import TextEncoder

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = ["a", "red", "blue", "circle", "square", "and", "the", "of", "user", "assistant"]
LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL + WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = SIZES | {"sliding_window": 3}  # shorter than the prompts, so that sliding layers differ from full ones
MROPE = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
GEMMA_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
T5_SIZES = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": LAYERS,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

PROMPT = "a red circle and the blue square"
BATCH = [PROMPT, "blue", "the square of a red circle and a blue square and a circle", ""]


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES))


def qwen3_vl() -> nn.Module:
    vision = VISION | {"deepstack_visual_indexes": [0]}
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=MROPE, vision_config=vision))


def qwen2_5_vl() -> nn.Module:
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config=MROPE, vision_config=VISION))


def gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**WINDOW))


def gemma3() -> nn.Module:
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3Config(
        text_config=WINDOW | {"layer_types": layer_types},
        vision_config=GEMMA_VISION | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))


def mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**WINDOW))


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=SIZES["vocab_size"], **T5_SIZES))


def t5gemma() -> nn.Module:
    halves = {"encoder": T5GemmaModuleConfig(**WINDOW), "decoder": T5GemmaModuleConfig(**WINDOW)}
    return hf.T5GemmaForConditionalGeneration(hf.T5GemmaConfig(**halves, vocab_size=SIZES["vocab_size"]))


DECODERS = [qwen3, qwen3_vl, qwen2_5_vl, gemma2, gemma3, llama, mistral]
ENCODERS = [t5, t5gemma]


def tokenizer(**options: Any) -> Any:
    """One token a word; none added, unless ``options`` bring a template for the post-processor."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if template := options.pop("template", None):
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, **(names | options))


def save(folder: Path, build: Callable[[], nn.Module], **options: Any) -> nn.Module:
    """Write a random model of a family, with weights large enough that its layers differ; the model."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer(**options).save_pretrained(folder)
    return model


def text_stack(model: nn.Module) -> nn.Module:
    """The part of a whole model that reads text."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return getattr(model.model, "language_model", model.model)


def load(folder: Path, **options: Any) -> TextEncoder:
    return TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=str(folder), **options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved random Qwen3 with its tokenizer."""
    save(tmp_path, qwen3)
    return tmp_path


def test_states_and_keys_equal_a_manual_forward(tmp_path: Path) -> None:
    """Golden: embedding, each decoder layer called by hand, the final norm on the last."""
    model = save(tmp_path, qwen3).model
    features = load(tmp_path).encode([PROMPT], with_kv=True)
    n = len(PROMPT.split())
    with torch.no_grad():
        h = model.embed_tokens(torch.tensor([[(SPECIAL + WORDS).index(word) for word in PROMPT.split()]]))
        cos, sin = model.rotary_emb(h, torch.arange(n)[None])
        causal = torch.full((1, 1, n, n), -torch.inf).triu(1)
        states, keys, values = [], [], []
        for layer in model.layers:
            attention, x = layer.self_attn, layer.input_layernorm(h)
            k = attention.k_norm(attention.k_proj(x).view(1, n, 2, 8)).transpose(1, 2)
            keys.append(apply_rotary_pos_emb(k, k, cos, sin)[1])
            values.append(attention.v_proj(x).view(1, n, 2, 8).transpose(1, 2))
            h = layer(h, attention_mask=causal, position_embeddings=(cos, sin))
            states.append(h)
        states[-1] = model.norm(h)
    assert features.keys is not None
    assert features.values is not None
    torch.testing.assert_close(features.hidden[:, :, :n], torch.stack(states))
    torch.testing.assert_close(features.keys[..., :n, :], torch.stack(keys))
    torch.testing.assert_close(features.values[..., :n, :], torch.stack(values))
    assert features.mask.tolist() == [[True] * n + [False] * (16 - n)]


@pytest.mark.parametrize("build", DECODERS + ENCODERS, ids=lambda build: build.__name__)
def test_every_family(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """States are those of the whole model, from its text half alone, whatever else is in the batch."""
    stack = text_stack(save(tmp_path, build))
    ids = tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = stack(input_ids=ids, output_hidden_states=True)
    states = torch.stack([*expected.hidden_states[1:LAYERS], expected.last_hidden_state])

    encoder = load(tmp_path)
    names = {name.removeprefix("encoder.") for name, _ in encoder.model.named_parameters()} - {"shared.weight"}
    assert names <= {name for name, _ in stack.named_parameters()}
    assert (encoder.num_layers, encoder.width) == (LAYERS, 32)
    features = encoder.encode(BATCH)
    torch.testing.assert_close(features.hidden[:, :1, : ids.shape[1]], states)
    for b, prompt in enumerate(BATCH):
        alone = encoder.encode([prompt])
        n = int(alone.mask.sum())
        assert int(features.mask[b].sum()) == n == max(1, len(prompt.split()))
        torch.testing.assert_close(alone.hidden[:, 0, :n], features.hidden[:, b, :n], atol=1e-5, rtol=1e-5)

    lower = load(tmp_path, layers="1..2").encode(BATCH)
    torch.testing.assert_close(lower.hidden, features.hidden[:2])


@pytest.mark.parametrize("build", DECODERS, ids=lambda build: build.__name__)
def test_keys_and_values_of_every_decoder(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    stack = text_stack(save(tmp_path, build))
    cache = hf.DynamicCache()
    with torch.no_grad():
        stack(
            input_ids=tokenizer()(PROMPT, return_tensors="pt")["input_ids"],
            past_key_values=cache,
            use_cache=True,
        )
    encoder = load(tmp_path, layers=(2, 3))
    features = encoder.encode(BATCH, with_kv=True)
    n = len(PROMPT.split())
    assert features.keys is not None
    assert features.values is not None
    assert features.keys.shape == features.values.shape == (2, len(BATCH), *encoder.kv_shape[:1], 16, 8)
    for i, layer in enumerate(cache.layers[1:]):
        torch.testing.assert_close(features.keys[i, :1, :, :n], layer.keys)
        torch.testing.assert_close(features.values[i, :1, :, :n], layer.values)
    torch.testing.assert_close(features.hidden, encoder.encode(BATCH).hidden)


@pytest.mark.parametrize("build", ENCODERS, ids=lambda build: build.__name__)
def test_encoders_have_no_keys(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    save(tmp_path, build)
    with pytest.raises(ValueError, match="is an encoder; keys and values need a decoder"):
        load(tmp_path).encode([PROMPT], with_kv=True)


def test_padding_side_of_the_tokenizer_does_not_matter(tmp_path: Path) -> None:
    features = []
    for side in ("left", "right"):
        save(tmp_path / side, qwen3, padding_side=side, truncation_side=side)
        with pytest.warns(UserWarning, match="dropped"):
            features.append(load(tmp_path / side, max_tokens=9).encode(BATCH))
    assert torch.equal(features[0].hidden, features[1].hidden)
    assert torch.equal(features[0].mask, features[1].mask)


@pytest.mark.parametrize("build", DECODERS + ENCODERS, ids=lambda build: build.__name__)
def test_what_was_loaded_can_be_saved_and_loaded_again(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """By its class in transformers too, as an exported pipeline does; multimodal models are renamed when loaded."""
    save(tmp_path / "whole", build)
    encoder = load(tmp_path / "whole", layers="1..2")
    encoder.model.save_pretrained(tmp_path / "part")
    encoder.tokenizer.save_pretrained(tmp_path / "part")
    again, report = type(encoder.model).from_pretrained(tmp_path / "part", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in encoder.model.state_dict().items())
    lower = load(tmp_path / "part", layers="1").encode(BATCH)
    assert torch.equal(lower.hidden, encoder.encode(BATCH).hidden[:1])


def test_vision_tower_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor layers above the highest one, of a checkpoint in shards."""
    torch.manual_seed(0)
    qwen3_vl().save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    read: list[str] = []
    opened = transformers.modeling_utils.safe_open

    class Spy:
        """A safetensors file that notes whose numbers are asked for."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = opened(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Spy:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def get_slice(self, name: str) -> Part:
            return Part(name, self.file.get_slice(name))

    class Part:
        def __init__(self, name: str, whole: Any) -> None:
            self.name, self.whole = name, whole

        def __getattr__(self, name: str) -> Any:
            return getattr(self.whole, name)

        def __getitem__(self, index: Any) -> torch.Tensor:
            read.append(self.name)
            return self.whole[index]

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", Spy)
    encoder = load(tmp_path, layers="1..2")
    assert sum("layers.1." in name for name in read) == 11
    assert [name for name in read if "visual" in name or "layers.2." in name] == []
    assert len(encoder.model.layers) == 2


def test_layers_above_the_highest_are_not_loaded(folder: Path) -> None:
    full, lower = load(folder), load(folder, layers=(1, 2))
    assert len(full.model.layers) == 3
    assert len(lower.model.layers) == 2
    assert (lower.num_layers, lower.shape.total_layers) == (2, 3)
    last = load(folder, layers="3").encode(BATCH)
    torch.testing.assert_close(last.hidden[0], full.encode(BATCH).hidden[2])


def test_resolve_layers() -> None:
    assert resolve_layers("all", 3) == (1, 2, 3)
    assert resolve_layers("6..9", 36) == (6, 7, 8, 9)
    assert resolve_layers("9, 18,27", 36) == (9, 18, 27)
    assert resolve_layers([2, 3], 3) == (2, 3)
    for wrong in ("0..3", "4", (1, 5), (2, 1), (1, 1), (), "3..2"):
        with pytest.raises(ValueError, match=r"increasing choice from 1\.\.3"):
            resolve_layers(wrong, 3)
    with pytest.raises(ValueError, match="not understood"):
        resolve_layers("last", 3)


def test_packed_states_are_those_of_the_padded_tokens(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=str(folder), buckets=(8, 16)))
    prompts = ["a red circle", "", "two large squares left of a green triangle"]
    padded, packed = encoder.encode(prompts), encoder.encode(prompts, packed=True)
    assert packed.positions is not None
    tokens = int(padded.mask.sum())
    assert len(packed.positions) % (4 * len(prompts)) == 0
    assert torch.equal(packed.mask, padded.mask)
    assert torch.equal(packed.hidden[:, 0, :tokens], padded.hidden[:, padded.mask])
    assert torch.equal(padded.mask.flatten()[packed.positions[:tokens]], torch.ones(tokens, dtype=torch.bool))
    assert packed.hidden[:, 0, tokens:].abs().sum() == 0
    assert set(packed.positions[tokens:].tolist()) <= {padded.mask.numel()}


def test_padding_is_rounded_to_buckets(folder: Path) -> None:
    encoder = load(folder, buckets=(4, 10), max_tokens=12)
    for words, padded in ((1, 4), (4, 4), (5, 10), (11, 12)):
        assert encoder.encode(["red " * words]).mask.shape == (1, padded)
    assert load(folder, max_tokens=6).encode(["red " * 5]).mask.shape == (1, 6)


def test_truncation_warns_once_and_says_how_much(tmp_path: Path) -> None:
    save(tmp_path, t5, template="$A </s>")
    encoder = load(tmp_path, max_tokens=4)
    with pytest.warns(UserWarning, match="12 tokens dropped from 2 of 4 prompts, longer than 4") as caught:
        features = encoder.encode(["a red circle and the blue square", "of", "red " * 11, ""])
    assert len(caught) == 1
    assert features.mask.sum(1).tolist() == [4, 2, 4, 1]
    torch.testing.assert_close(features.hidden[:, 0], encoder.encode(["a red circle"]).hidden[:, 0])  # </s> is kept


@pytest.mark.parametrize(("missing", "stands_in"), [(None, "<s>"), ("bos_token", "</s>")])
def test_the_null_prompt_is_one_token(missing: str | None, stands_in: str, tmp_path: Path) -> None:
    save(tmp_path, qwen3, **({} if missing is None else {missing: None}))
    null, named = load(tmp_path).encode(["", stands_in, "red"]).hidden.unbind(1)[:2]
    torch.testing.assert_close(null, named)


def test_no_token_for_the_null_prompt(tmp_path: Path) -> None:
    save(tmp_path, qwen3, bos_token=None, eos_token=None, pad_token=None)
    assert load(tmp_path).encode(["red"]).mask.sum() == 1
    with pytest.raises(ValueError, match="no BOS, EOS or PAD token"):
        load(tmp_path).encode([""])


def test_prefix_is_put_before_every_prompt(folder: Path) -> None:
    features = load(folder, prefix="the circle of ").encode(["red", ""])
    torch.testing.assert_close(features.hidden, load(folder).encode(["the circle of red", "the circle of"]).hidden)


def test_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
    save(tmp_path / "chat", qwen3, template="<s> $A", chat_template=template)
    features = load(tmp_path / "chat", chat_template=True, prefix="the ").encode(["red circle"])
    save(tmp_path / "plain", qwen3)
    plain = load(tmp_path / "plain").encode(["user the red circle assistant"])
    torch.testing.assert_close(features.hidden, plain.hidden)
    with pytest.raises(ValueError, match="has no chat template"):
        load(tmp_path / "plain", chat_template=True)


def test_dtype(folder: Path) -> None:
    exact = load(folder).encode(BATCH)
    half = load(folder, dtype="bfloat16").encode(BATCH, with_kv=True)
    assert exact.hidden.dtype == torch.float32
    assert half.hidden.dtype == torch.bfloat16
    assert half.keys is not None
    assert half.keys.dtype == torch.bfloat16
    torch.testing.assert_close(half.hidden[0].float(), exact.hidden[0], atol=0.05, rtol=0.05)


def test_products_are_in_float32_without_bfloat16_hardware(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are those of a float32 model with the same rounded weights, rounded, and cached apart from others."""
    there = True
    monkeypatch.setattr("semantic_routing.text.encoder.has_bfloat16", lambda device: there)
    encoder = load(folder, dtype="bfloat16", keep="1MiB")
    rounded = encoder.encode(BATCH, with_kv=True)
    assert next(encoder.model.parameters()).dtype == torch.bfloat16
    there = False
    wide = encoder.encode(BATCH, with_kv=True)
    assert next(encoder.model.parameters()).dtype == torch.float32
    assert wide.hidden.dtype == torch.bfloat16
    assert not torch.equal(wide.hidden, rounded.hidden)
    exact = load(folder)
    for ours, theirs in zip(exact.model.parameters(), encoder.model.parameters(), strict=True):
        ours.data = theirs.data.clone()
    expected = exact.encode(BATCH, with_kv=True)
    assert torch.equal(wide.hidden, expected.hidden.bfloat16())
    assert wide.keys is not None
    assert expected.keys is not None
    assert torch.equal(wide.keys, expected.keys.bfloat16())
    there = True
    assert torch.equal(
        encoder.encode([*BATCH, f"{PROMPT} {PROMPT}"]).hidden[:, : len(BATCH), : rounded.hidden.shape[2]],
        rounded.hidden,
    )
    assert next(encoder.model.parameters()).dtype == torch.bfloat16


def test_a_model_of_someone_else_keeps_its_type(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semantic_routing.text.encoder.has_bfloat16", lambda device: False)
    own = load(folder, dtype="bfloat16")
    wrapped = TextEncoder.from_model(own.model, own.tokenizer, own.config, own.shape.total_layers)
    wrapped.encode(BATCH)
    assert next(own.model.parameters()).dtype == torch.bfloat16


def test_autocast_of_the_caller_does_not_reach_the_model(folder: Path) -> None:
    encoder = load(folder)
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder.encode(BATCH).hidden
    assert torch.equal(inside, encoder.encode(BATCH).hidden)


def test_frozen_yet_usable_in_a_backward_pass(folder: Path) -> None:
    encoder = load(folder)
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    hidden = encoder.encode([PROMPT]).hidden
    weights = torch.full((LAYERS,), 1 / LAYERS, requires_grad=True)
    torch.einsum("l,lbnc->", weights, hidden).backward()
    torch.testing.assert_close(weights.grad, hidden.sum((1, 2, 3)))


def test_unload_frees_the_weights(folder: Path) -> None:
    encoder = load(folder).to("cpu")
    features = encoder.encode([PROMPT])
    kept = [weakref.ref(module) for module in encoder.model.modules()]
    kept += [weakref.ref(parameter) for parameter in encoder.model.parameters()]
    encoder.unload()
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)
    assert features.hidden.isfinite().all()
    with pytest.raises(RuntimeError, match="was unloaded"):
        encoder.encode([PROMPT])


def test_offloaded_weights_are_on_the_device_only_to_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(folder).encode(BATCH)
    encoder = load(folder, offload=True)
    moves: list[torch.device] = []
    move = type(encoder.model).to
    monkeypatch.setattr(type(encoder.model), "to", lambda self, *to: moves.append(torch.device(*to)) or move(self, *to))
    assert torch.equal(encoder.encode(BATCH).hidden, expected.hidden)
    assert moves == [torch.device("cpu")] * 2
    encoder.to("meta")  # there is no second device here: one that is not moved to before there are prompts
    assert not next(encoder.model.parameters()).is_meta
    assert len(moves) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_on_a_gpu(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=str(folder), offload=True), "cuda")
    features = encoder.encode(BATCH, with_kv=True)
    assert features.hidden.is_cuda
    assert {p.device.type for p in encoder.model.parameters()} == {"cpu"}


def test_text_shape_needs_no_weights(folder: Path) -> None:
    config = TextEncoderConfig(name_or_path=str(folder), layers="2..3")
    shape = TextEncoder.from_pretrained(config).shape
    (folder / "model.safetensors").unlink()
    assert text_shape(config) == shape
    assert (shape.layers, shape.total_layers, shape.width) == ((2, 3), 3, 32)
    assert (shape.kv_heads, shape.head_dim) == (2, 8)
    with pytest.raises(ValueError, match="safetensors"):
        TextEncoder.from_pretrained(config)


def test_missing_and_broken_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    dropped = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors.*layers\.2\.mlp\.up_proj"):
        load(folder)
    assert load(folder, layers="1..2").encode([PROMPT]).hidden.shape[-1] == len(dropped[0])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no complete safetensors weights"):
        load(folder)


def test_weights_that_do_not_fit_their_configuration(folder: Path) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"intermediate_size": 40}))
    with pytest.raises(
        ValueError, match=r"9 weights .* first .*down_proj.*: \[32, 48\] in the file, \[32, 40\] in the"
    ):
        load(folder)
    path.write_text(json.dumps(settings | {"num_hidden_layers": 5}))
    with pytest.raises(ValueError, match=r"no text encoder at .*num_hidden_layers"):
        load(folder)


@pytest.mark.usefixtures("unchecked")
def test_wrong_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text encoder at") as caught:
        TextEncoder.from_pretrained(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"choice from 1\.\.3"):
        load(folder, layers="2..4")
    with pytest.raises(ValueError, match="max_tokens"):
        load(folder, max_tokens=0)
    with pytest.raises(ValueError, match="buckets"):
        load(folder, buckets=(16, 8))
    for prompts in ([], "a red circle", ["a", None]):
        with pytest.raises(ValueError, match="non-empty list of prompts"):
            load(folder).encode(prompts)


@pytest.mark.parametrize("build", DECODERS + ENCODERS, ids=lambda build: build.__name__)
def test_no_tokenizer(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    save(tmp_path, build)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        load(tmp_path)


@pytest.mark.behaviour(
    "Text encoders",
    when="max_tokens is above the number of positions that the language model has learned",
    then="loading stops with an error that names both numbers",
)
def test_more_tokens_than_positions(tmp_path: Path) -> None:
    sizes = {"vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    save(tmp_path, lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)))
    with pytest.raises(ValueError, match=r"max_tokens is 512, but .* has 8 positions"):
        load(tmp_path)
    assert load(tmp_path, max_tokens=8).encode(["red"]).hidden.shape[-1] == 8


@pytest.mark.behaviour(
    "Text encoders",
    when="several threads encode prompts with one text encoder",
    then="each gets the same result as alone, bit for bit",
)
def test_threads_share_an_encoder(folder: Path) -> None:
    encoder = load(folder)
    prompts = [PROMPT, "blue", "the square"] * 10
    alone = [encoder.encode([prompt]).hidden for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda prompt: encoder.encode([prompt]).hidden, prompts))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_loading_leaves_no_trace_in_transformers_settings(folder: Path) -> None:
    before = hf.logging.get_verbosity(), hf.logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, layers="1").encode([PROMPT])
    assert (hf.logging.get_verbosity(), hf.logging.is_progress_bar_enabled()) == before
