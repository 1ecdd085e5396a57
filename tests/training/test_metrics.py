"""Seconds by activity, counted products against closed forms, peaks by name, memory, routing entropy."""

from __future__ import annotations

import math
import resource
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from semantic_routing.model.build import make_model
from semantic_routing.model.dit import DiTConfig
from semantic_routing.training.metrics import (
    Meter,
    entropies,
    flops_per_image,
    known_peak,
    peak_flops,
    peak_memory,
    reproducible,
    routing_entropy,
)
from tests.helpers.networks import tiny_config

SIZES = {"width": 24, "heads": 4, "kv_heads": 2, "mlp_width": 40, "text_width": 20, "text_layers": 5}


def sized(arm: str) -> DiTConfig:
    return tiny_config(arm, **SIZES, fusedit_first_layer=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the meter reads, moved by the test."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_row_is_means_over_the_steps_since_the_last_row(clock: list[float]) -> None:
    meter = Meter()
    for _ in range(4):
        with meter.timed("data"):
            clock[0] += 0.5
        clock[0] += 1.0
        meter.step(8)
    with meter.timed("saving"):
        clock[0] += 2.0
    assert meter.row() == {"step_s": 2.0, "data_s": 0.5, "saving_s": 0.5, "images_per_s": 4.0}
    clock[0] += 3.0
    meter.step(6)
    assert meter.row() == {"step_s": 3.0, "images_per_s": 2.0}


def test_an_activity_that_fails_has_taken_its_time_too(clock: list[float]) -> None:
    meter = Meter()
    with suppress(KeyError), meter.timed("data"):
        clock[0] += 1.0
        raise KeyError
    meter.step(1)
    assert meter.row()["data_s"] == 1.0


def test_what_two_equal_runs_share() -> None:
    row = {"step": 3, "loss": 0.5, "grad_norm": None, "step_s": 1.0, "images_per_s": 8.0, "mfu": 0.4, "memory": 10}
    assert reproducible(row) == {"step": 3, "loss": 0.5, "grad_norm": None}


def test_utilisation_is_the_share_of_all_devices_peaks(clock: list[float]) -> None:
    meter = Meter(world=4, peak=1000.0)
    for _ in range(2):
        clock[0] += 5.0
        meter.step(1, flops=6000)
    assert meter.row()["mfu"] == 12_000 / (10 * 4 * 1000)
    clock[0] += 1.0
    meter.step(1)
    assert "mfu" not in meter.row()  # no products were counted


def products(arm: str, tokens: int) -> int:
    """Multiplications and additions of one forward pass of ``SIZES`` on a latent of 8 x 6, written out by hand."""
    image, query, key, width, text = 12, 32, 16, 24, 20
    patches = 2 * image * width * 4 * 3
    block = image * (width * (query + 2 * key) + query * width + 3 * width * 40)
    attention = 2 * image * image * query
    if arm == "fusedit":
        return 2 * (patches + 3 * (block + attention + 2 * image * tokens * query))
    cross = 2 * image * width * query + 2 * image * tokens * query
    rows = 3 if arm == "depth" else 1
    prepare = rows * tokens * text * text + 3 * tokens * 2 * text * key
    # Weights over deviations and weighted states; one used layer where the others weigh nothing.
    mixing = tokens * rows * (1 if arm == "penultimate" else 5) * (text + 1)
    return 2 * (patches + 3 * (block + attention + cross) + prepare + mixing)


@pytest.mark.parametrize("arm", ["penultimate", "uniform", "depth", "fusedit"])
def test_products_of_training_are_three_forward_passes(arm: str) -> None:
    counted = flops_per_image(sized(arm), 8, 6, tokens=7)
    assert counted == pytest.approx(3 * products(arm, 7), rel=0.002)
    assert counted % 3 == 0


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.8),
        ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A4000", None),
        ("AMD Instinct MI300X", 1307.4),
        ("some other device", None),
    ],
)
def test_peaks_are_known_by_name(name: str, teraflops: float | None) -> None:
    assert known_peak(name) == (None if teraflops is None else teraflops * 1e12)


def test_a_cpu_has_no_peak_to_compare_with() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_peak_memory_is_that_of_the_process_in_bytes() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert 0.9 * resident < peak_memory(torch.device("cpu")) < 100 * resident  # the kernel's counters lag a little


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu_is_its_tensors() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    block = torch.ones(2**26, dtype=torch.uint8, device=device)
    del block
    assert peak_memory(device) == before + 2**26
    assert peak_flops(device) == known_peak(torch.cuda.get_device_name(device))


def test_entropy_of_rows() -> None:
    weights = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(entropies(weights), torch.tensor([math.log(4), 0.0, math.log(2)]))


@pytest.mark.parametrize(
    ("arm", "layers"), [("penultimate", 1), ("uniform", 5), ("depth", 5), ("joint", 5), ("depth-low-rank", 5)]
)
def test_routers_begin_at_one_layer_or_all(arm: str, layers: int) -> None:
    found = routing_entropy(make_model(sized(arm)))
    assert found == pytest.approx({"router_entropy": math.log(layers), "router_layers": layers}, rel=1e-5)


def test_routing_entropy_is_a_mean_over_blocks_and_times() -> None:
    depth = make_model(sized("depth"))
    depth.router.logits.data = torch.tensor([[50.0, 0, 0, 0, 0], [50.0, 50, 0, 0, 0], [0.0] * 5])
    found = routing_entropy(depth)
    assert found["router_entropy"] == pytest.approx((math.log(2) + math.log(5)) / 3)
    assert found["router_layers"] == pytest.approx((1 + 2 + 5) / 3)
    joint = make_model(sized("joint"))
    torch.nn.init.normal_(joint.router.w2, std=3.0)
    by_hand = [
        -(w * w.log()).sum().item()
        for t in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
        for w in joint.router.weights(torch.tensor([t]))[0]
    ]
    assert routing_entropy(joint)["router_entropy"] == pytest.approx(sum(by_hand) / 21, rel=1e-5)


def test_fusedit_has_no_routing_entropy() -> None:
    assert routing_entropy(make_model(sized("fusedit"))) == {}
