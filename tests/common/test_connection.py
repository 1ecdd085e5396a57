"""Proxies and certificates that the environment sets."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest

from semantic_routing.chat.client import ChatClient
from semantic_routing.chat.server import ChatConfig
from semantic_routing.common.connection import check_hub, is_local, way_to
from tests.chat.test_client import one
from tests.helpers.chat_server import MODEL, ChatServer, p_yes

REMOTE = "https://judge.example.org/v1"


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.lower().endswith("_proxy") or name.startswith("SSL_CERT") or name == "OPENAI_API_KEY":
            monkeypatch.delenv(name)


@pytest.mark.behaviour(
    "Judges and scores",
    when="the environment sets a SOCKS proxy whose package is missing, an invalid proxy, or missing certificates",
    then="one line names the variable and the fix, before any work",
)
@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", "pip install socksio, or unset ALL_PROXY"),
        ("https_proxy", "socks5h://me:secret@127.0.0.1:1", "pip install socksio, or unset https_proxy"),
        ("all_proxy", "socks://127.0.0.1:1080/", "http://HOST:PORT"),
        ("HTTPS_PROXY", "http://me:secret@proxy:port", "http://HOST:PORT"),
        ("SSL_CERT_FILE", "/gone/cacert.pem", "which is not a file; unset SSL_CERT_FILE"),
        ("SSL_CERT_DIR", "/gone/certs", "which is not a folder; unset SSL_CERT_DIR"),
    ],
)
def test_bad_settings_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, fix: str) -> None:
    monkeypatch.setattr("semantic_routing.common.connection.find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv(name, value)
    for reach in (
        lambda: way_to(REMOTE),
        lambda: ChatClient(ChatConfig(base_url=REMOTE, model=MODEL)),
        lambda: check_hub("some/model"),
    ):
        with pytest.raises(ValueError, match=f"^{name} in the environment names .*{fix}") as refused:
            reach()
        assert "secret" not in str(refused.value)


def test_a_file_that_holds_no_certificates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cacert.pem").write_text("not a certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cacert.pem"))
    with pytest.raises(ValueError, match=r"SSL_CERT_FILE .*cacert.pem, which cannot be read .*; unset SSL_CERT_FILE"):
        way_to(REMOTE)


@pytest.mark.behaviour(
    "Judges and scores",
    when="a judge is served on this machine and the environment sets a proxy or certificates",
    then="requests go to it directly; both settings are ignored",
)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1"),
        ("http_proxy", "http://127.0.0.1:1"),
        ("SSL_CERT_FILE", "/gone/ca.pem"),
    ],
)
def test_a_judge_on_this_machine_is_asked_directly(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with ChatServer() as server:
        answer = one(ChatClient(ChatConfig(base_url=server.url, model=MODEL, retries=0)), "a red circle")
    assert getattr(answer, "text", answer) == ("Yes" if p_yes("a red circle") > 0.5 else "No")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.8.0.1", "::1", "0.0.0.0"])
def test_this_machine(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize("host", ["judge.example.org", "localhost.example.org", "10.0.0.1", "fe80::1", ""])
def test_other_machines(host: str) -> None:
    assert not is_local(host)


@pytest.mark.parametrize(
    ("environment", "proxy", "variable"),
    [
        ({"HTTPS_PROXY": "http://proxy:3128"}, "http://proxy:3128", "HTTPS_PROXY"),
        ({"ALL_PROXY": "proxy:3128"}, "http://proxy:3128", "ALL_PROXY"),
        ({"HTTP_PROXY": "http://proxy:3128"}, None, ""),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "example.org"}, None, ""),
        ({}, None, ""),
    ],
)
def test_proxies(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], proxy: str | None, variable: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    way = way_to(REMOTE)
    assert (way.proxy, way.variable, way.verify) == (proxy, variable, True)


def test_networks_in_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8, 192.168.1.1")
    found = [way_to(f"http://{host}/v1").proxy for host in ("10.1.2.3", "192.168.1.1", "11.1.2.3")]
    assert found == [None, None, "http://proxy:3128"]


def test_trouble_names_the_proxy_and_not_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:1")
    client = ChatClient(ChatConfig(base_url="http://judge.example.org/v1", model=MODEL, retries=0))
    failure = one(client, "a red circle")
    assert str(failure).startswith("no connection: ")
    assert str(failure).endswith("(through the proxy that HTTP_PROXY names)")
    assert "secret" not in f"{failure} {way_to('http://judge.example.org')}"


def test_certificates_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", f"{tmp_path}{os.pathsep}/gone")
    assert isinstance(way_to(REMOTE).verify, ssl.SSLContext)
    unverified = way_to("http://judge.example.org").verify
    assert isinstance(unverified, ssl.SSLContext)  # with no certificate trusted, and not with all
    assert (unverified.verify_mode, unverified.get_ca_certs()) == (ssl.CERT_REQUIRED, [])
    assert "SSL_CERT_FILE" in way_to(REMOTE).explain("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
