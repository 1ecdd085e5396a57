"""A server that speaks the chat completions protocol and misbehaves on purpose; run as a process of its own.

It prints its port and ends when its standard input closes, so that no test leaves one behind. What it does with a
request follows from the request alone:

- A share of the attempts, drawn from a hash of content and attempt, meets one of ``FAULTS``.
- A text with ``[[name]]`` meets that fault at every attempt, one with ``[[name*2]]`` at the first two.
- All else is answered: with tokens Yes and No whose probabilities follow from the text (``p_yes``) where logprobs
  are asked for, otherwise with three scores from 1 to 5 (``scores``) and the text itself.

``GET /counts`` tells for every text how often it was asked and answered, and for every picture how often answered.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL, KEY = "tiny-judge", "sk-local-0123456789abcdef"
FAULTS = ("429", "500", "503", "stall", "cut", "drop", "malformed", "html", "empty")
"""What a retry mends."""


def share(*words: object) -> float:
    """A number from 0 to 1 that follows from the words."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:6]) / 2**48


def p_yes(text: str) -> float:
    """The probability of Yes, from 0.02 to 0.98."""
    return 0.02 + 0.96 * share("yes", text)


def scores(text: str) -> dict[str, float]:
    """Scores from 1 to 5 with four decimals."""
    return {name: round(1 + 4 * share(name, text), 4) for name in ("Alignment", "Coherence", "Style")}


def pictures(body: dict[str, Any]) -> list[str]:
    """SHA-256 of the pictures in a request."""
    parts = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    return [hashlib.sha256(base64.b64decode(url.partition("base64,")[2])).hexdigest() for url in parts]


def completion(text: str, body: dict[str, Any], wrong: str) -> dict[str, Any]:
    """What is answered where nothing is wrong, or what is wrong is in the answer itself."""
    answer = "\n".join(f"{name} Score (1-5): {value}" for name, value in scores(text).items())
    answer += "".join(f"\nI see {name}" for name in pictures(body)) + f"\nYou ask: {text}"
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    if body.get("logprobs") and wrong != "no-logprobs":
        answer = "Yes" if p_yes(text) > 0.5 else "No"
        rows = [("Yes", 0.9 * p_yes(text)), (" yes", 0.1 * p_yes(text)), ("No", 0.9 - 0.9 * p_yes(text)), ("A", 0.001)]
        rows = [row for row in rows if row[0] != "Yes"] if wrong == "only-no" else rows
        rows = [row for row in rows if row[0].strip().lower() == "no"] if wrong == "only-no" else rows
        rows = [("maybe", 0.9), ("1", 0.1)] if wrong == "neither" else rows
        rows = [("So", 0.6), ("Got", 0.39), ("Yes", 2e-6)] if wrong == "prose-first" else rows
        told = [{"token": t, "logprob": 100 * p if wrong == "percent" else math.log(p), "bytes": None} for t, p in rows]
        choice["logprobs"] = {"content": [{**max(told, key=lambda row: row["logprob"]), "top_logprobs": told}]}
    if wrong == "blank":
        answer = " "
    if wrong == "length":
        choice["finish_reason"] = "length"
    if wrong == "of-ten":
        answer = "\n".join(f"{name} Score (1-5): {2 * value + 5}" for name, value in scores(text).items())
    if wrong == "prose":
        answer = "A lovely picture, well done!"
    if wrong == "thinks":
        answer = f"<think>Style Score (1-5): 1? Or a picture of a dog?</think>\n\n{answer}"
    if wrong == "thinking":
        answer = "<think>Alignment Score (1-5): 1, Coherence Score (1-5): 1, Style Score (1-5): 1?"
    content: Any = answer
    if wrong == "parts":
        content = [{"type": "thinking", "thinking": "A dog?"}, {"type": "text", "text": answer}]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": f"{MODEL}-2026",
        "choices": [{**choice, "message": {"role": "assistant", "content": content}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet
    server: Server

    def do_GET(self) -> None:
        if self.path == "/counts":
            self.reply(200, {name: getattr(self.server, name) for name in ("asked", "answered", "pictures", "most")})
        else:
            self.reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            self.error(404, "there is no such path")
            return
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.error(401, f"wrong key {self.headers['Authorization'].removeprefix('Bearer ')}")
            return
        body = json.loads(raw)
        if body["model"] != MODEL:
            self.error(404, f"The model `{body['model']}` does not exist.")
            return
        text = " ".join(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")
        with self.server.lock:
            self.server.asked[text] += 1
            attempt = self.server.asked[text]
            self.server.underway += 1
            self.server.most = max(self.server.most, self.server.underway)
        try:
            self.serve(text, attempt, body)
        finally:
            with self.server.lock:
                self.server.underway -= 1

    def serve(self, text: str, attempt: int, body: dict[str, Any]) -> None:
        wrong = self.server.fault(text, attempt)
        time.sleep(self.server.delay)
        if wrong == "429":
            self.error(429, "slow down", {"Retry-After": "0.01"})
        elif wrong == "429-slow":
            self.error(429, "slow down", {"Retry-After": "0.3"})
        elif wrong == "429-day":
            self.error(429, "come back tomorrow", {"Retry-After": "86400"})
        elif wrong == "wordy":
            self.error(500, "too much " * 200)
        elif wrong == "quota":
            self.error(429, "you have no credit", code="insufficient_quota")
        elif wrong.isdecimal():
            self.error(int(wrong), f"something is wrong ({wrong})")
        elif wrong == "stall":
            time.sleep(self.server.stall)
            self.close_connection = True
        elif wrong == "drop":
            self.hang_up()
        elif wrong == "html":
            self.send(200, b"<html>gateway</html>", {"Content-Type": "text/html"})
        elif wrong == "empty":
            self.reply(200, {"error": {"message": "overloaded"}})
        else:
            told = completion(text, body, wrong)
            if wrong == "echo":
                told["choices"][0]["message"]["content"] = f"You sent {self.headers['Authorization']}."
            payload = json.dumps(told).encode()
            if wrong == "malformed":
                self.send(200, payload[: len(payload) // 2])
            elif wrong == "cut":
                self.send(200, payload[: len(payload) // 2], {"Content-Length": str(len(payload))})
                self.hang_up()
            else:
                with self.server.lock:
                    self.server.answered[text] += 1
                    self.server.pictures.update(pictures(body))
                self.send(200, payload)

    def error(self, status: int, message: str, headers: dict[str, str] | None = None, code: str | None = None) -> None:
        self.reply(status, {"error": {"message": message, "type": "error", "code": code}}, headers)

    def reply(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(content).encode(), headers)

    def send(self, status: int, payload: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        told = {"Content-Type": "application/json", "Content-Length": str(len(payload))} | (headers or {})
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.seed, self.delay, self.stall, self.key = (
            args.faults,
            args.seed,
            args.delay,
            args.stall,
            args.key,
        )
        self.lock = threading.Lock()
        self.asked, self.answered, self.pictures = Counter[str](), Counter[str](), Counter[str]()
        self.underway = self.most = 0

    def fault(self, text: str, attempt: int) -> str:
        """The name of what goes wrong at this attempt; empty where nothing does."""
        if found := re.search(r"\[\[([\w-]+)(?:\*(\d+))?\]\]", text):
            return found[1] if attempt <= int(found[2] or 10**9) else ""
        if share(self.seed, text, attempt) < self.faults:
            return random.Random(f"{self.seed} {text} {attempt}").choice(FAULTS)
        return ""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error."""


class ChatServer:
    """The server in a process of its own, for tests: ``with ChatServer(faults=0.2) as server``."""

    def __init__(
        self, faults: float = 0.0, *, seed: int = 0, delay: float = 0.0, stall: float = 2.0, key: str = ""
    ) -> None:
        options = {"faults": faults, "seed": seed, "delay": delay, "stall": stall, "key": key}
        command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"

    def counts(self) -> dict[str, Any]:
        """``asked`` and ``answered`` by text, ``pictures`` answered by SHA-256, ``most`` requests under way at once."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/counts", timeout=10) as reply:
            return json.load(reply)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate(timeout=10)

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("faults", 0.0), ("delay", 0.0), ("stall", 2.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key", default="")
    server = Server(parser.parse_args())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
