"""``semroute plan``: memory, links, counted numbers, the page's tables, and mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from semantic_routing.analysis.planning.counts import Counts
from semantic_routing.analysis.planning.hardware import GPUS, Assumptions
from semantic_routing.analysis.planning.layout import lay_out
from semantic_routing.analysis.planning.plan import plan
from semantic_routing.analysis.planning.run import detection
from semantic_routing.analysis.planning.step import seconds_of
from semantic_routing.cli.main import main
from semantic_routing.training.recipes import paper
from semantic_routing.training.watchdog import WatchdogConfig

DOCS = Path(__file__).parents[3] / "docs"
PLAIN = Counts(
    parameters=10**9, depth=10, block=10**8, moments=2 * 10**9, encoder=0, codec=0, text_flops=0,
    image_flops=10**12, encoder_flops=0, codec_flops=0, codec_wide=True, update_flops=0,
    activations={"none": 0, "selective": 10**9, "full": 0}, ahead=0, stored=0,
)  # fmt: skip
GATHERED = 2 * 2e8 + 6e8
"""Two blocks in bfloat16; a block's gradients in bfloat16 and float32."""
ASSUMED = Assumptions()


def test_memory_is_arithmetic() -> None:
    layout = lay_out(paper("depth"), PLAIN, GPUS["H100"], 8, ASSUMED)
    assert (layout.images, layout.microbatch, layout.accumulate, layout.fits) == (64, 64, 1, True)
    assert layout.memory == 20e9 / 8 + GATHERED + 64e9  # of 72 GB
    large = replace(PLAIN, activations={"selective": 2 * 10**9})
    split = lay_out(paper("depth"), large, GPUS["H100"], 8, ASSUMED)
    assert (split.microbatch, split.accumulate) == (32, 2)
    assert split.memory == 20e9 / 8 + GATHERED + 4e9 + 64e9  # microbatches add unsharded gradients
    huge = lay_out(paper("depth"), replace(PLAIN, activations={"selective": 10**11}), GPUS["H100"], 8, ASSUMED)
    assert (huge.microbatch, huge.fits) == (1, False)


def test_links_of_every_strategy() -> None:
    cfg, gpu = paper("depth"), GPUS["H100"]
    hsdp = replace(cfg, parallel=replace(cfg.parallel, strategy="hsdp"))
    ddp = replace(cfg, parallel=replace(cfg.parallel, strategy="ddp"))
    found = [seconds_of(c, PLAIN, lay_out(c, PLAIN, gpu, 64, ASSUMED), gpu, ASSUMED) for c in (cfg, hsdp, ddp)]
    start, hop, far = 8.4e-6, 3.4e-6, 9.6e-6
    wide, inside, none = (part.gather_block for part in found)
    assert wide == pytest.approx(2e8 * 63 / 64 / 400e9 + start + 56 * hop + 7 * far)
    assert inside == pytest.approx(2e8 * 7 / 8 / 450e9 + start + 7 * hop)
    assert none == 0
    assert found[0].reduce_block == 0
    assert found[1].reduce_block == pytest.approx(2 * (4e8 / 8 * 7 / 8 / 50e9 + start + 7 * far))
    assert found[2].reduce_block == pytest.approx(2 * (4e8 * 63 / 64 / 400e9 + start + 56 * hop + 7 * far))
    assert found[0].block == pytest.approx(8 * 1e12 / 10 / (0.4 * 989.4e12))


def test_the_watchdog_waits_its_timeout_and_three_polls() -> None:
    cfg = paper("depth")
    assert detection(cfg, 512) == 600 + 3 * 10
    assert detection(replace(cfg, watchdog=WatchdogConfig(timeout=100.0)), 512) == 100 + 3 * 5
    assert detection(replace(cfg, watchdog=WatchdogConfig(timeout=0.0)), 512) == 7 * 86_400


def test_a_plan_adds_up() -> None:
    cfg = replace(paper("depth"), steps=20_000)
    found = plan(cfg, PLAIN, "H100", 64, ASSUMED)
    assert found.hang - found.crash == found.detect
    assert found.failures == pytest.approx(found.calm * 64 / 3600 / ASSUMED.gpu_hours_per_failure)
    assert found.to_json(2.0)["cost"] == pytest.approx(2.0 * 64 * found.mean / 3600)
    assert found == plan(cfg, PLAIN, "H100", 64, ASSUMED)


@pytest.mark.usefixtures("unchecked")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    main(["plan", "debug", "--gpus", "1", "4", "--text-tokens", "16", "--price-per-gpu-hour", "2", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "| GPUs | step (s) |" in printed
    numbers = json.loads(file.read_text())
    assert [one["layout"]["gpus"] for one in numbers["plans"]] == [1, 4]
    assert numbers["plans"][0]["parts"]["gather_block"] == 0
    assert numbers["assumptions"]["price_per_gpu_hour"] == 2
    assert numbers["manifest"]["config"]["batch"] == 4
    assert f"{numbers['counts']['parameters']:,}" in printed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "semroute plan needs a recipe"),
        (["papr"], "unknown recipe 'papr'; did you mean 'paper'?"),
        (["paper", "--gpu", "H10"], "unknown GPU 'H10'; did you mean 'H100'?"),
        (["paper", "--gpus", "12"], "12 GPUs do not fill machines of 8"),
        (["paper", "--gpus", "1024"], "a batch of 512 does not divide among 1024 processes"),
        (["paper", "--gpus", "0"], "gpus is 0; a plan needs at least 1"),
        (["paper", "--utilisation", "1.5"], "utilisation is 1.5; it is a share"),
        (["paper", "--text-tokens", "0"], "text_tokens is 0"),
        (["paper", "--price-per-gpu-hour", "-1"], "price_per_gpu_hour is -1"),
        (["paper", "--parallel.text-encoder", "cpu"], "cannot time a language model on the CPU"),
    ],
)
def test_mistakes(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *given])
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "train-at-scale.md").read_text(encoding="utf-8")
    shown = page.split("<!-- semroute plan paper -->\n")[1].split("<!-- end -->")[0]
    main(["plan", "paper"])
    assert shown == capsys.readouterr().out
