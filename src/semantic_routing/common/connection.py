"""Proxies and certificates that the environment sets for connections to servers, with clear errors for bad ones."""

from __future__ import annotations

import ipaddress
import os
import ssl
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

PROXIES = ("http", "https", "socks5", "socks5h")
"""Schemes of proxies that the HTTP library supports."""
CERTIFICATES = (("SSL_CERT_FILE", Path.is_file, "file"), ("SSL_CERT_DIR", Path.is_dir, "folder"))
"""Environment variables for own certificates, the check and the kind of each; the first that is set counts."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """Proxy and certificates for connections to a server."""

    proxy: str | None = field(default=None, repr=False)
    """Address of the proxy, which may contain a password."""
    variable: str = ""
    """Environment variable that sets the proxy."""
    verify: ssl.SSLContext | bool = True
    """Trusted certificates; True for those of the system."""

    def explain(self, trouble: str) -> str:
        """Return an error message extended by the proxy and certificates that may have caused it."""
        if self.proxy is not None:
            trouble += f" (through the proxy that {self.variable} names)"
        if "CERTIFICATE_VERIFY_FAILED" in trouble:
            trouble += "; name the file with the certificate of its authority in SSL_CERT_FILE"
        return trouble


def way_to(url: str) -> Way:
    """Return the proxy and certificates for an address; ValueError names the variable that is wrong and the fix.

    A server on this machine needs no proxy, and one at http:// no certificates.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy, variable = (None, "") if is_local(host) or _is_excepted(host) else _proxy(parts.scheme)
    if "https" in (parts.scheme, urlsplit(proxy or "").scheme):
        return Way(proxy=proxy, variable=variable, verify=_certificates())
    # A context without certificates is cheap to make, and refuses redirections to https://.
    return Way(proxy=proxy, variable=variable, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


def check_hub(name: str) -> None:
    """Raise ValueError if the model ``name`` needs the hub and the environment's proxy or certificates are bad."""
    from huggingface_hub import constants

    if not Path(name).exists() and not constants.HF_HUB_OFFLINE:
        way_to(constants.ENDPOINT)


def is_local(host: str) -> bool:
    """Return whether a host is this machine, such as localhost, 127.0.0.1 or ::1."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    with suppress(ValueError):
        address = ipaddress.ip_address(name)
        return address.is_loopback or address.is_unspecified
    return False


def _is_excepted(host: str) -> bool:
    """Return whether NO_PROXY lists the host or its network."""
    if proxy_bypass(host):
        return True
    for entry in getproxies().get("no", "").split(","):
        with suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip(), strict=False):
                return True
    return False


def _proxy(scheme: str) -> tuple[str | None, str]:
    """Return the proxy of the environment and the name of the variable that sets it."""
    known = getproxies()
    kind = next((kind for kind in (scheme, "all") if known.get(kind)), None)
    if kind is None:
        return None, ""
    names = sorted((name for name in os.environ if name.lower() == f"{kind}_proxy" and os.environ[name]), reverse=True)
    variable = names[0] if names else f"the system's {kind} setting"
    address = known[kind] if "://" in known[kind] else f"http://{known[kind]}"
    try:
        parts = urlsplit(address)
        usable = parts.scheme in PROXIES and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        usable = False
    if not usable:
        raise ValueError(
            f"{variable} in the environment names an invalid proxy; write it as http://HOST:PORT or "
            "socks5://HOST:PORT, or unset it"
        )
    if parts.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ValueError(
            f"{variable} in the environment names a SOCKS proxy, which needs another package: pip install socksio, "
            f"or unset {variable}"
        )
    return address, variable


def _certificates() -> ssl.SSLContext | bool:
    """Return the certificates that the environment sets, or True if it sets none."""
    for name, is_there, what in CERTIFICATES:
        value = os.environ.get(name)
        if not value:
            continue
        fix = f"unset {name}, or set it to a {what} of certificates"
        # OpenSSL accepts several folders, separated as in PATH.
        if not any(is_there(Path(part)) for part in ([value] if what == "file" else value.split(os.pathsep))):
            raise ValueError(f"{name} in the environment names {value}, which is not a {what}; {fix}")
        try:
            if what == "file":
                return ssl.create_default_context(cafile=value)
            return ssl.create_default_context(capath=value)
        except OSError as error:  # includes ssl.SSLError
            where = f"{name} in the environment names {value}"
            keys = os.environ.get("SSLKEYLOGFILE")
            if keys and error.filename == keys:
                where, fix = f"SSLKEYLOGFILE in the environment names {keys}", "unset SSLKEYLOGFILE"
            raise ValueError(f"{where}, which cannot be read ({error.strerror or error}); {fix}") from error
    return True
