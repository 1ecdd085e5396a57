"""States that are kept: the same bits as the model's own, bounded, and safe against damage and other processes."""

from __future__ import annotations

import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from semantic_routing.common.sizes import parse_bytes
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.text.features import TextFeatures
from semantic_routing.text.store import DiskStates, States, StateStore
from tests.helpers.forked import Forked
from tests.text.test_encoder import load, qwen3, save

PROMPTS = ["a red circle", "", "the blue square of a red circle", "blue", "a red circle"]


def equal(one: TextFeatures, other: TextFeatures) -> bool:
    pairs = zip((one.hidden, one.mask, one.keys, one.values), (other.hidden, other.mask, other.keys, other.values),
                strict=True)  # fmt: skip
    return all(a is b is None or torch.equal(a, b) for a, b in pairs if a is not None or b is not None)


def read_nothing(encoder: TextEncoder) -> TextEncoder:
    """Make a forward pass of the model fail."""

    def fail(*args: object) -> None:
        raise AssertionError("the model read a prompt")

    encoder.model.register_forward_pre_hook(fail)
    return encoder


def rows_read(encoder: TextEncoder) -> list[tuple[int, int]]:
    """The rows of every forward pass from now on, and how many of them differ."""
    rows: list[tuple[int, int]] = []
    encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((len(kwargs["input_ids"]), len(kwargs["input_ids"].unique(dim=0)))),
        with_kwargs=True,
    )
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "model", qwen3)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_kv", [False, True])
@pytest.mark.behaviour(
    "Text encoders",
    when="hidden states of prompts are cached in memory or on disk",
    then="features are bitwise the same as without the cache, in any batch",
)
def test_kept_states_are_the_models_own(dtype: str, with_kv: bool, folder: Path, tmp_path: Path) -> None:
    plain = load(folder, dtype=dtype, keep="0")
    expected = plain.encode(PROMPTS, with_kv=with_kv)
    disk = str(tmp_path / "states")
    for settings in ({"keep": "1MiB"}, {"keep": "0", "keep_on_disk": disk}, {"keep": "300", "keep_on_disk": disk}):
        encoder = load(folder, dtype=dtype, **settings)
        for _ in range(2):
            for prompts in (PROMPTS[1:2], PROMPTS[::2], PROMPTS):
                found = encoder.encode(prompts, with_kv=with_kv)
                assert equal(found, plain.encode(prompts, with_kv=with_kv))
        assert equal(found, expected)
    read_nothing(encoder).encode(PROMPTS, with_kv=with_kv)


def test_a_prompt_is_read_once(folder: Path) -> None:
    encoder = load(folder, buckets=(128,))
    rows = rows_read(encoder)
    encoder.encode(PROMPTS)
    assert rows == [(8, 4)]
    encoder.encode(["the blue square", *PROMPTS])
    assert rows == [(8, 4), (8, 1)]
    encoder.encode(PROMPTS, with_kv=True)
    assert rows == [(8, 4), (8, 1), (8, 4)]


def test_every_forward_pass_of_a_bucket_has_one_shape(folder: Path) -> None:
    encoder = load(folder, keep="0", buckets=(16, 32, 64))
    rows = rows_read(encoder)
    encoder.encode([word * n for n in range(1, 15) for word in ("red ", "blue ", "of ", "and ", "the ")])
    encoder.encode(["red", "red " * 17, "red " * 33])
    assert rows == [(64, 64), (64, 6), (64, 1), (32, 1), (16, 1)]


def test_features_belong_to_the_caller(folder: Path) -> None:
    encoder = load(folder)
    first = encoder.encode(PROMPTS).hidden
    expected = first.clone()
    first.zero_()
    encoder.encode(PROMPTS).hidden.zero_()
    assert torch.equal(encoder.encode(PROMPTS).hidden, expected)


def test_threads_share_what_is_kept(folder: Path, tmp_path: Path) -> None:
    encoder = load(folder, keep="20kB", keep_on_disk=str(tmp_path / "states"))
    plain = load(folder, keep="0")
    prompts = ["red", "blue", "a red circle", "the blue square", "circle", "square", "of", ""] * 8
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: encoder.encode([prompt]), prompts))
    assert all(equal(one, plain.encode([prompt])) for one, prompt in zip(found, prompts, strict=True))


def test_compiling_and_unloading_forget_states(folder: Path) -> None:
    encoder = load(folder)
    encoder.encode(PROMPTS)
    encoder.unload()
    with pytest.raises(RuntimeError, match="was unloaded"):
        encoder.encode(PROMPTS)


def states(value: float, size: int = 100) -> States:
    return States(torch.full((1, size // 4, 1), float(value)))


def test_the_least_recently_used_states_make_room() -> None:
    store = StateStore(300)
    for name in "abc":
        store.put(name, states(ord(name)))
    assert store.get("a") is not None
    store.put("d", states(1.0))
    assert [name for name in "abcd" if store.get(name) is not None] == ["a", "c", "d"]
    store.put("large", states(1.0, size=304))
    assert store.get("large") is None
    store.put("e", states(1.0, size=300))
    assert [name for name in "acde" if store.get(name) is not None] == ["e"]
    assert not StateStore(0).active


def test_sizes_in_bytes() -> None:
    assert [parse_bytes(size) for size in ("0", "300", "20kB", "2GiB", "1.5 MB")] == [0, 300, 20000, 2**31, 1500000]
    for wrong in ("", "two", "-1", "2 XB", "1e9"):
        with pytest.raises(ValueError, match="not understood"):
            parse_bytes(wrong)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "another"])
@pytest.mark.behaviour(
    "Text encoders",
    when="a file of cached hidden states is truncated or damaged",
    then="a warning names it, and its prompt is encoded again",
)
def test_damaged_files_are_encoded_again(damage: str, folder: Path, tmp_path: Path) -> None:
    encoder = load(folder, keep="0", keep_on_disk=str(tmp_path / "states"))
    expected = encoder.encode(["a red circle"])
    (file,) = (tmp_path / "states").rglob("*.safetensors")
    content = file.read_bytes()
    changed = bytes([content[-1] ^ 1])
    file.write_bytes({"truncated": content[:-9], "flipped": content[:-1] + changed, "empty": b"", "another": b"x" * 99}[
        damage
    ])  # fmt: skip
    with pytest.warns(UserWarning, match=f"{file} is damaged: its prompt is encoded again"):
        assert equal(encoder.encode(["a red circle"]), expected)
    assert file.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(read_nothing(encoder).encode(["a red circle"]), expected)


@pytest.mark.behaviour(
    "Text encoders",
    when="the folder of cached states has reached text.keep_on_disk_bytes, or can no longer be written",
    then="one warning says so, nothing is added, and the run continues",
)
def test_a_full_folder(folder: Path, tmp_path: Path) -> None:
    settings = {"keep": "0", "keep_on_disk": str(tmp_path / "states")}
    encoder = load(folder, **settings, keep_on_disk_bytes="4kB")
    with pytest.warns(UserWarning, match="as many as text.keep_on_disk_bytes allows; no more are cached") as caught:
        encoder.encode(["red " * n for n in range(1, 12)])
    assert len(caught) == 1
    kept = list((tmp_path / "states").rglob("*.safetensors"))
    assert 1 <= len(kept) < 11
    assert sum(file.stat().st_size for file in kept) < 8000
    with pytest.raises(ValueError, match="cannot write"):
        load(folder, keep_on_disk=str(folder / "config.json"))
    disk = DiskStates(tmp_path / "gone", 10**6)
    (tmp_path / "gone").write_text("a file")
    with pytest.warns(UserWarning, match="cannot write .*; no more are cached there"):
        disk.put("abc", states(1.0))
    disk.put("abd", states(1.0))


def test_other_encoders_have_other_states(folder: Path, tmp_path: Path) -> None:
    """By weights, layers and type; a folder that only moved is the same."""
    settings = {"keep": "0", "keep_on_disk": str(tmp_path / "states")}
    expected = load(folder, **settings).encode(PROMPTS)
    for layers, own in (("1..2", slice(2)), ("2..3", slice(1, 3))):  # the second has the same weights
        assert torch.equal(load(folder, **settings, layers=layers).encode(PROMPTS).hidden, expected.hidden[own])
    assert load(folder, **settings, dtype="bfloat16").encode(PROMPTS).hidden.dtype == torch.bfloat16
    prefixed = load(folder, **settings, prefix="the ").encode(PROMPTS)
    assert equal(prefixed, load(folder, keep="0", prefix="the ").encode(PROMPTS))
    moved = folder.rename(tmp_path / "moved")
    assert equal(read_nothing(load(moved, **settings)).encode(PROMPTS), expected)
    encoder = load(moved)
    with torch.no_grad():
        next(encoder.model.layers[2].parameters()).add_(0.5)
    encoder.model.save_pretrained(moved)
    assert not torch.equal(load(moved, **settings).encode(PROMPTS).hidden[2], expected.hidden[2])


FILL = """
import sys
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder
encoder = TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=sys.argv[1], keep="0", keep_on_disk=sys.argv[2]))
print("ready", flush=True)
while True:
    for n in range(1, 40):
        encoder.encode(["red " * n, "blue " * n])
    if sys.argv[3] == "once":
        break
    import shutil; shutil.rmtree(sys.argv[2])
"""


@pytest.mark.behaviour(
    "Text encoders",
    when="several processes fill one folder of cached hidden states",
    then="each prompt is there once and complete",
)
def test_two_processes_fill_one_folder(folder: Path, tmp_path: Path) -> None:
    both = [Forked(FILL, (folder, tmp_path / "states", "once")) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len([*(tmp_path / "states").rglob("*.safetensors")]) == 78
    assert not [*(tmp_path / "states").rglob(".*")]
    encoder = read_nothing(load(folder, keep="0", keep_on_disk=str(tmp_path / "states")))
    plain = load(folder, keep="0")
    for n in (1, 16, 39):
        prompts = ["red " * n, "blue " * n]
        assert equal(encoder.encode(prompts), plain.encode(prompts))


@pytest.mark.behaviour(
    "Text encoders",
    when="a process is killed while it writes cached hidden states",
    then="each file is complete or absent, and other processes continue",
)
def test_killed_while_writing(folder: Path, tmp_path: Path) -> None:
    plain = load(folder, keep="0")
    for delay in (0.01, 0.05):
        process = Forked(FILL, (folder, tmp_path / "states", "again and again"))
        process.wait_for_output()
        time.sleep(delay)
        process.kill()
        encoder = load(folder, keep="0", keep_on_disk=str(tmp_path / "states"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for n in range(1, 40):
                assert equal(encoder.encode(["red " * n]), plain.encode(["red " * n]))
