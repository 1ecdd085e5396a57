"""Answers without the model's reasoning, and advice if a model's first answers are useless."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping

from tqdm import tqdm

from semantic_routing.chat.messages import Answer, Failure

CUT, EMPTY, THOUGHTS, STOPPED = "cut off", "empty answer", "thoughts without an answer", "stopped"
"""Why an answer has no complete text."""
LENGTH = re.compile(r"length|max|limit|truncat|incomplete", re.IGNORECASE)
"""In a finish_reason: the answer reached its longest. Servers write length, model_length, max_tokens, MAX_TOKENS ..."""
ENDED = re.compile(r"filter|safety|recitation|refus|prohibited|block|error|abort|cancel|timeout", re.IGNORECASE)
"""In a finish_reason: the answer was broken off, or kept back."""
_NAMES = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad)"
_OPEN = rf"<{_NAMES}>|\[THINK\]|\u25c1think\u25b7|<\|begin_of_thought\|>|<unused94>|<\|?channel\|?>(?:analysis|thought)"
_CLOSE = (
    rf"</{_NAMES}>|\[/THINK\]|\u25c1/think\u25b7|<\|end_of_thought\|>|<unused95>"
    r"|<\|channel\|>final<\|message\|>|<channel\|>"
)
OPEN, CLOSE = re.compile(_OPEN, re.IGNORECASE), re.compile(_CLOSE, re.IGNORECASE)
"""The marks around thoughts of Qwen, DeepSeek and most others, Magistral, Kimi, MedGemma, gpt-oss and Gemma."""
FRAME = re.compile(r"</?answer>|<\|(?:begin|end)_of_(?:box|solution)\|>|<\|(?:return|end)\|>\s*$", re.IGNORECASE)
"""Marks that some models put around the answer after their thoughts."""
ENOUGH = 3
"""Useless answers, more than useful ones, after which a line advises."""


def spoken(answer: Answer) -> str | Failure:
    """Return the text of an answer, without reasoning, or why it is missing or incomplete."""
    text, thought = without_thoughts(answer.text)
    thought = thought or answer.thought
    if LENGTH.search(answer.finish):
        return Failure(reason=CUT, detail=text[:200] or ("while it was thinking" if thought else ""))
    if ENDED.search(answer.finish):
        return Failure(reason=STOPPED, detail=answer.finish)
    if not text:
        return Failure(reason=THOUGHTS if thought else EMPTY)
    return text


def without_thoughts(text: str) -> tuple[str, bool]:
    """Return the text after all reasoning, empty if the reasoning does not end; and whether there was any.

    A server may remove the opening tag, so everything before a closing tag is reasoning.
    """
    closed = [*CLOSE.finditer(text)]
    said = text[closed[-1].end() :] if closed else text
    opened = OPEN.search(said)
    if opened:
        said = ""
    if closed or opened:
        said = FRAME.sub("", said)
    return said.strip(), bool(closed or opened)


class FirstAnswers:
    """Watches a model's first answers; if most are unusable, prints once which option to set."""

    def __init__(self, advice: Mapping[str, str]) -> None:
        """``advice`` is by reason; that of the empty reason is for all others."""
        self.advice = advice
        self._useful, self._useless, self._advised = 0, Counter[str](), False

    def note(self, reason: str = "") -> None:
        """Count the reason why an answer is unusable; empty for a usable one."""
        self._useful += not reason
        if not reason:
            return
        self._useless[reason.partition(":")[0]] += 1
        useless = self._useless.total()
        if self._advised or useless < ENOUGH or useless <= self._useful:
            return
        self._advised = True
        worst = self._useless.most_common(1)[0][0]
        advice = self.advice.get(worst, self.advice.get("", ""))
        tqdm.write(
            f"semroute: {useless} of the first {useless + self._useful} answers cannot be used ({worst}); {advice}",
            file=sys.stderr,
        )
