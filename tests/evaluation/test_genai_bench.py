"""GenAI-Bench: the official aggregation, against a naive one; ids of either set; files that do not belong together."""

from __future__ import annotations

import json
import statistics
from math import isnan, nan

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import get_sampling

from semantic_routing.evaluation.genai_bench import aggregate, read_genai_bench
from semantic_routing.evaluation.records import Record

SKILLS = {"basic": [1, 2, 4], "advanced": [3, 5], "attribute": [1, 2], "counting": [3, 5, 4]}
SCORES = {"00001": 0.5, "00002": 0.75, "00003": 0.1, "00004": 0.9, "00005": 0.25, "00006": 0.0}


def test_means_and_unbiased_deviations_by_skill():
    found = aggregate(SCORES, SKILLS)
    for skill, ids in {**SKILLS, "all": [1, 2, 3, 4, 5]}.items():
        values = [SCORES[f"{i:05d}"] for i in ids]
        assert found[skill]["mean"] == pytest.approx(statistics.mean(values), abs=1e-12)
        assert found[skill]["std"] == pytest.approx(statistics.stdev(values), abs=1e-12)
        assert found[skill]["n"] == len(ids)
    assert list(found) == [*SKILLS, "all"]


def test_it_is_the_official_computation():
    """torch's mean and std over the scores at the ids of a tag, as t2v_metrics has them."""
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.uniform(size=1600))
    skills = {name: sorted(rng.choice(1600, 200, replace=False).tolist()) for name in ("basic", "scene", "negation")}
    found = aggregate({f"{i:05d}": float(s) for i, s in enumerate(scores)}, skills)
    union = sorted(set().union(*skills.values()))
    for name, ids in {**skills, "all": union}.items():
        assert found[name]["mean"] == pytest.approx(float(scores[ids].mean()), abs=1e-12)
        assert found[name]["std"] == pytest.approx(float(scores[ids].std()), abs=1e-12)
    assert found["all"]["n"] == len(union)


def test_ids_are_numbers_however_they_are_written():
    expected = aggregate(SCORES, SKILLS)
    assert aggregate({str(int(key)): value for key, value in SCORES.items()}, SKILLS) == expected
    assert aggregate({int(key): value for key, value in SCORES.items()}, SKILLS) == expected
    assert aggregate({key: np.float32(value) for key, value in SCORES.items()}, SKILLS)["all"]["n"] == 5


def test_what_was_not_scored_is_a_gap_and_never_zero():
    for gap in ({"00003": nan}, {"00003": None}):
        found = aggregate(SCORES | gap, SKILLS)
        assert found["counting"]["n"] == 2
        assert found["counting"]["mean"] == pytest.approx((0.9 + 0.25) / 2)
        assert found["all"]["n"] == 4
    some = {key: SCORES[key] for key in ("00001", "00003")}
    assert aggregate(some, SKILLS)["all"]["n"] == 2
    one = aggregate(some, SKILLS)["attribute"]
    assert (one["mean"], one["n"]) == (0.5, 1)
    assert isnan(one["std"])
    none = aggregate({"00001": 0.5}, SKILLS)["advanced"]
    assert none["n"] == 0
    assert isnan(none["mean"])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({f"{int(key) - 1:05d}": value for key, value in SCORES.items() if key != "00006"}, "do not match"),  # from 0
        ({"00011": 0.5, "00012": 0.5}, "do not match"),
        ({"00001": 0.5, "00006": 0.5}, "4 tagged ids have no score, such as 2, and 1 scored ids no skill"),
        ({}, "no scores"),
        ({"a baker": 0.5}, "not the id of a prompt"),
        ({"1": 0.5, "00001": 0.5}, "two scores"),
    ],
)
def test_ids_of_another_set_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        aggregate(scores, SKILLS)


@pytest.fixture
def places(tmp_path):
    """The two official files, for prompts counted from 1."""

    def write(first=1, n=6, skills=SKILLS):
        prompts = {f"{i:05d}": {"id": f"{i:05d}", "prompt": f"prompt {i}"} for i in range(first, first + n)}
        (tmp_path / "prompts.json").write_text(json.dumps(prompts))
        (tmp_path / "skills.json").write_text(json.dumps(skills))
        return tmp_path / "prompts.json", tmp_path / "skills.json"

    return write


def records(benchmark, scores):
    return [
        Record(
            prompt=index, id=p.id, image=0, caption=p.text, tags=p.tags, file="x", reason="",
            scores={"vqascore": scores.get(p.id)},
        )
        for index, p in enumerate(benchmark.prompts)
    ]  # fmt: skip


def test_the_benchmark_of_the_official_files(places):
    skills = SKILLS | {"attribute": [1, 2, 6]}
    benchmark = read_genai_bench(*places(skills=skills))
    assert [(p.id, p.tags) for p in benchmark.prompts][:3] == [
        ("00001", ("basic", "attribute")),
        ("00002", ("basic", "attribute")),
        ("00003", ("advanced", "counting")),
    ]
    assert list(benchmark.columns) == ["all", "basic", "attribute", "advanced", "counting"]
    summary = benchmark.summarize(records(benchmark, SCORES))
    expected = aggregate(SCORES, skills)
    assert summary == {"scores": {"vqascore": expected}, "gaps": {}}
    assert next(iter(summary["scores"]["vqascore"])) == "all"
    scores = {key: value for key, value in SCORES.items() if key != "00003"}
    partly = benchmark.summarize(records(benchmark, scores))
    assert partly["scores"]["vqascore"]["counting"]["n"] == 2
    assert partly["gaps"] == {"unscored vqascore": 1}
    assert benchmark.table(partly).splitlines()[2].startswith("| all | 0.4800 ±")


def test_images_lie_as_the_official_tools_read_them(places, tmp_path):
    benchmark = read_genai_bench(*places(skills=SKILLS | {"scene": [6]}))
    assert benchmark.file(0, 0) == "00001.jpeg"
    for place in benchmark.images:
        path = tmp_path / benchmark.sampled(*place)
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (200, 30, 30)).save(path, format="PNG")
    benchmark.complete(tmp_path)
    found = benchmark.find(tmp_path / "images")
    assert [path.name for path in found.values()] == [f"{i:05d}.jpeg" for i in range(1, 7)]
    with Image.open(found[0, 0]) as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image).astype(int) - (200, 30, 30)).max() <= 2
        assert get_sampling(image) == 0  # colours at the full resolution


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 0}, "is not of the same set .* from 0 to 5: 6 of 6|0 to 5"),
        ({"n": 4}, "lists 1 ids that are not prompts, such as 5"),
        ({"n": 60}, "55 of 60 prompts have no skill"),
        ({"skills": {"basic": ["1"]}}, "'basic' is not a list of whole numbers"),
        ({"skills": [1]}, "not genai_skills.json"),
    ],
)
def test_skills_of_another_set_are_refused(places, options, message):
    with pytest.raises(ValueError, match=message):
        read_genai_bench(*places(**options))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"tag": "counting", "include": [], "prompt": "a"}\n{"tag": "counting"}\n', "is not JSON"),  # GenEval's
        ('[{"Prompts": "a", "Category": "b"}]', "holds no prompts of GenAI-Bench: entry 1 has no id, prompt"),
        ('{"a": {"prompt": "b"}}', "'a' is not the id"),
        ('{"00001": "a"}', "entry 1 has no id"),
    ],
)
def test_prompts_of_another_benchmark_are_refused(places, text, message):
    prompts, skills = places()
    prompts.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_genai_bench(prompts, skills)


def test_the_real_set_of_527(shared):
    folder = shared / "bench" / "genai_bench"
    benchmark = read_genai_bench(folder / "genai_image_527.json", folder / "genai_skills_527.json")
    assert (benchmark.prompts[0].id, benchmark.prompts[-1].id, len(benchmark.prompts)) == ("00001", "00527", 527)
    summary = benchmark.summarize(records(benchmark, {p.id: 0.5 for p in benchmark.prompts}))
    counts = {name: row["n"] for name, row in summary["scores"]["vqascore"].items()}
    assert (counts["all"], counts["basic"], counts["advanced"], counts["part relation"]) == (527, 214, 313, 34)
