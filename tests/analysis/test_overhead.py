"""Table 4: parameters to the last digit, and FLOPs and memory traffic of the reference and of this program."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from semantic_routing.analysis.overhead import Overhead, Scale, measure, table, to_json
from semantic_routing.cli.main import main
from semantic_routing.cli.overhead import OverheadArguments, run_overhead
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import DiTConfig
from semantic_routing.training import recipes
from tests.helpers.networks import tiny_config

PARAMS = {
    "penultimate": 2_246_693_952,
    "uniform": 2_246_693_952,
    "static": 2_246_693_988,
    "time": 2_246_778_468,
    "depth": 2_246_694_816,
    "joint": 2_248_722_336,
    "fusedit": 1_711_646_784,
}
TINY = Scale(
    model=tiny_config(width=24, heads=4, kv_heads=2, mlp_width=40, text_width=20, text_layers=5, fusedit_first_layer=1),
    encoder_heads=6,
    encoder_kv_heads=2,
    encoder_head_dim=4,
    encoder_mlp_width=28,
    latent_size=8,
    steps=7,
    padded_tokens=11,
)


@cache
def paper_scale(arm: str, tokens: int) -> Overhead:
    """Count once, in seconds, what several tests read."""
    return measure(arm, text_tokens=tokens)


@pytest.mark.parametrize("arm", PARAMS)
def test_paper_parameters(arm: str) -> None:
    with torch.device("meta"):
        model = make_model(DiTConfig(arm=arm))
    assert sum(p.numel() for p in model.parameters()) == PARAMS[arm]


@pytest.mark.parametrize(("arm", "teraflops"), [("B1", 454), ("S2", 470), ("FuseDiT", 357)])
def test_paper_flops(arm: str, teraflops: float) -> None:
    assert paper_scale(arm, 512).flops_paper / 1e12 == pytest.approx(teraflops, rel=0.005)


def test_preparing_text_once_makes_depth_cheaper_than_the_papers_baseline() -> None:
    assert paper_scale("S2", 512).flops_ours <= 442e12
    assert paper_scale("S2", 32).flops_ours <= 436e12


def closed_form(arm: str, tokens: int) -> dict[str, int]:
    """Return the products of ``TINY`` with weights, written out: encoder, one text preparation, one step of images."""
    cfg, image = TINY.model, TINY.latent_size**2 // 4
    query, key = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    mlp = 3 * cfg.width * cfg.mlp_width
    self_attention = cfg.width * (query + 2 * key) + query * cfg.width
    cross_attention = 0 if arm == "fusedit" else 2 * cfg.width * query
    patches = 2 * cfg.width * 4 * cfg.channels
    embedded = {"fusedit": 0, "depth": cfg.depth, "joint": cfg.depth}.get(arm, 1)
    keys_values = 0 if arm == "fusedit" else cfg.depth * 2 * cfg.text_width * key
    encoder_query, encoder_key = 6 * 4, 2 * 4
    layer = cfg.text_width * (2 * encoder_query + 2 * encoder_key + 3 * 28)
    return {
        "encoder": 2 * 2 * tokens * cfg.text_layers * layer,
        "text": 2 * 2 * tokens * (embedded * cfg.text_width**2 + keys_values),
        "image": 2 * 2 * image * (cfg.depth * (self_attention + cross_attention + mlp) + patches),
    }


@pytest.mark.parametrize("arm", PARAMS)
def test_weight_products_are_the_closed_form(arm: str) -> None:
    row = measure(arm, text_tokens=6, scale=TINY)
    paper, ours = closed_form(arm, 11), closed_form(arm, 6)
    prepared = 7 if arm in ("time", "joint") else 1
    assert row.flops_paper == paper["encoder"] + 7 * (paper["text"] + paper["image"])
    assert row.flops_ours == ours["encoder"] + prepared * ours["text"] + 7 * ours["image"]


@pytest.mark.parametrize("arm", ["depth-kv", "depth-heads", "depth-heads-kv", "depth-low-rank"])
def test_finer_arms_cost_a_little_once_a_prompt_and_nothing_a_step(arm: str) -> None:
    finer, s2 = paper_scale(arm, 32), paper_scale("S2", 32)
    assert finer.flops_step == s2.flops_step
    assert finer.flops_ours_all - s2.flops_ours_all == pytest.approx(finer.flops_text - s2.flops_text)
    assert finer.flops_ours_all <= 1.01 * s2.flops_ours_all
    assert finer.mix_bytes_ours < 0.2e9


def test_all_products_are_the_text_once_or_every_step_and_the_steps() -> None:
    encoder = measure("fusedit", text_tokens=6, scale=TINY)
    language_model = encoder.flops_ours_all - 7 * encoder.flops_step
    for arm, prepared in (("depth", 1), ("joint", 7), ("depth-heads-kv", 1)):
        row = measure(arm, text_tokens=6, scale=TINY)
        assert row.flops_ours_all == language_model + prepared * row.flops_text + 7 * row.flops_step


def test_all_products_add_attention_and_mixing() -> None:
    row = measure("depth", text_tokens=6, scale=TINY)
    prompts, image, query = 2, 16, 32
    attention = 7 * 3 * prompts * 2 * (2 * image * (image + 6) * query)
    encoder = 5 * prompts * 2 * (2 * 6 * 6 * 24)
    # Per token and block: weights over deviations, weighted hidden states, weighted means.
    mixing = prompts * 6 * 2 * 3 * 5 * 20
    rest = row.flops_ours_all - row.flops_ours - attention - encoder
    assert mixing <= rest <= mixing * 1.2


def test_bytes_of_mixing_are_the_closed_form() -> None:
    cfg, tokens = TINY.model, 2 * 6
    for arm, layers, mixes, passes in (
        ("penultimate", 1, 1, 1),
        ("uniform", cfg.text_layers, 1, 1),
        ("depth", cfg.text_layers, cfg.depth, 1),
        ("time", cfg.text_layers, 1, 7),
        ("joint", cfg.text_layers, cfg.depth, 7),
    ):
        row = measure(arm, text_tokens=6, scale=TINY)
        assert row.mix_bytes_ours == tokens * cfg.text_width * 2 * (layers + passes * mixes), arm
        assert row.mix_bytes_paper == 7 * 22 * cfg.text_width * (10 * layers + 4 * mixes), arm
    assert measure("fusedit", text_tokens=6, scale=TINY).mix_bytes_paper == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_latency_is_measured_on_a_device(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []  # compiling takes a minute and is tested elsewhere
    monkeypatch.setattr("semantic_routing.analysis.overhead.compile_network", seen.append)
    row = measure("time", text_tokens=6, scale=TINY, device=torch.device("cpu"), compiled=compiled)
    assert len(seen) == compiled
    assert row.latency is not None
    assert row.latency > 0
    assert row.peak_memory is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_holds_at_least_the_weights() -> None:
    row = measure("depth", text_tokens=6, scale=TINY, device=torch.device("cuda"))
    assert row.peak_memory is not None
    assert row.peak_memory >= 4 * row.params


def test_json_and_table() -> None:
    rows = [measure(arm, text_tokens=6, scale=TINY) for arm in ("B1", "fusedit")]
    arms = json.loads(json.dumps(to_json(rows)))["arms"]
    assert list(arms) == ["penultimate", "fusedit"]
    for row in rows:
        assert Overhead(arm=row.arm, **arms[row.arm]) == row
    row = Overhead(
        arm="depth",
        params=2_246_694_816,
        flops_paper=469.4e12,
        flops_ours=433.5e12,
        flops_ours_all=476.0e12,
        flops_text=0.0366e12,
        flops_step=9.51e12,
        mix_bytes_paper=59.8e9,
        mix_bytes_ours=19.66e6,
        text_tokens=32,
        latency=1.25,
        peak_memory=3 * 2**30,
    )
    last = table([row]).splitlines()[-1]
    assert last == "| S2 depth | 2,246.7 | 469.4 | 433.5 | 476.0 | 0.0366 | 9.51 | 59.8 | 0.020 | 32 | 1.250 | 3.00 |"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = ["overhead", "--scale", "toy", "--arms", "S1", "depth", "--text-tokens", "9"]
    main([*toy, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["arms"]) == ["time", "depth"]
    assert {row["text_tokens"] for row in printed["arms"].values()} == {9}
    with torch.device("meta"):
        model = make_model(recipes.toy("depth").model)
    assert printed["arms"]["depth"]["params"] == sum(p.numel() for p in model.parameters())
    main([*toy, "--json", str(tmp_path / "overhead.json")])
    assert json.loads((tmp_path / "overhead.json").read_text()) == printed
    assert "| S2 depth |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["overhead", "--arms", "deph"])
    assert "unknown arm 'deph'" in capsys.readouterr().err


def test_no_arms_are_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to measure: give --arms with some of penultimate, uniform"):
        run_overhead(OverheadArguments(arms=()))


def test_text_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="text_tokens is 0"):
        measure("B1", text_tokens=0)
