"""The command ``semroute``: what it is called with, and which function does it.

Heavy imports wait until the subcommand is known, so that ``semroute --help`` answers at once.
"""

from __future__ import annotations

import argparse
import getpass
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from semantic_routing import __version__
from semantic_routing.common.config import nearest, read_config
from semantic_routing.common.errors import Interrupted, TrainingFailed

Command = Callable[[list[str]], None]


def train(args: list[str]) -> None:
    """Train a recipe: semroute train toy --arm depth --steps 2000 --out runs/x

    semroute train RECIPE [--arm ARM] [--config FILE] --out DIR [settings]   begin a run
    semroute train --resume DIR [--steps N]                                 go on with one, for more steps than before

    Any setting of the recipe can be given, such as --batch 32, --optim.lr 3e-4 or --model.depth 8;
    --data.paths takes your own pictures: shards, tables, manifests, folders. --config starts from a run's config.json.
    """
    recipe, options = (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)
    parser = argparse.ArgumentParser(prog="semroute train", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    own = ("--arm", "--out", "--resume", "--config")
    for name in own:
        parser.add_argument(name)
    try:
        given, rest = parser.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    from semantic_routing.cli.arguments import parse
    from semantic_routing.model.arms import DEFAULT_ARM, parse_arm
    from semantic_routing.training import loop as training
    from semantic_routing.training.recipes import RECIPES

    if given.resume is not None:
        named = {arg.partition("=")[0] for arg in rest if arg.startswith("--")}
        if recipe or given.arm or given.config or given.out or named - {"--steps", "--accept-changes"}:
            raise ValueError(
                "--resume takes a run's folder and no settings: they are in its checkpoint; beside it there are only "
                "--steps N, to train on to step N, and --accept-changes, to go on with data or models that changed"
            )
        how = parse(training.ResumeArguments, rest, prog="semroute train --resume DIR")
        _done(training.resume(Path(given.resume), steps=how.steps, accept_changes=how.accept_changes))
        return
    if given.config is not None:
        default = read_config(training.TrainConfig, Path(given.config))
        if recipe or given.arm:
            raise ValueError("--config is a whole configuration: leave out the recipe and --arm")
    elif recipe in RECIPES or (given.help and not recipe):
        default = RECIPES[recipe or "toy"](parse_arm(given.arm or DEFAULT_ARM))
    else:
        what = f"unknown recipe {recipe!r}" if recipe else "semroute train needs a recipe first"
        raise ValueError(f"{what}; {nearest(recipe, list(RECIPES))}")
    if given.help:
        sys.stdout.write(f"{_help(train)}\n\n")
        rest = ["--help"]
    prog = f"semroute train {recipe or 'RECIPE'}"
    cfg = parse(training.TrainConfig, rest, prog=prog, default=default, beside=own)
    if given.out is None:
        raise ValueError("where should the run be written? give --out, such as --out runs/x")
    _done(training.start(cfg, Path(given.out)))


def sample(args: list[str]) -> None:
    """Sample images: semroute sample runs/x --prompt "a red circle" --out images"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.cli.sample import SampleArguments, sample_to_folder
    from semantic_routing.interop.open import open_model

    _done(sample_to_folder(parse(SampleArguments, args, prog="semroute sample"), open_model))


def evaluate(args: list[str]) -> None:
    """Score a model: semroute evaluate shapes --model runs/x --out evaluations/x

    shapes       captions of the toy world, checked exactly
    geneval      objects, numbers, colours and positions, seen by a detector and CLIP
    genai-bench  VQAScore by a judge on a server, or by a model on this machine
    drawbench    alignment, coherence and style by UnifiedReward on a server
    features     FID, KID and CLIPScore of a folder of images
    compare      evaluations side by side: differences, intervals, paired tests
    """
    if args[:1] in (["-h"], ["--help"]):  # without torch
        sys.stdout.write(f"{_help(evaluate)}\n")
        return
    from semantic_routing.cli.evaluate import BENCHMARKS

    _run_one_of(BENCHMARKS, args, evaluate, "benchmark")


def data(args: list[str]) -> None:
    """Index, count and look at training data: semroute data index data/shards"""
    from semantic_routing.cli.data import SUBCOMMANDS

    _run_one_of(SUBCOMMANDS, args or ["--help"], data, "subcommand")


def analyze(args: list[str]) -> None:
    """Draw what a model's router learned: semroute analyze runs/x --out figures"""
    from semantic_routing.cli.analyze import AnalyzeArguments, run_analysis
    from semantic_routing.cli.arguments import parse

    for path in run_analysis(parse(AnalyzeArguments, args, prog="semroute analyze")):
        sys.stdout.write(f"{path}\n")


def probe(args: list[str]) -> None:
    """Measure what each layer of a language model knows: semroute probe ENCODER --out probes/x"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.cli.probe import ProbeArguments, run_probe

    for path in run_probe(parse(ProbeArguments, args, prog="semroute probe")):
        sys.stdout.write(f"{path}\n")


def quickstart(args: list[str]) -> None:
    """Train, sample, score and report on this machine: semroute quickstart --out runs/quickstart"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.cli.quickstart import QuickstartArguments, run_quickstart

    _done(run_quickstart(parse(QuickstartArguments, args, prog="semroute quickstart")))


def overhead(args: list[str]) -> None:
    """Count parameters and FLOPs of every arm: semroute overhead --scale paper [--json [FILE]]"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.cli.overhead import OverheadArguments, run_overhead

    # --json alone means the standard output.
    named = [arg for i, arg in enumerate(args) if arg == "--json" and args[i + 1 : i + 2] and args[i + 1][:2] != "--"]
    args = args if named else ["--json=-" if arg == "--json" else arg for arg in args]
    sys.stdout.write(run_overhead(parse(OverheadArguments, args, prog="semroute overhead")) + "\n")


def convert(args: list[str]) -> None:
    """Convert the paper's checkpoints: semroute convert upstream SRC --config FILE --arm ARM --out runs/x

    semroute convert upstream SRC --config FILE --arm ARM --out DIR   a reference checkpoint as a run
    semroute convert ours RUN --out FILE                              a run by the reference's names
    """
    from semantic_routing.cli.arguments import parse
    from semantic_routing.cli.convert import DIRECTIONS

    if args[:1] in ([], ["-h"], ["--help"]):
        sys.stdout.write(f"{_help(convert)}\n")
        return
    if args[0] not in DIRECTIONS:
        raise ValueError(f"cannot convert {args[0]!r}; {nearest(args[0], list(DIRECTIONS))}")
    arguments, run = DIRECTIONS[args[0]]
    _done(run(parse(arguments, args[1:], prog=f"semroute convert {args[0]}")))


def export(args: list[str]) -> None:
    """Write a diffusers pipeline: semroute export runs/x --out pipelines/x"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.common.extras import require_diffusers

    require_diffusers("export")
    from semantic_routing.interop.export import ExportArguments
    from semantic_routing.interop.export import export as run_export

    _done(run_export(parse(ExportArguments, args, prog="semroute export")))


def study(args: list[str]) -> None:
    """Train and score several arms alike, set them side by side: semroute study toy --arms B1 B2 S2 --out studies/x"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.study.plan import StudyArguments
    from semantic_routing.study.runner import run_study
    from semantic_routing.study.tables import write_results

    given = parse(StudyArguments, args, prog="semroute study")
    run_study(given)
    _done(write_results(given))


COMMANDS: dict[str, Command] = {
    "quickstart": quickstart,
    "train": train,
    "sample": sample,
    "data": data,
    "evaluate": evaluate,
    "analyze": analyze,
    "probe": probe,
    "study": study,
    "overhead": overhead,
    "convert": convert,
    "export": export,
}


def main(argv: list[str] | None = None) -> None:
    """Run ``semroute``; its exit code is 0 done, 1 failed, 2 for what the user can mend, 128 + n after signal n."""
    with _output():
        _run(sys.argv[1:] if argv is None else argv)


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        sys.exit(0 if args else 2)
    if args[0] in ("-V", "--version"):
        sys.stdout.write(f"semroute {__version__}\n")
        sys.exit(0)
    if args[0] not in COMMANDS:
        _fail(f"unknown command {args[0]!r}; {nearest(args[0], list(COMMANDS))}", 2)
    _name_the_user()
    try:
        COMMANDS[args[0]](args[1:])
    except ValueError as error:
        _fail(str(error), 2)
    except BrokenPipeError:
        raise
    except (TrainingFailed, OSError) as error:
        _fail(str(error), 1)
    except Interrupted as error:
        _fail(str(error), 128 + error.number)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


@contextmanager
def _output() -> Iterator[None]:
    """Write to the standard output whatever it takes; one that is closed early ends the command as SIGPIPE would."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the command began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without our letters
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        _drop_output()
        _fail(f"the standard output cannot be written: {error.strerror}", 1)


def _drop_output() -> None:
    """Keep the interpreter from writing at its end what could not be written."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def _name_the_user() -> None:
    """Give a user id that no passwd knows, as in containers, the name that libraries ask for to make their caches."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user-{os.getuid()}"


def _run_one_of(
    known: Mapping[str, tuple[type, Callable[[Any], str]]], args: list[str], command: Command, what: str
) -> None:
    """Run a command's benchmark or the like by its name, with its own arguments, and print its answer."""
    name = f"semroute {command.__name__}"
    if not args:
        raise ValueError(f"{name} needs a {what} first; known: {', '.join(known)}")
    if args[0] in ("-h", "--help"):
        sys.stdout.write(f"{_help(command)}\n\n{what}s: {', '.join(known)}\n")
        return
    if args[0] not in known:
        raise ValueError(f"unknown {what} {args[0]!r}; {nearest(args[0], list(known))}")
    from semantic_routing.cli.arguments import parse

    arguments, run = known[args[0]]
    answer = run(parse(arguments, args[1:], prog=f"{name} {args[0]}"))
    if answer:  # of several processes the first alone has one
        sys.stdout.write(f"{answer}\n")


def _usage() -> str:
    rows = "\n".join(f"  {name:<11} {_help(command).splitlines()[0]}" for name, command in COMMANDS.items())
    return (
        "semroute: condition text-to-image diffusion transformers on all layers of a language model\n\n"
        f"{rows}\n\nsemroute COMMAND --help shows a command's options.\n"
    )


def _help(command: Command) -> str:
    lines = (command.__doc__ or "").strip().splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines)


def _done(path: Path) -> None:
    """Say where the result is, once for all processes of a job."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{path}\n")


def _fail(message: str, code: int) -> NoReturn:
    """End with one line on stderr."""
    try:
        sys.stderr.write(f"semroute: {' '.join(message.split())}\n")
        sys.stderr.flush()
    except OSError:  # its disk is full, its terminal gone: the exit code must tell
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.exit(code)
