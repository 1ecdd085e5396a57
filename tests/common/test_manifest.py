"""The manifest: command, commit, versions and hardware."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import semantic_routing.common.manifest as module
from semantic_routing import __version__
from semantic_routing.common.manifest import manifest


def test_a_manifest_holds_command_versions_hardware_and_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/semroute", "sample", "--prompt", "a red circle"])
    facts = json.loads(json.dumps(manifest(config={"a": 1}, seeds={"run": 3})))
    assert facts["command"] == "semroute sample --prompt 'a red circle'"
    assert (facts["config"], facts["seeds"]) == ({"a": 1}, {"run": 3})
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")
    assert facts["versions"]["semantic-routing"] == __version__
    assert facts["hardware"]["threads"] == torch.get_num_threads()
    assert facts["hardware"]["processor"]
    assert facts["date"].endswith("+00:00")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_package_and_marked_where_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*args: str) -> str:
        name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", "-C", str(tmp_path), *name, *args], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    file = tmp_path / "package" / "manifest.py"
    file.parent.mkdir()
    file.write_text("x = 1")
    monkeypatch.setattr(module, "__file__", str(file))
    assert manifest()["commit"] is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "of something else")
    assert manifest()["commit"] is None  # installed inside of another repository
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert manifest()["commit"] == git("rev-parse", "HEAD")
    file.write_text("x = 2")
    assert manifest()["commit"] == git("rev-parse", "HEAD") + "-dirty"


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert manifest()["commit"] is None
