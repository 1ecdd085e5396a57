"""Scores: known intervals and means, records that survive a round trip, evaluations that resume and refuse."""

import json
from math import isnan

import pytest
from scipy.stats import binomtest

from semantic_routing.evaluation.records import Record, read_records, record_line, write_records
from semantic_routing.evaluation.shapes import shapes_columns
from semantic_routing.evaluation.summary import gaps, markdown_table, scores_table, spread, summarize, wilson
from semantic_routing.toy.captions import GENEVAL_TAGS


def record(tag: str, correct: bool | None, prompt: int = 0, reason: str = "because", **changes) -> Record:
    values = {"prompt": prompt, "id": f"{prompt:05d}", "image": 0, "caption": "a “red” circle", "tags": (tag,)}
    scores = {"correct": None if correct is None else float(correct)}
    return Record(**{**values, "scores": scores, "reason": reason, "file": "images/x.png"} | changes)


def by_tag(records):
    return summarize(records, shapes_columns(tag for record in records for tag in record.tags))


@pytest.mark.parametrize(("correct", "n"), [(0, 7), (3, 7), (7, 7), (310, 400)])
def test_wilson_interval_is_scipys(correct, n):
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_overall_is_a_mean_over_images_and_geneval_over_tags():
    # 3 of 4 single objects, 1 of 2 of each of the other five; none of 8 negations.
    records = [record("single_object", i < 3) for i in range(4)] + [record("negation", False)] * 8
    records += [record(tag, correct) for tag in GENEVAL_TAGS[1:] for correct in (True, False)]
    summary = by_tag(records)
    assert list(summary["accuracy"]) == ["overall", "geneval", *GENEVAL_TAGS, "negation"]
    assert summary["accuracy"]["overall"] == pytest.approx(8 / 22)
    assert summary["accuracy"]["geneval"] == pytest.approx((0.75 + 5 * 0.5) / 6)
    assert summary["n"] == {"overall": 22, "geneval": 14, "single_object": 4, "negation": 8} | dict.fromkeys(
        GENEVAL_TAGS[1:], 2
    )
    assert summary["interval"]["negation"] == pytest.approx(wilson(0, 8))


def test_geneval_interval_with_equal_tags_is_that_of_all_their_images():
    records = [record(tag, i < k) for k, tag in enumerate(GENEVAL_TAGS) for i in range(10)]
    summary = by_tag(records)
    assert summary["accuracy"]["geneval"] == pytest.approx(15 / 60)
    assert summary["interval"]["geneval"] == pytest.approx(wilson(15, 60))


def test_an_interval_of_a_mean_over_unequal_groups_is_wider():
    """Its variance is that of k² / sum(1 / n_k) images: 2² / (1/10 + 1/1000)."""
    records = [record("a", i % 2 == 0) for i in range(10)] + [record("b", i % 2 == 0) for i in range(1000)]
    summary = summarize(records, {"mean": (("a",), ("b",))})
    effective = 4 / (1 / 10 + 1 / 1000)
    assert summary["interval"]["mean"] == pytest.approx(wilson(effective / 2, effective))
    assert summary["n"]["mean"] == 1010


def test_only_a_whole_score_is_correct():
    scored = [record("a", True, scores={"correct": score}).correct for score in (1.0, 0.5, 0.0, None)]
    assert scored == [True, False, False, None]


def test_geneval_needs_all_six_tags():
    assert "geneval" not in by_tag([record(tag, True) for tag in GENEVAL_TAGS[:5]])["accuracy"]
    with pytest.raises(ValueError, match="no records"):
        by_tag([])


def test_table_has_a_row_for_each_accuracy():
    table = markdown_table(by_tag([record("counting", True), record("counting", False)]))
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
        ('{"prompt": 1}', "lacks id, image, caption"),
        (json.dumps(vars(record("a", True)) | {"scores": {"correct": "yes"}}), r"scores.correct is 'yes'"),
        (json.dumps(vars(record("a", True)) | {"scores": [1]}), r"scores is \[1\]"),
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


def test_what_was_not_scored_is_counted_and_in_no_mean():
    missing, blind = (record("counting", None, gap=gap) for gap in ("missing", "unscored"))
    summary = by_tag([record("counting", True), record("counting", False), missing, blind])
    assert summary["accuracy"] == {"overall": 0.5, "counting": 0.5}
    assert summary["n"]["overall"] == 2
    assert summary["gaps"] == {"missing": 1, "unscored correct": 1}
    assert "Not in any mean: 1 missing, 1 unscored correct." in markdown_table(summary)
    assert by_tag([missing])["accuracy"] == {}
    partly = record("counting", None, scores={"style": 3.0, "alignment": None})
    assert gaps([partly], ["style", "alignment"]) == {"unscored alignment": 1}


def test_a_record_is_one_line_without_nan():
    assert record_line(record("a", True, reason="one\ntwo\u2028three")).count("\n") == 1
    with pytest.raises(ValueError, match="JSON compliant"):
        record_line(record("a", True, scores={"x": float("nan")}))


def test_spread_is_unbiased_and_nan_where_nothing_decides_it():
    assert spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "std": pytest.approx(7**0.5), "n": 3}
    one, none = spread([4]), spread([])
    assert (one["mean"], one["n"], none["n"]) == (4.0, 1, 0)
    assert isnan(one["std"])
    assert isnan(none["mean"])
    summary = {"scores": {"style": {"overall": spread([1.0, 3.0]), "x": one, "y": none}}, "gaps": {}}
    table = scores_table(summary).splitlines()
    assert table[2:5] == ["| overall | 2.0000 ± 1.4142 (2) |", "| x | 4.0000 (1) |", "| y | none (0) |"]
