"""Folder locks: the error names the holder, and locks of dead processes block nobody."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from semantic_routing.common.locks import LOCK, claimed

HOLD = """
import sys, time
from pathlib import Path
from semantic_routing.common.locks import claimed
with claimed(Path(sys.argv[1]), "the folder"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(lock: Path) -> subprocess.Popen[str]:
    """Start another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline() == "held\n"
    return process


def test_another_process_is_named_until_it_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "run" / LOCK
    process = holder(lock)
    try:
        with pytest.raises(ValueError, match="the folder is in use: process") as refused, claimed(lock, "the folder"):
            pass
        assert f"process {process.pid} on host {socket.gethostname()} has used it since 20" in str(refused.value)
        assert "delete" not in str(refused.value)  # on this machine the lock cannot be stale
        assert lock.is_file()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert lock.is_file()  # a killed process cannot delete it
    with claimed(lock, "the folder"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.behaviour(
    "Training",
    when="a lock file was left by a dead process, even if its id is in use again, or by another machine",
    then="it blocks nobody",
)
@pytest.mark.parametrize(
    "left",
    [
        {"host": socket.gethostname(), "pid": 2**22 + 1, "since": "2026-01-01T00:00:00+00:00"},
        {"host": socket.gethostname(), "pid": os.getpid(), "since": "2026-01-01T00:00:00+00:00"},
        {"host": "gpu07", "pid": 1, "since": "2026-01-01T00:00:00+00:00"},
        None,
    ],
    ids=["dead", "reused", "elsewhere", "cut off"],
)
def test_a_lock_file_without_a_holder_blocks_nobody(tmp_path: Path, left: dict | None) -> None:
    (tmp_path / LOCK).write_text("{" if left is None else json.dumps(left))
    with claimed(tmp_path / LOCK, "the folder"):
        assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_on_another_machine_is_named_with_the_fix(tmp_path: Path) -> None:
    """Over NFS the server may keep the lock of a machine that is gone."""
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({"host": "gpu07", "pid": 12, "since": "2026-01-01T00:00:00+00:00"}))
    with lock.open() as there:
        fcntl.flock(there, fcntl.LOCK_EX)
        message = rf"process 12 on host gpu07 has used it since .*; if that machine is gone, delete {lock}$"
        with pytest.raises(ValueError, match=message), claimed(lock, "the folder"):
            pass


def test_a_second_claim_of_one_process_is_refused_and_leaves_the_first(tmp_path: Path) -> None:
    with claimed(tmp_path / LOCK, "the folder"):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"process {os.getpid()} on host"), claimed(tmp_path / LOCK, "it"):
                pass
    with claimed(tmp_path / LOCK, "the folder"):
        pass


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    read, write = os.pipe()
    with claimed(tmp_path / LOCK, "the folder"):
        child = os.fork()
        if not child:
            os.read(read, 1)  # outlives the claim
            os._exit(0)
    with claimed(tmp_path / LOCK, "the folder"):
        pass
    os.write(write, b"x")
    assert os.waitpid(child, 0)[1] == 0


def test_a_folder_may_be_deleted_while_it_is_locked(tmp_path: Path) -> None:
    lock = tmp_path / "run" / LOCK
    with claimed(lock, "the folder"):
        lock.unlink()
        lock.parent.rmdir()
    with claimed(lock, "the folder"):
        (lock.parent / "kept").touch()
    assert [path.name for path in lock.parent.iterdir()] == ["kept"]


def test_empty_folders_made_for_a_lock_are_deleted_with_it(tmp_path: Path) -> None:
    with claimed(tmp_path / "new" / "run" / LOCK, "the folder"):
        assert (tmp_path / "new" / "run").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_is_reported_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with claimed(tmp_path / LOCK, "the folder"):
        pass
    assert capsys.readouterr().err == (
        f"semroute: the disk of {tmp_path} has no file locks; do not let another command write there\n"
    )
