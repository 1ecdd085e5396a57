"""Ways to end other than well that are not the user's mistake; those are plain ``ValueError``."""

from __future__ import annotations


class TrainingFailed(RuntimeError):
    """Training cannot go on; the last checkpoint is whole."""


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
    """Work was stopped by a signal, and what was done is safe on disk."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        """The signal's number."""


def exit_code(error: BaseException) -> int:
    """What a command ends with: 2 for what the user can mend, 128 + n after signal n, 1 for all else."""
    if isinstance(error, Interrupted):
        return 128 + error.number
    return 2 if isinstance(error, ValueError) else 1
