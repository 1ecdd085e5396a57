"""States in plain safetensors files, single or in parts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from semantic_routing.checkpoint.load import read_tensors
from semantic_routing.checkpoint.safetensors_storage import (
    OFFSET,
    PLACES,
    SHAPE,
    SafetensorsReader,
    SafetensorsWriter,
    alone,
    part_name,
    parts_of,
)

WHOLE = {
    "rows": torch.arange(12.0).reshape(4, 3),
    "square": torch.arange(16).reshape(4, 4),
    "small": torch.ones(1, 2, dtype=torch.bfloat16),
    "number": torch.tensor(3.0),
    "none": torch.ones(0, 2),
}


def write(folder: Path) -> None:
    """Write ``WHOLE`` in two parts of the file "model", as two processes would."""
    pieces = [
        {
            "rows": ((0, 0), WHOLE["rows"][:3]),
            "square": ((0, 0), WHOLE["square"][:, :1]),
            "number": ((), WHOLE["number"]),
            "none": ((0, 0), WHOLE["none"]),
        },
        {
            "rows": ((3, 0), WHOLE["rows"][3:]),
            "square": ((0, 1), WHOLE["square"][:, 1:]),
            "small": ((0, 0), WHOLE["small"]),
        },
    ]
    for part, held in enumerate(pieces, 1):
        places = {name: {OFFSET: list(at), SHAPE: list(WHOLE[name].shape)} for name, (at, _) in held.items()}
        tensors = {name: piece.contiguous() for name, (_, piece) in held.items()}
        save_file(tensors, folder / part_name("model", part, 2), {PLACES: json.dumps(places)})


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_one_process_writes_files_that_any_program_reads(tmp_path: Path) -> None:
    noted: list[list[str]] = []

    class Writer(SafetensorsWriter):
        def begin(self) -> None:
            noted.append(os.listdir(tmp_path))

        def end(self, files: list[str]) -> None:
            noted.append(files)
            assert sorted(os.listdir(tmp_path)) == files

    alone()
    dcp.save({"model": WHOLE, "other": {"x.y": torch.ones(2)}}, storage_writer=Writer(tmp_path), no_dist=True)
    assert noted == [[], ["model.safetensors", "other.safetensors"]]
    assert_same(load_file(tmp_path / "model.safetensors"), WHOLE)
    assert_same(load_file(tmp_path / "other.safetensors"), {"x.y": torch.ones(2)})
    assert_same(SafetensorsReader(tmp_path, ["other"]).tensors(), {"other.x.y": torch.ones(2)})


def test_parts_are_joined(tmp_path: Path) -> None:
    write(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model-other.safetensors")
    assert [path.name for path in parts_of(tmp_path / "model.safetensors")] == [
        part_name("model", i, 2) for i in (1, 2)
    ]
    assert_same(read_tensors(tmp_path / "model.safetensors"), WHOLE)
    assert_same(read_tensors(tmp_path / "model.safetensors", "s"), {name: WHOLE[name] for name in ("square", "small")})


def test_a_process_reads_the_slices_it_needs(tmp_path: Path) -> None:
    """A tensor of one process is in two parts of others."""
    write(tmp_path)
    state = {"model": {"rows": torch.zeros(4, 3), "number": torch.zeros(())}}
    alone()
    dcp.load(state, storage_reader=SafetensorsReader(tmp_path, ["model"]), no_dist=True)
    assert_same(state["model"], {name: WHOLE[name] for name in ("rows", "number")})


def test_torch_reads_the_parts(tmp_path: Path) -> None:
    write(tmp_path)
    found = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items() if tensor.numel()}
    alone()
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert_same(found, {name: tensor for name, tensor in WHOLE.items() if tensor.numel()})


@pytest.mark.parametrize("part", [1, 2])
def test_a_missing_part_is_refused(tmp_path: Path, part: int) -> None:
    write(tmp_path)
    (tmp_path / part_name("model", part, 2)).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors lacks parts of model\.(rows|square)"):
        read_tensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", lambda data: b"x"]
)
def test_a_damaged_part_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    write(tmp_path)
    path = tmp_path / part_name("model", 2, 2)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name} is damaged or not a safetensors file"):
        read_tensors(tmp_path / "model.safetensors")


def test_nothing_but_tensors_is_written(tmp_path: Path) -> None:
    alone()
    with pytest.raises(dcp.CheckpointException, match=r"model\.step is not a tensor"):
        dcp.save({"model": {"step": 3}}, storage_writer=SafetensorsWriter(tmp_path), no_dist=True)
    assert os.listdir(tmp_path) == []
