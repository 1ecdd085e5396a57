"""Recipes: the one for debugging runs from end to end, and the tiny language model has the sizes of its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semantic_routing.cli.main import main
from semantic_routing.model.dit import DiTConfig
from semantic_routing.text.config import tiny_sizes


def test_the_debug_recipe_trains_samples_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMROUTE_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    main(
        ["train", "debug", "--arm", "S3", "--device", "cpu", "--steps", "2", "--preview-every", "2", "--out", str(run)]
    )
    assert (run / "samples" / "step-0000002.png").is_file()
    sizes = json.loads((run / "text_encoder" / "config.json").read_text())
    assert (sizes["num_hidden_layers"], sizes["hidden_size"]) == (2, 64)
    main(["train", "--resume", str(run), "--steps", "3"])
    main(["sample", str(run), "--prompt", "a red circle", "--steps", "2", "--device", "cpu", "--out", str(run / "out")])
    assert (run / "out" / "00000_00.png").is_file()


def test_an_arm_may_be_given_by_the_papers_label() -> None:
    assert DiTConfig(arm="S2") == DiTConfig(arm="depth")
    with pytest.raises(ValueError, match="unknown arm 'detph'; did you mean 'depth'"):
        DiTConfig(arm="detph")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("tiny", {}),
        ("tiny:4x64", {"layers": 4, "width": 64}),
        ("tiny:2x64x5", {"layers": 2, "width": 64, "steps": 5}),
        ("tiny:2", None),
        ("tiny-llama", None),
        ("Qwen/Qwen3-0.6B", None),
    ],
)
def test_sizes_of_the_tiny_language_model_are_read_off_its_name(name: str, sizes: dict[str, int] | None) -> None:
    assert tiny_sizes(name) == sizes
