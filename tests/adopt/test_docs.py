"""The programs of docs/adopt.md, run on tiny pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from semantic_routing.adopt.families import FAMILIES
from tests.helpers.adoptable_pipelines import pipeline

PAGE = (Path(__file__).parents[2] / "docs/adopt.md").read_text(encoding="utf-8")
SMALL = {"Sana": {"height": 32, "width": 32, "use_resolution_binning": False}, "ZImage": {"height": 16, "width": 16}}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_programs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, options in SMALL.items():
        cls = getattr(diffusers, f"{name}Pipeline")
        call = cls.__call__

        def small(self: Any, prompt: str, call: Any = call, options: Any = options) -> Any:
            extra = {"complex_human_instruction": None} if "Sana" in type(self).__name__ else {}
            return call(self, prompt, num_inference_steps=1, **options, **extra)

        made = {"Sana": "sana", "ZImage": "z-image"}[name]
        monkeypatch.setattr(cls, "__call__", small)
        monkeypatch.setattr(cls, "from_pretrained", lambda hub, made=made: pipeline(made))
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        torch.manual_seed(0)
        exec(block, names)
    assert (tmp_path / "adapters/counting/routing.safetensors").stat().st_size < 20_000
    assert "load_routing" in (tmp_path / "adapters/counting/README.md").read_text()


def test_the_table_lists_all_families() -> None:
    assert {f"`{family.transformer}`" for family in FAMILIES.values()} <= set(re.findall(r"`\w+`", PAGE))
