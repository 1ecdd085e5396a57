"""Seconds of the explorer: from the command to a page that answers, a preview while dragging, a whole picture.

    python benchmarks/explore.py RUN [--repeats 5] [--port 7861] [--out FILE]

The command runs in a process of its own. Preview and picture are drawn in this process, as the page draws them: the
chosen block reads another layer each time, and the picture as learned has been drawn before. Medians.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median

from results import save


def until_it_answers(run: Path, port: int) -> float:
    """Start the command and return the seconds until its page is there."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "semantic_routing", "explore", str(run), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            while server.poll() is None:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
                        page.read()
                    return time.perf_counter() - began
                except urllib.error.URLError:
                    time.sleep(0.05)
            sys.exit(f"semroute explore ended with exit code {server.returncode}")
        finally:
            server.terminate()


def timed(work: Iterable[object]) -> float:
    """Return the seconds that an iterator takes to its end."""
    began = time.perf_counter()
    for _ in work:
        pass
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=7861)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {"page": until_it_answers(args.run, args.port)}

    from semantic_routing.adopt.edits import NO_EDITS
    from semantic_routing.cli.explore import beginning
    from semantic_routing.common.device import keep_freed_memory, pick_device
    from semantic_routing.explorer.opening import open_for_page
    from semantic_routing.explorer.session import Session
    from semantic_routing.model.override import RoutingOverride

    keep_freed_memory()
    session = Session([open_for_page(args.run, pick_device("cpu"), None).model])
    state = beginning(session, NO_EDITS)
    columns = session.models[0].columns
    times: dict[str, list[float]] = {"preview": [], "picture": []}
    timed(session.draw(state))  # as learned, and the first use of everything
    for turn in range(args.repeats):
        row = [float(i == turn % len(columns)) for i in range(len(columns))]
        edited = replace(state, edit=RoutingOverride(("block 0",), (tuple(row),)))
        times["preview"].append(timed(session.preview(edited)))
        times["picture"].append(timed(session.draw(edited)))
    found |= {name: median(values) for name, values in times.items()}
    for name, value in found.items():
        sys.stdout.write(f"{name:8} {value:6.2f} s\n")
    save(args, found, noise=state.seed)


if __name__ == "__main__":
    main()
