"""Parses command lines into dataclasses with tyro; every mistake is a ValueError with one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

import tyro

from semantic_routing.common.config import check_finite

T = TypeVar("T")
FLAT = tyro.conf.OmitArgPrefixes
"""Marks a nested dataclass whose options have no prefix."""
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
"""Our options, and their names in diffusers, kohya, ComfyUI and other programs."""


def parse(cls: type[T], args: list[str], *, prog: str, default: T | None = None, beside: tuple[str, ...] = ()) -> T:
    """Return an instance of the dataclass ``cls``, with one option for each field and dots for nested fields.

    ``default`` replaces the defaults of the fields. ``beside`` lists options that the command reads itself; they are
    suggested for unknown names, too.

    Raises ValueError for an option that is unknown (naming the nearest known one) or given twice, and for a value that
    is missing or wrong. --help ends the process with code 0.
    """
    known = options(cls)
    for name in _names(args, known):
        if name not in [*known, "--help"]:
            meant = _meant(name, [*known, *beside])
            raise ValueError(
                f"unknown option {name}; " + (f"did you mean {meant}?" if meant else f"{prog} --help lists the options")
            )
    parsed = _tyro(cls, args=args, prog=prog, default=tyro.MISSING_NONPROP if default is None else default)
    check_finite(parsed)
    return parsed


def parse_known(cls: type[T], args: list[str], *, prog: str) -> tuple[T, list[str]]:
    """Return an instance of the dataclass ``cls`` and the arguments that are not its own, --help among them."""
    _names(args, options(cls))  # for the error of a repeated one
    return _tyro(cls, args=args, prog=prog, add_help=False, return_unknown_args=True)


def options(cls: Any, prefix: str = "") -> list[str]:
    """Return the options of a dataclass in tyro's spelling (tyro 1.0.17 has deprecated its own list, get_parser)."""
    names = []
    hints, annotations = get_type_hints(cls), get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        markers = getattr(annotations[field.name], "__metadata__", ())
        if tyro.conf.Positional in markers or tyro.conf.Fixed in markers:
            continue
        name, kind = prefix + field.name.replace("_", "-"), hints[field.name]
        if dataclasses.is_dataclass(kind):
            names += options(kind, prefix if FLAT in markers else f"{name}.")
        else:
            names.append(f"--{name}")
            if kind is bool:
                names.append(f"--{prefix}no-{name.removeprefix(prefix)}")
    return names


def _names(args: list[str], known: list[str]) -> list[str]:
    """Return the names of the options in ``args``; ValueError if one of ``known`` comes twice."""
    names = [arg.split("=", 1)[0].replace("_", "-") for arg in args if arg.startswith("--")]
    for name in known:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice; put several values after one {name}")
    return names


def _tyro(cls: type, **settings: Any) -> Any:
    """Call ``tyro.cli`` and turn its error message into a ValueError with one line.

    tyro 1.0.17 reports parse errors as objects only through ``tyro._errors``, which is private and announced to change
    in any release. So the text is taken from the box that it prints.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, **settings)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_unboxed(printed.getvalue()).removeprefix(f"Error parsing {cls.__name__}: ")) from None


def _unboxed(text: str) -> str:
    """Return the first part of a printed box as one line; without UTF-8 output, tyro draws its title above a rule."""
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    lines = lines if text.startswith("╭") else lines[2:]
    ends = [i for i, line in enumerate(lines) if line and not line.strip("─-")]
    return " ".join(" ".join(lines[: ends[0] if ends else None]).split())


def _meant(name: str, known: list[str]) -> str | None:
    """Return the option that an unknown name probably means.

    It is the first option of the group ``name``, our name for another program's option, or the nearest spelling.
    """
    if group := [option for option in known if option.startswith(f"{name}.")]:
        return group[0]
    if ours := [word for word, theirs in WORDS.items() if name.removeprefix("--") in theirs]:
        same = [option for option in known for word in ours if word in (option[2:], option.rpartition(".")[2])]
        # Without such an option, an option that is only spelled like it would mean something else.
        return min(same, key=lambda option: option.count("."), default=None)
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.5)), None)
