"""Commands that write to one folder at the same time, and the user's own files in such folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from semantic_routing.chat.cache import AnswerCache
from semantic_routing.chat.messages import Answer
from semantic_routing.cli.main import main
from semantic_routing.common.locks import LOCK, claimed

COMMANDS = {
    "sample RUN --prompt a --steps 1 --out out": f"out/{LOCK}",
    "evaluate shapes --model RUN --steps 1 --n 11 --out out": f"out/{LOCK}",
    "data index photos --out out": f"out/{LOCK}",
    "export RUN --out out": f".out{LOCK}",
    "quickstart --steps 1 --out out": "out/.quickstart.lock",
    "study toy --arms B1 B2 --steps 1 --n 11 --out out": f"out/{LOCK}",
    "train toy --steps 1 --out out": f"out/{LOCK}",
}
"""Command and the lock that it holds."""


@pytest.mark.behaviour(
    "Surroundings",
    when="two commands write to one folder: sample, evaluate, data index, export, quickstart, study or train",
    then="the second ends with one line that names host and process of the first",
)
@pytest.mark.parametrize("typed", COMMANDS)
def test_a_second_command_into_a_folder_is_refused(
    typed: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.new("RGB", (9, 9)).save("photos/1.png")
    lock = Path(COMMANDS[typed])
    with claimed(lock, "it"):
        with pytest.raises(SystemExit) as end:
            main(typed.replace("RUN", str(tiny_run)).split())
        assert end.value.code == 2
        assert f"semroute: out is in use: process {os.getpid()} on host " in capsys.readouterr().err
        left = [path for path in tmp_path.rglob("*") if not path.name.endswith(LOCK)]
        assert {path.name for path in left} <= {"photos", "1.png", "out"}


def test_prompts_in_the_folder_of_images_are_not_replaced(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle", "note": "mine"}\n')
    with pytest.raises(SystemExit):
        main(["sample", str(tiny_run), "--prompts", str(prompts), "--steps", "1", "--out", str(tmp_path)])
    assert "choose another --out" in capsys.readouterr().err
    assert {path.name: '"mine"' in path.read_text() for path in tmp_path.iterdir()} == {"prompts.jsonl": True}


def test_a_contact_sheet_never_replaces_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "1.png")
    (tmp_path / "photos" / "1.txt").write_text("a picture")
    with pytest.raises(SystemExit):
        main(["data", "preview", str(tmp_path / "photos"), "--count", "1", "--out", str(tmp_path / "photos")])
    assert "photos: Is a directory" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["1.png", "1.txt", "photos"]


def test_cached_answers_are_deleted_and_other_files_stay(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "answers")
    answer = Answer(text="a cat", logprobs=None, model="m", finish="stop", prompt_tokens=1, completion_tokens=1)
    for name in ("ab" * 32, "cd" * 32):
        cache.put(name, {}, answer)
    (tmp_path / "answers" / "ab" / "best.json").write_text("mine")
    cache.clear()
    assert [path.name for path in (tmp_path / "answers").rglob("*")] == ["ab", "best.json"]
    (tmp_path / "answers" / "ab" / "best.json").unlink()
    cache.clear()
    assert list(tmp_path.iterdir()) == []
