"""Clocks: Eq. 11 at known times, and interpolated calibrations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from semantic_routing.sampling.clock import parse_clock, shifted, tabulated


def test_the_papers_shift_at_known_times() -> None:
    t = torch.tensor([0.0, 0.1, 0.2, 0.6, 0.9, 1.0])
    # 1 - cos is 0 at t = 0.2, 1 halfway to 1, 2 at 1.
    expected = torch.tensor([0.0, 0.1, 0.2, 0.61, 0.9 + 0.01 * (1 - torch.cos(torch.tensor(torch.pi * 0.875))), 1.0])
    torch.testing.assert_close(shifted(t), expected)
    assert (shifted(torch.linspace(0, 1, 1001)).diff() >= 0).all()


def test_a_shift_of_any_size_and_start() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    # The shift starts at t = 0.5 and reaches half of its size at t = 0.75.
    torch.testing.assert_close(shifted(t, 0.1, 0.5), torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0]))
    torch.testing.assert_close(shifted(t, -0.1, 0.5), torch.tensor([0.0, 0.25, 0.5, 0.7, 0.9]))
    assert torch.equal(shifted(t, 0.0), t)
    for size in (1.0, -1.0):
        gate = shifted(torch.linspace(0, 1, 101), size, 0.0)
        assert float(gate.min()) >= 0
        assert float(gate.max()) <= 1


def test_a_calibration_is_interpolated_linearly() -> None:
    clock = tabulated(torch.tensor([0.0, 0.5, 0.75]), torch.tensor([0.0, 0.7, 0.9]))
    t = torch.tensor([0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0])
    expected = torch.tensor([0.0, 0.35, 0.7, 0.8, 0.9, 0.95, 1.0])
    torch.testing.assert_close(clock(t), expected)
    assert clock(t).dtype == torch.float32


def test_clocks_by_name_and_by_file(tmp_path: Path) -> None:
    assert parse_clock("nominal") is None
    assert parse_clock("shifted") is shifted
    t = torch.linspace(0, 1, 21)
    for name, gate in (("shifted:0.05", shifted(t, 0.05)), ("shifted:-0.1:0", shifted(t, -0.1, 0.0))):
        clock = parse_clock(name)
        assert clock is not None
        assert torch.equal(clock(t), gate)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"times": [0.0, 0.5], "effective": [0.0, 0.6], "steps": 2}))
    clock = parse_clock(str(path))
    assert clock is not None
    assert float(clock(torch.tensor([0.5]))) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"times": [0.5]}',
        '{"times": [], "effective": []}',
        '{"times": [0.5, 0.4], "effective": [0.1, 0.2]}',
        '{"times": [0.4, 0.5], "effective": [0.1]}',
        '{"times": [0.4], "effective": [1.2]}',
        '{"times": [0.4], "effective": ["x"]}',
        '{"times": [NaN], "effective": [0.5]}',
    ],
)
def test_a_file_that_is_not_a_calibration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json is not a calibration"):
        parse_clock(str(path))


def test_an_unknown_clock_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown clock 'shfited': use nominal, shifted, shifted:SIZE or"):
        parse_clock("shfited")


@pytest.mark.parametrize(
    "name",
    ["shifted:", "shifted:x", "shifted:0.1:0.2:0.3", "shifted:nan", "shifted:1.5", "shifted:0:1", "shifted:0:-1"],
)
def test_a_name_that_is_not_a_shift_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not a shift: give a size from -1 to 1 and optionally a start"):
        parse_clock(name)
