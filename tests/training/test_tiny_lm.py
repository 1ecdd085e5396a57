"""The tiny language model: trained, cached, deterministic, and read by the ordinary text encoder."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from semantic_routing.text.encoder import TextEncoder
from semantic_routing.training.tiny_lm import tiny_lm

COLOURS, SHAPES, PLACES = (
    ("red", "blue", "green"),
    ("circle", "square", "star"),
    ("above", "below", "left of"),
)
CAPTIONS = [
    f"a {a} {s} {p} a {b} {t}"
    for a, s, p, b, t in itertools.product(COLOURS, SHAPES, PLACES, COLOURS, SHAPES)
    if (a, s) != (b, t)
]
SMALL = {"layers": 2, "width": 64}


def test_trains_caches_and_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tiny_lm(CAPTIONS, steps=150, **SMALL, cache_dir=tmp_path / "a")
    report = json.loads((first / "training.json").read_text())
    # One of 216 captions, all equally likely, in 8 or 9 tokens (a third of them with "left of", one more).
    assert report["held_out_loss"] == pytest.approx(math.log(216) / (8 + 1 / 3), rel=0.1)
    assert report["captions"] == len(CAPTIONS)

    once, again = (tiny_lm(CAPTIONS, steps=20, **SMALL, cache_dir=tmp_path / name) for name in "bc")
    assert again.name == once.name != first.name
    weights, repeated = (load_file(folder / "model.safetensors") for folder in (once, again))
    assert all(torch.equal(weights[name], repeated[name]) for name in weights)
    assert (once / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()

    assert "Training the tiny language model" in capsys.readouterr().err
    assert tiny_lm(iter(CAPTIONS), steps=150, **SMALL, cache_dir=tmp_path / "a") == first
    assert capsys.readouterr().err == ""  # nothing was trained


def test_the_text_encoder_reads_it(tmp_path: Path) -> None:
    encoder = TextEncoder.from_pretrained(tiny_lm(CAPTIONS, steps=2, **SMALL, cache_dir=tmp_path))
    assert (encoder.num_layers, encoder.width, encoder.kv_shape) == (2, 64, (1, 32))
    features = encoder.encode(["", "a red circle", "A RED circle", "a zebra’s naïve 赤"], with_kv=True)
    assert features.mask.sum(1).tolist()[:3] == [1, 4, 4]  # <s>, then one token a word
    torch.testing.assert_close(features.hidden[:, 1], features.hidden[:, 2])
    assert int(features.mask[3].sum()) > 5  # spelled out in bytes, never unknown


def test_cache_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMROUTE_CACHE", str(tmp_path / "cache"))
    folder = tiny_lm(CAPTIONS[:30], steps=1, **SMALL)
    assert folder.parent == tmp_path / "cache"
    other = {tiny_lm(CAPTIONS[:30], steps=1, seed=1, **SMALL), tiny_lm(CAPTIONS[:31], steps=1, **SMALL)}
    assert len(other | {folder}) == 3
    assert {path.name for path in folder.parent.iterdir()} == {path.name for path in other | {folder}}


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    during: list[Path] = []

    def interrupt(*forward: object) -> None:
        during.extend(tmp_path.iterdir())
        raise KeyboardInterrupt

    hook = register_module_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            tiny_lm(CAPTIONS, steps=1, **SMALL, cache_dir=tmp_path)
    finally:
        hook.remove()
    assert len(during) == 1
    assert list(tmp_path.iterdir()) == []


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tiny_lm(CAPTIONS[:30], steps=1, **SMALL, cache_dir=tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two distinct captions"):
        tiny_lm(["a red circle"] * 5, cache_dir=tmp_path)
    for wrong in ({"steps": 0}, {"layers": 0}, {"width": 100}, {"width": 32}):
        with pytest.raises(ValueError, match="expected at least 1 layer"):
            tiny_lm(CAPTIONS, cache_dir=tmp_path, **wrong)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="set SEMROUTE_CACHE"):
        tiny_lm(CAPTIONS, cache_dir=tmp_path / "file")
