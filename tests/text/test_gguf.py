"""Text encoders from GGUF files: the same states as from dense weights, and one line for files that cannot be read."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

from semantic_routing.interop.export import ExportArguments, export
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.text.architecture import text_shape
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import resume, start

LAYERS, HEADS, KV_HEADS, WIDTH = 3, 4, 2, 64
PROMPTS = ["a red circle", "", "the blue square"]
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VOCABULARY = [*bytes_to_unicode().values(), "re", "red", "<s>", "</s>"]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, initializer_range=0.2, rms_norm_eps=1e-5,
        max_position_embeddings=512,
    )  # fmt: skip
    return hf.LlamaModel(config).eval()


def interleaved(x: Tensor, heads: int) -> Tensor:
    """Order the rows of a projection as llama.cpp's rotary embedding wants them."""
    return x.view(heads, 2, -1, x.shape[-1]).transpose(1, 2).reshape(x.shape)


def write(path: Path, model: nn.Module, kind: str = "F32", *, arch: str = "llama", tokenizer: bool = True) -> None:
    """Write a Llama as a GGUF file, and leave in ``model`` the weights that the file holds."""
    writer = GGUFWriter(path, arch)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_name("tiny")
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(VOCABULARY)
        writer.add_token_types([1] * (len(VOCABULARY) - 2) + [3, 3])
        writer.add_token_merges(["r e", "re d"])
        writer.add_bos_token_id(len(VOCABULARY) - 2)
        writer.add_eos_token_id(len(VOCABULARY) - 1)
    for name, x in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            stored, heads = f"blk.{layer}.{NAMES[part]}", {"attn_q": HEADS, "attn_k": KV_HEADS}.get(NAMES[part], 0)
        else:
            stored, heads = {"embed_tokens": "token_embd", "norm": "output_norm"}[stem], 0
        if kind != "F32" and x.ndim == 2:
            quant = GGMLQuantizationType[kind]
            packed = quantize((interleaved(x, heads) if heads else x).numpy(), quant)
            writer.add_tensor(f"{stored}.{suffix}", packed, raw_dtype=quant)
            x.copy_(torch.from_numpy(dequantize(quantize(x.numpy(), quant), quant)))
        else:
            writer.add_tensor(f"{stored}.{suffix}", (interleaved(x, heads) if heads else x).numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write(path, llama())
    return path


def load(path: Path | str, **options: object) -> TextEncoder:
    return TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=str(path), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.behaviour(
    "Text encoders",
    when="text.name_or_path is a GGUF file",
    then="its dequantised weights, configuration and tokenizer make the text encoder; dtype auto is float32",
)
def test_states_are_those_of_the_dequantised_weights(kind: str, tmp_path: Path) -> None:
    model = llama()
    write(tmp_path / "tiny.gguf", model, kind)
    encoder = load(tmp_path / "tiny.gguf")
    ids = torch.tensor([encoder.tokenizer("a red circle")["input_ids"]])
    assert [VOCABULARY[token] for token in ids[0]] == ["a", "Ġ", "red", "Ġ", *"circle"]
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True)
    states = torch.stack([*expected.hidden_states[1:LAYERS], expected.last_hidden_state])
    features = encoder.encode(PROMPTS)
    assert features.hidden.dtype == torch.float32
    torch.testing.assert_close(features.hidden[:, :1, : ids.shape[1]], states)
    for name, x in encoder.model.state_dict().items():
        torch.testing.assert_close(x, model.state_dict()[name], msg=name)


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_folder_with_one_file_is_that_file(file: Path, place: str) -> None:
    encoder = load(file if place == "file" else file.parent, layers="1..2", dtype="bfloat16")
    assert len(encoder.model.layers) == 2
    assert encoder.encode(PROMPTS).hidden.dtype == torch.bfloat16
    whole = load(file, dtype="bfloat16").encode(PROMPTS).hidden
    assert torch.equal(encoder.encode(PROMPTS).hidden, whole[:2])


def test_the_null_prompt_is_the_token_that_begins_a_text(file: Path) -> None:
    encoder = load(file)
    assert encoder.encode([""]).mask.sum() == 1
    torch.testing.assert_close(encoder.encode([""]).hidden, encoder.encode(["<s>"]).hidden)


def test_sizes_are_known_from_the_header(file: Path) -> None:
    shape = text_shape(TextEncoderConfig(name_or_path=str(file), layers="2..3"))
    assert (shape.layers, shape.total_layers, shape.width) == ((2, 3), LAYERS, WIDTH)
    assert (shape.kv_heads, shape.head_dim) == (KV_HEADS, WIDTH // HEADS)


def test_the_loaded_model_is_saved_as_dense_safetensors(file: Path, tmp_path: Path) -> None:
    encoder = load(file)
    out = tmp_path / "dense"
    encoder.model.save_pretrained(out)
    encoder.tokenizer.save_pretrained(out)
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {torch.float32}
    again = load(out, dtype="float32")
    assert torch.equal(again.encode(PROMPTS).hidden, encoder.encode(PROMPTS).hidden)
    hf.AutoModel.from_pretrained(out)


def refusal(path: Path | str) -> str:
    with pytest.raises(ValueError, match=r".+") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.behaviour(
    "Text encoders",
    when="a GGUF file is truncated, invalid, without a tokenizer or of an unknown architecture",
    then="loading stops with one line that says which",
)
def test_files_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for size in (5, 100, len(whole) // 8, len(whole) - 200):
        file.write_bytes(whole[:size])
        assert refusal(file) == f"{file} is truncated: download it again"
    file.write_bytes(b"PK" + whole)
    assert refusal(file) == f"{file} is not a GGUF file: it does not begin with GGUF"
    file.write_bytes(b"")
    assert "is not a GGUF file" in refusal(file)
    file.write_bytes(whole[:4] + b"\x09" + whole[5:])
    assert "has version 9 of the GGUF format" in refusal(file)
    write(tmp_path / "rwkv.gguf", llama(), arch="rwkv7")
    assert "transformers cannot read the architecture rwkv7" in refusal(tmp_path / "rwkv.gguf")
    write(tmp_path / "bare.gguf", llama(), tokenizer=False)
    assert "bare.gguf has no tokenizer" in refusal(tmp_path / "bare.gguf")
    assert "there is no such GGUF file" in refusal(tmp_path / "missing.gguf")


def test_a_file_that_lacks_a_tensor(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"blk.2.ffn_up", b"blk.2.ffn_xx"))
    assert "lack 1 tensors of its text model, first layers.2.mlp.up_proj.weight" in refusal(file)


@pytest.mark.behaviour(
    "Text encoders",
    when="a folder holds several GGUF files",
    then="the error asks to name one of them",
)
def test_several_files_in_a_folder(file: Path) -> None:
    shutil.copy(file, file.with_name("other.gguf"))
    assert "holds 2 GGUF files: name one of them, such as" in refusal(file.parent)
    assert load(file).encode(PROMPTS).hidden.isfinite().all()


def test_a_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert 'pip install "semantic-routing[gguf]"' in refusal(file)


def test_a_folder_with_safetensors_is_not_a_gguf_model(file: Path) -> None:
    encoder = load(file)
    encoder.model.save_pretrained(file.parent)
    encoder.tokenizer.save_pretrained(file.parent)
    file.write_bytes(b"")
    assert load(file.parent).encode(PROMPTS).hidden.isfinite().all()


@pytest.mark.slow
@pytest.mark.behaviour(
    "Text encoders",
    when="a run on a GGUF file is exported, or resumed after the file changed",
    then="the pipeline holds dense safetensors; resuming is refused as for any other changed language model",
)
def test_a_run_is_exported_and_knows_its_file(
    file: Path, tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    cfg = tiny_config(steps=2, text=TextEncoderConfig(name_or_path=str(file)), preview_every=0)
    out = tmp_path / "run"
    start(cfg, out)
    export(ExportArguments(model=out, out=tmp_path / "pipeline"))
    assert (tmp_path / "pipeline" / "text_encoder" / "model.safetensors").is_file()
    pipe = SemanticRoutingPipeline.from_pretrained(tmp_path / "pipeline")
    found = pipe.encode_prompt(PROMPTS)
    assert torch.equal(found.hidden, load(file).encode(PROMPTS).hidden)
    assert "| text encoder | tiny.gguf: 3 layers" in (tmp_path / "pipeline" / "README.md").read_text()
    model = llama()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    file.unlink()
    write(file, model)
    with pytest.raises(ValueError, match="the text encoder is a different one"):
        resume(out, steps=3)
