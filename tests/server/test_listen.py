"""The server's socket: what is small is sent at once."""

from __future__ import annotations

import asyncio
import socket

import pytest

from cuplama.server.lifecycle import listen

pytestmark = pytest.mark.anyio


async def test_pieces_do_not_wait_for_an_acknowledgement() -> None:
    """Else the first token of a stream comes with the client's delayed ACK, 40 ms later."""
    accepted = asyncio.get_running_loop().create_future()

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with listen("127.0.0.1", 0) as sock:
        server = await asyncio.start_server(connected, sock=sock)
        _, writer = await asyncio.open_connection(*sock.getsockname())
        assert await accepted
        writer.close()
        server.close()
