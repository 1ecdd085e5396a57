"""``semroute overhead``: the cost of every arm, as in the paper's Table 4."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from semantic_routing.analysis.overhead import SCALES, measure, table, to_json
from semantic_routing.common.device import pick_device
from semantic_routing.common.files import write_text
from semantic_routing.model.arms import ARMS, PAPER_ARMS, parse_arm


@dataclass(frozen=True, kw_only=True)
class OverheadArguments:
    """Measure the cost of one image with every arm (the paper's Table 4)."""

    scale: Literal["paper", "toy"] = "paper"
    """Sizes of the networks and of the image."""
    arms: tuple[str, ...] = PAPER_ARMS
    """Routing strategies to measure."""
    text_tokens: int = 32
    """Length of the prompt in tokens, for the counts of this program."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device for latency and memory; auto measures them only if there is a CUDA device."""
    compile: bool = False
    """Compile the network before it is timed, as semroute sample --compile does."""
    json: Path | None = None
    """JSON file for the numbers; without a name, or with -, JSON is printed instead of the table."""


def run_overhead(args: OverheadArguments) -> str:
    """Measure the arms and return the text to print."""
    cuda = args.device == "auto" and torch.cuda.is_available()
    device = pick_device(args.device) if cuda or args.device != "auto" else None
    if not args.arms:
        raise ValueError(f"nothing to measure: give --arms with some of {', '.join(ARMS)}")
    arms = [parse_arm(arm) for arm in args.arms]
    how: dict[str, Any] = {"scale": SCALES[args.scale], "device": device, "compiled": args.compile}
    rows = [measure(arm, text_tokens=args.text_tokens, **how) for arm in arms]
    if args.json is None:
        return table(rows)
    text = json.dumps(to_json(rows), indent=2)
    if args.json == Path("-"):
        return text
    write_text(args.json, text + "\n")
    return table(rows)
