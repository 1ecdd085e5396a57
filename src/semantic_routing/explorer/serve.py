"""The server of the page: without telemetry and without anything from another host."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from semantic_routing.explorer.page import Page
from semantic_routing.explorer.session import Session
from semantic_routing.explorer.state import State

CSS = Path(__file__).with_name("page.css")


def serve(session: Session, start: State, host: str, port: int) -> str:
    """Start the server in threads that end with the program; return its address.

    gradio's own ``close`` would wait until every visitor has left.
    """
    Page(session, start).blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        # Fonts of the reader's system: the default themes ask another host for theirs.
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=CSS,
    )
    return f"http://{host}:{port}/"
