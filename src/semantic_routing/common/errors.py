"""Errors that are not the user's mistake; the user's mistakes are ``ValueError``."""

from __future__ import annotations


class TrainingFailed(RuntimeError):
    """Training cannot continue; the last checkpoint is complete."""


class BadData(ValueError):
    """A record, or the picture or caption of one, that cannot be used; picklable, so that workers may raise it.

    Args:
        reason: A fixed phrase, so that equal reasons can be counted.
        detail: What exactly is wrong.
        shard: Name of the record's shard; empty outside of a source.
        key: The record's key, or what is known of it.
    """

    def __init__(self, reason: str, detail: str, shard: str = "", key: str = "") -> None:
        super().__init__(reason, detail, shard, key)
        self.reason, self.detail, self.shard, self.key = reason, detail, shard, key

    def __str__(self) -> str:
        said = f"{self.reason}: {self.detail}" if self.detail else self.reason
        return f"record {self.key!r} of {self.shard}: {said}" if self.shard else said


class Interrupted(RuntimeError):
    """A signal stopped the work; its progress is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        """Number of the signal."""


def exit_code(error: BaseException) -> int:
    """Return a command's exit code: 2 for a mistake of the user, 128 + n after signal n, else 1."""
    if isinstance(error, Interrupted):
        return 128 + error.number
    return 2 if isinstance(error, ValueError) else 1
