"""How a run is laid out, and what is applied to a network; ``training/test_distributed.py`` starts real processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from semantic_routing.common.distributed import World
from semantic_routing.common.errors import Interrupted, TrainingFailed, exit_code
from semantic_routing.model.build import make_model
from semantic_routing.text.features import TextFeatures
from semantic_routing.training.parallelize import (
    ParallelConfig,
    arrange,
    local,
    mesh_shape,
    parallelize,
    recompute,
    text_modules,
    whole,
)
from tests.helpers.networks import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cfg", "count", "shape"),
    [
        ({}, 1, None),
        ({"strategy": "none", "text_encoder": "cpu"}, 1, None),
        ({}, 8, (8,)),
        ({"strategy": "fsdp"}, 8, (8,)),
        ({"strategy": "ddp"}, 8, (8, 1)),
        ({"strategy": "hsdp", "shard_size": 4}, 8, (2, 4)),
        ({"strategy": "hsdp"}, 8, (4, 2)),
    ],
)
def test_every_strategy_is_a_mesh(
    monkeypatch: pytest.MonkeyPatch, cfg: dict, count: int, shape: tuple[int, ...] | None
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert mesh_shape(ParallelConfig(**cfg), count) == shape


@pytest.mark.parametrize(
    ("cfg", "count", "message"),
    [
        ({"strategy": "ddp"}, 1, "the strategy ddp needs several processes: start them with torchrun"),
        ({"text_encoder": "sharded"}, 1, "a sharded text encoder needs several processes"),
        ({"strategy": "none"}, 2, "the strategy none is for one process, not 2"),
        ({"strategy": "hsdp", "shard_size": 3}, 8, "8 processes do not divide into groups of shard_size 3"),
        ({"shard_size": 2}, 8, "shard_size is for the strategy hsdp, not auto"),
        ({"strategy": "hsdp", "shard_size": -1}, 8, "shard_size is -1"),
    ],
)
def test_what_does_not_fit(cfg: dict, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mesh_shape(ParallelConfig(**cfg), count)


def test_one_process_agrees_with_itself() -> None:
    world = arrange(World(), ParallelConfig(), "cpu")
    assert (world.device, world.mesh, world.threads, world.first) == (CPU, None, None, True)
    assert world.everywhere(lambda: 3) == world.on_first(lambda: 3) == world.first_then_rest(lambda: 3) == 3
    assert world.max(2, 5) == [2, 5]
    assert world.mean(torch.tensor(2.0)) == 2
    for act in (world.everywhere, world.on_first, world.first_then_rest):
        with pytest.raises(ValueError, match="invalid literal"):
            act(lambda: int("x"))


def test_the_others_end_in_silence_with_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semantic_routing.common.distributed.HEAD_START", 0.0)
    for error, code in ((ValueError("x"), 2), (TrainingFailed("x"), 1), (Interrupted("x", 15), 143), (OSError("x"), 1)):
        assert exit_code(error) == code
        with pytest.raises(type(error)):
            World(0, 2).fail(error)
        with pytest.raises(SystemExit) as ended:
            World(1, 2).fail(error)
        assert ended.value.code == code


def gradients(arm: str, checkpointing: str, saved: list[int] | None = None) -> dict[str, Tensor]:
    """Gradients of a fixed loss of a fixed network; ``saved`` gets the size of what its forward keeps."""
    torch.manual_seed(0)
    model = make_model(tiny_config(arm))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    names = list(model.state_dict())
    cfg = ParallelConfig(activation_checkpointing=checkpointing)
    model = parallelize(model, cfg, World(device=CPU), bf16=False, compiled=False)
    assert list(model.state_dict()) == names
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    features = TextFeatures(torch.randn(3, 2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
    if arm == "fusedit":
        keys = torch.randn(3, 2, 1, 5, 8)
        features = replace(features, keys=keys, values=keys.flip(0))

    def keep(tensor: Tensor) -> Tensor:
        if saved is not None:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x, t, model.prepare_text(features, t)).square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arm", ["joint", "fusedit"])
def test_checkpointing_changes_memory_and_no_gradient(arm: str) -> None:
    everything: list[int] = []
    nothing: list[int] = []
    expected = gradients(arm, "none", everything)
    full = gradients(arm, "full", nothing)
    selective = gradients(arm, "selective")
    assert expected.keys() == full.keys() == selective.keys()
    for name, gradient in expected.items():
        assert torch.equal(full[name], gradient), name
        assert torch.equal(selective[name], gradient), name
    assert sum(nothing) < 0.7 * sum(everything)


def test_selective_checkpointing_repeats_no_product() -> None:
    counts = {}
    for kind in ("none", "selective", "full"):
        with FlopCounterMode(display=False) as counted:
            gradients("depth", kind)
        counts[kind] = counted.get_total_flops()
    assert counts["none"] == counts["selective"] < counts["full"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which dynamo looks at
@pytest.mark.parametrize("selective", [False, True])
def test_a_compiled_block_is_checkpointed_inside(selective: bool) -> None:
    layers = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    x = torch.randn(2, 4)
    layers(x).square().sum().backward()
    expected = [p.grad for p in layers.parameters()]
    layers.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    recompute(layers, selective=selective)
    layers.compile(backend=counter)
    layers(x).square().sum().backward()
    assert counter.frame_count == 1
    assert all("checkpoint" in str(graph.code) for graph in counter.graphs)
    for p, gradient in zip(layers.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_the_text_has_a_group_of_its_own() -> None:
    """All that ``prepare_text`` runs but the router, in order, and nothing that a block's own forward runs."""
    model = make_model(tiny_config())
    names = {module: name for name, module in model.named_modules()}
    ran: list[str] = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, *rest: ran.append(names[module]))
    features = TextFeatures(torch.randn(3, 2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
    context = model.prepare_text(features)
    group = [names[module] for module in text_modules(model)]
    blocks = [f"blocks.{block}.cross.{part}" for block in range(3) for part in ("kv", "k_norm")]
    assert group == ["text_norm", "text_proj", *blocks]
    assert [name for name in ran if name != "router"] == group
    ran.clear()
    model(torch.randn(2, 3, 8, 8), torch.rand(2), context)
    assert not set(ran) & set(group)


def test_a_plain_tensor_is_all_of_it() -> None:
    x = torch.randn(3)
    assert local(x) is x
    assert whole(x) is x
