"""Writes the table of ``docs/text-encoders.md``: whether the text encoder loads each architecture of transformers.

    python tests/architectures.py     # after a change of transformers or of the text encoder

A tiny random model of three layers is saved and loaded, and the encoder's hidden states are compared with the model's.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder

PAGE = Path(__file__).parents[1] / "docs" / "text-encoders.md"
BEGIN, END = "<!-- architectures: python tests/architectures.py -->", "<!-- end -->"
LAYERS = 3
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "and", "the", "of"]
PROMPTS = ["a red circle and the blue square", "blue", "the square of a red circle " * 4, ""]
MOST = 4_000_000
"""Largest number of parameters of a tiny model."""
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 40),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), 4),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gemma3n_text": {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3},
    "gemma4_text": {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
}
FIRST_IS_A_LAYER = {"mamba", "falcon_mamba", "rwkv"}
"""Architectures whose hidden_states begin with the first layer's output, not with the embedding."""
NOT_BUILT = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, StrictDataclassError)
"""Errors of transformers for an architecture that cannot have these sizes."""


class Row(NamedTuple):
    """The result for an architecture."""

    name: str
    verdict: str
    """One of: loads, no keys, differs, refused, untested."""
    reason: str = ""


def names() -> list[str]:
    """Return the text architectures of transformers."""
    maps = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    )
    return sorted({name for mapping in maps for name in mapping})


def build(name: str) -> Any:
    """Make a tiny random model; RuntimeError if it is not tiny."""
    config = CONFIG_MAPPING[name](**(SIZES | MORE.get(name, {})))
    if not config.is_encoder_decoder:
        config = config.get_text_config()
    with torch.device("meta"):
        if sum(p.numel() for p in AutoModel.from_config(config).parameters()) > MOST:
            raise RuntimeError("not tiny")
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "norm" not in part.lower() and parameter.is_floating_point():
                parameter.normal_(0, 0.2)
        (model.get_encoder() if model.config.is_encoder_decoder else model)(
            input_ids=torch.arange(8)[None], **({"use_cache": False} if hasattr(config, "use_cache") else {})
        )
    return model


def tokenizer() -> Any:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def examined(name: str, folder: Path) -> Row:
    """Save, load and compare one architecture."""
    try:
        model = build(name)
        model.save_pretrained(folder)
    except NOT_BUILT:
        return Row(name, "untested")
    tokenizer().save_pretrained(folder)
    try:
        encoder = TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=str(folder), max_tokens=48))
        # For Qwen transformers replaces the saved tokenizer by Qwen's own.
        encoder = TextEncoder.from_model(encoder.model, tokenizer(), encoder.config, LAYERS)
        check(encoder, model, name)
    except ValueError as error:
        return Row(name, "refused", reason(error, folder))
    except AssertionError as error:
        return Row(name, "differs", str(error).partition("\n")[0])
    try:
        encoder.encode(PROMPTS, with_kv=True)
    except ValueError as error:
        return Row(name, "no keys", reason(error, folder))
    return Row(name, "loads")


def reason(error: ValueError, folder: Path) -> str:
    """Return the message without the parts that differ from run to run, such as the folder."""
    assert "\n" not in str(error), error
    text = str(error).replace(repr(str(folder)), "").replace(str(folder), "")
    text = re.sub(r"^ *\([\w-]+\) ", "", text)
    return re.sub(r"<class '[\w.]*'>", "class", text).partition(";")[0].strip()


def check(encoder: TextEncoder, model: Any, name: str) -> None:
    """Raise AssertionError unless the hidden states are finite, the model's own, and independent of the batch."""
    together = encoder.encode(PROMPTS)
    assert together.hidden.isfinite().all(), name
    for b, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        n = int(alone.mask.sum())
        assert int(together.mask[b].sum()) == n, name
        near(together.hidden[:, b, :n], alone.hidden[:, 0, :n], f"{name}: in a batch")
    whole = encoder.config
    try:
        lower = TextEncoder.from_pretrained(replace(whole, layers="1..2"))
    except ValueError as error:  # some architectures load only with all layers
        if "weights in" not in str(error):
            raise
    else:
        lower = TextEncoder.from_model(lower.model, tokenizer(), lower.config, LAYERS)
        near(lower.encode(PROMPTS).hidden, together.hidden[:2], f"{name}: cut")
    ids = encoder.tokenizer(PROMPTS[:1], add_special_tokens=True, return_tensors="pt")["input_ids"]
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.no_grad():
        options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        own = model(input_ids=ids, output_hidden_states=True, **options)
    states = encoder.encode(PROMPTS[:1]).hidden[:, 0, : ids.shape[1]]
    near(states[-1], own.last_hidden_state[0], f"{name}: last layer")
    inner = getattr(own, "hidden_states", None)
    if inner is not None and len(inner) == LAYERS + 1 and all(x.shape == own.last_hidden_state.shape for x in inner):
        for i in range(LAYERS - 1):
            near(states[i], inner[i if name in FIRST_IS_A_LAYER else i + 1][0], f"{name}: layer {i + 1}")


def near(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Raise AssertionError if the tensors differ by more than rounding."""
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.abs().max())), what


def survey(architectures: Iterable[str]) -> Iterator[Row]:
    """Examine architectures."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        for name in architectures:
            with (
                tempfile.TemporaryDirectory() as folder,
                warnings.catch_warnings(),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                warnings.simplefilter("ignore")
                yield examined(name, Path(folder))
    finally:
        transformers.logging.set_verbosity(level)


def table() -> str:
    """Return the text between the markers of the page."""
    rows = list(survey(names()))
    by_verdict = {
        v: [r for r in rows if r.verdict == v] for v in ("loads", "no keys", "differs", "refused", "untested")
    }

    def listed(verdict: str) -> str:
        return ", ".join(row.name for row in by_verdict[verdict])

    text = f"Transformers {transformers.__version__}, by `model_type` of the text model:\n\n"
    text += f"- Loads: {listed('loads')}.\n- Loads, without keys for the deep-fusion baseline: {listed('no keys')}.\n"
    if by_verdict["differs"]:
        unlike = "; ".join(row.reason for row in by_verdict["differs"])
        text += f"- Loads, but its states are not the model's own (do not use): {unlike}.\n"
    text += f"- Not tested, for want of a tiny model: {listed('untested')}.\n\n| refused | reason |\n| --- | --- |\n"
    return text + "".join(f"| {row.name} | {row.reason.replace('|', '')} |\n" for row in by_verdict["refused"])


def halves() -> tuple[str, str, str]:
    """Return the page before, between and after the markers."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN + "\n")
    between, after = rest.split(END)
    return before + BEGIN + "\n", between, END + after


if __name__ == "__main__":
    start, _, end = halves()
    PAGE.write_text(start + table() + end, encoding="utf-8")
