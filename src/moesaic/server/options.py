"""What may be set of a server, with what is right for most; wrong values are refused before anything is loaded.

It does not know where values come from.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from moesaic.errors import ConfigError

__all__ = ["Limits", "ServerOptions", "is_loopback"]

_KEY = re.compile(r"[!-~]{8,512}")
_HOST_NAME = re.compile(r"\*|[a-z0-9_.-]{1,253}|[0-9a-f:.]{2,45}")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of requests, before anything is computed for them.

    Attributes:
        requests: under way at a time, from the first byte of the body to the last of the answer; so also streams.
        connections: at a time, the idle ones included.
        body_bytes: of a request.
        body_seconds: that a client may take to send it.
        headers: of a request.
        header_bytes: all of them with the first line.
        depth: of objects and lists within each other.
        messages: of a conversation.
        tools: that a request offers.
        choices: answers to a prompt (`n`).
        stops: texts at which to stop.
        stop_characters: of each of them.
        biases: tokens in `logit_bias`.
        schema_bytes: of a JSON schema or grammar, and of all tools together.
    """

    requests: int = 256
    connections: int = 1024
    body_bytes: int = 16 << 20
    body_seconds: float = 30.0
    headers: int = 100
    header_bytes: int = 32 << 10
    depth: int = 64
    messages: int = 4096
    tools: int = 256
    choices: int = 16
    stops: int = 16
    stop_characters: int = 256
    biases: int = 1024
    schema_bytes: int = 256 << 10


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Of one server.

    Attributes:
        host: address or name to listen on.
        port: 0 takes a free one.
        api_keys: each of them opens everything; none: everybody who reaches the server may use it.
        allow_hosts: further names in `Host`, "*" for any.
        allow_origins: web pages that may ask, such as "https://chat.example.org"; "*" for any.
        public_metrics: /metrics needs no key.
        limits: of requests.
        drain_seconds: that running requests get after a signal.
        on_engine_failure: end with an error, or load the model anew.
        json_log: write the log as JSON, an object per line.

    Raises:
        ConfigError: a value cannot be used, or the server would be open to the network without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8671
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    public_metrics: bool = False
    limits: Limits = field(default_factory=Limits)
    drain_seconds: float = 30.0
    on_engine_failure: Literal["exit", "restart"] = "exit"
    json_log: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port}: expected a number from 0 to 65535.")
        if any(not _KEY.fullmatch(key) for key in self.api_keys):  # the key itself is not for the terminal
            raise ConfigError("an API key has to be 8 to 512 printable ASCII characters without spaces.")
        if not self.api_keys and not is_loopback(self.host):
            raise ConfigError(
                f"listening on {self.host or 'all addresses'} opens the server to others: give a key with --api-key, "
                "--api-key-file or MOESAIC_API_KEY, or leave --host out to serve this computer only."
            )
        for name in self.allow_hosts:
            if not _HOST_NAME.fullmatch(name.lower()):
                raise ConfigError(f"allowed host '{name}': expected a name or an address without a port, or *.")
        for origin in self.allow_origins:
            if origin not in ("*", "null") and not _is_origin(origin):
                raise ConfigError(f"allowed origin '{origin}': expected a form like https://chat.example.org, or *.")


def is_loopback(host: str) -> bool:
    """Whether only this computer reaches that address; names other than localhost are taken not to be."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return bool(parts.scheme and parts.netloc) and text == f"{parts.scheme}://{parts.netloc}"
