"""A client of servers with OpenAI's interface: which models there are, and the chunks of a chat's answer.

By Python's own urllib: what else speaks HTTP among the dependencies changes with the version of huggingface_hub
(requests, httpx, httpx2), and a chat needs one request at a time.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from ..errors import CuplamaError, ParameterError
from .addresses import is_loopback

__all__ = ["OpenAIServer", "ServerError"]

_SECONDS = 600  # without a byte from the server: a long prompt, or a queue, may be before the first
_SHOWN = 500  # characters of what a server says that are shown


class ServerError(CuplamaError):
    """The server cannot be reached, refuses the request, or breaks off. code: OpenAI's name for it, or ""."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class OpenAIServer:
    """A server. url: with or without http:// and /v1, as people write it; key: sent as a bearer token.

    base: the address below which the endpoints are. Raises ParameterError for what is no address.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ParameterError(f"--server {url!r} is no address; it must look like http://127.0.0.1:8000")
        self.base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
        self._key = key
        # A proxy that the environment names is for other machines.
        own = [urllib.request.ProxyHandler({})] if is_loopback(parts.hostname) else []
        self._opener = urllib.request.build_opener(*own)

    def models(self) -> list[str]:
        """The names of the models there. Raises ServerError."""
        with self._opened("/models", None) as response:
            try:
                return [str(model["id"]) for model in json.load(response)["data"]]
            except (ValueError, KeyError, TypeError):
                raise ServerError(f"{self.base}/models lists no models: is this a server of OpenAI's kind?") from None

    def chat(self, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """The chunks of the answer to a request, as they come. Closing the generator ends the request.

        Raises ServerError, also where the answer ends before it is whole.
        """
        with self._opened("/chat/completions", {**body, "stream": True}) as response:
            for line in response:
                name, _, data = line.partition(b":")
                if name != b"data":
                    continue
                if data.strip() == b"[DONE]":
                    return
                yield _chunk(data)
        raise ServerError("the server broke off before the answer had ended")

    @contextmanager
    def _opened(self, path: str, body: Mapping[str, Any] | None) -> Generator[Any]:
        """The response to a GET, or to a POST of ``body``; inside, what the network does is a ServerError."""
        request = urllib.request.Request(self.base + path, headers={"User-Agent": "cuplama", "Accept": "*/*"})
        if body is not None:
            request.data = json.dumps(body, allow_nan=False).encode()
            request.add_header("Content-Type", "application/json")
        if self._key is not None:  # never to where a redirect leads
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=_SECONDS) as response:
                yield response
        except urllib.error.HTTPError as e:
            raise self._refusal(e) from None
        except urllib.error.URLError as e:
            reason = e.reason.strerror if isinstance(e.reason, OSError) and e.reason.strerror else e.reason
            raise ServerError(f"cannot reach {self.base}: {reason}") from None
        except TimeoutError:
            raise ServerError(f"nothing came from {self.base} for {_SECONDS} seconds") from None
        except (http.client.HTTPException, OSError) as e:
            raise ServerError(f"the connection to {self.base} broke: {e or type(e).__name__}") from None

    def _refusal(self, error: urllib.error.HTTPError) -> ServerError:
        """What the server says, in one line, with what helps where the status alone tells it."""
        try:
            said = json.loads(error.read())
        except (ValueError, OSError, http.client.HTTPException):
            said = None
        message, code = _said(said)
        hint = "; --api-key gives a key" if error.code == 401 and self._key is None else ""
        return ServerError(f"{self.base} answers {error.code}: {message or error.reason}{hint}", code)


def _chunk(data: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise ServerError(f"the server sends what is no JSON object: {data[:80].decode(errors='replace').strip()!r}")
    if chunk.get("error"):
        raise ServerError(f"the server says: {_said(chunk)[0]}", _said(chunk)[1])
    return chunk


def _said(body: Any) -> tuple[str, str]:
    """Message and code of an error's body; servers have ``{"error": {...}}``, ``{"error": text}`` or other forms."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or error
        return f"{message}"[:_SHOWN], str(error.get("code") or "")
    return ("" if error is None else f"{error}"[:_SHOWN]), ""
