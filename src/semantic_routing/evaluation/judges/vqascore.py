"""VQAScore: the probability that a judge answers yes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from semantic_routing.chat.client import ChatClient, Usage
from semantic_routing.chat.messages import Answer, Failure, Question
from semantic_routing.chat.replies import word
from semantic_routing.chat.server import ChatConfig
from semantic_routing.chat.spoken import FirstAnswers, without_thoughts
from semantic_routing.evaluation.benchmark import Finding, Task
from semantic_routing.evaluation.genai_bench import VQASCORE
from semantic_routing.evaluation.judges.base import (
    NO_THINKING,
    _identity,
    _judged,
    checked_template,
    read_picture,
    sha256,
)

VQA_TEMPLATES = {
    "3.1": 'Does this figure show "{}"? Please answer Yes or No.',
    "3.0": 'Does this figure show "{}"? Please answer yes or no.',
}
"""By release of t2v_metrics; that of 3.0 is for CLIP-FlanT5, LLaVA, GPT-4o and Gemini."""
VQA_PARAMETERS = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
ENOUGH_BLIND = 5
"""Answers without logprobs, and none with them, after which the server counts as having none."""
TOLERANCE = 1e-3
"""Excess over 1 of a probability that rounding may cause."""
LEAST_MASS = 0.1
"""Probability that yes and no must have together; an answer with less begins otherwise, as those of thinkers do."""
VQA_ADVICE = {"": f"VQAScore needs a judge whose first word is yes or no: {NO_THINKING}"}


class VQAJudge:
    """VQAScore (Lin et al., 2024): the probability that a model says Yes to a question about the image."""

    def __init__(self, cfg: ChatConfig, template: str = VQA_TEMPLATES["3.1"]) -> None:
        """``template`` has {} in place of the prompt."""
        self.client = ChatClient(cfg)
        self.template = checked_template(template, "{}", "the template")
        self._seen = self._blind = 0
        self._first = FirstAnswers(VQA_ADVICE)

    @property
    def identity(self) -> dict[str, Any]:
        """Return the judge's identity and settings, for manifests."""
        return _identity("vqascore", self.client, self.template, VQA_PARAMETERS)

    @property
    def usage(self) -> Usage:
        """Requests so far and their cost."""
        return self.client.usage

    def score(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Finding]]:
        """Yield every task with its finding, in order of arrival; ValueError if the server returns no logprobs."""
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
                    f"{self.client.cfg.base_url} answers without logprobs, which VQAScore needs; serve the model "
                    "with vLLM or SGLang, which return them, or use a model on this machine as the judge"
                )
            return Finding(scores={VQASCORE: None}, reason="the answer has no logprobs", answer=answer.text)
        self._seen += 1
        thinks = not answer.logprobs or without_thoughts(answer.text)[1]
        score, reason = (None, "the judge reasons before it answers") if thinks else p_yes(answer.logprobs)
        self._first.note("" if score is not None else reason)
        return Finding(scores={VQASCORE: score}, reason=reason, answer=answer.text)


def p_yes(logprobs: Sequence[tuple[str, float]]) -> tuple[float | None, str]:
    """Return P(Yes) from the most likely first tokens, or None and the reason.

    It is the sum over all spellings of yes or, if there are none, 1 minus that of no. If yes and no together are very
    unlikely, there is no score.
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
