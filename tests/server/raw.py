"""HTTP by hand on a socket: requests that stop in the middle, and clients that leave without a word."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any
from urllib.parse import urlsplit

__all__ = ["connected", "post", "reset"]


def connected(url: str, *, receive_bytes: int | None = None) -> socket.socket:
    """A connection to the server. receive_bytes: what the system may hold for a client that does not read."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(20)
    sock.connect((parts.hostname, parts.port or 80))
    return sock


def post(path: str, body: Any, *, length: int | None = None, headers: str = "") -> bytes:
    """The bytes of a request. length: another Content-Length than the body's own."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(data) if length is None else length}\r\n\r\n".encode() + data


def reset(sock: socket.socket) -> None:
    """Leave as a process does that is killed with unread data: the server gets a reset, and not an orderly end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
