"""The commands and programs of the docs, run on tiny models."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil

from semantic_routing.analysis.overhead import measure
from semantic_routing.checkpoint.load import EMA, find_checkpoint
from semantic_routing.cli.arguments import parse
from semantic_routing.cli.main import main
from semantic_routing.cli.quickstart import QuickstartArguments
from semantic_routing.evaluation.geneval import detector as geneval_detector
from semantic_routing.evaluation.judges.vqascore import VQA_TEMPLATES
from semantic_routing.interop.upstream import SIZES, from_upstream, to_upstream, upstream_config
from semantic_routing.model.arms import ARMS
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import DiTConfig
from semantic_routing.study import plan, results, runner
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start
from tests.helpers.chat_server import KEY, MODEL, ChatServer
from tests.helpers.damaged import write_shards
from tests.helpers.forked import semroute
from tests.helpers.tiny_models import SIDE, save_llava, small_clip, small_model, tokenizer
from tests.model.test_codec import tiny_vae

pytestmark = pytest.mark.usefixtures("undrawn")
DOCS = Path(__file__).parents[1] / "docs"


def fenced(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Return the arguments of the indented ``semroute`` commands in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [shlex.split(line) for line in re.findall(r"^ {4}semroute (.*)$", text, re.MULTILINE)]


@pytest.mark.filterwarnings("ignore:__array")  # diffusers reads tensors with an old numpy call
def test_diffusers(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/depth").symlink_to(tiny_run)
    for command in commands("diffusers.md"):
        main(command)
    names: dict[str, Any] = {}
    blocks = fenced("diffusers.md", "python")
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 6
    assert Path("same.png").read_bytes() == Path("images/00000_00.png").read_bytes()
    assert Path("circle.png").is_file()
    assert names["pipe"].get_active_adapters() == ["style"]


def test_world_of_words(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {
        "data": ["--count", "4"],
        "train": ["--steps", "2"],
        "evaluate": ["--n", "19", "--steps", "2"],
        "probe": ["--tokens", "600", "--captions", "50", "--no-tasks"],
    }
    for command in commands("world-of-words.md"):
        words = [{"toy": "debug", "smollm2": str(tiny_encoder)}.get(word, word) for word in command]
        main([*words, *small[words[0]]])
    assert Path("words.png").is_file()
    scores = json.loads(Path("evaluations/words/summary.json").read_text())
    assert len(scores["n"]) == 19 + 4
    assert scores["n"]["unseen"] == 5
    assert Path("probes/words/index.html").is_file()
    assert "unseen_place" in capsys.readouterr().out


def test_paper_checkpoints(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"depth": 2, "width": 24, "heads": 2, "kv_heads": 1, "head_dim": 32, "mlp_width": 40, "channels": 3}
    model = make_model(DiTConfig(arm="depth", text_width=64, text_layers=2, **sizes))
    Path("checkpoint").mkdir()
    save_file(to_upstream(model), "checkpoint/model.safetensors")
    Path("config.json").write_text(json.dumps(upstream_config(model)))
    local = ["--text.name-or-path", str(tiny_encoder), "--codec.kind", "pixels", "--image-size", "16"]
    for command in commands("paper-checkpoints.md"):
        command = ["toy" if word == "paper" else word for word in command]
        main(command + (local if command[:2] == ["convert", "upstream"] else []))
    expected = ["images/paper-s2/00000_00.png", "pipelines/paper-s2/model_index.json", "upstream.json", "overhead.json"]
    assert [path for path in expected if not Path(path).is_file()] == []
    assert "| S2 depth |" in capsys.readouterr().out


def test_text_encoders(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "1", "--batch", "4", "--preview-every", "0", "--no-compile"]
    for command in commands("text-encoders.md"):
        if command[0] == "quickstart":  # minutes; tests/cli/test_quickstart.py runs it
            assert parse(QuickstartArguments, command[1:], prog="semroute quickstart").text == "smollm2"
            continue
        command = [str(tiny_encoder) if "/Qwen3" in word or word == "smollm2" else word for word in command]
        main(command + (small if command[0] == "train" else ["--steps", "1"]))
    assert Path("images/qwen/00000_00.png").is_file()
    assert list(Path("states").rglob("*.safetensors"))
    (block,) = fenced("text-encoders.md", "python")
    names: dict[str, Any] = {}
    exec(block.replace("Qwen/Qwen3-VL-4B-Instruct", str(tiny_encoder)), names)
    assert names["features"].hidden.shape[:2] == (2, 2)


def test_sampling(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/depth").symlink_to(tiny_run)
    Path("prompts.txt").write_text("a star\na red circle\n")
    Path("routing.json").write_text(*fenced("sampling.md", "json"))
    for command in commands("sampling.md"):
        main(smaller(command, "--steps", "2") if command[0] == "train" else command)
    routed = json.loads(Path("images/routed/manifest.json").read_text())["routing"]
    assert routed == json.loads(Path("routing.json").read_text())
    page = (DOCS / "sampling.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ {4}torchrun (.*)$", page, re.MULTILINE)
    processes, command = re.fullmatch(r"--nproc-per-node (\d) -m semantic_routing (.*)", line).groups()
    semroute(int(processes), *shlex.split(command), "--steps", "20", "--guidance", "3")
    once, shared = (sorted(Path("images", name).glob("*.png")) for name in "bc")
    assert [path.read_bytes() for path in shared] == [path.read_bytes() for path in once]
    assert len(once) == 8


def test_strategies(tiny_run: Path, tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/depth").symlink_to(tiny_run)
    small = ["--steps", "3", "--batch", "4", "--preview-every", "0", "--no-compile"]
    small += ["--text.name-or-path", str(tiny_encoder)]
    for command in commands("strategies.md"):
        main(command + (small if command[0] == "train" else []))
    assert Path("figures/finer/divergence-parts.png").is_file()
    one, other = (load_file(find_checkpoint(Path("runs", name)) / EMA) for name in ("depth", "depth-again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    page = (DOCS / "strategies.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z-]+)`", "".join(re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE)))
    assert set(named) == set(ARMS)


@pytest.mark.parametrize("arm", ["depth", *(name for name, kind in ARMS.items() if kind.finer)])
def test_the_costs_of_finer_strategies(arm: str) -> None:
    page = (DOCS / "strategies.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{arm}`[^|]*\| ([\d,]+ \|.*) \|$", page, re.MULTILINE)
    found = measure(arm)
    with torch.device("meta"):
        model = make_model(DiTConfig(arm=arm))
    assert row.split(" | ") == [
        f"{sum(p.numel() for p in model.router.parameters()):,}",
        f"{found.flops_text / 1e12:.3g}",
        f"{found.flops_step / 1e12:.3g}",
        f"{found.flops_ours_all / 1e12:.1f}",
        f"{found.mix_bytes_ours / 1e6:.0f} MB",
    ]


def test_prepare_data(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_shards(Path("shards"))
    tiny_vae().save_pretrained("vae")
    small = ["--steps", "1", "--batch", "4", "--preview-every", "0", "--no-compile"]
    small += ["--text.name-or-path", str(tiny_encoder), "--data.max-damaged", "0.5"]
    with ChatServer() as server:
        for command in commands("prepare-data.md"):
            command = [
                "32" if word == "256" else word.replace("http://127.0.0.1:8000/v1", server.url) for word in command
            ]
            if command[0] == "train":
                command = smaller(command, *small)
            if command[1] == "recaption":
                command[command.index("--model") + 1] = MODEL
            main(command)
    assert Path("contact.png").is_file()
    assert Path("shards/.semroute-index").is_dir()
    assert "not an image" in capsys.readouterr().out
    assert find_checkpoint(Path("runs/recaptioned")).name == "step-0000001"
    assert list(Path("latents").glob("*.safetensors"))
    assert find_checkpoint(Path("runs/kept")).name == "step-0000001"


def test_analysis(
    tiny_run: Path,
    tiny_encoder: Path,
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("depth", "other"):
        shutil.copytree(tiny_run, Path("runs", name))
    start(tiny_config("joint"), Path("runs/joint"))
    fewer = {"64": "2", "50": "5", "20": "4", "smollm2": str(tiny_encoder)}
    small = {
        "sample": ["--steps", "5"],
        "evaluate": ["--steps", "5"],
        "probe": ["--tokens", "600", "--captions", "50"],
    }
    for command in commands("analysis.md"):
        command = [fewer.get(word, word.replace("-s50.", "-s5.")) for word in command]
        ablation = ["--ablation.sampling.steps", "3"] if "--ablate" in command else []
        main(smaller(command, *small.get(command[0], []), *ablation))
    assert Path("probes/smollm2/index.html").is_file()
    page = (DOCS / "analysis.md").read_text(encoding="utf-8")
    patterns = re.findall(r"`([a-z*-]+)`", "".join(re.findall(r"^\| `.*", page, re.MULTILINE)))
    patterns += re.findall(r"`([a-z-]+-\*)`", page)
    assert len(patterns) == 9 + 5
    assert [pattern for pattern in patterns if not list(Path("figures").rglob(f"{pattern}.png"))] == []
    for name in ("without", "alone", "swap"):
        assert Path(f"figures/ablation-loss/ablation-{name}.png").is_file()
    assert Path("figures/ablation/disagreement.json").is_file()
    chosen = {path.stem for path in Path("figures/chosen").glob("heatmap*.png")}
    assert chosen == {"heatmap-t0", "heatmap-t0.5", "heatmap-t1", "heatmap-block0", "heatmap-block1"}
    scored = json.loads(Path("evaluations/shifted/manifest.json").read_text())
    assert scored["sampler"]["clock"] == "shifted:0.05:0.1"
    manifests = [json.loads(Path("images", name, "manifest.json").read_text()) for name in ("shifted", "calibrated")]
    assert [manifest["sampler"]["clock"] for manifest in manifests] == [
        "shifted",
        "figures/joint/calibration-g6-s5.json",
    ]


class InThisProcess:
    """Stand-in for a study's process that runs the command immediately."""

    def __init__(self, command: list[str], **_: Any) -> None:
        assert command[1:3] == ["-m", "semantic_routing"]
        main(command[3:])

    def poll(self) -> int:
        return 0


def test_study(tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=InThisProcess, DEVNULL=subprocess.DEVNULL))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(results, "RESAMPLES", 100)
    monkeypatch.setattr("semantic_routing.sampling.load.compile_network", lambda model: None)
    monkeypatch.setattr(plan, "CALIBRATION", ("--n", "2", "--seed", "1"))
    for name, scale in list(plan.SCALES.items()):
        monkeypatch.setitem(plan.RECIPES, name, lambda arm: tiny_config(arm, steps=1, checkpoint_every=1))
        monkeypatch.setitem(plan.SCALES, name, replace(scale, sampling=replace(scale.sampling, steps=2)))
    for command in commands("study.md"):
        fewer = {"small": ["--arms", "B1", "FuseDiT"], "words": ["--arms", "S2", "depth-kv"]}.get(command[1], [])
        command = ["cpu" if word.startswith("cuda:") else word for word in command]
        main(smaller(command, "--seeds", "1", "--n", "11", *fewer))
    runs = {study.name: sorted(run.name for run in (study / "runs").iterdir()) for study in Path("studies").iterdir()}
    assert runs == {
        "toy": [f"{arm}-seed0" for arm in ("depth", "joint", "penultimate", "uniform")],
        "words": ["depth-kv-seed0", "depth-seed0"],
        "small": ["fusedit-seed0", "penultimate-seed0"],
        "rates": ["depth-rate10-seed0", "depth-seed0", "penultimate-seed0"],
        "clocks": ["penultimate-seed0", "time-seed0"],
    }
    page = (DOCS / "study.md").read_text(encoding="utf-8")
    named = [name for first in re.findall(r"^\| (`[a-z].*?) \|", page, re.MULTILINE) for name in first.split("`")[1::2]]
    assert named[-2:] == ["configs/", "logs/"]
    for name in named[4:]:  # after those of the scales
        assert Path("studies/clocks", name).exists(), name
    found = json.loads(Path("studies/clocks/results.json").read_text())
    clocks = [row["clock"] for row in found["rows"]]
    assert clocks == ["nominal", "nominal", "shifted", "shifted:0.05", "calibrated"]
    tested = {claim["inequality"]: claim["number"] for claim in found["claims"] if claim["number"]}
    assert list(tested) == [
        "S1 effective - nominal time > 0",
        "S1 shifted - nominal > 0",
        "S1 calibrated - nominal > 0",
    ]
    (lead,) = json.loads(Path("studies/clocks/trajectories/time-seed0/lead.json").read_text())
    assert tested["S1 effective - nominal time > 0"]["mean"] == lead["lead"]


def test_the_papers_sizes() -> None:
    (block,) = fenced("paper-checkpoints.md", "json")
    config = json.loads(block)
    assert {ours: config[theirs] for ours, theirs in SIZES.items()} == {
        ours: getattr(DiTConfig(), ours) for ours in SIZES
    }
    for arm in ("penultimate", "depth", "fusedit"):
        with pytest.raises(ValueError, match=r"tensors not in the checkpoint \(") as caught:
            from_upstream({"x": torch.zeros(1)}, config, arm)
        assert "1 tensors not in the model (x)" in str(caught.value)


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Tiny models and a server under the names of the evaluation page, and the files that it mentions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(geneval_detector, "LONG_SIDE", 133)
    monkeypatch.setattr(geneval_detector, "SHORT_SIDE", 80)
    small_model().save_pretrained("detector")
    small_clip().save_pretrained("clip")
    tokenizer(Path("clip"))
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained("clip")
    save_llava(Path("llava"))
    metadata = [
        {"tag": "counting", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
        {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"},
    ]
    Path("evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metadata))
    prompts = {f"{i:05d}": {"id": f"{i:05d}", "prompt": f"prompt {i}"} for i in (1, 2)}
    Path("genai_image.json").write_text(json.dumps(prompts))
    Path("genai_skills.json").write_text(json.dumps({"basic": [1], "advanced": [2], "counting": [2]}))
    Path("drawbench.csv").write_text("Prompts,Category\na dog,Animals\na red car,Colors\n")
    for name in ("photos/1.png", "photos/2.png", "theirs/geneval/0001/samples/0000.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(name)
    with ChatServer() as server:
        yield {
            "http://127.0.0.1:8000/v1": server.url,
            "Qwen/Qwen3-VL-235B-A22B-Instruct": MODEL,
            "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b": MODEL,
            "Qwen/Qwen3-VL-8B-Instruct": "llava",
            "facebook/dinov2-base": "clip",
            "openai/clip-vit-large-patch14": "clip",
        }


def test_evaluation(judged: dict[str, str], tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").mkdir()
    Path("runs/depth").symlink_to(tiny_run)
    Path("routing.json").write_text('{"rows": ["block 0"], "weights": [[0, 1]]}')
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    quick = {
        "shapes": ["--n", "11", "--steps", "1"],
        "geneval": ["--detector", "detector", "--clip", "clip", "--steps", "1"],
        "genai-bench": ["--steps", "1"],
        "drawbench": ["--steps", "1"],
        "loss": ["--n", "11"],
        "compare": ["--resamples", "100"],
        "features": ["--device", "cpu"],
    }
    (torchrun,) = re.findall(r"^ {4}torchrun .* semantic_routing (.*)$", page, re.MULTILINE)
    for command in [*commands("evaluation.md"), shlex.split(torchrun)]:
        if command[1] == "compare":
            shutil.copytree("evaluations/depth", "evaluations/uniform", dirs_exist_ok=True)
        main(smaller([judged.get(word, word) for word in command], *quick[command[1]]))
    assert "detector variant: detector" in capsys.readouterr().out
    one, shared = (Path("evaluations/depth", name, "records.jsonl").read_text() for name in ("shapes", "shared"))
    assert one == shared
    results = sorted(path.parent.name for path in Path("evaluations/depth").glob("*/summary.json"))
    assert results == ["drawbench", "edited", "fid", "genai", "genai-local", "geneval", "loss", "shapes", "shared"]
    assert {path.suffix for path in Path("tables").rglob("*.*")} == {".md", ".csv", ".tex"}
    (program,) = fenced("evaluation.md", "python")
    names: dict[str, Any] = {}
    exec(program, names)
    assert (names["summary"]["accuracy"]["counting"], names["summary"]["accuracy"]["colors"]) == (1.0, 0.0)
    assert VQA_TEMPLATES["3.1"] in page


TINY = shlex.split(
    "--steps 3 --batch 4 --no-compile --preview-every 0 --model.depth 2 --model.width 32 --model.heads 2 "
    "--model.kv-heads 1 --model.head-dim 8 --model.mlp-width 16"
)


def smaller(command: list[str], *options: str) -> list[str]:
    """Return the command with other values for some options, each given once."""
    names = [option for option in options if option.startswith("--")]
    kept = [word for i, word in enumerate(command) if word not in names and (i == 0 or command[i - 1] not in names)]
    return [*kept, *options]


def test_ten_lines(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("semantic_routing.training.recipes.toy", tiny_config)
    first, *others = fenced("ten-lines.md", "python")
    assert len([line for line in first.splitlines() if line]) <= 10
    names: dict[str, Any] = {}
    exec(first.replace("steps=2000", "steps=3"), names)
    for program in others:
        exec(program, names)
    assert (names["weights"].sum(-1) - 1).abs().max() < 1e-5
    assert Path("first.png").is_file()
    assert not torch.equal(names["changed"], names["pictures"])
    assert "block 1: 0." in capfd.readouterr().out
    for command in commands("ten-lines.md"):
        main(smaller(command, "--steps", "2") if command[0] == "sample" else command)
    assert Path("images/first/00000_00.png").is_file()


def test_own_data_and_model(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    (program,) = fenced("own-data-and-model.md", "python")
    exec(program, {})
    assert len(list(Path("photos").iterdir())) == 6
    for command in commands("own-data-and-model.md"):
        command = [str(tiny_encoder) if word == "smollm2" else word for word in command]
        if command[0] == "train":
            command = smaller(command, *TINY)
        main([*command, "--steps", "2"] if command[0] == "sample" else command)
    assert Path("contact.png").is_file()
    assert len(list(Path("images/mine").glob("*.png"))) == 2
    assert list(Path("figures/mine").glob("*.png"))


RUN_BY_OTHER_TESTS = {"explore": "explore.md", "study": "study.md", "probe": "analysis.md"}


@pytest.mark.parametrize("page", ["../README.md", "training.md", "toy-world.md"])
def test_the_other_pages(
    page: str, tiny_run: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (70, 66), "red").save(Path("photos", name))
    rows = [{"image": "1.png", "text": "a cat"}, {"image": "2.png", "text": ["a dog", "a brown dog"]}]
    Path("photos/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("runs").mkdir()
    Path("runs/quickstart").symlink_to(tiny_run)
    ran = 0
    for command in commands(page):
        command = command[: command.index("#")] if "#" in command else command
        if command[:2] == ["train", "toy"]:
            main(smaller(command, *TINY, "--text.name-or-path", str(tiny_encoder)))
        elif command[:2] == ["train", "--resume"] and "--steps" in command:
            main([*command[: command.index("--steps")], "--steps", "9"])
        elif command[0] == "evaluate":
            main(smaller(command, "--n", "11", "--steps", "2"))
        elif command[0] == "sample":
            main(smaller(command, "--steps", "2"))
        elif command[0] in RUN_BY_OTHER_TESTS:
            assert command in commands(RUN_BY_OTHER_TESTS[command[0]])
        elif command == ["--help"]:
            with pytest.raises(SystemExit, match="0"):
                main(command)
        else:
            main(command)
        ran += 1
    assert ran == len(commands(page)) > 0


def test_the_readmes_programs(
    tiny_encoder: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/quickstart").symlink_to(tiny_run)
    drawn, program = fenced("../README.md", "python")
    names: dict[str, Any] = {}
    exec(drawn, names)
    assert names["pictures"].shape == (1, 32, 32, 3)
    exec(program.replace("Qwen/Qwen3-0.6B", str(tiny_encoder)), names)
    assert names["velocity"].shape == (1, 16, 32, 32)
    assert names["weights"].shape == (1, 2, names["encoder"].num_layers)
