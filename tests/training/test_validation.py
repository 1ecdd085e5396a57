"""Validation: against a naive loop, at any batch size and number of processes, on pictures that are held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from semantic_routing.common.distributed import Processes
from semantic_routing.data.dataset import DataConfig
from semantic_routing.data.draws import draw, posterior_noise
from semantic_routing.model.build import make_model
from semantic_routing.model.codec import PixelCodec
from semantic_routing.sampling.text_to_image import TextToImage
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.toy.captions import split_of
from semantic_routing.training.validation import ValidationConfig, error_sums, held_out, validate
from tests.helpers.forked import Forked
from tests.helpers.networks import CountingModel, tiny_network

CFG = ValidationConfig(samples=7, batch=3, times=(0.1, 0.6))
SIZES = {"depth": 2, "width": 32, "head_dim": 32, "patch": 8, "text_width": 64, "text_layers": 2}


def make_bundle(encoder: str, arm: str = "depth") -> TextToImage:
    """Make a network whose answer depends on image, time and text."""
    model = tiny_network(arm, **SIZES, conditioning="addition")
    config = TextEncoderConfig(name_or_path=encoder, buckets=(4, 8, 16, 32, 64))
    return TextToImage(model=model, encoder=TextEncoder.from_pretrained(config), codec=PixelCodec(), image_size=32)


@pytest.fixture(scope="module")
def bundle(tiny_encoder: Path) -> TextToImage:
    return make_bundle(str(tiny_encoder))


@pytest.mark.parametrize("arm", ["depth", "time", "fusedit"])
def test_loss_is_that_of_a_naive_loop(tiny_encoder: Path, arm: str) -> None:
    bundle = make_bundle(str(tiny_encoder), arm)
    pictures = held_out(CFG, DataConfig(), 32)
    expected: dict[float, list[float]] = {t: [] for t in CFG.times}
    with torch.no_grad():
        for i in range(7):
            row = pictures(i)
            x = torch.from_numpy(row.image).permute(2, 0, 1)[None] / 127.5 - 1
            noise = torch.from_numpy(draw(row.seed, row.sample, row.epoch, (3, 32, 32)).noise)[None]
            for time in CFG.times:
                t = torch.tensor([time])
                context = bundle.model.prepare_text(bundle.encode([row.caption]), t)
                predicted = bundle.model((1 - time) * noise + time * x, t, context)
                expected[time].append((predicted - (x - noise)).square().mean().item())
    found = validate(bundle, pictures, CFG)
    means = [sum(errors) / 7 for errors in expected.values()]
    assert found == pytest.approx(
        {"val_loss": sum(means) / 2, "val_loss_t0.1": means[0], "val_loss_t0.6": means[1]}, rel=1e-5
    )


def test_a_network_that_says_nothing_errs_by_the_velocity(bundle: TextToImage) -> None:
    silent = replace(bundle, model=make_model(bundle.model.cfg))  # its last layer starts at zero
    pictures = held_out(CFG, DataConfig(), 32)
    rows = [pictures(i) for i in range(7)]
    latents = [torch.from_numpy(row.image).permute(2, 0, 1) / 127.5 - 1 for row in rows]
    noises = [torch.from_numpy(draw(row.seed, row.sample, row.epoch, (3, 32, 32)).noise) for row in rows]
    expected = sum((x - noise).square().mean().item() for x, noise in zip(latents, noises, strict=True)) / 7
    assert list(validate(silent, pictures, CFG).values()) == pytest.approx([expected] * 3, rel=1e-6)


def test_neither_batch_size_nor_repetition_nor_the_global_generator_matters(bundle: TextToImage) -> None:
    pictures = held_out(CFG, DataConfig(), 32)
    once = validate(bundle, pictures, CFG)
    torch.manual_seed(9)
    assert validate(bundle, held_out(CFG, DataConfig(), 32), CFG) == once
    for batch in (1, 7, 64):
        assert validate(bundle, pictures, replace(CFG, batch=batch)) == pytest.approx(once, rel=1e-6)
    assert validate(bundle, held_out(replace(CFG, seed=1), DataConfig(), 32), CFG) != pytest.approx(once, rel=1e-3)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_shares_of_processes_add_up_and_run_the_network_equally_often(bundle: TextToImage, count: int) -> None:
    pictures = held_out(CFG, DataConfig(), 32)
    whole = error_sums(bundle, pictures, CFG, Processes())
    counted = CountingModel(bundle.model)
    parts, rows = [], []
    for rank in range(count):
        parts.append(error_sums(bundle, pictures, CFG, Processes(rank, count)))
        rows.append(counted.rows.copy())
        counted.rows.clear()
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)
    expected = {2: [3, 3, 3, 3], 3: [3, 3], 9: [1, 1]}  # batches of one size, each at two times
    assert rows == [expected[count]] * count


WORKER = """
import json, sys
root, store, encoder = sys.argv[1:]
sys.path.insert(0, root)
from tests.training.test_validation import run_as
print(json.dumps(run_as(1, store, encoder)))
"""


def run_as(rank: int, store: str, encoder: str) -> dict[str, float]:
    """Validate as one of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        return validate(make_bundle(encoder), held_out(CFG, DataConfig(), 32), CFG, Processes(rank, 2))
    finally:
        dist.destroy_process_group()


def test_two_processes_find_what_one_finds(bundle: TextToImage, tiny_encoder: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    other = Forked(WORKER, (Path(__file__).parents[2], store, tiny_encoder))
    mine = run_as(0, store, str(tiny_encoder))
    assert other.wait() == 0, other.err
    alone = validate(bundle, held_out(CFG, DataConfig(), 32), CFG)
    assert mine == json.loads(other.out) == pytest.approx(alone, rel=1e-6)


def test_the_posterior_of_a_codec_is_sampled_with_fixed_noise(bundle: TextToImage) -> None:
    seen: list[torch.Tensor] = []

    class Sampled(PixelCodec):
        has_posterior = True

        def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
            assert noise is not None
            seen.append(noise)
            return super().encode(images)

    pictures = held_out(CFG, DataConfig(), 32)
    validate(replace(bundle, codec=Sampled()), pictures, CFG)
    row = pictures(1)
    expected = posterior_noise(row.seed, row.sample, row.epoch, (3, 32, 32))
    np.testing.assert_array_equal(seen[0][1].numpy(), expected)


# --- what is held out ---


def test_the_toy_world_validates_on_its_evaluation_split() -> None:
    cfg = replace(CFG, samples=50)
    pictures = held_out(cfg, DataConfig(), 48)
    rows = [pictures(i) for i in range(50)]
    assert {split_of(row.caption) for row in rows} == {"eval"}
    assert {row.image.shape for row in rows} == {(48, 48, 3)}
    assert len({(row.seed, row.epoch, row.sample) for row in rows}) == 50


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        Image.new("RGB", (40, 60), (i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [json.dumps({"image": f"{i}.png", "text": f"picture {i}"}) for i in range(5)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_the_users_own_held_out_pictures_are_square_and_never_mirrored(folder: Path) -> None:
    cfg = replace(CFG, paths=(str(folder),), samples=5)
    pictures = held_out(cfg, DataConfig(flip=True), 16)
    rows = [pictures(i) for i in range(5)]
    assert {row.caption for row in rows} == {f"picture {i}" for i in range(5)}
    assert all(row.image.shape == (16, 16, 3) for row in rows)
    assert [int(row.image[0, 0, 0]) for row in rows] == [int(row.caption[-1]) for row in rows]
    again = held_out(cfg, DataConfig(), 16)
    assert [again(i).caption for i in range(5)] == [row.caption for row in rows]


def test_a_run_on_a_generated_world_may_be_validated_on_pictures(folder: Path) -> None:
    pictures = held_out(replace(CFG, paths=(str(folder),), samples=5), DataConfig(paths=("words",), captions=9), 16)
    assert {pictures(i).caption for i in range(5)} == {f"picture {i}" for i in range(5)}


def test_the_users_data_has_no_held_out_part_of_itself(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"validation needs images that are not used in training: give validation\.paths"
    ):
        held_out(CFG, DataConfig(paths=(str(folder),)), 16)


Make = Callable[[], ValidationConfig]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ValidationConfig(samples=0), "on 0 samples"),
        (lambda: ValidationConfig(every=-1), "every -1 steps"),
        (lambda: ValidationConfig(times=()), "must be at least one number from 0 to 1"),
        (lambda: ValidationConfig(times=(0.5, 1.5)), "must be at least one number from 0 to 1"),
    ],
)
def test_what_a_validation_cannot_be(make: Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
