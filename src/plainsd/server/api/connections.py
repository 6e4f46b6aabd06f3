"""Limits of connections: a timeout for request heads, and a maximum number per address.

uvicorn closes a connection that stays idle after a response, but waits without a limit for the first bytes of a new
one, and for the rest of an incomplete head; and its own limit of connections is shared by all clients.

An address is an IPv4 address or an IPv6 network of 64 bits: that is what one client has, to choose its addresses from.
"""

from __future__ import annotations

import asyncio
import ipaddress
from contextlib import suppress

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from plainsd.server.api.security import HEADERS

HEAD_SECONDS = 20.0  # timeout for the head of a request
CONNECTIONS = 1000  # open at once
OF_ONE_ADDRESS = 250  # of these
MOST_FILES = 4096  # open at once, connections included, if the system lets us
OTHER_FILES = 256  # open at once that are no connections: models, pictures, the database


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
    address = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = network_of(self.client[0] if self.client else "")
        everyone = [other for other in self.connections if isinstance(other, Connection)]
        mine = sum(other.address == self.address for other in everyone)
        if len(everyone) > most_connections() or mine > OF_ONE_ADDRESS:
            self.end(TOO_MANY_CONNECTIONS)
        else:
            self.expect_head()

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


def network_of(address: str) -> str:
    """Of an IPv6 address its first 64 bits; an IPv4 address as it is, also one written as IPv6."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    return str(parsed.ipv4_mapped or ipaddress.IPv6Address(int(parsed) >> 64 << 64))


def raise_file_limit() -> None:
    """Raises this process's limit of open files to MOST_FILES, as far as the system allows it."""
    with suppress(ImportError, OSError, ValueError):  # no such limit on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_connections() -> int:
    """CONNECTIONS, or fewer if the process may not open so many files."""
    try:
        import resource
    except ImportError:
        return CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if soft == resource.RLIM_INFINITY else min(CONNECTIONS, max(1, soft - OTHER_FILES))
