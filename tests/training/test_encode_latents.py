"""Runs whose VAE's latents are kept, and ``semroute data encode --latents``, which makes them beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from semantic_routing.cli.main import main
from semantic_routing.common.config import to_dict
from semantic_routing.common.errors import Interrupted
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.data.latents import FACTS, KeptLatents
from semantic_routing.data.sources.index_writer import build
from semantic_routing.model.codec import CodecConfig, VAECodec
from semantic_routing.sampling.load import load_bundle
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import resume, start
from semantic_routing.training.validation import ValidationConfig
from tests.helpers.forked import semroute
from tests.model.test_codec import tiny_vae
from tests.training.test_distributed import Task, run
from tests.training.test_encode_text import losses
from tests.training.test_going_on import assert_same, stop_at

Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def latent_config(tiny_config: Make, vae: Path) -> Make:
    """Function (**changes) that makes the configuration of a run on latents of 16 channels."""

    def make(dtype: str = "float32", **changes: Any) -> TrainConfig:
        cfg = tiny_config(log_every=1, **changes)
        codec = CodecConfig(kind="vae", name_or_path=str(vae), dtype=dtype)  # type: ignore[arg-type]
        return replace(cfg, codec=codec, model=replace(cfg.model, channels=16, patch=2))

    return make


@pytest.fixture
def photos(tmp_path: Path) -> DataConfig:
    """Five pictures of several shapes, indexed, and one that is damaged."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i, (width, height) in enumerate([(40, 36), (70, 35), (36, 80), (64, 64), (50, 40), (40, 40)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    whole = (folder / "5.png").read_bytes()
    (folder / "5.png").write_bytes(whole[: len(whole) // 2])
    build([str(folder)], tmp_path / "index", look_inside=True, workers=1)
    return DataConfig(paths=(str(folder),), index=str(tmp_path / "index"), max_damaged=1.0)


def keeping(cfg: TrainConfig, folder: Path) -> TrainConfig:
    return replace(cfg, codec=replace(cfg.codec, keep_on_disk=str(folder)))


def write(cfg: TrainConfig, path: Path) -> None:
    path.write_text(json.dumps(to_dict(cfg)))


def encode(cfg: TrainConfig, folder: Path, *options: str) -> None:
    """Write a configuration beside ``folder`` and encode its pictures into that."""
    path = folder.with_name(folder.name + ".json")
    write(cfg, path)
    main(["data", "encode", str(path), "--latents", "--keep-on-disk", str(folder), *options])


def encode_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the encoder of every VAE fail."""

    def fail(*inputs: object, **options: object) -> None:
        raise AssertionError("the VAE encoded a picture")

    monkeypatch.setattr(AutoencoderKL, "encode", fail)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("float32", ("all", "some", "none")), pytest.param("bfloat16", ("all", "some"), marks=pytest.mark.stress)],
)
@pytest.mark.behaviour(
    "Training",
    when="codec.keep_on_disk has the latents of all images, or of some, and the run is stopped and resumed",
    then="weights and losses are bitwise the same as without",
)
def test_weights_are_the_same_with_kept_latents(
    dtype: str, kept: tuple[str, ...], latent_config: Make, tmp_path: Path
) -> None:
    cfg = latent_config(dtype, steps=4, validation=ValidationConfig(every=2, samples=4, batch=2))
    plain = start(cfg, tmp_path / "plain")
    encode(cfg, tmp_path / "all")
    encode(cfg, tmp_path / "some", "--steps", "2")
    for name in kept:
        with pytest.raises(Interrupted):
            start(keeping(cfg, tmp_path / name), tmp_path / f"run-{name}", stop_at(3))
        assert_same(plain, resume(tmp_path / f"run-{name}"))
        assert losses(tmp_path / "plain") == losses(tmp_path / f"run-{name}")
    validated = [(tmp_path / name / "metrics.jsonl").read_text().count("val_loss_t") for name in ("plain", "run-all")]
    assert validated[0] == validated[1] > 0


@pytest.mark.parametrize("how", ["squares", "buckets", "mirrored", "workers"])
@pytest.mark.behaviour(
    "Pictures and captions",
    when="semroute data encode --latents has encoded a run's images into codec.keep_on_disk",
    then="training and validation encode none of them, including those cropped to buckets or mirrored",
)
def test_a_run_whose_pictures_are_encoded_encodes_none(
    how: str, latent_config: Make, photos: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(photos, buckets=how == "buckets", bucket_multiple=16, flip=how == "mirrored")
    data, dtype = replace(data, workers=int(how == "workers")), "bfloat16" if how == "workers" else "float32"
    cfg = latent_config(dtype, data=data, steps=6, validation=ValidationConfig(every=3, samples=4, paths=photos.paths))
    plain = start(cfg, tmp_path / "plain")
    encode(cfg, tmp_path / "latents", "--batch", "2")
    encode_nothing(monkeypatch)
    assert_same(plain, start(keeping(cfg, tmp_path / "latents"), tmp_path / "run"))
    assert losses(tmp_path / "plain") == losses(tmp_path / "run")
    assert load_bundle(tmp_path / "run", torch.device("cpu")).codec.has_posterior


def test_pictures_with_kept_latents_are_not_decoded(latent_config: Make, photos: DataConfig, tmp_path: Path) -> None:
    """Their rows are black; a picture that changes afterwards is decoded and encoded again."""
    cfg = latent_config(data=photos)
    encode(cfg, tmp_path / "latents")
    changed = Path(photos.paths[0]) / "2.png"
    Image.new("RGB", (36, 80), (200, 90, 30)).save(changed)
    build([*photos.paths], Path(photos.index), look_inside=True, workers=1)
    data = open_data(photos, image_size=32, seed=cfg.seed, latents=KeptLatents(tmp_path / "latents"))
    rows = data.load(0, 5, range(5))
    assert {row.caption: row.image.any() for row in rows if row.posterior is None} == {"picture 2": True}
    assert {row.image.any() for row in rows if row.posterior is not None} == {np.False_}


@pytest.mark.behaviour(
    "Training",
    when="several processes train with latents that several processes have cached",
    then="weights are bitwise the same as without",
)
def test_two_processes(latent_config: Make, photos: DataConfig, tmp_path: Path) -> None:
    cfg = latent_config(data=photos)
    one = str(tmp_path / "latents")
    write(cfg, tmp_path / "cfg.json")
    said, nothing = semroute(2, "data", "encode", tmp_path / "cfg.json", "--latents", "--keep-on-disk", one)
    assert said.splitlines()[-1] == f"5 pictures encoded into {one}; 0 were there already; 1 records cannot be used"
    assert nothing == ""
    assert len([*Path(one).glob("*.safetensors")]) == 2
    for name, config in (("plain", cfg), ("kept", keeping(cfg, Path(one)))):
        write(config, tmp_path / f"{name}.json")
        ended = run(Task(str(tmp_path / name), str(tmp_path / f"{name}.json")), 2, tmp_path / name)
        assert ended.codes == [0, 0], ended.output
        assert "differ by rounding" not in ended.output
    assert losses(tmp_path / "plain") == losses(tmp_path / "kept")


def test_what_is_there_is_not_encoded_again(
    latent_config: Make, photos: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cfg, latents = latent_config(data=photos), tmp_path / "latents"
    encode(cfg, latents, "--size-only")
    said = capsys.readouterr().out
    assert said == f"6 pictures, 0.00 GiB of latents in {latents}\n"
    assert not latents.exists()
    for file in Path(photos.paths[0]).glob("4.*"):
        file.rename(tmp_path / file.name)
    build([*photos.paths], Path(photos.index), look_inside=True, workers=1)
    encode(cfg, latents)
    assert "4 pictures encoded into" in capsys.readouterr().out
    for file in tmp_path.glob("4.*"):
        file.rename(Path(photos.paths[0]) / file.name)
    build([*photos.paths], Path(photos.index), look_inside=True, workers=1)
    encode(cfg, latents)
    assert f"1 pictures encoded into {latents}; 4 were there already; 1 records" in capsys.readouterr().out
    encode_nothing(monkeypatch)
    encode(cfg, latents)
    assert f"0 pictures encoded into {latents}; 5 were there already; 1 records" in capsys.readouterr().out


@pytest.mark.behaviour(
    "Pictures and captions",
    when="semroute data encode --latents is stopped by Ctrl-C",
    then="complete latents are kept, and the next call encodes the rest",
)
def test_ctrl_c_keeps_what_is_encoded(
    latent_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, latents, encoded = latent_config(steps=3), tmp_path / "latents", []
    posterior = VAECodec.posterior

    def stopped(self: VAECodec, images: torch.Tensor) -> torch.Tensor:
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(images)
        return posterior(self, images)

    monkeypatch.setattr(VAECodec, "posterior", stopped)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        encode(cfg, latents, "--batch", "4")
    monkeypatch.undo()
    assert len(KeptLatents(latents)) == 8
    encode(cfg, latents, "--batch", "4")
    assert f"4 pictures encoded into {latents}; 8 were there already" in capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], act: Callable[[], object]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        act()
    assert end.value.code == 2
    error = capsys.readouterr().err
    return error[error.index("semroute: ") :]


@pytest.mark.behaviour(
    "Pictures and captions",
    when="the folder of cached latents belongs to another VAE, or to the VAE in another dtype",
    then="encoding and training stop before they begin, with a message that names the difference",
)
def test_latents_of_another_vae_are_refused(
    latent_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, latents = latent_config(steps=1), tmp_path / "latents"
    encode(cfg, latents)
    before = sorted(latents.iterdir())
    half = latent_config("bfloat16", steps=1)
    other = tiny_vae()
    with torch.no_grad():
        other.encoder.conv_in.bias.add_(0.01)
    other.save_pretrained(tmp_path / "other")
    moved = replace(cfg, codec=replace(cfg.codec, name_or_path=str(tmp_path / "other")))
    for wrong, what in ((half, "other weights, dtype float32 instead of bfloat16"), (moved, "other weights")):
        expected = f"semroute: {latents} holds latents of another VAE ({what}): give another --codec.keep-on-disk\n"
        assert fails(capsys, lambda wrong=wrong: encode(wrong, latents)) == expected  # type: ignore[misc]
        with pytest.raises(ValueError, match="holds latents of another VAE"):
            start(keeping(wrong, latents), tmp_path / "run")
    assert sorted(latents.iterdir()) == before
    (latents / FACTS).unlink()
    assert "is not a folder of latents" in fails(capsys, lambda: encode(cfg, latents))
    (latents / FACTS).write_text("[]")
    assert "is damaged: delete the folder" in fails(capsys, lambda: encode(cfg, latents))


def test_latents_of_another_processor_are_used_with_a_message(
    latent_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, latents = latent_config(steps=1), tmp_path / "latents"
    encode(cfg, latents)
    facts = (latents / FACTS).read_text()
    (latents / FACTS).write_text(facts.replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    capsys.readouterr()
    start(keeping(cfg, latents), tmp_path / "run")
    assert (
        f"were made with torch '1.0' and not '{torch.__version__}': they differ by rounding" in capsys.readouterr().err
    )
    start(keeping(cfg, tmp_path / "none"), tmp_path / "other")
    assert f"there are no latents in {tmp_path / 'none'}: semroute data encode --latents" in capsys.readouterr().err


@pytest.mark.behaviour(
    "Pictures and captions",
    when="latents would be larger than codec.keep_on_disk_bytes, or the disk is full",
    then="encoding ends with exit code 2 and the reason; complete latents stay and are used",
)
def test_a_full_folder(
    latent_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, latents = latent_config(steps=2), tmp_path / "latents"
    error = fails(capsys, lambda: encode(cfg, latents, "--keep-on-disk-bytes", "64kB"))
    assert "8 pictures, 0.00 GiB of latents" in error
    assert "more than --keep-on-disk-bytes 64kB allows: raise it" in error
    assert not latents.exists()
    encode(cfg, latents, "--keep-on-disk-bytes", "66kB")
    (shard,) = latents.glob("*.safetensors")
    content = shard.read_bytes()
    error = fails(capsys, lambda: encode(replace(cfg, seed=9), latents, "--keep-on-disk-bytes", "100kB"))
    assert "65,536 more exceed 100,000: raise codec.keep_on_disk_bytes" in error
    monkeypatch.setattr("semantic_routing.data.latents_writer.save_file", full_disk)
    error = fails(capsys, lambda: encode(replace(cfg, seed=9), latents))
    assert "cannot write" in error
    assert "No space left on device" in error
    assert {path: path.read_bytes() for path in latents.glob("*.safetensors")} == {shard: content}
    assert not [*latents.glob(".*")]


def full_disk(tensors: object, path: Path) -> None:
    path.write_bytes(b"half of a f")
    raise OSError(28, "No space left on device")


def test_latents_that_overflow_are_not_kept(
    latent_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tiny_vae()
    with torch.no_grad():
        large.encoder.conv_out.weight.mul_(1e6)
    large.save_pretrained(tmp_path / "vae")
    cfg = latent_config("float16", steps=1)
    cfg = replace(cfg, codec=replace(cfg.codec, name_or_path=str(tmp_path / "vae")))
    assert "overflow in torch.float16: use --codec.dtype float32" in fails(
        capsys, lambda: encode(cfg, tmp_path / "latents")
    )
    assert not [*(tmp_path / "latents").glob("*.safetensors")]


def test_shards_are_safetensors_that_others_can_read(latent_config: Make, tmp_path: Path, vae: Path) -> None:
    cfg = latent_config(steps=1)
    encode(cfg, tmp_path / "latents")
    (shard,) = (tmp_path / "latents").glob("*.safetensors")
    found = load_file(shard)
    assert {name: (*x.shape,) for name, x in found.items()} == {
        "keys": (4, 16), "checksums": (4,), "posteriors": (4, 2, 16, 8, 8)
    }  # fmt: skip
    rows = open_data(cfg.data, image_size=32, seed=cfg.seed).load(0, 4, range(4))
    signed = torch.from_numpy(np.stack([row.image for row in rows])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(vae).encode(signed).latent_dist
    torch.testing.assert_close(found["posteriors"][:, 0], expected.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["posteriors"][:, 1], expected.std, atol=1e-5, rtol=1e-5)


def test_wrong_arguments(latent_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run_encode(*args: str) -> str:
        return fails(capsys, lambda: main(["data", "encode", *args]))

    assert "the run trains on pixels" in run_encode("debug", "--latents", "--keep-on-disk", str(tmp_path / "x"))
    assert "--text is the encoder of the captions" in run_encode("debug", "--latents", "--text", "smollm2")
    write(latent_config(steps=1), tmp_path / "cfg.json")
    assert "give --keep-on-disk, and train with --codec.keep-on-disk" in run_encode(
        str(tmp_path / "cfg.json"), "--latents"
    )
    inside = str(tmp_path / "cfg.json" / "latents")
    assert "cfg.json is a file" in run_encode(str(tmp_path / "cfg.json"), "--latents", "--keep-on-disk", inside)
    with pytest.raises(ValueError, match="holds latents of a VAE: leave it out for pixels"):
        CodecConfig(keep_on_disk="latents")
