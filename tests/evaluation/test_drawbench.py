"""DrawBench: its file in any form, means over the answers that could be parsed, by category."""

from __future__ import annotations

import json

import pytest

from semantic_routing.evaluation.drawbench import read_drawbench
from semantic_routing.evaluation.records import Record

ROWS = [("A red, shiny car.", "Colors"), ("Two dogs.", "Counting"), ("A “blue” cat.", "Colors")]
CSV = 'Prompts,Category\n"A red, shiny car.",Colors\nTwo dogs.,Counting\nA “blue” cat.,Colors\n'
JSON = [{"Prompts": prompt, "Category": category} for prompt, category in ROWS]
OTHER = [{"prompt": prompt, "category": category} for prompt, category in ROWS]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", CSV),
        ("p.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
        ("p.json", json.dumps(JSON)),
        ("p.json", json.dumps(OTHER)),
        ("p.jsonl", "".join(json.dumps(row) + "\n" for row in OTHER)),
    ],
)
def test_any_form_of_the_file_is_read(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    benchmark = read_drawbench(tmp_path / name)
    assert [(p.id, p.text, p.tags) for p in benchmark.prompts] == [
        (f"{i:05d}", prompt, (category,)) for i, (prompt, category) in enumerate(ROWS)
    ]
    assert list(benchmark.columns) == ["overall", "Colors", "Counting"]
    assert benchmark.file(2, 0) == "00002.png"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "prompt\na dog\n", "no prompts of DrawBench: entry 1 has no category"),
        ("p.csv", "Prompts,Category\na dog\n", "entry 1 has no category"),
        ("p.csv", "Prompts,Category\n ,Colors\n", "entry 1 has no prompt"),
        ("p.csv", 'Prompts,Category\n"a dog,b\n', "is not CSV"),
        ("p.csv", "Prompts,Category\n", "drawbench has no prompts"),
        ("p.json", '{"00001": {"prompt": "a"}}', "it must be a list of objects"),
        ("p.jsonl", '{"tag": "counting", "include": [], "prompt": "a"}', "entry 1 has no category"),
        ("p.json", "Prompts,Category", "is not JSON"),
    ],
)
def test_files_of_other_benchmarks_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_drawbench(tmp_path / name)


def test_means_are_over_parsed_answers(tmp_path):
    (tmp_path / "p.csv").write_text(CSV)
    benchmark = read_drawbench(tmp_path / "p.csv")
    scores = [
        {"alignment": 4.0, "coherence": 3.0, "style": 2.5},
        {"alignment": 1.0, "coherence": None, "style": None},
        {"alignment": 2.0, "coherence": 4.0, "style": 3.5},
    ]
    records = [
        Record(
            prompt=i, id=p.id, image=0, caption=p.text, tags=p.tags, file="x", reason="", scores=scores[i],
            gap="unscored" if i == 1 else "",
        )
        for i, p in enumerate(benchmark.prompts)
    ]  # fmt: skip
    summary = benchmark.summarize(records)
    assert summary["scores"]["style"]["overall"] == {"mean": 3.0, "std": pytest.approx(0.5**0.5), "n": 2}
    assert summary["scores"]["alignment"]["overall"]["mean"] == pytest.approx(7 / 3)
    assert summary["scores"]["coherence"]["Counting"]["n"] == 0
    assert summary["gaps"] == {"unscored coherence": 1, "unscored style": 1}
    table = benchmark.table(summary)
    assert "| Counting | 1.0000 (1) | none (0) | none (0) |" in table
    assert "Not in any mean: 1 unscored coherence, 1 unscored style." in table
