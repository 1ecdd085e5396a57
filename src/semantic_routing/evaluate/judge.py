"""Vision-language models as judges, over an OpenAI-compatible server: VQAScore and UnifiedReward.

An answer that cannot be read is a gap with its reason and never a number.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from semantic_routing.answers import Answer, Failure, Picture, Question
from semantic_routing.chat import ChatClient
from semantic_routing.data.formats import formats
from semantic_routing.data.images import BROKEN, to_rgb
from semantic_routing.evaluate.benchmark import Finding, Task
from semantic_routing.evaluate.drawbench import ASPECTS
from semantic_routing.evaluate.genai_bench import VQASCORE
from semantic_routing.replies import word
from semantic_routing.servers import ChatConfig
from semantic_routing.spoken import CUT, THOUGHTS, FirstAnswers, spoken, without_thoughts

VQA_TEMPLATES = {
    "3.1": 'Does this figure show "{}"? Please answer Yes or No.',
    "3.0": 'Does this figure show "{}"? Please answer yes or no.',
}
"""By release of t2v_metrics; that of 3.0 is for CLIP-FlanT5, LLaVA, GPT-4o and Gemini."""
VQA_PARAMETERS = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
UNIFIED_REWARD_TEMPLATE = Path(__file__).with_name("unified_reward.txt")
"""Our wording; the official one, in a file with {prompt} in the prompt's place, can be given instead."""
UNIFIED_REWARD_PARAMETERS = {"temperature": 0, "max_tokens": 1024}
PROMPT = "{prompt}"
JPEG_QUALITY = 95
ENOUGH_BLIND = 5
"""So many answers without logprobs, and none with them, say that the server has none."""
TOLERANCE = 1e-3
"""How far rounding may bring a probability above 1."""
LEAST_MASS = 0.1
"""Probability that yes and no must have together; an answer with less begins otherwise, as those of thinkers do."""
NO_THINKING = (
    'switch thinking off, as by --judge.extra \'{"chat_template_kwargs": {"enable_thinking": false}}\' on vLLM and '
    'SGLang or \'{"reasoning_effort": "none"}\' elsewhere, or judge with a model that does not think'
)
VQA_ADVICE = {"": f"VQAScore needs a judge whose first word is yes or no: {NO_THINKING}"}
REWARD_ADVICE = {
    CUT: f"let answers be longer, as by --judge.extra '{{\"max_tokens\": 8192}}', or {NO_THINKING}",
    THOUGHTS: NO_THINKING,
    "": "judge with a UnifiedReward model, and give the request that it was trained with by --template",
}
"""What to set where the first answers of a judge are of no use, by reason."""
SCORE = re.compile(
    rf"\b({'|'.join(ASPECTS)})[\s*_]*score\b[^:\n]*:[\s*_`]*"
    r"([-+]?\d+(?:\.\d+)?|nan)(?![\w%]|\.\d)(?:[\s*_`]*/\s*(\d+))?",
    re.IGNORECASE,
)
"""Such as ``Alignment Score (1-5): 2.6947``, ``**Style Score:** 4`` or ``Coherence Score: 3.5/5``."""


class VQAJudge:
    """VQAScore (Lin et al., 2024): the probability that a model says Yes to a question about the image."""

    def __init__(self, cfg: ChatConfig, template: str = VQA_TEMPLATES["3.1"]) -> None:
        """``template`` holds {} in the prompt's place."""
        self.client = ChatClient(cfg)
        self.template = checked_template(template, "{}", "the template")
        self._seen = self._blind = 0
        self._first = FirstAnswers(VQA_ADVICE)

    @property
    def identity(self) -> dict[str, Any]:
        """Who judges and how, for manifests."""
        return _identity("vqascore", self.client, self.template, VQA_PARAMETERS)

    def score(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Finding]]:
        """Every task with its finding, as they come; ValueError where the server has no logprobs at all."""
        return _judged(self.client, tasks, self._question, self._read, (VQASCORE,))

    def _question(self, task: Task) -> Question | Failure:
        picture = read_picture(task.path)
        if isinstance(picture, Failure):
            return picture
        text = self.template.replace("{}", task.prompt.text)
        return Question(parts=(text, picture), parameters=VQA_PARAMETERS, template=sha256(self.template))

    def _read(self, answer: Answer) -> Finding:
        if answer.logprobs is None:
            self._blind += 1
            if not self._seen and self._blind >= ENOUGH_BLIND:
                raise ValueError(
                    f"{self.client.cfg.base_url} answers without logprobs, which VQAScore is made of; serve the model "
                    "with them, as vLLM and SGLang do, or judge with a model on this machine"
                )
            return Finding(scores={VQASCORE: None}, reason="the answer has no logprobs", answer=answer.text)
        self._seen += 1
        thinks = not answer.logprobs or without_thoughts(answer.text)[1]
        score, reason = (None, "the judge thinks before it answers") if thinks else p_yes(answer.logprobs)
        self._first.note("" if score is not None else reason)
        return Finding(scores={VQASCORE: score}, reason=reason, answer=answer.text)


class UnifiedRewardJudge:
    """UnifiedReward 2.0 (Wang et al., 2025): a reward model that writes three scores from 1 to 5."""

    def __init__(self, cfg: ChatConfig, template: Path = UNIFIED_REWARD_TEMPLATE) -> None:
        """``template`` is a text file with {prompt} in the prompt's place."""
        self.client = ChatClient(cfg)
        try:
            text = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the template {template} cannot be read; it must be a UTF-8 text file") from error
        self.template = checked_template(text, PROMPT, f"the template {template}")
        self._first = FirstAnswers(REWARD_ADVICE)

    @property
    def identity(self) -> dict[str, Any]:
        """Who judges and how, for manifests."""
        return _identity("unified-reward", self.client, self.template, UNIFIED_REWARD_PARAMETERS)

    def score(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Finding]]:
        """Every task with its finding, as they come."""
        return _judged(self.client, tasks, self._question, self._read, ASPECTS)

    def _question(self, task: Task) -> Question | Failure:
        picture = read_picture(task.path, JPEG_QUALITY)
        if isinstance(picture, Failure):
            return picture
        text = self.template.replace(PROMPT, task.prompt.text)
        return Question(parts=(picture, text), parameters=UNIFIED_REWARD_PARAMETERS, template=sha256(self.template))

    def _read(self, answer: Answer) -> Finding:
        text = spoken(answer)
        if isinstance(text, Failure):
            self._first.note(text.reason)
            return Finding(scores=dict.fromkeys(ASPECTS), reason=text.reason, answer=answer.text)
        scores, reason = parse_scores(text)
        self._first.note("" if any(score is not None for score in scores.values()) else reason)
        return Finding(scores=scores, reason=reason, answer=answer.text)


def p_yes(logprobs: Sequence[tuple[str, float]]) -> tuple[float | None, str]:
    """P(Yes) from the first token's likeliest choices, or None and the reason.

    The sum over all spellings of yes; where there are none, 1 minus that of no. Neither is a judgement where yes and
    no together are hardly likely.
    """
    if any(not logprob <= TOLERANCE for _, logprob in logprobs):
        return None, "out of scale: not log-probabilities"
    yes, no = ([math.exp(logprob) for token, logprob in logprobs if word(token) == wanted] for wanted in ("yes", "no"))
    if max(sum(yes), sum(no)) > 1 + TOLERANCE:
        return None, "out of scale: probabilities above 1"
    if (yes or no) and sum(yes) + sum(no) < LEAST_MASS:
        return None, f"hardly any probability of yes or no: {sum(yes) + sum(no):.1e} together"
    if yes:
        return min(sum(yes), 1.0), ""
    if no:
        return max(1 - sum(no), 0.0), "no spelling of yes among the likeliest tokens"
    return None, "neither yes nor no among the likeliest tokens"


def parse_scores(text: str) -> tuple[dict[str, float | None], str]:
    """The last score of each aspect in a text, None where there is no number from 1 to 5, and the reasons for that."""
    written = {match[1].lower(): match for match in SCORE.finditer(text)}
    scores: dict[str, float | None] = dict.fromkeys(ASPECTS)
    reasons = []
    for aspect in ASPECTS:
        match = written.get(aspect)
        value = math.nan if match is None else float(match[2])
        if match is None or math.isnan(value):
            reasons.append(f"{aspect} {'unparsed' if match is None else 'nan'}")
        elif 1 <= value <= 5 and match[3] in (None, "5"):
            scores[aspect] = value
        else:
            reasons.append(f"{aspect} out of scale ({value:g}{'/' + match[3] if match[3] else ''})")
    return scores, ", ".join(reasons)


def open_rgb(path: Path) -> Image.Image | Failure:
    """An image file as upright RGB."""
    try:
        with Image.open(path, formats=formats()) as image:
            return to_rgb(image)
    except BROKEN as error:
        return Failure(reason="the image does not open", detail=f"{path}: {error}", final=True)


def read_picture(path: Path, quality: int | None = None) -> Picture | Failure:
    """An image file as it is sent: JPEG of that quality, or without loss as PNG."""
    image = open_rgb(path)
    return image if isinstance(image, Failure) else Picture.encode(image, quality)


def checked_template(template: str, place: str, what: str) -> str:
    """The template, if the prompt has its place in it."""
    if place not in template:
        raise ValueError(f"{what} has no {place}; write it where the prompt belongs")
    return template


def sha256(text: str) -> str:
    """Of the text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _judged(
    client: ChatClient,
    tasks: Sequence[Task],
    question: Callable[[Task], Question | Failure],
    read: Callable[[Answer], Finding],
    metrics: Sequence[str],
) -> Iterator[tuple[Task, Finding]]:
    for task, answer in client.run(tasks, question):
        if isinstance(answer, Answer):
            yield task, read(answer)
        else:
            yield task, Finding(scores=dict.fromkeys(metrics), reason=str(answer))


def _identity(scorer: str, client: ChatClient, template: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "scorer": scorer,
        **client.identity(),
        "template": template,
        "template_sha256": sha256(template),
        "parameters": parameters,
    }
