"""Linear probes of tasks, and the command on a tiny language model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from semantic_routing.analysis.probing.classify import cross_validate
from semantic_routing.analysis.probing.tasks import color_word_task, toy_tasks, world_tasks
from semantic_routing.cli.main import main
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.toy.words.lexicon import words


def test_a_probe_finds_linear_classes_and_guesses_on_noise() -> None:
    answers = np.arange(300) % 3
    x = torch.randn(300, 20)
    anything = np.ones((300, 3), bool)
    guess = cross_validate(x, answers, anything, seed=0)
    assert abs(guess.mean - 1 / 3) < 4 * guess.error
    x[torch.arange(300), torch.from_numpy(answers)] += 8
    assert cross_validate(x, answers, anything, seed=0).mean > 0.97
    only = np.zeros((300, 3), bool)
    only[np.arange(300), answers] = True
    assert cross_validate(torch.randn(300, 20), answers, only, seed=0).mean == 1


def test_tasks_read_the_words_that_they_name() -> None:
    tasks = {task.name: task for task in toy_tasks(40, seed=0)}
    assert list(tasks) == [
        "color", "shape", "count", "relation", "color of the first object", "color of the second object",
    ]  # fmt: skip
    task = tasks["shape"]
    for prompt, answer, end in zip(task.prompts, task.answers, task.ends["noun"], strict=True):
        assert prompt[:end].endswith(answer)
    task = tasks["color of the second object"]
    for prompt, answer, choice in zip(task.prompts, task.answers, task.choices, strict=True):
        assert answer == choice[1]
        assert all(color in prompt for color in choice)
    assert (task.chance, tasks["relation"].chance) == (0.5, 0.25)
    unseen = color_word_task()
    assert len(set(unseen.prompts)) == len(unseen.prompts) == 160
    assert unseen.chance == 0.125


@pytest.mark.parametrize("seed", [0, 1])
def test_tasks_of_the_world_of_words_read_names_of_their_answers(seed: int) -> None:
    tasks = {task.name: task for task in world_tasks("words", 150, seed)}
    assert list(tasks) == [
        "color", "shape", "count", "relation", "color of the first object", "color of the second object",
        "color of unseen things", "shape of unseen names",
    ]  # fmt: skip
    for task in tasks.values():
        assert len(set(task.prompts)) == len(task.prompts) >= 150
        assert len(task.answers) == len(task.prompts)
        assert len(set(task.answers)) >= 3
        assert all(len(ends) == len(task.prompts) for ends in task.ends.values())
    task, names = tasks["shape"], [(word.text, word.reading) for word in words("shapes")]
    for prompt, answer, end in zip(task.prompts, task.answers, task.ends["noun"], strict=True):
        assert any(prompt[:end].endswith(name) for name, reading in names if reading == answer)
    binding = [tasks[f"color of the {which} object"] for which in ("first", "second")]
    for first, second, choice in zip(binding[0].answers, binding[1].answers, binding[0].choices, strict=True):
        assert (first, second) == choice


def test_a_token_is_found_by_its_characters(tiny_encoder: Path) -> None:
    encoder = TextEncoder.from_pretrained(tiny_encoder)
    prompt = "a red circle above a blue star"
    ids = encoder.tokenizer(prompt)["input_ids"]
    for word in ("red", "circle", "star"):
        token = encoder.position(prompt, prompt.index(word) + len(word))
        assert word.endswith(encoder.tokenizer.decode([ids[token]]).strip())


def test_the_command_writes_a_page_numbers_and_figures(tiny_encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "probe"
    main(["probe", str(tiny_encoder), "--out", str(out), "--tokens", "600", "--captions", "50", "--device", "cpu"])
    found = json.loads((out / "probe.json").read_text())
    assert found["layers"] == [1, 2]
    assert len(found["r2_from_average"]) == 2
    assert max(found["r2_from_average"]) <= 1
    assert found["verdict"].startswith("The average of the 2 layers loses up to ")
    assert {row["task"] for row in found["accuracy"]} >= {"color", "count", "color of unseen words"}
    assert "<svg" in (out / "index.html").read_text()
    assert (out / "predicted.csv").is_file()
    assert (out / "manifest.json").is_file()


@pytest.mark.usefixtures("unchecked")
def test_one_layer_is_refused(tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["probe", str(tiny_encoder), "--out", str(tmp_path / "x"), "--layers", "2", "--no-tasks"])
    assert ended.value.code == 2
    assert "at least 2" in capsys.readouterr().err
