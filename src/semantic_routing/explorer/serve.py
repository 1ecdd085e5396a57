"""The server of the page: on this machine alone, without telemetry and without anything from another host."""

from __future__ import annotations

import socket
from pathlib import Path

import gradio as gr

from semantic_routing.explorer.page import Page
from semantic_routing.explorer.session import Session
from semantic_routing.explorer.state import State

HOST = "127.0.0.1"
CSS = Path(__file__).with_name("page.css")


def serve(session: Session, start: State, port: int) -> str:
    """Start the server in threads that end with the program; return its address. ValueError for a port that is taken.

    gradio's own ``close`` would wait until every visitor has left.
    """
    check_port(port)
    Page(session, start).blocks.launch(
        server_name=HOST,
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
    return f"http://{HOST}:{port}/"


def check_port(port: int) -> None:
    """Raise ValueError if a port cannot be listened on."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port is {port}; it must be from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"port {port} cannot be used ({error.strerror}): give another one, as --port 7861"
            ) from error
