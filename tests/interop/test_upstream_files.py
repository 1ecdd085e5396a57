"""Files of reference checkpoints: every layout, damage, code in pickles, memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from semantic_routing.checkpoint.foreign import read_upstream
from semantic_routing.interop.upstream import (
    from_upstream,
    load_upstream,
    to_upstream,
    upstream_config,
    upstream_forward,
)
from tests.helpers.reference import CONFIG, Weights, random_inputs, random_weights


def as_safetensors(weights: Weights, folder: Path) -> Path:
    save_file(weights, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_shards(weights: Weights, folder: Path, suffix: str, save: Callable[[Weights, Path], None]) -> Path:
    names = sorted(weights)
    places = {name: f"model-{i % 3}{suffix}" for i, name in enumerate(names)}
    for file in set(places.values()):
        save({name: weights[name] for name in names if places[name] == file}, folder / file)
    (folder / f"model{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def as_safetensors_shards(weights: Weights, folder: Path) -> Path:
    return as_shards(weights, folder, ".safetensors", save_file)


def as_torch_shards(weights: Weights, folder: Path) -> Path:
    return as_shards(weights, folder, ".bin", torch.save)


def as_torch_file(weights: Weights, folder: Path) -> Path:
    torch.save({f"_orig_mod.{name}": x for name, x in weights.items()}, folder / "weights.pth")
    return folder / "weights.pth"


def as_deepspeed(weights: Weights, folder: Path) -> Path:
    (folder / "pytorch_model").mkdir()
    (folder / "scheduler.bin").write_bytes(b"")
    state = {"module": {f"module.{name}": x for name, x in weights.items()}, "ds_config": {"a": 1}, "step": 3}
    torch.save(state, folder / "pytorch_model" / "mp_rank_00_model_states.pt")
    return folder


def as_deepspeed_itself(weights: Weights, folder: Path) -> Path:
    """Write the layout of DeepSpeed itself, with other states beside the weights."""
    state = {
        "module": OrderedDict((f"module.{name}", x) for name, x in weights.items()),
        "optimizer": None,
        "param_shapes": [OrderedDict((name, x.shape) for name, x in weights.items())],
        "sparse_tensor_module_names": set(),
        "lr_scheduler": {"base_lrs": [1e-4], "last_epoch": 5},
    }
    (folder / "global_step5").mkdir()
    torch.save(state, folder / "global_step5" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step5")
    return folder


def as_accelerate(weights: Weights, folder: Path) -> Path:
    save_file(weights, folder / "model.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    torch.save({}, folder / "optimizer.bin")
    return folder


@pytest.mark.parametrize("arm", ["joint", "fusedit"])
@pytest.mark.parametrize(
    "write",
    [
        as_safetensors,
        as_safetensors_shards,
        as_torch_shards,
        as_torch_file,
        as_deepspeed,
        as_deepspeed_itself,
        as_accelerate,
    ],
)
def test_every_layout_loads(tmp_path: Path, write: Callable[[Weights, Path], Path], arm: str) -> None:
    weights = random_weights(CONFIG, arm)
    expected = from_upstream(weights, CONFIG, arm).state_dict()
    loaded = load_upstream(write(weights, tmp_path), CONFIG, arm).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], x) for name, x in expected.items())


@pytest.mark.parametrize("prefix", ["module.", "transformer.", "dit.", "module._orig_mod.", "model.module."])
def test_a_prefix_of_all_names_is_removed(prefix: str) -> None:
    weights = random_weights(CONFIG, "static")
    model = from_upstream({f"{prefix}{name}": x for name, x in weights.items()}, CONFIG, "static")
    expected = from_upstream(weights, CONFIG, "static").state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    some = {f"{prefix}{name}" if name == "norm_out.weight" else name: x for name, x in weights.items()}
    with pytest.raises(ValueError, match=rf"not in the checkpoint \(norm_out.weight\).*\({prefix}norm_out.weight\)"):
        from_upstream(some, CONFIG, "static")


def test_written_weights_can_be_loaded(tmp_path: Path) -> None:
    model = from_upstream(random_weights(CONFIG, "time"), CONFIG, "time")
    save_file(to_upstream(model), tmp_path / "model.safetensors")
    again = load_upstream(tmp_path, upstream_config(model), "time")
    inputs = random_inputs(CONFIG, "time", 4, 4)
    torch.testing.assert_close(upstream_forward(again, **inputs), upstream_forward(model, **inputs))


PEAK = """
import json, sys
from pathlib import Path
import torch
from semantic_routing.interop.upstream import load_upstream
from semantic_routing.model.dit import DiTConfig
from semantic_routing.model.build import make_model

def status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024

src, config = Path(sys.argv[1]), json.loads(sys.argv[2])
with torch.device("meta"):
    make_model(DiTConfig(depth=1))  # imports of torch for its meta device are not measured
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
model = load_upstream(src, config, "depth")
size = sum(p.numel() * p.element_size() for p in model.parameters())
sys.stdout.write(f"{(status('VmHWM') - before) / size}")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory through Linux's /proc")
@pytest.mark.parametrize("write", [as_safetensors_shards, as_safetensors, as_torch_file])
def test_peak_memory_is_that_of_the_model(tmp_path: Path, write: Callable[[Weights, Path], Path]) -> None:
    config = CONFIG | {"depth": 24, "hidden_size": 384, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
    config |= {"text_hidden_size": 256}
    src = write(random_weights(config, "depth"), tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", PEAK, src, json.dumps(config)], check=True, capture_output=True, text=True
    )
    assert 0.9 < float(run.stdout) < 1.15


class Runs:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "weights.pt", tmp_path / "ran"
    torch.save({"w": Runs(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_upstream(path, CONFIG, "depth")
    assert not marker.exists()


def with_changed_pickle(folder: Path) -> bytes:
    """Return a torch file with a changed pickle."""
    torch.save({"w": torch.zeros(2)}, folder / "good.pt")
    return (folder / "good.pt").read_bytes().replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v2"[::-1])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = as_safetensors(random_weights(CONFIG, "static"), tmp_path)
    data = whole.read_bytes()
    for name, content in {
        "short.safetensors": data[:-100],
        "header.safetensors": data[:8] + b"!" + data[9:],
        "empty.safetensors": b"",
        "short.pt": b"PK\x03\x04" + data[:50],
        "empty.pt": b"",
        "model.safetensors.index.json": b"{]",
        "pickle.pt": with_changed_pickle(tmp_path),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(name)):
            load_upstream(path, CONFIG, "static")


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    as_safetensors_shards(random_weights(CONFIG, "static"), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    places.pop("norm_out.weight")
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"norm_out.weight"):
        load_upstream(tmp_path, CONFIG, "static")
    (tmp_path / "model-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no checkpoint .*model-0.safetensors"):
        load_upstream(tmp_path, CONFIG, "static")


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", ".", "a/b.safetensors"])
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, file: str) -> None:
    index = tmp_path / "inner" / "model.safetensors.index.json"
    index.parent.mkdir()
    as_safetensors(random_weights(CONFIG, "static"), tmp_path)
    index.write_text(json.dumps({"weight_map": {"norm_out.weight": file}}))
    with pytest.raises(ValueError, match=re.escape(f"names {file!r}, which is not a file beside it")):
        load_upstream(tmp_path / "inner", CONFIG, "static")


def test_an_index_that_names_itself_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm_out.weight": index.name}}))
    with pytest.raises(ValueError, match=re.escape(index.name)):
        load_upstream(tmp_path, CONFIG, "static")


def test_folders_without_exactly_one_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        read_upstream(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"name one of \['a.safetensors', 'b.safetensors'\]"):
        read_upstream(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_upstream(tmp_path / "list.pt")
