"""Limits of connections: a timeout for request heads, and a maximum number per address.

uvicorn closes a connection that stays idle after a response, but waits without a limit for the first bytes of a new
one, and for the rest of an incomplete head; and its own limit of connections is shared by all clients.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from plainsd.server.api.security import HEADERS

HEAD_SECONDS = 20.0  # timeout for the head of a request
CONNECTIONS = 1000  # open at once
OF_ONE_ADDRESS = 250  # of these


def closing_response(status: int, reason: str, text: str) -> bytes:
    """A complete response, after which the connection is closed."""
    body = (text + "\n").encode()
    headers = HEADERS | {"Content-Type": "text/plain; charset=utf-8", "Connection": "close"}
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


TOO_MANY_CONNECTIONS = closing_response(
    503, "Service Unavailable", "too many connections are open; close some, and try again"
)
NO_REQUEST = closing_response(408, "Request Timeout", f"no request arrived within {HEAD_SECONDS:g} s; send it at once")


class Connection(H11Protocol):
    """uvicorn's protocol with a timeout for heads, a limit per address, and our headers on its own responses."""

    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        everyone = [other for other in self.connections if isinstance(other, Connection)]
        mine = sum(other.address == self.address for other in everyone)
        if len(everyone) > CONNECTIONS or mine > OF_ONE_ADDRESS:
            self.end(TOO_MANY_CONNECTIONS)
        else:
            self.expect_head()

    @property
    def address(self) -> str:
        return self.client[0] if self.client else ""

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self.cancel_timer()
        elif data:
            self.expect_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self.expect_head()  # of a request that was begun before the answer to the last one

    def connection_lost(self, exc: Exception | None) -> None:
        self.cancel_timer()
        super().connection_lost(exc)

    def expect_head(self) -> None:
        """Starts the timeout for the next head, unless it is running."""
        if self.waiting is None:
            self.waiting = self.loop.call_later(HEAD_SECONDS, self.end, NO_REQUEST)

    def cancel_timer(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def end(self, answer: bytes) -> None:
        self.cancel_timer()
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self.end(closing_response(400, "Bad Request", msg))
