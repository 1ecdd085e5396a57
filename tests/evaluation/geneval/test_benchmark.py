"""GenEval's folders, read and written as the official tools do; its scores from verdicts; who gave them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from semantic_routing.evaluation.benchmark import Task
from semantic_routing.evaluation.geneval.benchmark import GenEvalScorer, read_geneval
from semantic_routing.evaluation.geneval.detector import fit
from semantic_routing.evaluation.geneval.verdict import Detection
from semantic_routing.evaluation.records import Record, read_records
from semantic_routing.evaluation.run import evaluate_images
from semantic_routing.toy.captions import GENEVAL_TAGS


def entry(tag: str, name: str = "dog", **clause) -> dict:
    return {"tag": tag, "include": [{"class": name, "count": 1, **clause}], "prompt": f"a photo of a {name}, {tag}"}


@pytest.fixture
def prompts(tmp_path) -> Path:
    rows = [entry(tag) for tag in GENEVAL_TAGS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "prompts.jsonl"


class WhiteDogs:
    """Sees a dog, white or black, where the picture's first pixel is not grey."""

    identity = {"name": "white dogs", "label": "variant: dogs"}  # noqa: RUF012

    def __call__(self, image, *args):
        level = image.convert("L").getpixel((0, 0))
        if isinstance(args[0], float):
            return {} if level == 128 else {"dog": [Detection((0.0, 0.0, 4.0, 4.0), 0.95)]}
        return ["white" if level > 128 else "black"] * len(args[0])


def folder_of(benchmark, root: Path, digits: int = 5, images: int = 4) -> Path:
    for index, prompt in enumerate(benchmark.prompts):
        samples = root / f"{index:0{digits}d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(prompt.metadata))
        for image in range(images):
            color = "gray" if index == 2 or (index == 1 and image) else "white"
            Image.new("RGB", (4, 4), color).save(samples / f"{image:0{digits}d}.png")
    return root


@pytest.mark.parametrize("digits", [4, 5])
def test_official_folders_are_scored(prompts, tmp_path, digits):
    benchmark = read_geneval(prompts)
    images = folder_of(benchmark, tmp_path / "images", digits)
    scorer = GenEvalScorer(detector=WhiteDogs(), colors=WhiteDogs(), variant="mine")
    summary = evaluate_images(benchmark, images, tmp_path / "out", scorer)
    # Of six tags four are right, one in a quarter of its images, one never.
    assert summary["accuracy"]["overall"] == pytest.approx(4.25 / 6)
    assert summary["accuracy"]["images"] == pytest.approx(17 / 24)
    assert (summary["correct_prompts"], summary["prompts"]) == (pytest.approx(5 / 6), 6)
    records = read_records(tmp_path / "out" / "records.jsonl")
    assert json.loads(records[0].answer) == {"dog": [{"box": [0.0, 0.0, 4.0, 4.0, 0.95]}]}
    assert records[8].reason == "expected 1 dog, found 0"
    assert "scored by geneval, mine, detector variant: dogs" in (tmp_path / "out" / "table.md").read_text()


def test_scores_of_tags_of_different_sizes(tmp_path):
    """Tag k has the prompts 0 to k, of whose four images the first p are correct."""
    rows = [entry(tag) | {"prompt": f"{tag} {p}"} for k, tag in enumerate(GENEVAL_TAGS) for p in range(k + 1)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = read_geneval(tmp_path / "p.jsonl")
    verdicts = [
        Record(
            prompt=index, id=prompt.id, image=image, caption=prompt.text, tags=prompt.tags, file="x", reason="",
            scores={"correct": float(image < int(prompt.text.split()[1]))},
        )
        for index, prompt in enumerate(benchmark.prompts)
        for image in range(4)
    ]  # fmt: skip
    summary = benchmark.summarize(verdicts)
    expected = [sum(min(p, 4) for p in range(k + 1)) / (4 * (k + 1)) for k in range(6)]
    assert [summary["accuracy"][tag] for tag in GENEVAL_TAGS] == pytest.approx(expected)
    assert summary["accuracy"]["overall"] == pytest.approx(sum(expected) / 6)
    assert (summary["accuracy"]["images"], summary["n"]["images"]) == (pytest.approx(34 / 84), 84)
    assert (summary["correct_prompts"], summary["prompts"]) == (pytest.approx(15 / 21), 21)


def test_what_is_written_is_what_is_read(prompts, tmp_path):
    benchmark = read_geneval(prompts)
    for place in benchmark.images:
        path = tmp_path / benchmark.sampled(*place)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    benchmark.complete(tmp_path)
    assert (tmp_path / "images/00003/samples/00002.png").is_file()
    assert json.loads((tmp_path / "images/00003/metadata.jsonl").read_text()) == benchmark.prompts[3].metadata
    assert sorted(benchmark.find(tmp_path / "images")) == benchmark.images


def test_images_are_scored_whatever_their_number(prompts, tmp_path):
    benchmark = read_geneval(prompts)
    images = folder_of(benchmark, tmp_path / "images", images=5)
    (images / "00000" / "samples" / "00001.png").unlink()
    scorer = GenEvalScorer(detector=WhiteDogs(), colors=WhiteDogs())
    summary = evaluate_images(benchmark, images, tmp_path / "out", scorer)
    assert (summary["n"]["images"], summary["gaps"]) == (29, {"missing": 1})


def test_colours_are_asked_for(tmp_path):
    row = entry("colors", color="white")
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    benchmark = read_geneval(tmp_path / "p.jsonl", 1)
    Image.new("RGB", (4, 4), "black").save(tmp_path / "x.png")
    task = Task(prompt=benchmark.prompts[0], index=0, image=0, path=tmp_path / "x.png", sha256="")
    ((_, finding),) = GenEvalScorer(detector=WhiteDogs(), colors=WhiteDogs()).score([task])
    assert finding.scores == {"correct": 0.0}
    assert finding.reason == "expected 1 white dog, found black"


def test_folders_of_other_prompts_are_refused(prompts, tmp_path):
    benchmark = read_geneval(prompts)
    images = folder_of(benchmark, tmp_path / "images", images=1)
    (images / "00001" / "metadata.jsonl").write_text(json.dumps(entry("counting", "cat")))
    with pytest.raises(
        ValueError, match=r"asks for 'a photo of a cat, counting', which is not a prompt .* another set"
    ):
        benchmark.find(images)
    (images / "00001").rename(images / "00006")
    (images / "00006" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="00006 belongs to no prompt: there are 6"):
        benchmark.find(images)


def test_a_folder_is_of_the_prompt_that_its_metadata_name(prompts, tmp_path):
    benchmark = read_geneval(prompts, 1)
    images = folder_of(benchmark, tmp_path / "images", images=1)
    for index in reversed(range(6)):  # counted from 1
        (images / f"{index:05d}").rename(images / f"{index + 1:05d}")
    found = benchmark.find(images)
    assert sorted(found) == benchmark.images
    assert found[0, 0] == images / "00001" / "samples" / "00000.png"


def test_an_image_that_is_there_twice_is_refused(prompts, tmp_path):
    benchmark = read_geneval(prompts)
    images = folder_of(benchmark, tmp_path / "images", images=1)
    samples = images / "00002" / "samples"
    (samples / "0.png").write_bytes((samples / "00000.png").read_bytes())
    with pytest.raises(ValueError, match=r"0.png and .*00000.png are both image 0 of the same prompt; delete one"):
        benchmark.find(images)
    (samples / "0.png").unlink()
    folder_of(benchmark, tmp_path / "images", digits=4, images=1)
    with pytest.raises(ValueError, match=r"0000/.* and .*00000/.* are both image 0"):
        benchmark.find(images)


def test_an_image_that_the_detector_cannot_take_is_a_gap(prompts, tmp_path):
    class Narrow(WhiteDogs):
        def __call__(self, image, *args):
            fit(*image.size[::-1])
            return super().__call__(image, *args)

    benchmark = read_geneval(prompts, 1)
    images = folder_of(benchmark, tmp_path / "images", images=1)
    Image.new("RGB", (1, 3000)).save(images / "00000" / "samples" / "00000.png")
    scorer = GenEvalScorer(detector=Narrow(), colors=Narrow())
    summary = evaluate_images(benchmark, images, tmp_path / "out", scorer)
    assert (summary["n"]["images"], summary["gaps"]) == (5, {"unscored correct": 1})
    first = read_records(tmp_path / "out" / "records.jsonl")[0]
    assert first.reason == "too narrow for the detector: 1 x 3000 pixels"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"00001": {"id": "00001", "prompt": "a"}}', "jsonl:1 is not a prompt of GenEval: it has no 'tag'"),
        (
            '{"prompt": "a", "tag": "counting", "include": [{"class": "unicorn", "count": 1}]}',
            "jsonl:1 is not a prompt",
        ),
        ("Prompts,Category\na,b\n", "is not the prompts of GenEval: line 1 is not JSON"),
        ("", "geneval has no prompts"),
    ],
)
def test_prompts_of_another_benchmark_are_refused(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_geneval(tmp_path / "p.jsonl")


def test_without_verdicts_there_is_no_score(prompts):
    benchmark = read_geneval(prompts)
    record = Record(
        prompt=0, id="00000", image=0, caption="a", tags=("counting",), file="x", reason="", scores={"correct": None},
        gap="missing",
    )  # fmt: skip
    summary = benchmark.summarize([record])
    assert (summary["accuracy"], summary["correct_prompts"]) == ({}, None)
    assert "1 missing" in benchmark.table(summary)


def test_the_official_prompts(shared):
    benchmark = read_geneval(shared / "bench" / "geneval" / "evaluation_metadata.jsonl")
    counts = [sum(tag in p.tags for p in benchmark.prompts) for tag in GENEVAL_TAGS]
    assert counts == [80, 99, 80, 94, 100, 100]
    assert list(benchmark.columns) == ["overall", "images", *GENEVAL_TAGS]
