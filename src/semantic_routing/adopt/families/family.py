"""The fields of a family: where a kind of pipeline encodes its text, and where its transformer's blocks read it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Kind = Literal["read", "stream", "slot", "own"]
Place = Callable[[Any, Mapping[str, Any], Sequence[int]], list[tuple[int, int]]]
"""(transformer, arguments, lengths of the prompts) -> first row and number of rows of each sample's text."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A list of blocks of one class, or of projections, and the argument that holds their text."""

    path: str
    """Name of the list in the transformer."""
    arguments: str
    """Names of the arguments of a block's ``forward``, in order; another release of diffusers may differ."""
    text: str
    """The argument that holds the text, or the sequence that text and image share."""
    joint: bool = False
    """Whether text and image share one sequence, of which the text is a part."""
    output: int | None = None
    """Number of the output that holds the text; None if there is only one output."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of pipelines: its classes, the state that it reads, and the blocks that read it."""

    name: str
    """Name in files."""
    kind: Kind
    """``read``: the text is an argument of the blocks. ``stream``: blocks update the text. ``slot``: a projection for
    each block reads a layer of its own. ``own``: pipelines of this program."""
    transformer: str
    """Class of the transformer."""
    encoder: str = "text_encoder"
    """Component whose states are read."""
    encoders: tuple[str, ...] = ()
    """Classes of the text encoder that are known to be read so; empty if the transformer decides it."""
    reads: tuple[int, ...] = ()
    """Entries of ``hidden_states`` that the pipeline reads and joins by channels; none for ``last_hidden_state``."""
    text: str = "encoder_hidden_states"
    """Argument of the transformer that holds the text."""
    entrance: tuple[str, ...] = ()
    """Modules that take the text to the transformer's width, one after the other, before any block."""
    blocks: tuple[Blocks, ...] = ()
    """Lists of blocks, in order; for ``slot`` the list of projections."""
    place: Place | None = None
    """Function that finds the text in sequences shared with the image."""
    timestep: str = "timestep"
    """Argument of the transformer that holds the time."""
    time: Callable[[Tensor], Tensor] = lambda timestep: 1 - timestep / 1000
    """Function from that argument to the time t: 0 noise, 1 data."""
    native: Callable[[Any, Any, int], tuple[Tensor, list[int], int]] | None = None
    """(transformer, text argument, L) -> states, the number of each row's original state, and the number of states
    before layer 1; None if the pipeline passes only the states that it reads."""
    refuses: Callable[[Any, int], str | None] = lambda transformer, layers: None
    """(transformer, L) -> the name of an option for which the family does not hold, or None."""

    @property
    def slots(self) -> int:
        """Number of states that the entrance reads, joined by channels."""
        return max(1, len(self.reads))


def named_if(found: Any, option: str) -> str | None:
    """Return the option's name if it was found."""
    return option if found else None


def module_at(root: nn.Module, path: str) -> Any:
    """Return a part of a module by its dotted name."""
    return root.get_submodule(path)


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's ``forward``."""
    return tuple(name for name in inspect.signature(type(module).forward).parameters if name != "self")


def check_signature(transformer: nn.Module, blocks: Blocks) -> None:
    """Raise ValueError if the blocks' arguments differ from those that the family was written for."""
    for block in module_at(transformer, blocks.path):
        found = " ".join(arguments_of(block))
        if found != blocks.arguments:
            raise ValueError(
                f"the blocks {blocks.path} of {type(transformer).__name__} take ({found}), but adopt knows them with "
                f"({blocks.arguments}): this release of diffusers differs from the one that adopt was written for; "
                "install one that semantic-routing names, such as diffusers 0.42"
            )
