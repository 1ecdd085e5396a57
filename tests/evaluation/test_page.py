"""The page: every image with verdict and reason, relative links, everything escaped, nothing from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from semantic_routing.evaluation.page import page
from semantic_routing.evaluation.records import Record
from semantic_routing.evaluation.summary import markdown_table, scores_table, summarize, tag_columns

NASTY = "<script>alert('x')</script> & a \"red\" circle | two"


class Reader(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def record(index: int, **changes) -> Record:
    values = {
        "prompt": index, "id": f"{index:05d}", "image": 0, "caption": f"a {index}", "tags": ("color_attr",),
        "file": f"images/{index:05d}.png", "scores": {"correct": 1.0}, "reason": "found",
    }  # fmt: skip
    return Record(**values | changes)


RECORDS = [
    record(0, caption=NASTY, reason=NASTY, answer=NASTY, tags=(NASTY,)),
    record(1, scores={"correct": 0.0}, file="../my images/0#1.png"),
    record(2, scores={"correct": None}, gap="missing"),
]
FACTS = {
    "checkpoint": NASTY,
    "sampler": {"steps": 50, "guidance": 6.0},
    "scorer": {"scorer": "geneval", "label": NASTY},
    "table": {"metrics": []},
}


def read(records=RECORDS, table=None) -> tuple[Reader, str]:
    columns = tag_columns(tag for record in records for tag in record.tags)
    text = page("geneval", table or markdown_table(summarize(records, columns)), records, FACTS)
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader, text


def test_every_image_is_there_with_its_verdict_and_reason():
    reader, _ = read()
    assert [f["data-verdict"] for f in reader.all("figure")] == ["right", "wrong", "no score"]
    assert [img["src"] for img in reader.all("img")] == ["images/00000.png", "../my%20images/0%231.png"]
    assert all(img["loading"] == "lazy" for img in reader.all("img"))
    assert reader.text.count(NASTY) >= 4
    assert "no image" in reader.text
    assert "50 steps, guidance 6" in reader.text
    assert len(reader.all("script")) == 1


def test_nothing_comes_from_elsewhere():
    _, text = read()
    assert not re.search(r"(https?:)?//[a-z]", text.replace("<!doctype html>", ""))


def test_it_can_be_filtered_by_skill_and_verdict():
    reader, _ = read()
    options = [attrs["value"] for attrs in reader.all("option")]
    assert options == ["", NASTY, "color_attr", "", "right", "wrong", "no score"]
    assert [attrs["name"] for attrs in reader.all("select")] == ["tag", "verdict"]


def test_scores_are_shown_and_can_be_sorted():
    row = {"mean": 3.0, "std": 1.0, "n": 1}
    scores = {"style": 2.5, "alignment": None}
    table = scores_table({"scores": {name: {"overall": row} for name in scores}, "gaps": {}})
    reader, _ = read([record(0, scores=scores)], table)
    (figure,) = reader.all("figure")
    assert (figure["data-verdict"], json.loads(figure["data-scores"])) == ("scored", {"style": 2.5})
    options = [attrs["value"] for attrs in reader.all("option")]
    assert "style, lowest first" in options
    assert "alignment, highest first" in options
    assert "style 2.50" in reader.text
