"""Runs whose text encoder keeps states, and ``semroute data encode``, which fills the folder beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from semantic_routing.cli.main import main
from semantic_routing.common.distributed import World
from semantic_routing.common.errors import Interrupted
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.data.sources.index_writer import build
from semantic_routing.sampling.load import load_bundle
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.encode_text import distinct_captions
from semantic_routing.training.loop import resume, start
from semantic_routing.training.parallelize import place_encoder
from semantic_routing.training.validation import ValidationConfig
from tests.training.test_going_on import assert_same, stop_at

Make = Callable[..., TrainConfig]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def keeping(cfg: TrainConfig, memory: str, disk: Path | None = None) -> TrainConfig:
    return replace(cfg, text=replace(cfg.text, keep=memory, keep_on_disk="" if disk is None else str(disk)))


@pytest.mark.parametrize(
    ("arm", "dtype"),
    [
        ("depth", "float32"),
        ("joint", "bfloat16"),
        ("fusedit", "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.stress)
            for case in (("depth", "bfloat16"), ("joint", "float32"), ("fusedit", "bfloat16"))
        ),
    ],
)
@pytest.mark.behaviour(
    "Training",
    when="text.keep or text.keep_on_disk caches the states of captions, and the run is stopped and resumed",
    then="weights and losses are bitwise the same as without",
)
def test_weights_are_the_same_with_kept_states(arm: str, dtype: str, tiny_config: Make, tmp_path: Path) -> None:
    cfg = tiny_config(arm, steps=4, log_every=1, precision="bf16" if dtype == "bfloat16" else "fp32")
    cfg = replace(cfg, text=replace(cfg.text, dtype=dtype))
    plain = start(keeping(cfg, "0"), tmp_path / "plain")
    kept = start(keeping(cfg, "1MiB"), tmp_path / "kept")
    on_disk = keeping(cfg, "0", tmp_path / "states")
    with pytest.raises(Interrupted):
        start(on_disk, tmp_path / "disk", stop_at(2))
    disk = resume(tmp_path / "disk")
    again = start(on_disk, tmp_path / "again")
    for other in (kept, disk, again):
        assert_same(plain, other)
    assert losses(tmp_path / "plain") == losses(tmp_path / "kept") == losses(tmp_path / "disk")
    assert losses(tmp_path / "plain") == losses(tmp_path / "again")


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every later text encoder's model fail."""
    load = TextEncoder.from_pretrained

    def loaded(*args: object, **options: object) -> TextEncoder:
        encoder = load(*args, **options)  # type: ignore[arg-type]

        def fail(*inputs: object) -> None:
            raise AssertionError("the model read a prompt")

        encoder.model.register_forward_pre_hook(fail)
        return encoder

    monkeypatch.setattr(TextEncoder, "from_pretrained", loaded)


@pytest.mark.parametrize("how", ["config", "run"])
@pytest.mark.behaviour(
    "Pictures and captions",
    when="semroute data encode has encoded a run's captions into text.keep_on_disk",
    then="training, validation, previews and sampling of that run encode none of them again",
)
def test_a_run_whose_captions_are_encoded_reads_none(
    how: str, tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = ValidationConfig(every=4, samples=4, batch=2)
    cfg = keeping(tiny_config(validation=validation, preview_every=4), "0", tmp_path / "states")
    preview = replace(cfg.preview, steps=1, batch=2)
    cfg = replace(cfg, preview=preview)
    plain = start(replace(cfg, text=replace(cfg.text, keep_on_disk="")), tmp_path / "plain")
    path = tmp_path / "plain" / "config.json"
    named = str(path if how == "config" else tmp_path / "plain")
    main(["data", "encode", named, "--keep-on-disk", str(tmp_path / "states"), "--size-only"])
    said = capsys.readouterr().out
    assert "captions, about 0.0" in said
    assert not (tmp_path / "states").exists()
    main(["data", "encode", named, "--keep-on-disk", str(tmp_path / "states"), "--batch", "5"])
    assert "captions encoded into" in capsys.readouterr().out
    unread(monkeypatch)
    assert_same(plain, start(cfg, tmp_path / "run"))
    bundle = load_bundle(tmp_path / "run", torch.device("cpu"))
    assert bundle.null_features().hidden.isfinite().all()


def test_an_encoder_that_keeps_states_on_disk_is_not_compiled(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training compiles, sampling does not: kept states must be the same for both."""
    compiled: list[TextEncoder] = []
    monkeypatch.setattr(TextEncoder, "compile", lambda self: compiled.append(self))
    cfg = tiny_config()
    for disk, times in (("", 1), (str(tmp_path), 0)):
        encoder = TextEncoder.from_pretrained(replace(cfg.text, keep_on_disk=disk))
        place_encoder(encoder, cfg.parallel, World(device=torch.device("cpu")), compiled=True)
        assert compiled == [encoder] * times
        compiled.clear()


def test_captions_of_records(tiny_config: Make, tmp_path: Path) -> None:
    """All texts of the keys that a caption may be chosen from, each once."""
    for i in range(3):
        Image.new("RGB", (40, 36), (i * 20, 90, 30)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f" picture {i % 2}\n")
    build([str(tmp_path)], tmp_path / "index", workers=1)
    cfg = tiny_config(data=DataConfig(paths=(str(tmp_path),), index=str(tmp_path / "index")), null_prompt="nothing")
    data = open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed)
    assert distinct_captions(data, cfg) == ["nothing", "picture 0", "picture 1"]


def test_captions_of_the_toy_world_are_those_that_training_draws(tiny_config: Make) -> None:
    cfg = tiny_config()
    data = open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed)
    drawn = [row.caption for step in range(cfg.steps) for row in data.load(step, cfg.batch, range(cfg.batch))]
    assert distinct_captions(data, cfg) == list(dict.fromkeys([cfg.null_prompt, *drawn]))


def test_captions_of_a_limited_world_are_listed_without_its_pictures(tiny_config: Make) -> None:
    cfg = tiny_config(data=DataConfig(captions=5), steps=100_000_000)
    data = open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed)
    drawn = {row.caption for row in data.load(0, 64, range(64))}
    assert set(distinct_captions(data, cfg)) == drawn | {cfg.null_prompt}


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["data", "encode", *args])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_folder_that_is_too_small_is_refused_or_said(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--keep-on-disk", str(tmp_path / "states"), "--steps", "8"]
    error = fails(capsys, str(tiny_run), *options, "--keep-on-disk-bytes", "2kB")
    assert "are more than --keep-on-disk-bytes 2kB allows: raise it" in error
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(TextEncoder, "state_bytes", lambda self, captions, with_kv: 1)  # as if captions were shorter
    with pytest.warns(UserWarning, match="as many as text.keep_on_disk_bytes allows"):
        error = fails(capsys, str(tiny_run), *options, "--keep-on-disk-bytes", "20kB", "--batch", "2")
    assert "make room or raise --keep-on-disk-bytes, and repeat the command" in error
    assert list(tmp_path.rglob("*.safetensors"))


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --keep-on-disk" in fails(capsys, "debug")
    assert "nowhere" in fails(capsys, str(tmp_path / "nowhere"), "--keep-on-disk", str(tmp_path))
    assert "batch is 0" in fails(capsys, "debug", "--batch", "0")
