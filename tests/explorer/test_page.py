"""The page in a real browser: Debian's Chromium, led by Playwright, on a server that ``semroute explore`` started."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import pytest
import torch
from PIL import Image

from semantic_routing.cli.main import main
from semantic_routing.explorer.models import Model
from semantic_routing.explorer.opening import open_for_page
from semantic_routing.explorer.picture import read_settings
from semantic_routing.interop.export import make_pipeline
from semantic_routing.model.override import RoutingOverride
from tests.helpers.forked import MAIN, Forked
from tests.helpers.pipelines import quiet, random_bundle, save_adopted

pytest.importorskip("gradio", reason='the page needs gradio: pip install "semantic-routing[explore]"')
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with Playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # diffusers' own, on saving and loading
]

CPU = torch.device("cpu")
PROMPT = "a red circle above a blue square"
SLOW = 120_000
"""Milliseconds until something must be there; on an idle machine it takes one or two seconds."""

DRAWN = """wanted => {
    const link = document.querySelector("#link a"), query = new URLSearchParams(location.search);
    const same = ([name, value]) => query.get(name) === value || Number(query.get(name)) === Number(value);
    const drawn = document.querySelector("#pictures a.download");
    return link && link.search === location.search && drawn && Object.entries(wanted).every(same);
}"""
"""Whether pictures are drawn, and the address of the page is a link to a state."""

WEIGHTS = """wanted => {
    const cells = document.querySelectorAll("#heatmap td[data-layer]");
    return Array.from(cells, cell => cell.title).join() === wanted.join();
}"""
"""Whether the heat map shows these weights."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tiny_run: Path) -> Iterator[str]:
    """Address of the page of a tiny run."""
    command = [sys.executable, "-m", "semantic_routing", "explore", str(tiny_run), "--device", "cpu"]
    with subprocess.Popen([*command, "--port", str(free_port())], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            yield address
            process.terminate()
            assert process.wait(120) == 0, "it ends while a visitor is there"
        finally:
            process.kill()


def served(*command: object) -> Iterator[str]:
    """Yield the address of another page; its command is forked, which starts sooner than an interpreter."""
    process = Forked(MAIN, ("explore", *command, "--device", "cpu", "--port", free_port()))
    try:
        process.wait_for_output()
        yield process.out.splitlines()[0]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def gate(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pipeline of arm S3, whose pictures are as large as those of the tiny run."""
    folder = tmp_path_factory.mktemp("gate")
    quiet(make_pipeline(random_bundle(tiny_encoder, "joint", side=32))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gate_and_run(gate: Path, tiny_run: Path) -> Iterator[str]:
    """Address of a page on which the tiny run is drawn beside the gates."""
    yield from served(gate, "--beside", tiny_run)


@pytest.fixture(scope="module")
def adopted(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an adopted routing."""
    return save_adopted(random_bundle(tiny_encoder, "penultimate"), tmp_path_factory.mktemp("adopted"))


@pytest.fixture(scope="module")
def adopted_page(adopted: Path) -> Iterator[str]:
    """Address of the page of an adopted pipeline."""
    yield from served(adopted)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


def in_link(value: Any) -> str:
    """Return a value as links hold it."""
    return json.dumps(value, separators=(",", ":"))


class Visitor:
    """Somebody who looks at the page."""

    def __init__(self, browser: Any, server: str, width: int = 1280) -> None:
        self.server = server
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(SLOW)
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(re.sub(r"^(\w+:/?/?[^/,;]*).*", r"\1", request.url)))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, **state: Any) -> Visitor:
        """Open the link of a state and wait for its pictures."""
        query = {"prompt": PROMPT, "steps": 3, "sampler": "euler", "shift": 1} | state
        self.page.goto(self.server + "?" + "&".join(f"{name}={quote(str(value))}" for name, value in query.items()))
        return self.until(**query)

    def until(self, **state: Any) -> Visitor:
        """Wait until the pictures of a state are drawn: the page's address then names it."""
        wanted = {name: str(value) for name, value in state.items()}
        self.page.wait_for_function(DRAWN, arg=wanted)
        return self

    def edit(self) -> Any:
        """Return the edit that the page's address holds; None if nothing is edited."""
        found = parse_qs(self.page.url.partition("?")[2]).get("edit")
        return found and json.loads(found[0])

    def until_edited(self) -> dict[str, Any]:
        self.page.wait_for_function("() => new URLSearchParams(location.search).has('edit')")
        found: dict[str, Any] = self.edit()
        return found

    def pictures(self) -> list[str]:
        """Return the pictures that are shown, as data: addresses."""
        found: list[str] = self.page.eval_on_selector_all("#pictures img", "images => images.map(x => x.src)")
        return found

    def cell(self, row: int, layer: int) -> Any:
        return self.page.locator(f"#heatmap td[data-row='{row}'][data-layer='{layer}']")

    def set(self, slider: str, value: float) -> None:
        """Type a value into a slider's field, which ends like a drag to it."""
        number = self.page.locator(f"{slider} input[type=number]")
        number.fill(f"{value:g}")
        number.blur()

    def until_weights(self, model: Model, time: float) -> None:
        """Wait until the heat map shows a model's learned weights at a time."""
        wanted = [
            f"{row}, {column}: {100 * float(weight):.1f} %"
            for row, weights in zip(model.rows, model.table(time), strict=True)
            for column, weight in zip(model.columns, weights, strict=True)
        ]
        self.page.wait_for_function(WEIGHTS, arg=wanted)

    def choose(self, name: str, option: str) -> None:
        self.page.get_by_label(name, exact=True).click()
        self.page.get_by_role("option", name=option).click()

    def download(self, selector: str) -> Path:
        with self.page.expect_download() as found:
            self.page.locator(selector).last.click()
        return Path(found.value.path())


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[[str], Visitor]]:
    """Function that sends a visitor to a page's address; no visitor may see an error of the page's scripts."""
    visitors: list[Visitor] = []

    def visit(server: str) -> Visitor:
        visitors.append(Visitor(browser, server))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        assert visitor.errors == []
        visitor.page.close()


@pytest.fixture
def visitor(visit: Callable[[str], Visitor], server: str) -> Visitor:
    return visit(server)


def test_a_link_is_drawn_and_nothing_comes_from_another_host(visitor: Visitor) -> None:
    visitor.open()
    assert len(visitor.pictures()) == 1
    assert re.search("[✓✗]", visitor.page.inner_text("#pictures figcaption"))
    assert visitor.page.locator("#steps .strip img").count() == 3
    assert visitor.hosts <= {visitor.server.rstrip("/"), "data:image"}


def test_type_and_draw(visitor: Visitor) -> None:
    before = visitor.open().pictures()
    visitor.page.get_by_label("Prompt").fill("a dog on the moon")
    visitor.page.click("#draw")
    visitor.until(prompt="a dog on the moon")
    assert visitor.pictures() != before
    assert "not judged" in visitor.page.inner_text("#pictures")


def test_edit_a_weight_and_see_the_picture_change(visitor: Visitor) -> None:
    (plain,) = visitor.open().pictures()
    visitor.cell(1, 0).click()
    visitor.page.wait_for_selector("#heatmap td.chosen[data-row='1'][data-layer='0']")
    visitor.set("#weight", 90)
    assert visitor.until_edited() == {"rows": ["block 1"], "weights": [[0.9, 0.1]]}
    visitor.until()
    first, edited = visitor.pictures()
    assert first == plain
    assert edited != plain
    assert visitor.cell(1, 0).inner_text() == "90"
    assert visitor.page.inner_text("#heatmap tr.edited th") == "block 1"


def test_drag_along_a_row(visitor: Visitor) -> None:
    visitor.open()
    visitor.cell(0, 0).hover()
    visitor.page.mouse.down()
    visitor.cell(0, 1).hover()
    visitor.page.mouse.up()
    assert visitor.until_edited() == {"rows": ["block 0"], "weights": [[0.0, 1.0]]}


def test_presets_and_back(visitor: Visitor) -> None:
    (plain,) = visitor.open().pictures()
    visitor.choose("Preset", "B1: last layer but one")
    assert visitor.until_edited()["weights"] == [[1.0, 0.0]] * 2
    visitor.choose("Preset", "as learned")
    visitor.page.wait_for_function("() => !new URLSearchParams(location.search).has('edit')")
    assert visitor.pictures() == [plain]


def test_a_choice_counts_while_the_one_before_is_drawn(visitor: Visitor) -> None:
    visitor.open(steps=100)
    visitor.choose("Preset", "B1: last layer but one")
    visitor.choose("Preset", "B2: average of all layers")
    visitor.until(edit=in_link({"rows": ["block 0", "block 1"], "weights": [[0.5, 0.5]] * 2}))


EDIT = RoutingOverride(("block 1",), ((1.0, 0.0),))


def test_save_and_sample(visitor: Visitor, tiny_run: Path, tmp_path: Path) -> None:
    visitor.open(edit=in_link(EDIT.to_json()))
    file, picture = visitor.download("#saved a"), visitor.download("#pictures a.download")
    shutil.copy(file, tmp_path / "routing.json")
    command = f"sample {tiny_run} --routing {tmp_path}/routing.json --steps 3 --guidance 3 --out {tmp_path}/images"
    main([*command.split(), "--device", "cpu", "--prompt", PROMPT])
    settings = read_settings(picture.read_bytes())
    assert (settings["prompt"], settings["steps"], settings["edit"]) == (PROMPT, 3, EDIT.to_json())
    assert pixels(picture) == pixels(tmp_path / "images/00000_00.png")


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_a_reload_shows_the_same(visitor: Visitor) -> None:
    visitor.open(seed=3, edit=in_link(EDIT.to_json()))
    before = visitor.pictures()
    visitor.page.reload()
    visitor.until(seed=3, prompt=PROMPT)
    assert visitor.pictures() == before
    assert len(before) == 2


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "Type a prompt first"), ("a" * 10_000, "The prompt has 10,000 characters")]
)
def test_bad_prompts_get_a_sentence_and_the_picture_stays(visitor: Visitor, prompt: str, message: str) -> None:
    before = visitor.open().pictures()
    visitor.page.get_by_label("Prompt").fill(prompt)
    visitor.page.click("#draw")
    alert = visitor.page.wait_for_selector("#alert [role=alert]")
    assert alert.inner_text().startswith(message)
    assert visitor.pictures() == before


def test_a_bad_link_opens_the_page_with_a_sentence(visitor: Visitor) -> None:
    visitor.page.goto(visitor.server + "?steps=many")
    alert = visitor.page.wait_for_selector("#alert [role=alert]")
    assert "bad steps" in alert.inner_text()
    assert visitor.page.locator("#draw").is_enabled()


def test_a_second_visitor_waits(browser: Any, server: str) -> None:
    one, other = Visitor(browser, server), Visitor(browser, server)
    for visitor in (one, other):
        visitor.open()
    for visitor, seed in ((one, 100), (other, 200)):
        visitor.page.get_by_label("Prompt").fill(f"{PROMPT} {seed}")
        visitor.page.click("#draw")
    for visitor, seed in ((one, 100), (other, 200)):
        visitor.until(prompt=f"{PROMPT} {seed}")
        visitor.page.close()


def test_a_telephone_is_wide_enough(browser: Any, server: str) -> None:
    visitor = Visitor(browser, server, width=390).open(edit=in_link(EDIT.to_json()))
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    visitor.page.close()


def test_the_time_of_gates(visit: Callable[[str], Visitor], gate_and_run: str, gate: Path) -> None:
    """The slider shows the weights at another time; the pictures, which pass all times, stay as they are."""
    model = open_for_page(gate, CPU).model
    assert abs(model.table(0.5) - model.table(0.95)).max() > 0.01
    visitor = visit(gate_and_run)
    before = visitor.open(time=0.5).pictures()
    visitor.until_weights(model, 0.5)
    visitor.set("#time", 0.95)
    visitor.until_weights(model, 0.95)
    visitor.page.click("#draw")
    visitor.until(time=0.95)
    visitor.until_weights(model, 0.95)
    assert visitor.pictures() == before


def test_a_second_model_draws_from_the_same_noise(
    visit: Callable[[str], Visitor], gate_and_run: str, visitor: Visitor
) -> None:
    """Beside the edited gates, the tiny run draws the picture that it draws on its own page."""
    both = visit(gate_and_run).open(seed=5, edit=in_link(EDIT.to_json())).pictures()
    assert len(set(both)) == 3
    assert visitor.open(seed=5).pictures() == both[2:]


def test_an_adopted_pipeline(visit: Callable[[str], Visitor], adopted_page: str, adopted: Path, tmp_path: Path) -> None:
    """Scale and gains change the picture, and what is saved draws it from the command line."""
    visitor = visit(adopted_page)
    without, routed = visitor.open().pictures()
    assert without != routed
    visitor.set("#scale", 0.5)
    scaled = visitor.until(scale=0.5).pictures()
    assert scaled[:2] == [without, routed]
    assert len(set(scaled)) == 3

    layer = 1 + int(open_for_page(adopted, CPU).model.table(0.0)[:, 1:].sum(0).argmax())
    visitor.cell(0, layer).click()
    visitor.page.wait_for_selector(f"#heatmap td.chosen[data-row='0'][data-layer='{layer}']")
    visitor.set("#gain", 0)
    gains = in_link({str(layer): 0.0})
    gained = visitor.until(scale=0.5, gains=gains).pictures()
    assert len(set(gained) | set(scaled)) == 4
    assert visitor.page.inner_text("#heatmap tr.gains td:has-text('×')") == "×0"

    file, picture = visitor.download("#saved a"), visitor.download("#pictures a.download")
    assert json.loads(file.read_text()) == {"gains": {str(layer): 0.0}, "scale": 0.5}
    shutil.copy(file, tmp_path / "edits.json")
    command = f"adopt sample {adopted.parent}/base --routing {adopted} --edits {tmp_path}/edits.json --device cpu"
    settings = "--steps 3 --guidance 3 --sampler euler --shift 1"
    main([*f"{command} {settings} --out {tmp_path}/images".split(), "--prompt", PROMPT])
    assert pixels(picture) == pixels(tmp_path / "images/00000_00.png")

    visitor.page.reload()
    assert visitor.until(scale=0.5, gains=gains).pictures() == gained


@pytest.mark.behaviour("Exploring", when="the port of the page is taken", then="one line suggests another one")
def test_a_port_that_is_taken(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        with pytest.raises(SystemExit) as end:
            main(["explore", str(tiny_run), "--port", str(held.getsockname()[1])])
    assert end.value.code == 2
    assert "give another one, as --port 7861" in capsys.readouterr().err
