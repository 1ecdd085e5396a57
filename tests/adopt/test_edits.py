"""Edits of an adopted routing: what they change, for how long, and their file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from semantic_routing.adopt.edits import NO_EDITS, RoutingEdits, read_edits
from semantic_routing.adopt.facts import Facts
from semantic_routing.adopt.file import save_routing
from semantic_routing.adopt.routing import Routing
from semantic_routing.adopt.table import row_names
from semantic_routing.cli.main import main
from semantic_routing.model.override import RoutingOverride

ROW = RoutingOverride(("block 1",), ((0.0, 0.5, 0.5, 0.0),))
WHOLE = RoutingEdits(override=ROW, gains=((1, 0.0), (2, 2.0)), scale=0.5)


def facts(arm: str = "depth") -> Facts:
    """Return the facts of a routing of two blocks over three layers."""
    return Facts(
        family="sana", transformer="SanaTransformer2DModel", blocks=2, encoder="Gemma2Model", width=16, layers=3,
        origin="last_hidden_state", arm=arm, weights="simplex",
    )  # fmt: skip


def test_rows_are_replaced_before_gains() -> None:
    weights = torch.tensor([[[0.2, 0.5, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    changed = WHOLE.of_weights(row_names(facts()))(weights.clone())
    torch.testing.assert_close(changed, torch.tensor([[[0.4, 0.0, 0.6, 0.0], [0.0, 0.0, 1.0, 0.0]]]))
    assert torch.equal(NO_EDITS.of_weights(row_names(facts()))(weights.clone()), weights)


def test_a_routing_is_edited_while_the_context_lasts() -> None:
    routing = Routing(facts()).eval()
    routing.scale = 3.0
    before, key = routing.change(None)[0], routing.key()
    with WHOLE.on(routing):
        inside, _ = routing.change(None)
        assert routing.scale == 1.5
        assert routing.key() != key, "texts of the routing without its edits are not used"
    torch.testing.assert_close(inside, 1.5 * torch.tensor([[[0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 1.0, 0.0]]]))
    assert (routing.scale, routing.key()) == (3.0, key)
    assert torch.equal(routing.change(None)[0], before)


@pytest.mark.parametrize("edits", [NO_EDITS, WHOLE, RoutingEdits(override=ROW), RoutingEdits(gains=((3, 0.0),))])
def test_a_file_holds_what_is_edited(edits: RoutingEdits, tmp_path: Path) -> None:
    save_routing(facts(), Routing(facts()).state_dict(), tmp_path)
    (tmp_path / "edits.json").write_text(json.dumps(edits.to_json()))
    assert read_edits(tmp_path / "edits.json", tmp_path) == edits
    assert set(NO_EDITS.to_json()) == set()


@pytest.mark.behaviour(
    "Adopting a model",
    when="a file of edits has unknown keys or values, or is for a routing of other rows or layers",
    then="one line names the file and what is wrong with it, before the pipeline is loaded",
)
@pytest.mark.parametrize(
    ("arm", "data", "message"),
    [
        ("depth", [], "expected an object such as"),
        ("depth", {"gain": {"1": 0.5}}, r"unknown key 'gain'; did you mean"),
        ("depth", {"rows": ["block 0"]}, "expected .*weights"),
        ("depth", {"gains": {"first": 0.5}}, "must be an object of layers and factors"),
        ("depth", {"gains": {"0": 0.5}}, "gains are for layers from 1 on"),
        ("depth", {"gains": {"1": -0.5}}, "gains must be finite numbers of at least 0"),
        ("depth", {"gains": {"4": 0.5}}, "there is a gain of layer 4, but the routing has 3 layers"),
        ("depth", {"scale": "1"}, '"scale" and all "gains" must be numbers'),
        ("depth", {"scale": float("nan")}, "the scale is nan; it must be a finite number"),
        ("depth", {"rows": ["block 2"], "weights": [[1, 0, 0, 0]]}, r"has no row 'block 2'; did you mean"),
        ("depth", {"rows": ["block 1"], "weights": [[1, 0, 0]]}, "rows have 3 weights, but the routing mixes 4 states"),
        ("reinject", {"gains": {"1": 0.5}}, "arm 'reinject' has no weights to edit"),
    ],
)
def test_bad_files(arm: str, data: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_routing(facts(arm), Routing(facts(arm)).state_dict(), tmp_path)
    file = tmp_path / "edits.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        read_edits(file, tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    command = f"adopt sample no-pipeline --routing {tmp_path} --edits {file} --prompt x --out {tmp_path}/images"
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert end.value.code == 2
    assert str(file) in capsys.readouterr().err


def test_edits_without_their_routing(capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        ("--edits edits.json", "edits.json holds edits of a routing: give the routing, too, with --routing"),
        ("--routing edits.json", "--routing is a routing's folder or file: give its edits as --edits edits.json"),
    ):
        with pytest.raises(SystemExit) as end:
            main(f"adopt sample no-pipeline {given} --prompt x --out images".split())
        assert end.value.code == 2
        assert message in capsys.readouterr().err
