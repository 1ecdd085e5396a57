"""``semroute evaluate`` from the command line to the table: runs, pipelines, folders, and a judge on a server."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semantic_routing.cli import evaluate as commands
from semantic_routing.cli.main import main
from semantic_routing.evaluation.geneval.verdict import Detection
from semantic_routing.evaluation.records import read_records
from semantic_routing.interop.export import ExportArguments, export

KEY = "sk-of-nobody-1234"
STEPS = ("--steps", "2", "--device", "cpu")


def call(*args: object) -> int:
    """Run the command in this process and return its exit code."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class Judge(BaseHTTPRequestHandler):
    """Server that answers Yes with probability 0.8, or with scores if asked for more than one token."""

    asked: list[dict] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        text = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 2.5"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if body["max_tokens"] == 1:
            choice["message"]["content"] = "Yes"
            top = [{"token": word, "logprob": math.log(p), "bytes": None} for word, p in (("Yes", 0.8), ("No", 0.2))]
            choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        content = json.dumps(answer | {"usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[dict]]]:
    """Address of a judge and the list of its requests."""
    monkeypatch.setattr(Judge, "asked", [])
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", Judge.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def genai(tmp_path: Path) -> list[object]:
    """Three prompts of GenAI-Bench with skills, as arguments."""
    prompts = {f"{i:05d}": {"id": f"{i:05d}", "prompt": f"a red circle {i}"} for i in (1, 2, 3)}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "skills.json").write_text(json.dumps({"basic": [1, 2], "advanced": [3]}))
    return ["--prompts", tmp_path / "prompts.json", "--skills", tmp_path / "skills.json"]


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_a_pipeline_samples_the_images_of_its_run(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(ExportArguments(model=tiny_run, out=tmp_path / "pipe"))
    for name, model in (("run", tiny_run), ("pipe", tmp_path / "pipe")):
        assert call("evaluate", "shapes", "--model", model, "--n", 3, *STEPS, "--out", tmp_path / name / "out") == 0
    assert capsys.readouterr().out.strip().endswith((tmp_path / "pipe/out/table.md").read_text().strip())
    run, pipe = (manifest(tmp_path / name / "out") for name in ("run", "pipe"))
    assert run["weights_sha256"] == pipe["weights_sha256"]
    assert pipe["checkpoint"] == str(tmp_path / "pipe")
    for i in range(3):
        first, second = (
            np.asarray(Image.open(tmp_path / name / f"out/images/{i:05d}.png")) for name in ("run", "pipe")
        )
        assert np.array_equal(first, second)
    # The same images as a folder of any tool give the same records, and keep their origin.
    images = tmp_path / "run/out/images"
    assert call("evaluate", "shapes", "--images", images, "--n", 3, "--out", tmp_path / "again") == 0
    verdicts = [[r.correct for r in read_records(tmp_path / name / "records.jsonl")] for name in ("run/out", "again")]
    assert verdicts[0] == verdicts[1]
    assert manifest(tmp_path / "again")["weights_sha256"] == run["weights_sha256"]


@pytest.mark.behaviour(
    "Judges and scores",
    when="an evaluation with another `--routing` goes into the same folder, or the file does not fit the model",
    then="it is refused in one line, and the folder stays as it is",
)
def test_an_edited_routing_is_scored(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The images are those of ``semroute sample`` with the same file, and the manifest holds the routing."""
    edited = {"rows": ["block 1"], "weights": [[1.0, 0.0]]}
    (tmp_path / "routing.json").write_text(json.dumps(edited))
    (tmp_path / "other.json").write_text(json.dumps({"rows": ["block 7"], "weights": [[1.0, 0.0]]}))
    out, asked = tmp_path / "out", ("evaluate", "shapes", "--model", tiny_run, "--n", 2, *STEPS)
    assert call(*asked, "--out", out, "--routing", tmp_path / "routing.json") == 0
    assert manifest(out)["routing"] == edited
    assert "edited routing" in (out / "index.html").read_text()
    prompts = [json.loads(line)["caption"] for line in (out / "records.jsonl").read_text().splitlines()]
    settings = {f"--{name}": manifest(out)["sampler"][name] for name in ("guidance", "sampler", "shift")}
    sampled = ["sample", tiny_run, *STEPS, *[word for pair in settings.items() for word in pair], "--prompt", *prompts]
    for name, extra in (("plain", []), ("edited", ["--routing", tmp_path / "routing.json"])):
        assert call(*sampled, *extra, "--out", tmp_path / name) == 0
    found, plain, same = (
        [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
        for folder in (out / "images", tmp_path / "plain", tmp_path / "edited")
    )
    assert np.array_equal(found, same)
    assert not np.array_equal(found, plain)
    before = manifest(out)
    capsys.readouterr()
    for extra, message in (
        ([], "holds other images (routing {'rows': ['block 1']"),
        (["--routing", tmp_path / "other.json"], "other.json: arm 'depth' has no row 'block 7'"),
    ):
        assert call(*asked, "--out", out, *extra) == 2
        assert message in capsys.readouterr().err
    assert manifest(out) == before
    assert call("evaluate", "shapes", "--images", out / "images", "--routing", "x.json", "--out", tmp_path / "x") == 2
    assert "--routing replaces weights of a model" in capsys.readouterr().err


def test_sampling_and_scoring_are_separate(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dogs:
        identity = {"label": "variant: dogs"}  # noqa: RUF012

        def __call__(self, image: Image.Image, *args: object) -> dict[str, list[Detection]]:
            return {"dog": [Detection((0.0, 0.0, 9.0, 9.0), 0.95)]}

    rows = [
        {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
        for name in ("dog", "cat")
    ]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "geneval", "--model", tiny_run, "--prompts", prompts, "--images-per-prompt", 2, *STEPS]
    assert call(*command, "--no-score", "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    images = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert images == [f"images/{p:05d}/samples/{i:05d}.png" for p in range(2) for i in range(2)]
    assert not (out / "records.jsonl").exists()
    monkeypatch.setattr(commands, "load_geneval_models", lambda *args: (Dogs(), Dogs()))
    assert call(*command, "--variant", "mine", "--out", out) == 0
    assert [r.correct for r in read_records(out / "records.jsonl")] == [True, True, False, False]
    facts = manifest(out)
    assert facts["scorer"]["label"] == "mine, detector variant: dogs, colours variant: dogs"
    assert facts["sampler"] == {
        "steps": 2,
        "guidance": 6.0,
        "sampler": "euler",
        "shift": 1.0,
        "compile": False,
        "clock": "nominal",
        "seed": 0,
    }
    assert facts["resolution"] == 32
    assert call(*command, "--out", out) == 2  # another label, another scorer
    assert "they differ in label" in capsys.readouterr().err


def test_genai_bench_through_a_server(
    judge: tuple[str, list[dict]], genai: list[object], tiny_run: Path, tmp_path: Path
) -> None:
    url, asked = judge
    command = ["evaluate", "genai-bench", *genai, "--judge.base-url", url, "--judge.model", "vlm"]
    sampled = tmp_path / "sampled"
    assert call(*command, "--model", tiny_run, *STEPS, "--out", sampled) == 0
    assert len(asked) == 3
    assert asked[0]["messages"][0]["content"][0]["text"].startswith('Does this figure show "a red circle')
    scores = json.loads((sampled / "summary.json").read_text())["scores"]["vqascore"]
    assert scores["all"] == {"mean": pytest.approx(0.8), "std": pytest.approx(0, abs=1e-9), "n": 3}
    assert scores["advanced"] == {"mean": pytest.approx(0.8), "std": None, "n": 1}
    assert [r.file for r in read_records(sampled / "records.jsonl")] == [f"images/{i:05d}.jpeg" for i in (1, 2, 3)]
    assert manifest(sampled)["scorer"]["template"] == 'Does this figure show "{}"? Please answer Yes or No.'
    usage = json.loads((sampled / "usage.jsonl").read_text())
    assert (usage["requests"], usage["prompt_tokens"]) == (3, 300)
    assert not any(KEY.encode() in path.read_bytes() for path in sampled.rglob("*") if path.is_file())
    # Another template is another judge, which needs --rescore.
    other = [*command, "--images", sampled / "images", "--template", "3.0", "--out", sampled]
    assert call(*other) == 2
    assert call(*other, "--rescore") == 0
    assert len(asked) == 6
    assert manifest(sampled)["weights_sha256"]


def test_drawbench_through_a_server(judge: tuple[str, list[dict]], tmp_path: Path) -> None:
    url, asked = judge
    (tmp_path / "prompts.csv").write_text("Prompts,Category\na dog,Animals\na cat,Animals\na car,Things\n")
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / f"{i:05d}.png")
    command = ["evaluate", "drawbench", "--prompts", tmp_path / "prompts.csv", "--images", tmp_path / "images"]
    judged = ["--judge.base-url", url, "--judge.model", "reward", "--out", tmp_path / "out"]
    assert call(*command, *judged) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["overall"]["mean"] for row in summary["scores"].values()] == [4.0, 3.5, 2.5]
    assert summary["scores"]["style"]["Things"] == {"mean": None, "std": None, "n": 0}
    assert summary["gaps"] == {"missing": 1}
    assert len(asked) == 2
    both = tmp_path / "both.md"
    assert call("evaluate", "compare", tmp_path / "out", tmp_path / "out", "--labels", "a", "b", "--out", both) == 0
    assert both.read_text().startswith("| | alignment overall | alignment Animals |")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("shapes --out out", "give either --model, a run or pipeline, or --images, a folder"),
        ("shapes --model run --images run --out out", "give either --model"),
        ("shapes --images x --no-score --out out", "--no-score only samples images"),
        ("shapes --images nowhere --out out", "there is no folder of images nowhere"),
        ("shapes --model run --n 0 --out out", "n is 0"),
        ("geneval --model run --out out", "Missing from semroute evaluate geneval: --prompts PATH"),
        ("geneval --model run --prompts none.jsonl --out out", "cannot read the prompts of GenEval none.jsonl"),
        ("geneval --images x --prompts genai.json --out out", "genai.json:1 is not a prompt of GenEval"),
        ("genai-bench --images x --prompts a.json --skills b.json --out out", "no judge: give --judge.model"),
        ("drawbench --images x --prompts genai.json --out out", "no judge: give --judge.model"),
        ("drawbench --images x --prompts genai.json --judge.model m --out out", "genai.json holds no prompts of DrawB"),
        ("compare run --out out.md", "run is not a finished evaluation of semroute evaluate"),
        ("features --images x", "nothing to compute"),
        ("geneva --out out", "unknown benchmark 'geneva'; did you mean 'geneval'?"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_one_line(
    typed: str,
    message: str,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(tiny_run)
    (tmp_path / "genai.json").write_text('{"00001": {"id": "00001", "prompt": "a"}}')
    assert call("evaluate", *typed.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
