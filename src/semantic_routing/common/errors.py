"""Ways to end other than well that are not the user's mistake; those are plain ``ValueError``."""

from __future__ import annotations


class TrainingFailed(RuntimeError):
    """Training cannot go on; the last checkpoint is whole."""


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
