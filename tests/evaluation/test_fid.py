"""FID, KID and CLIPScore: closed forms, a naive KID, models made on the spot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
)

from semantic_routing.evaluation.fid import (
    FeaturesArguments,
    VisionModel,
    evaluate_features,
    few_note,
    frechet_distance,
    images_below,
    kernel_distance,
    read_captions,
)

CPU = torch.device("cpu")
WORDS = ["[PAD]", "[UNK]", "[EOS]", "a", "red", "blue", "circle"]


def with_moments(mean, std, n=64) -> torch.Tensor:
    """Features whose sample mean and unbiased covariance are exactly given, and diagonal."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x -= x.mean(0)
    covariance = x.T @ x / (n - 1)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    return whitened * torch.tensor(std, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def test_fid_of_gaussians():
    """|m - m'|² + sum (s - s')², for commuting covariances."""
    real, fake = with_moments([0.0, 1.0, 2.0], [1.0, 2.0, 0.5]), with_moments([1.0, 1.0, 0.0], [3.0, 2.0, 1.0], 40)
    assert frechet_distance(real, fake) == pytest.approx(1 + 4 + 4 + 0.25, abs=1e-6)
    assert frechet_distance(real, real.clone()) == pytest.approx(0, abs=1e-6)


def naive_kid(x, y) -> float:
    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    def among(z):
        return np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    return among(x) + among(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kid_is_the_unbiased_estimate():
    real, fake = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64) + 0.5
    found = kernel_distance(real, fake, subsets=3, subset_size=1000, seed=0)
    assert found == {"value": pytest.approx(naive_kid(real, fake)), "std": pytest.approx(0, abs=1e-9), "subset_size": 9}
    state = torch.random.get_rng_state()
    smaller = [kernel_distance(real, fake, subsets=5, subset_size=4, seed=s) for s in (1, 1, 2)]
    assert smaller[0] == smaller[1] != smaller[2]
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "distance", [frechet_distance, lambda a, b: kernel_distance(a, b, subsets=1, subset_size=2, seed=0)]
)
def test_one_image_is_too_few(distance):
    with pytest.raises(ValueError, match="1 images and 5 reference images are too few"):
        distance(torch.randn(5, 3), torch.randn(1, 3))


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("dino"))
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("clip"))
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(WORDS), "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 28, "patch_size": 14}, projection_dim=6)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


def paint(folder: Path, n: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(n):
        path = folder / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return folder


def test_fid_and_kid_of_folders(dino, tmp_path):
    real, fake = paint(tmp_path / "real", 6), paint(tmp_path / "fake", 5, seed=1)
    args = FeaturesArguments(
        images=fake, reference=real, feature_model=dino, out=tmp_path / "out", batch=4, subsets=4, device="cpu"
    )
    table = evaluate_features(args)
    model = VisionModel(dino, CPU)
    features = [model.features(images_below(folder), 6) for folder in (real, fake)]
    assert features[0].shape == (6, 8)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["fid"] == {"value": pytest.approx(frechet_distance(*features), rel=1e-4), "n": 5, "reference_n": 6}
    assert summary["kid"]["subset_size"] == 5
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "FID from 5 images is biased" in table
    digest = manifest["feature_model"]["sha256"]
    assert digest == model.identity["sha256"]
    assert f"SHA-256 {digest}" in table == (tmp_path / "out" / "table.md").read_text()


def test_features_are_the_models_own(dino, tmp_path):
    paths = images_below(paint(tmp_path, 3))
    model = VisionModel(dino, CPU)
    pixels = model.processor(images=[Image.open(p) for p in paths], return_tensors="pt")["pixel_values"]
    expected = model.model(pixel_values=pixels).pooler_output.double()
    torch.testing.assert_close(model.features(paths, 2), expected, rtol=1e-4, atol=1e-5)


def test_clip_score_is_clips_own_likeness(clip, tmp_path):
    paths = images_below(paint(tmp_path, 3))
    texts = ["a red circle", "a blue circle", "blue"]
    rows = [{"file": str(p.relative_to(tmp_path)), "prompt": t} for p, t in zip(paths, texts, strict=True)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = VisionModel(clip, CPU)
    found = model.caption_cosines(read_captions(tmp_path / "prompts.jsonl"), 2)
    tokens = PreTrainedTokenizerFast.from_pretrained(clip)(texts, padding=True, return_tensors="pt")
    pixels = model.processor(images=[Image.open(p) for p in paths], return_tensors="pt")["pixel_values"]
    output = model.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    expected = output.logits_per_image.diag() / model.model.logit_scale.exp()
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    table = evaluate_features(FeaturesArguments(images=tmp_path, clip=clip, device="cpu"))
    scores = [100 * max(cosine, 0) for cosine in found]
    assert f"| clipscore | {np.mean(scores):.5f} | {np.std(scores, ddof=1):.5f} | 3 |" in table


@pytest.mark.behaviour(
    "Judges and scores",
    when="a folder for `evaluate features` holds files of macOS, hidden files, or files that are not images",
    then="they are skipped, and the table says how many of each kind",
)
def test_what_is_passed_over_is_said(dino, tmp_path):
    real, fake = paint(tmp_path / "real", 2), paint(tmp_path / "fake", 3, seed=1)
    (fake / "0" / "._0.png").write_bytes(b"\0\5\x16\7")
    (fake / "__MACOSX").mkdir()
    (fake / "__MACOSX" / "0.png").write_bytes(b"\0\5\x16\7")
    (fake / ".DS_Store").write_bytes(b"\0")
    (fake / ".thumbnails").mkdir()
    (fake / ".thumbnails" / "0.png").write_bytes(b"\0")
    (fake / "prompts.jsonl").write_text("")
    (fake / "scan.PSD").write_bytes(b"\0")
    (fake / "README").write_text("")
    (fake / "gone.png").symlink_to(tmp_path / "nowhere.png")
    args = FeaturesArguments(images=fake, reference=real, feature_model=dino, out=tmp_path / "out", device="cpu")
    table = evaluate_features(args)
    assert "| 3 | 2 |" in table
    counts = {".jsonl": 1, ".psd": 1, "AppleDouble (._ files of macOS)": 2, "broken links": 1, "hidden": 2}
    counts["without a suffix"] = 1
    assert f"Skipped in {fake}: {', '.join(f'{n} {reason}' for reason, n in counts.items())}.\n" in table
    assert f"Skipped in {real}" not in table
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["passed_over"] == {str(real): {}, str(fake): counts}
    assert "| 3 | 3 |" in evaluate_features(replace(args, reference=fake))


@pytest.mark.parametrize("suffix", [".gif", ".bmp", ".tif", ".TIFF", ".jpe", ".ppm", ".webp", ".jp2", ".PNG"])
def test_formats(tmp_path, suffix):
    Image.new("RGB", (20, 30), "red").save(tmp_path / f"x{suffix}")
    assert images_below(tmp_path) == [tmp_path / f"x{suffix}"]


@pytest.mark.behaviour(
    "Judges and scores",
    when="FID is computed from few images (fewer than 2,048, or than the model has features)",
    then="a note says that it is biased and not comparable",
)
@pytest.mark.parametrize(
    ("count", "width", "enough"),
    [(12, 768, "2,048"), (2047, 768, "2,048"), (2048, 768, ""), (3000, 4096, "4,097"), (4097, 4096, "")],
)
def test_few_pictures_are_noted(count, width, enough):
    notes = few_note(count, width)
    assert bool(notes) == bool(enough)
    for note in notes:
        assert note.startswith(f"FID from {count:,} images is biased")
        assert f"at least {enough} of each" in note


def test_what_cannot_be_computed(dino, tmp_path):
    folder = paint(tmp_path / "images", 2)
    with pytest.raises(ValueError, match="nothing to compute"):
        FeaturesArguments(images=folder)
    with pytest.raises(ValueError, match="need both --reference"):
        FeaturesArguments(images=folder, reference=folder)
    with pytest.raises(ValueError, match="subset_size is 1"):
        FeaturesArguments(images=folder, clip="x", subset_size=1)
    with pytest.raises(ValueError, match="nowhere is not a vision model"):
        VisionModel("nowhere", CPU)
    with pytest.raises(ValueError, match="Dinov2Model, which cannot encode captions"):
        VisionModel(dino, CPU).caption_cosines([(folder / "0" / "0.png", "a")], 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        images_below(tmp_path / "empty")
    (tmp_path / "empty" / "._x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no images .*, only files that are skipped: 1 AppleDouble"):
        images_below(tmp_path / "empty")
    with pytest.raises(ValueError, match="there is no folder of images"):
        images_below(tmp_path / "nowhere")
    Image.new("F", (20, 30)).save(tmp_path / "range.tiff")
    with pytest.raises(ValueError, match=r"range\.tiff has floating-point pixels"):
        VisionModel(dino, CPU).features([tmp_path / "range.tiff"], 1)
    (folder / "0" / "0.png").write_text("")
    with pytest.raises(ValueError, match=r"0\.png cannot be opened"):
        VisionModel(dino, CPU).features(images_below(folder), 2)
    (tmp_path / "c.jsonl").write_text('{"file": "x.png"}')
    with pytest.raises(ValueError, match=r"c\.jsonl:1 lacks file, or prompt or caption"):
        read_captions(tmp_path / "c.jsonl")
