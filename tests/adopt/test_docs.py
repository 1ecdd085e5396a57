"""The programs and commands of docs/adopt.md, run on tiny pipelines."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

import semantic_routing.adopt.training.run as run
import semantic_routing.cli.adopt as adopt_command
from semantic_routing.adopt.families import FAMILIES
from semantic_routing.adopt.training.open_pipeline import frozen
from semantic_routing.cli.main import main
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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in ("a cat", "two stars"):
        Image.new("RGB", (40, 40), "red").save(Path("photos", f"{name}.png"))
        Path("photos", f"{name}.txt").write_text(name)

    def opened(name: str, device: torch.device, precision: str = "auto") -> Any:
        torch.manual_seed(5)
        return frozen(pipeline("sana" if "Sana" in name else "z-image"))

    for module in (adopt_command, run):
        monkeypatch.setattr(module, "open_pipe", opened)
    small = {
        "train": ["--steps", "2", "--batch", "2", "--image-size", "16", "--device", "cpu"],
        "sample": ["--steps", "1", "--height", "32", "--width", "32", "--device", "cpu"],
    }
    lines = re.findall(r"^ {4}semroute (.*)$", PAGE, re.MULTILINE)
    for command in map(shlex.split, lines):
        extra = [] if "--resume" in command else small.get(command[1], [])
        lora = ["--lora.steps", "1"] if "--lora.rank" in command else []
        main([*command, *extra, *lora])
    assert len(lines) == 6
    assert Path("images/00000_00.png").is_file()
    assert Path("figures/counting/heatmap.png").is_file()
    found = {path.name for path in Path("routings/style").iterdir()}
    assert {"routing.safetensors", "README.md", "pytorch_lora_weights.safetensors", "metrics.jsonl"} <= found


def test_the_table_lists_all_families() -> None:
    assert {f"`{family.transformer}`" for family in FAMILIES.values()} <= set(re.findall(r"`\w+`", PAGE))
