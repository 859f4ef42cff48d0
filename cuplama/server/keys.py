"""Who may use the server: bearer keys, compared in a time that does not tell how much of one was right."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable

from starlette.datastructures import Headers

from .errors import ApiError

__all__ = ["Keys"]


class Keys:
    """The keys that the server takes; without any it takes every request."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(os.fsencode(key)) for key in keys]  # of one length: no key's length is told

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: Headers) -> None:
        """Raises ApiError 401 unless the request has one of the keys.

        It is read from ``Authorization: Bearer KEY``, or from ``x-api-key``, which clients of Anthropic's send.
        """
        if not self._digests:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        said = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        given = _digest(said.encode("latin-1"))  # as starlette has decoded the header's bytes
        if True not in [hmac.compare_digest(given, digest) for digest in self._digests]:  # a list: all are compared
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                "authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
