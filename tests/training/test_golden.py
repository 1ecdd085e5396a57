"""Golden losses: the first ten steps of a tiny run, pinned for every arm.

Bitwise resume does not notice a change that moves both runs alike; these numbers do. After a change that is meant to
move them, print new ones:

    python -m pytest tests/test_golden.py --golden
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from semantic_routing.model.arms import ARMS
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start
from semantic_routing.training.optim import OptimConfig

LOSSES: dict[str, list[float]] = json.loads(Path(__file__).with_name("golden_losses.json").read_text())
STEPS = 10


@pytest.fixture(scope="module")
def random_encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose weights are drawn and not trained, so that they are alike on every machine."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, initializer_range=0.2,
    )  # fmt: skip
    Qwen3Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("arm", ARMS)
def test_the_first_losses_of_every_arm_are_the_golden_ones(
    arm: str,
    tiny_config: Callable[..., TrainConfig],
    random_encoder: Path,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    optim = OptimConfig(name="muon", lr=5e-3, muon_lr=0.02, router_lr=0.05, warmup=3, decay="cosine")
    cfg = tiny_config(arm, steps=STEPS, optim=optim)
    start(replace(cfg, text=replace(cfg.text, name_or_path=str(random_encoder))), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    if pytestconfig.getoption("golden"):
        sys.stderr.write(f'\n  "{arm}": [{", ".join(f"{loss:.7g}" for loss in losses)}],\n')
    else:
        # Machines sum in different orders; ten steps make little of that.
        assert losses == pytest.approx(LOSSES[arm], rel=1e-4)
