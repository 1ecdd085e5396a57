"""``semroute explore``: a page in the browser on which a model is tried out."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from semantic_routing.adopt.edits import RoutingEdits
from semantic_routing.common.device import keep_freed_memory, pick_device
from semantic_routing.common.extras import require
from semantic_routing.explorer.address import check_address
from semantic_routing.explorer.models import check_alike
from semantic_routing.explorer.opening import open_for_page
from semantic_routing.explorer.session import Session
from semantic_routing.explorer.state import State
from semantic_routing.training.recipes import TOY_SAMPLING

LOCAL = "127.0.0.1"
TOY_STEPS = 25
"""Steps of a toy picture, whole in a few seconds on two cores."""


@dataclass(frozen=True, kw_only=True)
class ExploreArguments:
    """Try a model out in the browser: prompts, pictures step by step, and edits of its routing."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run's folder, one of its checkpoints, a pipeline of semroute export, or the folder of semroute adopt train."""
    beside: Path | None = None
    """Another model, which draws the same prompts from the same noise."""
    routing: str | None = None
    """JSON file of edited weights to begin with; for a pipeline, the folder or file of its adopted routing."""
    edits: Path | None = None
    """JSON file of edits of an adopted routing to begin with, as the page saves them."""
    host: str = LOCAL
    """Address to listen on; by default only this machine can open the page, and 0.0.0.0 lets others open it, too."""
    port: int = 7860
    """Port of the page."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1 or another of torch's names."""


def run_explore(args: ExploreArguments) -> None:
    """Serve the page until the command is interrupted; the address is printed when it answers."""
    require("gradio", what="semroute explore", extra="explore")
    from semantic_routing.explorer.serve import serve

    check_address(args.host, args.port)  # before models are loaded
    keep_freed_memory()
    device = pick_device(args.device)
    opened = open_for_page(args.model, device, args.routing, args.edits)
    models = [opened.model]
    if args.beside is not None:
        models.append(open_for_page(args.beside, device).model)
        check_alike(*models)
    session = Session(models)
    address = serve(session, beginning(session, opened.edits), args.host, args.port)
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
    wait()


def beginning(session: Session, edits: RoutingEdits) -> State:
    """Return the state with which the page begins: of toy models the first unseen caption, in the steps they need."""
    state = State(edit=edits.override, gains=dict(edits.gains), scale=edits.scale)
    if not session.models[0].world:
        return state
    sampler, shift = TOY_SAMPLING.sampler, TOY_SAMPLING.shift
    return replace(state, prompt=session.examples[0].caption, steps=TOY_STEPS, sampler=sampler, shift=shift)


def wait() -> None:
    """Return when the command is interrupted or ended."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
