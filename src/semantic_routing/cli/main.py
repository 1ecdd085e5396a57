"""The command ``semroute``: its subcommands, exit codes and output.

Heavy imports wait until the subcommand is known, so that ``semroute --help`` answers immediately.
"""

from __future__ import annotations

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
from semantic_routing.common.config import nearest
from semantic_routing.common.errors import Interrupted, TrainingFailed
from semantic_routing.common.waiting import wait_without_spinning_if_busy

Command = Callable[[list[str]], None]


def train(args: list[str]) -> None:
    """Train a recipe: semroute train toy --arm depth --steps 2000 --out runs/x

    semroute train RECIPE [--arm ARM] [--config FILE] --out DIR [settings]   start a run
    semroute train --resume DIR [--steps N]                                 resume a run, and train up to step N

    Every setting of the recipe is an option, such as --batch 32, --optim.lr 3e-4 or --model.depth 8. --data.paths
    are your own images: shards, tables, manifests or folders. --config starts from the config.json of a run.
    """
    from semantic_routing.cli.train import run_train

    _done(run_train(args, _help(train)))


def sample(args: list[str]) -> None:
    """Sample images: semroute sample runs/x --prompt "a red circle" --out images"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.cli.sample import SampleArguments, sample_to_folder
    from semantic_routing.interop.open import open_model

    _done(sample_to_folder(parse(SampleArguments, args, prog="semroute sample"), open_model))


def evaluate(args: list[str]) -> None:
    """Score a model: semroute evaluate shapes --model runs/x --out evaluations/x

    shapes       captions of the toy world, checked exactly
    words        captions of the world of words, checked exactly
    loss         the velocity loss on held-out pictures, prompt by prompt
    geneval      objects, numbers, colours and positions, checked by an object detector and CLIP
    genai-bench  VQAScore from a judge on a server, or from a model on this machine
    drawbench    alignment, coherence and style, judged by UnifiedReward on a server
    features     FID, KID and CLIPScore of a folder of images
    compare      several evaluations compared: differences, confidence intervals, paired tests
    """
    if _shows_help(evaluate, args):
        return
    from semantic_routing.cli.evaluate import BENCHMARKS

    _run_one_of(BENCHMARKS, args, evaluate, "benchmark")


def data(args: list[str]) -> None:
    """Index, inspect and recaption training data: semroute data index data/shards

    index      scan data once, so that training can read any record directly
    stats      print statistics of captions, image sizes and damaged records
    recaption  write new captions for all images with a model on a server
    preview    draw a contact sheet of images and captions
    encode     cache the hidden states of all captions, or the latents of all images, on disk before training
    """
    if _shows_help(data, args or ["--help"]):
        return
    from semantic_routing.cli.data import SUBCOMMANDS

    _run_one_of(SUBCOMMANDS, args, data, "subcommand")


def analyze(args: list[str]) -> None:
    """Plot the routing weights of a model: semroute analyze runs/x --out figures"""
    from semantic_routing.cli.analyze import AnalyzeArguments, run_analysis
    from semantic_routing.cli.arguments import parse

    for path in run_analysis(parse(AnalyzeArguments, args, prog="semroute analyze")):
        sys.stdout.write(f"{path}\n")


def probe(args: list[str]) -> None:
    """Measure what each layer of a language model encodes: semroute probe ENCODER --out probes/x"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.cli.probe import ProbeArguments, run_probe

    for path in run_probe(parse(ProbeArguments, args, prog="semroute probe")):
        sys.stdout.write(f"{path}\n")


def quickstart(args: list[str]) -> None:
    """Train, sample and score a toy model in minutes: semroute quickstart --out runs/quickstart"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.cli.quickstart import QuickstartArguments, run_quickstart

    _done(run_quickstart(parse(QuickstartArguments, args, prog="semroute quickstart")))


def overhead(args: list[str]) -> None:
    """Measure the cost of every arm: semroute overhead --scale paper [--json [FILE]]"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.cli.overhead import OverheadArguments, run_overhead

    sys.stdout.write(run_overhead(parse(OverheadArguments, _json(args), prog="semroute overhead")) + "\n")


def plan(args: list[str]) -> None:
    """Plan a run on GPUs before renting them: semroute plan paper --gpus 8 64 512 --gpu H100

    semroute plan RECIPE [--gpus N ...] [--gpu H100] [--price-per-gpu-hour P] [--json [FILE]] [settings]

    Predicts memory, time, bottleneck, cost and the effect of failures from counted FLOPs and bytes. Every setting of
    semroute train is an option, such as --batch 4096 or --parallel.strategy hsdp, and so are all assumptions about the
    cluster.
    """
    from semantic_routing.cli.plan import run_plan

    sys.stdout.write(run_plan(_json(args), _help(plan)) + "\n")


def convert(args: list[str]) -> None:
    """Convert the paper's checkpoints: semroute convert upstream SRC --config FILE --arm ARM --out runs/x

    semroute convert upstream SRC --config FILE --arm ARM --out DIR   convert a reference checkpoint to a run
    semroute convert ours RUN --out FILE                              convert a run to a reference checkpoint
    semroute convert arm RUN --arm ARM --out DIR                      convert a run to another arm
    """
    if _shows_help(convert, args or ["--help"]):
        return
    from semantic_routing.cli.convert import DIRECTIONS

    _run_one_of(DIRECTIONS, args, convert, "direction")


def export(args: list[str]) -> None:
    """Export a run as a diffusers pipeline: semroute export runs/x --out pipelines/x"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.common.extras import require_diffusers

    require_diffusers("export")
    from semantic_routing.interop.export import ExportArguments
    from semantic_routing.interop.export import export as run_export

    _done(run_export(parse(ExportArguments, args, prog="semroute export")))


def study(args: list[str]) -> None:
    """Train, score and compare several arms: semroute study toy --arms B1 B2 S2 --out studies/x"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.study.plan import StudyArguments
    from semantic_routing.study.runner import run_study
    from semantic_routing.study.tables import write_results

    given = parse(StudyArguments, args, prog="semroute study")
    run_study(given)
    _done(write_results(given))


def adopt(args: list[str]) -> None:
    """Train routing on a diffusers pipeline: semroute adopt train PIPELINE --data photos --out routings/x

    train   train a routing, and optionally a LoRA, on a frozen pipeline of PRX, Sana, Z-Image or semroute export
    sample  sample images from a pipeline, with or without a routing
    info    show the header of a routing file, and its weights by block

    semroute adopt train PIPELINE --data PATHS --out DIR [settings]   start a run
    semroute adopt train --resume DIR [--steps N]                     resume a run

    Every setting is an option, such as --arm depth, --steps 1000, --optim.router-lr 1e-2 or --lora.rank 16.
    """
    if _shows_help(adopt, args or ["--help"]):
        return
    from semantic_routing.common.extras import require_diffusers

    require_diffusers("semroute adopt")
    from semantic_routing.cli.adopt import SUBCOMMANDS, run_train

    if args[0] == "train":
        _done(run_train(args[1:], _help(adopt)))
        return
    if args[0] not in SUBCOMMANDS:
        raise ValueError(f"unknown subcommand {args[0]!r}; {nearest(args[0], ['train', *SUBCOMMANDS])}")
    _run_one_of(SUBCOMMANDS, args, adopt, "subcommand")


def explore(args: list[str]) -> None:
    """Try a model out in the browser: semroute explore runs/x"""
    from semantic_routing.cli.arguments import parse
    from semantic_routing.cli.explore import ExploreArguments, run_explore

    run_explore(parse(ExploreArguments, args, prog="semroute explore"))


COMMANDS: dict[str, Command] = {
    "quickstart": quickstart,
    "train": train,
    "sample": sample,
    "data": data,
    "evaluate": evaluate,
    "analyze": analyze,
    "explore": explore,
    "probe": probe,
    "study": study,
    "overhead": overhead,
    "plan": plan,
    "convert": convert,
    "export": export,
    "adopt": adopt,
}
COMPUTING = frozenset({"quickstart", "train", "sample", "evaluate", "probe", "study", "adopt", "explore"})
"""Commands that may compute for minutes on the CPU."""


def main(argv: list[str] | None = None) -> None:
    """Run ``semroute``. Exit codes: 0 done, 1 failed, 2 for a mistake of the user, 128 + n after signal n."""
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
    if args[0] in COMPUTING and not {"-h", "--help"} & set(args):
        wait_without_spinning_if_busy()
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
    """Make the standard output safe to write to; if its reader has closed it, exit as after SIGPIPE."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the command started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that cannot show all characters
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
    """Prevent the interpreter from flushing unwritable output again at exit."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def _name_the_user() -> None:
    """Set a name for a user who is not in passwd, as in containers; libraries need one for their caches."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user-{os.getuid()}"


def _json(args: list[str]) -> list[str]:
    """Return the arguments, in which a --json without a file means the standard output."""
    named = [arg for i, arg in enumerate(args) if arg == "--json" and args[i + 1 : i + 2] and args[i + 1][:2] != "--"]
    return args if named else ["--json=-" if arg == "--json" else arg for arg in args]


def _shows_help(command: Command, args: list[str]) -> bool:
    """Print the help of a command with subcommands if the arguments ask for it; return whether they do."""
    if args[:1] not in (["-h"], ["--help"]):
        return False
    sys.stdout.write(f"{_help(command)}\n")
    return True


def _run_one_of(
    known: Mapping[str, tuple[type, Callable[[Any], str | Path]]], args: list[str], command: Command, what: str
) -> None:
    """Run the subcommand ``args[0]`` with its own arguments and print its answer."""
    name = f"semroute {command.__name__}"
    if not args:
        raise ValueError(f"{name} needs a {what}; known: {', '.join(known)}")
    if args[0] not in known:
        raise ValueError(f"unknown {what} {args[0]!r}; {nearest(args[0], list(known))}")
    from semantic_routing.cli.arguments import parse

    arguments, run = known[args[0]]
    answer = run(parse(arguments, args[1:], prog=f"{name} {args[0]}"))
    if answer:  # only the first of several processes has one
        sys.stdout.write(f"{answer}\n")


def _usage() -> str:
    rows = "\n".join(f"  {name:<11} {_help(command).splitlines()[0]}" for name, command in COMMANDS.items())
    return (
        "semroute: condition text-to-image diffusion transformers on all layers of a language model\n\n"
        f"{rows}\n\nsemroute COMMAND --help lists a command's options.\n"
    )


def _help(command: Command) -> str:
    lines = (command.__doc__ or "").strip().splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines)


def _done(path: Path) -> None:
    """Print the path of the result, once for all processes of a job."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{path}\n")


def _fail(message: str, code: int) -> NoReturn:
    """Exit with one line on stderr."""
    try:
        sys.stderr.write(f"semroute: {' '.join(message.split())}\n")
        sys.stderr.flush()
    except OSError:  # its disk is full or its terminal is gone; only the exit code is left
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.exit(code)
