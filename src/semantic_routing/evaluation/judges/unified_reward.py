"""UnifiedReward: alignment, coherence and style from 1 to 5."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from semantic_routing.chat.client import ChatClient, Usage
from semantic_routing.chat.messages import Answer, Failure, Question
from semantic_routing.chat.server import ChatConfig
from semantic_routing.chat.spoken import CUT, THOUGHTS, FirstAnswers, spoken
from semantic_routing.evaluation.benchmark import Finding, Task
from semantic_routing.evaluation.drawbench import ASPECTS
from semantic_routing.evaluation.judges.base import (
    NO_THINKING,
    PROMPT,
    _identity,
    _judged,
    checked_template,
    read_picture,
    sha256,
)

UNIFIED_REWARD_TEMPLATE = Path(__file__).with_name("unified_reward.txt")
"""Our wording; the official one, in a file with {prompt} in the prompt's place, can be given instead."""
UNIFIED_REWARD_PARAMETERS = {"temperature": 0, "max_tokens": 1024}
JPEG_QUALITY = 95
REWARD_ADVICE = {
    CUT: f"allow longer answers, for example with --judge.extra '{{\"max_tokens\": 8192}}', or {NO_THINKING}",
    THOUGHTS: NO_THINKING,
    "": "use a UnifiedReward model as the judge, and give the request that it was trained with as --template",
}
"""Settings to try if a judge's first answers are useless, by reason."""
SCORE = re.compile(
    rf"\b({'|'.join(ASPECTS)})[\s*_]*score\b[^:\n]*:[\s*_`]*"
    r"([-+]?\d+(?:\.\d+)?|nan)(?![\w%]|\.\d)(?:[\s*_`]*/\s*(\d+))?",
    re.IGNORECASE,
)
"""Such as ``Alignment Score (1-5): 2.6947``, ``**Style Score:** 4`` or ``Coherence Score: 3.5/5``."""


class UnifiedRewardJudge:
    """UnifiedReward 2.0 (Wang et al., 2025): a reward model that writes three scores from 1 to 5."""

    def __init__(self, cfg: ChatConfig, template: Path = UNIFIED_REWARD_TEMPLATE) -> None:
        """``template`` is a text file with {prompt} in place of the prompt."""
        self.client = ChatClient(cfg)
        try:
            text = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the template {template} cannot be read; it must be a UTF-8 text file") from error
        self.template = checked_template(text, PROMPT, f"the template {template}")
        self._first = FirstAnswers(REWARD_ADVICE)

    @property
    def identity(self) -> dict[str, Any]:
        """Return the judge's identity and settings, for manifests."""
        return _identity("unified-reward", self.client, self.template, UNIFIED_REWARD_PARAMETERS)

    @property
    def usage(self) -> Usage:
        """Requests so far and their cost."""
        return self.client.usage

    def score(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Finding]]:
        """Yield every task with its finding, in order of arrival."""
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


def parse_scores(text: str) -> tuple[dict[str, float | None], str]:
    """Return the last score of each aspect, None if it is not a number from 1 to 5, and the reasons."""
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
