"""The address of the page."""

from __future__ import annotations

import socket


def check_address(host: str, port: int) -> None:
    """Raise ValueError if a page cannot be served there."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port is {port}; it must be from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} of {host} cannot be used ({error.strerror}): give another one, as --port 7861"
            ) from error
