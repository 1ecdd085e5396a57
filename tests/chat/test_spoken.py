"""What answers say: not what is thought, nor what is cut off."""

from __future__ import annotations

import pytest

from semantic_routing.chat.messages import Answer, Failure
from semantic_routing.chat.spoken import FirstAnswers, spoken


def answer(text: str, finish: str = "stop", *, thought: bool = False) -> Answer:
    return Answer(
        text=text, logprobs=None, model="m", finish=finish, prompt_tokens=1, completion_tokens=1, thought=thought
    )


@pytest.mark.parametrize(
    "text",
    [
        "A red cup.",
        "  A red cup.\n",
        "<think>Is it blue? No.</think>\n\nA red cup.",
        "<think>\n\n</think>A red cup.",
        "Is it blue? No.</think>A red cup.",
        "<Thinking>blue</Thinking><answer>A red cup.</answer>",
        "<seed:think>blue</seed:think>A red cup.",
        "[THINK]blue[/THINK]A red cup.",
        "\u25c1think\u25b7blue\u25c1/think\u25b7A red cup.",
        "<|channel|>analysis<|message|>blue<|end|><|start|>assistant<|channel|>final<|message|>A red cup.<|return|>",
        "<think>blue</think><think>green</think>A red cup.",
    ],
)
def test_thoughts_are_left_out(text: str) -> None:
    assert spoken(answer(text)) == "A red cup."


@pytest.mark.parametrize("finish", ["", "stop", "STOP", "eos_token", "stop_sequence", "end_turn"])
def test_whole_answers(finish: str) -> None:
    assert spoken(answer("A red cup.", finish)) == "A red cup."


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (answer("A red", "length"), "cut off"),
        (answer("A red", "MAX_TOKENS"), "cut off"),
        (answer("A red", "model_length"), "cut off"),
        (answer("<think>A red cup? Or", "length"), "cut off"),
        (answer("", "length", thought=True), "cut off"),
        (answer("A red", "content_filter"), "stopped"),
        (answer("A red", "abort"), "stopped"),
        (answer("", "refusal"), "stopped"),
        (answer("<think>A red cup? Or"), "thoughts without an answer"),
        (answer("<think>A red cup.</think> "), "thoughts without an answer"),
        (answer("", thought=True), "thoughts without an answer"),
        (answer(" \n"), "empty answer"),
    ],
)
def test_answers_that_say_nothing_whole(said: Answer, reason: str) -> None:
    found = spoken(said)
    assert isinstance(found, Failure)
    assert found.reason == reason


def test_a_line_is_said_once_where_most_of_the_first_answers_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    first = FirstAnswers({"cut off": "longer answers", "": "another model"})
    for reason in ("cut off", "", "cut off: A red"):
        first.note(reason)
    assert capsys.readouterr().err == ""
    for reason in ("cut off", "cut off", "odd"):
        first.note(reason)
    assert capsys.readouterr().err == "semroute: 3 of the first 4 answers cannot be used (cut off); longer answers\n"
    other = FirstAnswers({"": "another model"})
    for reason in ("", "", "", "odd", "odd", "odd"):
        other.note(reason)
    assert capsys.readouterr().err == ""
    other.note("odd")
    assert capsys.readouterr().err.endswith("(odd); another model\n")
