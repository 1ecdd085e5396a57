"""Prompts as token ids: the tokenizer of a language model, what is put before a prompt, and where prompts are cut."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

from semantic_routing.text.architecture import positions
from semantic_routing.text.chat_template import in_chat
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.gguf import gguf_tokenizer
from semantic_routing.text.quiet import first_line
from semantic_routing.text.source import Source

_BUSY = threading.RLock()
"""Held while a tokenizer works: fast tokenizers keep the settings of a call, and threads may share one."""


def load_tokenizer(config: TextEncoderConfig, source: Source) -> Any:
    """Load a model's tokenizer; ValueError if it has none, or lacks the chat template that ``config`` asks for."""
    from transformers import AutoTokenizer

    try:
        if source.file is None:
            tokenizer = AutoTokenizer.from_pretrained(source.place, trust_remote_code=False)
        else:
            tokenizer = gguf_tokenizer(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{config.name_or_path!r} has no tokenizer that transformers can load: {first_line(error)}"
        ) from error
    # Where the files are missing transformers may make a tokenizer that knows special tokens alone.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise ValueError(f"{config.name_or_path!r} has no tokenizer: save one there with save_pretrained")
    if config.chat_template and tokenizer.chat_template is None:
        raise ValueError(f"{config.name_or_path!r} has no chat template; set chat_template=False")
    return tokenizer


def check_sizes(model: Any, tokenizer: Any, config: TextEncoderConfig) -> None:
    """Raise ValueError if the model has no embedding for some tokens, or fewer positions than ``max_tokens``."""
    rows = model.get_input_embeddings().weight.shape[0]
    # Special tokens that no prompt holds may lie beyond: Gemma 3's mark of an image, in its text-only models, or a
    # padding token that was added. Those that begin or end every text count.
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = max({*tokenizer.get_vocab().values()} - special | {*tokenizer("")["input_ids"]})
    if last >= rows:
        raise ValueError(
            f"the tokenizer of {config.name_or_path!r} has tokens up to {last}, but its model has {rows} embeddings: "
            "it belongs to another model"
        )
    if (known := positions(model)) is not None and known < config.max_tokens:
        raise ValueError(
            f"max_tokens is {config.max_tokens}, but {config.name_or_path!r} has {known} positions: lower max_tokens"
        )


class PromptTokenizer:
    """Converts prompts to the token ids that a model reads."""

    def __init__(self, tokenizer: Any, config: TextEncoderConfig, rows: int, limit: int) -> None:
        """``rows`` is the number of the model's token embeddings, ``limit`` the most tokens that a prompt may have."""
        tokenizer.truncation_side = "right"
        self.tokenizer, self.config, self.rows, self.limit = tokenizer, config, rows, limit
        pad = tokenizer.pad_token_id or 0
        self.pad = pad if 0 <= pad < rows else 0

    def __call__(self, prompts: Sequence[str], *, strict: bool, stacklevel: int = 3) -> list[tuple[int, ...]]:
        """Return each prompt's token ids, at least one and at most ``limit``.

        A prompt that does not reach the model is a ValueError, or a warning if not ``strict``.
        """
        with _BUSY:
            texts, special = self._texts(prompts, strict=strict)
            rows = self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
            self._check_known(prompts, rows, strict, stacklevel + 1)
            self._cut(prompts, texts, rows, special, stacklevel + 1)
        found = [tuple(row) or (self._null_token,) for row in rows]
        if (largest := max(map(max, found))) >= self.rows:
            raise ValueError(
                f"the tokenizer of {self.config.name_or_path!r} gives token {largest}, but its model has {self.rows} "
                "embeddings: it belongs to another model"
            )
        return found

    def position(self, prompt: str, end: int) -> int:
        """Return the position of the token that holds the last character before ``end`` of a prompt.

        Raises ValueError if the tokenizer does not say which characters its tokens hold.
        """
        (text,), special = self._texts([prompt], strict=True)
        at = text.rfind(prompt) + end - 1
        spans: list[tuple[int, int]] = []
        if self.tokenizer.is_fast:
            with _BUSY:
                found = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
            spans = found["offset_mapping"]
        holding = [token for token, (first, last) in enumerate(spans) if first <= at < last]
        if not holding:
            raise ValueError(
                f"the tokenizer of {self.config.name_or_path!r} does not say which token ends {prompt[:end]!r}"
            )
        return holding[-1]

    def _texts(self, prompts: Sequence[str], *, strict: bool) -> tuple[list[str], bool]:
        """Return the prompts with prefix and chat template, and whether special tokens are still to be added."""
        texts = [self.config.prefix + prompt for prompt in prompts]
        if not self.config.chat_template:
            return texts, True
        return in_chat(self.tokenizer, texts, self.config.name_or_path, strict=strict), False

    def _cut(
        self, prompts: Sequence[str], texts: Sequence[str], rows: list[list[int]], special: bool, stacklevel: int
    ) -> None:
        """Cut token ids to the limit, with a warning; ValueError if nothing of a prompt is left."""
        limit = self.limit
        long = [i for i, row in enumerate(rows) if len(row) > limit]
        if not long:
            return
        for i in long:
            self._check_room(texts[i], prompts[i], special)
        dropped = sum(len(rows[i]) - limit for i in long)
        warnings.warn(
            f"{dropped} tokens dropped from {len(long)} of {len(rows)} prompts, longer than {limit}",
            stacklevel=stacklevel,
        )
        for i in long:  # by the tokenizer, which keeps a closing token such as T5's </s>
            cut = self.tokenizer(texts[i], add_special_tokens=special, truncation=True, max_length=limit)
            rows[i] = cut["input_ids"]

    def _check_known(self, prompts: Sequence[str], rows: Sequence[list[int]], strict: bool, stacklevel: int) -> None:
        """Raise ValueError, or warn, if the tokenizer recognises nothing in a prompt that is not blank."""
        if self.config.prefix or self.config.chat_template:  # whose tokens do not count
            rows = self.tokenizer([*prompts], add_special_tokens=False, verbose=False)["input_ids"]
        special = {*self.tokenizer.all_special_ids}
        marks = {*self.tokenizer.all_special_tokens}
        lost = [
            prompt
            for prompt, row in zip(prompts, rows, strict=True)
            if not set(row) - special and prompt.strip() and prompt.strip() not in marks
        ]
        if not lost:
            return
        message = f"the tokenizer of {self.config.name_or_path!r} recognises nothing in {lost[0][:80]!r}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=stacklevel)

    def _check_room(self, text: str, prompt: str, special: bool) -> None:
        """Raise ValueError if prefix and chat template take up all tokens, so that nothing of a prompt is left."""
        before = text[: max(0, text.rfind(prompt))]
        if prompt and before and len(self.tokenizer(before, add_special_tokens=special)["input_ids"]) >= self.limit:
            raise ValueError(
                f"nothing of {prompt[:80]!r} is left in {self.limit} tokens: shorten prefix or chat template, "
                "or raise max_tokens"
            )

    @property
    def _null_token(self) -> int:
        """The token that stands for a text without tokens."""
        tokenizer = self.tokenizer
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            if token is not None:
                return token
        raise ValueError(
            f"the tokenizer of {self.config.name_or_path} has no BOS, EOS or PAD token for an empty prompt"
        )
