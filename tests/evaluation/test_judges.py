"""Judges against a real server process, and a tiny vision-language model made on the spot."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from semantic_routing.chat.server import ChatConfig
from semantic_routing.evaluation.benchmark import Finding, Prompt, Scorer, Task
from semantic_routing.evaluation.judges.local_vqascore import LocalVQAJudge
from semantic_routing.evaluation.judges.unified_reward import UNIFIED_REWARD_TEMPLATE, UnifiedRewardJudge, parse_scores
from semantic_routing.evaluation.judges.vqascore import VQA_TEMPLATES, VQAJudge, p_yes
from tests.helpers import chat_server
from tests.helpers.chat_server import MODEL, ChatServer
from tests.helpers.tiny_models import WORDS, save_llava


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "00000.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(path)
    return path


def config(server: ChatServer, **changes: Any) -> ChatConfig:
    quick = {"model": MODEL, "first_wait": 0.01, "longest_wait": 0.5, "timeout": 10.0}
    return ChatConfig(base_url=server.url, **(quick | changes))


def tasks(path: Path, *prompts: str) -> list[Task]:
    return [
        Task(prompt=Prompt(id=f"{index:05d}", text=text, tags=()), index=index, image=0, path=path, sha256="")
        for index, text in enumerate(prompts)
    ]


def findings(judge: Scorer, asked: list[Task]) -> list[Finding]:
    """In the order of the tasks, each exactly once."""
    found = list(judge.score(asked))
    assert sorted(task.index for task, _ in found) == list(range(len(asked)))
    return [finding for _, finding in sorted(found, key=lambda row: row[0].index)]


# VQAScore


def test_vqascore_is_the_probability_of_yes(server: ChatServer, picture: Path) -> None:
    prompts = [f'a "strange" {{}} circle {number}' for number in range(40)]
    judge = VQAJudge(config(server))
    assert isinstance(judge, Scorer)
    for prompt, finding in zip(prompts, findings(judge, tasks(picture, *prompts)), strict=True):
        p = chat_server.p_yes(f'Does this figure show "{prompt}"? Please answer Yes or No.')
        assert finding.scores == {"vqascore": pytest.approx(p, abs=1e-9)}
        assert (finding.answer, finding.reason) == ("Yes" if p > 0.5 else "No", "")


def test_vqascore_asks_as_the_official_code_does(picture: Path, tmp_path: Path) -> None:
    with ChatServer() as server:
        judge = VQAJudge(config(server, cache=tmp_path), VQA_TEMPLATES["3.0"])
        findings(judge, tasks(picture, "a cat"))
        (entry,) = tmp_path.rglob("*.json")
        asked = json.loads(entry.read_text())["question"]
        text, sent = asked["parts"]
        assert text == 'Does this figure show "a cat"? Please answer yes or no.'
        assert asked["parameters"] == {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        assert server.counts()["pictures"] == {sent["sha256"]: 1}


@pytest.mark.parametrize(
    ("logprobs", "score", "reason"),
    [
        ({"Yes": math.log(0.5), " yes": math.log(0.25), "YES": math.log(0.125), "No": math.log(0.1)}, 0.875, ""),
        ({"No": math.log(0.6), "no ": math.log(0.1)}, 0.3, "no spelling of yes"),
        ({"Yes": 0.0}, 1.0, ""),
        ({"Yes": 2e-4}, 1.0, ""),
        ({"Yesterday": -0.1, "Not": -3.0}, None, "neither yes nor no"),
        ({"So": -0.6, "Got": -0.8, "Yes": -13.1}, None, "hardly any probability of yes or no: 2.0e-06"),
        ({"So": -0.6, "Got": -0.8, "No": -12.0}, None, "hardly any probability of yes or no: 6.1e-06"),
        ({"Yes": -math.inf, "No": -math.inf}, None, "hardly any probability of yes or no: 0"),
        ({"Okay": -0.1, "yes": -3.7, "No": -3.5}, None, "hardly any probability of yes or no: 5.5e-02"),
        ({"The": -1.0, "Yes": -1.0, "No": -2.0}, math.exp(-1), ""),
        ({"\u2581Yes": math.log(0.5), "\u0120yes": math.log(0.25), "No": math.log(0.1)}, 0.75, ""),
        ({}, None, "neither yes nor no"),
        ({"Yes": 93.0, "No": 7.0}, None, "out of scale: not log"),
        ({"Yes": 0.93, "No": 0.07}, None, "out of scale: not log"),
        ({"Yes": math.nan}, None, "out of scale: not log"),
        ({"Yes": -0.1, "yes": -0.2}, None, "out of scale: probabilities above 1"),
        ({"Yes": -math.inf, "No": -0.1}, 0.0, ""),
    ],
)
def test_p_yes(logprobs: dict[str, float], score: float | None, reason: str) -> None:
    found, why = p_yes(tuple(logprobs.items()))
    assert found == (None if score is None else pytest.approx(score))
    assert why.startswith(reason)
    assert bool(why) == bool(reason)


def test_gaps_of_vqascore_have_their_reasons(server: ChatServer, picture: Path) -> None:
    cases = {
        "[[no-logprobs]]": "the answer has no logprobs",
        "[[neither]]": "neither yes nor no",
        "[[percent]]": "out of scale",
        "[[400]]": "HTTP 400: ",
        "[[500]]": "HTTP 500: ",
    }
    asked = tasks(picture, "fine", *cases, "[[only-no]]")
    found = findings(VQAJudge(config(server, retries=1, concurrency=1)), asked)
    assert found[0].scores["vqascore"] is not None
    for finding, reason in zip(found[1:-1], cases.values(), strict=True):
        assert finding.scores == {"vqascore": None}
        assert finding.reason.startswith(reason)
    p = chat_server.p_yes('Does this figure show "[[only-no]]"? Please answer Yes or No.')
    assert found[-1].scores == {"vqascore": pytest.approx(1 - (0.9 - 0.9 * p))}


@pytest.mark.behaviour(
    "Judges and scores",
    when="a judge begins with other text or reasoning, so that yes and no have hardly any probability",
    then="it gives no VQAScore; a line after its first answers says how to turn reasoning off",
)
def test_a_judge_that_begins_with_prose_scores_nothing(
    server: ChatServer, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tasks(picture, *(f"{number} [[prose-first]]" for number in range(5)), "fine")
    found = findings(VQAJudge(config(server, concurrency=1)), asked)
    assert [finding.scores["vqascore"] is None for finding in found] == [True] * 5 + [False]
    assert {finding.reason for finding in found[:5]} == {"hardly any probability of yes or no: 2.0e-06 together"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("semroute: 3 of the first 3 answers cannot be used (hardly any probability of yes or no);")
    assert """--judge.extra '{"chat_template_kwargs": {"enable_thinking": false}}'""" in line


def test_probabilities_of_thoughts_are_no_vqascore(server: ChatServer, picture: Path) -> None:
    found = findings(VQAJudge(config(server)), tasks(picture, "[[thinks]]", "[[thinking]]", "[[parts]]"))
    assert [finding.scores["vqascore"] for finding in found[:2]] == [None, None]
    assert {finding.reason for finding in found[:2]} == {"the judge reasons before it answers"}
    p = chat_server.p_yes('Does this figure show "[[parts]]"? Please answer Yes or No.')
    assert found[2].scores == {"vqascore": pytest.approx(p)}  # the first token is that of the text beside the thoughts


def test_a_server_without_logprobs_is_refused(server: ChatServer, picture: Path, tmp_path: Path) -> None:
    judge = VQAJudge(config(server, concurrency=2, cache=tmp_path))
    with pytest.raises(
        ValueError, match=rf"{server.url} answers without logprobs.*serve the model with vLLM or SGLang"
    ):
        findings(judge, tasks(picture, *(f"{number} [[no-logprobs]]" for number in range(100))))
    assert judge.client.usage.requests < 10
    assert not [*tmp_path.rglob("*.json")]


def test_images_that_do_not_open_are_gaps(server: ChatServer, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for path in (tmp_path / "text.png", tmp_path / "missing.png"):
        for judge in (VQAJudge(config(server)), UnifiedRewardJudge(config(server))):
            (finding,) = findings(judge, tasks(path, "a cat"))
            assert finding.reason.startswith("the image cannot be opened: ")
            assert set(finding.scores.values()) == {None}


# UnifiedReward


def test_unified_reward(server: ChatServer, picture: Path, tmp_path: Path) -> None:
    prompts = [f"a cat {number}" for number in range(30)]
    judge = UnifiedRewardJudge(config(server, cache=tmp_path))
    assert isinstance(judge, Scorer)
    template = UNIFIED_REWARD_TEMPLATE.read_text()
    for prompt, finding in zip(prompts, findings(judge, tasks(picture, *prompts)), strict=True):
        told = chat_server.scores(template.replace("{prompt}", prompt))
        assert finding.scores == {name.lower(): value for name, value in told.items()}
        assert finding.reason == ""
        assert prompt in finding.answer
    asked = json.loads(next(tmp_path.rglob("*.json")).read_text())["question"]
    buffer = io.BytesIO()
    Image.open(picture).save(buffer, format="JPEG", quality=95)
    assert asked["parts"][0] == {"sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    assert asked["parameters"]["temperature"] == 0


def test_gaps_of_unified_reward_have_their_reasons(server: ChatServer, picture: Path) -> None:
    wrong, prose = findings(UnifiedRewardJudge(config(server)), tasks(picture, "[[of-ten]]", "[[prose]]"))
    assert wrong.scores == prose.scores == {"alignment": None, "coherence": None, "style": None}
    assert wrong.reason.count("out of scale") == 3
    assert prose.reason == "alignment unparsed, coherence unparsed, style unparsed"
    assert prose.answer == "A lovely picture, well done!"


@pytest.mark.behaviour(
    "Judges and scores",
    when="a judge quotes numbers in its reasoning, or its answer is cut off",
    then="they do not count as scores: the image is counted as unscored with the reason, and a line says what to set",
)
@pytest.mark.parametrize(
    ("fault", "reason", "setting"),
    [
        ("thinking", "thoughts without an answer", "enable_thinking"),
        ("length", "cut off", "max_tokens"),
        ("blank", "empty answer", "--template"),
    ],
)
def test_thoughts_and_beginnings_are_no_scores(
    server: ChatServer, picture: Path, capsys: pytest.CaptureFixture[str], fault: str, reason: str, setting: str
) -> None:
    asked = tasks(picture, *(f"{number} [[{fault}]]" for number in range(4)))
    for finding in findings(UnifiedRewardJudge(config(server)), asked):
        assert finding.scores == {"alignment": None, "coherence": None, "style": None}
        assert finding.reason == reason
    (line,) = capsys.readouterr().err.splitlines()
    assert f"3 of the first 3 answers cannot be used ({reason})" in line
    assert setting in line


@pytest.mark.parametrize("dialect", ["thinks", "parts"])
def test_scores_after_thoughts_are_read(
    server: ChatServer, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dialect: str
) -> None:
    prompt = f"a cat [[{dialect}]]"
    told = chat_server.scores(UNIFIED_REWARD_TEMPLATE.read_text().replace("{prompt}", prompt))
    for _ in range(2):  # from the server, then from the cache
        (finding,) = findings(UnifiedRewardJudge(config(server, cache=tmp_path)), tasks(picture, prompt))
        assert finding.scores == {name.lower(): value for name, value in told.items()}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "scores", "reason"),
    [
        (
            "Alignment Score (1-5): 2.6947\nCoherence Score (1-5): 3\nStyle Score (1-5): 4.5",
            (2.6947, 3.0, 4.5),
            "",
        ),
        ("**Alignment Score (1-5):** 2.5\n**Coherence Score**: **3**\n- *Style score*: `1`", (2.5, 3.0, 1.0), ""),
        ("alignment score: 4/5. Coherence Score: 3.5 / 5, style score: 5.", (4.0, 3.5, 5.0), ""),
        ("Alignment Score (1-5): nan\nCoherence Score (1-5): NaN\nStyle Score (1-5): 2", (None, None, 2.0),
         "alignment nan, coherence nan"),
        ("Alignment Score (1-5): X\nStyle Score (1-5): 2", (None, None, 2.0), "alignment unparsed, coherence unparsed"),
        ("Alignment Score: 0.5\nCoherence Score: 7.25\nStyle Score: -3", (None, None, None),
         "alignment out of scale (0.5), coherence out of scale (7.25), style out of scale (-3)"),
        ("Alignment Score: 4/10\nCoherence Score: 45%\nStyle Score: 4.5%", (None, None, None),
         "alignment out of scale (4/10), coherence unparsed, style unparsed"),
        ("At first, Style Score: 2.\nAlignment Score: 1\nCoherence Score: 1\nStyle Score: 3", (1.0, 1.0, 3.0), ""),
        ("The style of this: 3. Its alignment: 4. I would score coherence 5", (None, None, None),
         "alignment unparsed, coherence unparsed, style unparsed"),
        ("", (None, None, None), "alignment unparsed, coherence unparsed, style unparsed"),
    ],
)  # fmt: skip
def test_parsing(text: str, scores: tuple[float | None, ...], reason: str) -> None:
    assert parse_scores(text) == (dict(zip(("alignment", "coherence", "style"), scores, strict=True)), reason)


# who judged


def test_identity(server: ChatServer, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", chat_server.KEY)
    vqa, reward = VQAJudge(config(server)).identity, UnifiedRewardJudge(config(server)).identity
    assert (vqa["scorer"], vqa["model"], vqa["base_url"]) == ("vqascore", MODEL, server.url)
    assert vqa["template_sha256"] == hashlib.sha256(VQA_TEMPLATES["3.1"].encode()).hexdigest()
    assert vqa["parameters"] == {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    assert vqa["versions"].keys() == {"openai"}
    assert reward["template_sha256"] == hashlib.sha256(UNIFIED_REWARD_TEMPLATE.read_bytes()).hexdigest()
    assert chat_server.KEY not in json.dumps([vqa, reward])
    assert VQAJudge(config(server), VQA_TEMPLATES["3.0"]).identity != vqa
    assert VQAJudge(config(server, extra='{"seed": 1}')).identity != vqa
    own = tmp_path / "official.txt"
    own.write_text("Rate the {prompt}!")
    judge = UnifiedRewardJudge(config(server), own)
    assert judge.identity["template"] == "Rate the {prompt}!"
    (finding,) = findings(judge, tasks(picture, "cat"))
    assert finding.answer.endswith("You ask: Rate the cat!")


def test_templates_need_a_place_for_the_prompt(server: ChatServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \{\}"):
        VQAJudge(config(server), "Is it good?")
    (tmp_path / "template.txt").write_text("Rate the picture.")
    with pytest.raises(ValueError, match=r"template.txt has no \{prompt\}"):
        UnifiedRewardJudge(config(server), tmp_path / "template.txt")
    with pytest.raises(ValueError, match=r"nowhere.txt cannot be read"):
        UnifiedRewardJudge(config(server), tmp_path / "nowhere.txt")


# on this machine


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "llava"
    save_llava(folder)
    return folder


def test_local_judge_is_one_step_over_the_whole_vocabulary(tiny_llava: Path, picture: Path) -> None:
    judge = LocalVQAJudge.from_pretrained(str(tiny_llava), device=torch.device("cpu"), dtype=torch.float32)
    assert isinstance(judge, Scorer)
    found = findings(judge, tasks(picture, "a red circle", "a blue circle"))
    for finding, prompt in zip(found, ("a red circle", "a blue circle"), strict=True):
        # The same by hand: tokens, pixels, a forward pass, a softmax.
        question = f'Does this figure show "{prompt}"? Please answer Yes or No.'
        text = f"USER: <image> <image> <image> <image> {question} ASSISTANT:"
        ids = torch.tensor([[WORDS.index(word) if word in WORDS else 0 for word in text.split()]])
        pixels = judge.processor.image_processor(Image.open(picture), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = judge.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0, -1]
        expected = float(logits.softmax(-1)[WORDS.index("Yes")])
        assert finding.scores == {"vqascore": pytest.approx(expected, rel=1e-5)}
        assert 0 < expected < 1
    assert found[0].scores != found[1].scores


def test_local_judge_sees_the_picture(tiny_llava: Path, picture: Path, tmp_path: Path) -> None:
    judge = LocalVQAJudge.from_pretrained(str(tiny_llava), device=torch.device("cpu"), dtype=torch.float32)
    Image.new("RGB", (30, 24), "white").save(tmp_path / "white.png")
    (seen,) = findings(judge, tasks(picture, "a red circle"))
    (white,) = findings(judge, tasks(tmp_path / "white.png", "a red circle"))
    (gone,) = findings(judge, tasks(tmp_path / "missing.png", "a red circle"))
    assert seen.scores != white.scores
    assert gone.scores == {"vqascore": None}
    assert gone.reason.startswith("the image cannot be opened")


def test_a_local_judge_that_begins_otherwise_scores_nothing(tiny_llava: Path, picture: Path) -> None:
    judge = LocalVQAJudge.from_pretrained(str(tiny_llava), device=torch.device("cpu"), dtype=torch.float32)
    head = torch.nn.Linear(judge.model.lm_head.in_features, len(WORDS)).requires_grad_(False)
    judge.model.lm_head = head
    head.weight.zero_()
    head.bias.zero_()
    head.bias[WORDS.index("Does")] = 14.0
    (finding,) = findings(judge, tasks(picture, "a red circle"))
    assert finding.scores == {"vqascore": None}
    assert finding.reason.startswith("hardly any probability of yes or no: 1.7e-06")
    head.bias[WORDS.index("No")] = 14.0
    (finding,) = findings(judge, tasks(picture, "a red circle"))
    assert finding.scores == {"vqascore": pytest.approx(math.exp(-14) / 2, rel=1e-3)}


def test_identity_of_a_local_judge(tiny_llava: Path) -> None:
    judge = LocalVQAJudge.from_pretrained(str(tiny_llava), device=torch.device("cpu"))
    assert judge.identity["scorer"] == "vqascore-local"
    assert judge.identity["model"] == str(tiny_llava)
    digest = hashlib.sha256((tiny_llava / "model.safetensors").read_bytes()).hexdigest()
    assert (judge.identity["weights"], judge.identity["dtype"]) == (digest, "bfloat16")
    assert judge.identity["versions"].keys() == {"transformers"}


def test_no_local_judge(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no judge at .*give a folder"):
        LocalVQAJudge.from_pretrained(str(tmp_path), device=torch.device("cpu"))
    judge = LocalVQAJudge.from_pretrained(str(tiny_llava), device=torch.device("cpu"))
    judge.processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        LocalVQAJudge(judge.model, judge.processor, name="mute")
