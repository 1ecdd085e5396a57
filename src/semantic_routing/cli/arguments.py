"""Command-line arguments from dataclasses, through tyro, with unknown options named as one clear error."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

import tyro

from semantic_routing.common.config import check_finite

T = TypeVar("T")
WORDS = {
    "guidance": ("cfg", "cfg-scale", "guidance-scale", "scale"),
    "steps": ("num-inference-steps", "sampling-steps", "max-train-steps", "max-steps", "train-steps", "num-steps"),
    "images-per-prompt": ("n", "num-images-per-prompt", "num-images", "batch-count", "n-samples"),
    "negative-prompt": ("negative", "neg", "uncond"),
    "batch": ("batch-size", "train-batch-size", "b"),
    "lr": ("learning-rate",),
    "out": ("output-dir", "output", "outdir", "save-path", "o"),
    "sampler": ("scheduler", "sampler-name", "sampling-method"),
    "height": ("h", "image-height", "resolution", "size"),
    "width": ("w", "image-width"),
    "image-size": ("resolution", "size"),
    "model": ("ckpt", "checkpoint", "pretrained-model-name-or-path"),
    "accumulate": ("gradient-accumulation-steps",),
    "warmup": ("lr-warmup-steps",),
    "precision": ("mixed-precision",),
    "clip": ("max-grad-norm",),
}
"""Our options, and what diffusers, kohya, ComfyUI and others call them."""


def parse(cls: type[T], args: list[str], *, prog: str, default: T | None = None, beside: tuple[str, ...] = ()) -> T:
    """An instance of the dataclass ``cls`` from options; each field is one, nested fields have dots.

    ``beside`` names options that the command itself reads, to be suggested as others are.

    Raises ValueError for an unknown option, naming the nearest known one, for one that is given twice, and for a
    value that is missing or wrong. --help ends the process with code 0.
    """
    known = _options(cls)
    named = [arg.split("=", 1)[0].replace("_", "-") for arg in args if arg.startswith("--")]
    for i, name in enumerate(named):
        if name not in [*known, "--help"]:
            meant = _meant(name, [*known, *beside])
            raise ValueError(
                f"unknown option {name}; " + (f"did you mean {meant}?" if meant else f"{prog} --help lists the options")
            )
        if name in named[:i]:
            raise ValueError(f"{name} is given twice; put several values after one {name}")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            if default is None:
                parsed = tyro.cli(cls, args=args, prog=prog)
            else:
                parsed = tyro.cli(cls, args=args, prog=prog, default=default)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_unboxed(printed.getvalue()).removeprefix(f"Error parsing {cls.__name__}: ")) from None
    check_finite(parsed)
    return parsed


def _meant(name: str, known: list[str]) -> str | None:
    """The option that an unknown name is for: the group it begins, another program's word for it, or a near one."""
    if parts := [option for option in known if option.startswith(f"{name}.")]:
        return parts[0]
    if ours := [word for word, theirs in WORDS.items() if name.removeprefix("--") in theirs]:
        same = [option for option in known for word in ours if word in (option[2:], option.rpartition(".")[2])]
        # None where the command has no such option: one whose name looks alike would mean something else.
        return min(same, key=lambda option: option.count("."), default=None)
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.5)), None)


def _unboxed(text: str) -> str:
    """What tyro says in the first part of a box with a title, as one line."""
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    ends = [i for i, line in enumerate(lines) if line and not line.strip("─")]
    return " ".join(" ".join(lines[: ends[0] if ends else None]).split())


def _options(cls: Any, prefix: str = "") -> list[str]:
    """Every option of a configuration, as tyro spells it."""
    names = []
    hints, annotations = get_type_hints(cls), get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if tyro.conf.Positional in getattr(annotations[field.name], "__metadata__", ()):
            continue
        name, kind = prefix + field.name.replace("_", "-"), hints[field.name]
        if dataclasses.is_dataclass(kind):
            names += _options(kind, f"{name}.")
        else:
            names.append(f"--{name}")
            if kind is bool:
                names.append(f"--{prefix}no-{name.removeprefix(prefix)}")
    return names
