"""The table of arms: the name and label of every conditioning strategy, and what its routing depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from semantic_routing.common.config import nearest


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A routing strategy: how the transformer's blocks read the language model's layers."""

    name: str
    """Name in configurations and checkpoints."""
    label: str
    """Label in the paper; for arms beyond the paper the same as the name."""
    reads: str
    """Description for reports of what a block reads."""
    paper: bool = True
    """Whether the paper has this arm."""
    learned: bool = True
    """Whether its router has parameters."""
    by_time: bool = False
    """Whether the weights depend on the diffusion time."""
    by_block: bool = False
    """Whether every block has its own weights."""
    by_side: bool = False
    """Whether a block's keys and its values have separate weights."""
    by_head: bool = False
    """Whether every key/value head of a block has its own weights."""
    low_rank: bool = False
    """Whether the heads of a block differ only along a few learned contrasts between layers."""
    by_token: bool = False
    """Whether every token has its own weights, which then depend on the text."""
    time_from: Literal["nominal", "latent"] = "nominal"
    """Where a gate's time comes from: the step's time, or an estimate from the noisy latent."""
    reads_keys: bool = False
    """Whether blocks read a layer's attention keys and values; there is no router then."""

    @property
    def title(self) -> str:
        """Label and name, such as "S2 depth"."""
        return self.label if self.label.lower() == self.name else f"{self.label} {self.name}"

    @property
    def takes_clock(self) -> bool:
        """Whether sampling can evaluate its gates at another time than the nominal one (Table 3)."""
        return self.by_time and self.time_from == "nominal"

    @property
    def has_weights(self) -> bool:
        """Whether its weights over layers can be shown without a prompt."""
        return not (self.reads_keys or self.by_token)

    @property
    def finer(self) -> bool:
        """Whether a block reads several mixes of layers."""
        return self.by_side or self.by_head

    def split(self, kv_heads: int) -> tuple[int, int]:
        """Return into how many sides (keys, values) and heads a block's mixes divide; (1, 1) is one mix for all."""
        return 2 if self.by_side else 1, kv_heads if self.by_head else 1

    def parts(self, kv_heads: int) -> tuple[str, ...]:
        """Return the names of a block's mixes in order, such as "head 1, values"; one empty name for a single mix."""
        sides = ("keys", "values") if self.by_side else ("",)
        heads = [f"head {head}" for head in range(kv_heads)] if self.by_head else [""]
        return tuple(", ".join(filter(None, (head, side))) for side in sides for head in heads)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(name="penultimate", label="B1", learned=False, reads="every block reads the last layer but one"),
        Arm(name="uniform", label="B2", learned=False, reads="every block reads the plain average of all layers"),
        Arm(name="static", label="B3", reads="one learned mixture of all layers serves every block"),
        Arm(
            name="time",
            label="S1",
            by_time=True,
            reads="one learned mixture of all layers that changes with the time serves every block",
        ),
        Arm(name="depth", label="S2", by_block=True, reads="every block learns its own mixture of all layers"),
        Arm(
            name="joint",
            label="S3",
            by_time=True,
            by_block=True,
            reads="every block learns its own mixture of all layers, which changes with the time",
        ),
        Arm(
            name="fusedit",
            label="FuseDiT",
            learned=False,
            by_block=True,
            reads_keys=True,
            reads="every block attends to the keys and values of one language-model layer",
        ),
        Arm(
            name="hard",
            label="hard",
            paper=False,
            learned=False,
            by_block=True,
            reads="every block reads one layer, shallow blocks shallow layers and deep blocks deep ones",
        ),
        Arm(
            name="attention",
            label="attention",
            paper=False,
            by_token=True,
            reads="every token learns its own mixture of all layers, the same for all blocks",
        ),
        Arm(
            name="time-state",
            label="time-state",
            paper=False,
            by_time=True,
            time_from="latent",
            reads="one learned mixture serves every block and changes with the time, estimated from the noisy latent",
        ),
        Arm(
            name="joint-state",
            label="joint-state",
            paper=False,
            by_time=True,
            by_block=True,
            time_from="latent",
            reads="every block learns its own mixture, which changes with the time, estimated from the noisy latent",
        ),
        Arm(
            name="depth-kv",
            label="depth-kv",
            paper=False,
            by_block=True,
            by_side=True,
            reads="every block learns two mixtures of all layers, one for its keys and one for its values",
        ),
        Arm(
            name="depth-heads",
            label="depth-heads",
            paper=False,
            by_block=True,
            by_head=True,
            reads="every key/value head of every block learns its own mixture of all layers",
        ),
        Arm(
            name="depth-heads-kv",
            label="depth-heads-kv",
            paper=False,
            by_block=True,
            by_side=True,
            by_head=True,
            reads="every key/value head of every block learns two mixtures of all layers, for its keys and its values",
        ),
        Arm(
            name="depth-low-rank",
            label="depth-low-rank",
            paper=False,
            by_block=True,
            by_side=True,
            by_head=True,
            low_rank=True,
            reads="every block learns a mixture of all layers, from which the keys and the values of its heads depart "
            "along a few contrasts between layers that all blocks share",
        ),
    )
}
PAPER_ARMS = tuple(arm.name for arm in ARMS.values() if arm.paper)
DEFAULT_ARM = "depth"
"""The arm with the best results in the paper."""


def parse_arm(name: str) -> str:
    """Return the name of the arm with this name or paper label (B1 B2 B3 S1 S2 S3 FuseDiT)."""
    lowered = name.lower()
    labels = {arm.label.lower(): arm.name for arm in ARMS.values()}
    if lowered not in {**ARMS, **labels}:
        raise ValueError(f"unknown arm {name!r}; {nearest(lowered, [*ARMS, *labels])}")
    return labels.get(lowered, lowered)
