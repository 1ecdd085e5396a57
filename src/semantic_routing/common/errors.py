"""Errors that are not the user's mistake; the user's mistakes are ``ValueError``."""

from __future__ import annotations


class TrainingFailed(RuntimeError):
    """Training cannot continue; the last checkpoint is complete."""


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
