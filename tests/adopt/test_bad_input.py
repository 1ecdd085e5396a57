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
from semantic_routing.interop.export import make_pipeline
from tests.adopt.test_families import hooks_left, move, pixels, put
from tests.helpers.adoptable import Case, make
from tests.helpers.adoptable_pipelines import draw, pipeline
from tests.helpers.pipelines import random_bundle

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def refused(case: Case, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        put(case, **options)
    assert not hooks_left(case)


@pytest.mark.behaviour(
    "Adopting a model",
    when="adopt does not know the transformer, the arm, the weights or the injection",
    then="adopt refuses it and lists those that are known",
)
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


@pytest.mark.behaviour(
    "Adopting a model",
    when="the text encoder has another width or class than the transformer reads",
    then="adopt refuses the pair and names both",
)
def test_parts_that_do_not_fit() -> None:
    case, other = make("sana"), make("hidream")
    case.transformer.caption_projection.linear_1 = nn.Linear(24, 32)
    refused(case, "reads states of width 24, but the text encoder gives width 16")
    klein = make("flux2-klein")
    klein.encoder = other.encoder
    refused(klein, "with the text encoder Qwen3ForCausalLM, but this one is LlamaForCausalLM")


@pytest.mark.behaviour(
    "Adopting a model",
    when="a known transformer has an option that adopt does not support (image tokens of Wan 2.1 image-to-video)",
    then="adopt refuses it and names the option",
)
def test_options_for_which_a_family_does_not_hold() -> None:
    case = make("wan")
    case.transformer.register_to_config(image_dim=8)
    refused(case, "image tokens beside the text")


def test_pipelines_whose_blocks_read_several_texts(tiny_encoder: Path) -> None:
    for arm in ("depth-kv", "depth-low-rank"):
        with pytest.raises(ValueError, match=f"has arm '{arm}', whose blocks read several texts, which adopt does not"):
            adopt(make_pipeline(random_bundle(tiny_encoder, arm)), "depth")


@pytest.mark.behaviour(
    "Adopting a model",
    when="in another release of diffusers a transformer's blocks have other arguments",
    then="adopt refuses it and names the arguments found, those known, and a release that fits",
)
def test_blocks_of_another_release() -> None:
    class SanaTransformerBlock(nn.Module):
        def forward(self, hidden_states: Any, text: Any) -> Any: ...

    case = make("sana")
    case.transformer.transformer_blocks[1] = SanaTransformerBlock()
    refused(case, "this release of diffusers differs")


@pytest.mark.behaviour(
    "Adopting a model",
    when="the transformer splits its sequences over processes (context parallelism), before or after adoption",
    then="adopt, or the next call, refuses it and says which parallelism to use; the model is unchanged",
)
def test_context_parallelism() -> None:
    case = make("sana")
    before = pixels(case)
    case.transformer._parallel_config = SimpleNamespace(context_parallel_config=object())
    refused(case, r"SanaTransformer2DModel splits its sequences .*context parallelism.* use tensor or data parallelism")
    case.transformer._parallel_config = None
    routing = put(case)
    case.transformer._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(ValueError, match=r"context parallelism.* or remove\(\) the routing"):
        pixels(case)
    routing.remove()
    assert torch.equal(pixels(case), before)
    assert not hooks_left(case)


@pytest.mark.behaviour(
    "Adopting a model",
    when="the transformer or one of its blocks is already compiled",
    then="adopt refuses it and says to call adopt before torch.compile",
)
def test_compiled_models() -> None:
    case = make("sana")
    case.transformer.transformer_blocks[0].compile(backend="eager")
    refused(case, "SanaTransformer2DModel is already compiled: call adopt before torch.compile")


@pytest.mark.behaviour(
    "Adopting a model",
    when="a transformer is adopted a second time",
    then="adopt refuses it and names the arm of the first routing, which is unchanged; after remove() it works",
)
def test_adopting_twice() -> None:
    case = make("sana")
    routing = put(case)
    move(routing)
    before, hooks = pixels(case), hooks_left(case)
    message = r"SanaTransformer2DModel is already adopted, with the arm 'depth': call remove\(\)"
    with pytest.raises(ValueError, match=message):
        put(case, arm="joint")
    assert hooks_left(case) == hooks
    assert torch.equal(pixels(case), before)
    routing.remove()
    assert not hooks_left(case)
    put(case)


@pytest.mark.behaviour(
    "Adopting a model",
    when="a pipeline has no text encoder, or not the transformer that `component` names",
    then="adopt refuses it, names what is missing and what is there, and changes nothing",
)
def test_a_pipeline_without_its_parts() -> None:
    pipe = pipeline("sana")
    case = Case(pipe.text_encoder, pipe.transformer, lambda *_: None, lambda *_: {})
    pipe.text_encoder = None
    with pytest.raises(ValueError, match=r"SanaPipeline has no text_encoder, .* load the pipeline with it"):
        adopt(pipe)
    message = r"SanaPipeline has no component 'transformer_2' to adopt; its transformers are: transformer$"
    with pytest.raises(ValueError, match=message):
        adopt(pipe, component="transformer_2")
    assert not hooks_left(case)


@pytest.mark.behaviour(
    "Adopting a model",
    when="a prompt was encoded before adoption, or without layers that now have a weight",
    then="it gives the original pixels as long as nothing is routed; after that an error says to encode it again",
)
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
    routing.remove()
    assert not hooks_left(case)
    assert torch.equal(pixels(case, text), before)


@pytest.mark.parametrize("name", ["sana", "z-image"])
def test_texts_that_lack_layers_which_weigh_something_now(name: str) -> None:
    case = make(name)
    routing = put(case).eval()
    logits = routing.router.base.logits.requires_grad_(False)
    logits[:, 0], logits[:, 1] = -0.5, 0.5
    assert routing.wanted() == (1,)
    text = case.encode()
    routed = pixels(case, text)
    logits[:, 1], logits[:, 2] = 0.0, 0.5
    with pytest.raises(ValueError, match="lacks layers that it needs: encode the prompt again"):
        pixels(case, text)
    logits[:, 1], logits[:, 2] = 0.5, 0.0
    assert torch.equal(pixels(case, text), routed)
    logits.requires_grad_()
    with pytest.raises(ValueError, match="lacks layers that it needs"):
        case.draw(text)


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


@pytest.mark.behaviour(
    "Adopting a model",
    when="a routing's file is for another family, transformer, text encoder, width, layers, blocks or original state",
    then="load_routing stops with the file's value and the model's, and changes nothing",
)
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"transformer": "Other"}, "for transformer 'Other', but this model has 'SanaTransformer2DModel'"),
        ({"layers": 5}, "for layers 5, but this model has 4"),
        ({"width": 32}, "for width 32, but this model has 16"),
        ({"blocks": 7}, "for blocks 7, but this model has 3"),
        ({"encoder": "GlmModel"}, "for encoder 'GlmModel', but this model has 'Gemma2Model'"),
        ({"origin": "hidden_states -2"}, "for origin 'hidden_states -2', but this model has 'last_hidden_state'"),
        ({"version": 9}, "has format version 9, but this program reads 1"),
        ({"colour": "red"}, "unknown setting"),
        ({"weights": "gate"}, "holds tensors .* but its header expects"),
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
    with pytest.raises(
        ValueError, match="for family 'pixart', but this model has 'sana': load it into a pipeline like"
    ):
        load_routing(source=tmp_path, text_encoder=case.encoder, transformer=case.transformer)
    assert not hooks_left(case)


@pytest.mark.behaviour(
    "Adopting a model",
    when="a routing's file is truncated, is not a routing, or is neither in a folder nor on the hub",
    then="load_routing says which, and what to give instead; it changes nothing",
)
def test_damaged_and_missing_files(tmp_path: Path) -> None:
    case = make("sana")
    parts = {"text_encoder": case.encoder, "transformer": case.transformer}
    file = saved("sana", tmp_path / "a")
    file.write_bytes(file.read_bytes()[:-10])
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    for source, message in {
        tmp_path / "a": "damaged or not a safetensors file.*: fetch or save the routing again",
        tmp_path / "empty": f"holds no {FILE}",
        tmp_path / "lora.safetensors": "is not a routing of semantic-routing",
        "nobody/nothing": "there is no folder 'nobody/nothing', and the Hugging Face hub .*: check the name",
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
    with pytest.raises(ValueError, match="NaN or infinity: train the routing again"):
        load_routing(source=tmp_path, text_encoder=case.encoder, transformer=case.transformer)
    assert not hooks_left(case)


def test_an_error_of_the_text_encoder_leaves_nothing_behind() -> None:
    pipe = pipeline("sana")
    before = draw(pipe, "sana")
    routing = adopt(pipe)
    with pytest.raises(Exception, match=r".+"):
        pipe.text_encoder(input_ids="three")
    assert torch.equal(draw(pipe, "sana"), before)
    routing.remove()


@pytest.mark.behaviour(
    "Adopting a model",
    when="a routing is saved into a folder that has a README.md",
    then="an unedited card is updated; an edited one is kept, with a warning, and so is any other README.md",
)
def test_a_second_save_renews_only_its_own_card(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    for arm in ("depth", "joint"):
        case = make("sana")
        put(case, arm=arm).save(tmp_path)
        assert f"arm `{arm}`" in card.read_text()
    edited = card.read_text().replace("Routing for", "My routing for")
    card.write_text(edited)
    routing = put(make("sana"), arm="static")
    with pytest.warns(UserWarning, match=r"README\.md was edited and is not overwritten"):
        routing.save(tmp_path)
    assert card.read_text() == edited
    for other in (b"# My LoRA\n", b"\xff\xfe", b""):
        card.write_bytes(other)
        routing.save(tmp_path)
        assert card.read_bytes() == other
    card.unlink()
    routing.save(tmp_path)
    assert "arm `static`" in card.read_text()
