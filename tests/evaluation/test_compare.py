"""Comparisons: numbers and differences as in the tables, what cannot be compared, three ways to write it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from semantic_routing.evaluation.compare import CompareArguments, compare
from semantic_routing.evaluation.compare_tables import Cell, latex, markdown
from semantic_routing.evaluation.records import Record, write_records

TAGS = ("attribute", "counting")


def evaluation(folder: Path, scores, *, benchmark="genai-bench", metric="vqascore", headline="all", **changes) -> Path:
    """A finished evaluation; prompts alternate between two tags."""
    columns = {headline: [list(TAGS)]} | {tag: [[tag]] for tag in TAGS}
    facts = {
        "benchmark": benchmark,
        "prompt_set": {"n": len(scores), "sha256": "0"},
        "scorer": {"scorer": "vqascore", "model": "m", "base_url": "x"},
        "sampler": {"steps": 50},
        "table": {"metrics": [metric], "columns": columns, "headline": [metric, headline]},
    } | changes
    records = [
        Record(
            prompt=i, id=f"{i:05d}", image=0, caption="c", tags=(TAGS[i % 2],), file="f", reason="", scores={metric: s},
            gap="unscored" if s is None else "",
        )
        for i, s in enumerate(scores)
    ]  # fmt: skip
    write_records(folder / "records.jsonl", records)
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder


BASE = [0.5, 0.25] * 10
BETTER = [0.75, 0.25] * 10


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    return evaluation(tmp_path / "B1", BASE), evaluation(tmp_path / "S2", BETTER)


def args(*folders, out, **options) -> CompareArguments:
    return CompareArguments(folders=tuple(folders), out=out, resamples=200, **options)


def test_numbers_and_differences(runs, tmp_path):
    text = compare(args(*runs, out=tmp_path / "out"))
    assert text == (tmp_path / "out" / "compare.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "| | all | attribute | counting |"
    assert lines[2].startswith("| B1 | <u>37.50</u> [")
    assert lines[3].startswith("| S2 | **50.00** [")
    cells = lines[4].split(" | ")
    assert cells[0] == "| − B1"
    assert cells[1].startswith("+12.50 [+")
    assert cells[1].endswith("] p = 0.005")
    assert cells[2] == "+25.00 [+25.00, +25.00] p = 0.005"
    assert cells[3].startswith("+0.00 [+0.00, +0.00] p = 1.000")
    assert "paired permutation test" in text
    assert "not corrected" in text


def test_csv_has_every_number_unrounded(runs, tmp_path):
    compare(args(*runs, out=tmp_path / "out"))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "compare.csv").read_text())))
    assert [(row["label"], row["column"]) for row in rows[:4]] == [
        ("B1", "all"), ("B1", "attribute"), ("B1", "counting"), ("S2", "all"),
    ]  # fmt: skip
    assert float(rows[3]["value"]) == 50.0
    assert float(rows[3]["difference"]) == pytest.approx(12.5)
    assert (rows[0]["difference"], rows[0]["p"], rows[3]["baseline"], rows[3]["n"]) == ("", "", "B1", "20")
    assert float(rows[0]["low"]) < 37.5 < float(rows[0]["high"])


def test_latex_is_for_booktabs(runs, tmp_path):
    compare(args(*runs, out=tmp_path / "table.tex", labels=("B1: a_b & 5 %", "S2")))
    lines = (tmp_path / "table.tex").read_text().splitlines()
    body = [line for line in lines if not line.startswith("%")]
    assert body[:2] == [r"\begin{tabular}{lrrr}", r"\toprule"]
    assert body[2] == r"Method & all & attribute & counting \\"
    assert body[4] == r"B1: a\_b \& 5 \% & \underline{37.50} & \underline{50.00} & \textbf{25.00} \\"
    assert body[6].startswith(r" & {\scriptsize $+12.50^{*}$} & ")
    assert body[-1] == r"\end{tabular}"
    assert [path.name for path in tmp_path.glob("*.*")] == ["table.tex"]


def cell(value: float, **changes) -> Cell:
    facts = {"label": "A", "benchmark": "b", "metric": "correct", "column": "x", "low": 0.0, "high": 1.0, "n": 9}
    return Cell(**facts | {"value": value} | changes)


@pytest.mark.parametrize(("p", "star"), [(0.049, True), (0.05, False), (0.2, False)])
def test_stars_are_for_p_below_a_twentieth(p, star):
    row = latex([cell(40.0), cell(41.0, label="B", difference=1.0, p=p)], "A", []).splitlines()[-3]
    assert row == rf" & {{\scriptsize $+1.00{'^{*}' if star else ''}$}} \\"


def test_numbers_that_look_alike_have_one_rank():
    cells = [cell(value, label=label) for label, value in (("A", 50.001), ("B", 50.004), ("C", 49.0))]
    text = markdown(cells, "A", [])
    assert [text.count(shown) for shown in ("**50.00**", "<u>49.00</u>")] == [2, 1]


def test_latex_of_any_label():
    text = latex([cell(40.0, label=r"a_{b}\c & 5% #1 ~x^2 $")], "a", [])
    assert r"a\_\{b\}\textbackslash{}c \& 5\% \#1 \textasciitilde{}x\textasciicircum{}2 \$ & 40.00" in text


def test_the_baseline_can_be_any_folder(runs, tmp_path):
    text = compare(args(runs[0], out=tmp_path / "x.md", baseline=runs[1]))
    assert text.splitlines()[4].startswith("| − S2 | -12.50")
    text = compare(args(*runs, out=tmp_path / "x.md", baseline=runs[1]))
    assert text.splitlines()[3].startswith("| − S2 | -12.50")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_set": {"n": 20, "sha256": "1"}}, "set of prompts"),
        ({"scorer": {"scorer": "vqascore", "model": "another"}}, "scorer"),
        ({"scorer": None}, "scorer"),
    ],
)
def test_what_differs_is_refused_unless_told(runs, tmp_path, changes, words):
    other = evaluation(tmp_path / "other", BETTER, **changes)
    with pytest.raises(ValueError, match=f"they differ in {words}; give --anyway"):
        compare(args(runs[0], other, out=tmp_path / "x.md"))
    text = compare(args(runs[0], other, out=tmp_path / "x.md", anyway=True))
    assert f"other differs from B1 in {words}" in text
    # Prompts that are not the same cannot be paired.
    assert ("p = " in text.split("Brackets")[0]) == (words != "set of prompts")


def test_other_samplers_are_told_and_other_places_are_not(runs, tmp_path):
    here = {"scorer": "vqascore", "model": "m", "base_url": "y"}
    other = evaluation(tmp_path / "other", BETTER, sampler={"steps": 20}, scorer=here)
    assert "other differs from B1 in sampler (genai-bench)." in compare(args(runs[0], other, out=tmp_path / "x.md"))


def test_headlines_of_several_benchmarks(tmp_path):
    folders = []
    for arm, scores in (("B1", BASE), ("S2", BETTER)):
        folders.append(evaluation(tmp_path / arm / "genai", scores))
        stars = [4 * score for score in scores]
        folders.append(
            evaluation(tmp_path / arm / "draw", stars, benchmark="drawbench", metric="style", headline="overall")
        )
    with pytest.raises(ValueError, match=r"different benchmarks \(genai-bench, drawbench\); give --headlines"):
        compare(args(*folders, out=tmp_path / "x.md"))
    lines = compare(args(*folders, out=tmp_path / "x.md", headlines=True)).splitlines()
    assert lines[0] == "| | genai-bench vqascore | drawbench style |"
    assert lines[2].startswith("| B1 | <u>37.50</u> [")
    assert "| <u>1.50</u> [" in lines[2]
    assert "| **2.00** [" in lines[3]
    assert lines[4].startswith("| − B1 | +12.50 [")
    assert "| +0.50 [" in lines[4]


def test_gaps_are_in_no_number(runs, tmp_path):
    gaps = evaluation(tmp_path / "gaps", [0.75, None] * 10)
    text = compare(args(runs[0], gaps, out=tmp_path / "x.csv"))
    assert "gaps has no score for 10 of 20 images (genai-bench)." in text
    assert "| **75.00** [75.00, 75.00] | **75.00** [75.00, 75.00] | – |" in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert (rows[3]["value"], rows[3]["n"]) == ("75.0", "10")
    assert (rows[5]["value"], rows[5]["p"], rows[5]["n"]) == ("", "", "0")


def test_too_few_prompts_have_no_interval(tmp_path):
    folders = [evaluation(tmp_path / name, [0.5, 0.25]) for name in "ab"]
    lines = compare(args(*folders, out=tmp_path / "x.md", labels=("a|b", "c"))).splitlines()
    assert lines[2].startswith(r"| a\|b | **37.50** [")
    assert lines[2].endswith(" | **50.00** | **25.00** |")  # some resamples have no prompt of a tag
    assert lines[4].endswith(" | +0.00 p = 1.000 | +0.00 p = 1.000 |")


def test_what_is_no_evaluation_or_no_place(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a finished evaluation"):
        compare(args(runs[0], tmp_path / "empty", out=tmp_path / "x.md"))
    with pytest.raises(ValueError, match=r"a file that ends in \.md, \.csv, \.tex"):
        compare(args(*runs, out=tmp_path / "x.pdf"))
    with pytest.raises(ValueError, match="called 'B1'; distinguish them with --labels"):
        compare(args(*runs, out=tmp_path / "x.md", labels=("B1", "B1")))
    with pytest.raises(ValueError, match="1 labels for 2 folders"):
        args(*runs, out=tmp_path / "x.md", labels=("B1",))
