"""Configurations: to JSON and back, with an error for every wrong key and value."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from semantic_routing.common.config import from_dict, nearest, read_config, to_dict
from semantic_routing.model.arms import PAPER_ARMS
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    pair: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    count: int = 1
    flag: bool = False
    kind: Literal["euler", "heun"] = "euler"
    maybe: float | None = None
    layers: str | tuple[int, ...] = "all"
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("arm", PAPER_ARMS)
def test_every_recipe_survives_json(recipe: str, arm: str, tmp_path: Path) -> None:
    cfg = RECIPES[recipe](arm)
    assert cfg.model.arm == arm
    (tmp_path / "config.json").write_text(json.dumps(to_dict(cfg)))
    assert read_config(TrainConfig, tmp_path / "config.json") == cfg


def test_values_come_back_in_their_types() -> None:
    cfg = Outer(name="a", count=3, flag=True, kind="heun", maybe=2.0, layers=(1, 5), inner=Inner(rate=1.0))
    assert from_dict(Outer, to_dict(cfg)) == cfg
    whole = from_dict(Outer, {"name": "a", "maybe": 2, "inner": {"rate": 1, "pair": [0, 1]}})
    assert (type(whole.maybe), type(whole.inner.rate)) == (float, float)  # JSON writes 2.0 as 2
    assert whole.inner.pair == (0.0, 1.0)
    assert whole.kind == "euler"  # missing keys keep their defaults


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuont": 1}, "unknown setting 'cuont'; did you mean 'count'"),
        ({"inner": {"rat": 1}}, "unknown setting 'inner.rat'; did you mean 'rate'"),
        ({"zzz": 1}, "unknown setting 'zzz'; known: name, count"),
        ({"count": 1.5}, "count is 1.5, which is not int"),
        ({"count": "1"}, "count is '1', which is not int"),
        ({"count": True}, "count is True, which is not int"),
        ({"flag": 1}, "flag is 1, which is not bool"),
        ({"flag": None}, "flag is None, which is not bool"),
        ({"name": 3}, "name is 3, which is not str"),
        ({"maybe": "x"}, r"maybe is 'x', which is not float \| None"),
        ({"maybe": False}, "maybe is False"),
        ({"layers": [1, "2"]}, "layers is"),
        ({"kind": "huen"}, "kind is 'huen'; did you mean 'heun'"),
        ({"kind": ["heun"]}, "kind is"),
        ({"inner": {"pair": [0.9]}}, r"inner.pair is \[0.9\]; it must have 2 entries"),
        ({"inner": {"pair": [1, "x"]}}, "inner.pair is 'x', which is not float"),
        ({"inner": 3}, "inner must be an object of settings, not 3"),
    ],
)
def test_wrong_keys_and_types_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(Outer, {"name": "a"} | values)


def test_a_key_without_default_must_be_there() -> None:
    with pytest.raises(ValueError, match="'name' is missing and has no default"):
        from_dict(Outer, {"count": 1})
    with pytest.raises(ValueError, match=r"'text\.name_or_path' is missing"):
        from_dict(TrainConfig, {"text": {"dtype": "float32"}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no configuration file"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "Outer must be an object of settings"),
    ],
)
def test_files_that_hold_no_configuration(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_config(Outer, tmp_path / "c.json")


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        read_config(Outer, tmp_path)


def test_nearest() -> None:
    assert nearest("dept", ["time", "depth"]) == "did you mean 'depth'?"
    assert nearest("", ["time", "depth"]) == "known: time, depth"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": -5}, "steps is -5"),
        ({"batch": 0}, "batch is 0"),
        ({"keep": 0}, "keep is 0"),
        ({"ema_every": 0}, "ema_every is 0"),
        ({"preview_every": -1}, "preview_every is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"prompt_dropout": 1.5}, "prompt_dropout is 1.5"),
        ({"ema_decay": -0.1}, "ema_decay is -0.1"),
        ({"time": {"std": -1.0}}, "std -1.0"),
        ({"optim": {"lr": -1}}, "lr is -1.0"),
        ({"optim": {"lr": float("nan")}}, "lr is nan"),
        ({"optim": {"router_lr": -1}}, "router_lr is -1.0"),
        ({"optim": {"clip": 0}}, "clip is 0.0"),
        ({"optim": {"betas": [0.9, 1.0]}}, "betas"),
        ({"preview": {"steps": 0}}, "steps is 0; sampling needs at least 1"),
        ({"preview": {"batch": 0}}, "batch is 0"),
        ({"preview": {"shift": 0}}, "shift is 0.0"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, change)
