"""What cannot be read as a text encoder, or a prompt, is refused in one line."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from semantic_routing.model.runtime import rounded_once
from semantic_routing.text.encoder import TextEncoder
from tests import architectures
from tests.text.test_encoder import load, qwen3, save, tokenizer

PROMPTS = ["a red circle", "the blue square"]


@pytest.mark.behaviour(
    "Text encoders",
    when="a language model's architecture cannot be read layer by layer",
    then="it is refused in one line that names it; docs/text-encoders.md lists what loads and what does not",
)
def test_architectures_are_as_the_table_says() -> None:
    """Some of each verdict; test_the_table_of_architectures has all."""
    page = architectures.halves()[1]
    heads = {"Loads: ": "loads", "Loads, without keys for the deep-fusion baseline: ": "no keys"}
    told = {
        name: verdict
        for words, verdict in heads.items()
        for name in page.partition(f"- {words}")[2].partition(".\n")[0].split(", ")
    } | dict(re.findall(r"^\| ([\w-]+) \| (.*) \|$", page, re.MULTILINE))
    some = ["gpt_neox", "phi", "persimmon", "llama", "qwen3", "gpt2", "bert", "t5", "mamba", "albert", "xlm", "yoso"]
    found = architectures.survey(some)
    assert {row.name: row.reason if row.verdict == "refused" else row.verdict for row in found} == {
        name: told[name] for name in some
    }


@pytest.mark.stress
def test_the_table_of_architectures() -> None:
    assert architectures.halves()[1] == architectures.table(), "run python tests/architectures.py"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% for p in m.content %}{{ p.text }} {% endfor %}{% endfor %}assistant",
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }} of",
        "{% for m in messages %}user {{ m.content | trim }} {% endfor %}assistant",
    ],
    ids=["parts only", "system demanded", "strips"],
)
@pytest.mark.behaviour(
    "Text encoders",
    when="a chat template expects a list of parts, or a system message first",
    then="prompts are passed in that form",
)
def test_chat_templates_that_want_another_form(template: str, tmp_path: Path) -> None:
    save(tmp_path, qwen3, chat_template=template)
    hidden = load(tmp_path, chat_template=True).encode(PROMPTS).hidden
    assert not torch.equal(hidden[:, 0], hidden[:, 1])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('not\nthis') }}",
        "user assistant",
        "{{ messages[0].content[:10] }}",
        "{{ messages.nothing() }}",
    ],
    ids=["raises", "drops", "shortens", "undefined"],
)
@pytest.mark.behaviour(
    "Text encoders",
    when="a chat template raises an error, or leaves out or changes a prompt",
    then="one line says to set chat_template=False",
)
def test_chat_templates_that_lose_the_prompt(template: str, tmp_path: Path) -> None:
    save(tmp_path, qwen3, chat_template=template)
    with pytest.raises(ValueError, match="chat_template=False") as caught:
        load(tmp_path, chat_template=True).encode(PROMPTS)
    assert "\n" not in str(caught.value)


@pytest.mark.behaviour(
    "Text encoders",
    when="prefix or chat template take up all of max_tokens, so that nothing of a prompt is left",
    then="the prompt is refused; if some of it is left, a warning says how much was cut",
)
def test_a_prompt_behind_a_long_prefix(tmp_path: Path) -> None:
    save(tmp_path, qwen3, chat_template="user the {{ messages[0].content }}")
    with pytest.raises(ValueError, match="nothing of 'red' is left in 4 tokens"):
        load(tmp_path, max_tokens=4, prefix="a circle and the ").encode(["red"])
    with pytest.raises(ValueError, match="nothing of 'red' is left in 2 tokens"):
        load(tmp_path, max_tokens=2, chat_template=True).encode(["red"])
    with pytest.warns(UserWarning, match="1 tokens dropped from 1 of 1"):
        load(tmp_path, max_tokens=4, prefix="a circle and ").encode(["red square"])


@pytest.mark.parametrize("prompt", ["zzz", "yes no", "!"])
@pytest.mark.behaviour(
    "Text encoders",
    when="the tokenizer recognises nothing in a prompt",
    then="the prompt is refused and quoted; among training's captions that is a warning",
)
def test_unknown_prompts(prompt: str, tmp_path: Path) -> None:
    save(tmp_path, qwen3)
    encoder = load(tmp_path)
    with pytest.raises(ValueError, match=f"recognises nothing in '{prompt}'"):
        encoder.encode(["a red circle", prompt])
    with pytest.warns(UserWarning, match=f"recognises nothing in '{prompt}'"):
        encoder.encode(["a red circle", prompt], strict=False)


@pytest.mark.parametrize(
    ("method", "library", "settings"),
    [
        ("bitsandbytes", "bitsandbytes", {"load_in_4bit": True}),
        ("awq", "gptqmodel", {"bits": 4, "group_size": 128}),
        ("gptq", "gptqmodel", {"bits": 4, "group_size": 128}),
        ("hqq", "hqq", {}),
        ("torchao", "torchao", {"quant_type": "int8_weight_only"}),
        ("compressed-tensors", "compressed-tensors", {}),
        ("quanto", "optimum-quanto", {"weights": "int8"}),
    ],
)
@pytest.mark.behaviour(
    "Text encoders",
    when="a language model was saved quantised and the library for it is missing",
    then="one line names the method and what to install",
)
def test_quantised(method: str, library: str, settings: dict[str, object], tmp_path: Path) -> None:
    save(tmp_path, qwen3)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": method} | settings}))
    with pytest.raises(ValueError, match=rf"{method}.*{library}") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.behaviour(
    "Text encoders",
    when="a tokenizer has more tokens than the language model has embeddings",
    then="loading stops with an error that names both numbers",
)
def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    save(tmp_path, qwen3)
    other = tokenizer()
    other.add_tokens(["green"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has tokens up to 14, but its model has 14 embeddings"):
        load(tmp_path)


def test_special_tokens_that_no_prompt_holds_may_lie_beyond_the_embeddings(tmp_path: Path) -> None:
    save(tmp_path, qwen3)
    expected = load(tmp_path).encode(["red circle", "red"]).hidden
    other = tokenizer()
    other.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<image>"]})
    other.save_pretrained(tmp_path)
    encoder = load(tmp_path)
    assert torch.equal(encoder.encode(["red circle", "red"]).hidden, expected)
    with pytest.raises(ValueError, match=r"gives token 1[45], but its model has 14 embeddings"):
        encoder.encode(["red <image>"])


def test_positions_begin_after_the_padding(tmp_path: Path) -> None:
    sizes = {"vocab_size": 14, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = hf.RobertaConfig(**sizes, intermediate_size=8, max_position_embeddings=20, pad_token_id=1)
    save(tmp_path, lambda: hf.RobertaModel(config))
    with pytest.raises(ValueError, match="has 18 positions"):
        load(tmp_path, max_tokens=19)
    encoder = load(tmp_path, max_tokens=18)
    assert encoder.encode(["red " * 18]).hidden.isfinite().all()
    wide = TextEncoder.from_model(encoder.model, tokenizer(), load(tmp_path, max_tokens=18).config, 1)
    with pytest.warns(UserWarning, match="longer than 18"):
        wide.encode(["red " * 30])


def test_threads_share_an_offloaded_encoder(tmp_path: Path) -> None:
    save(tmp_path, qwen3)
    encoder = load(tmp_path, offload=True)
    prompts = PROMPTS * 8
    alone = [encoder.encode([prompt]).hidden for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda prompt: encoder.encode([prompt]).hidden, prompts))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_overlapping_calls_leave_the_weights_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first, second = rounded_once(model, True), rounded_once(model, True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model[0].weight.dtype == torch.bfloat16
    second.__exit__(None, None, None)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with pytest.raises(RuntimeError, match="stop"), rounded_once(model, True):
        raise RuntimeError("stop")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
