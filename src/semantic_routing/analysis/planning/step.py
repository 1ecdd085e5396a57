"""The timeline of training steps: loader, language model, autoencoder, blocks, and collectives of every block.

The GPU is one resource: streams share its units, so the frozen networks, which run a step ahead, only fill the moments
in which the step waits for links. Gathers are prefetched one block ahead, as FSDP does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from semantic_routing.analysis.planning.activations import HALF
from semantic_routing.analysis.planning.counts import FLOAT, Counts
from semantic_routing.analysis.planning.events import Task, simulate
from semantic_routing.analysis.planning.hardware import Assumptions, Gpu
from semantic_routing.analysis.planning.layout import Layout
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.metrics import BACKWARD

DATA, GPU, LINKS, NETWORK = "data", "products", "links", "network"
"""Resources: the loader, the GPU, the links of a shard group, and the network between replicas."""
WARM, MEASURED, AFTER = 4, 4, 2
"""Steps of a timeline before those that are measured, these, and steps whose batches are prepared during these."""
UPDATE_BYTES = 4 * FLOAT + 3 * FLOAT + FLOAT
"""Bytes a weight of an update: four tensors read, three written, and the gradient read once more for its norm."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds of the parts of one step on each GPU, each part alone."""

    load: float = 0.0
    """Reading and decoding of the step's images."""
    encode: float = 0.0
    """The language model, for all images of the step."""
    codec: float = 0.0
    """The autoencoder, for all images of the step."""
    text: float = 0.0
    """Forward preparation of the text of a microbatch."""
    block: float = 0.0
    """Forward pass of a block for a microbatch."""
    backward: float = float(BACKWARD)
    """Backward pass as a multiple of the forward pass, recomputation included."""
    gather_text: float = 0.0
    """All-gather of the weights outside the blocks."""
    gather_block: float = 0.0
    """All-gather of a block's weights."""
    scatter_text: float = 0.0
    """Reduce-scatter of the gradients outside the blocks."""
    scatter_block: float = 0.0
    """Reduce-scatter of a block's gradients."""
    reduce_text: float = 0.0
    """All-reduce of those shards between replicas."""
    reduce_block: float = 0.0
    """All-reduce of a block's shards between replicas."""
    update: float = 0.0
    """Norm, clipping and update of the weights."""

    def without(self, *names: str) -> Seconds:
        """Return the same step with parts that begin with these names taking no time."""
        gone = {field.name: 0.0 for field in fields(self) if field.name.startswith(names)}
        return replace(self, **gone)


def seconds_of(cfg: TrainConfig, counts: Counts, layout: Layout, gpu: Gpu, assumed: Assumptions) -> Seconds:
    """Return the seconds of each part of a step."""
    rate, images = assumed.utilisation * gpu.peak, layout.images
    recomputed = 1 if cfg.parallel.activation_checkpointing == "full" else 0
    reading = images * layout.gpus * (1e3 * assumed.record_kb + counts.stored) / assumed.storage(layout.nodes)
    replicas = layout.gpus // layout.shards
    replica_nodes = min(layout.nodes, replicas)
    resharded = 0.0 if cfg.parallel.strategy == "ddp" else 1.0

    def gather(size: int) -> float:
        return resharded * assumed.gather_seconds(float(size), gpu, layout.shards, layout.shard_nodes)

    def reduce(parameters: int) -> float:
        return 2 * assumed.gather_seconds(FLOAT * parameters / layout.shards, gpu, replicas, replica_nodes)

    return Seconds(
        load=max(images * 1e-3 * assumed.decode_ms / max(1, cfg.data.workers), reading),
        encode=images * counts.encoder_flops / rate,
        # Convolutions in float32 run in TF32, at half the rate of bfloat16.
        codec=images * counts.codec_flops / (rate / 2 if counts.codec_wide else rate),
        text=layout.microbatch * counts.text_flops / rate,
        block=layout.microbatch * counts.image_flops / rate / counts.depth,
        backward=float(BACKWARD + recomputed),
        gather_text=gather(HALF * counts.text),
        gather_block=gather(HALF * counts.block),
        scatter_text=gather(FLOAT * counts.text),
        scatter_block=gather(FLOAT * counts.block),
        reduce_text=reduce(counts.text),
        reduce_block=reduce(counts.block),
        update=UPDATE_BYTES * counts.parameters / layout.shards / gpu.bandwidth
        + counts.update_flops / layout.gpus / rate,
    )


@dataclass(frozen=True)
class StepTime:
    """A step in the middle of an undisturbed run."""

    seconds: float
    """Seconds from one step's end to the next."""
    busy: dict[str, float]
    """Share of that time in which each resource works."""

    @property
    def bottleneck(self) -> str:
        """The resource that works most."""
        return max(self.busy, key=lambda name: self.busy[name])


def time_step(
    part: Seconds, depth: int, accumulate: int = 1, buffer: int = 2, gathered_again: bool = True, overlap: bool = True
) -> StepTime:
    """Simulate steps of ``accumulate`` microbatches and return the time of one.

    The loader keeps ``buffer`` batches ready. ``gathered_again`` gathers weights for the backward pass, too. Without
    ``overlap`` everything waits for what came before, and the parts add up.
    """
    line = _Line(part, depth, accumulate, gathered_again, overlap)
    for step in range(WARM + MEASURED + AFTER):
        line.step(step, max(1, buffer))
    spans = simulate(line.tasks)
    begin, end = (spans[line.ends[last - 1]][1] for last in (WARM, WARM + MEASURED))
    total = dict.fromkeys((DATA, GPU, LINKS, NETWORK), 0.0)
    for task, (started, ended) in zip(line.tasks, spans, strict=True):
        total[task.resource] += max(0.0, min(ended, end) - max(started, begin))
    total[DATA] = MEASURED * part.load  # it runs ahead of the steps that are measured
    measured = end - begin
    busy = {name: spent / measured if measured else 0.0 for name, spent in total.items()}
    return StepTime(measured / MEASURED, busy)


class _Line:
    """The tasks of consecutive steps."""

    def __init__(self, part: Seconds, depth: int, accumulate: int, gathered_again: bool, overlap: bool) -> None:
        self.part, self.depth, self.accumulate = part, depth, accumulate
        self.gathered_again, self.overlap = gathered_again, overlap
        self.tasks: list[Task] = []
        self.ends: list[int] = []
        """The last task of each step."""
        self.taken: list[int] = []
        """The task after which each step's batch has left the loader."""

    def add(self, resource: str, seconds: float, *after: int, urgency: int = 0) -> int:
        """Add a task and return its position; negative positions in ``after`` stand for no task."""
        before = tuple(i for i in after if i >= 0)
        if not self.overlap and self.tasks:
            before = (*before, len(self.tasks) - 1)
        self.tasks.append(Task(resource, seconds, before, urgency))
        return len(self.tasks) - 1

    def step(self, step: int, buffer: int) -> None:
        """Add the tasks of the next step."""
        part, last = self.part, self.ends[-1] if self.ends else -1
        loaded = self.add(DATA, part.load, self.taken[step - buffer] if step >= buffer else -1)
        made, turn = loaded, self.ends[-2] if step > 1 else -1
        for seconds in (part.encode, part.codec):
            for _ in range(self.depth):  # pieces, between which more urgent work goes first
                made = self.add(GPU, seconds / self.depth, made, turn, urgency=1)
            if len(self.taken) == step:
                self.taken.append(made)
        done, reduced = last, list[int]()
        for left in reversed(range(self.accumulate)):
            done, reduced = self._microbatch(done, made, last=left == 0)
        self.ends.append(self.add(GPU, part.update, done, *reduced))

    def _microbatch(self, before: int, made: int, *, last: bool) -> tuple[int, list[int]]:
        """Add a forward and a backward pass; return the last product, and the ends of the reductions."""
        part, begun = self.part, before
        gathered = self.add(LINKS, part.gather_text, begun)
        done = [begun, self.add(GPU, part.text, gathered, begun, made)]
        for _ in range(self.depth):
            gathered = self.add(LINKS, part.gather_block, done[-2], gathered)
            done.append(self.add(GPU, part.block, gathered, done[-1]))
        again, reduced = (1.0 if self.gathered_again else 0.0), list[int]()
        for _ in range(self.depth):
            gathered = self.add(LINKS, again * part.gather_block, done[-2], gathered)
            done.append(self.add(GPU, part.backward * part.block, gathered, done[-1]))
            reduced += self._reduce(done[-1], part.scatter_block, part.reduce_block) if last else []
        gathered = self.add(LINKS, again * part.gather_text, done[-2], gathered)
        done.append(self.add(GPU, BACKWARD * part.text, gathered, done[-1]))
        reduced += self._reduce(done[-1], part.scatter_text, part.reduce_text) if last else []
        return done[-1], reduced

    def _reduce(self, product: int, scatter: float, reduce: float) -> list[int]:
        scattered = self.add(LINKS, scatter, product, urgency=1)
        return [self.add(NETWORK, reduce, scattered)]
