"""Images to latents and back: exact for pixels, and as diffusers defines it for a VAE."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from semantic_routing.model.codec import CodecConfig, PixelCodec, VAECodec, make_codec

SHIFT, SCALE = 0.0609, 1.5305
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_vae(**changes: Any) -> AutoencoderKL:
    """Return a random VAE of factor 4 whose posterior is wide enough to see."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "latent_channels": 16,
        "sample_size": 64,
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
        "use_quant_conv": False,  # as in Stable Diffusion 3
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**settings | changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def codec(saved: Path) -> VAECodec:
    codec = make_codec(CodecConfig(kind="vae", name_or_path=str(saved)))
    assert isinstance(codec, VAECodec)
    return codec


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "vae"))


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)


def smooth_pictures(batch: int, side: int) -> torch.Tensor:
    coarse = torch.rand(batch, 3, 4, 4)
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return (255 * fine).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_pixels_round_trip_exactly():
    codec = make_codec(CodecConfig())
    assert isinstance(codec, PixelCodec)
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    images[1] = pictures(16, 16)
    latents = codec.encode(images)
    assert latents.shape == (2, *codec.latent_shape(16)) == (2, 3, 16, 16)
    assert latents.dtype == torch.float32
    assert (latents.min(), latents.max()) == (-1, 1)
    assert latents[1, 2, 3, 4] == images[1, 3, 4, 2] / 127.5 - 1
    assert torch.equal(codec.decode(latents), images)


def test_pixels_are_clamped_and_rounded():
    values = torch.tensor([-3.0, -1.0, -0.9999, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 1.01, 9.0])
    decoded = PixelCodec().decode(values.reshape(1, 1, 1, 8).repeat(1, 3, 1, 1))
    assert decoded[0, 0, :, 0].tolist() == [0, 0, 0, 0, 1, 255, 255, 255]


def test_a_vae_is_loaded_whole(saved: Path, codec: VAECodec):
    assert (codec.channels, codec.factor, codec.has_posterior) == (16, 4, True)
    assert (codec.shift, codec.scale) == (SHIFT, SCALE)
    weights = load_file(saved / WEIGHTS)
    loaded = codec.vae.state_dict()
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert not any(parameter.requires_grad for parameter in codec.vae.parameters())


@torch.no_grad()
def test_latents_are_shifted_and_scaled(codec: VAECodec):
    images = pictures(2, 32, 24)
    signed = 2 * (images.permute(0, 3, 1, 2) / 255) - 1
    mean, log_variance = codec.vae.encoder(signed).chunk(2, dim=1)
    latents = codec.encode(images)
    assert latents.shape == (2, *codec.latent_shape(32, 24)) == (2, 16, 8, 6)
    torch.testing.assert_close(latents, (mean - SHIFT) * SCALE, atol=1e-5, rtol=1e-5)
    noise = torch.randn_like(mean)
    sampled = (mean + (log_variance / 2).exp() * noise - SHIFT) * SCALE
    torch.testing.assert_close(codec.encode(images, noise), sampled, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoding_undoes_shift_and_scale(codec: VAECodec):
    latents = torch.randn(2, 16, 8, 6)
    signed = codec.vae.decoder(latents / SCALE + SHIFT)
    expected = (255 * (signed / 2 + 0.5)).clamp(0, 255).permute(0, 2, 3, 1)
    decoded = codec.decode(latents)
    assert decoded.shape == (2, 32, 24, 3)
    assert (decoded - expected).abs().max() <= 0.5 + 1e-3
    assert decoded.float().std() > 0.75


def test_a_vae_without_shift_is_only_scaled(tmp_path: Path):
    tiny_vae(shift_factor=None, use_quant_conv=True, use_post_quant_conv=True).save_pretrained(tmp_path)
    codec = make_codec(CodecConfig(kind="vae", name_or_path=str(tmp_path)))
    assert isinstance(codec, VAECodec)
    images = pictures(1, 16, 16)
    with torch.no_grad():
        mean = codec.vae.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(codec.encode(images), mean * SCALE)


def test_the_posterior_depends_on_the_given_noise_alone(codec: VAECodec):
    images, noise = pictures(2, 16, 16), torch.randn(2, 16, 4, 4)
    torch.manual_seed(1)
    first = codec.encode(images, noise)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, codec.encode(images, noise))
    assert torch.equal(state, torch.get_rng_state())
    assert (first - codec.encode(images)).abs().mean() > 0.1
    assert (first - codec.encode(images, -noise)).abs().mean() > 0.1


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"slicing": True}])
@pytest.mark.parametrize("side", [16, 40])
def test_a_posterior_does_not_depend_on_the_batch(saved: Path, options: dict[str, Any], side: int):
    codec = make_codec(CodecConfig(kind="vae", name_or_path=str(saved), **options))
    assert isinstance(codec, VAECodec)
    images, noise = pictures(7, side, side), torch.randn(7, 16, side // 4, side // 4)
    whole = codec.posterior(images)
    assert (whole.shape, whole.dtype) == ((7, 2, 16, side // 4, side // 4), codec.vae.dtype)
    for few in (slice(0, 1), slice(5, 6), slice(2, 5), slice(6, None, None)):
        assert torch.equal(codec.posterior(images[few]), whole[few])
        assert torch.equal(codec.encode(images[few], noise[few]), codec.encode(images, noise)[few])
    assert torch.equal(codec.sample(whole, noise), codec.encode(images, noise))
    assert torch.equal(codec.sample(whole), codec.encode(images))


def test_tiles_and_slices_decode_nearly_the_same(saved: Path, codec: VAECodec):
    config = CodecConfig(kind="vae", name_or_path=str(saved), tiling=True, slicing=True)
    tiled = make_codec(config)
    latents = torch.randn(2, 16, 24, 24)  # larger than the VAE's 64 pixels: tiled
    whole, parts = codec.decode(latents).float(), tiled.decode(latents).float()
    assert whole.shape == parts.shape == (2, 96, 96, 3)
    # A random VAE's group norms see other statistics in a tile; unrelated pictures would differ by 0.9.
    assert 0 < (whole - parts).abs().mean() / whole.std() < 0.25
    assert (whole - whole.flip(1)).abs().mean() / whole.std() > 0.75
    small = latents[..., :16, :16]
    assert (codec.decode(small).int() - tiled.decode(small).int()).abs().max() <= 1


def test_slices_decode_the_same(saved: Path, codec: VAECodec):
    sliced = make_codec(CodecConfig(kind="vae", name_or_path=str(saved), slicing=True))
    latents = torch.randn(3, 16, 4, 4)
    assert (codec.decode(latents).int() - sliced.decode(latents).int()).abs().max() <= 1


def test_latents_are_float32_whatever_the_weights_are(saved: Path, codec: VAECodec):
    half = make_codec(CodecConfig(kind="vae", name_or_path=str(saved), dtype="bfloat16"))
    assert isinstance(half, VAECodec)
    assert {p.dtype for p in half.vae.parameters()} == {torch.bfloat16}
    images, noise = smooth_pictures(2, 16), torch.randn(2, 16, 4, 4)
    latents = half.encode(images, noise)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, codec.encode(images, noise), atol=0.1, rtol=0.05)
    assert half.decode(latents).dtype == torch.uint8


def test_a_vae_in_a_pipeline_folder(saved: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "vae")
    config = CodecConfig(kind="vae", name_or_path=str(tmp_path), subfolder="vae")
    assert make_codec(config).latent_shape(64) == (16, 16, 16)


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (0, 0), (-4, 4)])
def test_sizes_that_do_not_divide_are_errors(codec: VAECodec, size: tuple[int, int]):
    with pytest.raises(ValueError, match="use multiples of 4"):
        codec.latent_shape(*size)
    if min(size) > 0:
        with pytest.raises(ValueError, match="use multiples of 4"):
            codec.encode(pictures(1, *size))


def load(path: Path | str, **options: Any) -> None:
    make_codec(CodecConfig(kind="vae", name_or_path=str(path), **options))


def test_a_missing_vae_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="name_or_path"):
        CodecConfig(kind="vae")
    with pytest.raises(ValueError, match=r"no VAE at .*nowhere'; use a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot load a VAE from"):
        load(tmp_path)


def test_a_vae_that_does_not_fit_is_refused(copy: Path):
    weights = load_file(copy / WEIGHTS)
    first = min(weights)
    save_file({name: value for name, value in weights.items() if name != first}, copy / WEIGHTS)
    with pytest.raises(ValueError, match=f"do not fit its configuration.*missing.*{first}"):
        load(copy)
    save_file(weights | {"extra": torch.ones(1)}, copy / WEIGHTS)
    with pytest.raises(ValueError, match=r"do not fit its configuration.*unexpected.*extra"):
        load(copy)
    save_file(weights | {first: torch.ones(3)}, copy / WEIGHTS)
    with pytest.raises(ValueError, match=f"cannot load a VAE.*{first}"):
        load(copy)


def test_damaged_and_pickled_weights_are_refused(copy: Path):
    whole = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot load a VAE"):
        load(copy)
    (copy / WEIGHTS).write_bytes(whole)
    torch.save(load_file(copy / WEIGHTS), copy / "diffusion_pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="cannot load a VAE"):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny, not AutoencoderKL"),
        ({"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}, "each channel separately"),
    ],
)
def test_other_kinds_of_vae_are_refused(copy: Path, change: dict[str, Any], message: str):
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_a_vae_of_other_channels_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="reads 4 channels and writes 3; use one for RGB images"):
        VAECodec(tiny_vae(in_channels=4))


def test_without_diffusers_the_error_says_what_to_install(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'pip install "semantic-routing\[diffusers\]"'):
        load(saved)
