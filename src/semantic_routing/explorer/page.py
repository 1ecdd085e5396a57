"""The page: its components and what they do. gradio is imported here and in ``serve.py`` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from semantic_routing.explorer import views
from semantic_routing.explorer.edits import (
    LEARNED,
    MOST_GAIN,
    PRESETS,
    one_hot,
    preset,
    preset_name,
    with_cell,
    with_gain,
    with_row,
)
from semantic_routing.explorer.session import Session
from semantic_routing.explorer.state import MOST_SCALE, MOST_STEPS, State, from_query, to_query
from semantic_routing.sampling.samplers import SAMPLERS

Updates = dict[Any, Any]
"""New values of components."""
HEATMAP_JS = Path(__file__).with_name("heatmap.js")
LINK_JS = "watch('value', () => history.replaceState(null, '', element.querySelector('a').getAttribute('href')))"
"""The address of the page becomes the link to what it shows: reloading it shows the same."""
EVERY: dict[str, Any] = {"trigger_mode": "multiple", "api_visibility": "private"}
"""What is chosen while its event still runs waits for it; without a mode, gradio would drop it."""
ONE_AT_A_TIME = EVERY | {"concurrency_limit": 1, "concurrency_id": "draw", "show_progress": "minimal"}
"""All that draws shares one worker; a second visitor waits and sees the place in the queue."""
DRAGGED = ONE_AT_A_TIME | {"trigger_mode": "always_last"}
"""Of all that a drag passes while a preview is drawn, only the last is previewed."""
AT_ONCE = EVERY | {"show_progress": "hidden"}


class Page:
    """The components of the page and their events."""

    def __init__(self, session: Session, start: State) -> None:
        self.session, self.start = session, start
        self.model = session.models[0]
        with gr.Blocks(title="Semantic Routing", analytics_enabled=False, fill_width=True) as self.blocks:
            self.edit, self.gains = gr.State(start.edit), gr.State(dict(start.gains))
            gr.HTML(self._heading())
            with gr.Row():
                with gr.Column(scale=5, min_width=340):
                    self._pictures()
                with gr.Column(scale=4, min_width=340):
                    self._routing()
                    self._sampling()
            self._events()

    def _heading(self) -> str:
        lines = [f"<p><b>{escape(model.name)}</b> {escape(model.about)}.</p>" for model in self.session.models]
        return f"<h1>Semantic Routing</h1>{''.join(lines)}"

    def _pictures(self) -> None:
        self.prompt = gr.Textbox(self.start.prompt, label="Prompt", lines=2, placeholder="a red circle above a square")
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", min_width=120, elem_id="draw")
            self.again = gr.Button("Other noise", min_width=120)
        captions = [sample.caption for sample in self.session.examples]
        self.examples = gr.Dropdown(captions, value=None, label="Unseen captions", visible=bool(captions))
        self.alert = gr.HTML(elem_id="alert")
        empty = self.session.panes(self.start)
        self.pictures = gr.HTML(views.panes_html(self.session, self.start, empty), elem_id="pictures")
        with gr.Accordion("Step by step", open=True):
            self.steps_view = gr.HTML(views.steps_html(()), elem_id="steps")
        with gr.Accordion("Effective time of the trajectory", open=False):
            self.chart = gr.HTML(views.trajectory_html(()), elem_id="chart")
        self.link = gr.HTML(self._link(self.start), js_on_load=LINK_JS, elem_id="link")

    def _routing(self) -> None:
        there, adopted = bool(self.model.rows), self.model.adopted
        rows = [(name, row) for row, name in enumerate(self.model.rows)]
        layers = [(name, layer) for layer, name in enumerate(self.model.columns)]
        hint = "Click a cell to choose it; drag along a row to read one layer alone."
        gr.HTML(f'<h2>Weight of each layer</h2><p class="note">{hint}</p>', visible=there)
        script = HEATMAP_JS.read_text(encoding="utf-8")
        self.heatmap = gr.HTML(self._heat(self.start, 0, 0), js_on_load=script, visible=there, elem_id="heatmap")
        moves = there and self.model.depends_on_time
        self.time = gr.Slider(
            0, 1, self.start.time, step=0.05, label="Time (0 noise, 1 data)", visible=moves, elem_id="time"
        )
        self.preset = gr.Dropdown([*PRESETS], value=LEARNED, label="Preset", visible=there, elem_id="preset")
        with gr.Row(visible=there):
            self.row = gr.Dropdown(rows, value=0 if rows else None, label="Row", min_width=140)
            self.layer = gr.Dropdown(layers, value=0 if layers else None, label="Layer", min_width=140)
        self.weight = gr.Slider(
            0, 100, self._percent(self.start, 0, 0), step=1, label="Weight (%)", visible=there, elem_id="weight"
        )
        with gr.Row(visible=adopted):
            self.scale = gr.Slider(
                0, MOST_SCALE, self.start.scale, step=0.05, label="Scale of the routing", elem_id="scale"
            )
            self.gain = gr.Slider(
                0, MOST_GAIN, 1, step=0.05, label="Gain of the chosen layer", visible=there, elem_id="gain"
            )
        self.saved = gr.HTML(self._saved(self.start), visible=there or adopted, elem_id="saved")

    def _sampling(self) -> None:
        start = self.start
        with gr.Accordion("Sampling", open=False):
            with gr.Row():
                self.seed = gr.Number(start.seed, label="Seed", precision=0, min_width=100)
                self.steps = gr.Slider(1, MOST_STEPS, start.steps, step=1, label="Steps")
            with gr.Row():
                self.guidance = gr.Slider(1, 12, start.guidance, step=0.5, label="Guidance")
                self.sampler = gr.Dropdown([*SAMPLERS], value=start.sampler, label="Sampler", min_width=140)
            self.shift = gr.Slider(0.5, 8, start.shift, step=0.5, label="Shift: more steps near the noise")

    def _events(self) -> None:
        self.parts: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("prompt", "seed", "steps", "guidance", "sampler", "shift", "time", "edit", "scale", "gains")
        }
        outputs = [self.alert, self.pictures, self.steps_view, self.chart, self.link, self.heatmap, self.saved]
        outputs += [self.row, self.layer, self.weight, self.gain, self.preset, *self.parts.values()]
        place = [self.row, self.layer]

        def on(event: Callable[..., Any], work: Callable[..., Any], extra: list[Any], **how: Any) -> None:
            event(work, [*self.parts.values(), *place, *extra], outputs, show_progress_on=[self.alert], **how)

        for event in (self.draw.click, self.prompt.submit, self.steps.release, self.guidance.release):
            on(event, self._draw, [], **ONE_AT_A_TIME)
        for event in (self.sampler.input, self.shift.release, self.seed.submit):
            on(event, self._draw, [], **ONE_AT_A_TIME)
        on(self.again.click, self._other_noise, [], **ONE_AT_A_TIME)
        on(self.examples.input, self._example, [self.examples], **ONE_AT_A_TIME)
        on(self.preset.input, self._preset, [self.preset], **ONE_AT_A_TIME)
        on(self.weight.input, self._weight_dragged, [self.weight], **DRAGGED)
        on(self.weight.release, self._weight_set, [self.weight], **ONE_AT_A_TIME)
        on(self.heatmap.input, self._row_dragged, [], **DRAGGED)
        on(self.heatmap.release, self._row_set, [], **ONE_AT_A_TIME)
        on(self.heatmap.click, self._cell, [], **AT_ONCE)
        for event in (self.row.input, self.layer.input, self.time.input):
            on(event, self._choose, [], **AT_ONCE)
        on(self.scale.input, self._preview, [], **DRAGGED)
        on(self.scale.release, self._draw, [], **ONE_AT_A_TIME)
        on(self.gain.input, self._gain_dragged, [self.gain], **DRAGGED)
        on(self.gain.release, self._gain_set, [self.gain], **ONE_AT_A_TIME)
        self.blocks.load(self._load, None, outputs, show_progress_on=[self.alert], **ONE_AT_A_TIME)

    # Every handler gets the values of all parts, the chosen row and layer, and what its event adds.

    def _state(self, values: tuple[Any, ...]) -> State:
        """Return the state of the parts' values; ValueError if one of them is missing or out of its range."""
        found = dict(zip(self.parts, values, strict=True))
        if empty := [name for name, value in found.items() if value is None and name != "edit"]:
            raise ValueError(f"The {empty[0]} is empty: give a number")
        kinds = {"seed": int, "steps": int, "guidance": float, "shift": float, "time": float, "scale": float}
        return State(**found | {name: kind(found[name]) for name, kind in kinds.items()})

    def _pictured(
        self, values: tuple[Any, ...], *, few: bool = False, changes: dict[str, Any] | None = None
    ) -> Iterator[Updates]:
        """Yield the page while the pictures of the parts' values, with changes, are drawn; a mistake is a message."""
        *parts, row, layer = values
        changes = changes or {}
        try:
            state = self._state(tuple((dict(zip(self.parts, parts, strict=True)) | changes).values()))
            yield {self.parts[name]: value for name, value in changes.items()} | self._weights(state, row, layer)
            if few and not state.prompt.strip():
                return
            panes = self.session.panes(state)
            for panes in self.session.preview(state) if few else self.session.draw(state):
                yield {self.pictures: views.panes_html(self.session, state, panes), self.alert: ""}
            if not few:
                found: Updates = {self.steps_view: views.steps_html(panes), self.chart: views.trajectory_html(panes)}
                yield found | {self.link: self._link(state), self.alert: ""}
        except ValueError as error:
            yield {self.alert: views.alert_html(str(error))}

    def _draw(self, *values: Any) -> Iterator[Updates]:
        yield from self._pictured(values)

    def _preview(self, *values: Any) -> Iterator[Updates]:
        yield from self._pictured(values, few=True)

    def _other_noise(self, *values: Any) -> Iterator[Updates]:
        seed = dict(zip(self.parts, values, strict=False))["seed"]
        yield from self._pictured(values, changes={"seed": (seed or 0) + 1})

    def _example(self, *values: Any) -> Iterator[Updates]:
        yield from self._pictured(values[:-1], changes={"prompt": values[-1]})

    def _preset(self, *values: Any) -> Iterator[Updates]:
        *parts, row, layer, name = values
        edit = dict(zip(self.parts, parts, strict=True))["edit"]
        changed = preset(name, edit, self.model.rows, len(self.model.columns), row=row, layer=layer)
        yield from self._pictured(values[:-1], changes={"edit": changed})

    def _with_weight(self, values: tuple[Any, ...]) -> dict[str, Any]:
        *parts, row, layer, percent = values
        state = self._state(tuple(parts))
        table = self.model.shown(replace(state, gains={}))
        edit = with_cell(state.edit, self.model.rows, table, row=row, layer=layer, weight=(percent or 0) / 100)
        return {"edit": edit}

    def _weight_dragged(self, *values: Any) -> Iterator[Updates]:
        yield from self._dragged(self.weight, values, self._with_weight(values))

    def _dragged(self, slider: Any, values: tuple[Any, ...], changes: dict[str, Any]) -> Iterator[Updates]:
        """Yield previews that leave a slider alone, which may have been dragged on meanwhile."""
        for updates in self._pictured(values[:-1], few=True, changes=changes):
            yield {part: value for part, value in updates.items() if part is not slider}

    def _weight_set(self, *values: Any) -> Iterator[Updates]:
        yield from self._pictured(values[:-1], changes=self._with_weight(values))

    def _with_gain(self, values: tuple[Any, ...]) -> dict[str, Any]:
        gains = dict(zip(self.parts, values, strict=False))["gains"]
        return {"gains": with_gain(gains, values[-2], float(values[-1] or 0)) if values[-2] else gains}

    def _gain_dragged(self, *values: Any) -> Iterator[Updates]:
        yield from self._dragged(self.gain, values, self._with_gain(values))

    def _gain_set(self, *values: Any) -> Iterator[Updates]:
        yield from self._pictured(values[:-1], changes=self._with_gain(values))

    def _row_dragged(self, event: gr.EventData, *values: Any) -> Iterator[Updates]:
        yield from self._row(event, values, few=True)

    def _row_set(self, event: gr.EventData, *values: Any) -> Iterator[Updates]:
        yield from self._row(event, values, few=False)

    def _row(self, event: gr.EventData, values: tuple[Any, ...], few: bool) -> Iterator[Updates]:
        """Let the row in which the pointer moves read the layer under the pointer alone."""
        row, layer = int(event.row), int(event.layer)
        edit = dict(zip(self.parts, values, strict=False))["edit"]
        changed = with_row(edit, self.model.rows, row, one_hot(len(self.model.columns), layer))
        for updates in self._pictured((*values[:-2], row, layer), few=few, changes={"edit": changed}):
            yield {self.row: row, self.layer: layer} | updates

    def _cell(self, event: gr.EventData, *values: Any) -> Updates:
        row, layer = int(event.row), int(event.layer)
        return {self.row: row, self.layer: layer} | self._choose(*values[:-2], row, layer)

    def _choose(self, *values: Any) -> Updates:
        *parts, row, layer = values
        try:
            return self._weights(self._state(tuple(parts)), row, layer)
        except ValueError as error:
            return {self.alert: views.alert_html(str(error))}

    def _weights(self, state: State, row: int, layer: int) -> Updates:
        """Return the heat map, the sliders of the chosen cell, and what can be saved."""
        if not self.model.rows:
            return {self.saved: self._saved(state), self.alert: ""}
        return {
            self.heatmap: self._heat(state, row, layer),
            self.weight: self._percent(state, row, layer),
            self.gain: gr.Slider(value=state.gains.get(layer, 1), interactive=layer > 0),
            self.saved: self._saved(state),
            self.preset: preset_name(state.edit, self.model.rows, len(self.model.columns)),
            self.alert: "",
        }

    def _load(self, request: gr.Request) -> Iterator[Updates]:
        """Show the state of the link with which the page was opened."""
        try:
            state = from_query(dict(request.query_params), self.start)
            self.model.check(state)
        except ValueError as error:
            yield {self.alert: views.alert_html(str(error))}
            return
        values = {name: getattr(state, name) for name in self.parts} | {"gains": dict(state.gains)}
        yield {self.parts[name]: value for name, value in values.items()} | self._weights(state, 0, 0)
        if state.prompt.strip():
            yield from self._pictured((*values.values(), 0, 0))

    def _heat(self, state: State, row: int, layer: int) -> str:
        if not self.model.rows:
            return ""
        table, gains = self.model.shown(state), state.gains
        return views.heatmap_html(table, self.model.rows, self.model.columns, state.edit, (row, layer), gains)

    def _percent(self, state: State, row: int, layer: int) -> int:
        return round(100 * float(self.model.shown(state)[row, layer])) if self.model.rows else 0

    def _saved(self, state: State) -> str:
        return views.saved_html(self.model.saved(state))

    def _link(self, state: State) -> str:
        return f'<a href="?{escape(to_query(state))}">Link to these pictures and settings</a>'
