"""The sizes and choices that a routing's parameters depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that a routing's parameters depend on; the header of its file."""

    version: int = 1
    family: str
    transformer: str
    """Class of the transformer."""
    component: str = "transformer"
    """Name of the transformer in the pipeline."""
    blocks: int
    """Number of blocks, D."""
    slots: int = 1
    """Rows of weights for each block: one for each state that the text input reads, concatenated by channels."""
    encoder: str
    """Class of the text encoder."""
    width: int
    """Width of a state, C."""
    layers: int
    """Number of the language model's layers, L; states are the original and layers 1 to L."""
    origin: str
    """The hidden state that the model originally reads, as the family names it."""
    arm: str
    weights: str
    injection: str = "swap"
    base_model: str = ""
    """Name or folder of the model that was adopted."""

    @property
    def rows(self) -> int:
        """Number of rows of weights."""
        return self.blocks * self.slots
