"""What cannot be adopted or loaded: one sentence that names both sides, and nothing is hooked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from semantic_routing.adopt import adopt, load_routing
from semantic_routing.adopt.file import FILE, HEADER
from tests.adopt.test_families import hooks_left, move, pixels, put
from tests.helpers.adoptable import Case, make
from tests.helpers.adoptable_pipelines import draw, pipeline

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def refused(case: Case, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        put(case, **options)
    assert not hooks_left(case)


def test_unknown_parts() -> None:
    case = make("sana")
    with pytest.raises(ValueError, match=r"does not know the transformer Linear; known: .*SanaTransformer2DModel"):
        adopt(text_encoder=case.encoder, transformer=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs a pipeline, or both"):
        adopt(transformer=case.transformer)
    refused(case, "did you mean 'depth'", arm="dept")
    refused(case, "did you mean 'simplex'", weights="simplx")
    refused(case, "did you mean 'swap'", injection="swop")
    refused(case, "do not update the text", arm="reinject")


def test_parts_that_do_not_fit() -> None:
    case, other = make("sana"), make("hidream")
    case.transformer.caption_projection.linear_1 = nn.Linear(24, 32)
    refused(case, "reads states of width 24, but the text encoder gives width 16")
    klein = make("flux2-klein")
    klein.encoder = other.encoder
    refused(klein, "with the text encoder Qwen3ForCausalLM, but this one is LlamaForCausalLM")


def test_options_for_which_a_family_does_not_hold() -> None:
    case = make("wan")
    case.transformer.register_to_config(image_dim=8)
    refused(case, "image tokens beside the text")


def test_blocks_of_another_release() -> None:
    class SanaTransformerBlock(nn.Module):
        def forward(self, hidden_states: Any, text: Any) -> Any: ...

    case = make("sana")
    case.transformer.transformer_blocks[1] = SanaTransformerBlock()
    refused(case, "this release of diffusers differs")


def test_models_that_are_not_as_loaded() -> None:
    case = make("sana")
    case.transformer._parallel_config = SimpleNamespace(context_parallel_config=object())
    refused(case, "context parallelism")
    case = make("sana")
    case.transformer.transformer_blocks[0].compile(backend="eager")
    refused(case, "call adopt before torch.compile")
    case = make("sana")
    routing = put(case)
    with pytest.raises(ValueError, match="adopted already: call remove"):
        put(case)
    routing.remove()
    put(case)


def test_a_pipeline_without_its_text_encoder() -> None:
    pipe = pipeline("sana")
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="SanaPipeline has no text_encoder, whose layers routing reads"):
        adopt(pipe)


@pytest.mark.parametrize("name", ["sana", "z-image", "flux2-klein"])
def test_texts_encoded_before_adoption(name: str) -> None:
    case = make(name)
    text = case.encode()
    before = pixels(case, text)
    routing = put(case)
    assert torch.equal(pixels(case, text), before)
    move(routing)
    with pytest.raises(ValueError, match="encoded before adoption"):
        case.draw(text)
    with pytest.raises(ValueError, match="encoded before adoption"):
        pixels(case, text)
    routing.scale = 0
    assert torch.equal(pixels(case, text), before)
    routing.scale = 1
    wrong = [x[:, :-1] for x in text] if isinstance(text, list) else text[..., :-1]
    with pytest.raises(ValueError, match="but the routing expects"):
        pixels(case, wrong)
    assert pixels(case).isfinite().all()  # an error leaves nothing behind


def saved(name: str, folder: Path) -> Path:
    case = make(name)
    routing = put(case)
    move(routing)
    return routing.save(folder)


def changed(file: Path, **facts: Any) -> None:
    """Write a file again with other facts in its header."""
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        header = json.loads(content.metadata()[HEADER])
    save_file(load_file(file), file, metadata={HEADER: json.dumps(header | facts)})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"layers": 5}, "for layers 5, but this model has 4"),
        ({"width": 32}, "for width 32, but this model has 16"),
        ({"blocks": 7}, "for blocks 7, but this model has 3"),
        ({"encoder": "GlmModel"}, "for encoder 'GlmModel', but this model has 'Gemma2Model'"),
        ({"origin": "hidden_states -2"}, "for origin 'hidden_states -2', but this model has 'last_hidden_state'"),
        ({"version": 9}, "has format version 9, but this program reads 1"),
        ({"colour": "red"}, "unknown setting"),
        ({"weights": "gate"}, "holds numbers .* but its header asks for"),
    ],
)
def test_files_of_other_models(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    file = saved("sana", tmp_path)
    changed(file, **facts)
    case = make("sana")
    with pytest.raises(ValueError, match=message):
        load_routing(source=tmp_path, text_encoder=case.encoder, transformer=case.transformer)
    assert not hooks_left(case)


def test_files_of_another_family(tmp_path: Path) -> None:
    saved("pixart", tmp_path)
    case = make("sana")
    with pytest.raises(ValueError, match="for family 'pixart', but this model has 'sana'"):
        load_routing(source=tmp_path, text_encoder=case.encoder, transformer=case.transformer)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    case = make("sana")
    parts = {"text_encoder": case.encoder, "transformer": case.transformer}
    file = saved("sana", tmp_path / "a")
    file.write_bytes(file.read_bytes()[:-10])
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    for source, message in {
        tmp_path / "a": "damaged or not a safetensors file",
        tmp_path / "empty": f"holds no {FILE}",
        tmp_path / "lora.safetensors": "is not a routing of semantic-routing",
        "nobody/nothing": "there is no folder 'nobody/nothing', and .* Hugging Face hub",
        "no such place": "there is no routing at 'no such place'",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_routing(source=source, **parts)
        assert not hooks_left(case)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    case = make("sana")
    routing = put(case)
    next(routing.parameters()).data.fill_(float("nan"))
    routing.save(tmp_path)
    routing.remove()
    with pytest.raises(ValueError, match="not finite"):
        load_routing(source=tmp_path, text_encoder=case.encoder, transformer=case.transformer)


def test_an_error_of_the_text_encoder_leaves_nothing_behind() -> None:
    pipe = pipeline("sana")
    before = draw(pipe, "sana")
    routing = adopt(pipe)
    with pytest.raises(Exception, match=r".+"):
        pipe.text_encoder(input_ids="three")
    assert torch.equal(draw(pipe, "sana"), before)
    routing.remove()
