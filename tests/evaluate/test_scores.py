"""Scores: known intervals and means, records that survive a round trip, evaluations that resume and refuse."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import binomtest

from semantic_routing.codec import PixelCodec
from semantic_routing.data.shapes import GENEVAL_TAGS, TAGS, prompts
from semantic_routing.dit import DiT, DiTConfig
from semantic_routing.evaluate.scores import (
    Record,
    evaluate_shapes,
    markdown_table,
    read_records,
    summarize,
    wilson,
    write_records,
)
from semantic_routing.generate import Bundle, SampleConfig, weights_sha256
from semantic_routing.text_encoder import TextEncoder

TINY = DiTConfig(
    depth=2, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=16, channels=3, text_width=8, text_layers=3
)


def record(tag: str, correct: bool, prompt: int = 0, reason: str = "because") -> Record:
    return Record(
        prompt=prompt, image=0, caption="a “red” circle", tag=tag, correct=correct, reason=reason, file="images/x.png"
    )


@pytest.mark.parametrize(("correct", "n"), [(0, 7), (3, 7), (7, 7), (310, 400)])
def test_wilson_interval_is_scipys(correct, n):
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_overall_is_a_mean_over_images_and_geneval_over_tags():
    # 3 of 4 single objects, 1 of 2 of each of the other five; none of 8 negations.
    records = [record("single_object", i < 3) for i in range(4)] + [record("negation", False)] * 8
    records += [record(tag, correct) for tag in GENEVAL_TAGS[1:] for correct in (True, False)]
    summary = summarize(records)
    assert list(summary["accuracy"]) == ["overall", "geneval", *GENEVAL_TAGS, "negation"]
    assert summary["accuracy"]["overall"] == pytest.approx(8 / 22)
    assert summary["accuracy"]["geneval"] == pytest.approx((0.75 + 5 * 0.5) / 6)
    assert summary["n"] == {"overall": 22, "geneval": 14, "single_object": 4, "negation": 8} | dict.fromkeys(
        GENEVAL_TAGS[1:], 2
    )
    assert summary["interval"]["negation"] == pytest.approx(wilson(0, 8))


def test_geneval_interval_with_equal_tags_is_that_of_all_their_images():
    records = [record(tag, i < k) for k, tag in enumerate(GENEVAL_TAGS) for i in range(10)]
    summary = summarize(records)
    assert summary["accuracy"]["geneval"] == pytest.approx(15 / 60)
    assert summary["interval"]["geneval"] == pytest.approx(wilson(15, 60))


def test_geneval_needs_all_six_tags():
    assert "geneval" not in summarize([record(tag, True) for tag in GENEVAL_TAGS[:5]])["accuracy"]
    with pytest.raises(ValueError, match="no records"):
        summarize([])


def test_table_has_a_row_for_each_accuracy():
    table = markdown_table(summarize([record("counting", True), record("counting", False)]))
    assert table.splitlines()[2:] == [
        "| overall | 0.500 | 0.095 to 0.905 | 2 |",
        "| counting | 0.500 | 0.095 to 0.905 | 2 |",
    ]


def test_records_survive_a_round_trip(tmp_path):
    records = [record("counting", True, 0), record("colors", False, 1, 'found "no"\nblue <circle>')]
    write_records(tmp_path / "deep" / "records.jsonl", records)
    assert read_records(tmp_path / "deep" / "records.jsonl") == records


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a record"),
        ('{"prompt": 1}', "lacks image, caption"),
        (json.dumps(vars(record("a", True)) | {"correct": "yes"}), "correct is 'yes'"),
        (json.dumps(vars(record("a", True)) | {"scor": 1}), "unknown setting"),
    ],
)
def test_damaged_records_are_named(tmp_path, line, message):
    write_records(tmp_path / "records.jsonl", [record("counting", True)])
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")


def test_weights_are_hashed_as_the_file_that_holds_them(tmp_path):
    model = DiT(TINY)
    save_file(model.state_dict(), tmp_path / "ema.safetensors")
    expected = hashlib.sha256((tmp_path / "ema.safetensors").read_bytes()).hexdigest()
    assert weights_sha256(model) == expected


@dataclass(frozen=True, kw_only=True)
class Painter(Bundle):
    """Draws what is asked for, but leaves the canvas blank for every third prompt; remembers its calls."""

    asked: list
    scenes: dict

    def sample(self, prompts, images, cfg, callback=None):
        self.asked.extend(images)
        blank = np.full((32, 32, 3), 255, dtype=np.uint8)
        pictures = [blank if index % 3 == 2 else self.scenes[p] for p, (index, _) in zip(prompts, images, strict=True)]
        return torch.from_numpy(np.stack(pictures))


@dataclass(frozen=True, kw_only=True)
class Arguments(SampleConfig):
    """Sampling settings among others, as a command line has them."""

    out: Path


N, SEED = 22, 5
CFG = SampleConfig(steps=2, guidance=1.0, batch=5)


@pytest.fixture
def painter() -> Painter:
    return Painter(
        model=DiT(TINY),
        encoder=TextEncoder.__new__(TextEncoder),
        codec=PixelCodec(),
        image_size=32,
        asked=[],
        scenes={sample.caption: sample.image for sample in prompts(SEED, N)},
    )


def test_an_evaluation_from_prompts_to_table(painter, tmp_path):
    summary = evaluate_shapes(painter, tmp_path, n=N, seed=SEED, cfg=CFG)
    assert painter.asked == [(index, 0) for index in range(N)]
    records = read_records(tmp_path / "records.jsonl")
    assert [r.correct for r in records] == [index % 3 != 2 for index in range(N)]
    assert [r.caption for r in records] == [sample.caption for sample in prompts(SEED, N)]
    assert all((tmp_path / r.file).is_file() for r in records)
    assert summary == summarize(records) == json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["n"]) == {"overall", "geneval", *TAGS}
    assert (tmp_path / "table.md").read_text() == markdown_table(summary)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["weights_sha256"] == weights_sha256(painter.model)
    assert manifest["sampler"] == {"steps": 2, "guidance": 1.0, "sampler": "euler", "shift": 1.0, "seed": 0}
    assert (manifest["prompts"]["n"], manifest["prompt_seed"]) == (N, SEED)


def test_whole_images_are_kept_and_others_sampled_again(painter, tmp_path):
    first = evaluate_shapes(painter, tmp_path, n=N, seed=SEED, cfg=CFG)
    (tmp_path / "images" / "00003.png").unlink()
    cut = tmp_path / "images" / "00007.png"
    cut.write_bytes(cut.read_bytes()[:60])
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "00012.png")
    painter.asked.clear()
    arguments = Arguments(steps=2, guidance=1.0, batch=2, out=tmp_path)
    again = evaluate_shapes(painter, tmp_path, n=N, seed=SEED, cfg=arguments)
    assert painter.asked == [(3, 0), (7, 0), (12, 0)]
    assert again == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg": replace(CFG, guidance=2.0)}, "sampler"),
        ({"cfg": replace(CFG, seed=1)}, "sampler"),
        ({"seed": 6}, "prompts"),
        ({"n": N - 1}, "prompts"),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(painter, tmp_path, change, message):
    settings = {"n": N, "seed": SEED, "cfg": CFG}
    evaluate_shapes(painter, tmp_path, **settings)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=rf"holds other images \({message} .*choose another --out"):
        evaluate_shapes(painter, tmp_path, **settings | change)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_other_weights_and_images_of_unknown_origin_are_refused(painter, tmp_path):
    evaluate_shapes(painter, tmp_path, n=N, seed=SEED, cfg=CFG)
    with pytest.raises(ValueError, match="weights_sha256"):
        evaluate_shapes(replace(painter, model=DiT(TINY)), tmp_path, n=N, seed=SEED, cfg=CFG)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        evaluate_shapes(painter, tmp_path, n=N, seed=SEED, cfg=CFG)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds other images"):
        evaluate_shapes(painter, tmp_path, n=N, seed=SEED, cfg=CFG)
