"""Drawing for the page: versions, previews, the same pixels as ``semroute sample``, adopted pipelines."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from semantic_routing.cli.explore import beginning
from semantic_routing.cli.main import main
from semantic_routing.explorer import views
from semantic_routing.explorer.edits import UNIFORM, preset
from semantic_routing.explorer.models import AdoptedModel, OwnModel, check_alike
from semantic_routing.explorer.opening import open_for_page
from semantic_routing.explorer.page import Page
from semantic_routing.explorer.picture import read_settings, to_png
from semantic_routing.explorer.session import PREVIEW_STEPS, Pane, Session
from semantic_routing.explorer.state import State
from semantic_routing.explorer.streamed import streamed
from semantic_routing.model.override import RoutingOverride
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start
from tests.helpers import pipelines as own
from tests.helpers.adoptable_pipelines import pipeline
from tests.interop.conftest import make_bundle  # noqa: F401

CPU = torch.device("cpu")
LAST = RoutingOverride(("block 1",), ((0.0, 1.0),))
STATE = State(prompt="a red circle above a blue square", steps=9, edit=LAST)


@pytest.fixture(scope="module")
def session(tiny_run: Path) -> Session:
    return Session([open_for_page(tiny_run, CPU).model])


def drawn(session: Session, state: State) -> list[np.ndarray]:
    panes = list(session.draw(state))[-1]
    images = [pane.picture and pane.picture.image for pane in panes]
    assert all(image is not None for image in images)
    return images  # type: ignore[return-value]


def test_pictures_emerge_step_by_step(session: Session) -> None:
    seen = list(session.draw(replace(STATE, seed=5)))
    first = [panes[0].picture for panes in seen]
    counts = [len(picture.frames) for picture in first if picture is not None and picture.image is None]
    assert counts == [1, 2, 3, 4, 5]  # of 9 steps every second
    assert seen[-1][1].version.title == "edited"
    picture = seen[-1][1].picture
    assert picture is not None
    assert picture.times is not None
    assert picture.effective is not None
    assert picture.effective[0] == 0
    assert len(picture.times) == len(picture.effective) == 9
    assert len(list(session.draw(replace(STATE, seed=5)))) == 2, "pictures that are kept come at once"


def test_an_edited_picture_is_that_of_semroute_sample(session: Session, tiny_run: Path, tmp_path: Path) -> None:
    plain, edited = drawn(session, STATE)
    assert not np.array_equal(plain, edited)
    file = tmp_path / "routing.json"
    file.write_text(json.dumps(LAST.to_json()))
    for name, extra in (("plain", []), ("edited", ["--routing", str(file)])):
        call = f"sample {tiny_run} --steps 9 --guidance 3 --device cpu --out {tmp_path / name}"
        main([*call.split(), *extra, "--prompt", STATE.prompt])
    for name, image in (("plain", plain), ("edited", edited)):
        with Image.open(tmp_path / name / "00000_00.png") as found:
            np.testing.assert_array_equal(np.asarray(found), image)
    assert open_for_page(tiny_run, CPU, str(file)).edits.override == LAST


def test_while_dragging_only_the_edited_picture_has_few_steps(session: Session) -> None:
    state = replace(STATE, seed=8)
    whole = list(session.draw(state))[-1]
    dragged = replace(state, edit=preset(UNIFORM, None, session.models[0].rows, 2, row=0, layer=0))
    (panes,) = session.preview(dragged)
    assert panes[0].picture is whole[0].picture
    assert (panes[0].cfg.steps, panes[1].cfg.steps) == (9, PREVIEW_STEPS)
    assert "6 of 9 steps while you drag" in views.panes_html(session, dragged, panes)


def test_two_runs_are_drawn_from_the_same_noise(
    session: Session, tiny_run: Path, tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    start(tiny_config("joint", steps=1), tmp_path / "joint")
    joint = open_for_page(tmp_path / "joint", CPU).model
    both = Session([session.models[0], joint])
    assert [pane.model.name for pane in both.panes(STATE)] == [str(tiny_run), str(tiny_run), str(tmp_path / "joint")]
    first, _, other = drawn(both, STATE)
    (alone,) = drawn(Session([joint]), replace(STATE, edit=None))
    np.testing.assert_array_equal(other, alone)
    assert not np.array_equal(first, other)
    assert joint.depends_on_time
    assert joint.table(0.0).shape == joint.table(1.0).shape == (2, 2)


def test_models_of_two_sizes_are_not_set_side_by_side(session: Session) -> None:
    first = session.models[0]
    assert isinstance(first, OwnModel)
    other = OwnModel("large", replace(first.bundle, size=(64, 32)))
    with pytest.raises(ValueError, match=r"draw 32 x 32 and 32 x 64 pixels: models side by side need one size"):
        check_alike(first, other)


def test_the_verdict_is_the_checkers(session: Session) -> None:
    sample = session.examples[0]
    pane = session.panes(STATE)[0]
    right = replace(pane, picture=own_picture(sample.image))
    found = session.verdict(sample.caption, right)
    assert found is not None
    assert found.correct
    red = "a red circle above a blue square"
    wrong = session.verdict(red, replace(pane, picture=own_picture(np.zeros((32, 32, 3), np.uint8))))
    assert wrong is not None
    assert wrong.reason == "found no red circle"
    assert "✗ found no red circle" in views.panes_html(
        session, replace(STATE, prompt=red), [replace(pane, picture=own_picture(np.zeros((32, 32, 3), np.uint8)))]
    )


@pytest.mark.behaviour(
    "Exploring",
    when="a prompt is no sentence of the toy world",
    then="it is drawn, and the page says that the checker cannot judge it",
)
def test_a_prompt_without_claims_is_not_judged(session: Session) -> None:
    state = State(prompt="a dog <b>on</b> the moon", steps=1)
    panes = list(session.draw(state))[-1]
    page = views.panes_html(session, state, panes)
    assert "not judged" in page
    assert "<b>on</b>" not in page


def own_picture(image: np.ndarray) -> Any:
    from semantic_routing.explorer.session import Picture

    return Picture(image=image)


def test_downloads_hold_the_settings(session: Session) -> None:
    panes = list(session.draw(STATE))[-1]
    picture = panes[1].picture
    assert picture is not None
    assert picture.image is not None
    found = read_settings(to_png(picture.image, views.settings(STATE, panes[1])))
    assert found["edit"] == LAST.to_json()
    assert (found["prompt"], found["steps"], found["seed"]) == (STATE.prompt, 9, 0)


@pytest.fixture
def adopted(make_bundle: own.MakeBundle, tmp_path: Path) -> Path:  # noqa: F811
    """A routing of every block on a pipeline of this program, as semroute adopt train leaves it."""
    return own.save_adopted(make_bundle("penultimate"), tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_an_adopted_pipeline_has_scale_and_gains(adopted: Path) -> None:
    model = open_for_page(adopted, CPU).model
    assert isinstance(model, AdoptedModel)
    session, state = Session([model]), State(prompt="a red circle", steps=2)
    without, routed = drawn(session, state)
    assert [pane.version.title for pane in session.panes(state)] == ["without routing", "with routing"]
    assert not np.array_equal(without, routed)
    every = dict.fromkeys(range(1, len(model.columns)), 0.0)
    for nothing in (replace(state, gains=every), replace(state, scale=0.0)):
        np.testing.assert_array_equal(drawn(session, nothing)[2], without)
    ones = tuple(1.0 if column == 0 else 0.0 for column in range(len(model.columns)))
    original = RoutingOverride(model.rows, (ones,) * len(model.rows))
    np.testing.assert_array_equal(drawn(session, replace(state, edit=original))[2], without)
    heaviest = 1 + int(model.table(0.0)[:, 1:].sum(0).argmax())
    _, again, gained = drawn(session, replace(state, gains={heaviest: 0.5}))
    np.testing.assert_array_equal(again, routed)
    assert not np.array_equal(gained, routed)
    assert model.shown(replace(state, gains=every))[:, 0] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_weight_that_is_set_beside_gains_keeps_the_rows_other_edits(adopted: Path) -> None:
    state = State(gains={2: 0.5}, edit=RoutingOverride(("block 0",), ((0.0, 1.0, 0.0),)))
    page = Page.__new__(Page)  # without its components, which open an event loop
    page.model, page.parts = open_for_page(adopted, CPU).model, vars(state)
    edit = page._with_weight((*vars(state).values(), 0, 2, 20.0))["edit"]
    assert edit.weights[0] == pytest.approx((0.0, 0.8, 0.2))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_routing_finds_its_pipeline_from_any_folder(
    adopted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run was started in ``tmp_path``, with the pipeline's path from there."""
    (adopted / "config.json").write_text(json.dumps({"pipeline": "base"}))
    checkpoint = adopted / "checkpoints" / "step-0000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 1, "origins": {"folder": str(tmp_path)}}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert isinstance(open_for_page(adopted, CPU).model, AdoptedModel)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_saved_edits_of_an_adopted_routing_are_sampled(
    adopted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Path
) -> None:
    """The command that the page shows draws the page's picture, and the page begins with the saved edits."""
    monkeypatch.chdir(tmp_path)
    model = open_for_page(adopted, CPU).model
    row = RoutingOverride(("block 0",), ((0.5, 0.0, 0.5),))
    state = State(prompt="...", steps=2, edit=row, gains={2: 0.5}, scale=0.8)
    assert model.saved(State()) is None
    saved = model.saved(state)
    assert saved is not None
    Path(saved.name).write_text(json.dumps(saved.content))
    settings = ["--steps", "2", "--guidance", "3", "--sampler", "euler", "--shift", "1", "--device", "cpu"]
    main([*shlex.split(saved.command)[1:], *settings])
    _, routed, edited = drawn(Session([model]), state)
    with Image.open("images/00000_00.png") as found:
        np.testing.assert_array_equal(np.asarray(found), edited)
    assert not np.array_equal(routed, edited)
    assert json.loads(Path("images/manifest.json").read_text())["edits"] == saved.content

    opened = open_for_page(adopted, CPU, edits=Path(saved.name))
    begun = beginning(Session([opened.model]), opened.edits)
    assert (begun.edit, begun.gains, begun.scale) == (row, {2: 0.5}, 0.8)
    with pytest.raises(ValueError, match=r"is an adopted routing: give its edits as --edits edits.json"):
        open_for_page(adopted, CPU, saved.name)
    with pytest.raises(
        ValueError, match=r"--edits is for adopted routings: give the edited weights of .* as --routing"
    ):
        open_for_page(tiny_run, CPU, edits=Path(saved.name))
    with pytest.raises(ValueError, match=r"there is a gain of layer 9"):
        model.check(State(gains={9: 0.5}))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore:__array")
def test_a_pipeline_of_another_program_is_drawn_at_once(tmp_path: Path) -> None:
    pipe = pipeline("sana")
    pipe.save_pretrained(tmp_path / "sana")
    own.save_random_routing(pipe, tmp_path / "routing")
    with pytest.raises(ValueError, match=r"is a pipeline of another program: give its routing, too"):
        open_for_page(tmp_path / "sana", CPU)
    model = open_for_page(tmp_path / "sana", CPU, str(tmp_path / "routing")).model
    assert isinstance(model, AdoptedModel)
    model.subject.size = (32, 32)  # the least that the pipeline draws
    session = Session([model])
    state = State(prompt="three red apples", steps=2, gains={1: 0.0, 2: 0.0, 3: 0.0})
    seen = list(session.draw(state))
    assert len(seen) == 3, "its steps cannot be seen"
    without, routed, gained = drawn(session, state)
    assert not np.array_equal(without, routed)
    assert not np.array_equal(routed, gained)


def test_streamed_work_ends_when_nobody_reads() -> None:
    reported = []

    def work(report: Callable[[int], None]) -> None:
        for i in range(1000):
            report(i)
            reported.append(i)

    reports = streamed(work)
    assert next(reports) == 0
    reports.close()  # type: ignore[attr-defined]
    assert len(reported) <= 1000

    def fails(report: Callable[[int], None]) -> None:
        report(1)
        raise ValueError("too much")

    found = []
    with pytest.raises(ValueError, match="too much"):
        found.extend(streamed(fails))


def test_a_pane_that_is_not_drawn_is_blank(session: Session) -> None:
    pane: Pane = session.panes(STATE)[0]
    assert 'class="blank"' in views.panes_html(session, STATE, [pane])


@pytest.mark.behaviour("Exploring", when="gradio is missing", then="one line names the command that installs it")
def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as end:
        main(["explore", "runs/x"])
    assert end.value.code == 2
    assert 'pip install "semantic-routing[explore]"' in capsys.readouterr().err
