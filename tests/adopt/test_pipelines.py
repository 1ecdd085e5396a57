"""Whole pipelines: guidance, several images, other pipelines of the same parts, offloading, LoRA, types, compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from semantic_routing.adopt import Routing, adopt, load_routing
from semantic_routing.adopt.families import FAMILIES
from semantic_routing.interop.export import make_pipeline
from tests.adopt.test_families import move
from tests.helpers import pipelines as own
from tests.helpers.adoptable import Case, make
from tests.helpers.adoptable_pipelines import CALLS, PROMPTS, draw, pipeline
from tests.helpers.forked import run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # diffusers' and peft's own
BOTH = pytest.mark.parametrize("name", ["sana", "z-image"])


@pytest.mark.parametrize("name", CALLS)
def test_a_pipeline_draws_its_own_pixels_until_it_is_trained(name: str, tmp_path: Path) -> None:
    pipe = pipeline(name)
    before = draw(pipe, name)
    routing = adopt(pipe)
    assert torch.equal(draw(pipe, name), before)
    move(routing)
    routing.eval()
    routed = draw(pipe, name)
    assert (routed - before).abs().max() > 1e-4
    routing.save(tmp_path)
    routing.remove()
    assert torch.equal(draw(pipe, name), before)
    load_routing(pipe, tmp_path)
    assert torch.equal(draw(pipe, name), routed)


@pytest.mark.parametrize(("name", "guidance"), [("sana", 1.0), ("z-image", 0.0), ("flux2-klein", 1.0)])
def test_guidance_and_several_images(name: str, guidance: float) -> None:
    """Both halves of guidance and all images of a prompt carry the layers along."""
    pipe = pipeline(name)
    options: list[dict[str, Any]] = [{"guidance_scale": guidance}, {"guidance_scale": 4.0, "num_images_per_prompt": 2}]
    before = [draw(pipe, name, **each) for each in options]
    routing = adopt(pipe)
    assert all(torch.equal(draw(pipe, name, **each), x) for each, x in zip(options, before, strict=True))
    move(routing)
    for each, x in zip(options, before, strict=True):
        changed = (draw(pipe, name, **each) - x).flatten(1).abs().amax(1)
        assert (changed > 1e-5).all()


def test_images_of_a_prompt_read_that_prompt() -> None:
    """Each of several images is what the prompt gives alone with the same noise."""
    pipe = pipeline("z-image")
    routing = adopt(pipe)
    move(routing)
    seeds = [3, 4, 5, 6]
    alone = [
        draw(pipe, "z-image", [prompt], generator=torch.Generator().manual_seed(seed))
        for prompt, seed in zip([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], seeds, strict=True)
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    together = draw(pipe, "z-image", num_images_per_prompt=2, generator=generators)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [("ZImageImg2ImgPipeline", {}), ("ZImageInpaintPipeline", {"mask_image": torch.ones(1, 1, 16, 16)})],
)
def test_a_pipeline_of_the_same_parts_is_adopted_too(kind: str, extra: dict[str, Tensor]) -> None:
    pipe = pipeline("z-image")
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {"prompts": ["two stars"], "image": picture, "strength": 1.0, **extra}
    before = draw(getattr(diffusers, kind)(**pipe.components), "z-image", **call)
    routing = adopt(pipe)
    other = getattr(diffusers, kind).from_pipe(pipe)
    assert torch.equal(draw(other, "z-image", **call), before)
    move(routing)
    routed = draw(other, "z-image", **call)
    assert (routed - before).abs().max() > 1e-4
    assert torch.equal(draw(diffusers.ZImagePipeline.from_pipe(other), "z-image"), draw(pipe, "z-image"))
    routing.scale = 0
    assert torch.equal(draw(other, "z-image", **call), before)


@pytest.mark.behaviour(
    "Adopting a model",
    when="a pipeline has two transformers, as Wan 2.2",
    then="`component` names the one to adopt; each can have a routing, and a file is loaded into its own",
)
def test_each_of_two_transformers_may_be_adopted(tmp_path: Path) -> None:
    pipe = pipeline("wan")

    def drawn() -> Tensor:
        return draw(pipe, "wan", num_inference_steps=4)  # the last of which moves nothing

    before = drawn()
    second = adopt(pipe, component="transformer_2").eval()
    move(second)
    routed = drawn()
    assert (routed - before).abs().max() > 1e-4
    first = adopt(pipe).eval()
    assert torch.equal(drawn(), routed)
    move(first, 0.3)
    assert (drawn() - routed).abs().max() > 1e-4
    second.save(tmp_path)
    second.remove()
    assert (drawn() - before).abs().max() > 1e-4
    first.remove()
    assert torch.equal(drawn(), before)
    assert not pipe.text_encoder._forward_hooks
    loaded = load_routing(pipe, tmp_path)
    assert pipe.transformer_2.semantic_routing is loaded
    assert not hasattr(pipe.transformer, "semantic_routing")
    assert torch.equal(drawn(), routed)


def test_this_programs_own_pipeline(make_bundle: own.MakeBundle, tmp_path: Path) -> None:
    for arm in ("penultimate", "depth", "time"):
        pipe = own.exact(own.quiet(make_pipeline(make_bundle(arm))))
        before = own.draw(pipe)
        routing = adopt(pipe, arm="joint", weights="gate")  # which makes the text depend on the time
        assert torch.equal(own.draw(pipe), before)
        move(routing)
        assert not torch.equal(own.draw(pipe), before)
        routing.remove()
        assert torch.equal(own.draw(pipe), before)


@BOTH
def test_prompts_are_prepared_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps of a call share the texts of a prompt, unless routing depends on the time."""
    from semantic_routing.adopt import mechanism

    counts = []
    restyled = mechanism.restyled
    monkeypatch.setattr(mechanism, "restyled", lambda *args: counts.append(1) or restyled(*args))
    pipe = pipeline(name)
    for arm, expected in (("depth", 1), ("joint", 4)):
        routing = adopt(pipe, arm=arm)
        move(routing)
        counts.clear()
        draw(pipe, name, num_inference_steps=4)
        assert len(counts) == expected
        routing.remove()


@BOTH
def test_nothing_is_computed_before_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is mixed, and the entrance reads each step's text once, as the model itself does."""
    from semantic_routing.adopt import mechanism

    pipe = pipeline(name)
    routing = adopt(pipe)
    monkeypatch.setattr(mechanism, "restyled", lambda *args: pytest.fail("mixed"))
    entered: list[int] = []
    entrance = pipe.transformer.get_submodule(FAMILIES[name].entrance[-1])
    entrance.register_forward_hook(lambda *_: entered.append(1))
    draw(pipe, name, num_inference_steps=4)
    assert len(entered) == 4
    routing.eval()
    with torch.no_grad():
        output = pipe.text_encoder(torch.tensor([[4, 5]]), output_hidden_states=True)
    states = [output.last_hidden_state, *output.hidden_states]
    assert {x.shape[-1] for x in states} == {routing.facts.width}  # no layer is recorded


def lora(pipe: Any, targets: list[str]) -> None:
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.transformer)


@BOTH
def test_lora_before_and_after_adoption(name: str) -> None:
    drawn = []
    for first in (True, False):
        torch.manual_seed(3)
        pipe = pipeline(name)
        if first:
            lora(pipe, ["to_k", "to_v"])
        plain = draw(pipe, name)
        routing = adopt(pipe)
        if not first:
            lora(pipe, ["to_k", "to_v"])
        else:
            assert torch.equal(draw(pipe, name), plain)
        move(routing)
        drawn.append(draw(pipe, name).shape)
        assert (draw(pipe, name) - plain).abs().max() > 1e-4
    assert drawn[0] == drawn[1]


def test_a_lora_of_the_entrance_is_not_forgotten_by_kept_texts() -> None:
    """The same embeddings with another strength of an adapter in the entrance give other texts."""
    pipe = pipeline("sana")
    routing = adopt(pipe)
    move(routing)
    lora(pipe, ["linear_1"])
    with torch.no_grad():
        embeds = pipe.encode_prompt(["two stars"], complex_human_instruction=None)
    given = dict(zip(("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds"), embeds, strict=False))
    given |= {"negative_prompt_attention_mask": embeds[3], "negative_prompt": None}
    whole = draw(pipe, "sana", **given)
    layer = pipe.transformer.caption_projection.linear_1
    strength, layer.scaling["default"] = layer.scaling["default"], 0.0
    none = draw(pipe, "sana", **given)
    layer.scaling["default"] = strength
    assert torch.equal(draw(pipe, "sana", **given), whole)
    assert not torch.equal(none, whole)


class Quantised(nn.Module):
    """A linear layer whose weights are kept in eight bits."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.bias = layer.in_features, layer.bias
        self.step = layer.weight.abs().max() / 127
        self.register_buffer("rounded", (layer.weight / self.step).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.rounded.to(x.dtype) * self.step, self.bias)


@BOTH
def test_quantised_linear_layers(name: str) -> None:
    pipe = pipeline(name)
    for module in list(pipe.transformer.modules()):
        for key, child in list(module.named_children()):
            if type(child) is nn.Linear and not isinstance(module, nn.Sequential):
                setattr(module, key, Quantised(child))
    before = draw(pipe, name)
    routing = adopt(pipe)
    assert torch.equal(draw(pipe, name), before)
    move(routing)
    assert (draw(pipe, name) - before).abs().max() > 1e-4


@BOTH
@pytest.mark.parametrize("arm", ["depth", "joint"])
def test_offloading_one_module_at_a_time(name: str, arm: str) -> None:
    """As ``enable_sequential_cpu_offload`` does: between their calls, modules have no weights at all."""
    from accelerate import cpu_offload

    pipe = pipeline(name)
    routing = adopt(pipe, arm=arm, weights="gate")
    move(routing, 0.2)
    routed = draw(pipe, name)
    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
    assert all(p.is_meta for p in routing.parameters())
    assert torch.equal(draw(pipe, name), routed)
    assert routing.weights(torch.tensor([0.5])).isfinite().all()


def test_adoption_of_an_offloaded_transformer() -> None:
    from accelerate import cpu_offload

    case = make("sana")
    move(adopted(case))
    with torch.no_grad():
        routed = case.draw()
        case.transformer.semantic_routing.remove()
        cpu_offload(case.transformer, torch.device("cpu"), offload_buffers=True)
        move(adopted(case))
        assert torch.equal(case.draw(), routed)


def adopted(case: Case) -> Routing:
    return adopt(text_encoder=case.encoder, transformer=case.transformer)


class Away(ModelHook):
    """Gives a module its weights only while its ``forward`` runs, as ``enable_model_cpu_offload`` does."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.weights = {n: p.clone() for n, p in module.named_parameters() if "semantic_routing" not in n}
        return self.post_forward(module, module)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            for name, weight in self.weights.items():
                module.get_parameter(name).copy_(weight)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        with torch.no_grad():
            for name in self.weights:
                module.get_parameter(name).fill_(float("nan"))
        return output


@BOTH
def test_offloading_the_whole_transformer(name: str) -> None:
    """What needs the transformer's weights is computed where its own forward runs."""
    pipe = pipeline(name)
    routing = adopt(pipe)
    move(routing)
    routed = draw(pipe, name)
    add_hook_to_module(pipe.transformer, Away())
    assert torch.equal(draw(pipe, name), routed)


@BOTH
def test_group_offloading(name: str) -> None:
    pipe = pipeline(name)
    routing = adopt(pipe)
    move(routing)
    routed = draw(pipe, name)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.equal(draw(pipe, name), routed)


@BOTH
def test_numbers_keep_their_type(name: str) -> None:
    pipe = pipeline(name)
    routing = adopt(pipe)
    move(routing)
    numbers = [p.clone() for p in routing.parameters()]
    pipe.to(torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert all(
        torch.equal(p, x) and p.dtype == torch.float32 for p, x in zip(routing.parameters(), numbers, strict=True)
    )
    routed = draw(pipe, name)
    assert routed.isfinite().all()
    routing.scale = 0
    plain = draw(pipe, name)
    assert not torch.equal(plain, routed)
    routing.remove()
    assert torch.equal(draw(pipe, name), plain)


@pytest.mark.parametrize(
    ("names", "graphs"),
    [
        # Sana's first block gets another memory layout.
        (["sana", "z-image"], ["sana 2 2", "the whole of sana: a new prompt adds 0", "z-image 1 1"]),
        pytest.param(["qwen-image"], ["qwen-image 1 1"], marks=pytest.mark.stress),
    ],
)
def test_ten_blocks_compile_to_one_graph(names: list[str], graphs: list[str]) -> None:
    """As many as without adoption, and none more for new prompts of the same length.

    In a process without checks of annotations, which torch would trace.
    """
    script = Path(__file__).parents[1] / "helpers/compiled_blocks.py"
    said = run("import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')", script, *names)
    assert said.splitlines() == graphs


def test_scripts_that_cache_texts_train_with_them() -> None:
    """Two lines in a training script; the texts are cached before the encoder is dropped."""
    case = make("sana")
    routing = adopted(case)
    text = case.encode()
    del case.encoder
    target = torch.randn(2, 4, 8, 8)
    optimizer = torch.optim.AdamW(routing.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (case.draw(text) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
