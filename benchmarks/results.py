"""Writes the results of a benchmark and their manifest."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from semantic_routing.common.files import write_text
from semantic_routing.common.manifest import manifest


def save(args: Namespace, found: dict[str, Any], **seeds: int) -> None:
    """Write ``found`` to ``args.out`` and NAME-manifest.json beside it; do nothing if ``args.out`` is None."""
    if args.out is None:
        return
    path: Path = args.out
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(args).items()}
    write_text(path, json.dumps(found, indent=2) + "\n")
    facts = manifest(settings=settings, seeds=seeds)
    write_text(path.with_name(f"{path.stem}-manifest.json"), json.dumps(facts, indent=2) + "\n")
