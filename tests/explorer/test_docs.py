"""The commands and the program of docs/explore.md, on tiny models; ``test_page.py`` serves the page itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install "semantic-routing[explore]"')

from semantic_routing.cli import explore
from semantic_routing.cli.main import main
from semantic_routing.explorer import views
from semantic_routing.explorer.picture import to_png
from semantic_routing.explorer.session import Session
from semantic_routing.explorer.state import State
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start
from tests.explorer.test_session import LAST, adopted, make_bundle  # noqa: F401
from tests.test_docs import commands, fenced


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_explore(
    tiny_run: Path,
    tiny_config: Callable[..., TrainConfig],
    adopted: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    served: list[tuple[Session, State]] = []

    def serve(session: Session, state: State, host: str, port: int) -> str:
        assert (host, port) == ("127.0.0.1", 7860)
        served.append((session, state))
        return "the address"

    monkeypatch.setattr("semantic_routing.explorer.serve.serve", serve)
    monkeypatch.setattr(explore, "check_address", lambda host, port: None)
    monkeypatch.setattr(explore, "wait", lambda: None)
    for name in ("runs", "pipelines", "routings"):
        Path(name).mkdir()
    Path("runs/depth").symlink_to(tiny_run)
    start(tiny_config("joint", steps=1), Path("runs/other"))
    Path("pipelines/base").symlink_to(tmp_path / "base")
    Path("routings/base").symlink_to(adopted)
    Path("routing.json").write_text(json.dumps(LAST.to_json()))
    (edits,) = fenced("explore.md", "json")
    Path("edits.json").write_text(edits)
    few = {
        "explore": [],
        "sample": ["--steps", "1"],
        "adopt": ["--steps", "1"],
        "evaluate": ["--n", "2", "--steps", "1"],
    }
    for command in commands("explore.md"):
        main([*command, *few[command[0]]])
    assert capsys.readouterr().out.splitlines().count("the address") == len(served) == 6
    assert [len(session.models) for session, _ in served] == [1, 1, 2, 1, 1, 1]
    begun = served[-1][1]
    assert (begun.gains, begun.scale, begun.edit and begun.edit.rows) == ({2: 0.5}, 0.8, ("block 1",))
    assert json.loads(Path("images/adopted/manifest.json").read_text())["edits"] == json.loads(edits)
    session, state = served[1]
    assert state.edit == LAST
    assert state.prompt == session.examples[0].caption
    *_, panes = session.draw(replace(state, steps=1))
    picture = panes[-1].picture
    assert picture is not None
    assert picture.image is not None
    Path("edited-seed0.png").write_bytes(to_png(picture.image, views.settings(state, panes[-1])))
    (block,) = fenced("explore.md", "python")
    exec(block, {})
    assert capsys.readouterr().out == f"{LAST.to_json()}\n"
