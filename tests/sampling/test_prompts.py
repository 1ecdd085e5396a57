"""Prompts from files of three kinds, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semantic_routing.sampling.prompts import read_prompts


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "a red circle\n\n  a star  \nno end", ["a red circle", "a star", "no end"]),
        ("p.txt", "\ufeffa\r\nb\rc", ["a", "b", "c"]),
        ("p", '{"prompt": "kept as it is"}', ['{"prompt": "kept as it is"}']),
        ("p.txt", "one\u2028prompt\x0cwith\x85odd spaces", ["one\u2028prompt\x0cwith\x85odd spaces"]),
        ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n{"caption": "c", "id": 3}\n"d"\n', ["a", "b", "c", "d"]),
        ("p.jsonl", '{"caption": "last", "prompt": "first"}', ["first"]),
        ("p.jsonl", '{"prompt": null, "text": "b"}', ["b"]),
        ("P.JSONL", '{"prompt": "one\u2028line"}', ["one\u2028line"]),
        ("p.csv", 'id,prompt\n1,a red circle\n2,"b, with comma"\n', ["a red circle", "b, with comma"]),
        ("p.csv", 'caption\n"two\nlines"\nlast\n', ["two\nlines", "last"]),
        ("p.csv", '\ufeffprompt,id\r\n"a ""big"", é",1\r\n\r\nb,2\r\nb,3\r\n', ['a "big", é', "b", "b"]),
    ],
)
def test_the_prompts_of_a_file_are_read(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name) == expected


def test_jsonl_keeps_any_text(tmp_path: Path) -> None:
    prompts = ['a "quoted" \\ prompt', "two\nlines", "赤い円 🟥", "é"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    assert read_prompts(tmp_path / "p.jsonl") == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no prompts; write one per line"),
        ("p.txt", b" \n\t\n", "holds no prompts"),
        ("p.jsonl", b"\n", "holds no prompts"),
        ("p.csv", b"", "holds no prompts"),
        ("p.csv", b"prompt\n", "holds no prompts"),
        ("p.txt", "caf\xe9".encode("latin-1"), r"is not UTF-8 text \(byte 3\); save it as UTF-8"),
        ("p.jsonl", b"\xff\xfe{\x00", "is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt"', r"p\.jsonl:3 is not JSON"),
        ("p.jsonl", b'{"promt": "a"}', r"p\.jsonl:1 has no text under prompt, text, caption; it has promt"),
        ("p.jsonl", b'{"prompt": " "}', r"p\.jsonl:1 has no text"),
        ("p.jsonl", b'{"prompt": ["a"]}', r"p\.jsonl:1 has no text"),
        ("p.jsonl", b"3", r"p\.jsonl:1 has no text"),
        ("p.csv", b"id,promt\n1,a\n", r"p\.csv:2 has no text .*; it has id, promt"),
        ("p.csv", b"id,prompt\n1,a red, big circle\n", r"p\.csv:2 has more cells than columns: put quotes"),
        ("p.csv", b'prompt\n"a\n', r"p\.csv:\d is not CSV: unexpected end of data"),
        ("p.csv", b"id,prompt\n1,a\n2,\n", r"p\.csv:3 has no text"),
        ("p.csv", b"prompt\n" + b"x" * 200_000, r"p\.csv:1 is not CSV: field larger than field limit"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read prompts file .*none\.txt: No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"cannot read prompts file .*: Is a directory"):
        read_prompts(tmp_path)
