"""Replies in the dialects of OpenAI's protocol: what is the same in other words is read the same."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from semantic_routing.chat.replies import read_answer, word
from semantic_routing.evaluation.judges.vqascore import p_yes


def reply(content: Any = "Yes", logprobs: Any = None, usage: Any = None, **message: Any) -> str:
    """A reply's body."""
    choice = {"message": {"role": "assistant", "content": content, **message}, "logprobs": logprobs}
    return json.dumps({"choices": [choice], "usage": usage})


def rows(*likely: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    """Log-probabilities of a first token as OpenAI tells them."""
    told = [{"token": token, "logprob": value} | more for token, value in likely]
    return {"content": [told[0] | {"top_logprobs": told}]}


@pytest.mark.behaviour(
    "Judges and scores",
    when="an OpenAI-compatible server answers with parts, null or an older field instead of a text",
    then="its text is read; reasoning among the parts or in separate fields is left out",
)
@pytest.mark.parametrize(
    ("message", "text", "thought"),
    [
        ({"content": "four"}, "four", False),
        ({"content": [{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}]}, "four", False),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                      {"type": "text", "text": "four"}]}, "four", True),
        ({"content": [{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "four"}]}, "four", True),
        ({"content": [{"text": "hm", "thought": True}, {"text": "four", "thought": False}]}, "four", True),
        ({"content": ["four"]}, "four", False),
        ({"content": {"type": "text", "text": {"value": "four"}}}, "four", False),
        ({"content": [{"type": "thinking", "thinking": "hm"}]}, "", True),
        ({"content": "four", "reasoning_content": "hm"}, "four", True),
        ({"content": None, "reasoning": "hm"}, "", True),
        ({"content": "four", "reasoning_content": "\n\n", "reasoning_details": []}, "four", False),
        ({"content": "four", "usage": {"completion_tokens_details": {"reasoning_tokens": 64}}}, "four", True),
        ({"content": "four", "usage": {"completion_tokens_details": {"reasoning_tokens": 0}}}, "four", False),
    ],
)  # fmt: skip
def test_contents(message: dict[str, Any], text: str, thought: bool) -> None:
    answer = read_answer(reply(**message))
    assert (answer.text, answer.thought) == (text, thought)


def test_frames_of_a_reply() -> None:
    """A byte order mark, a text where others have a message, no usage, a refusal."""
    assert read_answer("\ufeff" + reply("four")).text == "four"
    assert read_answer('{"choices": [{"text": "four", "finish_reason": "stop"}]}').text == "four"
    assert read_answer(reply(None, refusal="I cannot help with that.")).finish == "refusal"


@pytest.mark.behaviour(
    "Judges and scores",
    when="a server returns tokens in its tokenizer's notation, as bytes or in quotes, or the older form of logprobs",
    then="yes and no are still found",
)
@pytest.mark.parametrize(
    "logprobs",
    [
        rows(("Yes", -0.7), ("No", -0.75)),
        rows(("\u2581Yes", -0.7), ("\u2581No", -0.75)),
        rows(("\u0120Yes", -0.7), ("No", -0.75)),
        rows((" YES", -0.7), ("no\n", -0.75)),
        rows(('"Yes', -0.7), ("'No'", -0.75)),
        rows(("yes</w>", -0.7), ("no</w>", -0.75)),
        {"content": [{"token": "", "bytes": [89, 101, 115], "logprob": -0.7, "top_logprobs": [
            {"token": None, "bytes": [89, 101, 115], "logprob": -0.7},
            {"token": "token_id:2753", "bytes": [0xE2, 0x96, 0x81, 78, 111], "logprob": "-0.75"}]}]},
        {"tokens": ["Yes"], "token_logprobs": [-0.7], "top_logprobs": [{"Yes": -0.7, "No": -0.75}]},
        {"tokens": ["\u2581Yes"], "token_logprobs": [None], "top_logprobs": [{"\u2581Yes": -0.7, "\u2581No": -0.75}]},
        {"content": [{"token": "Yes", "logprob": -0.7, "top_logprobs": {"Yes": -0.7, "No": -0.75}}]},
        {"content": [{"token": "Yes", "logprob": -0.7, "top_logprobs": [["Yes", -0.7], ["No", -0.75]]}]},
        [{"token": "Yes", "logprob": -0.7, "top_logprobs": [{"token": "No", "logprob": -0.75}]}],
        {"content": [{"token": "No", "logprob": -0.75, "top_logprobs": [{"token": "Yes", "logprob": -0.7}]}]},
        rows(("Yes", -0.7), ("Yes", -0.7), ("No", -0.75), ("So", None)),
        rows(("Yes", -0.7), ("No", -0.75), ("no", "-inf"), ("So", -9999)),
    ],
)  # fmt: skip
def test_first_tokens(logprobs: Any) -> None:
    answer = read_answer(reply(logprobs=logprobs))
    assert answer.logprobs is not None
    assert p_yes(answer.logprobs) == (pytest.approx(math.exp(-0.7)), "")
    assert p_yes([row for row in answer.logprobs if word(row[0]) != "yes"])[0] == pytest.approx(1 - math.exp(-0.75))


def test_a_log_probability_that_is_null_is_none_at_all() -> None:
    found = read_answer(reply(logprobs=rows(("Yes", -0.7), ("So", None)))).logprobs
    assert found == (("Yes", -0.7), ("So", -math.inf))


@pytest.mark.parametrize(
    "logprobs", [None, {}, {"content": None}, {"content": []}, {"tokens": [], "token_logprobs": []}, []]
)
def test_no_logprobs(logprobs: Any) -> None:
    assert read_answer(reply(logprobs=logprobs)).logprobs is None


def test_tokens_of_thoughts_are_not_those_of_the_answer() -> None:
    thinking = rows(("Yes", -0.1))
    for message in ({"content": None}, {"content": "No"}, {"content": "Yes, it does"}):
        assert read_answer(reply(**message, reasoning_content="Yes, I see it", logprobs=thinking)).logprobs == ()
    own = {"content": [*rows(("Yes", -0.1))["content"], {"token": "<|im_end|>", "logprob": 0.0}]}
    assert read_answer(reply("Yes", own, reasoning_content="I see it")).logprobs == (("Yes", -0.1),)
