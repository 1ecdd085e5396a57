"""Routing finer than a block: every mix reaches the keys or values that read it, and nothing else, at little cost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from semantic_routing.model.arms import ARMS
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import DiT, DiTConfig
from semantic_routing.model.flops import META, count_image, count_text
from semantic_routing.model.parts import basis, read_parts
from semantic_routing.model.routing import LogitRouter, LowRankRouter, make_router
from semantic_routing.text.features import TextFeatures
from tests.helpers.networks import DISTINCT, tiny_config, tiny_network

FINER = [arm.name for arm in ARMS.values() if arm.finer]
SPLITS = {"depth-kv": (2, 1), "depth-heads": (1, 2), "depth-heads-kv": (2, 2), "depth-low-rank": (2, 2)}
CFG = tiny_config(**DISTINCT)
WIDE = 4 * CFG.kv_heads * CFG.head_dim + 16
"""Width of text from which on blocks with one mix compose their products, too."""


def network(arm: str, **changes: object) -> DiT:
    """Return a network whose text projection has a bias, as after training."""
    model = tiny_network(arm, std=0.5, **(DISTINCT | changes))
    assert isinstance(model, DiT)
    return model


def some_text(cfg: DiTConfig = CFG, prompts: int = 2) -> TextFeatures:
    hidden = torch.randn(cfg.text_layers, prompts, 6, cfg.text_width)
    return TextFeatures(hidden, torch.ones(prompts, 6, dtype=torch.bool))


@pytest.mark.parametrize("arm", FINER)
def test_a_block_has_a_named_row_for_each_of_its_parts(arm: str) -> None:
    cfg = replace(CFG, arm=arm)
    sides, heads = SPLITS[arm]
    assert cfg.strategy.split(cfg.kv_heads) == (sides, heads)
    assert len(cfg.rows) == cfg.mixes == cfg.depth * sides * heads
    assert len(set(cfg.rows)) == len(cfg.rows)
    assert network(arm).router.weights().shape == (1, cfg.mixes, cfg.text_layers)


def test_rows_are_named_block_by_block_keys_before_values() -> None:
    assert replace(CFG, arm="depth").rows == ("block 0", "block 1", "block 2")
    assert replace(CFG, arm="depth-kv").rows[:3] == ("block 0, keys", "block 0, values", "block 1, keys")
    assert replace(CFG, arm="depth-heads").rows[:3] == ("block 0, head 0", "block 0, head 1", "block 1, head 0")
    assert replace(CFG, arm="depth-heads-kv").rows[4:8] == (
        "block 1, head 0, keys",
        "block 1, head 1, keys",
        "block 1, head 0, values",
        "block 1, head 1, values",
    )


@pytest.mark.parametrize("split", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_composed_projections_are_the_naive_ones_in_float64(split: tuple[int, int]) -> None:
    """Naive: project every mix to all keys and values, then take those of its own side and head."""
    sides, heads = split
    width, all_heads, head_dim = 7, 3, 5
    parts = torch.randn(sides * heads, 2, 4, width, dtype=torch.float64)
    first, bias = torch.randn(width, width, dtype=torch.float64), torch.randn(width, dtype=torch.float64)
    second = torch.randn(2 * all_heads * head_dim, width, dtype=torch.float64)

    def affine(x: Tensor) -> Tensor:
        return (x @ first.T + bias) @ second.T

    keys, values = read_parts(parts, affine(basis(parts)), split, head_dim)
    whole = affine(parts).unflatten(-1, (2, all_heads, head_dim))
    for side, found in enumerate((keys, values)):
        assert found.shape == (2, all_heads, 4, head_dim)
        for head in range(all_heads):
            part = (side % sides) * heads + head % heads
            torch.testing.assert_close(found[:, head], whole[part, :, :, side, head], rtol=1e-11, atol=1e-11)


def naive_context(model: DiT, hidden: Tensor, weights: Tensor) -> Tensor:
    """Return all blocks' keys and values [D, 2, B, Hkv, N, hd] in float64 from rows of weights [D, S, H, L]."""
    cfg, found = model.cfg, []
    normed = torch.nn.functional.layer_norm(hidden.double(), hidden.shape[-1:], eps=1e-5)
    for d, block in enumerate(model.blocks):
        for side in range(2):
            own = weights[d, side % weights.shape[1]]
            for head in range(cfg.kv_heads):
                mixed = torch.einsum("l,lbnc->bnc", own[head % len(own)], normed)
                mixed = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + 1e-6)
                text = mixed * model.text_norm.weight.double() @ model.text_proj.weight.double().T
                both = (text + model.text_proj.bias.double()) @ block.cross.kv.weight.double().T
                read = both.unflatten(-1, (2, cfg.kv_heads, cfg.head_dim))[:, :, side, head]
                if side == 0:
                    read = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + 1e-6)
                    read = read * block.cross.k_norm.weight.double()
                found.append(read)
    return torch.stack(found).unflatten(0, (cfg.depth, 2, cfg.kv_heads)).transpose(2, 3)


def context(model: DiT, features: TextFeatures) -> Tensor:
    made = model.prepare_text(features)
    return torch.stack([torch.stack(pair) for pair in zip(made.keys, made.values, strict=True)])


@pytest.mark.parametrize(("arm", "width"), [*((arm, CFG.text_width) for arm in FINER), ("depth", WIDE)])
def test_values_and_gradients_are_those_of_the_naive_way(arm: str, width: int) -> None:
    model = network(arm, text_width=width).requires_grad_()
    features = some_text(model.cfg)
    shape = (CFG.depth, *SPLITS.get(arm, (1, 1)), CFG.text_layers)
    names = ["router", "text_proj", "text_norm", *(f"blocks.{d}.cross.{part}" for d in (0, 2) for part in ("kv",))]
    leaves = [p for name in names for p in model.get_submodule(name).parameters()]

    found = context(model, features)
    naive = naive_context(model, features.hidden, model.router.weights().double().reshape(shape))
    torch.testing.assert_close(found.double(), naive, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(found.shape)
    ours = torch.autograd.grad(found, leaves, upstream)
    theirs = torch.autograd.grad(naive, leaves, upstream.double())
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize(
    ("arm", "width", "composed"),
    [
        ("depth", WIDE, True), ("depth", WIDE - 16, False), ("depth-kv", WIDE - 16, True), ("uniform", WIDE, False),
        ("static", WIDE, False), ("joint", WIDE, False),
    ],
)  # fmt: skip
def test_products_are_composed_where_that_makes_them_fewer(arm: str, width: int, composed: bool) -> None:
    assert replace(CFG, arm=arm, text_width=width).composed == composed


@pytest.mark.parametrize("arm", FINER)
def test_training_starts_as_the_uniform_average(arm: str) -> None:
    """The weights are bitwise those of S2, and the network is B2 up to the order of sums: exactly so in float64."""
    features = some_text()
    torch.manual_seed(5)
    uniform = make_model(replace(CFG, arm="uniform"))
    torch.manual_seed(5)
    finer = make_model(replace(CFG, arm=arm))
    assert isinstance(finer, DiT)
    assert isinstance(uniform, DiT)
    rows = finer.router.weights()[0]
    assert torch.equal(rows, make_router("depth", CFG.text_layers, 1, CFG.text_width).weights()[0].expand_as(rows))
    torch.testing.assert_close(context(finer, features), context(uniform, features), rtol=1e-4, atol=1e-5)
    weights = torch.full((CFG.depth, 1, 1, CFG.text_layers), 1 / CFG.text_layers, dtype=torch.float64)
    several = weights.expand(-1, *SPLITS[arm], -1)
    one = naive_context(uniform, features.hidden, weights)
    assert torch.equal(naive_context(finer, features.hidden, several), one)
    torch.testing.assert_close(context(finer, features).double(), one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arm", ["depth-kv", "depth-heads", "depth-heads-kv"])
def test_a_row_moves_its_own_keys_or_values_and_no_others(arm: str) -> None:
    model, features = network(arm), some_text()
    router = model.router
    assert isinstance(router, LogitRouter)
    before = context(model, features)
    sides, heads = SPLITS[arm]
    for row in range(model.cfg.mixes):
        kept = router.logits.data.clone()
        router.logits.data[row] += torch.randn(CFG.text_layers)
        moved = (context(model, features) != before).flatten(5).any(-1).any(-1).any(2)  # D, 2, Hkv
        router.logits.data.copy_(kept)
        block, part = divmod(row, sides * heads)
        expected = torch.zeros(CFG.depth, 2, CFG.kv_heads, dtype=torch.bool)
        side, head = divmod(part, heads)
        expected[block, side if sides == 2 else slice(None), head if heads == 2 else slice(None)] = True
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_lose_no_more_than_with_one_mix(dtype: torch.dtype) -> None:
    """A large bias of the text projection must not drown what is composed."""
    features = some_text()
    errors = {}
    for arm in ("depth", "depth-heads-kv"):
        model = network(arm)
        model.text_proj.bias.data.normal_(std=3.0)
        exact = context(model, features)
        half = replace(features, hidden=features.hidden.to(dtype))
        own = model.to(dtype)
        own.router.float()
        errors[arm] = ((context(own, half).float() - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert errors["depth-heads-kv"] < 1.5 * errors["depth"] < 0.05


def test_autocast_computes_as_with_one_mix() -> None:
    features = some_text()
    model = network("depth-heads-kv")
    exact = context(model, features)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = context(model, features)
    assert (rounded.float() - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


def closed_form(cfg: DiTConfig, tokens: int) -> int:
    """Count the products of one preparation with weights: the composition, and each row for its own channels."""
    width, read = cfg.text_width, 2 * cfg.kv_heads * cfg.head_dim
    composition = (width + 1) * width * width + cfg.depth * (width + 1) * width * read
    return 2 * (composition + cfg.depth * tokens * width * read)


@pytest.mark.parametrize("arm", FINER)
def test_products_are_the_closed_form_and_a_step_costs_what_it_does_with_s2(arm: str) -> None:
    counts = {}
    for name in ("depth", arm):
        with META:
            model = make_model(replace(CFG, arm=name))
        text, made = count_text(model, 2, 5)
        counts[name] = text, count_image(model, 2, 4, 6, made)
    contrasts = 2 * CFG.depth * 4 * 4 * CFG.text_layers if arm == "depth-low-rank" else 0
    assert counts[arm][0].weights == closed_form(CFG, 2 * 5) + contrasts
    assert counts[arm][1] == counts["depth"][1]


PAPER_PARAMETERS = {"depth-kv": 48, "depth-heads": 192, "depth-heads-kv": 384}


@pytest.mark.parametrize("arm", FINER)
def test_parameters_at_the_papers_size(arm: str) -> None:
    with META:
        model = make_model(DiTConfig(arm=arm))
    assert isinstance(model, DiT)
    own = sum(p.numel() for p in model.router.parameters())
    rows = 24 * 36 + 384 * 4 + 4 * 36 if arm == "depth-low-rank" else PAPER_PARAMETERS[arm] * 36
    assert own == rows
    assert sum(p.numel() for p in model.parameters()) - own == 2_246_693_952


# --- low rank ---


def test_low_rank_logits_are_a_blocks_own_and_its_parts_departures() -> None:
    router = make_router("depth-low-rank", 6, 3, 8, kv_heads=2)
    assert isinstance(router, LowRankRouter)
    for p in router.parameters():
        torch.nn.init.normal_(p)
    base, loadings, contrasts = (p.double() for p in (router.base, router.loadings, router.contrasts))
    expected = torch.stack([base[row // 4] + loadings[row] @ contrasts for row in range(12)])
    torch.testing.assert_close(router.weights()[0].double(), expected.softmax(-1), rtol=1e-5, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.weights(), router.weights())
        inside = router.weights()
    assert torch.equal(inside, router.weights())


def test_contrasts_start_as_orthogonal_cosines_that_move_logits_as_fast_as_parameters() -> None:
    router = LowRankRouter(layers=36, depth=2, parts=4)
    gram = router.contrasts.double() @ router.contrasts.double().T
    torch.testing.assert_close(gram, torch.eye(4, dtype=torch.float64) * 36 / 4, rtol=0, atol=1e-4)
    torch.testing.assert_close(router.contrasts.mean(1), torch.zeros(4), rtol=0, atol=1e-6)
    assert router.contrasts[0, 0] > 0 > router.contrasts[0, -1]
    step = torch.full((1, 4), 0.1) @ router.contrasts
    assert step.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-4)
    assert router.contrasts[1, 5].item() == pytest.approx(math.cos(math.pi * 2 * 5.5 / 36) / math.sqrt(2), rel=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_few_layers_have_few_contrasts(layers: int) -> None:
    router = LowRankRouter(layers=layers, depth=2, parts=2)
    assert len(router.contrasts) == max(1, layers - 1)
    torch.testing.assert_close(router.weights(), torch.full((1, 4, layers), 1 / layers))
