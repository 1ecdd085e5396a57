"""The planning tables: counts against closed forms, and the page against the output of the program."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("plan")


def test_the_page_shows_what_the_program_prints(plan: ModuleType) -> None:
    page = (ROOT / "docs" / "train-at-scale.md").read_text(encoding="utf-8")
    shown = page.split("<!-- benchmarks/plan.py -->\n")[1].split("<!-- end -->")[0]
    assert shown == plan.tables() + "\n"


def test_saved_bytes_of_a_small_network(plan: ModuleType) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        x = torch.empty(5, 8)
    found, _ = plan.saved(model, lambda: model(x))
    assert found == 4 * (5 * 8 + 5 * 16)  # the input, and the ReLU's output, which is the second layer's input


def test_attention_saves_no_matrix_of_scores(plan: ModuleType) -> None:
    with torch.device("meta"):
        q, k = torch.empty(1, 4, 64, 16, requires_grad=True), torch.empty(1, 2, 64, 16, requires_grad=True)
    with plan.flash_attention():
        attend = nn.functional.scaled_dot_product_attention
        found, out = plan.saved(nn.Module(), lambda: attend(q, k, k, enable_gqa=True))
    assert out.shape == q.shape
    tensors = 4 * 64 * 16 * (4 + 2 + 4)  # queries, keys that serve as values too, outputs
    assert tensors <= found < tensors + 4 * 4 * 64 * 2  # and one number for each query


def counts(plan: ModuleType, **changes: int) -> object:
    plain = {
        "parameters": 10**9, "block": 0, "text": 0, "encoder": 0, "codec": 0, "train_flops": 10**12,
        "encoder_flops": 0, "codec_flops": 0, "activations": 0, "selective": 10**9, "full": 0, "ahead": 0,
    }  # fmt: skip
    return plan.Counts(**(plain | changes))


def test_a_row_is_arithmetic(plan: ModuleType) -> None:
    row = plan.plan(counts(plan), 8, 512, utilisation=0.5)
    assert (row.gpus, row.images) == (8, 64)
    assert row.states == 20 * 10**9 / 8
    assert row.products == pytest.approx(64 * 1e12 / (0.5 * 989.4e12))
    # 72 GB less states: 69 images of 1 GB.
    assert row.at_once == {"H100": 64, "H200": 64}
    assert row.fsdp == row.hsdp == pytest.approx(8e9 * 7 / 8 / 450e9)
    wide = plan.plan(counts(plan), 64, 512, utilisation=0.5)
    assert wide.fsdp == pytest.approx(8e9 * 63 / 64 / 400e9)
    assert wide.hsdp == pytest.approx(8e9 * 7 / 8 / 450e9 + 2 * 7 / 8 * 4e9 / 8 / 50e9)


def test_microbatches_need_unsharded_gradients_and_another_all_gather(plan: ModuleType) -> None:
    row = plan.plan(counts(plan, selective=2 * 10**9), 8, 512, utilisation=0.5)
    assert row.at_once == {"H100": 32, "H200": 32}  # (72 or 126.9 - 2.5 - 4 GB) / 2 GB, as a divisor of 64
    assert row.fsdp == pytest.approx((2 * 2 * 2 + 4) * 1e9 * 7 / 8 / 450e9)
