"""The client against a real server process that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from semantic_routing.chat.cache import AnswerCache
from semantic_routing.chat.client import ChatClient
from semantic_routing.chat.messages import Answer, Failure, Picture, Question, digest
from semantic_routing.chat.replies import read_answer
from semantic_routing.chat.server import ChatConfig, Clock, Pace, retry_after
from tests.helpers.chat_server import FAULTS, KEY, MODEL, ChatServer, p_yes

VQA = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with ChatServer(stall=2.0) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def config(server: ChatServer, **changes: Any) -> ChatConfig:
    """Asks this server, with short waits."""
    quick = {"model": MODEL, "first_wait": 0.01, "longest_wait": 0.5, "timeout": 10.0}
    return ChatConfig(base_url=server.url, **(quick | changes))


def ask(text: str) -> Question:
    return Question(parts=(text, Picture(b"pixels", "image/png")), parameters=VQA)


def all_answers(
    client: ChatClient, texts: list[str], make: Callable[[str], Question | Failure] = ask
) -> list[Answer | Failure]:
    """In the order of the texts; fails where one is answered twice or not at all."""
    found = list(client.run([*enumerate(texts)], lambda item: make(item[1])))
    assert sorted(item for item, _ in found) == [*enumerate(texts)]
    return [answer for _, answer in sorted(found, key=lambda row: row[0])]


def one(client: ChatClient, text: str) -> Answer | Failure:
    return all_answers(client, [text])[0]


# what goes right


def test_answer(server: ChatServer) -> None:
    client = ChatClient(config(server, prompt_price=2.0, completion_price=30.0))
    answer = one(client, "a red circle")
    assert isinstance(answer, Answer)
    tokens = dict(answer.logprobs or ())
    assert tokens.keys() == {"Yes", " yes", "No", "A"}
    assert answer.text == ("Yes" if p_yes("a red circle") > 0.5 else "No")
    assert (answer.model, answer.finish, answer.cached) == (f"{MODEL}-2026", "stop", False)
    assert (answer.prompt_tokens, answer.completion_tokens) == (100, 10)
    assert client.usage.cost == pytest.approx((100 * 2 + 10 * 30) / 1e6)
    assert client.identity()["base_url"] == server.url


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.stress)])
def test_every_question_is_answered_once_through_faults(tmp_path: Path, count: int) -> None:
    """A fifth of all attempts are faulty, and ten judgements never succeed."""
    texts = [f"picture {i}" + ("[[500]]" if i % (count // 10) == 7 else "") for i in range(count)]
    failing = {text for text in texts if "[[500]]" in text}
    with ChatServer(faults=0.2, stall=2.5) as faulty:
        cfg = config(faulty, cache=tmp_path, first_wait=0.002, timeout=2.0, retries=9)
        client = ChatClient(cfg)
        answers = all_answers(client, texts)
        for text, answer in zip(texts, answers, strict=True):
            if text in failing:
                assert isinstance(answer, Failure)
            else:
                assert isinstance(answer, Answer)
                assert answer.text == ("Yes" if p_yes(text) > 0.5 else "No")
        # By the server's own books faults were met, and every answer was given once.
        first = faulty.counts()
        assert sum(first["asked"].values()) > 1.15 * count
        assert first["answered"] == {text: 1 for text in texts if text not in failing}
        usage = client.usage
        right = count - 10
        assert (usage.answered, usage.failed, usage.cached, usage.prompt_tokens) == (right, 10, 0, 100 * right)
        assert len([*tmp_path.rglob("*.json")]) == right
        # Once more: nothing but what failed is asked.
        again = ChatClient(cfg)
        assert [type(answer) for answer in all_answers(again, texts)] == [type(answer) for answer in answers]
        assert again.usage.cached == right
        assert faulty.counts()["answered"] == first["answered"]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_mended_by_a_retry(server: ChatServer, fault: str) -> None:
    client = ChatClient(config(server, retries=1))
    assert isinstance(one(client, f"mended [[{fault}*1]]"), Answer)
    assert client.usage.requests == 2


def test_same_question_at_once_is_asked_once(server: ChatServer, tmp_path: Path) -> None:
    for cache in (None, tmp_path):
        client = ChatClient(config(server, cache=cache))
        text = f"again and again, cache {cache}"
        answers = all_answers(client, [text] * 70)
        assert server.counts()["answered"][text] == 1
        assert len({answer.text for answer in answers if isinstance(answer, Answer)}) == 1
        assert (client.usage.answered, client.usage.cached) == (1, 69)
        assert client.usage.prompt_tokens == 100


class Standing(Clock):
    """A clock that stands still, and notes every wait instead of waiting."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def now(self) -> float:
        return 100.0

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


def test_requests_are_spread_over_the_minute(server: ChatServer) -> None:
    clock = Standing()
    all_answers(ChatClient(config(server, requests_per_minute=1200.0), clock), [f"slowly {i}" for i in range(9)])
    assert sorted(clock.waits) == pytest.approx([i * 60 / 1200 for i in range(9)])
    clock = Standing()
    all_answers(ChatClient(config(server), clock), [f"quickly {i}" for i in range(9)])
    assert clock.waits == [0.0] * 9


def test_retry_after_holds_all_requests(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda least, most: most)
    clock = Standing()
    client = ChatClient(config(server, concurrency=1, longest_wait=2.0, first_wait=0.125), clock)
    all_answers(client, ["held [[429-slow*1]]", "after it"])
    # Sent, told to wait 0.3 seconds, sent again and the next one, which the same 0.3 seconds hold.
    assert clock.waits == pytest.approx([0, 0.3 + 0.125, 0.3, 0.3])


def test_waits_before_retries_double_up_to_the_longest(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def most(low: float, high: float) -> float:
        asked.append(low)
        return high

    monkeypatch.setattr(random, "uniform", most)
    clock = Standing()
    client = ChatClient(config(server, retries=4, first_wait=1.0, longest_wait=5.0), clock)
    assert isinstance(one(client, "[[500]] every time"), Failure)
    assert clock.waits == [0, 1, 0, 2, 0, 4, 0, 5, 0]
    assert asked == [0] * 4


def test_not_more_at_once_than_allowed() -> None:
    with ChatServer(delay=0.05) as slow:
        all_answers(ChatClient(config(slow, concurrency=3)), [f"few {i}" for i in range(12)])
        assert slow.counts()["most"] == 3


def test_questions_are_taken_as_there_is_room(server: ChatServer) -> None:
    taken = []

    def endless() -> Iterator[str]:
        while True:
            taken.append(f"endless {len(taken)}")
            yield taken[-1]

    client = ChatClient(config(server, concurrency=4))
    answers = client.run(endless(), ask)
    for _ in range(10):
        next(answers)
    answers.close()
    assert 10 <= len(taken) <= 18


def test_extra_parameters(server: ChatServer, tmp_path: Path) -> None:
    client = ChatClient(config(server, extra='{"seed": 1, "logprobs": null}', cache=tmp_path))
    answer = one(client, "without logprobs")
    assert isinstance(answer, Answer)
    assert answer.logprobs is None
    assert "Alignment" in answer.text
    (entry,) = tmp_path.rglob("*.json")
    asked = json.loads(entry.read_text())["question"]["parameters"]
    assert asked == {"max_tokens": 1, "top_logprobs": 20, "seed": 1}


def test_a_pause_does_not_bring_the_next_request_forward() -> None:
    clock = Standing()

    async def two_turns(seconds: float) -> None:
        pace = Pace(6.0, clock)
        await pace.turn()
        pace.pause(seconds)
        await pace.turn()

    asyncio.run(two_turns(3.0))
    asyncio.run(two_turns(25.0))
    assert clock.waits == [0, 10, 0, 25]


# what goes wrong


@pytest.mark.parametrize("status", [408, 409])
def test_conflicts_and_timeouts_of_the_server_are_asked_again(server: ChatServer, status: int) -> None:
    assert isinstance(one(ChatClient(config(server, retries=1)), f"once [[{status}*1]]"), Answer)


def test_failures_in_a_row_end_the_run_and_an_answer_between_them_does_not(server: ChatServer) -> None:
    cfg = config(server, concurrency=1, retries=0, give_up=3)
    failing = [f"down {i} [[500]]" for i in range(6)]
    answers = all_answers(ChatClient(cfg), ["up 0", *failing[:2], "up 1", *failing[2:4], "up 2", *failing[4:]])
    assert [type(answer) for answer in answers] == [Answer, Failure, Failure] * 3
    client = ChatClient(cfg)
    with pytest.raises(ValueError, match="gave no answer to 3 requests in a row, the last: HTTP 500"):
        all_answers(client, ["up 3", *failing])
    assert client.usage.requests == 4


def test_an_answer_of_the_cache_tells_that_the_requests_are_right(server: ChatServer, tmp_path: Path) -> None:
    cfg = config(server, concurrency=1, cache=tmp_path)
    one(ChatClient(cfg), "known")
    answers = all_answers(ChatClient(cfg), ["known", *(f"refused at last {i} [[400]]" for i in range(10))])
    assert [type(answer) for answer in answers] == [Answer, *[Failure] * 10]


def test_long_words_of_a_server_are_cut(server: ChatServer) -> None:
    failure = one(ChatClient(config(server, retries=0)), "tell me [[wordy]]")
    assert isinstance(failure, Failure)
    assert failure.detail.endswith("too much too much too")
    assert len(failure.detail) == 300


def test_failure_tells_why(server: ChatServer) -> None:
    client = ChatClient(config(server, retries=1, timeout=1.0))
    reasons = {
        "[[500]]": "HTTP 500",
        "[[stall]]": "timeout",
        "[[cut]]": "no connection",
        "[[html]]": "malformed answer",
    }
    answers = all_answers(client, ["fine", *reasons])
    assert [answer.reason for answer in answers[1:] if isinstance(answer, Failure)] == list(reasons.values())
    assert client.usage.requests == 1 + 2 * len(reasons)
    assert client.usage.failed == 4


def test_no_retry_of_a_refused_question(server: ChatServer) -> None:
    client = ChatClient(config(server, concurrency=1))
    answers = all_answers(client, ["fine", *(f"refused {i} [[400]]" for i in range(20)), "fine too"])
    assert [type(answer) for answer in answers] == [Answer, *[Failure] * 20, Answer]
    assert all(isinstance(answer, Answer) or answer.final for answer in answers)
    assert client.usage.requests == 22


def test_a_server_that_refuses_everything_stops_the_run(server: ChatServer) -> None:
    client = ChatClient(config(server, concurrency=1))
    with pytest.raises(ValueError, match=r"HTTP 400.*something is wrong.*parameters"):
        all_answers(client, [f"refused too {i} [[400]]" for i in range(20)])
    assert client.usage.requests == 8


def test_long_waits_are_not_waited(server: ChatServer) -> None:
    answer = one(ChatClient(config(server)), "later [[429-day]]")
    assert isinstance(answer, Failure)
    assert (answer.reason, "86400 seconds" in answer.detail) == ("HTTP 429", True)
    for longest, asked in ((0.29, 1), (0.31, 2)):
        client = ChatClient(config(server, longest_wait=longest, first_wait=0.0, retries=1), Standing())
        assert isinstance(one(client, f"at most {longest} [[429-slow]]"), Failure)
        assert client.usage.requests == asked


def test_empty_account_stops_at_once(server: ChatServer) -> None:
    client = ChatClient(config(server))
    with pytest.raises(ValueError, match="no credit"):
        one(client, "poor [[quota]]")
    assert client.usage.requests == 1
    client = ChatClient(config(server))
    with pytest.raises(ValueError, match="no credit"):
        one(client, "poor in other words [[402]]")
    assert client.usage.requests == 1


def test_no_server() -> None:
    with ChatServer() as gone:
        cfg = config(gone, retries=1)
    with pytest.raises(ValueError, match=rf"{gone.url}.*no connection.*check that the server runs"):
        all_answers(ChatClient(cfg), [f"nobody {i}" for i in range(20)])


def test_wrong_model_and_wrong_address(server: ChatServer) -> None:
    with pytest.raises(ValueError, match=r"`other` does not exist.*serves 'other'"):
        one(ChatClient(config(server, model="other")), "hello")
    with pytest.raises(ValueError, match=r"no such path.*ends in /v1"):
        one(ChatClient(replace(config(server), base_url=server.url.removesuffix("/v1"))), "hello")


def test_the_key_is_told_to_the_server_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with ChatServer(key=KEY) as locked:
        monkeypatch.setenv("JUDGE_KEY", KEY)
        client = ChatClient(config(locked, cache=tmp_path, api_key_env="JUDGE_KEY"))
        answer = one(client, "what did I send? [[echo]]")
        assert isinstance(answer, Answer)
        assert answer.text == "You sent Bearer [key]."
        monkeypatch.setenv("JUDGE_KEY", KEY + "wrong")
        with pytest.raises(ValueError, match=r"wrong key \[key\]; put a valid key .* JUDGE_KEY") as refused:
            one(client, "locked out")
    stored = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "[key]" in stored
    assert KEY not in f"{client.cfg} {vars(client)} {client.identity()} {refused.value} {caplog.text} {stored}"


def test_a_picture_that_cannot_be_asked_about_is_reported(server: ChatServer) -> None:
    gone = Failure(reason="the image cannot be opened", final=True)
    client = ChatClient(config(server))
    answers = all_answers(client, ["good", "bad", *["bad"] * 80], lambda text: gone if text == "bad" else ask(text))
    assert isinstance(answers[0], Answer)
    assert answers[1:] == [gone] * 81
    assert (client.usage.requests, client.usage.failed) == (1, 81)


def test_failures_of_making_a_question_are_not_hidden(server: ChatServer) -> None:
    def broken(text: str) -> Question:
        raise KeyError(text)

    with pytest.raises(KeyError, match="oops"):
        all_answers(ChatClient(config(server)), ["oops"], broken)


# what is remembered


def test_replay_answers_without_a_server(tmp_path: Path) -> None:
    with ChatServer() as gone:
        cfg = config(gone, cache=tmp_path)
        first = all_answers(ChatClient(cfg), ["one", "two"])
    client = ChatClient(replace(cfg, replay=True))
    answers = all_answers(client, ["one", *(f"new {i}" for i in range(80)), "two"])
    assert [answers[0], answers[-1]] == [replace(answer, cached=True) for answer in first if isinstance(answer, Answer)]
    missing = [answer for answer in answers if isinstance(answer, Failure)]
    assert len(missing) == client.usage.failed == 80
    assert {answer.reason for answer in missing} == {"not in the cache"}
    assert (client.usage.requests, client.usage.cached, client.usage.cost) == (0, 2, 0.0)


def test_identity_of_a_question() -> None:
    question = ask("one")
    names = {digest(question.facts(MODEL)), digest(question.facts("other"))}
    for change in (
        {"parts": ("two", question.parts[1])},
        {"parts": question.parts[::-1]},
        {"parts": ("one", Picture(b"other pixels", "image/png"))},
        {"parameters": {**VQA, "max_tokens": 2}},
        {"template": "another"},
    ):
        names.add(digest(replace(question, **change).facts(MODEL)))
    assert len(names) == 7
    assert digest(ask("one").facts(MODEL)) in names


def test_cache_entries(tmp_path: Path) -> None:
    cache, facts = AnswerCache(tmp_path), ask("one").facts(MODEL)
    name = digest(facts)
    answer = Answer(
        text="Yes", logprobs=(("Yes", -0.25),), model="m", finish="stop", prompt_tokens=3, completion_tokens=1
    )
    assert cache.get(name) is None
    cache.put(name, facts, answer)
    assert cache.get(name) == replace(answer, cached=True)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")] == [f"{name[:2]}/{name}.json"]
    entry = json.loads(cache.path(name).read_text())
    assert entry["question"]["parts"] == ["one", {"sha256": hashlib.sha256(b"pixels").hexdigest()}]
    del entry["answer"]["thought"]  # as an earlier version wrote it
    cache.path(name).write_text(json.dumps(entry))
    assert cache.get(name) == replace(answer, cached=True)
    cache.remove(name)
    cache.remove(name)
    assert cache.get(name) is None


def test_clearing_a_cache_deletes_answers_alone(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "cache")
    answer = Answer(text="Yes", logprobs=None, model="m", finish="stop", prompt_tokens=3, completion_tokens=1)
    names = [digest(ask(text).facts(MODEL)) for text in ("one", "two")]
    for name in names:
        cache.put(name, {}, answer)
    notes = cache.path(names[0]).with_name("notes.json")
    notes.write_text("mine")
    cache.path(names[1]).with_name(f".{names[1]}.json.partial-0a1b").write_text('{"quest')  # of a killed process
    cache.clear()
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == [notes]
    assert [cache.get(name) for name in names] == [None, None]
    assert [path.name for path in cache.folder.iterdir()] == [names[0][:2]]
    notes.unlink()
    cache.clear()
    assert not cache.folder.exists()


def test_pictures_are_sent_in_the_quality_asked_for() -> None:
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    coarse, fine, exact = (Picture.encode(image, quality) for quality in (10, 95, None))
    assert (coarse.media_type, fine.media_type, exact.media_type) == ("image/jpeg", "image/jpeg", "image/png")
    assert len(coarse.data) < len(fine.data)
    off = [np.abs(np.asarray(Image.open(io.BytesIO(one.data)), int) - np.asarray(image, int)).mean()
           for one in (coarse, fine, exact)]  # fmt: skip
    assert off[0] > 4 * off[1] > off[2] == 0


@pytest.mark.parametrize("content", [b"", b'{"answer": {"te', b"[]", b'{"answer": {"text": 1}}', b"\xff\xfe"])
def test_damaged_entries_are_asked_for_anew(
    server: ChatServer, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    client = ChatClient(config(server, cache=tmp_path))
    text = f"damaged {content!r}"
    first = one(client, text)
    (entry,) = tmp_path.rglob("*.json")
    entry.write_bytes(content)
    assert one(client, text) == first
    assert "is damaged" in caplog.text
    assert server.counts()["answered"][text] == 2
    assert isinstance(one(client, text), Answer)
    assert server.counts()["answered"][text] == 2


def test_answers_without_the_logprobs_asked_for_are_not_kept(server: ChatServer, tmp_path: Path) -> None:
    client = ChatClient(config(server, cache=tmp_path))
    blind = one(client, "blind [[no-logprobs*1]]")
    assert isinstance(blind, Answer)
    assert blind.logprobs is None
    seeing = one(client, "blind [[no-logprobs*1]]")
    assert isinstance(seeing, Answer)
    assert seeing.logprobs is not None


def test_a_cache_that_cannot_be_written_stops_the_run(server: ChatServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        one(ChatClient(config(server, cache=tmp_path / "file")), "nowhere to go")


def test_what_was_paid_for_outlives_an_interrupt(tmp_path: Path) -> None:
    code = """
import signal, sys
from pathlib import Path
from semantic_routing.chat.messages import Question
from semantic_routing.chat.client import ChatClient
from semantic_routing.chat.server import ChatConfig
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background deaf to it
cfg = ChatConfig(base_url=sys.argv[1], model=sys.argv[2], cache=Path(sys.argv[3]), concurrency=4)
for item, _ in ChatClient(cfg).run(range(300), lambda i: Question(parts=(f"item {i}",), parameters={})):
    print(item, flush=True)
"""
    with ChatServer(delay=0.02) as slow:
        process = subprocess.Popen(
            [sys.executable, "-c", code, slow.url, MODEL, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
        assert errors.strip().endswith("KeyboardInterrupt")
        assert "never retrieved" not in errors
        reported = {*seen, *map(int, rest.split())}
        entries = [json.loads(path.read_text()) for path in tmp_path.rglob("[!.]*.json")]
        assert {f"item {i}" for i in reported} <= {entry["question"]["parts"][0] for entry in entries}
        client = ChatClient(config(slow, cache=tmp_path))
        found = list(client.run(range(40), lambda i: Question(parts=(f"item {i}",), parameters={})))
        assert len(found) == 40
        assert client.usage.cached >= 20
        assert {slow.counts()["answered"][f"item {i}"] for i in reported} == {1}


# what is asked of whom


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "http://me:secret@127.0.0.1/v1"}, "credentials"),
        ({"base_url": "http://127.0.0.1/v1?key=secret"}, "credentials"),
        ({"base_url": "127.0.0.1:8000"}, "http://127"),
        ({"base_url": "http://127.0.0.1/v1/chat/completions"}, "leave out"),
        ({"api_key_env": "sk-secret"}, "give its name"),
        ({"concurrency": 0}, "concurrency"),
        ({"retries": -1}, "retries"),
        ({"timeout": 0.0}, "timeout"),
        ({"requests_per_minute": 0.0}, "requests_per_minute"),
        ({"replay": True}, "cache"),
        ({"extra": "{"}, "not JSON"),
        ({"extra": "[]"}, "object"),
    ],
)
def test_wrong_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        ChatConfig(**change)
    assert "secret" not in str(refused.value)


def test_a_model_is_needed() -> None:
    with pytest.raises(ValueError, match="give the name of the model"):
        ChatClient(ChatConfig())


def test_what_is_missing_is_told_before_any_question(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u2026secret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as refused:
        ChatClient(config(server))
    assert "secret" not in str(refused.value)
    with pytest.raises(ValueError, match="no variable with the name in api_key_env") as refused:
        ChatClient(config(server, api_key_env="hf_secret"))  # the key in the name's place
    assert "secret" not in str(refused.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r'needs openai, .*pip install "semantic-routing\[eval\]"'):
        ChatClient(config(server))


@pytest.mark.parametrize(
    "body",
    ["", "null", "[]", "{}", '{"choices": []}', '{"choices": [{}]}', '{"choices": [{"message": {"content": 3}}]}',
     '{"choices": [{"message": {}, "logprobs": {"content": [{"token": "Yes", "logprob": "high"}]}}]}', "[" * 5000,
     '{"choices": [{"message": {}}], "usage": {"prompt_tokens": Infinity}}'],
)  # fmt: skip
def test_replies_that_are_no_completion(body: str) -> None:
    with pytest.raises(ValueError, match=r"not JSON|not a chat completion|could not convert"):
        read_answer(body)


def test_replies_with_little_in_them() -> None:
    answer = read_answer('{"choices": [{"message": {"content": "half a pair \\ud83d"}}], "usage": null}')
    assert answer == Answer(
        text="half a pair ?", logprobs=None, model="", finish="", prompt_tokens=0, completion_tokens=0
    )
    chosen = read_answer(
        '{"choices": [{"message": {"content": null}, "logprobs": {"content": [{"token": "No", "logprob": -1}]}}]}'
    )
    assert (chosen.text, chosen.logprobs) == ("", (("No", -1.0),))


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("soon", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", pytest.approx(2.5e11, rel=0.1)),
    ],
)
def test_retry_after_in_seconds_or_as_a_date(header: str | None, seconds: float | None) -> None:
    assert retry_after(header) == seconds
