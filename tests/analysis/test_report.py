"""The report: a self-contained page that shows the data of its files and escapes all of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from semantic_routing.analysis.report import duration, write_report
from semantic_routing.analysis.report_data import smoothed
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
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.networks import tiny_config

N = 4 * len(TAGS)  # one image of each tag more than the page shows
STEPS, BATCH = 400, 64
TIMINGS = {"language_model": 21.5, "train": 431.0, "evaluate": 62.0}
NASTY = "<script>alert('x')</script> & a \"red\" circle"


def model_config(arm: str) -> DiTConfig:
    return tiny_config(arm, patch=4, text_layers=4, fusedit_first_layer=1)


def fake_run(folder: Path, arm: str) -> Path:
    """Write the folder of a finished run."""
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
    """Write the folder of an evaluation; every fourth image is wrong."""
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


@dataclass
class Element:
    """An element of a page and the text inside it."""

    tag: str
    attrs: dict[str, str | None]
    text: str = ""
    parents: tuple[Element, ...] = ()

    def inside(self, tag: str) -> bool:
        return any(parent.tag == tag for parent in self.parents)


class Page(HTMLParser):
    """The elements of a page; fails if its tags do not match."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[Element] = []
        self.elements: list[Element] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append(Element(tag, dict(attrs), parents=tuple(self.open)))
        if tag not in self.VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append(Element(tag, dict(attrs), parents=tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.text += data
        for element in self.open:
            element.text += data

    def all(self, tag: str, inside: str = "") -> list[Element]:
        return [e for e in self.elements if e.tag == tag and (not inside or e.inside(inside))]

    def section(self, title: str) -> Element:
        """Return the section under a heading."""
        (heading,) = [e for e in self.all("h2") if e.text == title]
        return heading.parents[-1]

    def rows(self, title: str) -> dict[str, list[str]]:
        """Return the cells of each table row of a section by the row's name."""
        section = self.section(title)
        trs = [e for e in self.all("tr") if section in e.parents]
        cells = [[e.text for e in self.elements if e.tag in ("th", "td") and tr in e.parents] for tr in trs]
        return {name: rest for name, *rest in cells}

    def drawings(self) -> list[str]:
        """Return the descriptions of the figures."""
        return [label for e in self.all("svg") if (label := e.attrs.get("aria-label"))]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Return page, metrics and records of a depth-wise run."""
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
    assert not {"script", "link", "iframe"} & {element.tag for element in page.elements}
    attrs = [(name, value or "") for element in page.elements for name, value in element.attrs.items()]
    links = [value for name, value in attrs if name in ("src", "href", "xlink:href")]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "url(" not in "".join(value for name, value in attrs if name == "style")


def test_page_shows_three_images_of_every_tag_with_their_verdicts(reported):
    page, _, records = reported
    shown = [r for tag in TAGS for r in [r for r in records if r.tag == tag][:3]]
    assert len(shown) == 33
    assert [image.attrs["alt"] for image in page.all("img")] == [r.caption for r in shown]
    assert [figure.attrs["title"] for figure in page.all("figure")] == [r.reason for r in shown]
    below = [f"✓ {r.caption}" if r.correct else f"✗ {r.caption}{r.reason}" for r in shown]
    assert [caption.text for caption in page.all("figcaption")] == below
    heads = {e.text for e in page.all("h3") if page.section("Samples") in e.parents}
    assert "single object 75.0 % of 4" in heads


def test_text_from_files_is_never_markup(reported):
    page, _, _ = reported
    assert page.all("img")[0].attrs["alt"] == NASTY
    assert f"✓ {NASTY}" in [caption.text for caption in page.all("figcaption")]
    assert [pre.text for pre in page.all("pre")][-1] == "semroute train <b>\nsemroute evaluate shapes"
    assert len(page.all("b")) == len(page.all("b", inside="header")) == 5  # the headline numbers


def test_page_says_what_was_trained_and_how(reported):
    page, metrics, _ = reported
    for fact in (
        "S2 depth",
        f"{metrics['parameters']:,} parameters",
        "400 steps of 64 images, 25,600 images in all",
        "4 layers of width 8",
        "every block learns its own mixture of all layers",
    ):
        assert fact in page.all("header")[0].text
    assert page.rows("Time") == {
        "language model": ["21.5 s"],
        "train": ["7 min 11 s"],
        "evaluate": ["1 min 02 s"],
        "in all": ["8 min 34 s"],
        "speed of training (median)": ["300 images/s"],
    }
    assert page.drawings() == ["training loss by step", "weight of every language-model layer in every block"]


def test_table_of_accuracy(reported):
    page, metrics, _ = reported
    rows = page.rows("Accuracy")
    low, high = metrics["interval"]["overall"]
    assert rows["tag"] == ["accuracy", "", "95 % interval", "images"]
    assert rows["all images"] == ["0.750", "", f"{low:.3f} – {high:.3f}", str(N)]
    assert rows["single object"][0] == "0.750"
    order = list(rows)
    assert order[1:4] == ["all images", "mean of the six GenEval tags", "GenEval's tags"]
    assert order.index("single object") < order.index("Harder skills") < order.index("negation")
    assert len(rows) == 1 + 2 + 2 + len(TAGS)


@pytest.mark.parametrize(("arm", "other"), [("depth", "penultimate"), ("penultimate", "depth"), ("time", "depth")])
def test_the_next_run_has_another_arm(tmp_path, arm, other):
    fake_evaluation(tmp_path / "evaluation")
    path = write_report(fake_run(tmp_path / "run", arm), tmp_path / "evaluation", tmp_path, TIMINGS)
    page = Page(path.read_text(encoding="utf-8"))
    assert f"semroute train toy --arm {other} --out runs/{other}\n" in page.section("Next steps").text


@pytest.mark.parametrize(("arm", "maps"), [("fusedit", 0), ("time", 6)])
def test_other_arms(tmp_path, arm, maps):
    fake_evaluation(tmp_path / "evaluation")
    path = write_report(fake_run(tmp_path / "run", arm), tmp_path / "evaluation", tmp_path, TIMINGS | {"total": 600.0})
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.drawings()) == 1 + maps
    assert ("FuseDiT has no routing weights" in page.text) == (maps == 0)
    assert json.loads((tmp_path / "metrics.json").read_text())["total_seconds"] == 600.0


def test_a_report_needs_a_finished_run_and_evaluation(tmp_path):
    run = fake_run(tmp_path / "run", "depth")
    with pytest.raises(ValueError, match="finished evaluation"):
        write_report(run, tmp_path / "none", tmp_path / "out", TIMINGS)
    fake_evaluation(tmp_path / "evaluation")
    (tmp_path / "evaluation" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is not the manifest of a finished evaluation"):
        write_report(run, tmp_path / "evaluation", tmp_path / "out", TIMINGS)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl is empty; give the folder of a run that has trained"):
        write_report(run, tmp_path / "evaluation", tmp_path / "out", TIMINGS)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"cannot read the metrics of a finished run .*metrics.jsonl"):
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
