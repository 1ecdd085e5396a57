"""Scoring folders: layouts of either side, gaps that are counted, work that a crash does not lose, other judges."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from semantic_routing.common.distributed import Processes
from semantic_routing.evaluation.benchmark import Benchmark, Finding, Prompt, Task
from semantic_routing.evaluation.records import read_records
from semantic_routing.evaluation.run import evaluate_images
from semantic_routing.evaluation.scoring import check_scorer, read_manifest, score_folder

N = 6


@dataclass(frozen=True)
class Redness:
    """Calls an image correct whose first pixel is red; remembers what it saw; fails or gives up on request."""

    name: str = "redness"
    seen: list[tuple[int, int]] = field(default_factory=list)
    fail_at: int | None = None
    blind: frozenset[int] = frozenset()
    url: str = "here"
    usage = None

    @property
    def identity(self) -> dict[str, Any]:
        return {"scorer": self.name, "base_url": self.url}

    def score(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Finding]]:
        for task in reversed(tasks):  # scorers may answer in any order
            if task.index == self.fail_at:
                raise RuntimeError("the power went off")
            self.seen.append((task.index, task.image))
            with Image.open(task.path) as image:
                red = image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
            score = None if task.index in self.blind else float(red)
            yield task, Finding(scores={"correct": score}, reason="seen", answer="“yes”")


def benchmark(n: int = N, images: int = 1) -> Benchmark:
    prompts = tuple(Prompt(id=f"{i:05d}", text=f"prompt {i}", tags=(("a", "b")[i % 2],)) for i in range(n))
    return Benchmark(prompts=prompts, images_per_prompt=images)


def paint(folder: Path, n: int = N, suffix: str = ".png") -> Path:
    """Every third image is blue."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("RGB", (4, 4), "blue" if i % 3 == 2 else "red").save(folder / f"{i:05d}{suffix}")
    return folder


def files(folder: Path) -> dict[str, str]:
    """The contents of all files but the manifest; the page tells its date too, which is left out."""
    kept = (path for path in folder.iterdir() if path.is_file() and path.name != "manifest.json")
    return {path.name: re.sub(r"\d{4}-\d\d-\d\dT[\d:+]+", "", path.read_text()) for path in kept}


@pytest.mark.behaviour(
    "Judges and scores",
    when="a folder of scores holds the user's own files, also with --rescore",
    then="they are never deleted",
)
def test_files_of_the_users_stay(tmp_path):
    images, out = paint(tmp_path / "theirs"), tmp_path / "out"
    evaluate_images(benchmark(), images, out, Redness())
    own = {"records.part-best.jsonl", "records.part-1-copy.jsonl", "records.jsonl.bak"}
    for name in own:
        (out / name).write_text("mine")
    evaluate_images(benchmark(), images, out, Redness(name="other"), rescore=True)
    assert {name: (out / name).read_text() for name in own} == dict.fromkeys(own, "mine")


def test_records_of_no_evaluation_are_not_replaced(tmp_path):
    images, out = paint(tmp_path / "theirs"), tmp_path / "out"
    out.mkdir()
    (out / "records.jsonl").write_text("mine")
    for rescore in (False, True):
        with pytest.raises(ValueError, match=r"records\.jsonl already exists and does not belong to an evaluation"):
            evaluate_images(benchmark(), images, out, Redness(), rescore=rescore)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"records.jsonl": "mine"}


def test_a_folder_of_any_tool_is_scored_and_every_score_told(tmp_path):
    images, out = paint(tmp_path / "theirs"), tmp_path / "out"
    summary = evaluate_images(benchmark(), images, out, Redness())
    assert summary["accuracy"] == {"overall": 4 / 6, "a": 2 / 3, "b": 2 / 3}
    records = read_records(out / "records.jsonl")
    assert [(r.id, r.correct) for r in records] == [(f"{i:05d}", i % 3 != 2) for i in range(N)]
    assert all((out / r.file).resolve() == images / f"{r.id}.png" for r in records)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["scorer"] == {"scorer": "redness", "base_url": "here"}
    assert manifest["prompt_set"] == benchmark().prompt_set
    assert manifest["versions"]["torch"]
    assert {p.name for p in out.iterdir()} == {
        "records.jsonl", "summary.json", "table.md", "manifest.json", "index.html",
    }  # fmt: skip


def test_a_crash_loses_one_judgement(tmp_path):
    images, out = paint(tmp_path / "images"), tmp_path / "out"
    first, second = Redness(fail_at=2), Redness()
    with pytest.raises(RuntimeError):
        evaluate_images(benchmark(), images, out, first)
    assert first.seen == [(5, 0), (4, 0), (3, 0)]
    part = out / "records.part-00.jsonl"
    part.write_text(part.read_text()[:-20])  # as if the last line had not reached the disk whole
    evaluate_images(benchmark(), images, out, second)
    assert second.seen == [(3, 0), (2, 0), (1, 0), (0, 0)]
    whole = tmp_path / "whole"
    evaluate_images(benchmark(), images, whole, Redness())
    assert files(out) == files(whole)
    third = Redness()
    evaluate_images(benchmark(), images, out, third)
    assert third.seen == []
    assert files(out) == files(whole)


def test_another_image_under_the_same_name_is_scored_again(tmp_path):
    images, out = paint(tmp_path / "images"), tmp_path / "out"
    evaluate_images(benchmark(), images, out, Redness())
    Image.new("RGB", (4, 4), "green").save(images / "00000.png")
    again = Redness()
    evaluate_images(benchmark(), images, out, again)
    assert again.seen == [(0, 0)]
    assert read_records(out / "records.jsonl")[0].correct is False


def test_gaps_are_counted_and_tried_again(tmp_path):
    images, out = paint(tmp_path / "images"), tmp_path / "out"
    (images / "00001.png").unlink()
    (images / "00002.png").write_bytes((images / "00002.png").read_bytes()[:50])
    (images / "00003.png").write_text("no image")
    summary = evaluate_images(benchmark(), images, out, Redness(blind=frozenset({0})))
    assert summary["n"]["overall"] == 2
    assert summary["gaps"] == {"missing": 1, "unreadable": 2, "unscored correct": 1}
    records = read_records(out / "records.jsonl")
    assert [r.gap for r in records] == ["unscored", "missing", "unreadable", "unreadable", "", ""]
    assert "Not in any mean: 1 missing, 2 unreadable, 1 unscored correct." in (out / "table.md").read_text()
    paint(images)
    seeing = Redness()
    assert evaluate_images(benchmark(), images, out, seeing)["gaps"] == {}
    assert sorted(seeing.seen) == [(0, 0), (1, 0), (2, 0), (3, 0)]


@pytest.mark.behaviour(
    "Judges and scores",
    when="no image of an evaluation could be scored",
    then="exit code 2 and the first reason; no results are written, and after the fix the same folder can be used",
)
@pytest.mark.parametrize(("harm", "reason"), [("blind", "seen"), ("damaged", "cannot be opened"), ("both", "seen")])
def test_an_evaluation_that_scored_nothing_fails(tmp_path, harm, reason):
    images, out = paint(tmp_path / "images"), tmp_path / "out"
    if harm != "blind":
        for path in sorted(images.iterdir())[: N if harm == "damaged" else 2]:
            path.write_text("no image")
    blind = Redness(blind=frozenset(range(N)))
    with pytest.raises(ValueError, match=rf"none of {N} images could be scored; the first: .*{reason}"):
        evaluate_images(benchmark(), images, out, blind)
    assert {path.name for path in out.iterdir()} == {"manifest.json", "records.part-00.jsonl"}
    paint(images)
    other = Redness("greenness")
    assert evaluate_images(benchmark(), images, out, other)["n"]["overall"] == N
    assert {path.name for path in out.iterdir()} >= {"records.jsonl", "summary.json", "table.md", "index.html"}


def test_reasons_of_what_is_not_scored_stand_below_the_table(tmp_path):
    evaluate_images(benchmark(), paint(tmp_path / "images"), tmp_path / "out", Redness(blind=frozenset({0, 4})))
    assert (
        "Not in any mean: 2 unscored correct.\n\nNot scored: 2 seen.\n" in (tmp_path / "out" / "table.md").read_text()
    )


def test_a_folder_half_scored_by_another_is_refused_unless_told(tmp_path):
    images, out = paint(tmp_path / "images"), tmp_path / "out"
    with pytest.raises(RuntimeError):
        evaluate_images(benchmark(), images, out, Redness(fail_at=2))
    before = files(out)
    with pytest.raises(ValueError, match=r"by redness, not by greenness \(they differ in scorer\); .*--rescore"):
        evaluate_images(benchmark(), images, out, Redness("greenness"))
    assert files(out) == before
    other = Redness("greenness")
    evaluate_images(benchmark(), images, out, other, rescore=True)
    assert len(other.seen) == N
    with pytest.raises(ValueError, match="--rescore"):
        evaluate_images(benchmark(), images, out, Redness())


def test_where_a_judge_is_served_does_not_matter(tmp_path):
    images, out = paint(tmp_path / "images"), tmp_path / "out"
    evaluate_images(benchmark(), images, out, Redness())
    elsewhere = Redness(url="there")
    evaluate_images(benchmark(), images, out, elsewhere)
    assert elsewhere.seen == []


def test_verdicts_on_what_was_asked_otherwise_are_refused_unless_told(tmp_path):
    images, out = paint(tmp_path / "images"), tmp_path / "out"

    def asking(count: int) -> Benchmark:
        return Benchmark(prompts=tuple(replace(p, metadata={"count": count}) for p in benchmark().prompts))

    evaluate_images(asking(1), images, out, Redness())
    with pytest.raises(ValueError, match=r"for another set of prompts; .*--rescore"):
        evaluate_images(asking(2), images, out, Redness())
    again = Redness()
    evaluate_images(asking(2), images, out, again, rescore=True)
    assert len(again.seen) == N


def test_an_image_of_a_prompt_that_was_reworded_is_scored_again(tmp_path):
    images, out = paint(tmp_path / "images"), tmp_path / "out"
    evaluate_images(benchmark(), images, out, Redness())
    first, *others = benchmark().prompts
    again = Redness()
    evaluate_images(Benchmark(prompts=(replace(first, text="other words"), *others)), images, out, again)
    assert again.seen == [(0, 0)]


def test_a_finding_is_on_disk_before_the_next_image_is_judged(tmp_path):
    images, out, seen = paint(tmp_path / "images"), tmp_path / "out", []

    class Looking(Redness):
        def score(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Finding]]:
            for finding in super().score(tasks):
                yield finding
                seen.append(len((out / "records.part-00.jsonl").read_text().splitlines()))

    evaluate_images(benchmark(), images, out, Looking())
    assert seen == [1, 2, 3, 4, 5, 6]


def test_an_image_that_lacks_one_of_its_scores_is_unscored(tmp_path):
    @dataclass(frozen=True)
    class Two(Benchmark):
        metrics: ClassVar[tuple[str, ...]] = ("correct", "beauty")

    class Partial(Redness):
        def score(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Finding]]:
            for task in tasks:
                beauty = None if task.index == 1 else 0.5
                yield task, Finding(scores={"correct": 1.0, "beauty": beauty}, reason="beauty unparsed")

    evaluate_images(Two(prompts=benchmark(3).prompts), paint(tmp_path / "images", 3), tmp_path / "out", Partial())
    assert [record.gap for record in read_records(tmp_path / "out" / "records.jsonl")] == ["", "unscored", ""]


def test_scores_stay_where_images_moved_or_skills_changed(tmp_path):
    images, out = paint(tmp_path / "images"), tmp_path / "out"
    evaluate_images(benchmark(), images, out, Redness())
    images.rename(tmp_path / "moved")
    again = Redness()
    one_skill = Benchmark(prompts=tuple(replace(p, tags=("c",)) for p in benchmark().prompts))
    summary = evaluate_images(one_skill, tmp_path / "moved", out, again)
    assert again.seen == []
    assert summary["accuracy"] == {"overall": 4 / 6, "c": 4 / 6}
    assert {r.file for r in read_records(out / "records.jsonl")} == {f"../moved/{i:05d}.png" for i in range(N)}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no image of"),
        (["cat.png", "notes.txt"], r"holds no image of .*the first is expected at .*00000\.png"),
        (["00000.png", "00006.png"], "00006.png belongs to no prompt of .* ids go from 00000 to 00005"),
        (["00001.png", "1.jpeg"], "both image 0 of prompt"),
    ],
)
def test_folders_of_other_images(tmp_path, names, message):
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / name).write_text("")
    with pytest.raises(ValueError, match=message):
        evaluate_images(benchmark(), tmp_path / "images", tmp_path / "out", Redness())
    with pytest.raises(ValueError, match="there is no folder of images"):
        evaluate_images(benchmark(), tmp_path / "nowhere", tmp_path / "out", Redness())


@pytest.mark.parametrize("suffix", [".gif", ".BMP", ".tif", ".webp"])
def test_images_of_any_format(tmp_path, suffix):
    images = paint(tmp_path / "images", suffix=suffix)
    (images / f"._00000{suffix}").write_bytes(b"\0\5\x16\7")
    assert evaluate_images(benchmark(), images, tmp_path / "out", Redness())["n"]["overall"] == N


def test_several_images_a_prompt_and_any_digits(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("0000_00.png", "0000_01.jpg", "1_0.webp"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / "images" / name)
    scorer = Redness()
    summary = evaluate_images(benchmark(2, images=2), tmp_path / "images", tmp_path / "out", scorer)
    assert sorted(scorer.seen) == [(0, 0), (0, 1), (1, 0)]
    assert summary["gaps"] == {"missing": 1}


def test_images_of_other_prompts_are_told_by_their_manifest(tmp_path):
    images = paint(tmp_path / "run" / "images")
    facts = {"sampler": {"steps": 3}, "checkpoint": "runs/x", "benchmark": "geneval", "prompt_set": {"n": 1}}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="was sampled for other prompts of geneval"):
        evaluate_images(benchmark(), images, tmp_path / "out", Redness())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(facts | {"prompt_set": benchmark().prompt_set}))
    evaluate_images(benchmark(), images, tmp_path / "out", Redness())
    manifest = read_manifest(tmp_path / "out" / "manifest.json")
    assert (manifest["checkpoint"], manifest["sampler"]) == ("runs/x", {"steps": 3})


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_work_and_the_first_writes(tmp_path, count, monkeypatch):
    """Each process's part in turn, the first one's last, is what one process writes alone."""
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    images, out, alone = paint(tmp_path / "images"), tmp_path / "out", tmp_path / "alone"
    evaluate_images(benchmark(), images, alone, Redness())
    facts = json.loads((alone / "manifest.json").read_text())
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps(facts))
    (out / "records.part-00.jsonl").write_text("")
    seen = []
    for rank in reversed(range(1, count)):
        scorer = Redness()
        assert score_folder(benchmark(), images, out, scorer, facts, Processes(rank, count)) == {}
        seen += scorer.seen
    first = Redness()
    check_scorer(benchmark(), out, first.identity, rescore=False, job=Processes(0, count))
    score_folder(benchmark(), images, out, first, facts, Processes(0, count))
    assert files(out) == files(alone)
    # The first also did nothing twice: what the others had written it took over.
    assert sorted(seen + first.seen) == [(i, 0) for i in range(N)]


@pytest.mark.parametrize(("prompts", "message"), [((), "has no prompts"), (("1", "01"), "two prompts of .* 00001")])
def test_prompts_must_be_some_and_distinct(prompts, message):
    with pytest.raises(ValueError, match=message):
        Benchmark(prompts=tuple(Prompt(id=name, text="a", tags=()) for name in prompts))
