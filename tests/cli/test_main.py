"""The command line: a complete run, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file

import semantic_routing.training.loop as training
from semantic_routing import __version__
from semantic_routing.checkpoint.load import EMA, checkpoints, find_checkpoint, read_state
from semantic_routing.cli.analyze import AnalyzeArguments
from semantic_routing.cli.arguments import options, parse
from semantic_routing.cli.convert import DIRECTIONS
from semantic_routing.cli.evaluate import BENCHMARKS, GenAIBenchArguments
from semantic_routing.cli.main import COMMANDS, main
from semantic_routing.cli.sample import SampleArguments
from semantic_routing.common.config import to_dict
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.tiny_lm import tiny_lm
from tests.helpers.forked import MAIN, Forked

Make = Callable[..., TrainConfig]


def call(*args: object) -> int:
    """Run the command in this process and return its exit code."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- help ---


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--version"], [], ["tarin"], ["evaluate", "--help"]])
def test_help_and_typos_are_answered_without_torch(args: list[str]) -> None:
    code = (
        "import sys; from semantic_routing.cli.main import main\n"
        f"try: main({args})\n"
        "finally: print([name for name in ('torch', 'transformers', 'numpy', 'tyro') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("[]\n")
    assert done.returncode == (0 if args and args[-1].startswith("-") else 2)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert call("-V") == 0
    assert capsys.readouterr().out == f"semroute {__version__}\n"


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["train", "--help"], ["--optim.lr", "--resume", "--model.depth"]),
        (["train", "paper", "--arm", "S3", "--help"], ["--optim.lr", "500000", "joint"]),
        (["sample", "--help"], ["--prompts", "--images-per-prompt"]),
        (["evaluate", "--help"], [f"\n{name} " for name in BENCHMARKS]),
        (["convert", "--help"], [f"\nsemroute convert {name} " for name in DIRECTIONS]),
        (["evaluate", "shapes", "--help"], ["--prompt-seed", "--guidance"]),
        (["evaluate", "geneval", "--help"], ["--prompts", "--detector", "--variant", "--images", "--rescore"]),
        (["evaluate", "genai-bench", "--help"], ["--skills", "--judge.model", "--local-judge", "--template"]),
        (["evaluate", "compare", "--help"], ["--baseline", "--headlines"]),
        (["analyze", "--help"], ["--out"]),
        (["quickstart", "--help"], ["--arm", "--prompts"]),
    ],
)
def test_every_command_has_help(args: list[str], shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*args) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in shown)


# --- a complete run ---


def test_from_training_to_scores(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train until SIGTERM, resume, sample, sample a missing image again, evaluate and analyse."""
    config, run = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(to_dict(tiny_config("joint"))))

    def stop(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training, "start", partial(training.start, on_step=stop))
        assert call("train", "--config", config, "--batch", 2, "--optim.lr", "3e-3", "--out", run) == 128 + 15
    assert capsys.readouterr().err.endswith(f"resume with: semroute train --resume {run}\n")
    assert call("train", "--resume", run) == 0
    assert capsys.readouterr().out == f"{find_checkpoint(run)}\n"
    state = read_state(find_checkpoint(run))
    assert (state["step"], state["config"]["batch"], state["config"]["optim"]["lr"]) == (8, 2, 3e-3)

    images = tmp_path / "images"
    sample = [
        "sample",
        run,
        "--prompt",
        "a red circle",
        "a star",
        "--out",
        images,
        "--steps",
        2,
        "--images-per-prompt",
        2,
    ]
    assert call(*sample) == 0
    before = {path.name: np.asarray(Image.open(path)) for path in images.glob("*.png")}
    assert len(before) == 4
    (images / "00001_00.png").unlink()
    assert call(*sample) == 0
    for name, image in before.items():
        assert np.abs(image.astype(int) - np.asarray(Image.open(images / name))).max() <= 1
    capsys.readouterr()

    scores = tmp_path / "scores"
    assert call("evaluate", "shapes", "--model", run, "--n", 11, "--steps", 2, "--out", scores) == 0
    assert capsys.readouterr().out.strip() == (scores / "table.md").read_text().strip()
    summary = json.loads((scores / "summary.json").read_text())
    assert summary["n"]["overall"] == 11
    assert len(list((scores / "images").glob("*.png"))) == 11

    assert call("analyze", run, "--out", tmp_path / "figures") == 0
    drawn = capsys.readouterr().out.split()
    assert drawn
    assert all(Path(path).is_file() for path in drawn)


def test_a_recipe_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The toy recipe with small sizes and a language model trained for two steps."""
    monkeypatch.setattr(training, "training_corpus", lambda source: [f"a {i} circle" for i in range(40)])
    monkeypatch.setattr(
        training, "tiny_lm", partial(tiny_lm, layers=3, width=64, steps=2, cache_dir=tmp_path / "cache")
    )
    settings = "--steps 2 --batch 2 --no-compile --precision fp32 --model.depth 2 --model.width 32 --model.mlp-width 32"
    assert call("train", "toy", "--arm", "B3", *settings.split(), "--out", tmp_path / "run", "--seed=7") == 0
    config = read_state(find_checkpoint(tmp_path / "run"))["config"]
    assert (config["model"]["arm"], config["model"]["depth"], config["seed"]) == ("static", 2, 7)
    assert config == json.loads((tmp_path / "run" / "config.json").read_text())
    again = ["train", "--config", tmp_path / "run" / "config.json", "--out", tmp_path / "again"]
    assert call(*again) == 0
    first, second = (find_checkpoint(tmp_path / name) for name in ("run", "again"))
    assert (first / EMA).read_bytes() == (second / EMA).read_bytes()


def test_failed_training_ends_with_code_1(
    tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(to_dict(tiny_config())))
    assert call("train", "--config", config, "--optim.lr", "1e30", "--out", tmp_path / "run") == 1
    assert "semroute: training stopped at step " in capsys.readouterr().err
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "No space left on device"), 1, "[Errno 28] No space")],
)
def test_other_errors_have_their_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    def fail(args: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "sample", fail)
    assert call("sample") == code
    assert capsys.readouterr().err.startswith(f"semroute: {line}")


# --- bad input ---


@pytest.fixture
def place(tmp_path: Path, tiny_run: Path, tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with files for bad input."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(tiny_run)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "good.json").write_text(json.dumps(to_dict(tiny_config())))
    (tmp_path / "typo.json").write_text(json.dumps(to_dict(tiny_config()) | {"prompt_dropuot": 0.2}))
    (tmp_path / "type.json").write_text(json.dumps(to_dict(tiny_config()) | {"batch": "4"}))
    (tmp_path / "text.json").write_text("steps: 3")
    folder = tmp_path / "foreign" / "checkpoints" / "step-0000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"step": 1, "epoch": 3}')
    save_file({"unet": torch.ones(1)}, folder / EMA)
    shutil.copytree(tiny_run, tmp_path / "narrow")
    state = find_checkpoint(tmp_path / "narrow") / "state.json"
    state.write_text(state.read_text().replace('"mlp_width": 48', '"mlp_width": 40'))
    return tmp_path


BAD = {
    # commands, recipes, arms, settings
    "tarin toy": "unknown command 'tarin'; did you mean 'train'?",
    "xyz": "unknown command 'xyz'; known: quickstart, train",
    "train": "semroute train needs a recipe; known: debug, toy, words, small, small-words, paper",
    "train tooy --out out": "unknown recipe 'tooy'; did you mean 'toy'?",
    "train tooy --help": "unknown recipe 'tooy'; did you mean 'toy'?",
    "train toy --arm detph --out out": "unknown arm 'detph'; did you mean 'depth'?",
    "train --config good.json --model.arm unifrom --out out": "unknown arm 'unifrom'; did you mean 'uniform'?",
    "train toy --stepz 5 --out out": "unknown option --stepz; did you mean --steps?",
    "train toy --optim.lrr 5 --out out": "unknown option --optim.lrr; did you mean --optim.lr?",
    "sample run --prompt a --stepz 5 --out out": "unknown option --stepz; did you mean --steps?",
    "analyze run --compile --out out": "unknown option --compile; ",
    "train toy --zzzzzzzz 5 --out out": "unknown option --zzzzzzzz; semroute train toy --help lists the options",
    "train toy --steps 5 --steps 6 --out out": "--steps is given twice",
    "train toy --out out --out other": "--out is given twice",
    "train toy --steps 5": "give the folder of the new run, such as --out",
    "train toy --out": "Missing value for argument '--out'",
    "train toy --steps --out out": "Missing value for argument '--steps'",
    "train toy --steps five --out out": "Error parsing --steps: invalid literal for int()",
    "train toy --optim.name adam --out out": "invalid choice 'adam' for argument '--optim.name'",
    "train toy more --out out": "Unrecognized options: more",
    # numbers
    "train toy --steps 0 --out out": "steps is 0; it must be at least 1",
    "train toy --steps -5 --out out": "steps is -5; it must be at least 1",
    "train toy --batch 0 --out out": "batch is 0; it must be at least 1",
    "train toy --optim.lr -1 --out out": "lr is -1.0; it must be at least 0",
    "train toy --preview.steps 0 --out out": "steps is 0; sampling needs at least 1",
    "train --config good.json --model.patch 5 --out out": "latents of 32 x 32 do not divide into patches",
    "train --config good.json --model.channels 4 --out out": "latents have 3 channels, but model.channels is 4",
    "train --config good.json --model.kv-heads 3 --out out": "kv_heads=3 must divide heads=2",
    "sample run --prompt a --steps 0 --out out": "steps is 0; sampling needs at least 1",
    "sample run --prompt a --steps -2 --out out": "steps is -2",
    "sample run --prompt a --images-per-prompt 0 --out out": "images_per_prompt is 0",
    "evaluate shapes --model run --n 0 --out out": "n is 0; an evaluation needs at least 1 prompt",
    "evaluate shapes --model run --steps 0 --out out": "steps is 0",
    "quickstart --steps 0 --out out": "steps is 0; it must be at least 1",
    "quickstart --prompts 0 --out out": "prompts is 0; scoring needs at least 1",
    "quickstart --arm detph --out out": "unknown arm 'detph'; did you mean 'depth'?",
    # configurations
    "train --config none.json --out out": "there is no configuration file none.json",
    "train --config typo.json --out out": "unknown setting 'prompt_dropuot'; did you mean 'prompt_dropout'?",
    "train --config type.json --out out": "batch is '4', which is not int",
    "train --config text.json --out out": "text.json is not JSON",
    "train --config empty --out out": "cannot read empty: Is a directory",
    "train toy --config good.json --out out": "leave out the recipe and --arm",
    "train --config good.json --text.name-or-path nowhere --out out": "no text encoder at 'nowhere'",
    "train --config good.json --data.paths nowhere --out out": "nowhere' does not exist",
    "train --config good.json --data.paths empty --out out": "empty' holds no",
    "train --config good.json --device gpu --out out": "unknown device 'gpu'; use auto, cpu or cuda",
    # checkpoints
    "train --resume nowhere": "no checkpoint at nowhere: it does not exist",
    "train --resume empty": "no checkpoint at empty: it holds no checkpoints/step-* folder",
    "train --resume foreign": "was not written by semroute train",
    "train --resume narrow": "belongs to another model: ",
    "train --resume run --batch 9": "--resume takes the settings from the run's checkpoint: leave them out; ",
    "train --resume run --steps 7": "step 7 is already done: run/checkpoints/step-0000008 is at step 8",
    "train --resume run --steps many": "many",
    "train --config good.json --out run": "run already holds a run: resume it with `semroute train --resume run`",
    "sample nowhere --prompt a --out out": "no checkpoint at nowhere",
    "sample foreign --prompt a --out out": "was not written by semroute train",
    "sample narrow --prompt a --out out": "belongs to another model: ",
    "evaluate shapes --model nowhere --out out": "no checkpoint at nowhere",
    "evaluate shapes --model narrow --out out": "belongs to another model: ",
    "evaluate shpaes --model run --out out": "unknown benchmark 'shpaes'; did you mean 'shapes'?",
    "evaluate": "semroute evaluate needs a benchmark; known: shapes",
    "analyze nowhere --out out": "no checkpoint at nowhere",
    "analyze foreign --out out": "was not written by semroute train",
    # prompts
    "sample run --out out": "nothing to sample: give --prompt",
    "sample run --prompts none.txt --out out": "cannot read prompts file none.txt: No such file or directory",
    "sample run --prompts empty.txt --out out": "empty.txt holds no prompts",
    "sample run --prompts latin.txt --out out": "latin.txt is not UTF-8 text (byte 3)",
    "sample run --prompts empty --out out": "cannot read prompts file empty: Is a directory",
    "sample run --promt a --out out": "unknown option --promt; did you mean --prompt?",
    "sample run --prompt a": "Missing from semroute sample: --out PATH",
    # places
    "train --config good.json --out file": "cannot write file: ",
    "train --config good.json --out file/run": "file is a file",
    "sample run --prompt a --steps 1 --out file": "cannot write file: File exists",
    "sample run --prompt a --steps 1 --out file/out": "cannot write file/out: Not a directory",
    "sample run --prompt a --steps 1 --out run": "run holds other images",
    "evaluate shapes --model run --steps 1 --n 2 --out file/out": "cannot write file/out: Not a directory",
    "analyze run --out file/out": "cannot write file/out",
    "quickstart --out file/out": "cannot write file/out: ",
}  # fmt: skip
"""Command and a part of its one line on stderr."""


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(place: Path, typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(place)
    assert call(*typed.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("semroute: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert BAD[typed] in captured.err
    assert captured.out == ""
    assert tree(place) == before


def test_a_real_process_ends_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    process = Forked(MAIN, ("sample", "nowhere", "--prompt", "a", "--out", "out"))
    assert (process.wait(), process.out) == (2, "")
    assert process.err.startswith("semroute: no checkpoint at nowhere")
    assert process.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- arguments ---


@dataclass(frozen=True, kw_only=True)
class Part:
    rate: float = 0.5
    use_it: bool = True


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Arguments of a command."""

    model: Annotated[Path, tyro.conf.Positional]
    """A place."""
    some_count: int = 1
    names: tuple[str, ...] = ()
    part: Part = field(default_factory=Part)

    def __post_init__(self) -> None:
        if self.some_count == 7:
            raise ValueError("some_count is 7; choose another number")


def test_options_are_parsed() -> None:
    args = ["here", "--some-count=3", "--names", "a", "b c", "--part.rate", "2", "--part.no-use-it"]
    expected = Arguments(model=Path("here"), some_count=3, names=("a", "b c"), part=Part(rate=2.0, use_it=False))
    assert parse(Arguments, args, prog="x") == expected
    assert parse(Arguments, ["here", "--some_count", "3"], prog="x").some_count == 3
    default = Arguments(model=Path("there"), some_count=9, names=("z",))
    assert parse(Arguments, ["--part.rate", "0.25"], prog="x", default=default).some_count == 9


@pytest.mark.parametrize("cls", [SampleArguments, AnalyzeArguments, GenAIBenchArguments, TrainConfig])
def test_options_are_those_of_the_help(
    cls: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # one column of options
    with pytest.raises(SystemExit):
        parse(cls, ["--help"], prog="x")
    columns = re.findall(r"^[│ ]*(--[a-z].*?)(?:  |[ │]*$)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(re.findall(r"--[a-z][\w.-]*", " ".join(columns))) == sorted(options(cls))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["here", "--model", "there"], "unknown option --model"),  # it is no option
        (["here", "--part.rat", "1"], r"unknown option --part\.rat; did you mean --part\.rate\?"),
        (["here", "--some-count"], "Missing value for argument '--some-count'"),
        (["here", "--part.rate", "x"], "Error parsing --part.rate: could not convert string to float: 'x'"),
        (["here", "--names", "a", "--names", "b"], "--names is given twice; put several values after one --names"),
        (["here", "--some-count", "7"], "some_count is 7; choose another number$"),
        (["here", "there"], "Unrecognized options: there$"),
        ([], "Missing from x: PATH A place"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_options_that_cannot_be_parsed(
    args: list[str], message: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tyro draws another box where the standard output is not UTF-8."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(ValueError, match=f"^{message}") as error:
        parse(Arguments, args, prog="x")
    assert not set("╭│╰─\n") & set(str(error.value))
    assert "---" not in str(error.value)
