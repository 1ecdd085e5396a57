"""The toy world's benchmark from a trained model to a table: it resumes, refuses, and says what was run."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from semantic_routing.evaluation.records import read_records
from semantic_routing.evaluation.shapes import evaluate_shapes, shapes_benchmark
from semantic_routing.evaluation.summary import markdown_table, summarize
from semantic_routing.model.codec import PixelCodec
from semantic_routing.model.dit import DiT, DiTConfig
from semantic_routing.sampling.folder import weights_sha256
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.toy.captions import GENEVAL_TAGS, TAGS, prompts

TINY = DiTConfig(
    depth=2, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=16, channels=3, text_width=8, text_layers=3
)


def test_weights_are_hashed_as_the_file_that_holds_them(tmp_path):
    model = DiT(TINY)
    save_file(model.state_dict(), tmp_path / "ema.safetensors")
    expected = hashlib.sha256((tmp_path / "ema.safetensors").read_bytes()).hexdigest()
    assert weights_sha256(model) == expected


@dataclass(frozen=True, kw_only=True)
class Painter(TextToImage):
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
    columns = {"overall": (TAGS,), "geneval": tuple((tag,) for tag in GENEVAL_TAGS)} | {tag: ((tag,),) for tag in TAGS}
    assert summary == summarize(records, columns) == json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["n"]) == {"overall", "geneval", *TAGS}
    benchmark, checker = shapes_benchmark(SEED, N)
    table = (tmp_path / "table.md").read_text()
    assert table.startswith(markdown_table(summary))
    assert benchmark.prompt_set["sha256"] in table
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["weights_sha256"] == weights_sha256(painter.model)
    assert manifest["sampler"] == {
        "steps": 2,
        "guidance": 1.0,
        "sampler": "euler",
        "shift": 1.0,
        "compile": False,
        "clock": "nominal",
        "seed": 0,
    }
    assert (manifest["prompts"]["n"], manifest["prompt_seed"]) == (N, SEED)
    assert manifest["prompt_set"] == benchmark.prompt_set
    assert manifest["scorer"] == checker.identity
    assert (tmp_path / "index.html").read_text().count("<figure ") == N


def test_the_hash_is_of_what_is_asked_and_claimed():
    """Equal wherever the prompts are made; another for other prompts."""
    first = shapes_benchmark(0, 22)[0].prompt_set
    assert first == shapes_benchmark(0, 22)[0].prompt_set
    assert first != shapes_benchmark(1, 22)[0].prompt_set
    assert first["sha256"] == "ff1ec49d8b297d8aa561d3424a0a11e3328944570e9dec97e45f4851d25f4f6e"


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
@pytest.mark.parametrize("rescore", [False, True])
def test_a_folder_of_another_evaluation_is_refused(painter, tmp_path, change, message, rescore):
    settings = {"n": N, "seed": SEED, "cfg": CFG}
    evaluate_shapes(painter, tmp_path, **settings)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=rf"holds other images \({message} .*choose another --out"):
        evaluate_shapes(painter, tmp_path, **settings | change, rescore=rescore)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_other_weights_and_images_of_unknown_origin_are_refused(painter, tmp_path):
    evaluate_shapes(painter, tmp_path, n=N, seed=SEED, cfg=CFG)
    with pytest.raises(ValueError, match="weights_sha256"):
        evaluate_shapes(replace(painter, model=DiT(TINY)), tmp_path, n=N, seed=SEED, cfg=CFG)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        evaluate_shapes(painter, tmp_path, n=N, seed=SEED, cfg=CFG)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="already exists and does not belong to an evaluation"):
        evaluate_shapes(painter, tmp_path, n=N, seed=SEED, cfg=CFG)
    (tmp_path / "records.jsonl").unlink()
    with pytest.raises(ValueError, match="holds other images"):
        evaluate_shapes(painter, tmp_path, n=N, seed=SEED, cfg=CFG)
