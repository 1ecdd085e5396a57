"""The report: one page that needs nothing else, says what the files say, and escapes all of it."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from semantic_routing.analysis.report import duration, smoothed, write_report
from semantic_routing.checkpoint.save import save_checkpoint
from semantic_routing.common.config import to_dict
from semantic_routing.common.images.save import save_png
from semantic_routing.common.manifest import manifest
from semantic_routing.evaluation.records import Record, write_records
from semantic_routing.evaluation.shapes import shapes_columns
from semantic_routing.evaluation.summary import summarize
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import DiTConfig
from semantic_routing.toy.captions import TAGS, prompts
from semantic_routing.training.recipes import toy

N = 4 * len(TAGS)  # one more of each tag than is shown
STEPS, BATCH = 400, 64
TIMINGS = {"language_model": 21.5, "train": 431.0, "evaluate": 62.0}
NASTY = "<script>alert('x')</script> & a \"red\" circle"


def model_config(arm: str) -> DiTConfig:
    return DiTConfig(
        arm=arm, depth=3, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=16, patch=4, channels=3,
        text_width=8, text_layers=4, fusedit_first_layer=1,
    )  # fmt: skip


def fake_run(folder: Path, arm: str) -> Path:
    """A run's folder as training leaves it."""
    config = to_dict(replace(toy(arm), model=model_config(arm), batch=BATCH, steps=STEPS))
    model = make_model(model_config(arm))
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_checkpoint(folder, STEPS, model, ema, [], {"config": config})
    rows = [
        {"step": s, "loss": 2.0 * s**-0.4, "grad_norm": 1.0, "lr": 1e-3, "images_per_s": 300.0}
        for s in range(10, STEPS + 1, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "manifest.json").write_text(json.dumps(manifest(config=config) | {"command": "semroute train <b>"}))
    return folder


def fake_evaluation(folder: Path) -> list[Record]:
    """An evaluation's folder; every fourth image is wrong."""
    records = []
    for index, sample in enumerate(prompts(3, N)):
        correct, file = index % 4 != 1, f"images/{index:05d}.png"
        save_png(folder / file, sample.image)
        reason = "everything claimed was found" if correct else f"found {NASTY}"
        records.append(
            Record(
                prompt=index,
                id=f"{index:05d}",
                image=0,
                caption=NASTY if index == 0 else sample.caption,
                tags=(sample.tag,),
                scores={"correct": float(correct)},
                reason=reason,
                file=file,
            )
        )
    write_records(folder / "records.jsonl", records)
    facts = manifest(
        weights_sha256="0" * 64,
        sampler={"steps": 20, "guidance": 3.0, "sampler": "euler", "shift": 1.0, "seed": 0},
        prompts={"n": N, "sha256": "1" * 64},
        prompt_seed=3,
    )
    (folder / "manifest.json").write_text(json.dumps(facts | {"command": "semroute evaluate shapes"}))
    return records


class Page(HTMLParser):
    """Text and elements of a page; fails where tags do not match."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Page, metrics and records of a depth-wise run."""
    folder = tmp_path_factory.mktemp("report")
    records = fake_evaluation(folder / "evaluation")
    page = write_report(fake_run(folder / "run", "depth"), folder / "evaluation", folder / "out", TIMINGS)
    assert page == folder / "out" / "report.html"
    assert sorted(path.name for path in page.parent.iterdir()) == ["metrics.json", "report.html", "samples.png"]
    return Page(page.read_text(encoding="utf-8")), json.loads((folder / "out" / "metrics.json").read_text()), records


def test_metrics_are_those_of_the_records(reported):
    _, metrics, records = reported
    summary = summarize(records, shapes_columns(tag for r in records for tag in r.tags))["accuracy"]
    assert metrics["geneval_mean"] == summary.pop("geneval")
    assert metrics["accuracy"] == summary
    assert set(metrics["accuracy"]) == {"overall", *TAGS}
    assert metrics["accuracy"]["overall"] == 0.75
    assert (metrics["steps"], metrics["images_seen"]) == (STEPS, STEPS * BATCH)
    assert (metrics["train_seconds"], metrics["total_seconds"]) == (431.0, 514.5)
    assert metrics["images_per_second"] == 300.0
    assert metrics["parameters"] == sum(p.numel() for p in make_model(model_config("depth")).parameters())


def test_page_loads_nothing_and_runs_nothing(reported):
    page, _, _ = reported
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
    links = [v for _, attrs in page.elements for k, v in attrs.items() if k in ("src", "href", "xlink:href")]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "url(" not in "".join(v or "" for _, attrs in page.elements for k, v in attrs.items() if k == "style")


def test_page_shows_three_images_of_every_tag_with_their_verdicts(reported):
    page, _, records = reported
    shown = [r for tag in TAGS for r in [r for r in records if r.tag == tag][:3]]
    assert [image["alt"] for image in page.all("img")] == [r.caption for r in shown]
    assert [figure["title"] for figure in page.all("figure")] == [r.reason for r in shown]
    marks = [attrs["class"] for attrs in page.all("span") if attrs.get("class") in ("yes", "no")][2:]  # the legend's
    assert marks == ["yes" if r.correct else "no" for r in shown]


def test_what_comes_from_files_is_text_and_never_markup(reported):
    page, _, _ = reported
    assert NASTY in page.text
    assert "semroute train <b>" in page.text
    assert not page.all("b")[5:]  # only the five headline numbers


def test_page_says_what_was_trained_and_how(reported):
    page, metrics, _ = reported
    for fact in (
        "S2 depth",
        f"{metrics['parameters']:,} parameters",
        "400 steps of 64 images, 25,600 images in all",
        "4 layers of width 8",
        "language model21.5 s",
        "train7 min 11 s",
        "in all8 min 34 s",
        "semroute evaluate shapes",
        "all images0.7500.",
    ):
        assert fact in page.text
    assert len(page.all("figure")) == 33
    drawings = [attrs["aria-label"] for attrs in page.all("svg") if "aria-label" in attrs]
    assert drawings == ["training loss by step", "weight of every language-model layer in every block"]


@pytest.mark.parametrize(("arm", "maps"), [("fusedit", 0), ("time", 6)])
def test_other_arms(tmp_path, arm, maps):
    fake_evaluation(tmp_path / "evaluation")
    path = write_report(fake_run(tmp_path / "run", arm), tmp_path / "evaluation", tmp_path, TIMINGS | {"total": 600.0})
    page = Page(path.read_text(encoding="utf-8"))
    drawings = [attrs["aria-label"] for attrs in page.all("svg") if "aria-label" in attrs]
    assert len(drawings) == 1 + maps
    assert ("FuseDiT has no routing weights" in page.text) == (maps == 0)
    assert json.loads((tmp_path / "metrics.json").read_text())["total_seconds"] == 600.0


def test_a_report_needs_a_finished_run_and_evaluation(tmp_path):
    run = fake_run(tmp_path / "run", "depth")
    with pytest.raises(ValueError, match="finished evaluation"):
        write_report(run, tmp_path / "none", tmp_path / "out", TIMINGS)
    fake_evaluation(tmp_path / "evaluation")
    (tmp_path / "evaluation" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        write_report(run, tmp_path / "evaluation", tmp_path / "out", TIMINGS)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no .*metrics.jsonl; a report needs a finished run"):
        write_report(run, tmp_path / "evaluation", tmp_path / "out", TIMINGS)
    assert not (tmp_path / "out").exists()


def test_running_mean():
    assert smoothed(np.full(300, 0.7)) == pytest.approx(np.full(300, 0.7))
    line = np.arange(200.0)
    assert smoothed(line)[10:-10] == pytest.approx(line[10:-10])  # the mean of a line's neighbours is the line
    assert smoothed(np.array([3.0, 1.0])) == pytest.approx([3.0, 1.0])
    noise = np.random.default_rng(0).normal(size=400)
    assert smoothed(noise).std() < 0.5 * noise.std()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (8.24, "8.2 s"), (59.97, "1 min 00 s"), (425.4, "7 min 05 s"), (7830.0, "2 h 10 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words
