"""What was skipped: counted alike everywhere, listed once, and too much of it stops the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semantic_routing.common.errors import TrainingFailed
from semantic_routing.data.damage import FILE, DamageLog, Skipped


def skipped(number: int, reason: str = "truncated", stand_in: bool = False) -> Skipped:
    return Skipped("data", "0.tar", f"0.tar/{number}", reason, "why", stand_in)


def test_processes_that_exchange_tallies_agree(tmp_path: Path):
    logs = [DamageLog(tmp_path / FILE if rank == 0 else None, most=1.0) for rank in range(3)]
    for rank, log in enumerate(logs):
        log.add([(skipped(rank), skipped(9, "not an image", stand_in=True)), (), (), ()])
        log.add([(), (), (skipped(rank + 10, "zero bytes"),) if rank else (), ()])
    tallies = [log.take() for log in logs]
    for log in logs:
        log.merge(tallies)
        assert log.counts() == {"rows": 24, "truncated": 3, "zero bytes": 2}
        assert (log.damaged, log.reasons()) == (5, {"truncated": 3, "zero bytes": 2})
        assert log.take().rows == 0
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert sorted(row["key"] for row in rows) == [f"0.tar/{i}" for i in (0, 1, 11, 12, 2, 9)]
    assert rows[0] == {"source": "data", "shard": "0.tar", "key": "0.tar/0", "reason": "truncated", "detail": "why"}


def test_a_record_is_listed_once_also_after_a_restart(tmp_path: Path):
    log = DamageLog(tmp_path / FILE, most=1.0)
    for number in (1, 2, 1):
        log.add([[skipped(number)]])
        log.merge([log.take()])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"source": "da')  # killed while it wrote
    again = DamageLog(tmp_path / FILE, most=1.0)
    again.restore(log.counts())
    again.add([[skipped(2)], [skipped(3)]])
    again.merge([again.take()])
    assert again.counts() == {"rows": 5, "truncated": 5}
    listed = (tmp_path / FILE).read_text()
    assert [listed.count(f'"0.tar/{number}"') for number in (1, 2, 3)] == [1, 1, 1]


def test_too_large_a_share_stops_every_process_but_not_too_early(tmp_path: Path):
    log = DamageLog(None, most=0.1, enough=100)
    log.add([[skipped(i)] for i in range(50)] + [[]] * 49)
    log.merge([log.take()])
    log.add([[]] * 401)
    log.merge([log.take()])  # 50 of 500 are a tenth
    log.add([[skipped(50, "not an image")]])
    with pytest.raises(
        TrainingFailed, match=r"51 of 501 .*\(50 truncated, 1 not an image\).*more than the 10% allowed"
    ):
        log.merge([log.take()])
