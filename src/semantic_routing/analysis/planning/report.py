"""The tables of ``semroute plan`` as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from semantic_routing.analysis.planning.counts import Counts
from semantic_routing.analysis.planning.hardware import GPUS, Assumptions
from semantic_routing.analysis.planning.plan import RUNS, Plan
from semantic_routing.analysis.table import Table
from semantic_routing.training.config import TrainConfig

GB, TERA = 1e9, 1e12


def report(
    cfg: TrainConfig,
    counts: Counts,
    plans: Sequence[Plan],
    gpu: str,
    tokens: int,
    assumed: Assumptions,
    price: float | None,
) -> str:
    """Return all tables, and the assumptions below them."""
    parts = [counted(cfg, counts, tokens), layouts(plans, gpu, assumed), steps(plans), runs(cfg, plans, price)]
    return "\n\n".join([*(table.markdown() for table in parts), assumptions(cfg, gpu, assumed)])


def counted(cfg: TrainConfig, counts: Counts, tokens: int) -> Table:
    """Return the counts of an image and of the networks."""
    kept = ", ".join(f"{counts.activations[kind] / GB:.2f}" for kind in ("none", "selective", "full"))
    rows = {
        "weights of the transformer": f"{counts.parameters:,}",
        "weights of the language model, of the autoencoder": f"{counts.encoder:,}, {counts.codec:,}",
        "FLOPs per image: transformer, forward and backward": f"{counts.train_flops / TERA:.2f} TFLOP",
        "FLOPs per image: language model": f"{counts.encoder_flops / TERA:.2f} TFLOP",
        "FLOPs per image: autoencoder": f"{counts.codec_flops / TERA:.2f} TFLOP",
        "saved for backward per image: no, selective, full activation checkpointing": f"{kept} GB",
        "a prefetched image": f"{counts.ahead / GB:.2f} GB",
        "a checkpoint": f"{counts.states / GB:.1f} GB",
    }
    head = (f"counted ({cfg.model.arm}, {cfg.image_size}x{cfg.image_size}, prompts of {tokens} tokens)", "")
    return Table(head, [list(row) for row in rows.items()])


def layouts(plans: Sequence[Plan], gpu: str, assumed: Assumptions) -> Table:
    """Return the layout and the memory of each GPU."""
    usable = assumed.usable_memory * GPUS[gpu].memory / GB
    head = (
        "GPUs",
        "GPUs per shard group",
        "images per GPU",
        "per microbatch",
        "--accumulate",
        f"memory (GB of {usable:.0f})",
    )
    return Table(
        head,
        [
            [
                str(one.layout.gpus),
                str(one.layout.shards),
                str(one.layout.images),
                str(one.layout.microbatch),
                str(one.layout.accumulate),
                f"{one.layout.memory / GB:.1f}" + ("" if one.layout.fits else ": does not fit"),
            ]
            for one in plans
        ],
    )


def steps(plans: Sequence[Plan]) -> Table:
    """Return the time of a step, its bottleneck, and what it would be without some parts."""
    names = list(plans[0].without)
    head = (
        "GPUs", "step (s)", "images/s", "bottleneck", "busy: data, products, links, network",
        *(f"without {name} (s)" for name in names), "nothing overlapped (s)",
    )  # fmt: skip
    return Table(
        head,
        [
            [
                str(one.layout.gpus),
                f"{one.step.seconds:.3f}",
                f"{one.layout.gpus * one.layout.images / one.step.seconds:,.0f}",
                one.step.bottleneck,
                ", ".join(f"{share:.0%}" for share in one.step.busy.values()),
                *(f"{one.without[name]:.3f}" for name in names),
                f"{one.in_turn:.3f}",
            ]
            for one in plans
        ],
    )


def runs(cfg: TrainConfig, plans: Sequence[Plan], price: float | None) -> Table:
    """Return time, GPU hours and cost of the whole run, and what failures add."""
    head = (
        "GPUs", f"{cfg.steps:,} steps", "checkpoint written in (s)", "waiting for checkpoints", "failures expected",
        "one crash adds", "one hang adds", "of which the watchdog waits", "mean of runs with failures", "worst",
        "GPU hours", *(() if price is None else ("cost",)),
    )  # fmt: skip
    rows = []
    for one in plans:
        hours = one.layout.gpus * one.mean / 3600
        row = [
            str(one.layout.gpus), duration(one.calm), f"{one.write:.0f}", f"{one.saving / one.calm:.2%}",
            f"{one.failures:.2f}", duration(one.crash), duration(one.hang), duration(one.detect),
            duration(one.mean), duration(one.worst), f"{hours:,.0f}",
        ]  # fmt: skip
        rows.append(row if price is None else [*row, f"{price * hours:,.0f}"])
    return Table(head, rows)


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2f} {unit}" if unit != "min" else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def assumptions(cfg: TrainConfig, gpu: str, assumed: Assumptions) -> str:
    """Return in words what the numbers assume."""
    card = GPUS[gpu]
    return (
        f"Derived from counts, not measured. Assumed: {gpu} with products at {assumed.utilisation:.0%} of "
        f"{card.peak / TERA:.0f} TFLOP/s; links at {card.nvlink / GB:.0f} GB/s per GPU inside a machine of "
        f"{assumed.node} and {assumed.network_gb:g} GB/s between machines, rings with {assumed.hop_us:g} and "
        f"{assumed.network_hop_us:g} us per step; {assumed.decode_ms:g} ms per image in each of "
        f"{max(1, cfg.data.workers)} workers per GPU; storage at {assumed.storage_node_gb:g} GB/s per machine and "
        f"{assumed.storage_gb:g} GB/s in all; an unexpected end every {assumed.gpu_hours_per_failure:,.0f} GPU hours, "
        f"{assumed.hang_share:.0%} of them hangs; {assumed.restart_s:g} s plus the loading of checkpoint and networks "
        f"to start again; means of {RUNS} simulated runs."
    )
