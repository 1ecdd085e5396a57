"""Takes the picture of the page of ``semroute explore`` for the README, in Chromium by Playwright.

python tools/explorer_picture.py runs/quickstart docs/images/explorer.png "prompt=a red circle above a blue square"
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import sync_playwright

MINUTES = 10 * 60_000
"""Milliseconds to wait for the pictures, on a busy machine."""


def take(address: str, query: str, out: Path, width: int, height: int | None) -> None:
    """Write the page, at a link's query, as a PNG of this width; the whole page if no height is given."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": width, "height": height or 900})
        page.set_default_timeout(MINUTES)
        page.goto(f"{address}?{quote(query, safe='=&%+')}")
        page.wait_for_function(
            "() => { const link = document.querySelector('#link a'); return link && link.search === location.search"
            " && document.querySelector('#pictures a.download'); }"
        )
        page.screenshot(path=out, full_page=height is None)
        browser.close()


def main() -> None:
    """Serve a model's page, take its picture and stop the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("query", help="a link's query: prompt=...&seed=...")
    parser.add_argument(
        "--width", type=int, nargs="+", default=[1280], help="one picture each; OUT gets the width's name"
    )
    parser.add_argument("--height", type=int)
    parser.add_argument("--port", type=int, default=7861)
    args = parser.parse_args()
    command = [sys.executable, "-m", "semantic_routing", "explore", args.model, "--port", str(args.port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        for width in args.width:
            out = args.out if len(args.width) == 1 else args.out.with_stem(f"{args.out.stem}-{width}")
            take(address, args.query, out, width, args.height)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
