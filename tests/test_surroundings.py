"""Unusual machines: packages that cannot be imported, no home folder, closed outputs, unusual umasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from semantic_routing.chat.client import ChatClient
from semantic_routing.chat.server import ChatConfig
from semantic_routing.cli.main import main
from semantic_routing.cli.sample import SampleArguments, sample_to_folder
from semantic_routing.common.device import cache_folder
from semantic_routing.common.extras import require
from semantic_routing.data.sources.storage import filesystem
from semantic_routing.data.tools.caption_parts import Parts
from semantic_routing.evaluation.fid import FeaturesArguments, evaluate_features
from semantic_routing.interop.open import open_pipeline
from semantic_routing.model.codec import CodecConfig, make_codec
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.text.quiet import quiet_transformers
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start
from semantic_routing.training.tiny_lm import tiny_lm
from semantic_routing.training.tracking import Tracker

Make = Callable[..., TrainConfig]
RAISED = (
    "AttributeError('module numpy has no attribute float_')",
    "RuntimeError('built for another interface')",
    "ImportError('undefined symbol: _Z')",
    "TypeError('descriptors cannot be created directly')",
)


@contextmanager
def broken(name: str, folder: Path, raised: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the import of a package raise during the context."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"raise {raised}\n")
    with patch.context() as now:
        for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
            now.delitem(sys.modules, loaded)
        now.syspath_prepend(folder)
        yield


ASKED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "wandb": ("track", lambda out: Tracker(out, 0, ["wandb"])),
    "trackio": ("track", lambda out: Tracker(out, 0, ["trackio"])),
    "tensorboard": ("track", lambda out: Tracker(out, 0, ["tensorboard"])),
    "pyarrow": ("data", lambda out: Parts(out, 1, 1)),
    "fsspec": ("data", lambda out: filesystem("https://127.0.0.1/a.tar")),
    "openai": ("eval", lambda out: ChatClient(ChatConfig(model="judge"))),
    "torchmetrics": ("eval", lambda out: evaluate_features(
        FeaturesArguments(images=out, reference=out, feature_model="m"))),
    "diffusers": ("diffusers", lambda out: make_codec(CodecConfig(kind="vae", name_or_path=str(out)))),
    "accelerate": ("diffusers", lambda out: open_pipeline(out, torch.device("cpu"))),
}  # fmt: skip


@pytest.mark.behaviour(
    "Surroundings",
    when="a package that an option needs is missing, or raises while it is imported",
    then="one line names the option, the reason of the failed import, and the pip install that fixes it",
)
@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("name", ASKED)
def test_packages_that_cannot_be_imported(
    name: str, raised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, ask = ASKED[name]
    said = rf"needs {name}, which cannot be imported: {raised.partition('(')[0]}: .*"
    with broken(name, tmp_path / "packages", raised, monkeypatch), pytest.raises(ValueError, match=said) as refused:
        ask(tmp_path / "out")
    assert str(refused.value).endswith(f'pip install "semantic-routing[{extra}]"')
    assert not (tmp_path / "out").exists()


def test_workers_without_grain(tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config()
    cfg = replace(cfg, data=replace(cfg.data, workers=1))
    said = r'data.workers needs grain, .* pip install "semantic-routing\[data\]"$'
    with broken("grain", tmp_path / "packages", RAISED[0], monkeypatch), pytest.raises(ValueError, match=said):
        start(cfg, tmp_path / "run")


def test_what_no_extra_brings_is_installed_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = r'a LoRA needs peft, .* pip install "peft"$'
    with broken("peft", tmp_path, RAISED[1], monkeypatch), pytest.raises(ValueError, match=said):
        require("peft", what="a LoRA")


@pytest.mark.behaviour(
    "Surroundings",
    when="TensorBoard is installed but broken, and --track does not ask for it",
    then="one line says so, and the run continues without it",
)
def test_a_broken_tensorboard_that_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    with broken("tensorboard", tmp_path / "packages", RAISED[3], monkeypatch), Tracker(tmp_path / "run", 0) as tracker:
        tracker.write({"step": 1, "loss": 0.5})
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    assert capsys.readouterr().err.count("continuing without it") == 1


@pytest.mark.behaviour(
    "Surroundings",
    when="SEMROUTE_CACHE or XDG_CACHE_HOME is set",
    then="files that are made once per machine are stored there; without these variables in ~/.cache",
)
@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "/home/me/.cache/semantic-routing"),
        ({"XDG_CACHE_HOME": "/scratch"}, "/scratch/semantic-routing"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/semantic-routing"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/semantic-routing"),
        ({"XDG_CACHE_HOME": "/scratch", "SEMROUTE_CACHE": "~/own"}, "/home/me/own"),
    ],
)
def test_the_cache_is_in_the_folder_that_the_environment_sets(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SEMROUTE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def semroute(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in which ``semroute`` is this program."""
    shell = f'semroute() {{ "{sys.executable}" -m semantic_routing "$@"; }}; set -o pipefail; {line}'
    environment = {**os.environ, **variables}
    return subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.behaviour(
    "Surroundings",
    when="the standard output is closed, is on a full disk, or is ASCII",
    then="there is no traceback: exit code 141 for a closed pipe, 1 for a full disk; other characters are escaped",
)
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("semroute --help | true", 141, ""),
        pytest.param("semroute overhead --scale toy --arms B1 | head -n 0", 141, "", marks=pytest.mark.stress),
        ("semroute evaluate --help | head -c 0", 141, ""),
        ("semroute --version >&-", 0, ""),
        ("semroute --version > /dev/full", 1, "semroute: the standard output cannot be written: No space left"),
        ("semroute nonsense 2>&-", 2, ""),
        ("PYTHONIOENCODING=ascii semroute overhead --scale toy --arms B1", 0, ""),
        ("PYTHONIOENCODING=ascii semroute overhead --scale try", 2, "semroute: invalid choice 'try' for argument"),
        ("LC_ALL=C semroute --help", 0, ""),
    ],
)
def test_outputs_that_cannot_take_everything(line: str, code: int, said: str) -> None:
    done = semroute(line)
    assert (done.returncode, done.stderr[: len(said) or None]) == (code, said)


@pytest.mark.behaviour(
    "Surroundings", when="home and cache folders cannot be written", then="one line names the cache and SEMROUTE_CACHE"
)
@pytest.mark.parametrize("variables", [{"HOME": "/dev/null"}, {"XDG_CACHE_HOME": "/proc/1"},
                                       {"SEMROUTE_CACHE": "/dev/null/cache"}])  # fmt: skip
def test_a_cache_that_cannot_be_written(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SEMROUTE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "toy", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("semroute: cannot write the cache /")
    assert message.endswith("set SEMROUTE_CACHE")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.behaviour(
    "Surroundings",
    when="commands write files and folders",
    then="all of them, including weights and caches, have the permissions that the umask sets",
)
@pytest.mark.parametrize("mask", [0o002, *(pytest.param(mask, marks=pytest.mark.stress) for mask in (0o022, 0o077))])
def test_all_files_have_the_mode_of_the_umask(mask: int, tiny_config: Make, tmp_path: Path) -> None:
    place = tmp_path / "all"
    before = os.umask(mask)
    try:
        tiny_lm(["a red circle", "a blue star"], layers=1, width=64, steps=1, cache_dir=place / "cache")
        run = place / "run"
        start(tiny_config(steps=2, checkpoint_every=1, preview_every=1), run)
        sampling = SampleConfig(steps=1)
        sample_to_folder(
            SampleArguments(model=run, out=place / "images", prompt=("a star",), sampling=sampling, device="cpu")
        )
        picture = next((place / "images").glob("*.png"))
        (place / "images" / f"{picture.stem}.txt").write_text("a star")
        with quiet_transformers():
            main(["export", str(run), "--out", str(place / "pipe")])
        main(["convert", "ours", str(run), "--out", str(place / "upstream.safetensors")])
        main(["data", "index", str(place / "images"), "--out", str(place / "index")])
    finally:
        os.umask(before)
    written = [place, *place.rglob("*")]
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in written}
    usual = {str(path.relative_to(tmp_path)): (0o777 if path.is_dir() else 0o666) & ~mask for path in written}
    assert len({path.suffix for path in written} & {".safetensors", ".json", ".jsonl", ".png", ".md"}) == 5
    assert modes == usual


@pytest.mark.behaviour(
    "Surroundings",
    when="matplotlib has no folder for its configuration",
    then="it uses a temporary one, and figures are drawn",
)
@pytest.mark.parametrize(
    "variable", ["HOME", *(pytest.param(x, marks=pytest.mark.stress) for x in ("MPLCONFIGDIR", "XDG_CONFIG_HOME"))]
)
def test_figures_without_a_folder_of_settings(variable: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "a.png")
    (data / "a.txt").write_text("black")
    done = semroute(f"semroute data preview {data} --out {tmp_path / 'grid.png'}", **{variable: "/dev/null"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").is_file()
    assert "Traceback" not in done.stderr
